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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from uqff import simd
from uqff.codes import DType, Family, Version
from uqff.errors import ShardError, UnsupportedError
from uqff.families.base import QuantizedTensor
from uqff.families.biases import BiasRule
from uqff.families.encoding import AS_ENGINE, GROUP, Effort, Engine, Resolution, no_group_size, wrong_shape
from uqff.families.hqq import reference
from uqff.families.hqq.best import better_columns
from uqff.families.hqq.codes import narrow_codes, pack_rows, planned_codes, unpack_rows, word_dtype
from uqff.families.hqq.slices import layout_of, origin_of, packs
from uqff.families.hqq.tiles import column_tiles
from uqff.families.loaded import Loaded
from uqff.families.part import Bytes, Part, concatenated, joined
from uqff.families.payload import PayloadProblem, not_finite
from uqff.families.slicing import runs
from uqff.families.stacking import check_shared
from uqff.numerics.packing import PLANES
from uqff.schema.bricks import U8, U32, Checked, Derived, Dims, Scope, Violation
from uqff.schema.entries import Entries, Entry
from uqff.schema.header import BIAS_FLAG, blob_layout
from uqff.schema.layout import Layout
from uqff.schema.tensor import TENSOR

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from uqff.gpu.source import Stored
    from uqff.simd.decoding import Decoding

__all__ = ["HQQ"]

SCALE_DTYPES = (DType.F32, DType.F16, DType.BF16)


STEPS = 10
"""Turns of the optimiser, as the engine has them."""


