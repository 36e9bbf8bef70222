"""``effort="calibrated"``: error feedback along the inputs of a layer, on the grid of any type.

Inputs whose weights share scales, a block or group or super-block, are quantised together: first as
``effort="best"`` does it, which chooses their scales; then, with these scales, weight after weight with feedback, see
:mod:`uqff.numerics.feedback`.  What is left goes to the blocks that are still to come.  A type whose scales span all
inputs gets them once, from the weight as it is.

Feedback moves weights away from what scales were chosen for: they are chosen once more for the weights that were met,
and each row keeps the better of both.  When all inputs are done, blocks take turns again, each moved to where, with all
others as they now are, the answers would be nearest; a row of a block changes if its answers get nearer.

What a family says of itself for that: :attr:`~uqff.families.base.QuantizedTensor.code_values` and
:meth:`~uqff.families.base.QuantizedTensor.with_codes`.  Offsets and steps are read from what it makes of the least and
the largest code, so they are those that a reader sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff import simd
from uqff.codes import DType
from uqff.families.base import QuantizedTensor
from uqff.families.encoding import Effort, Engine
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
GRAIN: Final = 64
"""Rows of a range at least."""
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
    if not planned.scale_inputs:
        return _on_grid(make(loaded, plain), loaded.values, effort.hessian)
    if len(loaded.shape) == 2:
        return _matrix(loaded.values, effort.hessian[0], planned, loaded.dtype, make)
    hessians = np.broadcast_to(effort.hessian, (loaded.shape[0], *effort.hessian.shape[1:]))
    one = record.planned(kind, loaded.shape[1:], loaded.dtype, group_size)
    pairs = zip(loaded.values, hessians, strict=True)
    return stack([_matrix(*pair, one, loaded.dtype, make) for pair in pairs])


class _Searched:
    """Scales of blocks that each quantise by themselves.

    Attributes:
        together: rows that may share scales: one, or all where slices of rows do not quantise by themselves.
    """

    def __init__(self, planned: QuantizedTensor, dtype: DType, make: Make) -> None:
        self.together = 1 if planned.alignment(0) == 1 else planned.shape[0]
        self._dtype, self._make = dtype, make

    def record(self, targets: F32, weights: Wide) -> QuantizedTensor:
        """A block of weights, with the scales that suit these numbers."""
        part = Loaded(Floats(np.ascontiguousarray(targets).view(np.uint32), DType.F32), self._dtype, rounded=False)
        return self._make(part, Effort("best", (weights / weights.mean()).astype(np.float32)[None]))

    def of(self, rows: slice, inputs: Index, targets: F32, weights: Wide) -> tuple[Wide, Wide]:
        """Offsets and steps of a block."""
        return _grid(self.record(targets, weights))


class _Fixed:
    """Scales that stay what they are."""

    together = 1

    def __init__(self, offset: Wide, step: Wide) -> None:
        self._offset, self._step = offset, step

    def of(self, rows: slice, inputs: Index, targets: F32, weights: Wide) -> tuple[Wide, Wide]:
        """Offsets and steps of a block."""
        return self._offset[rows][:, inputs], self._step[rows][:, inputs]


def _matrix(weight: F32, hessian: F32, planned: QuantizedTensor, dtype: DType, make: Make) -> QuantizedTensor:
    """A matrix whose scales are of some inputs each: block after block, and joined."""
    assert planned.code_values is not None
    unit, scales = planned.scale_inputs, _Searched(planned, dtype, make)
    turns = _Turns(hessian, unit, planned.code_values, scales)
    targets, codes = turns.take(weight)
    slices = []
    for start in range(0, weight.shape[1], unit):
        block = slice(start, start + unit)
        record = scales.record(targets[:, block], turns.weights[block])
        slices.append((start, record.with_codes(np.ascontiguousarray(codes[:, block]))))
    return planned.join(slices, 1)


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
        curvature: XᵀX, damped.
        order: inputs by turns.
        factor: U of the inputs in that order.
        weights: what an error of each input costs, by which scales are searched.
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
        self.curvature = feedback.damped(hessian)
        self.order = feedback.input_order(self.curvature, unit)
        self.factor = feedback.inverse_factor(self.curvature[np.ix_(self.order, self.order)])
        self.weights = np.empty(len(self.order))
        self.weights[self.order] = np.diagonal(self.factor) ** -2.0
        self.first = RUN if isinstance(scales, _Fixed) else unit
        self.again = unit if self.searched else AGAIN

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
            part = _Rows(self, weight, rows, targets[rows], codes[rows])
            part.round()
            for _ in range(SWEEPS):
                part.round_again()
        return targets, codes

    def runs(self, width: int) -> Iterator[tuple[slice, list[slice]]]:
        """Runs of blocks, as ranges of :attr:`order`.

        What narrow blocks leave goes to a run of them at once, and to the rest when the run is done.
        """
        length = max(width, RUN // width * width)
        for start in range(0, len(self.order), length):
            end = min(start + length, len(self.order))
            yield slice(start, end), [slice(at, min(at + width, end)) for at in range(start, end, width)]


class _Block(NamedTuple):
    """A block of some rows, its inputs in the order of turns.

    Attributes:
        targets: what scales were chosen for.
        offset: of the grid.
        step: of the grid.
        codes: of each weight.
        errors: of each weight, as rounding left them.
        met: the weights that were rounded, feedback included.
        loss: of each row, what is lost of the answers.
    """

    targets: F32
    offset: Wide
    step: Wide
    codes: U8
    errors: Wide
    met: Wide
    loss: Wide


class _Rows:
    """Some rows of a matrix, while they are worked at: arrays ``[rows, in]``, inputs as they lie."""

    def __init__(self, turns: _Turns, weight: F32, rows: slice, targets: F32, codes: U8) -> None:
        self.turns, self.rows, self.targets, self.codes = turns, rows, targets, codes
        self.weight = weight[rows].astype(np.float64)
        self.offset, self.step, self.near = (np.empty_like(self.weight) for _ in range(3))

    def round(self) -> None:
        """Round input after input; what each lacks goes to those that are to come."""
        turns, factor = self.turns, self.turns.factor
        x = self.weight[:, turns.order]
        for run, blocks in turns.runs(turns.first):
            left = np.empty((len(x), run.stop - run.start))
            for block in blocks:
                turn, own = turns.order[block], factor[block, block]
                made = self._with_scales_for(x[:, block], x[:, block], turn, own)
                if turns.searched:
                    made = self._better(made, self._with_scales_for(made.met, x[:, block], turn, own))
                self._keep(turn, made, np.ones(len(x), bool))
                left[:, block.start - run.start : block.stop - run.start] = made.errors
                x[:, block.stop : run.stop] -= made.errors @ factor[block, block.stop : run.stop]
            x[:, run.stop :] -= left @ factor[run, run.stop :]

    def round_again(self) -> None:
        """Let blocks take turns, each with all others as they are; what does not get better stays."""
        turns, curvature = self.turns, self.turns.curvature
        pull = (self.weight - self.near) @ curvature
        for run, blocks in turns.runs(turns.again):
            inputs = turns.order[run]
            moved = np.zeros((len(pull), len(inputs)))
            for block in blocks:
                turn = turns.order[block]
                local = curvature[np.ix_(turn, turn)]
                own = feedback.inverse_factor(local)
                lack = np.linalg.solve(local, pull[:, turn].T).T
                x, old = self.near[:, turn] + lack, self.near[:, turn]
                before = ((lack @ local) * lack).sum(1)
                made = self._rounded(x, own, self.targets[:, turn], self.offset[:, turn], self.step[:, turn])
                if turns.searched:
                    made = self._better(made, self._with_scales_for(x, x, turn, own))
                self._keep(turn, made, self._shared(made.loss) < self._shared(before) * LESS)
                change = self.near[:, turn] - old
                moved[:, block.start - run.start : block.stop - run.start] = change
                pull[:, inputs] -= change @ curvature[np.ix_(turn, inputs)]
            rest = np.concatenate((turns.order[: run.start], turns.order[run.stop :]))
            pull[:, rest] -= moved @ curvature[np.ix_(inputs, rest)]

    def _with_scales_for(self, targets: Wide, x: Wide, turn: Index, own: Wide) -> _Block:
        """A block ``x`` rounded with the scales that suit ``targets``."""
        turns = self.turns
        inputs = np.sort(turn)
        place = np.searchsorted(inputs, turn)
        lying = np.empty(x.shape, np.float32)
        lying[:, place] = targets
        offset, step = turns.scales.of(self.rows, inputs, lying, turns.weights[inputs])
        return self._rounded(x, own, lying[:, place], offset[:, place], step[:, place])

    def _rounded(self, x: Wide, own: Wide, targets: F32, offset: Wide, step: Wide) -> _Block:
        codes, errors, met = _rounded(x, own, offset, step, self.turns.values)
        return _Block(targets, offset, step, codes, errors, met, (errors**2).sum(1))

    def _better(self, one: _Block, other: _Block) -> _Block:
        """Of each row the one that loses less."""
        change = self._shared(other.loss) < self._shared(one.loss) * LESS
        pairs: Any = zip(one, other, strict=True)
        return _Block(*(np.where(change if a.ndim == 1 else change[:, None], b, a) for a, b in pairs))

    def _shared(self, loss: Wide) -> Wide:
        """Of each row, what the rows that share its scales lose together; these change as one, or not at all."""
        together = self.turns.scales.together if self.turns.searched else 1
        return loss if together == 1 else np.repeat(loss.reshape(-1, together).sum(1), together)

    def _keep(self, turn: Index, made: _Block, change: npt.NDArray[np.bool_]) -> None:
        index = np.ix_(change, turn)
        self.targets[index], self.codes[index] = made.targets[change], made.codes[change]
        self.offset[index], self.step[index] = made.offset[change], made.step[change]
        self.near[index] = self.offset[index] + self.step[index] * self.turns.values[self.codes[index]]


def _rounded(x: Wide, factor: Wide, offset: Wide, step: Wide, values: Wide) -> tuple[U8, Wide, Wide]:
    """Codes and errors of :func:`uqff.numerics.feedback.round_inputs`, and the weights that it rounded."""
    codes, errors = np.empty(x.shape, np.uint8), np.empty(x.shape)
    x, offset, step = (np.array(each, order="C") for each in (x, offset, step))
    factor = np.ascontiguousarray(factor)
    if not simd.enabled():
        with np.errstate(all="ignore"):
            feedback.round_inputs(x, factor, offset, step, values, codes, errors)
        return codes, errors, x
    from uqff.simd import feedback as kernels

    kernel: Any = kernels.round_inputs
    run_ranges(lambda lo, hi: kernel(x, factor, offset, step, values, codes, errors, lo, hi), len(x), grain=GRAIN)
    return codes, errors, x
