"""A hub that refuses, fails, stalls, or answers what was not asked for: one line says so, and no token is in it."""

from __future__ import annotations

import shutil
import sys
import time
import traceback
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

import uqff
from tests.support.hub_server import SIGNATURE, TOKEN, Asked, Fault, Handler, Hub
from tests.support.small_models import files_of
from tests.support.tiny_files import ROOT
from uqff import HubError, UnsupportedError
from uqff.cli import main
from uqff.hub.client import redacted

MODEL = ROOT / "tests" / "golden" / "v1" / "1.2.0" / "qwen2-f16"
NAME = "owner/name"


@pytest.fixture
def hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """With a model."""
    monkeypatch.setattr("uqff.inspection.remote.FIRST", 1024)
    hub.put(NAME, files_of(MODEL) | {"config.json": b"{}"})
    return hub


def on(where: str, answer: Callable[[Handler, Asked], None], times: int = 1000) -> Fault:
    """A fault of the addresses that contain a text, so many times."""
    left = [times]

    def fault(handler: Handler, asked: Asked) -> bool:
        if where not in f"{asked.path}?{asked.query}" or not left[0]:
            return False
        left[0] -= 1
        answer(handler, asked)
        return True

    return fault


def status(code: int, **headers: str) -> Callable[[Handler, Asked], None]:
    """An answer of a status, whose text and headers have what must not be shown: a careless proxy repeats them."""
    said = {name.replace("_", "-"): value for name, value in headers.items()}

    def answer(handler: Handler, asked: Asked) -> None:
        echo = f"you sent {asked.headers.get('authorization')} to http://h/cdn/x?{SIGNATURE}"
        handler.send(code, echo.encode(), {"X-Error-Message": echo, **said})

    return answer


def ranged(
    change: Callable[[dict[str, str], bytes], tuple[int, dict[str, str], bytes]],
) -> Callable[[Handler, Asked], None]:
    """An answer to a range that is not the right one."""

    def answer(handler: Handler, asked: Asked) -> None:
        data = handler.hub.objects[asked.path.rpartition("/")[2]]
        begin, end = map(int, asked.headers["range"].removeprefix("bytes=").split("-"))
        said = {"Content-Range": f"bytes {begin}-{end}/{len(data)}"}
        code, headers, body = change(said, data[begin : end + 1])
        handler.send(code, body, headers)

    return answer


