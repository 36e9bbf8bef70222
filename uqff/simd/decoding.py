"""Decoders, and the kernels that are made of them: to write a weight's numbers down, or to multiply with them at once.

A decoder decodes items of a weight (blocks, groups, numbers) to vectors of 32 numbers, and leaves each with
:func:`uqff.simd.output.put_pair` in some place:

* bytes of memory: the kernel dequantises;
* :data:`Sums`: they are multiplied with a row of activations and added up, and never leave the registers;
* :data:`Tile`: they wait in the first-level cache for several rows of activations.

Where one row of activations is all there is, many decoders have a faster way beside: see :meth:`Decoder.by_row`.

A kernel is compiled when it is first needed.
"""

# numba infers the types of what it compiles; annotations would neither be read by it nor checked.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from numba import types

from uqff.simd.bits import bits_of
from uqff.simd.chain import Task
from uqff.simd.compiling import inline, kernel, overload
from uqff.simd.cpu import HAS_PERMUTE
from uqff.simd.crew import Shared
from uqff.simd.load_store import load_f32, store_f32
from uqff.simd.output import F32, Bytes, over, put_pair
from uqff.simd.scratch import scratch
from uqff.simd.vectors import LANES, multiply_add, splat, total

__all__ = ["CHUNK", "GRAIN", "PAIR", "PITCH", "ROWS", "WIDTH", "Decoder", "Decoding", "add_part"]

WIDTH: Final = 2 * LANES
"""Numbers that a decoder leaves at a time."""

ROWS: Final = 12
"""Rows of a weight in a tile, taken in threes."""
CHUNK: Final = 512
"""Numbers of each row in a tile, which takes 24 of the 32 KiB that most CPUs have; a multiple of all items."""
PITCH: Final = CHUNK + WIDTH
"""From a row of a tile to the next: the last chunk of a row is longer, if less than a vector would be left."""
TILE: Final = ROWS * PITCH
PAIR: Final = 2
"""Rows of activations that are multiplied together."""
QUADS: Final = HAS_PERMUTE
"""Whether twice as many are, where there are: AVX-512 has registers for twelve sums, and six at once leave it idle."""

GRAIN: Final = 1 << 18
"""Products of two numbers that a range has at least: some 30 µs, about what a second thread costs."""

Floats: TypeAlias = npt.NDArray[np.float32]

_ZERO, _ONE = np.float32(0), np.float32(1)
_SMALL, _LARGE = np.float32(2.0**-60).view(np.int32), np.float32(2.0**90).view(np.int32)


