"""``effort="calibrated"``: answers nearer than with importance alone, on the grid of each type; kernel = reference."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch

import uqff
from uqff import FormatError, ShapeError, UnsupportedError, simd
from uqff.families import QuantizedTensor, feedback
from uqff.numerics import feedback as reference
from uqff.quantization.types import kinds
from uqff.simd import feedback as kernels

pytestmark = pytest.mark.long

F32 = npt.NDArray[np.float32]

ALL = (*kinds(), "hqq1", "hqq2", "hqq3")


MXFP4 = np.array([-6.0, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
UP = np.cumsum(np.arange(1.0, 41.0)) / 64


def inputs_like(columns: int, seed: int = 3) -> F32:
    """Inputs that go along with their neighbours, some large, some small."""
    rng = np.random.default_rng(seed)
    near = np.exp(-np.abs(np.subtract.outer(np.arange(columns), np.arange(columns))) / 6)
    loud = np.exp(0.7 * rng.standard_normal(columns))
    return ((rng.standard_normal((4 * columns, columns)) @ near) * loud).astype(np.float32)


def product(x: F32) -> F32:
    """XᵀX."""
    made: F32 = x.T @ x
    return made


def weights(shape: tuple[int, ...] = (64, 256), seed: int = 7) -> F32:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.02).astype(np.float32)


def distance(x: F32, weight: F32, record: QuantizedTensor) -> float:
    """RMS error of the answers, relative."""
    answers = x @ weight.T
    return float(np.linalg.norm(x @ record.dequantize().numpy().T - answers) / np.linalg.norm(answers))


@pytest.mark.parametrize("kind", ALL)
def test_answers_are_nearer(kind: str) -> None:
    """Every type gains at least a quarter over importance alone where inputs go together."""
    x, weight = inputs_like(256), weights()
    hessian = product(x)
    importance = np.diagonal(hessian) / len(x)
    alone = distance(x, weight, uqff.quantize(weight, kind, effort="best", importance=importance))
    record = uqff.quantize(weight, kind, effort="calibrated", hessian=hessian)
    assert (record.kind, record.shape, record.nbytes) == (kind, (64, 256), uqff.quantize(weight, kind).nbytes)
    assert distance(x, weight, record) < 0.75 * alone


@pytest.mark.parametrize("kind", ALL)
def test_codes_are_put_where_the_type_has_them(kind: str) -> None:
    """Other codes leave scales alone; each is read back as the number it stands for."""
    record = uqff.quantize(weights(), kind, effort="best")
    values = record.code_values
    assert values is not None
    assert (np.diff(values) > 0).all()
    rng = np.random.default_rng(0)
    codes = rng.integers(0, len(values), record.shape, np.uint8)
    ends = [record.with_codes(np.full(record.shape, at, np.uint8)).dequantize().double() for at in (0, len(values) - 1)]
    step = (ends[1] - ends[0]) / (values[-1] - values[0])
    expected = ends[0] + step * torch.from_numpy(values[codes] - values[0])
    made = record.with_codes(codes)
    assert ((made.dequantize() - expected).abs() <= 2e-6 * torch.maximum(ends[0].abs(), ends[1].abs())).all()
    again = [part.array() for part in made.with_codes(codes[::-1].copy()).with_codes(codes).parts.values()]
    assert all(np.array_equal(a, b.array()) for a, b in zip(again, made.parts.values(), strict=True))


@pytest.mark.parametrize("values", [np.arange(-4.0, 4.0), MXFP4, np.sort(np.concatenate((-UP, UP)))], ids=len)
def test_kernel_is_the_reference(values: npt.NDArray[np.float64]) -> None:
    """To the last bit: codes, numbers, errors, losses and what is fed back; values evenly spaced or not, few or many,
    steps of zero too, weights halfway between two values and next to that.
    """
    rng = np.random.default_rng(1)
    shape = (24, 83)  # rows in lanes, a range's rest, and those of the next
    x, offset = rng.standard_normal(shape), rng.standard_normal(shape) * 0.1
    step = rng.standard_normal(shape) * 0.3
    step[3:7, 2] = 0
    middles = rng.choice((values[1:] + values[:-1]) / 2, shape[1])
    offset[0], step[0] = 0, 1
    x[0] = np.nextafter(middles, middles + rng.choice([-1.0, 0, 1], shape[1]))
    factor = reference.inverse_factor(reference.damped(product(inputs_like(24))))
    made = []
    for rounded in (reference.round_inputs, kernels.round_inputs):
        out = x.copy(), np.empty(shape, np.uint8), *(np.empty_like(x) for _ in range(2)), np.empty(shape[1])
        with np.errstate(all="ignore"):
            rounded(out[0], factor, offset, step, values, *out[1:])
        made.append(out)
    for a, b in zip(*made, strict=True):
        assert a.tobytes() == b.tobytes()


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian = reference.damped(product(inputs_like(40)))
    factor = reference.inverse_factor(hessian)
    assert np.array_equal(factor, np.triu(factor))
    assert np.abs(factor.T @ factor @ hessian - np.eye(40)).max() < 1e-9


def test_inputs_take_turns_by_blocks() -> None:
    """Blocks by what their inputs weigh together, and the inputs of a block by what each weighs."""
    assert reference.input_order(np.diag([1.0, 2, 9, 0, 5, 6]), 2).tolist() == [5, 4, 2, 3, 1, 0]
    assert reference.input_order(np.diag([1.0, 2, 9]), 1).tolist() == [2, 1, 0]


@pytest.mark.parametrize("kind", ["q4_0", "hqq4", "fp8", "f8q8"])
def test_experts_by_their_own_inputs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack of q4_0 is its experts; where scales are of several, each expert still gains by its own Hessian."""
    xs, stack = [inputs_like(64, seed) for seed in (1, 2)], weights((2, 64, 64))
    hessians = np.stack([product(x) for x in xs])
    made = uqff.quantize(stack, kind, effort="calibrated", hessian=hessians)
    for at, x in enumerate(xs):
        own = uqff.quantize(stack, kind, effort="best").dequantize()[at].numpy()
        mine = made.dequantize()[at].numpy()
        assert np.linalg.norm(x @ (mine - stack[at]).T) < 0.75 * np.linalg.norm(x @ (own - stack[at]).T)
        if kind == "q4_0":
            alone = uqff.quantize(stack[at], kind, effort="calibrated", hessian=hessians[at])
            assert np.array_equal(mine, alone.dequantize().numpy())
    monkeypatch.setattr(simd, "enabled", lambda: False)
    if kind == "q4_0":
        slow = uqff.quantize(stack, kind, effort="calibrated", hessian=hessians)
        assert bytes(slow.parts["data"].array()) == bytes(made.parts["data"].array())


