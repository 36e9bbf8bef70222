"""``uqff inspect --html``: a well-formed page with all that it shows in it; nothing that a file says is HTML there."""

from __future__ import annotations

import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import uqff
from tests.hub.test_failures import NAME
from tests.support.hub_server import serving
from tests.support.tiny_files import GOLDEN, q8_0, unquant, write_file
from uqff.cli import main
from uqff.inspection import page as page_module
from uqff.inspection.statistics import BINS

MODEL = GOLDEN.parent / "v1" / "1.2.0" / "qwen2-f16"
EMPTY = {"meta", "rect", "br"}


class Page(HTMLParser):
    """What is in a page; whatever is opened must be closed again."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "rect" or tag not in EMPTY:  # of SVG: closed by itself or with a title in it
            self.open.append(tag)
        self.tags.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(each == tag for each, _ in self.tags)


def made(path: object, target: Path, *options: str, code: int = 0) -> Page:
    result = CliRunner().invoke(main, ["inspect", str(path), "--html", str(target), *options])
    assert result.exit_code == code, result.output
    return Page(target.read_text("utf-8"))


def test_everything_is_in_the_page(tmp_path: Path) -> None:
    """Types, layers with fields and values, histograms; and no resource that a browser would have to ask for."""
    page = made(f"{MODEL}:afq4", tmp_path / "page.html")
    text = " ".join(page.texts)
    with uqff.open(f"{MODEL}:afq4") as file:
        keys = list(file)
        entries = sum(len(file.places(key)) for key in keys)
    assert all(key in page.texts for key in keys)
    assert (page.count("details"), page.count("svg")) == (len(keys), len(keys) + 1)
    assert page.count("rect") == entries + BINS * len(keys)
    for expected in ("afq4", "afq6", "1.2.0", "64 x 64", "weight.group_size", "inputs per group: 32, 64 or 128"):
        assert expected in text
    assert not {"script", "link", "img", "iframe", "object", "a"} & {tag for tag, _ in page.tags}
    assert not any(name in ("src", "href", "xlink:href") or name.startswith("on") for _, a in page.tags for name in a)
    raw = (tmp_path / "page.html").read_text("utf-8")
    assert "url(" not in raw
    assert "@import" not in raw
    assert "default-src 'none'" in raw


def test_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With --no-stats, and of a model on the hub, no weight is read, and none is made up."""
    page = made(f"{MODEL}:fp8", tmp_path / "page.html", "--no-stats")
    assert "The weights were not read: no histograms." in page.texts
    assert page.count("svg") == 1
    with serving(monkeypatch, tmp_path / "cache") as hub:
        hub.put(NAME, {"fp8-0.uqff": (MODEL / "fp8-0.uqff").read_bytes()})
        made(NAME, tmp_path / "remote.html")
    local, remote = ((tmp_path / f"{name}.html").read_text("utf-8") for name in ("page", "remote"))
    assert remote == local.replace(str(MODEL), f"hf://{NAME}")


def test_names_are_no_html(tmp_path: Path) -> None:
    """Of layers, files and metadata; what is broken is shown as such, and the exit code says it."""
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&lt;"
    layer = uqff.Layer(uqff.quantize(torch.ones(2, 32), "q8_0"))
    folder = tmp_path / "<b>&amp;"
    folder.mkdir()
    uqff.save({f"{evil}.up": layer}, folder / "<i>.uqff")
    page = made(folder / "<i>.uqff", tmp_path / "page.html")
    assert not {"script", "img", "b"} & {tag for tag, _ in page.tags}
    assert f"{evil}.up" in page.texts
    assert f"{folder}/<i>.uqff" in page.texts
    broken = write_file(tmp_path / "m.uqff", {"0": unquant([1.0, 2.0]), "1": q8_0(1.0, [1] * 32)[:-1]})
    page = made(broken, tmp_path / "broken.html", code=1)
    assert "broken" in page.texts
    assert any("truncated" in text or "length" in text for text in page.texts)


def test_a_page_has_no_control_characters(tmp_path: Path) -> None:
    """What a terminal would act on, or an editor, when somebody looks at the page there."""
    folder = tmp_path / "\x1b[31m\u202e\n"
    folder.mkdir()
    uqff.save({"\x1b]0;.up": uqff.Layer(uqff.quantize(torch.ones(2, 32), "q8_0"))}, folder / "a.uqff")
    page = made(folder / "a.uqff", tmp_path / "page.html")
    assert f"{tmp_path}/\\x1b[31m\\u202e\\n/a.uqff" in page.texts
    text = (tmp_path / "page.html").read_text("utf-8")
    assert all(c.isprintable() for c in text.replace("\n", ""))


def test_a_page_has_a_bound_that_it_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model with more layers, all are listed, and the first ones shown in full."""
    monkeypatch.setattr(page_module, "MAX_DETAILED", 2)
    page = made(f"{MODEL}:fp8", tmp_path / "page.html")
    assert "The first 2 of 9 layers are shown in full." in page.texts
    assert (page.count("details"), page.count("svg")) == (9, 3)


def test_a_set_of_many_shards_is_walked_through_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are asked for their places as often as those of one file, not once a file; each strip has its own."""
    layers = dict.fromkeys(range(6), uqff.quantize(torch.ones(2, 32), "q8_0"))
    assert len(uqff.save(layers, tmp_path / "m-0.uqff", shard_bytes=1)) == 6
    uqff.save(layers, tmp_path / "one.uqff")
    asked: list[object] = []
    places = uqff.UqffFile.places

    def counted(file: uqff.UqffFile, key: str) -> object:
        asked.append(key)
        return places(file, key)

    monkeypatch.setattr(uqff.UqffFile, "places", counted)
    made(tmp_path / "one.uqff", tmp_path / "one.html", "--no-stats")
    of_one = list(asked)
    asked.clear()
    page = made(tmp_path / "m-0.uqff", tmp_path / "page.html", "--no-stats")
    assert asked == of_one
    labels = [text for text in page.texts if " bytes at " in text]
    assert [label.split(":")[0] for label in labels] == [str(number) for number in range(6)]
    assert (page.count("svg"), page.count("rect")) == (6, 6)


def test_wrong_calls(tmp_path: Path) -> None:
    """One layer, JSON, or several models do not go with it; nothing is written then."""
    for arguments in ([f"{MODEL}:fp8", "1"], [f"{MODEL}:fp8", "--json"], [str(MODEL)]):
        result = CliRunner().invoke(main, ["inspect", *arguments, "--html", str(tmp_path / "page.html")])
        assert result.exit_code in (1, 2)
        assert result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["fp8-0.uqff", "fp8-1.uqff", "residual.safetensors", "config.json", "SHA256SUMS"])
def test_a_page_replaces_no_file_of_the_model(tmp_path: Path, name: str) -> None:
    """It is written without --force; in the model's directory it may lie under another name."""
    shutil.copy(MODEL / "fp8-0.uqff", tmp_path)
    (tmp_path / "SHA256SUMS").write_bytes(b"")
    before = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    for path in (tmp_path, tmp_path / "fp8-0.uqff"):
        result = CliRunner().invoke(main, ["inspect", str(path), "--html", str(tmp_path / name)])
        assert (result.exit_code, "a file of the model has that name" in result.stderr) == (2, True)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == before
    made(tmp_path, tmp_path / "page.html", "--no-stats")
