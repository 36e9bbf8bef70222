"""``effort="calibrated"``: error feedback along the inputs of a layer, on the grid of any type.

Inputs whose weights share scales, a block or group or super-block, are quantised together: first as
``effort="best"`` does it, which chooses their scales; then, with these scales, weight after weight with feedback, see
:mod:`uqff.numerics.feedback`.  What is left goes to the blocks that are still to come.  A type whose scales span all
inputs gets them once, from the weight as it is.

What a family says of itself for that: :attr:`~uqff.families.base.QuantizedTensor.code_values` and
:meth:`~uqff.families.base.QuantizedTensor.with_codes`.  Offsets and steps are read from what it makes of the least and
the largest code, so they are those that a reader sees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias

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
Wide: TypeAlias = npt.NDArray[np.float64]
Make: TypeAlias = Callable[[Loaded, Effort], QuantizedTensor]

RUN: Final = 64
"""Inputs that are rounded before what they leave goes to the others, where scales leave that open."""
GRAIN: Final = 64
"""Rows of a range at least."""


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


def _matrix(weight: F32, hessian: F32, planned: QuantizedTensor, dtype: DType, make: Make) -> QuantizedTensor:
    """A matrix whose scales are of some inputs each: block after block, and joined."""
    slices: list[tuple[int, QuantizedTensor]] = []

    def grid(x: Wide, inputs: npt.NDArray[np.int64], weights: Wide) -> tuple[Wide, Wide]:
        """Quantise a block; its offsets and steps."""
        part = Loaded(Floats(x.astype(np.float32).view(np.uint32), DType.F32), dtype, rounded=False)
        record = make(part, Effort("best", (weights / weights.mean()).astype(np.float32)[None]))
        slices.append((int(inputs[0]), record))
        return _grid(record)

    def keep(codes: npt.NDArray[np.uint8]) -> None:
        start, record = slices[-1]
        slices[-1] = start, record.with_codes(codes)

    assert planned.code_values is not None
    _feed_back(weight, hessian, planned.scale_inputs, planned.code_values, grid, keep)
    return planned.join(slices, 1)


def _on_grid(record: QuantizedTensor, weight: F32, hessians: F32) -> QuantizedTensor:
    """A weight, or a stack, whose scales stay what they are."""
    offset, step = _grid(record)
    codes = np.empty(record.shape, np.uint8)
    experts = [weight] if weight.ndim == 2 else weight
    values = record.code_values
    assert values is not None
    for at, each in enumerate(experts):
        inputs_of: list[npt.NDArray[np.int64]] = []
        b, s, q = (array.reshape(len(experts), *each.shape)[at] for array in (offset, step, codes))

        def grid(
            x: Wide, inputs: npt.NDArray[np.int64], weights: Wide, b: Wide = b, s: Wide = s, inputs_of: Any = inputs_of
        ) -> tuple[Wide, Wide]:
            inputs_of.append(inputs)
            return b[:, inputs], s[:, inputs]

        def keep(made: npt.NDArray[np.uint8], q: Any = q, inputs_of: Any = inputs_of) -> None:
            q[:, inputs_of[-1]] = made

        hessian = hessians[at if len(hessians) > 1 else 0]
        _feed_back(each, hessian, 1, values, grid, keep, width=RUN)
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


def _feed_back(
    weight: F32,
    hessian: F32,
    unit: int,
    values: Wide,
    grid: Callable[[Wide, npt.NDArray[np.int64], Wide], tuple[Wide, Wide]],
    keep: Callable[[npt.NDArray[np.uint8]], None],
    *,
    width: int | None = None,
) -> None:
    """Go through the inputs of a matrix.

    Args:
        weight: ``[rows, in]``.
        hessian: ``[in, in]``.
        unit: inputs that stay together.
        values: what codes stand for.
        grid: of the weights of a block as they are now, of its inputs and of what an error of each costs, makes offsets
            and steps.
        keep: takes the codes of that block.
        width: inputs of a block, if that is not the unit.
    """
    curvature = feedback.damped(hessian)
    order = feedback.input_order(curvature, unit)
    factor = feedback.inverse_factor(curvature[np.ix_(order, order)])
    cost = np.diagonal(factor) ** -2.0
    width = width or unit
    x = weight[:, order].astype(np.float64)  # inputs in the order in which they are rounded
    # What narrow blocks leave goes to a run of them at once, and to the rest when the run is done.
    run = max(width, RUN // width * width)
    for first in range(0, len(order), run):
        end = min(first + run, len(order))
        left = np.empty((len(x), end - first))
        for start in range(first, end, width):
            stop = min(start + width, end)
            turn = order[start:stop]
            inputs = np.sort(turn)
            place = np.searchsorted(inputs, turn)
            plain, weights = np.empty((len(x), stop - start)), np.empty(stop - start)
            plain[:, place], weights[place] = x[:, start:stop], cost[start:stop]
            offset, step = grid(plain, inputs, weights)
            own = factor[start:stop, start:stop]
            codes, errors = _rounded(x[:, start:stop], own, offset[:, place], step[:, place], values)
            back = np.empty_like(codes)
            back[:, place] = codes
            keep(back)
            left[:, start - first : stop - first] = errors
            x[:, stop:end] -= errors @ factor[start:stop, stop:end]
        x[:, end:] -= left @ factor[first:end, end:]


def _rounded(x: Wide, factor: Wide, offset: Wide, step: Wide, values: Wide) -> tuple[npt.NDArray[np.uint8], Wide]:
    codes, errors = np.empty(x.shape, np.uint8), np.empty(x.shape)
    x, offset, step = (np.array(each, order="C") for each in (x, offset, step))
    factor = np.ascontiguousarray(factor)
    if not simd.enabled():
        with np.errstate(all="ignore"):
            feedback.round_inputs(x, factor, offset, step, values, codes, errors)
        return codes, errors
    from uqff.simd import feedback as kernels

    kernel: Any = kernels.round_inputs
    run_ranges(lambda lo, hi: kernel(x, factor, offset, step, values, codes, errors, lo, hi), len(x), grain=GRAIN)
    return codes, errors
