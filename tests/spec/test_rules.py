"""The rules of the format: each once, with an id that pages, errors, ``uqff verify --json`` and vectors share."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import uqff
from uqff.cli import main
from uqff.rules import RULES

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "spec" / "vectors"
BROKEN: list[dict[str, Any]] = [
    case for case in json.loads((VECTORS / "index.json").read_text("utf-8")) if case["outcome"] == "refuse"
]
WITHOUT_VECTOR = {"FILE-21"}
"""A hundred thousand files."""


def refuse(case: dict[str, Any]) -> None:
    """Read all of a broken vector."""
    paths = [VECTORS / file for file in case["files"]]
    if paths[0].suffix == ".bin":
        uqff.deserialize(paths[0].read_bytes())
    else:  # a path is a member of a set, whose others are looked for; a list is all there is
        with uqff.open(paths[0] if case["rule"] == "FILE-17" else paths) as model:
            list(model.values())


def test_errors_name_the_rule_that_the_vector_breaks() -> None:
    """Of every broken vector; together they break every rule but one."""
    for case in BROKEN:
        with pytest.raises(uqff.UqffError) as caught:
            refuse(case)
        assert caught.value.rule == case["rule"], case["id"]
    assert {case["rule"] for case in BROKEN} == RULES.keys() - WITHOUT_VECTOR


def test_each_rule_stands_once() -> None:
    """Ids are numbered without a gap, texts differ, one page and the index have each, and no error has another."""
    texts = [rule.text for rule in RULES.values()]
    assert len(set(texts)) >= len(texts) - 3  # "a row is whole blocks" is a rule of two families, and alike
    for prefix in dict.fromkeys(name.partition("-")[0] for name in RULES):
        numbers = [int(name.partition("-")[2]) for name in RULES if name.startswith(f"{prefix}-")]
        assert numbers == list(range(1, len(numbers) + 1))
    page = (ROOT / "spec" / "rules.md").read_text("utf-8")
    pages = set((ROOT / "spec").rglob("*.md")) - set(VECTORS.rglob("*.md")) - {ROOT / "spec" / "rules.md"}
    others = "".join(path.read_text("utf-8") for path in pages)
    for rule in RULES.values():
        path, _, anchor = rule.section.partition("#")
        heads = re.findall(r"^#+ (.+)$", (ROOT / "spec" / path).read_text("utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^a-z0-9]+", "-", head.lower()).strip("-") for head in heads}, rule
        assert page.count(f"| `{rule.id}` |") == others.count(f"| `{rule.id}` |") == 1
        assert f"| `{rule.id}` |" in (ROOT / "spec" / path).read_text("utf-8")
    raised = {
        name
        for path in (ROOT / "uqff").rglob("*.py")
        if path.name != "rules.py"
        for name in re.findall(r"\"([A-Z0-9]+-\d\d)\"", path.read_text("utf-8"))
        if name.partition("-")[0] in {"FILE", "BLOB", "ENT", "GGUF", "HQQ", "FP8", "AFQ", "F8Q8", "MXFP4"}
    }
    assert raised == RULES.keys()


def test_verify_names_it() -> None:
    """In JSON, for programs."""
    ran = CliRunner().invoke(main, ["verify", "--json", str(VECTORS / "bad-entries" / "hqq-axis-two.uqff")])
    assert ran.exit_code == 1
    assert [violation["rule"] for violation in json.loads(ran.output)["violations"]] == ["HQQ-03"]


def test_errors_of_other_formats_have_none(tmp_path: Path) -> None:
    """A GGUF file is read with the same bricks, and breaks no rule of UQFF."""
    from uqff.gguf.reader import open_gguf

    path = tmp_path / "cut.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0")
    with pytest.raises(uqff.UqffError) as caught:
        open_gguf(path)
    assert caught.value.rule is None
