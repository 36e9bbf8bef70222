"""``effort="best"``: how near it comes, that no block is worse than the engine's, that kernels are the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import uqff
from tools.quality.optimum import LEAST
from uqff import FormatError, ShapeError, UnsupportedError
from uqff.families import QuantizedTensor
from uqff.quantization.error import distance
from uqff.quantization.types import kinds

pytestmark = pytest.mark.long

F32 = npt.NDArray[np.float32]

ALL = (*kinds(), "hqq1", "hqq2", "hqq3")

BLOCKS = {"q2k": 256, "q3k": 256, "q4k": 256, "q5k": 256, "q6k": 256, "q8k": 256, "fp8": 0}
"""Weights of a block along a row, where it is not 32 or 64; the whole tensor is the block of FP8."""

REACHED = {
    "mxfp4": 0.1116,
    "afq2": 0.3182,
    "afq3": 0.1637,
    "afq4": 0.0805,
    "afq6": 0.0195,
    "afq8": 0.0049,
    "q4_0": 0.0812,
    "q4_1": 0.069,
    "q5_0": 0.0403,
    "q5_1": 0.0335,
    "q8_0": 0.00495,
    "q8_1": 0.00495,
    "q2k": 0.2586,
    "q3k": 0.1455,
    "q4k": 0.0695,
    "q5k": 0.0345,
    "q6k": 0.0169,
    "q8k": 0.0068,
    "f8q8": 0.0058,
    "fp8": 0.0266,
    "hqq4": 0.0811,
    "hqq8": 0.0049,
    "hqq1": 0.59,
    "hqq2": 0.3195,
    "hqq3": 0.1645,
}
"""Relative RMS error on normal weights, and not more."""


def normal(shape: tuple[int, ...] = (128, 512), seed: int = 7) -> F32:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(np.float32)


def parts(record: QuantizedTensor) -> dict[str, bytes]:
    return {name: bytes(part.array()) for name, part in record.parts.items()}


def errors(record: QuantizedTensor, w: F32, weights: F32, kind: str) -> npt.NDArray[np.float64]:
    """The weighted squared errors of the blocks of a type, as a reader sees them."""
    e = record.dequantize().numpy().astype(np.float64) - w
    e = weights * e * e
    if kind == "fp8":
        return e.sum().reshape(1)
    if kind.startswith("hqq"):
        return e.reshape(64, -1).sum(0)
    return e.reshape(-1, BLOCKS.get(kind, 64 if kind.startswith("afq") else 32)).sum(-1)


@pytest.mark.parametrize("kind", REACHED)
def test_error_reached(kind: str) -> None:
    w = normal()
    assert distance(w, uqff.quantize(w, kind, effort="best")).relative <= REACHED[kind]


@pytest.mark.parametrize(("kind", "shape"), [("afq2", (64, 64)), ("q4_0", (8, 64))])
def test_near_the_optimum(kind: str, shape: tuple[int, int]) -> None:
    """Not below what all sets of codes with any scales attain, which would be a mistake of either, and little above."""
    w = normal(shape, seed=9)
    least = LEAST[kind](w)
    made = errors(uqff.quantize(w, kind, effort="best"), w, np.ones_like(w), kind).sum()
    assert least * (1 - 1e-6) <= made <= least * 1.005


def test_the_optimum_by_hand() -> None:
    """Weights on a grid have no error; of 32 halves in two sizes that q4_0 cannot both meet, a little is left."""
    grid = np.resize(np.arange(-8.0, 8), (1, 64))
    assert LEAST["q4_0"](grid) == pytest.approx(0, abs=1e-9)
    assert LEAST["afq2"](np.resize([5.0, 7, 9, 11], (1, 64))) == pytest.approx(0, abs=1e-9)
    assert LEAST["q4_0"](np.zeros((1, 32))) == LEAST["afq2"](np.zeros((1, 64))) == 0
    # One of 1 and one of 0.07 in a block: as q = 7 and 0, 0.07² is left; as 7 and 1 by 50 / 7.07 per weight, less.
    two = np.zeros((1, 32))
    two[0, :2] = 1, 0.07
    assert LEAST["q4_0"](two) == pytest.approx(min(0.07**2, 1 + 0.07**2 - 7.07**2 / 50, 1 + 0.07**2 - 8.07**2 / 65))


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["normal", "heavy", "constant", "tiny", "huge", "steps"]), st.booleans())
@pytest.mark.parametrize("kind", ALL)
def test_no_block_is_worse(kind: str, seed: int, what: str, weighted: bool) -> None:
    """Of normal and heavy-tailed weights, of subnormal ones, of such as overflow float16, of constant blocks."""
    rng = np.random.default_rng(seed)
    w: Any = rng.standard_normal((4, 256))
    if what == "heavy":
        w = w / rng.uniform(1e-3, 1, w.shape) ** 2
    elif what == "constant":
        w[:2], w[2, 128:] = w[:2, :1], 0
    elif what in ("tiny", "huge"):
        w *= 1e-41 if what == "tiny" else 3e37
    elif what == "steps":
        w = np.round(w)
    w = w.astype(np.float32)
    importance = rng.exponential(1, 256).astype(np.float32) ** 2 if weighted else np.ones(256, np.float32)
    importance[:40] *= not weighted
    with np.errstate(all="ignore"):
        engine = errors(uqff.quantize(w, kind), w, importance, kind)
        best = errors(uqff.quantize(w, kind, effort="best", importance=importance), w, importance, kind)
    assert not np.any(best > engine * (1 + 1e-12))
    assert not np.any(np.isnan(best) & ~np.isnan(engine))


@pytest.mark.parametrize("kind", ALL)
def test_kernel_equals_reference(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = normal((6, 512), seed=3)
    w[1], w[2, :300], w[3] = 0, 0.5, w[3] * 1e-42
    w[4, ::7] *= 1e30
    importance = np.random.default_rng(4).exponential(1, 512).astype(np.float32)
    for dtype in (torch.float32, torch.bfloat16) if kind.startswith("afq") else (torch.float32,):
        made = []
        for kernels in ("numba", "reference"):
            monkeypatch.setenv("UQFF_KERNELS", kernels)
            given: Any = torch.from_numpy(w.copy())
            made.append(parts(uqff.quantize(given, kind, effort="best", importance=importance, dtype=dtype)))
        assert made[0] == made[1]


def test_exact_blocks() -> None:
    """By hand: 32 multiples of 1/2 of which the largest is -7/2 and one 7/2, that no code of the engine's scale meets.

    The engine puts -3.5 at code 0: d = 0.4375 (0x3700). The best d is 1/2, codes 8 + 2 x, exact.
    """
    w = np.resize(np.arange(-7, 8, dtype=np.float32) / 2, (1, 32))
    made = uqff.quantize(w, "q4_0", effort="best")
    codes = (8 + 2 * w[0]).astype(np.uint8)
    assert parts(made)["data"] == b"\x00\x38" + bytes(codes[:16] | codes[16:] << 4)
    assert bytes(parts(uqff.quantize(w, "q4_0"))["data"][:2]) == b"\x00\x37"


def test_exponent_of_mxfp4() -> None:
    """The engine takes 2^0 for a largest weight of 8 and clips it to 6. In 2^1, 8 and 2 are codes 6 and 2."""
    w = np.zeros((1, 32), np.float32)
    w[0, :2] = 8, 2
    assert parts(uqff.quantize(w, "mxfp4")) == {"blocks": bytes([0x47, *[0] * 15]), "scales": b"\x7f"}
    assert parts(uqff.quantize(w, "mxfp4", effort="best")) == {"blocks": bytes([0x26, *[0] * 15]), "scales": b"\x80"}


@pytest.mark.parametrize("kind", ["q4_0", "q4k", "afq3", "hqq4", "mxfp4", "f8q8", "fp8"])
def test_importance(kind: str) -> None:
    """It lowers the weighted error, a common factor changes nothing, and experts have their own."""
    w = normal((2, 8, 512), seed=5)
    rng = np.random.default_rng(6)
    importance = np.exp(2 * rng.standard_normal((2, 512))).astype(np.float32)
    weights = np.repeat(importance[:, None], 8, 1)
    alike = uqff.quantize(w, kind, effort="best", engine="0.8") if kind != "mxfp4" else None
    if alike is None:
        w, weights, importance = w[0], weights[0], importance[:1]
        alike = uqff.quantize(w, kind, effort="best")
    own = uqff.quantize(w, kind, effort="best", importance=importance)
    assert errors(own, w, weights, "fp8") < errors(alike, w, weights, "fp8") * (1.001 if kind == "fp8" else 0.999)
    assert parts(own) == parts(uqff.quantize(w, kind, effort="best", importance=torch.from_numpy(importance * 4)))


def test_what_is_refused() -> None:
    w = normal((4, 64))
    with pytest.raises(UnsupportedError, match="unknown effort: expected one of engine, best, calibrated, got most"):
        uqff.quantize(w, "q4_0", effort="most")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=r"importance: expected \[64\], got \[32\]"):
        uqff.quantize(w, "q4_0", effort="best", importance=np.ones(32))
    with pytest.raises(FormatError, match=r"importance: expected finite numbers, not negative, got -1.0 at \(3,\)"):
        uqff.quantize(w, "q4_0", effort="best", importance=[1, 1, 1, -1, *[1] * 60])
    bad = normal((4, 64))
    bad[0, 5] = np.inf
    with pytest.raises(FormatError, match=r"got inf at \(0, 5\)"):
        uqff.quantize(bad, "q4_0", effort="best")
