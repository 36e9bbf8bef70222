"""A weight before it is quantised: rounded to the load dtype, checked for numbers that are not finite, widened.

Types whose blocks or groups are independent of each other are made run by run, so that of a float16 or bfloat16 weight
no float32 copy exists as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.codes import DType
from uqff.errors import FormatError
from uqff.simd.floats import Floats

__all__ = ["TILE", "Loaded", "by_runs", "rows_of"]

F32: TypeAlias = npt.NDArray[np.float32]

TILE: Final = 1 << 21
"""Weights that are rounded, widened and quantised together; a multiple of all sizes of blocks and groups."""


class Loaded:
    """A weight as a loader sees it: rounded to the load dtype (to nearest, ties to even), checked, widened when needed.

    Attributes:
        weight: the weight as it was given.
        dtype: the load dtype.
        rounded: whether the weight is rounded to it.
        shape: of the weight.
    """

    def __init__(self, weight: Floats, dtype: DType, scratch: F32 | None = None, *, rounded: bool = True) -> None:
        """Nothing is done yet.

        Args:
            weight: the numbers, of any strides.
            dtype: the load dtype: F32, F16 or BF16.
            scratch: memory for :attr:`values`, at least as many elements as the weight has; new memory if None.
            rounded: whether the weight is rounded to the load dtype before it is quantised. One that was computed in
                float32 need not be: numbers that are stored are still rounded, codes and scales come from those given.
        """
        self.weight = weight
        self.dtype = dtype
        self.rounded = rounded
        self.shape = weight.shape
        self._scratch = scratch

    @cached_property
    def plain(self) -> Floats:
        """The weight in its load dtype, C-contiguous; shares memory with the given one if that is both.

        Raises:
            FormatError: a weight is not finite in that dtype; its position is named.
        """
        plain = self.weight.cast(self.dtype, payloads=False)
        _check_finite(plain, 0, self.shape)
        return plain

    @property
    def exact(self) -> Floats:
        """What the numbers of a quantised weight are to be near: :attr:`plain`, or the weight if it is not rounded."""
        return self.plain if self.rounded else Floats(self.values.view(np.uint32), DType.F32)

    @cached_property
    def values(self) -> F32:
        """The weight in its load dtype, if it is rounded, as float32, C-contiguous; shares memory if it is that.

        Raises:
            FormatError: a weight is not finite in the load dtype; its position is named.
        """
        if self._is_float32:
            if self.rounded:
                return self.plain.bits.view(np.float32)
            given = self.weight.cast(DType.F32)
            _check_finite(given, 0, self.shape)
            return given.bits.view(np.float32)
        wide = self._floats(math.prod(self.shape))
        for at in range(0, len(wide), TILE):
            self._widen(at, wide[at : at + TILE])
        return wide.reshape(self.shape)

    def runs(self) -> Iterator[F32]:
        """:attr:`values`, flat, in runs of :data:`TILE` and a rest; each is gone when the next is asked for.

        Raises:
            FormatError: as for :attr:`values`.
        """
        count = math.prod(self.shape)
        if self._is_float32 or "values" in self.__dict__ or count <= TILE:
            yield self.values.reshape(-1)
            return
        wide = self._floats(TILE)
        for at in range(0, count, TILE):
            run = wide[: count - at]
            self._widen(at, run)
            yield run

    @property
    def _is_float32(self) -> bool:
        return self.weight.dtype is DType.F32 and (self.dtype is DType.F32 or not self.rounded)

    def _widen(self, start: int, out: F32) -> None:
        """Write the weights from ``start`` on."""
        if self.dtype is self.weight.dtype:
            run = self.plain.flat[start : start + len(out)]
        else:
            run = self._flat[start : start + len(out)].cast(self.dtype, payloads=False)
            _check_finite(run, start, self.shape)
        run.cast_into(Floats(out.view(np.uint32), DType.F32), payloads=False)

    @cached_property
    def _flat(self) -> Floats:
        return self.weight.flat

    def _floats(self, count: int) -> F32:
        return np.empty(count, np.float32) if self._scratch is None else self._scratch[:count]


def by_runs(
    loaded: Loaded, size: int, quantize: Callable[[F32], tuple[npt.NDArray[Any], ...]]
) -> tuple[npt.NDArray[Any], ...]:
    """Arrays ``[ceil(weights / size), ...]`` out of those that ``quantize`` makes of every run."""
    count = -(-math.prod(loaded.shape) // size)
    whole: tuple[npt.NDArray[Any], ...] | None = None
    at = 0
    for run in loaded.runs():
        parts = quantize(run)
        if len(parts[0]) == count:
            return parts
        if whole is None:
            whole = tuple(np.empty((count, *part.shape[1:]), part.dtype) for part in parts)
        for array, part in zip(whole, parts, strict=True):
            array[at : at + len(part)] = part
        at += len(parts[0])
    assert whole is not None
    return whole


def rows_of(array: npt.NDArray[Any], shape: tuple[int, ...], size: int) -> npt.NDArray[Any]:
    """What is ``[n, m]``, a row for every ``size`` weights, as ``[..., in / size * m]``."""
    *outer, columns = shape
    return array.reshape(*outer, columns // size * array.shape[1])


def _check_finite(run: Floats, start: int, shape: tuple[int, ...]) -> None:
    """Refuse a run of weights that begins at element ``start`` of a weight of that shape."""
    if run.is_finite:
        return
    first = run.first_not_finite()
    position = tuple(int(i) for i in np.unravel_index(start + first, shape))
    value = run.flat[first : first + 1].cast(DType.F32).bits.view(np.float32)[0]
    raise FormatError("weight is not finite", field="weight", expected="finite numbers", got=f"{value} at {position}")