def cut_off(handler: Handler, asked: Asked) -> None:
    """The connection ends in the middle of the body."""
    data = handler.hub.objects[asked.path.rpartition("/")[2]]
    begin, end = map(int, asked.headers["range"].removeprefix("bytes=").split("-"))
    handler.send(
        206,
        data[begin : (begin + end) // 2],
        {"Content-Range": f"bytes {begin}-{end}/{len(data)}", "Content-Length": str(end + 1 - begin)},
    )
    handler.close_connection = True


def hung_up(handler: Handler, asked: Asked) -> None:
    """There is no answer at all."""
    handler.close_connection = True


def dripping(handler: Handler, asked: Asked) -> None:
    """A byte now and then: never long enough without one for a timeout of the connection."""
    handler.send_response(206)
    data = handler.hub.objects[asked.path.rpartition("/")[2]]
    begin, end = map(int, asked.headers["range"].removeprefix("bytes=").split("-"))
    handler.send_header("Content-Range", f"bytes {begin}-{end}/{len(data)}")
    handler.send_header("Content-Length", str(end + 1 - begin))
    handler.end_headers()
    for _ in range(100):
        try:
            handler.wfile.write(b"x")
            handler.wfile.flush()
        except OSError:
            break
        time.sleep(0.05)
    handler.close_connection = True


WRONG = "/cdn/"

FAULTS: dict[str, tuple[Fault, str]] = {
    "no repository": (on("/api/", status(404, X_Error_Code="RepoNotFound")), "no such repository, or it is private"),
    "no such revision": (on("/api/", status(404, X_Error_Code="RevisionNotFound")), "no such revision"),
    "gated": (on("/api/", status(403, X_Error_Code="GatedRepo")), "access to the repository must be asked for"),
    "not listed, 401": (on("/api/", status(401)), "the hub refuses: got status 401"),
    "not listed, 403": (on("/api/", status(403)), "status 403"),
    "not listed, 429": (on("/api/", status(429)), "status 429"),
    "not listed, 500": (on("/api/", status(500)), "the hub did not answer as it should"),
    "list is no JSON": (on("/api/", lambda handler, _: handler.send(200, b"<html>")), "did not answer as it should"),
    "list without a commit": (on("/api/", lambda h, _: h.json({"id": NAME, "siblings": []})), "not a commit"),
    "list without lengths": (
        on("/api/", lambda h, _: h.json({"id": NAME, "sha": "0" * 40, "siblings": [{"rfilename": "a.uqff"}]})),
        "file without a length",
    ),
    "document, 403": (on("/resolve/", status(403)), "the hub refuses"),
    "range, 401": (on(WRONG, status(401)), "status 401"),
    "range, 404": (on(WRONG, status(404)), "status 404"),
    "range, 416": (on(WRONG, status(416)), "status 416"),
    "range, 429": (on(WRONG, status(429, Retry_After="0")), "the hub failed 3 times"),
    "range, 500": (on(WRONG, status(500)), "the hub failed 3 times"),
    "range, 503": (on(WRONG, status(503)), "the hub failed 3 times"),
    "hung up": (on(WRONG, hung_up), "the hub failed 3 times"),
    "cut off": (on(WRONG, cut_off), "the hub failed 3 times"),
    "whole file": (on(WRONG, ranged(lambda said, data: (200, {}, data))), "the hub sends no ranges"),
    "no range named": (on(WRONG, ranged(lambda said, data: (206, {}, data))), "the hub sent another range"),
    "another range": (
        on(WRONG, ranged(lambda said, data: (206, {"Content-Range": f"bytes 1-{len(data)}/999999"}, data))),
        "the hub sent another range",
    ),
    "another length": (
        on(WRONG, ranged(lambda said, data: (206, {"Content-Range": said["Content-Range"] + "0"}, data))),
        "the file has another length than was listed",
    ),
    "too few bytes": (on(WRONG, ranged(lambda said, data: (206, said, data[:-1]))), "the hub failed 3 times"),
    "too many bytes": (on(WRONG, ranged(lambda said, data: (206, said, data + b"x"))), "more than was asked for"),
    "encoded": (
        on(WRONG, ranged(lambda said, data: (206, said | {"Content-Encoding": "gzip"}, data))),
        "the hub sent an encoded range",
    ),
    "another commit": (
        on("/resolve/", lambda handler, _: handler.send(200, b"{}", {"X-Repo-Commit": "f" * 40})),
        "the hub sent another commit",
    ),
    "round and round": (
        on("/resolve/", lambda handler, asked: handler.send(302, b"", {"Location": asked.path})),
        "the hub failed 3 times",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_that_fails(hub: Hub, fault: str, capfd: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2, the name of the repository; nothing secret, wherever it was sent from."""
    hub.fault, says = FAULTS[fault]
    result = CliRunner().invoke(main, ["inspect", f"{NAME}:fp8"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr
    assert result.stderr.count("\n") == 1
    assert f"hf://{NAME}" in result.stderr
    with pytest.raises(HubError) as caught:
        uqff.verify(f"hf://{NAME}", isq="fp8")
    traced = traceback.format_exception(type(caught.value), caught.value, caught.value.__traceback__)
    shown = "".join((*capfd.readouterr(), result.output, repr(caught.value.__dict__), *traced))
    assert TOKEN not in shown
    assert SIGNATURE not in shown


@pytest.mark.parametrize("times", [1, 2])
def test_what_passes_is_asked_for_again(hub: Hub, times: int) -> None:
    """A connection that broke, a server at work on itself, an address whose signature has expired."""
    expected = CliRunner().invoke(main, ["inspect", str(MODEL), "--isq=fp8"]).output
    for answer in (cut_off, hung_up, status(503), status(429, Retry_After="0")):
        hub.fault = on(WRONG, answer, times)
        result = CliRunner().invoke(main, ["inspect", f"{NAME}:fp8"])
        assert result.output == expected.replace(str(MODEL), f"hf://{NAME}")
    for answer in (status(500), status(503), status(429, Retry_After="0")):
        hub.fault = on("/api/", answer, times)
        assert uqff.verify(f"hf://{NAME}", isq="fp8").clean
    seen: list[str] = []

    def expired(handler: Handler, asked: Asked) -> bool:
        seen.append(asked.path)
        if WRONG not in asked.path or sum(WRONG in each for each in seen) != 2:
            return False
        handler.send(403)
        return True

    hub.fault = expired
    assert CliRunner().invoke(main, ["inspect", f"{NAME}:fp8"]).exit_code == 0
    assert [each for each in seen if "/resolve/" in each and each.endswith("fp8-0.uqff")][1:]


def test_a_hub_is_left_alone_as_long_as_it_asks(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """In seconds or until a date, and half a minute at most; an answer that says neither counts for nothing."""
    slept: list[float] = []
    clock = SimpleNamespace(sleep=slept.append, time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr("uqff.hub.client.time", clock)
    date = formatdate(time.time() + 12, usegmt=True)
    for place in ("/api/", WRONG):
        for said, low, high in (("7", 7, 7), (date, 5, 12), ("86400", 30, 30), ("soon", 0, 0), ("-1", 0, 0)):
            hub.fault = on(place, status(429, Retry_After=said), 1)
            assert uqff.verify(f"hf://{NAME}", isq="fp8").clean
            assert low <= slept.pop() <= high
    assert not slept


def test_a_slow_hub_is_given_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that says nothing, and one that sends a byte now and then: both within seconds."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    monkeypatch.setattr("uqff.hub.client.SLOWEST", 1 << 30)
    for answer, says in ((dripping, "the hub is too slow"), (lambda *_: time.sleep(0.3), "the hub failed 3 times")):
        hub.fault = on(WRONG, answer)
        result = CliRunner().invoke(main, ["inspect", f"{NAME}:fp8"])
        assert (result.exit_code, says in result.stderr) == (2, True), result.output


def test_the_token_goes_to_the_hub_alone(hub: Hub) -> None:
    """Not to the hosts that it sends us to; a private repository is read with it, and said to be one without."""
    hub.private.add(NAME)
    assert CliRunner().invoke(main, ["inspect", f"{NAME}:fp8"]).exit_code == 0
    hosts = {(each.host, "authorization" in each.headers) for each in hub.asked}
    assert hosts == {("127.0.0.1", True), ("localhost", False)}


def test_without_a_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A private repository looks as if there were none."""
    hub.private.add(NAME)
    monkeypatch.delenv("HF_TOKEN")
    result = CliRunner().invoke(main, ["inspect", f"{NAME}:fp8"])
    assert (result.exit_code, result.stderr) == (2, f"uqff: no such repository, or it is private (file hf://{NAME})\n")


def test_hostile_lists(hub: Hub, tmp_path: Path) -> None:
    """Names that lead out of a folder are of no file in it; a length that no disk has is refused by name."""
    for name in ("../up.uqff", "/etc/up.uqff", "a/../../up.uqff", "a\\..\\up.uqff", ".."):
        hub.put("owner/evil", {name: b"x", "config.json": b"{}"})
        result = CliRunner().invoke(main, ["inspect", "owner/evil"])
        assert "no .uqff file in the directory" in result.stderr, name
    document = {"id": NAME, "sha": "0" * 40, "siblings": [{"rfilename": "a.uqff", "size": 2**63 - 1}]}
    hub.fault = on("/api/", lambda handler, _: handler.json(document))
    result = CliRunner().invoke(main, ["inspect", NAME])
    assert result.exit_code == 2
    assert "no file of that length is possible here" in result.stderr
    assert f"(file hf://{NAME}/a.uqff)" in result.stderr


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """How to get it is said, and of a source that it may be a mistyped path; what lies on this machine needs it not."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    needed = r"a repository of the hub needs huggingface_hub \(pip install 'uqff-format\[hub\]'\): got hf://owner/name"
    with pytest.raises(UnsupportedError, match=f"^no such file or directory, and {needed}"):
        uqff.inspect("owner/name")
    shutil.copy(MODEL / "fp8-0.uqff", tmp_path)
    with pytest.raises(UnsupportedError, match=f"^{needed}"):
        uqff.push(tmp_path, NAME)
    assert uqff.inspect(MODEL / "fp8-0.uqff").generation == "1.x"


def test_what_is_secret_is_struck_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token that is set, whatever it looks like; what looks like one; the signatures of addresses."""
    monkeypatch.setenv("HF_TOKEN", "unusual-token")
    said = f"Bearer unusual-token, {TOKEN}x at https://cdn.example/a/b?X-Amz-Signature=1&b=2 and https://x.example/y"
    assert redacted(said) == "Bearer ***, hf_*** at https://cdn.example/a/b?... and https://x.example/y"
    assert redacted("(…)84538?X-Signature=1). Is it so? Yes=no") == "(…)84538?...). Is it so? Yes=no"
    assert redacted("a/b?c=d'), 'e'") == "a/b?...'), 'e'"
