"""How a weight of a checkpoint stands in a GGUF file: one class for each way, all with the same verbs.

===================  ===========================================================  ==========================
class                in GGUF                                                      what is had of it
===================  ===========================================================  ==========================
:class:`AsIs`        one tensor, its rows perhaps in another order                its blocks
:class:`Formed`      numbers that are otherwise there: :mod:`.forms`              float32
:class:`JoinedRows`      several matrices, whole rows of each                         their blocks
:class:`Columns`     one tensor, its columns in another order                     whole blocks; of others, F32
:class:`Latent`      two tensors of DeepSeek's attention, one of them transposed  plain numbers; of blocks, F32
===================  ===========================================================  ==========================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from uqff.checkpoints.gguf.blocks import planned_record, record_of, unpacked_record
from uqff.checkpoints.gguf.declared import Runs, SeveralMatrices
from uqff.checkpoints.gguf.forms import Form
from uqff.checkpoints.gguf.latent import is_plain, latent_record, planned_latent
from uqff.codes import DType
from uqff.errors import located
from uqff.families.gguf.blocks import block_type_of_kind
from uqff.families.gguf.tensor import GGUF
from uqff.families.part import Part
from uqff.families.rows import Order, joined_rows, reordered, reordered_bias, reordered_columns
from uqff.families.unquant.tensor import Unquant

if TYPE_CHECKING:
    from uqff.checkpoints.method import Cut
    from uqff.families.base import QuantizedTensor
    from uqff.gguf.reader import GgufTensor

__all__ = ["AsIs", "Columns", "Formed", "InFile", "JoinedRows", "Latent"]


class InFile:
    """A weight, a bias or another tensor of a checkpoint.

    Attributes:
        tensors: of the file, that it is made of.
        is_across: whether its blocks are not those of the model's matrix, so that only its numbers can be had.
    """

    is_across = False
    WHY_ACROSS: ClassVar[str] = ""

    def __init__(self, tensors: Sequence[GgufTensor]) -> None:
        self.tensors = tuple(tensors)

    @property
    def shape(self) -> tuple[int, ...]:
        """In the checkpoint; of codes, that of what they stand for."""
        raise NotImplementedError

    @property
    def dtype(self) -> str:
        """As safetensors spells it; U8 of blocks."""
        ggml = self.tensors[0].ggml_type
        return ggml.name if ggml is not None and ggml.block_size == 1 else "U8"

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def meta(self) -> QuantizedTensor:
        """The record without its bytes; raises what :meth:`record` does."""
        raise NotImplementedError

    def record(self, cut: Cut | None = None) -> QuantizedTensor:
        """The record, or a slice of it, its rows in the model's order.

        Raises:
            UqffError: see :func:`uqff.checkpoints.gguf.blocks.record_of`.
        """
        whole = self._whole(record_of)
        return whole if cut is None else whole.narrow(*cut)

    def _whole(self, of: Callable[[GgufTensor], QuantizedTensor]) -> QuantizedTensor:
        raise NotImplementedError

    def numbers(self, dtype: DType = DType.F32) -> Part:
        """The numbers, in the model's order."""
        return self.record().numbers(dtype)

    def raw(self) -> Part:
        """The bytes of what is stored, in the model's order; a view of the file where that is the file's."""
        return self._whole(unpacked_record).parts["data"]


class AsIs(InFile):
    """One tensor."""

    def __init__(self, tensor: GgufTensor, order: Order | None = None) -> None:
        """A tensor whose rows are put into an order; None: they are in it."""
        super().__init__([tensor])
        self.order = order

    @property
    def shape(self) -> tuple[int, ...]:
        """See :attr:`InFile.shape`."""
        return self.tensors[0].shape

    def meta(self) -> QuantizedTensor:
        """See :meth:`InFile.meta`."""
        return planned_record(self.tensors[0])

    def record(self, cut: Cut | None = None) -> QuantizedTensor:
        """See :meth:`InFile.record`; a slice touches no other bytes where rows are in order."""
        return record_of(self.tensors[0], cut) if self.order is None else super().record(cut)

    def _whole(self, of: Callable[[GgufTensor], QuantizedTensor]) -> QuantizedTensor:
        record = of(self.tensors[0])
        return record if self.order is None else reordered(record, self.order)

    def numbers(self, dtype: DType = DType.F32) -> Part:
        """See :meth:`InFile.numbers`; of a bias, too."""
        if self.order is None or len(self.shape) > 1:
            return super().numbers(dtype)
        return reordered_bias(record_of(self.tensors[0]).numbers(dtype), self.order)

    def raw(self) -> Part:
        """See :meth:`InFile.raw`."""
        if self.order is None:
            return self.tensors[0].blocks()
        if len(self.shape) > 1:
            return super().raw()
        return reordered_bias(Part(DType[self.dtype], self.shape, self.tensors[0].blocks().data), self.order)


