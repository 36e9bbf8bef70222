"""The live comparison of quantisers sees what it is there to see: no client is run here."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tools.interop.cases import CASES, Case
from tools.interop.quantisers import (
    GENERATIONS,
    Row,
    Written,
    asked_kinds,
    check,
    check_report,
    quantise,
    reference_paths,
    total,
)
from tools.interop.stored_parts import read_parts
from tools.tiny.models import TinyModel

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "v1"

DIRECTORY = "llama-edge-32-f32"
ENTRY: dict[str, Any] = json.loads((GOLDEN / "MANIFEST.json").read_text())["directories"][DIRECTORY]
CASE = Case(DIRECTORY, TinyModel(**ENTRY["model"]), ENTRY["dtype"])
FLAT = Case("flat", TinyModel("qwen2", hidden_size=40, intermediate_size=24, heads=2, vocab_size=33), "F32")


def report_of(case: Case, kind: str) -> dict[str, Any]:
    """The report that the 0.9.5 client writes of a checkpoint whose shapes all fit the type, with logical shapes."""
    layers = quantise(case, kind, "0.9")
    details = [
        {
            "module": name,
            "default_target": kind,
            "resolved_target": asked_kinds(case, kind, "0.9")[name],
            "stored": layer.weight.kind,
            "shape": list(layer.weight.shape),
        }
        for name, layer in layers.items()
    ]
    counts: dict[str, int] = {}
    for detail in details:
        stored = str(detail["stored"])
        counts[stored] = counts.get(stored, 0) + 1
    output = {
        "quant": kind,
        "layers": len(layers),
        "actual_counts": counts,
        "fallback_count": 0,
        "layer_details": details,
    }
    return {"uqff_version": "1.2.0", "outputs": [output]}


def golden(kind: str = "f8q8") -> Written:
    """What the 0.9.5 client wrote."""
    return Written(read_parts(GOLDEN / DIRECTORY / f"{kind}-0.uqff"), report_of(CASE, kind))


def test_clients_own_bytes_are_equal() -> None:
    """All of the file is compared: its bytes add up to the row's."""
    row = check("0.9.5", CASE, "f8q8", golden())
    assert row.equal
    assert (row.layers, row.size) == (9, sum(len(part.data) for part in golden().parts.values()))
    assert (row.differing, row.zero_signs, row.refused, row.problems) == (0, 0, "", ())


@pytest.mark.parametrize("suffix", [".weight", ".weight.shape", ".weight.format"])
def test_one_bit_of_any_entry_is_seen(suffix: str) -> None:
    """Payload, shape and format byte: the entry is named."""
    written = golden()
    name = f"model.layers.0.mlp.up_proj{suffix}"
    data = bytearray(written.parts[name].data)
    data[0] ^= 1
    written.parts[name] = written.parts[name]._replace(data=bytes(data))
    row = check("0.9.5", CASE, "f8q8", written)
    assert row.differing == 1
    (problem,) = row.problems
    assert problem == f"model.layers.0.mlp.up_proj: {name}: 1 of {len(data):,} bytes differ, first at 0"
    assert not row.equal


def test_entry_that_only_one_side_has_is_seen() -> None:
    """Neither a superfluous entry of the client's nor a missing one passes."""
    more, less = golden(), golden()
    more.parts["lm_head.bias"] = more.parts["lm_head.weight.shape"]
    removed = less.parts.pop("uqff.version.minor")
    rows = [check("0.9.5", CASE, "f8q8", written) for written in (more, less)]
    assert [row.differing for row in rows] == [8, len(removed.data)]
    assert ["lm_head.bias" in rows[0].problems[0], "uqff.version.minor" in rows[1].problems[0]] == [True, True]


def test_refusals_must_be_on_both_sides() -> None:
    """A shape on which only one side fails is a difference; one on which both do is not counted as compared."""
    refusing = Written({}, refused="ValueError: no")
    both, theirs, ours = (
        check("0.9.5", FLAT, "mxfp4", refusing),
        check("0.9.5", FLAT, "q4k", refusing),
        check("0.9.5", FLAT, "mxfp4", golden("mxfp4")),
    )
    assert (both.equal, theirs.equal, ours.equal) == (True, False, False)
    assert both.cells()[-1] == "both refuse: ValueError: no"
    assert theirs.problems == ("the client refuses, the package does not: ValueError: no",)
    assert ours.problems[0].startswith("the package refuses, the client does not: ")
    assert (both.layers, both.size) == (0, 0)


