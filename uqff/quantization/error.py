"""How far two weights are from each other, measured tile by tile: neither is dequantised as a whole.

A tile is dequantised into a cache and compared there; the sums are defined to the last bit, whatever the threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.codes import DType
from uqff.families.base import QuantizedTensor
from uqff.families.out import KERNEL_DTYPES
from uqff.simd.floats import Floats
from uqff.simd.memory import aligned_bytes
from uqff.simd.threads import run_ranges

__all__ = ["UNMEASURED", "Distance", "Measure", "distance", "measured"]

F32: TypeAlias = npt.NDArray[np.float32]

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
    from uqff import simd

    if simd.enabled():
        from uqff.quantization.error_cpu import pair_sums

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


@dataclass
class Measure:
    """Sums up pairs of tiles.

    Attributes:
        count: of weights.
        squares_a: sum of a²; this and what follows as :func:`pair_sums` gives it.
        squares_b: sum of b².
        products: sum of a·b.
        squares_difference: sum of (b - a)².
        largest: largest magnitude of b - a.
    """

    count: int = 0
    squares_a: float = 0.0
    squares_b: float = 0.0
    products: float = 0.0
    squares_difference: float = 0.0
    largest: float = 0.0

    def add(self, a: F32, b: F32) -> None:
        """Add a tile of both weights, flat and of one length."""
        self._add(Measure(a.size, *pair_sums(a, b).tolist()))

    @classmethod
    def sum(cls, measures: list[Measure]) -> Measure:
        """All in one, added in order."""
        total = cls()
        for each in measures:
            total._add(each)
        return total

    def _add(self, other: Measure) -> None:
        self.count += other.count
        self.squares_a += other.squares_a
        self.squares_b += other.squares_b
        self.products += other.products
        self.squares_difference += other.squares_difference
        # max() would drop a NaN.
        self.largest = math.nan if math.isnan(other.largest) else max(self.largest, other.largest)

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


def distance(a: F32 | Floats | QuantizedTensor, b: QuantizedTensor) -> Distance:
    """The distance of a record from a plain weight or another record of the same shape.

    Args:
        a: what is taken as true: float32 or :class:`~uqff.simd.floats.Floats` of the record's shape, C-contiguous,
            or a record. Plain numbers are widened tile by tile, all others dequantised whole.
        b: what is measured.
    """
    return measured(a, b).result()


def measured(a: F32 | Floats | QuantizedTensor, b: QuantizedTensor) -> Measure:
    """The sums that :func:`distance` comes from, same arguments; those of several pairs can be added.

    Does not import torch if ``a`` is plain.
    """
    values = _plain(a)
    pieces = list(b.tiles())
    measures = [Measure() for _ in pieces]

    def measure(start: int, stop: int) -> None:
        largest = max(piece.numel for _, piece in pieces[start:stop])
        scratch, other = (aligned_bytes(4 * largest).view(np.float32) for _ in range(2))
        for at in range(start, stop):
            part, piece = pieces[at]
            made = scratch[: piece.numel]
            piece.write_numbers(made.view(np.uint8))
            measures[at].add(_flat(Floats(part(values.bits), values.dtype), other), made)

    run_ranges(measure, len(pieces))
    return Measure.sum(measures)


def _plain(a: F32 | Floats | QuantizedTensor) -> Floats:
    if isinstance(a, Floats):
        return a
    if isinstance(a, QuantizedTensor):
        plain = a.plain
        if plain is not None and plain.dtype in KERNEL_DTYPES:
            return Floats.of_bytes(plain.array(), plain.dtype, plain.shape)
        # Families are cut differently: one that is dequantised whole goes by the tiles of the other.
        return Floats.of_bytes(a.numbers().array(), DType.F32, a.shape)
    return Floats(np.ascontiguousarray(a).view(np.uint32), DType.F32)


def _flat(tile: Floats, scratch: F32) -> F32:
    """A tile as float32 ``[n]``, in the scratch memory if it has to be widened."""
    flat = tile.flat
    if flat.dtype is DType.F32:
        values: F32 = flat.bits.view(np.float32)
        return values
    wide = scratch[: len(flat.bits)]
    flat.cast_into(Floats(wide.view(np.uint32), DType.F32), payloads=False)
    return wide