class Formed(InFile):
    """Numbers that are float32 in a checkpoint, whatever they are here."""

    def __init__(
        self, tensors: Sequence[GgufTensor], form: Form, shape: tuple[int, ...], config: Mapping[str, Any]
    ) -> None:
        """Tensors of a form, of the model with a configuration."""
        super().__init__(tensors)
        self.form, self._shape, self.config = form, shape, config

    @property
    def shape(self) -> tuple[int, ...]:
        """See :attr:`InFile.shape`."""
        return self._shape

    @property
    def dtype(self) -> str:
        """F32."""
        return DType.F32.safetensors

    @property
    def nbytes(self) -> int:
        """Of float32."""
        return 4 * math.prod(self._shape)

    def meta(self) -> QuantizedTensor:
        """See :meth:`InFile.meta`."""
        return Unquant.of(Part.planned(self._shape, DType.F32))

    @property
    def comes_back(self) -> bool:
        """Whether the numbers of the file are made again of those of the checkpoint, to the bit."""
        stored = [tensor.float32().reshape(tensor.shape) for tensor in self.tensors]
        model = self.form.to_model(stored, self._shape, self.config)
        made = self.form.to_file(model, [tensor.shape for tensor in self.tensors], self.config)
        return all(np.array_equal(a.view(np.uint32), b.view(np.uint32)) for a, b in zip(stored, made, strict=True))

    def raw(self) -> Part:
        """See :meth:`InFile.raw`; new memory."""
        made = self.form.to_model([tensor.float32() for tensor in self.tensors], self._shape, self.config)
        return Part.of_array(np.ascontiguousarray(made), DType.F32)

    def _whole(self, of: Callable[[GgufTensor], QuantizedTensor]) -> QuantizedTensor:
        return Unquant.of(self.raw())


class JoinedRows(InFile):
    """Several matrices that are one."""

    def __init__(
        self,
        tensors: Sequence[GgufTensor],
        joined: SeveralMatrices,
        shape: tuple[int, ...],
        config: Mapping[str, Any],
        layer: str,
    ) -> None:
        """Matrices that are one of a shape, joined in some way; the layer is for messages."""
        super().__init__(tensors)
        self.joined, self._shape, self.config, self.layer = joined, shape, config, layer

    @property
    def shape(self) -> tuple[int, ...]:
        """See :attr:`InFile.shape`."""
        return self._shape

    def meta(self) -> QuantizedTensor:
        """See :meth:`InFile.meta`."""
        return self._whole(planned_record)

    def _whole(self, of: Callable[[GgufTensor], QuantizedTensor]) -> QuantizedTensor:
        with located(layer=self.layer):
            made = joined_rows(list(map(of, self.tensors)), turns=self.joined.turns)
            return made if self.joined.order is None else reordered(made, self.joined.order(self.config))


class Columns(InFile):
    """One tensor whose columns are in another order, by runs."""

    WHY_ACROSS = "run across the value heads of the model, which has them in another order"

    def __init__(self, tensor: GgufTensor, runs: Runs) -> None:
        """A tensor whose runs of columns are put into an order."""
        super().__init__([tensor])
        self.runs = runs
        ggml = tensor.ggml_type
        self.is_across = ggml is not None and not runs.fits(ggml.block_size)

    @property
    def shape(self) -> tuple[int, ...]:
        """See :attr:`InFile.shape`."""
        return self.tensors[0].shape

    @property
    def dtype(self) -> str:
        """See :attr:`InFile.dtype`; F32 of blocks whose numbers are had."""
        return DType.F32.safetensors if self.is_across else super().dtype

    def meta(self) -> QuantizedTensor:
        """See :meth:`InFile.meta`."""
        if not self.is_across:
            return planned_record(self.tensors[0])
        rows, columns = self.shape
        data = Part.planned((rows, columns * DType.F32.itemsize), DType.U8)
        return GGUF.made_of(data=data, block_type=block_type_of_kind("f32"))

    def _whole(self, of: Callable[[GgufTensor], QuantizedTensor]) -> QuantizedTensor:
        if not self.is_across:
            return reordered_columns(of(self.tensors[0]), self.runs.order)
        rows, columns = self.shape
        numbers = self.tensors[0].float32().reshape(rows, -1, self.runs.size)[:, self.runs.order]
        data = np.ascontiguousarray(numbers).reshape(-1).view(np.uint8)
        made = Part(DType.U8, (rows, columns * DType.F32.itemsize), data.data)
        return GGUF.made_of(data=made, block_type=block_type_of_kind("f32"))


class Latent(InFile):
    """Keys and values of DeepSeek's attention: :mod:`uqff.checkpoints.gguf.latent`."""

    WHY_ACROSS = "run across the rows of the model, which has their keys transposed"

    def __init__(self, tensors: Sequence[GgufTensor], shape: tuple[int, ...]) -> None:
        """Two tensors that are one matrix of a shape."""
        super().__init__(tensors)
        self._shape = shape
        self.is_across = not is_plain(tensors)

    @property
    def shape(self) -> tuple[int, ...]:
        """See :attr:`InFile.shape`."""
        return self._shape

    @property
    def dtype(self) -> str:
        """See :attr:`InFile.dtype`; F32 of blocks, whose numbers are had."""
        return DType.F32.safetensors if self.is_across else super().dtype

    def meta(self) -> QuantizedTensor:
        """See :meth:`InFile.meta`."""
        return planned_latent(self.tensors, self._shape)

    def _whole(self, of: Callable[[GgufTensor], QuantizedTensor]) -> QuantizedTensor:
        return latent_record(self.tensors)
