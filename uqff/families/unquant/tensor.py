"""Unquant: a layer that was left as it was.

::

    offset  0            4       5          6
            version u32  type=1  bias_flag  R weight  [R bias]

Dequantise: the stored numbers, cast.  A matrix in F32 begins at byte 26 of its blob and is rarely aligned in a file, so
the record keeps its bytes (:attr:`Unquant.data`) and :attr:`Unquant.weight` gives the typed tensor.

Authority: mistral.rs, ``mistralrs-quant/src/unquantized/mod.rs`` (``serialize_with_bias``, ``deserialize``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from uqff.codes import DType, Family, Version
from uqff.errors import ShapeError
from uqff.families.base import PayloadProblem, QuantizedTensor, join_parts, narrow_parts, not_finite
from uqff.families.biases import BiasRule
from uqff.families.fields import bytes_part, raw_bytes, stored, tensor_fields
from uqff.families.parts import typed
from uqff.families.stacking import stack_parts, unstack_parts
from uqff.schema.bricks import Scope, Violation
from uqff.schema.entries import STORABLE, Entries, Entry
from uqff.schema.header import BIAS_FLAG, blob_layout
from uqff.schema.layout import Layout
from uqff.schema.tensor import TENSOR

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

__all__ = ["Unquant"]


@dataclass(frozen=True, eq=False, repr=False)
class Unquant(QuantizedTensor):
    """A plain weight.

    Attributes:
        data: uint8 ``[..., in × itemsize]``, the little-endian bytes of the weight.
        dtype: what the bytes are; any of the storable dtypes (the engine writes F32, F16 and BF16).
    """

    data: torch.Tensor
    dtype: DType

    family: ClassVar[Family] = Family.UNQUANT
    LAYOUT: ClassVar[Layout] = blob_layout(
        Family.UNQUANT,
        "bias_flag" / BIAS_FLAG * "1 if a bias follows at the end, else 0",
        "weight" / TENSOR * "the weight, `[..., out, in]`",
    )

    ENTRIES: ClassVar[Entries] = Entries(
        LAYOUT,
        Entry("weight", "weight", STORABLE, ("...", "in"), since=Version(1, 1, 0)),
    )
    BIAS: ClassVar[BiasRule] = BiasRule()

    @property
    def kind(self) -> str:
        """Always ``unquant``."""
        return "unquant"

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)`` or ``(experts, out, in)``."""
        return (*self.data.shape[:-1], self.data.shape[-1] // self.dtype.itemsize)

    @property
    def weight(self) -> torch.Tensor:
        """The weight in its own dtype: a view where alignment allows, else a copy."""
        return typed(self.data, self.dtype)

    @classmethod
    def of(cls, weight: torch.Tensor) -> Self:
        """Wrap a plain tensor; shares its memory if it is contiguous.

        Raises:
            ShapeError: a scalar.
            UnsupportedError: a dtype that the format has no code for.
        """
        if not weight.ndim:
            raise ShapeError("weight without dimensions", field="weight.ndim", expected="at least 1", got=0)
        dtype = stored(weight, name="weight")
        return cls(raw_bytes(weight), dtype)

    @classmethod
    def parse(cls, blob: Scope) -> Self:
        """See :meth:`QuantizedTensor.parse`."""
        return cls(bytes_part(blob["weight"]), blob["weight"]["dtype"])

    def build(self) -> dict[str, Any]:
        """See :meth:`QuantizedTensor.build`."""
        return {"weight": tensor_fields(self.data, name="weight", dtype=self.dtype, shape=self.shape)}

    @staticmethod
    def kind_of(blob: Scope) -> str:
        """See :meth:`QuantizedTensor.kind_of`."""
        return "unquant"

    @staticmethod
    def shape_of(blob: Scope) -> tuple[int, ...]:
        """See :meth:`QuantizedTensor.shape_of`."""
        shape: tuple[int, ...] = blob["weight"]["shape"]
        return shape

    @staticmethod
    def plain_dtype(blob: Scope) -> DType | None:
        """See :meth:`QuantizedTensor.plain_dtype`."""
        dtype: DType = blob["weight"]["dtype"]
        return dtype

    @staticmethod
    def validate(blob: Scope) -> None:
        """A weight has at least one dimension."""
        if not blob["weight"]["shape"]:
            raise Violation("weight without dimensions", field="weight.ndim", expected="at least 1", got=0)

    @staticmethod
    def check_payload(blob: Scope) -> Iterator[PayloadProblem]:
        """Floating-point weights are finite."""
        yield from not_finite(blob["weight"], "weight.data")

    def _dequantize(self) -> torch.Tensor:
        import torch

        return self.weight.to(torch.float32)

    def alignment(self, dim: int) -> int:
        """1 along every dimension."""
        self._dim(dim)
        return 1

    def _narrow(self, dim: int, start: int, length: int) -> Self:
        return narrow_parts(self, dim, start, length, 1, data=self.dtype.itemsize)

    def _join(self, slices: list[tuple[int, Self]], dim: int) -> Self:
        return join_parts(slices, dim, "data")

    @classmethod
    def _stack(cls, records: list[Self]) -> Self:
        return stack_parts(records, "data")

    def _unstack(self) -> Self:
        return unstack_parts(self, "data")
