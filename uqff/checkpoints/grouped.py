"""Integer codes in groups, each with a scale and a zero: what GPTQ, AWQ and compressed-tensors share.

::

    codes    U8     [..., out, in·bits/8]    each row a little-endian bit stream
    scales   float  [..., out, groups]
    zeros    U8     [..., out, groups]
    index    I32    [..., 1, in]             the group of each input

Dequantise: ``float32(scale) * (float32(code) - float32(zero))``.

It is an exact AFQ record where the groups lie one after another, in runs of 32, 64 or 128 inputs (longer groups repeat
their scales), and the arithmetic cannot round.  AFQ computes ``code * scale + bias`` with ``bias = -(scale * zero)``.
Codes and zeros are below ``2^bits``: if the last ``bits`` bits of a scale's float32 significand are zero, as those of
every F16 and BF16 scale are, both products and their sum are exact, and equal to the formula above.  One thing remains:
where code and zero are equal, or the scale is zero, AFQ gives +0, but the formula a zero of some sign.  So all scales
must be positive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from uqff.checkpoints.companions import float32_of
from uqff.checkpoints.foreign import ForeignTensor
from uqff.checkpoints.method import Cut
from uqff.codes import DType
from uqff.families.afq.tensor import AFQ
from uqff.families.part import Part
from uqff.families.slicing import join_parts
from uqff.families.stacking import stack_parts, unstack_parts
from uqff.numerics.packing import unpack_row

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

__all__ = ["GroupedCodes", "Groups"]

U8 = npt.NDArray[np.uint8]

AFQ_GROUPS = (128, 64, 32)

SHARED_BY = math.lcm(1, 2, 3, 4)

RUN = 1 << 20
"""Weights that are dequantised together."""


@dataclass(frozen=True, eq=False, repr=False)
class GroupedCodes(ForeignTensor):
    """Integer codes with a scale and a zero for each group of inputs.

    Attributes:
        codes: uint8 ``[..., out, in·bits/8]``.
        scales: float32, float16 or bfloat16 ``[..., out, groups]``.
        zeros: uint8 ``[..., out, groups]``.
        index: int32 ``[..., 1, in]``, the group of each input.
        bits: 2, 3, 4 or 8.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    index: torch.Tensor
    bits: int

    TITLE: ClassVar[str] = "integers in groups that AFQ cannot hold exactly"

    @property
    def kind(self) -> str:
        """``int4-groups``."""
        return f"int{self.bits}-groups"

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)`` or ``(experts, out, in)``."""
        return (*self.parts["codes"].shape[:-1], self.parts["index"].shape[-1])

    def values(self) -> npt.NDArray[np.float32]:
        """See :meth:`ForeignTensor.values`."""
        *outer, out, columns = self.shape
        count, groups = math.prod(outer), self.parts["scales"].shape[-1]
        codes = self.parts["codes"].array().reshape(count, out, -1)
        scales = float32_of(self.parts["scales"]).reshape(count, out, groups)
        zeros = self.parts["zeros"].array().reshape(count, out, groups).astype(np.float32)
        index = self.parts["index"].array().copy().view("<i4").reshape(count, columns)
        made = np.empty((count, out, columns), np.float32)
        step = max(1, RUN // columns)
        for expert in range(count):
            of = index[expert]
            for at in range(0, out, step):
                rows = slice(at, at + step)
                numbers = unpack_row(codes[expert, rows], self.bits).astype(np.float32)
                numbers -= zeros[expert, rows][:, of]
                np.multiply(scales[expert, rows][:, of], numbers, out=made[expert, rows])
        return made.reshape(self.shape)

    def values_there(self) -> torch.Tensor:
        """See :meth:`ForeignTensor.values_there`."""
        import torch

        out, columns = self.shape[-2:]
        parts = (self.parts[name].tensor() for name in ("codes", "scales", "zeros", "index"))
        codes, scales, zeros, index = (part.reshape(-1, *part.shape[-2:]) for part in parts)
        made = torch.empty(len(codes), out, columns, device=codes.device)
        bits = torch.arange(8, dtype=torch.uint8, device=codes.device)
        step = max(1, RUN // columns)
        for expert, of in enumerate(index[:, 0]):
            for at in range(0, out, step):
                rows = slice(at, at + step)
                stream = (codes[expert, rows, :, None] >> bits & 1).view(-1, columns, self.bits)
                numbers = (stream << bits[: self.bits]).sum(-1, dtype=torch.uint8).float()
                numbers -= zeros[expert, rows].float().index_select(1, of)
                torch.mul(scales[expert, rows].float().index_select(1, of), numbers, out=made[expert, rows])
        return made.view(self.shape)

    def tiles(self) -> Iterator[tuple[Callable[[Any], Any], Self]]:
        """See :meth:`QuantizedTensor.tiles`: one piece, for rows share the index."""
        yield (lambda values: values.reshape(self.shape)), self

    def alignment(self, dim: int) -> int:
        """What fills whole bytes along the inputs, 1 along others."""
        return 8 // math.gcd(8, self.bits) if self._dim(dim) == len(self.shape) - 1 else 1

    def _along(self, dim: int) -> tuple[str, ...]:
        names: dict[int, tuple[str, ...]] = {
            len(self.shape) - 1: ("codes", "index"),
            len(self.shape) - 2: ("codes", "scales", "zeros"),
        }
        return names.get(dim, ("codes", "scales", "zeros", "index"))

    def _narrow(self, dim: int, start: int, length: int) -> Self:
        changed = {}
        for name in self._along(dim):
            begin, count = start, length
            if name == "codes" and dim == len(self.shape) - 1:
                begin, count = start * self.bits // 8, length * self.bits // 8
            changed[name] = self.parts[name].narrow(dim, begin, count)
        return self.replaced(**changed)

    def _join(self, slices: list[tuple[int, Self]], dim: int) -> Self:
        return join_parts(slices, dim, *self._along(dim))

    @classmethod
    def _stack(cls, records: list[Self]) -> Self:
        return stack_parts(records, "codes", "scales", "zeros", "index")

    def _unstack(self) -> Self:
        return unstack_parts(self, "codes", "scales", "zeros", "index")


@dataclass(frozen=True)
class Groups:
    """The groups of a weight, and what record they make.

    Attributes:
        shape: of the weight, outputs and inputs.
        bits: of a code.
        size: inputs of a group; the last one may be smaller.
        scales: ``[out, groups]``, finite.
        zeros: ``[out, groups]``; None if they are not needed: of a meta record.
        index: the group of each input, checked; None if they lie one after another.
        apart: whether a stack that it belongs to has an expert that AFQ cannot hold.
    """

    shape: tuple[int, int]
    bits: int
    size: int
    scales: Part
    zeros: U8 | None
    index: npt.NDArray[np.int32] | None = None
    apart: bool = False

    @property
    def afq_group(self) -> int | None:
        """Inputs of a group of the exact AFQ record; None if there is none."""
        if self.apart:
            return None
        columns = self.shape[1]
        fits = [each for each in AFQ_GROUPS if self.size % each == 0 and columns % each == 0]
        if not fits or self.index is not None or not self._never_rounds():
            return None
        if self.size in fits:
            return self.size
        # Scales repeat anyway: the largest groups of which one to four ranks have as many each, where there are such.
        return max(fits, key=lambda each: math.gcd(columns // each, SHARED_BY))

    def _never_rounds(self) -> bool:
        scales = float32_of(self.scales)
        bits = scales.view(np.int32)
        largest = np.float32(2.0 ** (127 - self.bits))
        return bool((bits > 0).all() and (scales < largest).all() and not (bits & ((1 << self.bits) - 1)).any())

    def meta(self) -> AFQ | GroupedCodes:
        """The record without its bytes."""
        (out, columns), groups = self.shape, self.scales.shape[1]
        group = self.afq_group
        if group is not None:
            return AFQ.planned(f"afq{self.bits}", self.shape, DType.F32, group)
        return GroupedCodes.made_of(
            codes=Part.planned((out, columns * self.bits // 8), DType.U8),
            scales=Part.planned((out, groups), self.scales.dtype),
            zeros=Part.planned((out, groups), DType.U8),
            index=Part.planned((1, columns), DType.I32),
            bits=self.bits,
        )

    def record(self, codes: Callable[[slice, slice], U8], cut: Cut | None) -> AFQ | GroupedCodes:
        """The record, or a slice of it.

        Args:
            codes: of rows and columns of the weight, packed: uint8 ``[rows, columns·bits/8]``.
            cut: the slice; None for the whole.
        """
        assert self.zeros is not None
        ranges = [slice(0, size) for size in self.shape]
        if cut is not None:
            ranges[cut[0]] = slice(cut[1], cut[1] + cut[2])
        rows, columns = ranges
        packed = Part.of_array(codes(rows, columns), DType.U8)
        scales = self.scales.narrow(0, rows.start, rows.stop - rows.start)
        zeros = self.zeros[rows]
        group = self.afq_group
        if group is None:
            index = np.arange(self.shape[1], dtype=np.int32) // self.size if self.index is None else self.index
            return GroupedCodes.made_of(
                codes=packed,
                scales=scales,
                zeros=Part.of_array(zeros, DType.U8),
                index=Part.of_array(index[columns][None].astype("<i4"), DType.I32),
                bits=self.bits,
            )
        of = np.arange(columns.start, columns.stop, group) // self.size
        wide = float32_of(scales)
        biases = -(wide * zeros.astype(np.float32))
        parts = (Part.of_array(np.ascontiguousarray(each[:, of]), DType.F32) for each in (wide, biases))
        made, bias = parts
        return AFQ.made_of(w_q=packed, scales=made, biases=bias, bits=self.bits, group_size=group)
