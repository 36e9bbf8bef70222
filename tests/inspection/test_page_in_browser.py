"""The page of ``uqff inspect --html`` in a real browser: what is seen and what can be done. Without one, skipped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.support.browser import Browser, browsing
from tests.support.tiny_files import GOLDEN
from uqff.cli import main
from uqff.inspection.values import number_text

MODEL = GOLDEN.parent / "v1" / "1.2.0" / "qwen2-f16" / "afq4-0.uqff"

CONTRAST = """
(() => {
  const light = colour => {
    const [r, g, b] = colour.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const probe = document.body.appendChild(document.createElement('p'));
  probe.style.color = 'Canvas';
  const ground = light(getComputedStyle(probe).color);
  probe.style.color = '';
  return ['', 'faint', 'error', 'columns'].map(name => {
    probe.className = name;
    const [low, high] = [ground, light(getComputedStyle(probe).color)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  });
})()
"""
"""Contrast of each kind of text with what it stands on (WCAG 2, 1.4.3)."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose directory has a name of one very long word."""
    folder = tmp_path_factory.mktemp("page")
    model = folder / ("model" * 30) / MODEL.name
    model.parent.mkdir()
    shutil.copy(MODEL, model)
    asked("inspect", str(model), "--html", str(folder / "page.html"))
    return folder / "page.html"


def asked(*arguments: str) -> str:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def document(*arguments: str) -> Any:
    return json.loads(asked("inspect", str(MODEL), *arguments, "--json"))


def texts(browser: Browser, selector: str) -> list[str]:
    """What is seen of elements, in their order."""
    found: list[str] = browser.ask(f"[...document.querySelectorAll({selector!r})].map(each => each.innerText)")
    return found


def test_what_is_seen_is_what_is_there(browser: Browser, page: Path) -> None:
    """Types, layers and sizes of ``--json``; nothing is asked for but the page, and nothing said in the console."""
    browser.requests.clear()
    browser.open(page)
    assert (browser.requests, browser.said) == ([page.as_uri()], [])
    model = document()
    cells = iter(texts(browser, "h2 + .wide td"))
    assert list(zip(cells, cells, cells, cells, cells, strict=True)) == [
        (row["type"], *(f"{row[name]:,}" for name in ("layers", "weights")), f"{row['bits_per_weight']:.4f}",
         f"{row['payload_bytes']:,}")
        for row in model["types"]
    ]  # fmt: skip
    assert texts(browser, ".columns > *") == ["layer", "type", "shape", "bits/weight", "bytes"]
    cells = iter(texts(browser, "summary > *"))
    assert list(zip(cells, cells, cells, cells, cells, strict=True)) == [
        (row["key"], row["type"], " x ".join(map(str, row["shape"])), f"{row['bits_per_weight']:.3f}",
         f"{row['bytes']:,}")
        for row in model["layers"]
    ]  # fmt: skip


def drawn(browser: Browser, selector: str, edge: str, length: str) -> dict[str, tuple[float, float]]:
    """Of all bars of a picture: by their titles, where each begins and how long it is, as parts of the picture."""
    found = browser.ask(
        f"(() => {{ const picture = document.querySelector('{selector}'), all = picture.getBoundingClientRect();"
        "return [...picture.querySelectorAll('rect')].map(each => { const at = each.getBoundingClientRect();"
        f"return [each.textContent, (at.{edge} - all.{edge}) / all.{length}, at.{length} / all.{length}]; }}); }})()"
    )
    return {title: (first, long) for title, first, long in found}


def test_bytes_are_drawn_where_they_lie(browser: Browser, page: Path) -> None:
    """A strip is as long as its file; every entry of a layer is in it, at its place, in its length."""
    browser.open(page)
    data = MODEL.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    expected = {}
    for name, entry in header.items():
        if name != "__metadata__" and not name.startswith("uqff."):
            first, last = (begin + offset for offset in entry["data_offsets"])
            length = max((last - first) / len(data), 0.0003)  # a single byte is seen, too
            expected[f"{name}: {last - first:,} bytes at {first:,}"] = (first / len(data), length)
    bars = drawn(browser, "svg.map", "left", "width")
    assert bars == {title: pytest.approx(place, abs=2e-5) for title, place in expected.items()}


def test_a_layer_opens_and_shows_its_fields_and_histogram(browser: Browser, page: Path) -> None:
    """By the keyboard alone: tab goes from line to line, enter and space open and close."""
    browser.open(page)
    focused = "document.activeElement.querySelector('code').innerText"
    layers = document()["layers"]
    reached = []
    for _ in layers:
        browser.press("Tab")
        reached.append(browser.ask(focused))
    assert reached == [row["key"] for row in layers]
    is_open = "[...document.querySelectorAll('details')].map(each => each.open)"
    browser.press("Enter")
    assert browser.ask(is_open) == [False] * (len(layers) - 1) + [True]
    layer = document(layers[-1]["key"])
    cells = iter(texts(browser, "details[open] td"))
    shown = [each[:4] for each in zip(cells, cells, cells, cells, cells, strict=True)]
    assert shown == [(f"{f['offset']:,}", f"{f['bytes']:,}", f["type"], f["path"]) for f in layer["fields"]]
    found = layer["statistics"]["histogram"]
    edges = list(map(number_text, found["edges"]))
    bars = drawn(browser, "details[open] svg", "top", "height")
    assert bars == {
        f"{first} to {last}: {count:,}": pytest.approx(
            (1 - count / max(found["counts"]), count / max(found["counts"])), abs=2e-3
        )
        for first, last, count in zip(edges[:-1], edges[1:], found["counts"], strict=True)
    }
    browser.press(" ")
    assert browser.ask(is_open) == [False] * len(layers)


@pytest.mark.parametrize("width", [320, 800, 1280])
def test_nothing_lies_outside_a_narrow_window(browser: Browser, page: Path, width: int) -> None:
    """All layers open: what is wide scrolls by itself, and no value is squeezed into a column of letters."""
    browser.open(page, width)
    browser.ask("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert browser.ask("document.documentElement.scrollWidth") == width
    outside = browser.ask(
        "[...document.querySelectorAll('h1, dt, dd, summary > *, .columns > *, svg')]"
        ".filter(each => each.getBoundingClientRect().right > innerWidth).map(each => each.innerText)"
    )
    assert outside == []
    lines = "[...document.querySelectorAll('{}')].map(each => each.getClientRects()[0].height)"
    assert max(browser.ask(lines.format("dd"))) < 3 * 24
    assert max(browser.ask(lines.format("summary"))) < 4 * 24
    assert max(browser.ask(lines.format("tr"))) < 6 * 24


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(browser: Browser, page: Path, scheme: str) -> None:
    """On a light ground and a dark one: WCAG asks for 4.5 to 1."""
    browser.open(page, scheme=scheme)
    assert min(browser.ask(CONTRAST)) >= 4.5


def test_pictures_have_names(browser: Browser, page: Path) -> None:
    """For who does not see them."""
    browser.open(page)
    names = browser.ask("[...document.querySelectorAll('svg')].map(each => each.getAttribute('aria-label'))")
    assert names == [f"map of the bytes of {MODEL.name}", *["histogram"] * len(document()["layers"])]