class Decoder:
    """The kernels of a decoder.

    Attributes:
        decode: ``(parts, out, form, lo, hi)``: decode items ``[lo, hi)``.  ``parts`` is a tuple of arrays and numbers,
            as the family has it; number ``at`` of the whole weight, and 31 more, go to ``put_pair(out, at, ...)``.
        order: of the activations that :attr:`multiply_row` takes; None if there is none. See :meth:`by_row`.
        few: up to so many rows of activations it is faster to multiply with one after the other.
    """

    def __init__(self, decode: Callable[..., Any]) -> None:
        """Nothing is compiled yet."""
        self.decode = inline(decode)
        self.order: npt.NDArray[np.int64] | None = None
        self.few = 1
        self._row: Callable[..., Any] | None = None
        self._name = f"{decode.__module__.split('.')[-2]}{decode.__qualname__}"

    def by_row(self, order: npt.NDArray[np.int64], few: int = 1) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Give it a faster product with one row of activations, of codes in the order that is easiest.

        What it decorates is ``(parts, x, lo, hi) -> float32``: the product of items ``[lo, hi)``, a row of the weight,
        with activations in another order.

        Args:
            order: of as many activations as it takes at a time; ``x[i]`` is activation ``order[i]`` of them.
            few: see :attr:`few`.
        """

        def keep(row: Callable[..., Any]) -> Callable[..., Any]:
            self.order, self.few, self._row = order, few, inline(row)
            return row

        return keep

    def takes(self, columns: int) -> bool:
        """Whether :attr:`multiply_row` serves for rows of so many numbers."""
        return self.order is not None and columns >= len(self.order)

    def _kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        function.__qualname__ = f"{self._name}.{function.__name__}"
        return kernel(function)

    @cached_property
    def dequantize(self) -> Callable[..., None]:
        """``(parts, out, form, lo, hi)``: items ``[lo, hi)`` into the bytes of a result."""
        decode = self.decode

        def dequantize(parts, out, form, lo, hi):
            decode(parts, out, form, lo, hi)

        return self._kernel(dequantize)

    def _shared(self, function: Callable[..., Any]) -> Shared:
        function.__qualname__ = f"{self._name}.{function.__name__}"
        return Shared(function)

    @cached_property
    def multiply(self) -> Shared:
        """``(parts, x, y, first, items, planes, stride, lo, hi)``: numbers of the product with one row of activations.

        ``x`` is ``[1, columns]``, a multiple of :data:`WIDTH`, and a row of the weight as many numbers, or ``items``
        items.  ``y`` is ``[1, rows]``, of the rows of the weight from ``first`` on; which of them, says
        :meth:`Decoding.multiply`.
        """
        decode = self.decode

        def multiply(parts, x, y, first, items, planes, stride, lo, hi):
            sums, columns, given, made = scratch(WIDTH, np.float32), x.shape[1], x[0], y[0]
            for place in range(lo, hi):
                row = place % planes * stride + place // planes
                if row < len(made):
                    store_f32(sums, 0, splat(_ZERO))
                    store_f32(sums, LANES, splat(_ZERO))
                    at = first + row
                    decode(parts, (given, sums, at * columns), F32, at * items, (at + 1) * items)
                    made[row] = total(load_f32(sums, 0) + load_f32(sums, LANES))

        return self._shared(multiply)

    @cached_property
    def multiply_row(self) -> Shared:
        """:attr:`multiply` where there is :attr:`order`; ``x`` is in that order."""
        product: Any = self._row

        def multiply_row(parts, x, y, first, items, planes, stride, lo, hi):
            given, made = x[0], y[0]
            for place in range(lo, hi):
                row = place % planes * stride + place // planes
                if row < len(made):
                    at = first + row
                    made[row] = product(parts, given, at * items, (at + 1) * items)

        return self._shared(multiply_row)

    @cached_property
    def multiply_many(self) -> Shared:
        """The same with several rows of activations, of any number of ``columns`` from :data:`WIDTH` on.

        ``x`` has zeros behind them, up to a multiple of :data:`LANES`; ``columns`` comes before ``items``.
        """
        decode = self.decode

        def multiply_many(parts, x, y, first, columns, items, planes, stride, lo, hi):
            size, rows, tile = columns // items, scratch(ROWS, np.int64), scratch(TILE, np.float32)
            begin = lo
            while begin < hi:
                count = 0
                while begin < hi and count < ROWS:
                    row = begin % planes * stride + begin // planes
                    if row < y.shape[1]:
                        rows[count] = row
                        count += 1
                    begin += 1
                start = 0
                while start < columns:
                    width = columns - start
                    if width >= PITCH:
                        width = CHUNK
                    for i in range(count):
                        at = (first + rows[i]) * columns + start
                        item = (first + rows[i]) * items + start // size
                        decode(parts, (tile, i * PITCH - at), F32, item, item + width // size)
                        for j in range(width, -(-width // LANES) * LANES):
                            tile[i * PITCH + j] = _ZERO
                    row = 0
                    while row < len(x):
                        four = QUADS and len(x) - row > PAIR
                        for i in range(0, count, 3):
                            if four:
                                _multiply_tile_by_4(tile, rows, i, min(3, count - i), x, row, start, width, y)
                            else:
                                _multiply_tile(tile, rows, i, min(3, count - i), x, row, start, width, y)
                        row += 2 * PAIR if four else PAIR
                    start += width

        return self._shared(multiply_many)


class Decoding(NamedTuple):
    """How a weight is decoded.

    Attributes:
        decoder: of its items.
        parts: what the decoder takes them from.
        items: how many there are.
        size: numbers of each.
        planes: so many rows share their bytes, and are taken one after another; 1 if none do.
        stride: rows from one of them to the next.
        alone: ``(x, y)``: the product of one row of activations with the whole weight; None if that is for the decoder.
        few: see :attr:`Decoder.few`; of ``alone``.
    """

    decoder: Decoder
    parts: tuple[Any, ...]
    items: int
    size: int
    planes: int = 1
    stride: int = 1
    alone: Callable[[Floats, Floats], Task] | None = None
    few: int = 1

    def dequantize(self, out: Bytes, form: int) -> None:
        """Write all numbers to the bytes of a result."""
        kernel = self.decoder.dequantize
        over(self.items, self.size, lambda lo, hi: kernel(self.parts, out, form, lo, hi))

    def fits(self, columns: int) -> bool:
        """Whether :meth:`multiply` works for a weight whose rows have so many numbers."""
        return columns >= WIDTH and columns % self.size == 0

    def stages(self, x: Floats, y: Floats, fits: npt.NDArray[np.int64]) -> list[list[Task]]:
        """:meth:`multiply` of one row with the whole weight, as stages of a chain; none where no kernel is all of it.

        Args:
            x: where the activations are going to be, ``[1, columns]``.
            y: where the product goes, ``[1, rows]``.
            fits: ``[1]``: 0 after activations that these stages are not exact for.
        """
        columns, order = x.shape[1], self.decoder.order
        if self.alone is not None:
            return [[self.alone(x, y)]]
        if columns % WIDTH or (order is not None and not self.decoder.takes(columns)):
            return []
        if order is None:
            return [[self._task(self.decoder.multiply, x, y, columns)]]
        given = np.empty((1, self._ordered(columns)), np.float32)
        return [[Task(_ARRANGE, (x, order, given, fits))], [self._task(self.decoder.multiply_row, given, y, columns)]]

    def _task(
        self, shared: Shared, given: Floats, y: Floats, columns: int, first: int = 0, *, whole: bool = True
    ) -> Task:
        """The product of one row, by :attr:`Decoder.multiply` or :attr:`Decoder.multiply_row`.

        Args:
            shared: which.
            given: the activations that it takes.
            y: see :meth:`multiply`, and so are the others.
            columns: numbers of a row of the weight.
            first: row to begin with.
            whole: whether these are all rows.
        """
        planes = self.planes if whole else 1
        stride = self.stride if planes > 1 else y.shape[1]
        grain = -(-GRAIN // (columns * planes)) * planes
        return Task(shared, (self.parts, given, y, first, columns // self.size, planes, stride), planes * stride, grain)

    def _ordered(self, columns: int) -> int:
        """Activations of a row in an order, and what fills up the last of them."""
        order = self.decoder.order
        assert order is not None
        return -(-columns // len(order)) * len(order)

    def multiply(self, x: Floats, y: Floats, first: int = 0, *, whole: bool = True) -> None:
        """Multiply with rows of the weight: ``y = x Wᵀ``, added up in float32.

        Args:
            x: ``[batch, columns]``.
            y: where the product goes, ``[batch, rows]``.
            first: row of the weight to begin with.
            whole: whether these are all rows of the weight.
        """
        few = self.decoder.few if self.alone is None else self.few if whole else 1
        if 1 < len(x) <= few:
            for i in range(len(x)):
                self.multiply(x[i : i + 1], y[i : i + 1], first, whole=whole)
            return
        if self.alone is not None and whole and len(x) == 1:
            self.alone(x, y)()
            return
        columns, rows, parts = x.shape[1], y.shape[1], self.parts
        by_row = self._by_row(x)
        if by_row is not None:
            self._task(*by_row, y, columns, first, whole=whole)()
            return
        items, planes = columns // self.size, self.planes if whole else 1
        stride = self.stride if planes > 1 else rows
        if columns % LANES:
            padded = np.zeros((len(x), -(-columns // LANES) * LANES), np.float32)
            padded[:, :columns] = x
            x = padded
        grain = -(-max(GRAIN // (columns * len(x)), 1) // ROWS) * ROWS
        many = self.decoder.multiply_many
        many((parts, x, y, first, columns, items, planes, stride), planes * stride, grain=grain)

    def _by_row(self, x: Floats) -> tuple[Shared, Floats] | None:
        """What multiplies with one row of activations, and what it takes for them; None if that is for many rows."""
        decoder, order, columns = self.decoder, self.decoder.order, x.shape[1]
        if len(x) != 1 or columns % WIDTH or self.alone is not None:
            return None
        if order is None:
            return decoder.multiply, x
        if not decoder.takes(columns):
            return None
        given = np.empty((1, self._ordered(columns)), np.float32)
        return (decoder.multiply_row, given) if arrange(x[0], order, given[0]) else None


@kernel
def arrange(x, order, out):
    """Activations in another order; whether products by rows are exact with them.

    Where a row is no multiple of the order, the last ones of it are taken, with zeros for those that were before.

    They are if activations are neither huge nor tiny, as codes are multiplied with powers of two that are taken back
    later, up to 2**28 and down to 2**-8.
    """
    padded = len(out)
    n, size, top = len(x), len(order), np.int32(0)
    for i in range(n):
        top = max(top, np.int32(bits_of(x[i])) & np.int32(0x7FFFFFFF))
    if top != 0 and not _SMALL <= top < _LARGE:
        return False
    for start in range(0, n - size + 1, size):
        for i in range(size):
            out[start + i] = x[start + order[i]]
    for i in range(padded - size if padded > n else padded, padded):
        at = n - padded + i // size * size + order[i % size]
        out[i] = x[at] if at >= padded - size else _ZERO
    return True


def _arrange_row(x, order, out, fits, lo, hi):
    if lo < hi:
        fits[0] = arrange(x[0], order, out[0])


_arrange_row.__qualname__ = "arrange_row"
_ARRANGE = Shared(_arrange_row)


@inline
def _multiply_tile(tile, rows, i, known, x, row, start, width, y):
    """Three rows of a tile, or those that there are, with two rows of activations, or the one that there is."""
    other = min(row + 1, len(x) - 1)
    a, b, c = i * PITCH, (i + min(1, known - 1)) * PITCH, (i + min(2, known - 1)) * PITCH
    a0, a1 = splat(_ZERO), splat(_ZERO)
    b0, b1 = splat(_ZERO), splat(_ZERO)
    c0, c1 = splat(_ZERO), splat(_ZERO)
    x0, x1 = x[row], x[other]
    for j in range(0, width, LANES):
        u, v = load_f32(x0, start + j), load_f32(x1, start + j)
        w = load_f32(tile, a + j)
        a0, a1 = multiply_add(w, u, a0), multiply_add(w, v, a1)
        w = load_f32(tile, b + j)
        b0, b1 = multiply_add(w, u, b0), multiply_add(w, v, b1)
        w = load_f32(tile, c + j)
        c0, c1 = multiply_add(w, u, c0), multiply_add(w, v, c1)
    _add_three(y[row], rows, i, known, a0, b0, c0, start)
    if other > row:
        _add_three(y[other], rows, i, known, a1, b1, c1, start)


@inline
def _multiply_tile_by_4(tile, rows, i, known, x, row, start, width, y):
    """:func:`_multiply_tile` with four rows of activations, or the three that there are: the same bits."""
    last = len(x) - 1
    fourth = min(row + 3, last)
    a, b, c = i * PITCH, (i + min(1, known - 1)) * PITCH, (i + min(2, known - 1)) * PITCH
    a0, a1, a2, a3 = splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO)
    b0, b1, b2, b3 = splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO)
    c0, c1, c2, c3 = splat(_ZERO), splat(_ZERO), splat(_ZERO), splat(_ZERO)
    x0, x1, x2, x3 = x[row], x[row + 1], x[row + 2], x[fourth]
    for j in range(0, width, LANES):
        p, q = load_f32(x0, start + j), load_f32(x1, start + j)
        r, s = load_f32(x2, start + j), load_f32(x3, start + j)
        w = load_f32(tile, a + j)
        a0, a1, a2, a3 = multiply_add(w, p, a0), multiply_add(w, q, a1), multiply_add(w, r, a2), multiply_add(w, s, a3)
        w = load_f32(tile, b + j)
        b0, b1, b2, b3 = multiply_add(w, p, b0), multiply_add(w, q, b1), multiply_add(w, r, b2), multiply_add(w, s, b3)
        w = load_f32(tile, c + j)
        c0, c1, c2, c3 = multiply_add(w, p, c0), multiply_add(w, q, c1), multiply_add(w, r, c2), multiply_add(w, s, c3)
    _add_three(y[row], rows, i, known, a0, b0, c0, start)
    _add_three(y[row + 1], rows, i, known, a1, b1, c1, start)
    _add_three(y[row + 2], rows, i, known, a2, b2, c2, start)
    if fourth == row + 3:
        _add_three(y[fourth], rows, i, known, a3, b3, c3, start)


@inline
def _add_three(y, rows, i, known, a, b, c, start):
    """The sums of parts of three rows of the weight, or those that there are."""
    add_part(y, rows[i], total(a), start)
    if known > 1:
        add_part(y, rows[i + 1], total(b), start)
    if known > 2:
        add_part(y, rows[i + 2], total(c), start)


@inline
def add_part(y, to, sum, start):
    """The sum of a part of a row of the weight, which begins there, to a number of the product."""
    y[to] = sum if start == 0 else y[to] + sum


@overload(put_pair)
def _multiply_pair(out: Any, at: Any, form: Any, x: Any, y: Any) -> Any:
    """Into ``(row of x, sums, first number of the row)``."""

    def multiply(out: Any, at: Any, form: Any, x: Any, y: Any) -> Any:
        row, sums, start = out
        store_f32(sums, 0, multiply_add(x, load_f32(row, at - start), load_f32(sums, 0)))
        store_f32(sums, LANES, multiply_add(y, load_f32(row, at - start + LANES), load_f32(sums, LANES)))

    return multiply if isinstance(out, types.BaseTuple) and len(out) == 3 else None


@overload(put_pair)
def _tile_pair(out: Any, at: Any, form: Any, x: Any, y: Any) -> Any:
    """Into ``(tile, where number 0 of the weight would be)``."""

    def store(out: Any, at: Any, form: Any, x: Any, y: Any) -> Any:
        tile, zero = out
        store_f32(tile, at + zero, x)
        store_f32(tile, at + zero + LANES, y)

    return store if isinstance(out, types.BaseTuple) and len(out) == 2 else None
