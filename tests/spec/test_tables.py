"""The pages of the spec: their tables are those of the code, their links lead somewhere."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEC = ROOT / "spec"
PAGES = sorted(SPEC.rglob("*.md"))

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
    if not target.exists():
        return True
    return bool(anchor) and anchor not in anchors(target)


def test_tables_agree_with_the_code() -> None:
    """No offset table, list of codes or index differs from what the code declares."""
    command = [sys.executable, "tools/spec_tables.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(SPEC).as_posix())
def test_links_resolve(page: Path) -> None:
    """Every relative link of a page leads to a file, and its anchor to a heading."""
    links = LINK.findall(FENCE.sub("", page.read_text("utf-8")))
    assert [link for link in links if dead(page, link)] == []


def test_rules_of_broken_files_are_in_the_spec() -> None:
    """The section that a broken file names exists."""
    index = json.loads((SPEC / "vectors" / "bad" / "index.json").read_text("utf-8"))
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
    wanted = ["Overview", "Layout", "Encoding", "Decoding", "Sharding", "Worked example", "Divergences of the engine"]
    for name in ("gguf", "unquant", "hqq", "fp8", "afq", "f8q8", "mxfp4"):
        text = FENCE.sub("", (SPEC / "families" / f"{name}.md").read_text("utf-8"))
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == wanted, name
