"""HQQ: half-quadratic quantisation; groups in columns (axis 0) or rows (axis 1), a scale and a zero per group.

::

    offset  0            4       5          6
            version u32  type=2  bias_flag  R w_q  R scales  R zeros  u32 ndim  u32 × ndim shape  u8 bits
            u32 group_size  u8 axis  u32 optimization_steps  u8 round_zeros  u8 channel_wise  [R bias]

The flattened weight is a matrix M: ``[group_size, N]`` for axis 0 (a group is a column), ``[N, group_size]`` for axis 1
(a group is a row); N = elements / group_size.  M is packed along its rows: the packed matrix has ``rows/p`` rows, and
row r of it holds the rows ``r, r + rows/p, ...`` of M, the first of them in the highest bits.

::

    8 bit  U8    0 0 0 0 0 0 0 0
    4 bit  U8    0 0 0 0 1 1 1 1                   digit: which p-th part of the rows the bits belong to
    2 bit  U8    0 0 1 1 2 2 3 3
    1 bit  U8    0 1 2 3 4 5 6 7
    3 bit  I32   - - 0 0 0 1 1 1 2 2 2 ... 9 9 9   rows padded with zero rows to a multiple of 10

Dequantise: ``(q - zero) * scale``.  The engine's CPU and CUDA paths know axis 0 only, and fail on 3-bit padding.

Authority: mistral.rs, ``mistralrs-quant/src/hqq/mod.rs`` (``bitpack_type``, ``dequantize``, ``serialize_with_bias``);
packing: mobiusml/hqq, ``hqq/core/bitpack.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.codes import DType, Family, Version
from uqff.families.base import PayloadProblem, QuantizedTensor, not_finite, runs
from uqff.families.biases import BiasRule
from uqff.families.fields import bytes_part, stored_part, tensor_fields
from uqff.families.parts import joined, lazily_typed, own, picked, typed
from uqff.families.stacking import check_shared
from uqff.numerics.glibc import expf, logf
from uqff.numerics.packing import pack_planes, round_half_away
from uqff.schema.bricks import U8, U32, Checked, Derived, Dims, Scope, Violation
from uqff.schema.entries import Entries, Entry
from uqff.schema.header import BIAS_FLAG, blob_layout
from uqff.schema.layout import Layout
from uqff.schema.tensor import TENSOR

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

__all__ = ["HQQ", "quantize"]

FloatArray: TypeAlias = npt.NDArray[np.float32]

CODES_PER_WORD = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}
"""Codes in one element of ``w_q``, by bits."""
SCALE_DTYPES = (DType.F32, DType.F16, DType.BF16)


def word_dtype(bits: int) -> DType:
    """The dtype of ``w_q``: 3-bit codes come ten to an I32, all others fill a U8."""
    return DType.I32 if bits == 3 else DType.U8


def _decode_group_size(number: int) -> int:
    if not number:
        raise Violation("value out of range", expected="at least 1", got=number)
    return number


@lazily_typed("scales", "zeros")
@dataclass(frozen=True, eq=False, repr=False)
class HQQ(QuantizedTensor):
    """A weight of half-quadratic groups; M is the matrix ``[rows, columns]`` of the module docstring.

    Attributes:
        w_q: uint8 ``[⌈rows/p⌉, columns]``, p codes a byte; for 3 bits bytes of I32s, ``[⌈rows/10⌉, 4·columns]``.
        scales: float32 (float16, bfloat16) ``[1, N]`` for axis 0, ``[N, 1]`` for axis 1.
        zeros: same dtype and shape as ``scales``.
        weight_shape: logical dimensions.
        bits: 1, 2, 3, 4 or 8.
        group_size: weights per group.
        axis: 0 (groups are columns) or 1 (groups are rows).
        optimization_steps: of the solver; None if not stated (stored as 0; the engine then takes 20).
        round_zeros: whether the zeros were rounded.
        channel_wise: whether groups were used at all.
    """

    w_q: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    weight_shape: tuple[int, ...]
    bits: int
    group_size: int
    axis: int = 0
    optimization_steps: int | None = None
    round_zeros: bool = False
    channel_wise: bool = True

    family: ClassVar[Family] = Family.HQQ
    LAYOUT: ClassVar[Layout] = blob_layout(
        Family.HQQ,
        "bias_flag" / BIAS_FLAG * "1 if a bias follows at the end, else 0",
        "w_q" / TENSOR * "the packed codes, U8, for 3 bits I32",
        "scales" / TENSOR * "scale of each group, `[1, N]` (axis 0) or `[N, 1]` (axis 1)",
        "zeros" / TENSOR * "zero point of each group, like `scales`",
        "ndim" / Derived(U32, lambda b: len(b["shape"])) * "number of dimensions of the weight",
        "shape" / Dims("ndim") * "logical dimensions in elements, outermost first",
        "bits" / Checked.choice(U8, *CODES_PER_WORD) * "bits per code: 1, 2, 3, 4 or 8",
        "group_size" / Checked(U32, _decode_group_size, int) * "weights per group",
        "axis" / Checked.choice(U8, 0, 1) * "0: groups are columns of M; 1: rows",
        "optimization_steps" / U32 * "steps of the solver; 0 stands for none stated",
        "round_zeros" / Checked.choice(U8, 0, 1) * "1 if the zeros were rounded",
        "channel_wise" / Checked.choice(U8, 0, 1) * "1 if quantised in groups",
    )

    ENTRIES: ClassVar[Entries] = Entries(
        LAYOUT,
        Entry("weight", "w_q", (DType.U8, DType.I32), ("rows", "columns")),
        Entry("weight.scales", "scales", SCALE_DTYPES, ("1", "N")),
        Entry("weight.zeros", "zeros", SCALE_DTYPES, ("1", "N"), "zero point of each group, like `weight.scales`"),
        Entry("weight.shape", "shape", (DType.U32,), ("ndim",)),
        Entry("weight.bits", "bits", (DType.U8,)),
        Entry("weight.group_size", "group_size", (DType.U32,)),
        Entry("weight.axis", "axis", (DType.U8,)),
        Entry("weight.optimization_steps", "optimization_steps", (DType.U32,)),
        Entry("weight.round_zeros", "round_zeros", (DType.U8,)),
        Entry("weight.channel_wise", "channel_wise", (DType.U8,)),
        stacked_before=Version(1, 2, 0),
    )
    BIAS: ClassVar[BiasRule] = BiasRule(DType.F32, {0: DType.F32, 1: DType.F32})

    @property
    def kind(self) -> str:
        """``hqq1``, ``hqq2``, ``hqq3``, ``hqq4`` or ``hqq8``."""
        return f"hqq{self.bits}"

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)`` or ``(experts, out, in)``."""
        return self.weight_shape

    @classmethod
    def parse(cls, blob: Scope) -> Self:
        """See :meth:`QuantizedTensor.parse`."""
        return cls(
            bytes_part(blob["w_q"]),
            stored_part(blob["scales"]),  # type: ignore[arg-type]
            stored_part(blob["zeros"]),  # type: ignore[arg-type]
            blob["shape"],
            blob["bits"],
            blob["group_size"],
            blob["axis"],
            blob["optimization_steps"] or None,
            bool(blob["round_zeros"]),
            bool(blob["channel_wise"]),
        )

    def build(self) -> dict[str, Any]:
        """See :meth:`QuantizedTensor.build`."""
        dtype = word_dtype(self.bits)
        *rows, row_bytes = self.w_q.shape
        return {
            "w_q": tensor_fields(self.w_q, name="w_q", dtype=dtype, shape=(*rows, row_bytes // dtype.itemsize)),
            "scales": tensor_fields(self._parts()["scales"], name="scales"),
            "zeros": tensor_fields(self._parts()["zeros"], name="zeros"),
            "shape": self.weight_shape,
            "bits": self.bits,
            "group_size": self.group_size,
            "axis": self.axis,
            "optimization_steps": self.optimization_steps or 0,
            "round_zeros": int(self.round_zeros),
            "channel_wise": int(self.channel_wise),
        }

    @staticmethod
    def kind_of(blob: Scope) -> str:
        """See :meth:`QuantizedTensor.kind_of`."""
        return f"hqq{blob['bits']}"

    @staticmethod
    def shape_of(blob: Scope) -> tuple[int, ...]:
        """See :meth:`QuantizedTensor.shape_of`."""
        shape: tuple[int, ...] = blob["shape"]
        return shape

    @staticmethod
    def validate(blob: Scope) -> None:
        """The packed matrix and the groups fit the shape."""
        w_q, scales, zeros = blob["w_q"], blob["scales"], blob["zeros"]
        bits, group_size, axis = blob["bits"], blob["group_size"], blob["axis"]
        dtype = word_dtype(bits)
        if w_q["dtype"] is not dtype:
            raise Violation("wrong dtype", field="w_q.dtype", expected=dtype.name, got=w_q["dtype"].name)
        if scales["dtype"] not in SCALE_DTYPES:
            allowed = ", ".join(d.name for d in SCALE_DTYPES)
            raise Violation("wrong dtype", field="scales.dtype", expected=allowed, got=scales["dtype"].name)
        if zeros["dtype"] is not scales["dtype"]:
            raise Violation("wrong dtype", field="zeros.dtype", expected=scales["dtype"].name, got=zeros["dtype"].name)
        if not blob["shape"]:
            raise Violation("weight without dimensions", field="ndim", expected="at least 1", got=0)
        numel = math.prod(blob["shape"])
        if numel % group_size:
            raise Violation(
                "weight is not whole groups", field="group_size", expected=f"a divisor of {numel}", got=group_size
            )
        groups = numel // group_size
        rows, columns = (group_size, groups) if axis == 0 else (groups, group_size)
        per_word = CODES_PER_WORD[bits]
        if bits != 3 and rows % per_word:
            raise Violation(
                "matrix rows do not pack", field="w_q.shape", expected=f"rows in multiples of {per_word}", got=rows
            )
        expected_scales = (1, groups) if axis == 0 else (groups, 1)
        for name, part, expected in (
            ("w_q", w_q, (-(-rows // per_word), columns)),
            ("scales", scales, expected_scales),
            ("zeros", zeros, expected_scales),
        ):
            if part["shape"] != expected:
                raise Violation(
                    "shape does not fit weight and groups",
                    field=f"{name}.shape",
                    expected=list(expected),
                    got=list(part["shape"]),
                )

    @staticmethod
    def check_payload(blob: Scope) -> Iterator[PayloadProblem]:
        """Scales and zeros are finite."""
        yield from not_finite(blob["scales"], "scales.data")
        yield from not_finite(blob["zeros"], "zeros.data")

    def _dequantize(self) -> torch.Tensor:
        import torch

        codes = self._matrix().to(torch.float32)
        return ((codes - self.zeros.to(torch.float32)) * self.scales.to(torch.float32)).reshape(self.shape)

    # A slice is one range in each run of the flattened weight (`runs`). It is an HQQ tensor again if its elements can
    # be laid out in a matrix M' in which each group has one scale and whose rows pack:
    #
    #   axis 0: M' is as wide as the pattern of columns repeats. Runs that fill rows of M whole, or ranges that skip
    #           whole rows, leave the columns as they are; else the pattern repeats when runs begin in the same column
    #           again. Narrower matrices would put two columns into one, so this one decides.
    #   axis 1: groups are cut into equal parts none of which crosses the edge of a group, run or range.

    def _layout(self, dim: int, start: int, length: int) -> tuple[int, int]:
        """Group size and number of groups of a slice; whether it packs is not asked."""
        count, run, step = runs(self.shape, dim)
        size, groups = length * step, self.numel // self.group_size
        if self.axis == 0:
            columns = groups if (run - size) % groups == 0 else groups // math.gcd(groups, run) * size
            return count * size // columns, columns
        part = math.gcd(self.group_size, start * step, size, run if count > 1 else 0)
        while part % 2 == 0 and not self._packs(count * size // part):
            part //= 2
        return part, count * size // part

    def _packs(self, rows: int) -> bool:
        return self.bits == 3 or rows % CODES_PER_WORD[self.bits] == 0

    def alignment(self, dim: int) -> int:
        """What makes the packed rows of the slice whole; 1 where they always are, as for inputs on axis 0."""
        axis = self._dim(dim)
        count, run, step = runs(self.shape, axis)
        per_word = 1 if self.bits == 3 else CODES_PER_WORD[self.bits]
        unit = per_word // math.gcd(per_word, count)
        if self.axis == 0:
            groups = self.numel // self.group_size
            if self._packs(count * math.gcd(groups, run) // groups):
                return 1
            if run % groups:
                return self.shape[axis]
            unit *= groups
        return unit // math.gcd(unit, step)

    def can_narrow(self, dim: int, start: int, length: int) -> bool:
        """See :meth:`QuantizedTensor.can_narrow`; true of every slice that is exactly an HQQ tensor."""
        size, groups = self._layout(self._dim(dim), start, length)
        return self._packs(size if self.axis == 0 else groups)

    def _narrow(self, dim: int, start: int, length: int) -> Self:
        size, groups = self._layout(dim, start, length)
        origin = self._origin(dim, start, length, size, groups)
        return replace(
            self,
            w_q=self._narrow_codes(dim, start, length, size, groups),
            scales=picked(self._parts()["scales"], origin),  # type: ignore[arg-type]
            zeros=picked(self._parts()["zeros"], origin),  # type: ignore[arg-type]
            weight_shape=(*self.shape[:dim], length, *self.shape[dim + 1 :]),
            group_size=size,
        )

    def _origin(self, dim: int, start: int, length: int, size: int, groups: int) -> torch.Tensor:
        """The group of this tensor that each group of a slice comes from, int64 ``[groups]``."""
        import torch

        _, run, step = runs(self.shape, dim)
        first = torch.arange(groups) * (1 if self.axis == 0 else size)
        flat = first // (length * step) * run + start * step + first % (length * step)
        return flat % (self.numel // self.group_size) if self.axis == 0 else flat // self.group_size

    def _narrow_codes(self, dim: int, start: int, length: int, size: int, groups: int) -> torch.Tensor:
        import torch

        count, run, step = runs(self.shape, dim)
        begin, n, columns = start * step, length * step, self._columns
        if self.bits == 8:  # not packed: the bytes are the flattened weight
            codes = own(self.w_q.reshape(count, run)[:, begin : begin + n].contiguous())
            return codes.view((size, groups) if self.axis == 0 else (groups, size))
        if self.axis == 0 and columns % run == 0:  # whole runs in each row: a range of each, as packed
            width = self.w_q.shape[1] // columns
            packed = self.w_q.view(len(self.w_q), columns // run, run * width)
            return packed[:, :, begin * width : (begin + n) * width].reshape(len(self.w_q), -1)
        words = typed(self.w_q, word_dtype(self.bits))
        ranges = [self._codes(words, i * run + begin, i * run + begin + n) for i in range(count)]
        return pack_rows(torch.cat(ranges).view((size, groups) if self.axis == 0 else (groups, size)), self.bits)

    @property
    def _columns(self) -> int:
        return self.numel // self.group_size if self.axis == 0 else self.group_size

    def _matrix(self) -> torch.Tensor:
        """The codes of M, uint8 ``[rows, columns]``."""
        words = typed(self.w_q, word_dtype(self.bits))
        return unpack_planes(words, self.bits)[: self.numel // self._columns]

    def _codes(self, words: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        """The codes ``begin`` to ``end`` of the flattened weight, uint8; touches no words but theirs."""
        import torch

        columns, height, top, pieces = self._columns, len(words), CODES_PER_WORD[self.bits] - 1, []
        while begin < end:
            row, column = divmod(begin, columns)
            n = min(columns - column, end - begin)
            shift = self.bits * (top - row // height)
            pieces.append((words[row % height, column : column + n] >> shift & (1 << self.bits) - 1).to(torch.uint8))
            begin += n
        return torch.cat(pieces)

    def _join(self, slices: list[tuple[int, Self]], dim: int) -> Self:
        import torch

        first, groups = slices[0][1], self.numel // self.group_size
        count, run, step = runs(self.shape, dim)
        codes = torch.empty(count, run, dtype=torch.uint8, device=first.device)
        shape = (1, groups) if self.axis == 0 else (groups, 1)
        scales, zeros = (torch.empty(groups, dtype=first.scales.dtype, device=first.device) for _ in range(2))
        for start, each in slices:
            length = each.shape[dim]
            codes[:, start * step : (start + length) * step] = each._matrix().reshape(count, -1)
            origin = self._origin(dim, start, length, each.group_size, each.numel // each.group_size).to(first.device)
            scales[origin], zeros[origin] = each.scales.view(-1), each.zeros.view(-1)
        w_q = pack_rows(codes.view(-1, self._columns), self.bits)
        return replace(self, w_q=w_q, scales=scales.view(shape), zeros=zeros.view(shape))

    @classmethod
    def _stack(cls, records: list[Self]) -> Self:
        import torch

        first, count = records[0], len(records)
        made = replace(first, weight_shape=(count, *first.shape))
        if first.axis == 0:
            check_shared(records, "scales", "zeros")
            made = replace(made, group_size=count * first.group_size)
        else:
            scales, zeros = (joined([each._parts()[name] for each in records], 0) for name in ("scales", "zeros"))
            made = replace(made, scales=scales, zeros=zeros)  # type: ignore[arg-type]
        if first.w_q.is_meta:
            rows = made.numel // made._columns
            height, width = -(-rows // CODES_PER_WORD[made.bits]), first.w_q.shape[1]
            return replace(made, w_q=torch.empty(height, width, dtype=torch.uint8, device="meta"))
        codes = torch.cat([record._matrix() for record in records])
        return replace(made, w_q=pack_rows(codes, made.bits))

    def _unstack(self) -> Self:
        return replace(self, weight_shape=self.shape[1:])


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack a matrix of codes, uint8 ``[rows, columns]``, along its rows: the bytes of ``w_q``."""
    import torch

    if bits == 8:
        return codes
    planes = CODES_PER_WORD[bits]
    height, columns = -(-len(codes) // planes), codes.shape[1]
    packed = torch.zeros(height, columns, dtype=word_dtype(bits).torch, device=codes.device)
    for plane in range(planes):
        rows = codes[plane * height : (plane + 1) * height]
        packed[: len(rows)] |= rows.to(packed.dtype) << bits * (planes - 1 - plane)
    return packed.view(torch.uint8)


def unpack_planes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The rows of a packed matrix, ``[h, columns]`` to uint8 ``[p·h, columns]``; the highest bits come first."""
    import torch

    top = CODES_PER_WORD[bits] - 1
    planes = [(words >> bits * (top - i) & (1 << bits) - 1).to(torch.uint8) for i in range(top + 1)]
    return torch.cat(planes)


LP_NORM = 0.7
BETA = 10.0
KAPPA = 1.01
FIRST_ERROR = np.float32(1e4)
LARGEST_SCALE = np.float32(2e4)

LANES = 32
"""Running sums of candle's AVX2 sum."""

EXPONENT = np.float32(LP_NORM) - np.float32(1)
"""The exponent of the shrinkage, -0.3, as float32 arithmetic has it."""


def quantize(
    w: FloatArray, bits: int, group_size: int = 64, steps: int = 10
) -> tuple[npt.NDArray[Any], FloatArray, FloatArray]:
    """Quantise along axis 0 of the weight seen as ``[group_size, N]``: element ``i * N + j`` belongs to group j.

    Args:
        w: finite float32 of any shape whose size is a multiple of ``group_size``, taken in C order.
        bits: 8, 4, 3, 2 or 1; the engine writes 4 and 8.
        group_size: elements of a group; the engine writes 64.
        steps: turns of the optimiser at most, at least 1; the engine takes 10.

    Returns:
        Codes packed by :func:`uqff.numerics.packing.pack_planes` along axis 0; scales and zeros, float32 ``[1, N]``,
        for ``w = (q - zero) * scale``. A group whose range exceeds float32 has an infinite scale.
    """
    top = np.float32(2**bits - 1)
    grid = w.reshape(group_size, -1)
    with np.errstate(all="ignore"):
        low, high = grid.min(0), grid.max(0)
        # While optimising, s multiplies; its inverse is what is stored. A constant group has s = 1/0, clamped.
        s = np.clip(np.float32(1) / (high - low) * top, np.float32(0), LARGEST_SCALE)
        zero = optimize(grid, s, -low * s, top, steps)
        codes = np.nan_to_num(_codes(grid, s, zero, top), nan=0.0).astype(np.uint8)
        return pack_planes(codes, bits), (np.float32(1) / s)[None], zero[None]


def optimize(grid: FloatArray, s: FloatArray, zero: FloatArray, top: np.float32, steps: int) -> FloatArray:
    """Move the zero points for at most ``steps`` turns, as long as the mean absolute error of the tensor falls.

    The zero of the turn that no longer improves is the one that is kept.
    """
    beta, best = BETA, FIRST_ERROR
    for _ in range(steps):
        q = _codes(grid, s, zero, top)
        error = grid - (q - zero) / s
        zero = _column_mean(q - (grid - shrink(error, beta)) * s)
        beta *= KAPPA
        current = mean_magnitude(error)
        if not current < best:
            break
        best = current
    return zero


def shrink(error: FloatArray, beta: float) -> FloatArray:
    """The proximal operator of the l_p norm, p = 0.7: ``sign(e) * relu(|e| - |e|^(p-1) / beta)``.

    The power is ``expf(EXPONENT * logf(|e|))``. Below :func:`idle` the result is 0 whatever the last bits of the power.
    """
    magnitude = np.abs(error)
    active = magnitude > idle(beta)
    result = np.zeros_like(error)
    e = magnitude[active]
    power = expf(EXPONENT * logf(e))
    result[active] = np.sign(error[active]) * np.maximum(e - np.float32(1 / beta) * power, np.float32(0))
    return result


def idle(beta: float) -> np.float32:
    """A magnitude up to which the shrinkage is surely 0: where ``|e|^1.3 = 1 / beta``, less a margin of one percent."""
    magnitude: np.float32 = np.float32(0.99 * math.pow(beta, -1 / (2 - LP_NORM)))
    return magnitude


def mean_magnitude(error: FloatArray) -> np.float32:
    """Mean magnitude of the whole tensor, in float32: candle's sum with AVX2, times the reciprocal of the count.

    32 running sums, element k of the flattened tensor in sum ``k % 32``, as four vectors of eight; then pairs of
    vectors, halves of the vector, pairs of elements. The elements after the last full 32 follow one by one.

    Authority: candle-core ``src/cpu/mod.rs``, ``vec_sum``; ``src/cpu/avx.rs``, ``vec_reduce``.
    """
    flat = np.abs(error).reshape(-1)
    full = len(flat) // LANES * LANES
    lanes = np.add.accumulate(np.concatenate([np.zeros(LANES, np.float32), flat[:full]]).reshape(-1, LANES), axis=0)[-1]
    return mean_of_lanes(lanes, flat[full:], len(flat))


def mean_of_lanes(lanes: FloatArray, rest: FloatArray, count: int) -> np.float32:
    """The end of :func:`mean_magnitude`: joins the running sums, adds the rest, divides by the count."""
    a, b, c, d = lanes.reshape(4, 8)
    eight = (a + b) + (c + d)
    four = eight[:4] + eight[4:]
    total: np.float32 = (four[0] + four[1]) + (four[2] + four[3])
    for magnitude in rest:
        total = total + magnitude
    mean: np.float32 = total * np.float32(1 / count)
    return mean


def _codes(grid: FloatArray, s: FloatArray, zero: FloatArray, top: np.float32) -> FloatArray:
    codes: FloatArray = np.clip(round_half_away(grid * s + zero), np.float32(0), top)
    return codes


def _column_mean(terms: FloatArray) -> FloatArray:
    """Mean over axis 0, added row after row (``accumulate`` does; ``sum`` adds in pairs)."""
    mean: FloatArray = np.add.accumulate(terms, axis=0)[-1] * np.float32(1 / len(terms)) + np.float32(0)
    return mean