def _decode_group_size(number: int) -> int:
    if not number:
        raise Violation("value out of range", rule="HQQ-02", expected="at least 1", got=number)
    return number


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

    family: ClassVar[Family] = Family(2, "HQQ", Version(0, 1, 0))
    LAYOUT: ClassVar[Layout] = blob_layout(
        family,
        "bias_flag" / BIAS_FLAG * "1 if a bias follows at the end, else 0",
        "w_q" / TENSOR * "the packed codes, U8, for 3 bits I32",
        "scales" / TENSOR * "scale of each group, `[1, N]` (axis 0) or `[N, 1]` (axis 1)",
        "zeros" / TENSOR * "zero point of each group, like `scales`",
        "ndim" / Derived(U32, lambda b: len(b["shape"])) * "number of dimensions of the weight",
        "shape" / Dims("ndim") * "logical dimensions in elements, outermost first",
        "bits" / Checked.choice(U8, *PLANES, rule="HQQ-01") * "bits per code: 1, 2, 3, 4 or 8",
        "group_size" / Checked(U32, _decode_group_size, int) * "weights per group",
        "axis" / Checked.choice(U8, 0, 1, rule="HQQ-03") * "0: groups are columns of M; 1: rows",
        "optimization_steps" / U32 * "steps of the solver; 0 stands for none stated",
        "round_zeros" / Checked.choice(U8, 0, 1, rule="HQQ-04") * "1 if the zeros were rounded",
        "channel_wise" / Checked.choice(U8, 0, 1, rule="HQQ-05") * "1 if quantised in groups",
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

    KINDS: ClassVar[tuple[str, ...]] = ("hqq4", "hqq8")
    OTHER_KINDS: ClassVar[tuple[str, ...]] = ("hqq1", "hqq2", "hqq3")

    @classmethod
    def group_size_of(cls, kind: str, group_size: int | None) -> int:
        """Any that the codes of a group pack."""
        codes = 1 if kind == "hqq3" else PLANES[int(kind[-1])]
        if group_size is not None and (group_size < 1 or group_size % codes):
            raise no_group_size(f"a multiple of {codes}", group_size)
        return GROUP if group_size is None else group_size

    @classmethod
    def resolve(
        cls, kind: str, shape: tuple[int, ...], engine: Engine, group_size: int, version: Version | None = None
    ) -> Resolution:
        """The weight is whole groups, else every engine fails."""
        if math.prod(shape) % group_size:
            size = math.prod(shape)
            raise wrong_shape(kind, f"a number of weights in multiples of {group_size}", f"{size} of {list(shape)}")
        return Resolution(kind)

    @classmethod
    def planned(cls, kind: str, shape: Sequence[int], dtype: DType, group_size: int = GROUP) -> Self:
        """See :meth:`Encoding.planned`."""
        columns = math.prod(shape) // group_size
        scales = Part.planned((1, columns), DType.F32)
        w_q = planned_codes((group_size, columns), int(kind[-1]))
        return cls._encoded([w_q, scales, scales], kind, shape, group_size)

    @classmethod
    def encode(
        cls, loaded: Loaded, kind: str, *, engine: Engine, group_size: int = GROUP, effort: Effort = AS_ENGINE
    ) -> Self:
        """See :meth:`Encoding.encode`."""
        bits = int(kind[-1])
        codes, *floats = _twin().quantize(loaded.values, bits, group_size, STEPS)
        if effort.name == "best":
            made = codes, *floats
            codes, *floats = better_columns(loaded.values, effort.importance, group_size, bits, made, _twin().search)
        w_q = Part.of_array(codes, word_dtype(bits)).as_bytes()
        return cls._encoded([w_q, *(Part.of_array(each, DType.F32) for each in floats)], kind, loaded.shape, group_size)

    @classmethod
    def _encoded(cls, parts: Sequence[Part], kind: str, shape: Sequence[int], group_size: int) -> Self:
        w_q, scales, zeros = parts
        return cls.made_of(
            w_q=w_q,
            scales=scales,
            zeros=zeros,
            weight_shape=tuple(shape),
            bits=int(kind[-1]),
            group_size=group_size,
            optimization_steps=STEPS,
        )

    @classmethod
    def widened(cls, weights: int) -> int:
        """All: the optimiser stops by the error of the whole weight."""
        return weights

    @property
    def scale_inputs(self) -> int:
        """1 where groups are of one input each: on axis 0 of a matrix whose outputs are whole groups; else 0."""
        by_input = self.axis == 0 and len(self.shape) == 2 and self.shape[0] % self.group_size == 0
        return 1 if by_input and packs(self.group_size, self.bits) else 0

    @property
    def code_values(self) -> npt.NDArray[np.float64] | None:
        """See :attr:`QuantizedTensor.code_values`."""
        return np.arange(2.0**self.bits)

    def with_codes(self, codes: npt.NDArray[np.uint8]) -> Self:
        """See :meth:`QuantizedTensor.with_codes`."""
        return self.replaced(w_q=pack_rows(codes.reshape(-1, self._columns), self.bits))

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
        return cls.made_of(
            w_q=Part.of_fields(blob["w_q"]).as_bytes(),
            scales=Part.of_fields(blob["scales"]),
            zeros=Part.of_fields(blob["zeros"]),
            weight_shape=blob["shape"],
            bits=blob["bits"],
            group_size=blob["group_size"],
            axis=blob["axis"],
            optimization_steps=blob["optimization_steps"] or None,
            round_zeros=bool(blob["round_zeros"]),
            channel_wise=bool(blob["channel_wise"]),
        )

    def build(self) -> dict[str, Any]:
        """See :meth:`QuantizedTensor.build`."""
        return {
            "w_q": self.parts["w_q"].fields(word_dtype(self.bits)),
            "scales": self.parts["scales"].fields(),
            "zeros": self.parts["zeros"].fields(),
            "shape": self.weight_shape,
            "bits": self.bits,
            "group_size": self.group_size,
            "axis": self.axis,
            "optimization_steps": self.optimization_steps or 0,
            "round_zeros": int(self.round_zeros),
            "channel_wise": int(self.channel_wise),
        }

    @staticmethod
    def validate(blob: Scope) -> None:
        """The packed matrix and the groups fit the shape."""
        w_q, scales, zeros = blob["w_q"], blob["scales"], blob["zeros"]
        bits, group_size, axis = blob["bits"], blob["group_size"], blob["axis"]
        dtype = word_dtype(bits)
        if w_q["dtype"] is not dtype:
            raise Violation("wrong dtype", field="w_q.dtype", rule="HQQ-06", expected=dtype.name, got=w_q["dtype"].name)
        if scales["dtype"] not in SCALE_DTYPES:
            allowed = ", ".join(d.name for d in SCALE_DTYPES)
            raise Violation(
                "wrong dtype", field="scales.dtype", rule="HQQ-07", expected=allowed, got=scales["dtype"].name
            )
        if zeros["dtype"] is not scales["dtype"]:
            wanted, dtype = scales["dtype"], zeros["dtype"]
            raise Violation("wrong dtype", field="zeros.dtype", rule="HQQ-08", expected=wanted.name, got=dtype.name)
        if not blob["shape"]:
            raise Violation("weight without dimensions", rule="BLOB-12", field="ndim", expected="at least 1", got=0)
        numel = math.prod(blob["shape"])
        if numel % group_size:
            fits, field = f"a divisor of {numel}", "group_size"
            raise Violation("weight is not whole groups", rule="HQQ-09", field=field, expected=fits, got=group_size)
        groups = numel // group_size
        rows, columns = (group_size, groups) if axis == 0 else (groups, group_size)
        per_word = PLANES[bits]
        if bits != 3 and rows % per_word:
            raise Violation(
                "matrix rows do not pack",
                rule="HQQ-10",
                field="w_q.shape",
                expected=f"rows in multiples of {per_word}",
                got=rows,
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
                    rule="HQQ-11",
                    field=f"{name}.shape",
                    expected=list(expected),
                    got=list(part["shape"]),
                )

    @staticmethod
    def check_payload(blob: Scope) -> Iterator[PayloadProblem]:
        """Scales and zeros are finite."""
        yield from not_finite(blob["scales"], "scales.data")
        yield from not_finite(blob["zeros"], "zeros.data")

    def _dequantize_by_kernel(self, out: npt.NDArray[np.uint8], form: int) -> bool:
        from uqff.families.hqq import cpu

        return cpu.dequantize(self, out, form)

    def stored_on_gpu(self) -> Stored | None:
        """See :meth:`QuantizedTensor.stored_on_gpu`."""
        from uqff.families.hqq import gpu

        return gpu.stored(self)

    def _decoding(self) -> Decoding | None:
        from uqff.families.hqq import cpu_product

        return cpu_product.decoding(self)

    def _dequantize(self) -> torch.Tensor:
        import torch

        matrix = self._matrix()
        codes = torch.from_numpy(matrix) if isinstance(matrix, np.ndarray) else matrix
        return reference.dequantize(codes, self.scales, self.zeros).reshape(self.shape)

    def alignment(self, dim: int) -> int:
        """What makes the packed rows of the slice whole; 1 where they always are, as for inputs on axis 0."""
        axis = self._dim(dim)
        count, run, step = runs(self.shape, axis)
        per_word = 1 if self.bits == 3 else PLANES[self.bits]
        unit = per_word // math.gcd(per_word, count)
        if self.axis == 0:
            groups = self.numel // self.group_size
            if packs(count * math.gcd(groups, run) // groups, self.bits):
                return 1
            if run % groups:
                return self.shape[axis]
            unit *= groups
        return unit // math.gcd(unit, step)

    def can_narrow(self, dim: int, start: int, length: int) -> bool:
        """See :meth:`QuantizedTensor.can_narrow`; true of every slice that is exactly an HQQ tensor."""
        size, groups = layout_of(self, self._dim(dim), start, length)
        return packs(size if self.axis == 0 else groups, self.bits)

    def _narrow(self, dim: int, start: int, length: int) -> Self:
        size, groups = layout_of(self, dim, start, length)
        origin = origin_of(self, dim, start, length, size, groups)
        ranges = (*runs(self.shape, dim), start, length)
        shape = (size, groups) if self.axis == 0 else (groups, size)
        return self.replaced(
            w_q=narrow_codes(self.parts["w_q"], self.bits, self.axis, self._columns, ranges, shape),
            scales=self.parts["scales"].pick(origin),
            zeros=self.parts["zeros"].pick(origin),
            weight_shape=(*self.shape[:dim], length, *self.shape[dim + 1 :]),
            group_size=size,
        )

    @property
    def _columns(self) -> int:
        return self.numel // self.group_size if self.axis == 0 else self.group_size

    def _matrix(self) -> Bytes:
        """The codes of M, uint8 ``[rows, columns]``."""
        words = self.parts["w_q"].words(word_dtype(self.bits))
        return unpack_rows(words, self.bits)[: self.numel // self._columns]

    def _join(self, slices: list[tuple[int, Self]], dim: int) -> Self:
        first, groups = slices[0][1], self.numel // self.group_size
        count, _, _ = runs(self.shape, dim)
        shape = (1, groups) if self.axis == 0 else (groups, 1)
        origins = []
        for start, each in slices:
            length = each.shape[dim]
            origins.append(origin_of(self, dim, start, length, each.group_size, each.numel // each.group_size))
        # Where each group of the whole is to be found among those of the slices; the last of several counts.
        place = np.empty(groups, np.int64)
        every = np.concatenate(origins)
        place[every] = np.arange(len(every))
        scales, zeros = (
            joined([_flat(each.parts[name]) for _, each in slices], 0).pick(place).view(shape)
            for name in ("scales", "zeros")
        )
        if first.parts["w_q"].is_planned:
            rows = (self.numel // self._columns, self._columns)
            return self.replaced(w_q=planned_codes(rows, self.bits), scales=scales, zeros=zeros)
        codes = concatenated([each._matrix().reshape(count, -1) for _, each in slices], 1)
        w_q = pack_rows(codes.reshape(-1, self._columns), self.bits)
        return self.replaced(w_q=w_q, scales=scales, zeros=zeros)

    @classmethod
    def check_stack(cls, records: Sequence[Self]) -> None:
        """See :meth:`QuantizedTensor.check_stack`: on axis 0 a column of the stack runs through all of them."""
        if records[0].axis == 0:
            check_shared(records, "scales", "zeros")

    @classmethod
    def _stack(cls, records: list[Self]) -> Self:
        first, count = records[0], len(records)
        made = first.replaced(weight_shape=(count, *first.shape))
        if first.axis == 0:
            made = made.replaced(group_size=count * first.group_size)
        else:
            scales, zeros = (joined([each.parts[name] for each in records], 0) for name in ("scales", "zeros"))
            made = made.replaced(scales=scales, zeros=zeros)
        if first.parts["w_q"].is_planned:
            return made.replaced(w_q=planned_codes((made.numel // made._columns, made._columns), made.bits))
        return made.replaced(w_q=pack_rows(concatenated([record._matrix() for record in records]), made.bits))

    def _unstack(self) -> Self:
        return self.replaced(weight_shape=self.shape[1:])

    def tiles(self) -> Iterator[tuple[Callable[[Any], Any], Self]]:
        """On axis 0 groups are columns of the weight seen as ``[group_size, N]``; on axis 1 there is one piece."""
        yield from column_tiles(self, self.TILE) if self.axis == 0 else [(lambda values: values, self)]

    STACKS_BY_VALUE: ClassVar[bool] = True

    @property
    def has_whole_experts(self) -> bool:
        """Never: the codes of experts share words, scales and zeros."""
        return False

    @property
    def has_whole_rows(self) -> bool:
        """Never: on axis 0 groups run down through the rows."""
        return False

    def check_apart(self, experts: Sequence[Self]) -> None:
        """Groups may run from one expert into the next: apart, each weight would have a scale of its own, and the
        experts would not stack again. Where each group has as many weights of every expert, all share all scales.
        """
        scales, apart = _numel(self.parts["scales"]), [_numel(each.parts["scales"]) for each in experts]
        if sum(apart) != scales and set(apart) != {scales}:
            raise ShardError(
                "groups run from one expert into the next",
                expected=f"groups of as many weights of each of {len(apart)} experts",
                got=f"groups of {self.group_size}",
            )

    LAYER_NAME: ClassVar[str] = "hqq"
    STACKS_LOAD: ClassVar[bool] = False
    TAKES_DELTA: ClassVar[bool] = False
    SLICES_QUANTISE_ALIKE: ClassVar[bool] = False

    @property
    def nominal_dtype(self) -> DType:
        """That of the scales."""
        return self.parts["scales"].dtype

    @property
    def act_dtype(self) -> DType | None:
        """That of the scales."""
        return self.nominal_dtype

    def becomes(self, kind: str) -> bool:
        """The types that the engine writes."""
        return kind in self.KINDS

    def resized(self, outputs: int) -> Self:
        """Not possible: always an UnsupportedError."""
        raise UnsupportedError("hidden layers of an HQQ weight share scales: they are not put together anew")


def _twin() -> Any:
    """The module whose ``quantize`` and ``search`` serve: kernels, or what they are equal to."""
    if not simd.enabled():
        return reference
    from uqff.families.hqq import cpu

    return cpu


def _numel(part: Part) -> int:
    return math.prod(part.shape)


def _flat(part: Part) -> Part:
    return part.view((_numel(part),))
