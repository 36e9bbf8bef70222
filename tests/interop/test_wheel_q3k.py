"""The Q3K of the 0.6.0 wheel: the golden files are explained by the stated defect, to the last byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tools.interop.cases import Case
from tools.interop.quantisers import compare_file, expected_parts, quantise, with_wheel_q3k
from tools.interop.stored_parts import read_parts
from tools.interop.wheel_q3k import quantize_q3k
from tools.tiny.models import TinyModel, random_normal
from uqff.families.gguf.reference_quantize import quantize_q3k as quantize_by_source

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"

MANIFEST: dict[str, Any] = json.loads((GOLDEN / "MANIFEST.json").read_text())["directories"]


def spike(value: float, at: int) -> npt.NDArray[np.float32]:
    """A block that is small but for one element."""
    block = (np.arange(256, dtype=np.float32) % 7 - 3) / np.float32(64)
    block[at] = value
    return block[None]


@pytest.mark.parametrize(
    ("value", "at", "same"),
    [(4.0, 5, False), (-4.0, 5, True), (4.0, 16, True), (-4.0, 16, True), (4.0, 255, True)],
)
def test_defect_is_a_negative_scale_of_sub_block_0(value: float, at: int, same: bool) -> None:
    """A positive element of largest magnitude makes the scale negative: only in sub-block 0 does the wheel miss it."""
    block = spike(value, at)
    assert (quantize_q3k(block).tobytes() == quantize_by_source(block).tobytes()) is same


def test_without_the_defect_it_is_the_source() -> None:
    """The second writing of the layout gives the package's bytes, on random, zero and tiny blocks."""
    blocks = random_normal(np.random.default_rng(7), (40, 256))
    blocks[30:34] *= np.float32(1e-8)
    blocks[35] = 0
    blocks[36, 16:] = 0
    assert quantize_q3k(blocks, first_without_abs=False).tobytes() == quantize_by_source(blocks).tobytes()


@pytest.mark.parametrize(("directory", "own"), [("v0/qwen2-f32", 435), ("v0/llama-edge-256-f32", 202)])
def test_golden_q3k_is_explained(directory: str, own: int) -> None:
    """The wheel's files differ from the source's quantiser, and not at all from the one with the defect."""
    entry = MANIFEST[directory]
    case = Case(directory, TinyModel(**entry["model"]), entry["dtype"])
    layers, stored = quantise(case, "q3k", "0.6"), read_parts(GOLDEN / directory / "q3k-0.uqff")
    assert compare_file(stored, expected_parts(with_wheel_q3k(layers, case), case, "0.6")).differing == 0
    assert compare_file(stored, expected_parts(layers, case, "0.6")).differing == own
