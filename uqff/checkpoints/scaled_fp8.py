"""FP8 with several scales: one for each block of a matrix, or for each of its rows. UQFF has no form for it.

::

    weight   F8E4M3  [..., out, in]
    scales   float   [..., ⌈out/rows⌉, ⌈in/columns⌉]    rows × columns is a block; the last ones may be smaller

Dequantise: ``float32(weight) * float32(scale of its block)``.

Authority: transformers, ``integrations/finegrained_fp8.py`` (``Fp8Dequantize``); mistral.rs v0.8.0,
``mistralrs-quant/src/blockwise_fp8/ops.rs``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from uqff.checkpoints.companions import float32_of
from uqff.checkpoints.foreign import ForeignTensor
from uqff.errors import ShardError
from uqff.families.part import joined
from uqff.families.stacking import stack_parts, unstack_parts
from uqff.numerics.packing import e4m3_to_float32

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

__all__ = ["ScaledFP8"]


@dataclass(frozen=True, eq=False, repr=False)
class ScaledFP8(ForeignTensor):
    """An e4m3 weight with a scale for each block.

    Attributes:
        weight: float8_e4m3fn ``[..., out, in]``.
        scales: float32, float16 or bfloat16 ``[..., ⌈out/rows⌉, ⌈in/columns⌉]``.
        rows: outputs of a block; where there is but one block of them, any number from that of the outputs on.
        columns: inputs of a block, likewise.
    """

    weight: torch.Tensor
    scales: torch.Tensor
    rows: int
    columns: int

    TITLE: ClassVar[str] = "FP8 with several scales"

    @property
    def kind(self) -> str:
        """``fp8-block``, or ``fp8-channel`` if each row has its scale."""
        return "fp8-channel" if self.rows == 1 and self.parts["scales"].shape[-1] == 1 else "fp8-block"

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)`` or ``(experts, out, in)``."""
        return self.parts["weight"].shape

    def values(self) -> npt.NDArray[np.float32]:
        """See :meth:`ForeignTensor.values`."""
        *outer, out, columns = self.shape
        scales = self.parts["scales"]
        codes = self.parts["weight"].array().reshape(math.prod(outer), out, columns)
        by_matrix = float32_of(scales).reshape(math.prod(outer), *scales.shape[-2:])
        made = np.empty(codes.shape, np.float32)
        for matrix, of_matrix, into in zip(codes, by_matrix, made, strict=True):
            for at, of_rows in enumerate(of_matrix):
                rows = slice(at * self.rows, (at + 1) * self.rows)
                wide = np.repeat(of_rows, self.columns)[:columns] if len(of_rows) > 1 else of_rows
                np.multiply(e4m3_to_float32(matrix[rows]), wide, out=into[rows])
        return made.reshape(*outer, out, columns)

    def values_there(self) -> torch.Tensor:
        """See :meth:`ForeignTensor.values_there`."""
        out, columns = self.shape[-2:]
        made = self.parts["weight"].tensor().float()
        scales = self.parts["scales"].tensor().float()
        if scales.shape[-2] > 1:
            scales = scales.repeat_interleave(self.rows, -2)[..., :out, :]
        if scales.shape[-1] > 1:
            scales = scales.repeat_interleave(self.columns, -1)[..., :columns]
        return made.mul_(scales)

    def _unit(self, dim: int) -> int:
        """Elements of a dimension that share scales; 1 where all do, or none."""
        blocks = self.parts["scales"].shape[dim]
        units = {len(self.shape) - 2: self.rows, len(self.shape) - 1: self.columns}
        return 1 if dim not in units or blocks == 1 else units[dim]

    def alignment(self, dim: int) -> int:
        """A block, or 1 where there is but one."""
        return self._unit(self._dim(dim))

    def _is_shared(self, dim: int) -> bool:
        return dim >= len(self.shape) - 2 and self.parts["scales"].shape[dim] == 1

    def _narrow(self, dim: int, start: int, length: int) -> Self:
        weight, unit = self.parts["weight"].narrow(dim, start, length), self._unit(dim)
        if self._is_shared(dim):
            return self.replaced(weight=weight)
        begin, end = start // unit, -(-(start + length) // unit)
        return self.replaced(weight=weight, scales=self.parts["scales"].narrow(dim, begin, end - begin))

    def _join(self, slices: list[tuple[int, Self]], dim: int) -> Self:
        records = [each for _, each in slices]
        weight = joined([each.parts["weight"] for each in records], dim)
        if self._is_shared(dim):
            if not all(records[0].same_in(each, "scales") for each in records[1:]):
                raise ShardError(
                    "slices were not cut from one weight", field="scales", expected="the same in every slice"
                )
            return records[0].replaced(weight=weight)
        return records[0].replaced(weight=weight, scales=joined([each.parts["scales"] for each in records], dim))

    @classmethod
    def _stack(cls, records: list[Self]) -> Self:
        return stack_parts(records, "weight", "scales")

    def _unstack(self) -> Self:
        return unstack_parts(self, "weight", "scales")

    def transposed(self) -> Self:
        """See :meth:`LayerRules.transposed`: codes and scales alike."""
        weight, scales = (self.parts[name].transposed() for name in ("weight", "scales"))
        return self.replaced(weight=weight, scales=scales, rows=self.columns, columns=self.rows)

    @property
    def blocks(self) -> int:
        """How many scales there are."""
        return math.prod(self.parts["scales"].shape)
