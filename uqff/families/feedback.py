"""``effort="calibrated"``: error feedback along the inputs of a layer, on the grid of any type.

Inputs whose weights share scales, a block or group or super-block, are quantised together: first as
``effort="best"`` does it, which chooses their scales; then, with these scales, weight after weight with feedback, see
:mod:`uqff.numerics.feedback`.  What is left goes to the blocks that are still to come.  A type whose scales span all
inputs gets them once, from the weight as it is.

Feedback moves weights away from what scales were chosen for: they are chosen once more for the weights that were met,
and each row keeps the better of both.  When all inputs are done, blocks take turns again, each moved to where, with all
others as they now are, the answers would be nearest; a row of a block changes if its answers get nearer.

In the end each row whose answers are nearer as ``effort="best"`` or as the engine makes it, which happens where weights
are of very different sizes or overflow what a type can hold, is made so.

What a family says of itself for that: :attr:`~uqff.families.base.QuantizedTensor.code_values` and
:meth:`~uqff.families.base.QuantizedTensor.with_codes`.  Offsets and steps are read from what it makes of the least and
the largest code, so they are those that a reader sees.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff import simd
from uqff.codes import DType
from uqff.families.base import QuantizedTensor
from uqff.families.encoding import AS_ENGINE, Effort, Engine
from uqff.families.loaded import Loaded
from uqff.families.stacking import stack
from uqff.numerics import feedback
from uqff.simd.floats import Floats
from uqff.simd.threads import run_ranges

__all__ = ["calibrated"]

F32: TypeAlias = npt.NDArray[np.float32]
U8: TypeAlias = npt.NDArray[np.uint8]
Wide: TypeAlias = npt.NDArray[np.float64]
Index: TypeAlias = npt.NDArray[np.int64]
Make: TypeAlias = Callable[[Loaded, Effort], QuantizedTensor]

RUN: Final = 64
"""Inputs that are rounded before what they leave goes to the others, where scales leave that open."""
GRAIN: Final = 512
"""Rows of a range at least, where rows are only copied."""
CHUNK: Final = 1 << 22
"""Weights of the rows that are worked at together, some 50 bytes each."""
AGAIN: Final = 8
"""Inputs that take a turn again together, where scales do not follow: of many, hardly ever all get better at once."""
SWEEPS = 2
"""How often blocks take turns again."""
LESS: Final = 1 - 1e-9
"""An error is less if it is below so much of the other: not by rounding alone."""


def calibrated(
    loaded: Loaded, kind: str, record: type[QuantizedTensor], group_size: int, engine: Engine, effort: Effort
) -> QuantizedTensor:
    """A weight whose shape fits the type, quantised so that the answers of the layer are nearest to its own.

    Args:
        loaded: the weight.
        kind: a type of the family.
        record: the family.
        group_size: of types that have groups.
        engine: whose bytes, where generations differ.
        effort: its Hessian is that of the layer's inputs.

    Raises:
        FormatError: a weight is not finite in its load dtype, or the Hessian is not positive semidefinite.
    """

    def make(part: Loaded, how: Effort) -> QuantizedTensor:
        return record.encode(part, kind, engine=engine, group_size=group_size, effort=how)

    planned = record.planned(kind, loaded.shape, loaded.dtype, group_size)
    plain = Effort("best", effort.importance)
    if effort.hessian is None or planned.code_values is None:
        return make(loaded, plain)
    with np.errstate(over="ignore", invalid="ignore"):  # of weights that overflow what the type can hold
        if not planned.scale_inputs:
            best = make(loaded, plain)
            others = [best, *(make(loaded, how) for how in _others(effort.hessian))]
            return _nearest([_on_grid(best, loaded.values, effort.hessian), *others], loaded.values, effort.hessian)
        if len(loaded.shape) == 2:
            return _matrix(loaded.values, effort.hessian[0], planned, loaded.dtype, make)
        hessians = np.broadcast_to(effort.hessian, (loaded.shape[0], *effort.hessian.shape[1:]))
        one = record.planned(kind, loaded.shape[1:], loaded.dtype, group_size)
        pairs = zip(loaded.values, hessians, strict=True)
        return stack([_matrix(*pair, one, loaded.dtype, make) for pair in pairs])


class _Searched:
    """Scales of blocks that each quantise by themselves.

    Attributes:
        unit: inputs of a block.
        together: rows that may share scales: one, or all where slices of rows do not quantise by themselves, or where
            scales are of single inputs, which then are of several rows.
    """

    def __init__(self, planned: QuantizedTensor, dtype: DType, make: Make) -> None:
        self.unit = planned.scale_inputs
        self.together = 1 if self.unit > 1 and planned.alignment(0) == 1 else planned.shape[0]
        self._dtype, self._make = dtype, make

    def record(self, targets: F32, weights: Wide) -> QuantizedTensor:
        """Weights of one or several blocks ``[rows, in]``, with the scales that suit these numbers."""
        blocks = weights.reshape(-1, self.unit)
        importance = (blocks / blocks.mean(1, keepdims=True)).astype(np.float32).reshape(1, -1)
        finite = np.isfinite(targets)
        kept = targets if finite.all() else np.where(finite, targets, np.float32(0))  # rows that are lost anyway
        return self.made(kept, Effort("best", importance))

    def made(self, weight: F32, how: Effort) -> QuantizedTensor:
        """A matrix, or some of its columns, by itself."""
        floats = Floats(np.ascontiguousarray(weight).view(np.uint32), DType.F32)
        return self._make(Loaded(floats, self._dtype, rounded=False), how)

    def of(self, targets: F32, weights: Wide, place: Index) -> tuple[Wide, Wide]:
        """Offsets and steps of a block, ``[unit, rows]``, its inputs in the order of ``place``."""
        offset, step = _grid(self.record(targets, weights))
        return np.ascontiguousarray(offset.T[place]), np.ascontiguousarray(step.T[place])


class _Fixed:
    """Scales that stay what they are: offsets and steps of a matrix ``[rows, in]``."""

    together = 1

    def __init__(self, offset: Wide, step: Wide) -> None:
        self.offset, self.step = offset, step


def _matrix(weight: F32, hessian: F32, planned: QuantizedTensor, dtype: DType, make: Make) -> QuantizedTensor:
    """A matrix whose scales are of some inputs each: block after block; at the end many blocks at once, and joined."""
    assert planned.code_values is not None
    scales = _Searched(planned, dtype, make)
    turns = _Turns(hessian, scales.unit, planned.code_values, scales)
    targets, codes = turns.take(weight)
    width = max(scales.unit, CHUNK // len(weight) // scales.unit * scales.unit)
    slices = []
    for start in range(0, weight.shape[1], width):
        some = slice(start, start + width)
        record = scales.record(targets[:, some], turns.weights[some])
        slices.append((start, record.with_codes(np.ascontiguousarray(codes[:, some]))))
    others = [scales.made(weight, how) for how in _others(hessian[None])]
    return _nearest([planned.join(slices, 1), *others], weight, hessian[None], scales.together)


def _on_grid(record: QuantizedTensor, weight: F32, hessians: F32) -> QuantizedTensor:
    """A weight, or a stack, whose scales stay what they are."""
    offset, step = _grid(record)
    codes = np.empty(record.shape, np.uint8)
    experts = [weight] if weight.ndim == 2 else weight
    values = record.code_values
    assert values is not None
    for at, each in enumerate(experts):
        b, s, q = (array.reshape(len(experts), *each.shape)[at] for array in (offset, step, codes))
        hessian = hessians[at if len(hessians) > 1 else 0]
        q[:] = _Turns(hessian, 1, values, _Fixed(b, s)).take(each)[1]
    return record.with_codes(codes)


def _others(hessians: F32) -> tuple[Effort, Effort]:
    """What a weight that is made with feedback is compared with."""
    importance = np.stack([np.diagonal(feedback.damped(each)) for each in hessians]).astype(np.float32)
    return Effort("best", importance), AS_ENGINE


def _nearest(records: list[QuantizedTensor], weight: F32, hessians: F32, together: int = 0) -> QuantizedTensor:
    """Of several records of a matrix, each row of the one that loses least of its answers; the first of equals.

    Args:
        records: of the same type.
        weight: what they are of; also a stack, of which one is taken as it is.
        hessians: of it.
        together: rows that are taken from one record; all if 0.
    """
    experts = weight.reshape(-1, *weight.shape[-2:])
    curvatures = [feedback.damped(each).astype(np.float32) for each in hessians] * (len(experts) // len(hessians))
    lost = np.stack([_lost(each, experts, curvatures) for each in records])
    lost = lost.reshape(len(records), -1, together or lost.shape[1]).sum(2)
    first = np.where(np.isnan(lost), np.inf, lost).argmin(0)
    edges = [0, *(np.flatnonzero(np.diff(first)) + 1).tolist(), len(first)]
    if len(edges) == 2:
        return records[int(first[0])]
    slices = []
    for start, end in itertools.pairwise(edges):
        rows = start * together, (end - start) * together
        slices.append((rows[0], records[int(first[start])].narrow(0, *rows)))
    return records[0].join(slices, 0)


def _lost(record: QuantizedTensor, experts: F32, curvatures: list[F32]) -> Wide:
    """What each row loses of its answers, in float32: only large differences count."""
    numbers = record.numbers().array().view(np.float32).reshape(experts.shape)
    lost = np.empty(experts.shape[:2])
    count = max(1, CHUNK // experts.shape[2])
    for at, curvature in enumerate(curvatures):
        for start in range(0, experts.shape[1], count):
            rows = slice(start, start + count)
            far = numbers[at, rows] - experts[at, rows]
            most = np.abs(far).max(1, keepdims=True)
            far /= np.where(most == 0, np.float32(1), most)
            lost[at, rows] = ((far @ curvature) * far).sum(1, dtype=np.float64) * most[:, 0].astype(np.float64) ** 2
    return lost.reshape(-1)


def _grid(record: QuantizedTensor) -> tuple[Wide, Wide]:
    """Offset and step of every weight, as a reader sees them: ``offset + step * value``."""
    values = record.code_values
    assert values is not None
    ends = []
    for code in (0, len(values) - 1):
        numbers = record.with_codes(np.full(record.shape, code, np.uint8)).numbers().array()
        ends.append(numbers.view(np.float32).reshape(record.shape).astype(np.float64))
    low, high = ends
    step = (high - low) / (values[-1] - values[0])
    return low - step * values[0], step


class _Turns:
    """In which order the inputs of a matrix are rounded, and what feedback needs for it.

    Attributes:
        values: what codes stand for.
        scales: of blocks.
        searched: whether scales are of blocks of several inputs, so that they can follow the weights.
        order: inputs by turns.
        curvature: XᵀX of the inputs in that order, damped.
        factor: U of it.
        weights: what an error of each input costs, by which scales are searched; inputs as they lie.
    """

    def __init__(self, hessian: F32, unit: int, values: Wide, scales: _Searched | _Fixed) -> None:
        """Of a matrix.

        Args:
            hessian: ``[in, in]``.
            unit: inputs that stay together.
            values: what codes stand for.
            scales: of blocks.
        """
        self.values, self.scales = values, scales
        self.searched = isinstance(scales, _Searched) and unit > 1
        curvature = feedback.damped(hessian)
        self.order = feedback.input_order(curvature, unit)
        self.curvature = curvature[np.ix_(self.order, self.order)]
        self.factor = feedback.inverse_factor(self.curvature)
        self.weights = np.empty(len(self.order))
        self.weights[self.order] = np.diagonal(self.factor) ** -2.0
        self.first = RUN if isinstance(scales, _Fixed) else unit
        self.again = unit if self.searched else AGAIN
        self._own: dict[int, Wide] = {}

    def take(self, weight: F32) -> tuple[F32, U8]:
        """Go through a matrix ``[rows, in]``.

        Returns:
            Of each weight, the number that its scales were chosen for, and its code.
        """
        targets, codes = weight.copy(), np.empty(weight.shape, np.uint8)
        together = self.scales.together
        count = max(together, CHUNK // weight.shape[1] // together * together)
        for start in range(0, len(weight), count):
            rows = slice(start, min(start + count, len(weight)))
            part = _Rows(self, weight, rows, targets[rows])
            part.round()
            for _ in range(SWEEPS):
                part.round_again()
            codes[rows, self.order] = part.codes.T
        return targets, codes

    def runs(self, width: int) -> Iterator[tuple[slice, list[slice]]]:
        """Runs of blocks, as ranges of :attr:`order`.

        What narrow blocks leave goes to a run of them at once, and to the rest when the run is done.
        """
        length = max(width, RUN // width * width)
        for start in range(0, len(self.order), length):
            end = min(start + length, len(self.order))
            yield slice(start, end), [slice(at, min(at + width, end)) for at in range(start, end, width)]

    def own_factor(self, block: slice) -> Wide:
        """U of a block by itself, with all other inputs as they are."""
        if block.start not in self._own:
            self._own[block.start] = feedback.inverse_factor(self.curvature[block, block])
        return self._own[block.start]


class _Block(NamedTuple):
    """A block of some rows: arrays ``[unit, rows]``, its inputs in the order of turns.

    Attributes:
        targets: what scales were chosen for, ``[rows, unit]``, inputs as they lie; None if they stayed.
        offset: of the grid, if it was chosen.
        step: of the grid.
        codes: of each weight.
        near: the numbers that these stand for.
        errors: of each weight, as rounding left them.
        met: the weights that were rounded, feedback included.
        loss: of each row, what is lost of the answers.
    """

    targets: F32 | None
    offset: Wide | None
    step: Wide | None
    codes: U8
    near: Wide
    errors: Wide
    met: Wide
    loss: Wide


class _Rows:
    """Some rows of a matrix, while they are worked at: arrays ``[in, rows]``, inputs in the order of turns."""

    def __init__(self, turns: _Turns, weight: F32, rows: slice, targets: F32) -> None:
        self.turns, self.targets = turns, targets
        self.weight = self._by_turns(weight[rows])
        self.near = np.empty_like(self.weight)
        self.codes = np.empty(self.weight.shape, np.uint8)
        if isinstance(turns.scales, _Fixed):
            self.offset, self.step = (self._by_turns(each[rows]) for each in (turns.scales.offset, turns.scales.step))
        else:
            self.offset, self.step = np.empty_like(self.weight), np.empty_like(self.weight)

    def _by_turns(self, array: npt.NDArray[Any]) -> Wide:
        return np.ascontiguousarray(array.T)[self.turns.order].astype(np.float64)

    def round(self) -> None:
        """Round input after input; what each lacks goes to those that are to come."""
        turns, factor = self.turns, self.turns.factor
        x = self.weight.copy()
        for run, blocks in turns.runs(turns.first):
            left = np.empty((run.stop - run.start, x.shape[1]))
            for block in blocks:
                own, lost = factor[block, block], left[block.start - run.start : block.stop - run.start]
                made = self._rounded(x[block], block, own, x[block])
                self._keep(block, made)
                lost[:] = made.errors
                if turns.searched:
                    other = self._rounded(x[block], block, own, made.met)
                    better = self._less(other.loss, made.loss)
                    self._keep(block, other, better)
                    np.copyto(lost, other.errors, where=better)
                x[block.stop : run.stop] -= factor[block, block.stop : run.stop].T @ lost
            x[run.stop :] -= factor[run, run.stop :].T @ left

    def round_again(self) -> None:
        """Let blocks take turns, each with all others as they are; what does not get better stays."""
        turns, curvature, near = self.turns, self.turns.curvature, self.near
        pull = curvature.T @ (self.weight - near)
        for run, blocks in turns.runs(turns.again):
            moved = np.zeros((run.stop - run.start, pull.shape[1]))
            for block in blocks:
                own = turns.own_factor(block)
                lack = own @ pull[block]
                x, before, old = near[block] + own.T @ lack, (lack * lack).sum(0), near[block].copy()
                made = self._rounded(x, block, own)
                better = self._less(made.loss, before)
                if turns.searched:
                    other = self._rounded(x, block, own, x)
                    first = self._less(made.loss, other.loss)
                    self._keep(block, other, ~first & self._less(other.loss, before))
                    better &= first
                self._keep(block, made, better)
                change = near[block] - old
                moved[block.start - run.start : block.stop - run.start] = change
                pull[run] -= curvature[block, run].T @ change
            pull[: run.start] -= curvature[run, : run.start].T @ moved
            pull[run.stop :] -= curvature[run, run.stop :].T @ moved

    def _rounded(self, x: Wide, block: slice, own: Wide, targets: Wide | None = None) -> _Block:
        """A block ``x`` rounded with the scales that suit ``targets``, or with those that it has."""
        turns, scales = self.turns, self.turns.scales
        if targets is None or isinstance(scales, _Fixed):
            return _Block(None, None, None, *_rounded(x, own, self.offset[block], self.step[block], turns.values))
        inputs = self._inputs(block)
        place = turns.order[block] - inputs.start
        lying = np.empty(x.shape[::-1], np.float32)
        lying[:, place] = targets.T
        offset, step = scales.of(lying, turns.weights[inputs], place)
        return _Block(lying, offset, step, *_rounded(x, own, offset, step, turns.values))

    def _inputs(self, block: slice) -> slice:
        """Where the inputs of a block lie that share scales."""
        start = int(self.turns.order[block].min())
        return slice(start, start + block.stop - block.start)

    def _less(self, loss: Wide, other: Wide) -> npt.NDArray[np.bool_]:
        """Which rows lose less; those that share scales are one, as they change together or not at all."""
        together = self.turns.scales.together if self.turns.searched else 1
        if together > 1:
            loss, other = (np.repeat(each.reshape(-1, together).sum(1), together) for each in (loss, other))
        less: npt.NDArray[np.bool_] = loss < other * LESS
        return less

    def _keep(self, block: slice, made: _Block, change: npt.NDArray[np.bool_] | None = None) -> None:
        """Put a block in its place, or those of its rows that change."""
        pairs: list[tuple[Any, Any]] = [(self.codes[block], made.codes), (self.near[block], made.near)]
        if made.targets is not None:
            pairs += (self.offset[block], made.offset), (self.step[block], made.step)
            pairs.append((self.targets[:, self._inputs(block)].T, made.targets.T))

        def put(lo: int, hi: int) -> None:
            for mine, theirs in pairs:
                np.copyto(mine[:, lo:hi], theirs[:, lo:hi], where=True if change is None else change[lo:hi])

        run_ranges(put, len(made.loss), grain=GRAIN)


def _rounded(x: Wide, factor: Wide, offset: Wide, step: Wide, values: Wide) -> tuple[U8, Wide, Wide, Wide, Wide]:
    """What :func:`uqff.numerics.feedback.round_inputs` finds, and the weights that it rounded: see :class:`_Block`."""
    x = x.copy()
    codes, near, errors, loss = np.empty(x.shape, np.uint8), np.empty_like(x), np.empty_like(x), np.empty(x.shape[1])
    with np.errstate(all="ignore"):
        _kernel()(x, factor, offset, step, values, codes, near, errors, loss)
    return codes, near, errors, x, loss


def _kernel() -> Callable[..., None]:
    if not simd.enabled():
        return feedback.round_inputs
    from uqff.simd import feedback as kernels

    return kernels.round_inputs
