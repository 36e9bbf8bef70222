"""The pages of the spec: their tables are those of the code, their links lead somewhere."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from uqff.container.report import (
    LayerEntry,
    Report,
    ReportedFallback,
    ReportedOutput,
    check_report,
    read_report,
    report_document,
)

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "spec"
SITE = ROOT / "docs" / "pages"
PAGES = sorted(SPEC.rglob("*.md"))
REFERENCE = sorted((SITE / "reference").glob("*.md"))

LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = HEADING.findall(FENCE.sub("", page.read_text("utf-8")))
    kept = (re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in kept}


def dead(page: Path, link: str) -> bool:
    """Whether a relative link leads nowhere."""
    if link.startswith(("http://", "https://")):
        return False
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if target.is_relative_to(SITE / "spec"):  # where the site has the pages of the specification
        target = SPEC / target.relative_to(SITE / "spec")
    if not target.exists():
        return True
    return bool(anchor) and anchor not in anchors(target)


def test_tables_agree_with_the_code() -> None:
    """No offset table, list of codes or index differs from what the code declares."""
    command = [sys.executable, "-m", "tools.vectors.tables", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", [*PAGES, *REFERENCE], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page: Path) -> None:
    """Every relative link of a page leads to a file, and its anchor to a heading."""
    links = LINK.findall(FENCE.sub("", page.read_text("utf-8")))
    assert [link for link in links if dead(page, link)] == []


def test_the_spec_points_to_nothing_outside_itself() -> None:
    """It can be taken out of this repository, and is whole."""
    outside = [
        (page.name, link)
        for page in PAGES
        for link in LINK.findall(FENCE.sub("", page.read_text("utf-8")))
        if not link.startswith("http")
        if not (page.parent / link.partition("#")[0]).resolve().is_relative_to(SPEC)
    ]
    assert outside == []


@pytest.mark.parametrize("folder", ["bad", "bad-entries"])
def test_rules_of_broken_files_are_in_the_spec(folder: str) -> None:
    """The section that a broken file names exists."""
    index = json.loads((SPEC / "vectors" / folder / "index.json").read_text("utf-8"))
    assert {e["section"] for e in index if dead(SPEC / "README.md", e["section"])} == set()


WORKED = {
    "gguf": ("gguf/q4_0-bias-f32", (0, 1, 16)),
    "unquant": ("unquant/bf16-bias", (0,)),
    "hqq": ("hqq/hqq4-bias", (0, 128)),
    "fp8": ("fp8/bias-f32", (0, 1)),
    "afq": ("afq/afq3-bias-f32", (0, 1)),
    "f8q8": ("f8q8/across-rows", (0,)),
    "mxfp4": ("mxfp4/bias-bf16", (0, 1)),
}
"""Page, vector of its worked example, weights that its text computes."""


@pytest.mark.parametrize("family", WORKED)
def test_worked_examples_give_the_right_numbers(family: str) -> None:
    """The weights that a page computes by hand are those of the vector."""
    name, indices = WORKED[family]
    expected = json.loads((SPEC / "vectors" / f"{name}.json").read_text("utf-8"))["float32"]["hex"]
    values = struct.unpack(f"<{len(expected) // 8}f", bytes.fromhex(expected))
    text = (SPEC / "families" / f"{family}.md").read_text("utf-8").partition("## Worked example")[2]
    for index in indices:
        digits = f"{abs(values[index]):.9f}".rstrip("0")
        assert digits in text or f"{abs(values[index]):.8f}" in text, (index, values[index])


def test_every_family_has_a_page_of_the_same_shape() -> None:
    """A reader finds the same sections in the same order on every family's page."""
    wanted = ["Overview", "Layout", "Encoding", "Decoding", "Sharding", "Worked example"]
    for name in ("gguf", "unquant", "hqq", "fp8", "afq", "f8q8", "mxfp4"):
        text = FENCE.sub("", (SPEC / "families" / f"{name}.md").read_text("utf-8"))
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == wanted, name


def test_worked_example_of_1_x_gives_the_right_numbers() -> None:
    """Every byte of the file is in the dump, and the weights and the bias that the text computes are the vector's."""
    vector = json.loads((SPEC / "vectors" / "entries" / "worked-example.json").read_text("utf-8"))
    data = (SPEC / "vectors" / "entries" / "worked-example.uqff").read_bytes()
    text = (SPEC / "entries.md").read_text("utf-8").partition("## Worked example")[2]
    dump = re.findall(r"^(\d+) +((?:[0-9a-f]{2} )*[0-9a-f]{2})", text.partition("```")[2], re.MULTILINE)
    assert b"".join(bytes.fromhex(raw) for _, raw in dump) == data
    (layer,) = vector["layers"]
    weights = struct.unpack("<4f", bytes.fromhex(layer["float32"]["hex"])[:16])
    (bias,) = struct.unpack("<f", bytes.fromhex(layer["bias"]["float32"])[:4])
    for number in (*weights, bias):
        assert f"{abs(number)}" in text.partition("The blob of the same layer")[0].rpartition("<!-- end -->")[2], number


REPORTED = LayerEntry("m", "f32", (1,), "q4k", "q6k")
FULL_REPORT = Report(
    "1.2.0",
    (ReportedOutput("q4k", ("x",), 1, {"f32": 1}, 1, (ReportedFallback("m", "q6k", "f32", (1,), "r"),), (REPORTED,)),),
    {"tool": "t", "mistralrs_version": "v", "git_revision": "g"},
    "b",
    "r",
)


def members(value: Any, path: str = "") -> Iterator[str]:
    """The paths of all members of a JSON document, ``[]`` for a member of a list."""
    if isinstance(value, dict) and path != "outputs[].actual_counts":
        for name, inner in value.items():
            here = f"{path}.{name}".lstrip(".")
            yield here
            yield from members(inner, here)
    elif isinstance(value, list):
        for inner in value:
            yield from members(inner, f"{path}[]")


def test_every_member_of_a_report_is_described() -> None:
    """What the writer of reports can write has a line on the page, and nothing else has."""
    text = (SPEC / "report.md").read_text("utf-8")
    described = re.findall(r"^\| `([^`]+)` \| (?:text|number|object|list)", text, re.MULTILINE)
    assert described == list(dict.fromkeys(members(report_document(FULL_REPORT))))


def test_example_of_a_report_is_sound(tmp_path: Path) -> None:
    """It is read, agrees with itself, and is written again as it stands."""
    document = json.loads(re.findall(r"```json\n(.*?)```", (SPEC / "report.md").read_text("utf-8"), re.DOTALL)[0])
    (tmp_path / "uqff_report.json").write_text(json.dumps(document))
    (tmp_path / "q4_0-0.uqff").touch()
    report = read_report(tmp_path)
    assert report is not None
    assert list(check_report(report, tmp_path)) == []
    assert report_document(report) == document
