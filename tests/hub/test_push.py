"""``uqff push``: what is uploaded, the card, checksums, what breaks off and is gone on with, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml

import uqff
from tests.support.command_line import call
from tests.support.hub_server import SIGNATURE, TOKEN, Asked, Handler, Hub
from tests.support.tiny_files import ROOT
from uqff import FormatError, HubError, ShardError, UnsupportedError
from uqff.publish.card import MADE_BY

# huggingface_hub's own way to call httpx, when it uploads.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

GOLDEN = ROOT / "tests" / "golden"
NAME = "owner/name"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two types of one model, with a report that names what was quantised."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "v1" / "1.2.0" / "qwen2-f16", folder)
    for path in folder.glob("*.uqff_report.json"):
        path.unlink()
    (folder / "config.json").write_text('{"hidden_size": 4}')
    assert call("report", folder, "--write", "--base-model=Qwen/Qwen2-0.5B")[0] == 0
    (folder / "notes.txt").write_text("mine")
    (folder / ".hidden").write_text("mine")
    return folder


GOING = ["afq4-0.uqff", "config.json", "fp8-0.uqff", "uqff_report.json"]


def test_a_dry_run_shows_all_and_asks_nobody(hub: Hub, model: Path) -> None:
    """Nor does it need the package; nothing in the directory changes."""
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    code, out, errors = call("push", model, NAME, "--dry-run")
    assert (code, errors) == (0, "uqff: not uploaded, as it is of no model: notes.txt\n")
    assert not hub.asked
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before
    for name in GOING:
        assert f"{hashlib.sha256(before[name]).hexdigest()}" in out
    found = uqff.push(model, NAME, dry_run=True)
    assert [each.name for each in found.files] == [*sorted([*GOING, "README.md"]), "SHA256SUMS"]
    assert found.card is not None
    assert out.endswith(found.card)
    assert found.url is None


def test_the_card(model: Path, tmp_path: Path) -> None:
    """Metadata that the hub knows; a row for each type; commands with the names of this very repository."""
    measured = {"outputs": [{"quant": "fp8", "types": [{"stored": "fp8", "relative_rms": 0.026789}]}]}
    (tmp_path / "measured.json").write_text(json.dumps(measured))
    card = uqff.push(model, NAME, dry_run=True, measured=tmp_path / "measured.json").card
    assert card is not None
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "tags": ["uqff", "mistral.rs"],
        "base_model": "Qwen/Qwen2-0.5B",
        "base_model_relation": "quantized",
    }
    assert MADE_BY in body
    assert "| type | files | stored as | bits/weight | size | relative RMS error |" in body
    assert "| fp8 | fp8-0.uqff | 9 fp8 | 8.019 | 51.4 KB | fp8 0.0268 |" in body
    assert f"mistralrs run -m {NAME} --from-uqff fp8-0.uqff" in body
    assert f'Which.Plain(model_id="{NAME}", from_uqff="afq4-0.uqff")' in body
    assert f'uqff.load_model("{NAME}:afq4")' in body
    for code in body.split("```python\n")[1:]:
        compile(code.partition("```")[0], "card", "exec")
    odd = uqff.push(model, NAME, dry_run=True, base_model="a | b\n<script>").card
    assert odd is not None
    assert "base_model" not in odd.split("---\n", 2)[1]
    assert "a \\| b \\<script\\> in UQFF 1.2.0" in odd
    old = uqff.push(GOLDEN / "v0" / "qwen2-unquant-f16", NAME, dry_run=True).card
    assert old is not None
    assert f"mistralrs-server -i plain -m {NAME} --from-uqff q4_0-0.uqff" in old


def test_what_arrives(hub: Hub, model: Path) -> None:
    """The files as they are, a list of checksums that is right, one commit; it is read again from there."""
    code, out, _ = call("push", model, NAME, "--private", "--message", "First")
    assert code == 0
    files = hub.files(NAME)
    assert {name: files[name] for name in GOING} == {name: (model / name).read_bytes() for name in GOING}
    assert sorted(files) == sorted([*GOING, ".gitattributes", "README.md", "SHA256SUMS"])
    asked = hub.created[0]
    assert asked.get("private") is True or asked.get("visibility") == "private"  # its name before and since 1.0
    assert out.startswith(f"{hub.endpoint}/{NAME}/commit/{hub.branches[NAME, 'main']}")
    commits = [each for each in hub.asked if "/commit/" in each.path]
    assert len(commits) == 1
    assert json.loads(commits[0].body.splitlines()[0])["value"]["summary"] == "First"
    assert call("checksum", NAME, "--check")[0] == 0
    with uqff.open(f"{NAME}:fp8") as ours, uqff.open(f"{model}:fp8") as theirs:
        assert dict(ours) == dict(theirs)


def test_an_upload_that_broke_off_is_gone_on_with(hub: Hub, model: Path) -> None:
    """What has arrived is not sent again, and nothing appears before all is there."""
    puts: list[str] = []

    def breaks(handler: Handler, asked: Asked) -> bool:
        if not asked.path.startswith("/put/"):
            return False
        puts.append(asked.path)
        if len(puts) != 2:
            return False
        handler.send(403, b"no")
        return True

    hub.fault = breaks
    code, out, errors = call("push", model, NAME, "--quiet")
    assert (code, out, errors.count("\n")) == (2, "", 1)
    assert "status 403" in errors
    assert list(hub.files(NAME)) == [".gitattributes"]
    hub.fault = None
    before = [each.path for each in hub.asked if each.path.startswith("/put/")]
    assert call("push", model, NAME, "--quiet")[0] == 0
    again = [each.path for each in hub.asked if each.path.startswith("/put/")][len(before) :]
    assert again == [puts[1]]
    assert sorted(hub.files(NAME)) == sorted([*GOING, ".gitattributes", "README.md", "SHA256SUMS"])


def test_branches_and_pull_requests(hub: Hub, model: Path) -> None:
    """A branch is made if there is none; a pull request needs a repository, and makes none."""
    assert uqff.push(model, NAME, revision="v1").url
    assert "fp8-0.uqff" in hub.files(NAME, "v1")
    assert "fp8-0.uqff" not in hub.files(NAME)
    created = len(hub.created)
    assert uqff.push(model, NAME, create_pr=True).url == f"{hub.endpoint}/{NAME}/discussions/1"
    assert len(hub.created) == created
    assert "fp8-0.uqff" in hub.files(NAME, "refs/pr/1")
    with pytest.raises(HubError, match="no such repository"):
        uqff.push(model, "owner/none", create_pr=True)


def test_a_card_of_ones_own_is_kept(hub: Hub, model: Path) -> None:
    """In the repository, unless this made it; in the directory, which goes as it is."""
    uqff.push(model, NAME)
    assert MADE_BY.encode() in hub.files(NAME)["README.md"]
    hub.put(NAME, hub.files(NAME) | {"README.md": b"# Mine"})
    assert uqff.push(model, NAME).card is None
    assert hub.files(NAME)["README.md"] == b"# Mine"
    assert "README.md" not in hub.files(NAME)["SHA256SUMS"].decode()
    (model / "README.md").write_text("# Ours")
    assert uqff.push(model, NAME).card is None
    assert hub.files(NAME)["README.md"] == b"# Ours"


def test_what_is_refused_before_anything_is_sent(hub: Hub, model: Path, tmp_path: Path) -> None:
    """A broken model, a list that is not right, a link out of the directory, no model, a name that is none."""
    for name in ("name", "a/b/c", "owner/name@x", "owner/name:q4k", "hf://owner/name"):
        with pytest.raises(UnsupportedError, match="not the name of a repository"):
            uqff.push(model, name)
    with pytest.raises(ShardError, match=r"no .uqff file"):
        uqff.push(tmp_path, NAME)
    (model / "SHA256SUMS").write_text(f"{'0' * 64}  fp8-0.uqff\n")
    with pytest.raises(FormatError, match="not as the list of checksums says"):
        uqff.push(model, NAME, dry_run=True)
    with pytest.raises(FormatError, match="not as the list of checksums says"):
        uqff.push(model, NAME, revision="v1")
    (model / "SHA256SUMS").unlink()
    outside = tmp_path / "secret"
    outside.write_text("{}")
    (model / "tokenizer.json").symlink_to(outside)
    with pytest.raises(FormatError, match="link out of the directory"):
        uqff.push(model, NAME)
    (model / "tokenizer.json").unlink()
    data = bytearray((model / "fp8-0.uqff").read_bytes())
    (model / "fp8-0.uqff").write_bytes(data[:-1])
    with pytest.raises(FormatError, match=r"not to be published: .*truncated"):
        uqff.push(model, NAME)
    (model / "fp8-0.uqff").unlink()
    with pytest.raises(FormatError, match=r"not to be published: .*shard is missing"):
        uqff.push(model, NAME)
    assert not hub.asked


@pytest.mark.parametrize("where", ["/api/repos/create", "/preupload/", "/info/lfs/", "/put/", "/commit/"])
@pytest.mark.parametrize("status", [401, 403, 500])
def test_no_token_is_shown(
    hub: Hub, model: Path, where: str, status: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the hub fails, and whatever it repeats of what it was sent."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def fails(handler: Handler, asked: Asked) -> bool:
        if where not in asked.path:
            return False
        echo = f"you sent {asked.headers.get('authorization')}, {TOKEN} to http://h/put/x?{SIGNATURE}"
        handler.send(status, echo.encode(), {"X-Error-Message": echo})
        return True

    hub.fault = fails
    code, out, errors = call("push", model, NAME, "--quiet")
    assert (code, out) == (2, "")
    assert f"(file hf://{NAME})" in errors
    shown = "".join((errors, *capfd.readouterr()))
    assert TOKEN not in shown
    assert SIGNATURE not in shown
