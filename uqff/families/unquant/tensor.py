"""Unquant: a layer that was left as it was.

::

    offset  0            4       5          6
            version u32  type=1  bias_flag  R weight  [R bias]

Dequantise: the stored numbers, cast.  A matrix in F32 begins at byte 26 of its blob and is rarely aligned in a file, so
the record keeps its bytes (:attr:`Unquant.data`) and :attr:`Unquant.weight` gives the typed tensor.

Authority: mistral.rs, ``mistralrs-quant/src/unquantized/mod.rs`` (``serialize_with_bias``, ``deserialize``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from uqff.codes import DType, Family, Version
from uqff.errors import ShapeError
from uqff.families.base import QuantizedTensor
from uqff.families.biases import BiasRule
from uqff.families.encoding import AS_ENGINE, GROUP, Effort, Engine
from uqff.families.loaded import Loaded
from uqff.families.out import KERNEL_DTYPES
from uqff.families.part import Part
from uqff.families.payload import PayloadProblem, not_finite
from uqff.families.slicing import join_parts, narrow_parts
from uqff.families.stacking import stack_parts, unstack_parts
from uqff.schema.bricks import Scope, Violation
from uqff.schema.entries import STORABLE, Entries, Entry
from uqff.schema.header import BIAS_FLAG, blob_layout
from uqff.schema.layout import Layout
from uqff.schema.tensor import TENSOR

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from uqff.simd.decoding import Decoding

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

    family: ClassVar[Family] = Family(1, "Unquant", Version(0, 1, 0))
    LAYOUT: ClassVar[Layout] = blob_layout(
        family,
        "bias_flag" / BIAS_FLAG * "1 if a bias follows at the end, else 0",
        "weight" / TENSOR * "the weight, `[..., out, in]`",
    )

    ENTRIES: ClassVar[Entries] = Entries(
        LAYOUT,
        Entry("weight", "weight", STORABLE, ("...", "in"), since=Version(1, 1, 0)),
    )
    BIAS: ClassVar[BiasRule] = BiasRule()

    OTHER_KINDS: ClassVar[tuple[str, ...]] = ("unquant",)
    BY_EXPERT: ClassVar[bool] = True

    @classmethod
    def planned(cls, kind: str, shape: Sequence[int], dtype: DType, group_size: int = GROUP) -> Self:
        """See :meth:`Encoding.planned`."""
        return cls.of(Part.planned(shape, dtype))

    @classmethod
    def encode(
        cls, loaded: Loaded, kind: str, *, engine: Engine, group_size: int = GROUP, effort: Effort = AS_ENGINE
    ) -> Self:
        """See :meth:`Encoding.encode`; shares the memory of a weight that is contiguous and in its load dtype."""
        return cls.of(Part.of_array(loaded.plain.bits, loaded.dtype))

    @classmethod
    def widened(cls, weights: int) -> int:
        """None."""
        return 0

    @property
    def kind(self) -> str:
        """Always ``unquant``."""
        return "unquant"

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)`` or ``(experts, out, in)``."""
        *outer, row = self.parts["data"].shape
        return (*outer, row // self.dtype.itemsize)

    @property
    def weight(self) -> torch.Tensor:
        """The weight in its own dtype: a view where alignment allows, else a copy."""
        return self.plain.tensor()

    @property
    def plain(self) -> Part:
        """The weight as a part of its own dtype and shape."""
        return Part(self.dtype, self.shape, self.parts["data"].data)

    @classmethod
    def of(cls, weight: torch.Tensor | Part) -> Self:
        """Wrap plain numbers; shares their memory if they are contiguous.

        Raises:
            ShapeError: a scalar.
            UnsupportedError: a dtype that the format has no code for.
        """
        if not weight.shape:
            raise ShapeError("weight without dimensions", field="weight.ndim", expected="at least 1", got=0)
        part = weight if isinstance(weight, Part) else Part.of_tensor(weight, name="weight")
        return cls.made_of(data=part.as_bytes(), dtype=part.dtype)

    @classmethod
    def parse(cls, blob: Scope) -> Self:
        """See :meth:`QuantizedTensor.parse`."""
        return cls.of(Part.of_fields(blob["weight"]))

    def build(self) -> dict[str, Any]:
        """See :meth:`QuantizedTensor.build`."""
        return {"weight": self.plain.fields()}

    @staticmethod
    def validate(blob: Scope) -> None:
        """A weight has at least one dimension."""
        if not blob["weight"]["shape"]:
            raise Violation(
                "weight without dimensions", rule="BLOB-12", field="weight.ndim", expected="at least 1", got=0
            )

    @staticmethod
    def check_payload(blob: Scope) -> Iterator[PayloadProblem]:
        """Floating-point weights are finite."""
        yield from not_finite(blob["weight"], "weight.data")

    def _dequantize_by_kernel(self, out: npt.NDArray[np.uint8], form: int) -> bool:
        from uqff.families.unquant import cpu

        return cpu.dequantize(self, out, form)

    def _decoding(self) -> Decoding | None:
        from uqff.families.unquant import cpu

        return cpu.decoding(self)

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

    @property
    def ggml(self) -> tuple[str, Part] | None:
        """F32, F16 and BF16 are ggml types."""
        return (self.dtype.name.lower(), self.parts["data"]) if self.dtype in KERNEL_DTYPES else None

    LAYER_NAME: ClassVar[str] = "unquant-linear"
    SKIPPED: ClassVar[Mapping[str, str]] = {"unquant": "last dim is not divisible by group size 64"}
    UNQUANTISED: ClassVar[bool] = True

    @property
    def nominal_dtype(self) -> DType:
        """Its own."""
        return self.dtype

    @property
    def load_dtype(self) -> DType:
        """Its own."""
        return self.dtype

    def becomes(self, kind: str) -> bool:
        """Any type."""
        return True

    def plus(self, delta: torch.Tensor) -> Self | None:
        """See :meth:`LayerRules.plus`; the sum is rounded to the weight's dtype."""
        return self.of((self.weight + delta.to(self.weight.dtype)).contiguous())

    def transposed(self) -> Self:
        """See :meth:`LayerRules.transposed`."""
        return self.of(self.plain.transposed())

    def resized(self, outputs: int) -> Self:
        """See :meth:`LayerRules.resized`."""
        return self.planned(self.kind, (outputs, *self.shape[1:]), self.dtype)