@pytest.mark.parametrize(("kind", "shape"), [("f8q8", (3, 40)), ("hqq4", (24, 48))])
def test_scales_across_inputs(kind: str, shape: tuple[int, int]) -> None:
    """Blocks that run over the ends of rows, and groups of several inputs, keep their scales."""
    x, weight = inputs_like(shape[1]), weights(shape)
    best = uqff.quantize(weight, kind, effort="best")
    made = uqff.quantize(weight, kind, effort="calibrated", hessian=product(x))
    assert distance(x, weight, made) < 0.9 * distance(x, weight, best)
    again = made.with_codes(np.zeros(shape, np.uint8))
    before = best.with_codes(np.zeros(shape, np.uint8))
    assert all(np.array_equal(again.parts[name].array(), before.parts[name].array()) for name in again.parts)


@pytest.mark.parametrize("kind", ["q4_0", "afq3", "hqq4", "fp8"])
def test_blocks_that_take_turns_again_lose_less(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row (or rows that share scales) gets worse by a turn more, and together they gain."""
    hessian, weight = product(inputs_like(256)), weights()
    curvature = reference.damped(hessian)
    lost = []
    for turns in (0, 1):
        monkeypatch.setattr(feedback, "SWEEPS", turns)
        made = uqff.quantize(weight, kind, effort="calibrated", hessian=hessian).dequantize().double().numpy()
        lost.append((((made - weight) @ curvature) * (made - weight)).sum(1))
    assert (lost[1] <= lost[0] * (1 + 1e-4)).all()
    assert lost[1].sum() < lost[0].sum()


@pytest.mark.parametrize("kind", ["q4_0", "hqq4", "hqq8", "hqq3"])
def test_rows_by_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix of more weights than are worked at together is the same; groups of HQQ run across all rows."""
    hessian, weight = product(inputs_like(64)), weights((192, 64))
    whole = uqff.quantize(weight, kind, effort="calibrated", hessian=hessian)
    monkeypatch.setattr(feedback, "CHUNK", 64 * 64 + 63)
    made = uqff.quantize(weight, kind, effort="calibrated", hessian=hessian)
    assert torch.equal(made.dequantize(), whole.dequantize())


@pytest.mark.parametrize("what", ["wide", "tails", "overflow"])
@pytest.mark.parametrize("kind", ALL)
def test_answers_are_no_farther_than_the_engine_s(kind: str, what: str) -> None:
    """Where weights are of very different sizes, or overflow float16, feedback alone made some rows worse, or NaN."""
    weight = np.random.default_rng(11).standard_normal((64, 256))
    if what == "overflow":
        weight[5] *= 8e37
        weight[6, 7] *= 1e10
    else:
        weight = np.exp(4 * weight) * np.sign(weight) if what == "wide" else weight / np.abs(weight[:, ::-1]) ** 3
    weight = weight.astype(np.float32)
    hessian = product(np.random.default_rng(3).standard_normal((512, 256)).astype(np.float32))
    curvature, lost = reference.damped(hessian), []
    with np.errstate(all="ignore"):
        importance = np.diagonal(curvature).astype(np.float32)
        for record in (
            uqff.quantize(weight, kind, effort="calibrated", hessian=hessian),
            uqff.quantize(weight, kind),
            uqff.quantize(weight, kind, effort="best", importance=importance),
        ):
            made = record.dequantize().double().numpy()
            lost.append((((made - weight) @ curvature) * (made - weight)).sum(1))
        if kind in ("fp8", "f8q8") or kind.startswith("hqq"):  # whose scales rows may share
            lost = [each.sum(keepdims=True) for each in lost]
    mine, engine, best = lost
    assert not np.any(mine > engine * (1 + 1e-4))
    assert not np.any(mine > best * (1 + 1e-4))
    assert not np.any(np.isnan(mine) & ~np.isnan(engine))


def test_no_inputs_no_feedback() -> None:
    """Without any inputs it is the search without importance; plain numbers stay what they are."""
    weight = weights((32, 64))
    none = np.zeros((64, 64), np.float32)
    made, best = (uqff.quantize(weight, "q8_0", effort=how, hessian=none) for how in ("calibrated", "best"))
    assert np.array_equal(made.dequantize().numpy(), best.dequantize().numpy())
    plain = uqff.quantize(weight, "unquant", effort="calibrated", hessian=none)
    assert np.array_equal(plain.dequantize().numpy(), weight)


def test_what_is_refused() -> None:
    weight = weights((32, 64))
    with pytest.raises(UnsupportedError, match="XᵀX of the inputs, which calibrated needs"):
        uqff.quantize(weight, "q4_0", effort="calibrated")
    for shape in ((64,), (32, 32), (2, 64, 64)):
        with pytest.raises(ShapeError, match="hessian"):
            uqff.quantize(weight, "q4_0", effort="calibrated", hessian=np.zeros(shape))
    wrong = np.eye(64, dtype=np.float32)
    wrong[3, 3] = -1
    with pytest.raises(FormatError, match=r"-1\.0 at \(0, 3\)"):
        uqff.quantize(weight, "q4_0", effort="calibrated", hessian=wrong)
    wrong[3, 3], wrong[4, 5] = 1, np.nan
    with pytest.raises(FormatError, match=r"nan at \(0, 4, 5\)"):
        uqff.quantize(weight, "q4_0", effort="calibrated", hessian=wrong)
    with pytest.raises(FormatError, match="positive semidefinite"):
        uqff.quantize(weight, "q4_0", effort="calibrated", hessian=np.eye(64) - 3 * np.eye(64)[::-1])
