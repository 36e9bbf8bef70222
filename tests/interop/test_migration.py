"""The live check of migrations sees what it is there to see: no client is run here."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import uqff
from tools.interop.migration import (
    CASES,
    Outcome,
    check_both_ways,
    compare_entries,
    compare_exactly,
    compare_nearly,
    has_odd_biases,
    read_entries,
    tolerance_of,
)
from uqff.migration import migrate

ROOT = Path(__file__).resolve().parents[2]

GOLDEN = ROOT / "tests" / "golden" / "v0"
RAN = Outcome(("a", "b", "c"), (-1.0, -2.0, -3.0), (1.0, 0.001, 1.0))
FAILED = Outcome(reason="dtype mismatch")


def test_exactly_means_the_last_bit() -> None:
    assert compare_exactly(RAN, RAN) == ("3 tokens, logprobs equal", [])
    assert compare_exactly(RAN, dataclasses.replace(RAN, logprobs=(-1.0, -2.0, -3.0000002)))[1]
    assert compare_exactly(RAN, FAILED)[1]
    assert compare_exactly(FAILED, FAILED) == ("neither: dtype mismatch", [])
    assert compare_exactly(FAILED, Outcome(reason="another"))[1]


def test_nearly_allows_the_tolerance_and_what_it_decides() -> None:
    """A token may differ where the two best are closer than the clients are; not elsewhere, and not without."""
    assert compare_nearly(RAN, RAN, 1e-3) == ("3 tokens, logprobs within 0", [])
    longer = dataclasses.replace(RAN, tokens=("a", "b", "c", "d"), logprobs=(-1.0, -2.0, -3.0, -4.0))
    assert compare_nearly(longer, RAN, 1e-3)[1] == []
    assert compare_nearly(dataclasses.replace(RAN, logprobs=(-1.0, -2.01, -3.0)), RAN, 1e-3)[1] == [
        "logprobs differ by 0.01, more than 0.001"
    ]
    tie = dataclasses.replace(RAN, tokens=("a", "x", "y"))
    assert compare_nearly(tie, RAN, 1e-3) == ("1 tokens, then a tie within 0.001, logprobs within 0", [])
    other = dataclasses.replace(RAN, tokens=("x", "b", "c"))
    assert compare_nearly(other, RAN, 1e-3)[1] == ["token 0 differs, by a margin of 1"]
    assert compare_nearly(FAILED, RAN, 1.0)[1]
    assert compare_nearly(FAILED, FAILED, 1.0)[1]


def test_tolerances_are_those_of_the_arithmetic() -> None:
    llama = next(case for case in CASES if case.name == "llama")
    assert (tolerance_of(llama, "afq4"), tolerance_of(llama, "fp8"), tolerance_of(llama, "hqq4")) == (1e-3, 1e-3, 2e-2)
    assert tolerance_of(dataclasses.replace(llama, dtype="F16"), "afq4") == 2e-2


def test_entries_differ_by_a_bit_or_a_layer(tmp_path: Path) -> None:
    migrate(GOLDEN / "qwen2-bf16" / "fp8-0.uqff", tmp_path / "fp8")
    entries = read_entries(tmp_path / "fp8")
    count = len(entries) - 1
    assert compare_entries(entries, entries, but_biases=False) == (f"{count} of {count} equal", [])
    changed = {key: dict(layer) for key, layer in entries.items()}
    key = "model.layers.0.self_attn.q_proj"
    dtype, shape, data = changed[key]["bias"]
    changed[key]["bias"] = (dtype, shape, bytes([data[0] ^ 1]) + data[1:])
    assert compare_entries(entries, changed, but_biases=False)[1] == [key]
    assert compare_entries(entries, changed, but_biases=True)[1] == []
    del changed[key]
    assert compare_entries(entries, changed, but_biases=True)[1] == [key]


def test_odd_biases_and_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_odd_biases(GOLDEN / "qwen2-bf16" / "fp8-0.uqff", "1.2")
    assert not has_odd_biases(GOLDEN / "llama-mixed-f32", "1.2")
    assert check_both_ways(GOLDEN / "llama-mixed-f32", tmp_path) == []
    save = uqff.container.tensors.TensorWriter.write
    monkeypatch.setattr(
        uqff.container.tensors.TensorWriter,
        "write",
        lambda self, name, chunks: save(self, name, [bytes(len(b"".join(chunks)))] if name == "3" else chunks),
    )
    (tmp_path / "again").mkdir()
    assert check_both_ways(GOLDEN / "llama-mixed-f32", tmp_path / "again") == [
        "q8_0-0.uqff is not the same after both ways"
    ]
