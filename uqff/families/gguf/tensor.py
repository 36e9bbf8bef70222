"""GGUF: ggml's block types, each row of the weight cut into blocks.

::

    offset  0            4       5                9          10              14        18
            version u32  type=0  data_length u32  bias_flag  ggml_dtype u32  ndim u32  shape          blocks  [R bias]

The shape is in elements and row major (not reversed as in GGUF files).  The bias flag stands *after* the length here
and before the body in every other family.  ``data_length`` wraps at 4 GiB in old writers; shape and type give the true
size.

Authority: mistral.rs, ``mistralrs-quant/src/gguf/mod.rs`` (``serialize_with_bias``, ``deserialize``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from uqff.codes import DType, Family
from uqff.families.base import PayloadProblem, QuantizedTensor, first_bad, join_parts, narrow_parts, not_finite
from uqff.families.biases import BiasRule
from uqff.families.fields import payload
from uqff.families.gguf.blocks import BLOCK_TYPES, BlockType, block_type_of_code
from uqff.families.gguf.reference_dequantize import DEQUANTIZERS
from uqff.families.stacking import stack_parts, unstack_parts
from uqff.schema.bricks import U32, Checked, Derived, Dims, Scope, Span, Violation
from uqff.schema.buffers import flat_bytes
from uqff.schema.entries import Entries, Entry
from uqff.schema.header import BIAS_FLAG, blob_layout
from uqff.schema.layout import Layout

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

__all__ = ["GGUF"]


def _decode_type(code: int) -> BlockType:
    block_type = block_type_of_code(code)
    if block_type is None:
        known = ", ".join(f"{t.code} {t.name}" for t in BLOCK_TYPES)
        raise Violation("unknown ggml type", expected=f"one of {known}", got=code)
    return block_type


def _data_bytes(blob: Any) -> int:
    block_type: BlockType = blob["ggml_dtype"]
    shape = blob["shape"]
    if not shape:
        raise Violation("weight without dimensions", field="ndim", expected="at least 1", got=0)
    if shape[-1] % block_type.block_size:
        raise Violation(
            "row is not whole blocks",
            field="shape",
            expected=f"a last dimension in multiples of {block_type.block_size}",
            got=shape[-1],
        )
    size: int = math.prod(shape) // block_type.block_size * block_type.type_size
    return size


@dataclass(frozen=True, eq=False, repr=False)
class GGUF(QuantizedTensor):
    """A weight of ggml blocks.

    Attributes:
        data: uint8 ``[..., in / block_size · type_size]``, the blocks of each row.
        block_type: which ggml type.
    """

    data: torch.Tensor
    block_type: BlockType

    family: ClassVar[Family] = Family.GGUF
    LAYOUT: ClassVar[Layout] = blob_layout(
        Family.GGUF,
        "data_length" / Derived(U32, _data_bytes) * "bytes of `data`",
        "bias_flag" / BIAS_FLAG * "1 if a bias follows at the end, else 0; after the length in this family only",
        "ggml_dtype" / Checked(U32, _decode_type, lambda t: t.code) * "ggml type code",
        "ndim" / Derived(U32, lambda b: len(b["shape"])) * "number of dimensions",
        "shape" / Dims("ndim") * "dimensions in elements, outermost first",
        "data" / Span(_data_bytes, "data_length", declared="data_length") * "the blocks, row after row",
    )

    ENTRIES: ClassVar[Entries] = Entries(
        LAYOUT,
        Entry("weight", "data", (DType.U8,), ("nbytes",)),
        Entry("weight.dtype", "ggml_dtype", (DType.U32,)),
        Entry("weight.shape", "shape", (DType.U32,), ("ndim",)),
    )
    BIAS: ClassVar[BiasRule] = BiasRule(DType.F32, {0: DType.F32})

    @property
    def kind(self) -> str:
        """``q4_0`` ... ``q8k``, ``f32``, ``f16`` or ``bf16``."""
        return self.block_type.kind

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)`` or ``(experts, out, in)``."""
        *outer, row = self.data.shape
        return (*outer, row // self.block_type.type_size * self.block_type.block_size)

    @property
    def blocks(self) -> torch.Tensor:
        """All blocks in order, uint8 ``[n, type_size]``; a view."""
        return self.data.reshape(-1, self.block_type.type_size)

    @classmethod
    def parse(cls, blob: Scope) -> Self:
        """See :meth:`QuantizedTensor.parse`."""
        block_type: BlockType = blob["ggml_dtype"]
        *outer, last = blob["shape"]
        row = last // block_type.block_size * block_type.type_size
        return cls(flat_bytes(blob["data"]).view(*outer, row), block_type)

    def build(self) -> dict[str, Any]:
        """See :meth:`QuantizedTensor.build`."""
        return {"ggml_dtype": self.block_type, "shape": self.shape, "data": payload(self.data)}

    @staticmethod
    def kind_of(blob: Scope) -> str:
        """See :meth:`QuantizedTensor.kind_of`."""
        kind: str = blob["ggml_dtype"].kind
        return kind

    @staticmethod
    def shape_of(blob: Scope) -> tuple[int, ...]:
        """See :meth:`QuantizedTensor.shape_of`."""
        shape: tuple[int, ...] = blob["shape"]
        return shape

    @staticmethod
    def plain_dtype(blob: Scope) -> DType | None:
        """See :meth:`QuantizedTensor.plain_dtype`."""
        block_type: BlockType = blob["ggml_dtype"]
        return DType[block_type.name] if block_type.block_size == 1 else None

    @staticmethod
    def validate(blob: Scope) -> None:
        """Nothing beyond what the layout states: the size of the data follows from type and shape."""

    @staticmethod
    def check_payload(blob: Scope) -> Iterator[PayloadProblem]:
        """Every float of a block is finite."""
        block_type: BlockType = blob["ggml_dtype"]
        if block_type.block_size == 1:
            dtype = DType[block_type.name]
            yield from not_finite({"dtype": dtype, "data": blob["data"]}, "data")
            return
        blocks = np.frombuffer(blob["data"], block_type.numpy)
        assert block_type.numpy.names is not None
        for name in block_type.numpy.names:
            if blocks[name].dtype.kind == "f":
                expected = f"a finite {name} in every block"
                yield from first_bad(~np.isfinite(blocks[name]), "data", block_type.type_size, expected)

    def _dequantize(self) -> torch.Tensor:
        return DEQUANTIZERS[self.block_type.name](self.blocks).reshape(self.shape)

    def alignment(self, dim: int) -> int:
        """A block along the last dimension, 1 along others."""
        return self.block_type.block_size if self._dim(dim) == len(self.shape) - 1 else 1

    def _narrow(self, dim: int, start: int, length: int) -> Self:
        return narrow_parts(self, dim, start, length, self.block_type.block_size, data=self.block_type.type_size)

    def _join(self, slices: list[tuple[int, Self]], dim: int) -> Self:
        return join_parts(slices, dim, "data")

    @classmethod
    def _stack(cls, records: list[Self]) -> Self:
        return stack_parts(records, "data")

    def _unstack(self) -> Self:
        return unstack_parts(self, "data")
