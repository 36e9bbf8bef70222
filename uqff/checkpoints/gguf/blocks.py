"""Blocks of the ggml types that UQFF has no code for, as records: :class:`GgmlBlocks`; and what is exact of them.

::

    data     U8   [..., out, bytes of a row]      blocks of one type, one after another

Dequantise: :mod:`uqff.gguf.dequantize`. UQFF has no form for them but for MXFP4, whose nibbles ggml has in another
order::

    ggml     byte j of a block of 32:   h h h h l l l l      l: element j,   h: element j + 16
    UQFF     byte j:                    h h h h l l l l      l: element 2j,  h: element 2j + 1

and whose numbers are the same, but that negative zeros are zeros in ggml, and that UQFF has no scales of 2^-127 (a code
of 0 means 0 there) and 2^128 (255 is infinite).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from uqff.checkpoints.foreign import ForeignTensor
from uqff.codes import DType
from uqff.errors import UnsupportedError
from uqff.families.gguf.blocks import BlockType, block_type_of_kind
from uqff.families.gguf.tensor import GGUF
from uqff.families.mxfp4.tensor import MXFP4
from uqff.families.part import Part
from uqff.families.slicing import join_parts, narrow_parts
from uqff.families.stacking import stack_parts, unstack_parts
from uqff.gguf.dequantize import dequantized
from uqff.gguf.types import FOREIGN_TYPES
from uqff.gguf.types import MXFP4 as GGML_MXFP4

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from uqff.families.base import QuantizedTensor
    from uqff.gguf.reader import GgufTensor

__all__ = ["GgmlBlocks", "planned_record", "record_of", "stored_blocks", "stored_type", "unpacked_record"]

_BY_NAME: Final = {each.name: each for each in FOREIGN_TYPES}


@dataclass(frozen=True, eq=False, repr=False)
class GgmlBlocks(ForeignTensor):
    """A weight in blocks of a type that UQFF has no code for.

    Attributes:
        data: uint8 ``[..., out, bytes of a row]``.
        name: of the type, as ggml spells it: one of :data:`uqff.gguf.types.FOREIGN_TYPES`.
    """

    data: torch.Tensor
    name: str

    TITLE: ClassVar[str] = "a ggml type of its own"

    @property
    def block_type(self) -> BlockType:
        """The type."""
        return _BY_NAME[self.name]

    @property
    def kind(self) -> str:
        """``iq2_xxs``, ``tq1_0``, ...: its name in lower case."""
        return self.name.lower()

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)`` or ``(experts, out, in)``."""
        *outer, row = self.parts["data"].shape
        return (*outer, row // self.block_type.type_size * self.block_type.block_size)

    @property
    def has_whole_rows(self) -> bool:
        """They are whole blocks."""
        return True

    def values(self) -> npt.NDArray[np.float32]:
        """See :meth:`ForeignTensor.values`."""
        return dequantized(self.block_type, self.parts["data"].array()).reshape(self.shape)

    def alignment(self, dim: int) -> int:
        """A block along the inputs, 1 along others."""
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


def record_of(tensor: GgufTensor, cut: tuple[int, int, int] | None = None) -> QuantizedTensor:
    """The record of a tensor of a GGUF file: GGUF, a view; MXFP4, repacked; of other types GgmlBlocks, a view.

    Args:
        tensor: of the file.
        cut: a slice, what :meth:`QuantizedTensor.narrow` takes; None for the whole.

    Raises:
        UnsupportedError: a type that is not read, or a block of MXFP4 whose scale UQFF does not have.
        ShapeError: the tensor has no dimensions.
        ShardError: the slice cannot be cut exactly.
    """
    record = unpacked_record(tensor)
    record = record if cut is None else record.narrow(*cut)
    return _repacked(record, tensor) if tensor.ggml_type is GGML_MXFP4 else record


def unpacked_record(tensor: GgufTensor) -> QuantizedTensor:
    """The blocks of a tensor as they are, MXFP4 among them, in a record with the one part ``data``: a view."""
    return _record(tensor, tensor.blocks())


def planned_record(tensor: GgufTensor) -> QuantizedTensor:
    """What :func:`record_of` gives, without its bytes."""
    blocks = tensor.blocks()
    if tensor.ggml_type is GGML_MXFP4:
        return MXFP4.planned("mxfp4", tensor.shape, DType.F32)
    return _record(tensor, Part.planned(blocks.shape, blocks.dtype))


def _record(tensor: GgufTensor, blocks: Part) -> QuantizedTensor:
    if tensor.block_type is not None:
        return GGUF.made_of(data=blocks, block_type=tensor.block_type)
    return GgmlBlocks.made_of(data=blocks, name=tensor.type_name)


def _repacked(record: QuantizedTensor, tensor: GgufTensor) -> MXFP4:
    blocks = record.parts["data"].array().reshape(-1).view(GGML_MXFP4.numpy)
    scales, qs = blocks["e"], blocks["qs"]
    wrong = (scales == 255) | ((scales == 0) & (qs & 0x77).any(axis=1))
    if wrong.any():
        at = int(np.argmax(wrong))
        raise UnsupportedError(
            "UQFF has no MXFP4 block with such a scale",
            file=str(tensor.file.path),
            field=tensor.name,
            expected="exponents from 1 to 254, or 0 of a block of zeros",
            got=f"{int(scales[at])} in block {at}",
        )
    codes = np.concatenate((qs & np.uint8(15), qs >> np.uint8(4)), axis=1)
    nibbles = codes[:, 0::2] | codes[:, 1::2] << np.uint8(4)
    *outer, last = record.shape
    parts: dict[str, Any] = {"blocks": nibbles.reshape(*outer, last // 2), "scales": scales.reshape(*outer, last // 32)}
    return MXFP4.made_of(**{name: Part.of_array(np.ascontiguousarray(x), DType.U8) for name, x in parts.items()})


def stored_type(weight: QuantizedTensor) -> BlockType | None:
    """The type that a weight has in a GGUF file; None if GGUF has no such type."""
    if isinstance(weight, MXFP4):
        return GGML_MXFP4
    return None if weight.ggml is None else block_type_of_kind(weight.ggml[0])


def stored_blocks(weight: QuantizedTensor) -> Part:
    """What a GGUF file stores of a weight that has a :func:`stored_type`, the inverse of :func:`record_of`: its blocks,
    U8 ``[..., row]``. MXFP4 is repacked, new memory.

    Raises:
        UnsupportedError: a block of MXFP4 with a scale that ggml does not have: infinity.
    """
    if isinstance(weight, MXFP4):
        return _in_ggml_order(weight)
    assert weight.ggml is not None
    return weight.ggml[1]


def _in_ggml_order(weight: MXFP4) -> Part:
    """Blocks of MXFP4 in ggml's order; those of scale 0 are zeros in both."""
    scales, nibbles = weight.parts["scales"], weight.parts["blocks"]
    *outer, row = scales.shape
    exponents = scales.array().reshape(-1)
    if (exponents == 255).any():
        at = int(np.argmax(exponents == 255))
        raise UnsupportedError(
            "ggml has no MXFP4 block with such a scale",
            field="scales",
            expected="exponents up to 254",
            got=f"255 in block {at}",
        )
    packed = nibbles.array().reshape(-1, 16)
    codes = np.empty((len(packed), 32), np.uint8)
    codes[:, 0::2], codes[:, 1::2] = packed & np.uint8(15), packed >> np.uint8(4)
    codes[exponents == 0] &= np.uint8(8)
    made = np.empty((len(packed), GGML_MXFP4.type_size), np.uint8)
    made[:, 0], made[:, 1:] = exponents, codes[:, :16] | codes[:, 16:] << np.uint8(4)
    return Part(DType.U8, (*outer, row * GGML_MXFP4.type_size), made.reshape(-1).data)
