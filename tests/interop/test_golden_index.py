"""The index of tests/golden agrees with the files, and with the tools that regenerate them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tools.golden.v0 import CASES, COMPLETE, KINDS

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"

MANIFEST: dict[str, Any] = json.loads((GOLDEN / "MANIFEST.json").read_text())


def test_manifest_lists_every_file_with_its_digest() -> None:
    """No golden file is edited, added or lost without the manifest saying so."""
    listed = {
        f"{folder}/{name}": (file["bytes"], file["sha256"])
        for folder, entry in MANIFEST["directories"].items()
        for name, file in entry["files"].items()
    }
    found = {}
    for path in (GOLDEN / "v0").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            found[path.relative_to(GOLDEN).as_posix()] = (len(data), hashlib.sha256(data).hexdigest())
    assert found == listed


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_are_those_of_the_manifest(case: Any) -> None:
    """A change of a case's parameters without regenerating is noticed; so is a checkpoint that comes out different."""
    entry = MANIFEST["directories"][f"v0/{case.name}"]
    assert entry["model"] == dataclasses.asdict(case.model)
    assert entry["model_sha256"] == case.model.sha256()
    assert entry["layers"] == case.model.layer_names()
    assert (entry["dtype"], entry["topology"], entry["why"]) == (case.dtype, case.topology, case.why)
    kinds = {file["isq"] for file in entry["files"].values() if "isq" in file}
    assert kinds == set(case.kinds)
    others = {name for name, file in entry["files"].items() if "isq" not in file}
    assert {"residual.safetensors", "config.json"} <= others
    assert ("tokenizer.json" in others) == (case.name in COMPLETE)


def test_cases_cover_every_type_and_every_load_dtype() -> None:
    """All 20 types of the 0.6.0 client loaded as F32; the families that keep the load dtype as F16 and BF16 too."""
    assert set(MANIFEST["directories"]) == {f"v0/{case.name}" for case in CASES}
    assert len(set(KINDS)) == 20
    assert {kind for case in CASES if case.dtype == "F32" for kind in case.kinds} == set(KINDS)
    for dtype in ("F16", "BF16"):
        assert any("afq4" in case.kinds for case in CASES if case.dtype == dtype)
        assert any(case.topology is not None for case in CASES if case.dtype == dtype)


def test_readme_names_every_directory() -> None:
    """The index has one row per directory."""
    rows = [line for line in (GOLDEN / "README.md").read_text().splitlines() if line.startswith("| `v0/")]
    assert [row.split("`")[1] for row in rows] == [f"v0/{case.name}" for case in CASES]