def test_report_is_held_against_the_package() -> None:
    """A type, a target, a count or a fallback that the report states otherwise is named; so is a missing report."""
    layers = quantise(CASE, "q8_0", "0.9")
    report = report_of(CASE, "q8_0")
    assert check_report(report, layers, CASE, "q8_0") == []
    output = report["outputs"][0]
    output["layer_details"][0]["stored"] = "q6k"
    output["fallback_count"] = 1
    first, second = check_report(report, layers, CASE, "q8_0")
    assert first.startswith("report: lm_head is ('q8_0', 'q8_0', 'q6k', ")
    assert second == "report: fallback_count is 1, expected 0"
    assert check_report(None, layers, CASE, "q8_0") == ["the client wrote no uqff_report.json"]


def test_lm_head_and_embedding_are_promoted_since_1_2() -> None:
    """0.6 takes the type for all layers and does not store the embedding; 1.2 stores it, in place of a tied lm_head."""
    untied = TinyModel("llama", layers=1)
    tied = TinyModel("llama", layers=1, tied=True)
    assert set(asked_kinds(Case("", untied, "F32"), "q4k", "0.6").values()) == {"q4k"}
    old = asked_kinds(Case("", untied, "F32"), "q4k", "0.6")
    new = asked_kinds(Case("", untied, "F32"), "q4k", "0.9")
    assert new.keys() - old.keys() == {"model.embed_tokens"}
    assert {name for name, kind in new.items() if kind == "q6k"} == {"lm_head", "model.embed_tokens"}
    assert asked_kinds(Case("", tied, "F32"), "afq8", "0.9").keys() == new.keys() - {"lm_head"}


def test_generations_write_these_types() -> None:
    """20 types of 0.6.0, 22 of 0.9.5."""
    assert [len(generation.kinds) for generation in GENERATIONS.values()] == [20, 22]
    assert set(GENERATIONS["0.9.5"].kinds) - set(GENERATIONS["0.6.0"].kinds) == {"f8q8", "mxfp4"}


def test_checkpoints_cover_what_they_must() -> None:
    """In-dims that are multiples of 256, of 64, of 32 and of none; three load dtypes; biases; tied; outliers."""
    sizes = {size for case in CASES for size in (case.model.hidden_size, case.model.intermediate_size)}
    assert all(
        any(test(size) for size in sizes)
        for test in (
            lambda size: size % 256 == 0,
            lambda size: size % 256 and size % 64 == 0,
            lambda size: size % 64 and size % 32 == 0,
            lambda size: size % 32,
        )
    )
    assert {case.dtype for case in CASES} == {"F32", "F16", "BF16"}
    assert {(case.model.architecture, case.model.tied) for case in CASES} >= {("llama", True), ("qwen2", True)}
    assert any(case.model.outliers for case in CASES)
    assert any(case.reference for case in CASES)
    assert len({case.name for case in CASES}) == len(CASES)


def test_reference_paths_are_switched_off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside, kernels are off; after it the environment is as before, set or not."""
    monkeypatch.delenv("UQFF_KERNELS", raising=False)
    with reference_paths():
        assert os.environ["UQFF_KERNELS"] == "reference"
    assert "UQFF_KERNELS" not in os.environ
    monkeypatch.setenv("UQFF_KERNELS", "numba")
    with reference_paths():
        assert os.environ["UQFF_KERNELS"] == "reference"
    assert os.environ["UQFF_KERNELS"] == "numba"


def test_total_leaves_out_refusals() -> None:
    """A row that both refuse adds no type, layer or byte."""
    rows = [
        Row("0.9.5", "a", "q4k", "kernels", layers=7, size=1000, zero_signs=2),
        Row("0.9.5", "b", "q4k", "kernels", layers=8, size=500, differing=3),
        Row("0.9.5", "b", "mxfp4", "kernels", refused="no"),
    ]
    assert total("0.9.5", rows) == ["0.9.5", "all", "1 types", "", "15", "1,500", "3", "2", "1 rows both refuse"]
