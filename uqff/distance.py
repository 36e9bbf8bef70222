"""How far two weights are from each other, measured tile by tile: neither is dequantised as a whole.

A tile is dequantised into a cache and compared there; the sums are defined to the last bit, whatever the threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.families import AFQ, F8Q8, FP8, GGUF, HQQ, MXFP4, QuantizedTensor, Unquant
from uqff.kernels.memory import empty
from uqff.kernels.threads import run_ranges

if TYPE_CHECKING:
    import torch

__all__ = ["UNMEASURED", "Distance", "Measure", "distance", "measured"]

F32: TypeAlias = npt.NDArray[np.float32]

TILE = 1 << 17
"""Weights that are dequantised together, at least a row: what stays in a cache."""

LANES = 16
"""Running sums, see :func:`pair_sums`."""


@dataclass(frozen=True)
class Distance:
    """The distance of a weight b from a weight a; NaN or infinite weights make it NaN.

    Attributes:
        rms: root mean square of b - a.
        norm: root mean square of a.
        largest: largest magnitude of b - a.
        cosine: of the angle between a and b as vectors; 1 if both are zero.
    """

    rms: float
    norm: float
    largest: float
    cosine: float

    @property
    def relative(self) -> float:
        """``rms`` over ``norm``; 0 if both are zero."""
        if self.norm == 0:
            return 0.0 if self.rms == 0 else math.inf
        return self.rms / self.norm


UNMEASURED: Final = Distance(math.nan, math.nan, math.nan, math.nan)
"""Where nobody asked for the distance."""


def pair_sums(a: F32, b: F32) -> npt.NDArray[np.float64]:
    """What a distance is made of: the sums of a², b², a·b and (b - a)², and the largest magnitude of b - a.

    The difference is rounded to float32.  All else is exact or float64: running sum k of 16 adds the products of the
    elements whose index is k modulo 16, in order; then the sums are added in order.  NaN if there is one.

    Args:
        a: float32 ``[n]``, contiguous.
        b: like ``a``.
    """
    from uqff import kernels

    if kernels.enabled():
        from uqff.kernels.distance import pair_sums

        return pair_sums(a, b)
    return reference_sums(a, b)


def reference_sums(a: F32, b: F32) -> npt.NDArray[np.float64]:
    """The definition of :func:`pair_sums`, in numpy."""
    with np.errstate(all="ignore"):
        difference = b - a
        # Added zeros change no sum.  numpy adds along the slower dimension one row after the other.
        padded = [np.pad(each, (0, -a.size % LANES)).astype(np.float64) for each in (a, b, difference)]
        x, y, d = (each.reshape(-1, LANES) for each in padded)
        lanes = [np.add.reduce(product, axis=0) for product in (x * x, y * y, x * y, d * d)]
        totals = [np.add.accumulate(each)[-1] for each in lanes]
        return np.array([*totals, np.abs(difference).max(initial=0)])


class Measure:
    """Sums up pairs of tiles."""

    def __init__(self) -> None:
        self.count = 0
        self.squares_a = self.squares_b = self.products = self.squares_difference = self.largest = 0.0

    def add(self, a: F32, b: F32) -> None:
        """Add a tile of both weights, flat and of one length."""
        self.count += a.size
        squares_a, squares_b, products, squares_difference, largest = pair_sums(a, b).tolist()
        self.squares_a += squares_a
        self.squares_b += squares_b
        self.products += products
        self.squares_difference += squares_difference
        # max() would drop a NaN.
        self.largest = math.nan if math.isnan(largest) else max(self.largest, largest)

    @classmethod
    def sum(cls, measures: list[Measure]) -> Measure:
        """All in one, added in order."""
        total = cls()
        for each in measures:
            total.count += each.count
            total.squares_a += each.squares_a
            total.squares_b += each.squares_b
            total.products += each.products
            total.squares_difference += each.squares_difference
            total.largest = math.nan if math.isnan(each.largest) else max(total.largest, each.largest)
        return total

    def result(self) -> Distance:
        """The distance over all tiles."""
        if self.count == 0:
            return Distance(0.0, 0.0, 0.0, 1.0)
        rms = math.sqrt(self.squares_difference / self.count)
        norm = math.sqrt(self.squares_a / self.count)
        norms = math.sqrt(self.squares_a) * math.sqrt(self.squares_b)
        zeros = self.squares_a == self.squares_b == 0
        cosine = self.products / norms if norms else (1.0 if zeros else 0.0)
        return Distance(rms, norm, self.largest, max(-1.0, min(1.0, cosine)))


def distance(a: F32 | QuantizedTensor, b: QuantizedTensor) -> Distance:
    """The distance of a record from a plain weight or another record of the same shape.

    Args:
        a: what is taken as true: float32 of the record's shape, C-contiguous; or a record. A plain one
            (:class:`uqff.Unquant`) is widened tile by tile, any other is dequantised as a whole.
        b: what is measured.
    """
    return measured(a, b).result()


def measured(a: F32 | QuantizedTensor, b: QuantizedTensor) -> Measure:
    """The sums that :func:`distance` comes from, same arguments; those of several pairs can be added."""
    import torch

    if isinstance(a, QuantizedTensor):
        # Families are cut differently: one that is dequantised whole goes by the tiles of the other.
        values: Any = a.weight if isinstance(a, Unquant) else a.dequantize()
    else:
        values = a
    pieces = list(tiles(b))
    measures = [Measure() for _ in pieces]

    def measure(start: int, stop: int) -> None:
        largest = max(piece.numel for _, piece in pieces[start:stop])
        scratch, other = empty((largest,), torch.float32), empty((largest,), torch.float32)
        for at in range(start, stop):
            part, piece = pieces[at]
            plain = scratch[: piece.numel]
            piece.dequantize(out=plain.view(piece.shape))
            measures[at].add(_flat(part(values), other), plain.numpy())

    run_ranges(measure, len(pieces))
    return Measure.sum(measures)


def _flat(values: F32 | torch.Tensor, scratch: torch.Tensor) -> F32:
    """A tile as float32 ``[n]``, in the scratch memory if it has to be widened."""
    import torch

    if isinstance(values, np.ndarray):
        return np.ascontiguousarray(values).reshape(-1)
    values = values.contiguous().reshape(-1)
    if values.dtype is not torch.float32:
        values = Unquant.of(values).dequantize(out=scratch[: len(values)])
    flat: F32 = values.numpy()
    return flat


def tiles(record: QuantizedTensor) -> Iterator[tuple[Any, QuantizedTensor]]:
    """A record in pieces of about :data:`TILE` weights.

    Yields:
        A function that takes the piece out of a plain array or tensor of the record's shape, and the piece as a record.
    """
    if isinstance(record, F8Q8):
        yield from _runs_of_blocks(record)
    elif isinstance(record, HQQ) and record.axis == 0:
        yield from _columns_of_groups(record)
    elif isinstance(record, HQQ):
        yield (lambda values: values), record
    else:
        yield from _rows(record)


def _rows(record: QuantizedTensor) -> Iterator[tuple[Any, QuantizedTensor]]:
    columns = record.shape[-1]
    step = max(1, TILE // columns)
    for start in range(0, record.numel // columns, step):
        rows = slice(start, start + step)

        def part(values: Any, rows: slice = rows) -> Any:
            return values.reshape(-1, columns)[rows]

        def cut(tensor: torch.Tensor, rows: slice = rows) -> torch.Tensor:
            return tensor.reshape(-1, tensor.shape[-1])[rows]

        if isinstance(record, GGUF):
            yield part, GGUF(cut(record.data), record.block_type)
        elif isinstance(record, AFQ):
            scales, biases = cut(record.scales), cut(record.biases)
            yield part, AFQ(cut(record.w_q), scales, biases, record.bits, record.group_size)
        elif isinstance(record, FP8):
            yield part, replace(record, weight=cut(record.weight))
        elif isinstance(record, MXFP4):
            yield part, MXFP4(cut(record.blocks), cut(record.scales))
        else:
            assert isinstance(record, Unquant)
            yield part, Unquant(cut(record.data), record.dtype)


def _runs_of_blocks(record: F8Q8) -> Iterator[tuple[Any, QuantizedTensor]]:
    """Blocks run across rows."""
    step = TILE // 32
    for start in range(0, len(record.blocks), step):
        span = slice(32 * start, min(32 * (start + step), record.numel))

        def part(values: Any, span: slice = span) -> Any:
            return values.reshape(-1)[span]

        yield part, F8Q8(record.blocks[start : start + step], (1, span.stop - span.start))


def _columns_of_groups(record: HQQ) -> Iterator[tuple[Any, QuantizedTensor]]:
    """Groups are columns of the weight seen as ``[group_size, N]``."""
    groups = record.numel // record.group_size
    width = record.w_q.shape[-1] // groups
    step = max(1, TILE // record.group_size)
    for start in range(0, groups, step):
        columns = slice(start, min(start + step, groups))

        def part(values: Any, columns: slice = columns) -> Any:
            return values.reshape(record.group_size, -1)[:, columns]

        yield (
            part,
            replace(
                record,
                w_q=record.w_q[:, width * columns.start : width * columns.stop].contiguous(),
                scales=record.scales[:, columns],
                zeros=record.zeros[:, columns],
                weight_shape=(record.group_size, columns.stop - columns.start),
            ),
        )
