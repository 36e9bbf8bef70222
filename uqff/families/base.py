"""What every family fulfils: :class:`QuantizedTensor`.

Every ``tensor.py`` has the same verbs in the same order: layout and entries, ``KINDS``, ``resolve``, ``planned``,
``encode``, ``kind``, ``shape``, ``parse``, ``build``, ``validate``, ``check_payload``, ``dequantize``, ``narrow``,
``join``, ``stack``, ``tiles``, the engine's rules.  Nothing outside ``families/`` asks which family it has.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from uqff import simd
from uqff.codes import DType, Family
from uqff.errors import ShardError
from uqff.families.biases import BiasRule
from uqff.families.encoding import Encoding
from uqff.families.layer_rules import LayerRules
from uqff.families.multiplying import Multiplying
from uqff.families.out import KERNEL_DTYPES, check_out
from uqff.families.part import Part
from uqff.families.payload import PayloadProblem
from uqff.families.record import Record
from uqff.families.slicing import row_tiles
from uqff.schema.bricks import Scope, Violation
from uqff.schema.entries import Entries, RawTensor
from uqff.schema.layout import Layout
from uqff.simd.floats import Floats
from uqff.simd.memory import aligned_bytes

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

    from uqff.gpu.source import Stored
    from uqff.simd.decoding import Decoding

__all__ = ["QuantizedTensor"]


class QuantizedTensor(Record, Encoding, LayerRules, Multiplying):
    """A weight as it is stored: codes, scales and whatever else its family keeps. Frozen; a view of its file.

    Subclasses are frozen dataclasses whose fields of type ``torch.Tensor`` are the stored parts, in file order: set to
    a torch tensor or a :class:`Part`, kept as a part, and read as a torch tensor, a view where the address allows it.
    What is known of a weight, its bytes, its slices and stacks need no torch as long as it is on the CPU.
    """

    family: ClassVar[Family]
    """Which family."""
    LAYOUT: ClassVar[Layout]
    """The whole pre-1.0 blob, header and bias included."""
    ENTRIES: ClassVar[Entries]
    """The entries of a 1.x layer, without ``weight.format`` and ``bias``; they hold fields of :attr:`LAYOUT`."""
    BIAS: ClassVar[BiasRule]
    """In which dtype the bias of a layer with such a weight is stored."""

    @classmethod
    @abstractmethod
    def parse(cls, blob: Scope) -> Self:
        """The record of a parsed and validated blob; its parts are views of it."""

    @abstractmethod
    def build(self) -> dict[str, Any]:
        """The fields of the blob, without header and bias: what :attr:`LAYOUT` builds from."""

    @classmethod
    def fields_of(cls, entries: Mapping[str, RawTensor]) -> dict[str, Any]:
        """The fields that the entries of a 1.x layer hold, validated; does not import torch.

        Args:
            entries: contents by suffix (``weight``, ``weight.scales``, ...).

        Raises:
            UqffError: an entry is missing or breaks a rule; ``field`` is its suffix.
        """
        try:
            fields = cls.ENTRIES.parse(entries)
        except Violation as broken:
            raise broken.as_error() from None
        cls._validated(fields)
        return fields

    @classmethod
    def _validated(cls, fields: Scope) -> None:
        try:
            cls.validate(fields)
        except Violation as broken:
            raise broken.as_error(cls.ENTRIES.suffix_of(broken.field)) from None

    @classmethod
    def from_entries(cls, entries: Mapping[str, RawTensor]) -> Self:
        """The record of the entries of a 1.x layer; its parts are views of them.

        Takes and raises what :meth:`fields_of` does.
        """
        return cls.parse(cls.fields_of(entries))

    def to_entries(self) -> dict[str, RawTensor]:
        """The entries of a 1.x layer by suffix, in the order in which they are written; payloads are not copied.

        Raises:
            UqffError: the record is not consistent; ``field`` is the suffix of the entry that cannot be written.
        """
        fields = self.build()
        try:
            entries = self.ENTRIES.build(fields)
        except Violation as broken:
            raise broken.as_error() from None
        self._validated(fields)
        return entries

    @classmethod
    def block_layout(cls, fields: Scope) -> Layout | None:
        """The layout of the blocks that the field ``data`` consists of, if it does.

        Args:
            fields: of a blob, those before ``data``.
        """
        return None

    @staticmethod
    @abstractmethod
    def validate(blob: Scope) -> None:
        """Check every rule that spans several fields; both directions call it.

        Raises:
            Violation: naming the field.
        """

    @staticmethod
    @abstractmethod
    def check_payload(blob: Scope) -> Iterator[PayloadProblem]:
        """Find payload elements that no sound writer produces: scales that are not finite, codes out of range."""

    @abstractmethod
    def _dequantize(self) -> torch.Tensor:
        """The reference dequantiser, in float32."""

    def dequantize(self, dtype: torch.dtype | None = None, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weight as plain numbers: computed in float32 by the family's formula, then cast.

        A kernel does it if there is one, on the CPU (:mod:`uqff.simd`) and on NVIDIA GPUs (:mod:`uqff.gpu`), else the
        reference; the bits are the same.

        Args:
            dtype: of the result; float32 if None, or the dtype of ``out``. The cast rounds to nearest even.
            out: where to write: a contiguous float32, bfloat16 or float16 tensor of :attr:`shape`, on the same device.
                New memory costs more time than a kernel, so a loop over layers gains from reusing it.

        Returns:
            ``out``, else a new tensor of :attr:`shape` on the device of the record. The record is not modified.

        Raises:
            ShapeError: ``out`` is not such a tensor.
        """
        import torch

        if out is not None:
            check_out(self.shape, self.device, out, dtype or out.dtype)
        dtype = dtype or (torch.float32 if out is None else out.dtype)
        result = self.dequantize_by_kernel(dtype, out)
        if result is not None:
            return result
        plain = self._dequantize()
        if out is not None:
            return out.copy_(plain)
        # Plain float32 weights need no arithmetic: the reference may give what is stored itself, a view of a file.
        return plain.to(dtype, copy=any(part.holds(plain) for part in self.parts.values()))

    def dequantize_by_kernel(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor | None:
        """The weight as plain numbers, by a kernel if there is one.

        Takes what :meth:`dequantize` does, ``out`` unchecked.

        Returns:
            ``out`` or the new tensor; None if no kernel applies (kernels are off, the device has none, the dtype is
            not float32, bfloat16 or float16, the weight is too small), in which case nothing was written.
        """
        written = DType.of_torch(dtype)
        if self.place.startswith("cuda") and written in KERNEL_DTYPES:
            return self._dequantize_on_gpu(dtype, out)
        if self.place != "cpu" or written not in KERNEL_DTYPES or not simd.enabled():
            return None
        from uqff.simd import memory

        made = memory.empty(self.shape, dtype) if out is None else out
        return made if self._decode(memory.bytes_of(made), written) else None

    def stored_on_gpu(self) -> Stored | None:
        """What kernels of GPUs need to know of the weight; None if they do not know its like."""
        return None

    def _dequantize_on_gpu(self, dtype: torch.dtype, out: torch.Tensor | None) -> torch.Tensor | None:
        import torch

        from uqff.gpu import kernels

        stored = self.stored_on_gpu()
        if stored is None or not kernels.available(self.device):
            return None
        made = torch.empty(self.shape, dtype=dtype, device=self.device) if out is None else out
        return made if kernels.dequantize(stored, made) else None

    def write_numbers(self, out: npt.NDArray[np.uint8], dtype: DType = DType.F32) -> None:
        """Dequantise into memory: :meth:`dequantize` for those who have no torch.

        A kernel does it, or what casts plain numbers; where there is neither (some small weights, no numba) the
        reference does, which imports torch.

        Args:
            out: the bytes of ``numel`` numbers, contiguous.
            dtype: F32, BF16 or F16.
        """
        if simd.enabled() and self._decode(out, dtype):
            return
        plain = self.plain
        if self.place == "cpu" and plain is not None and plain.dtype in KERNEL_DTYPES:
            made = Floats.of_bytes(plain.array(), plain.dtype, plain.shape).cast(dtype)
            out[:] = np.frombuffer(made.data, np.uint8)
            return
        import torch

        self.dequantize(out=torch.from_numpy(out).view(dtype.torch).view(self.shape))

    def numbers(self, dtype: DType = DType.F32) -> Part:
        """The weight as plain numbers in new memory: F32, BF16 or F16; see :meth:`write_numbers`."""
        out = aligned_bytes(self.numel * dtype.itemsize)
        self.write_numbers(out, dtype)
        return Part(dtype, self.shape, out.data)

    def expert_numbers(self, expert: int, dtype: DType = DType.F32) -> Part:
        """One of a stack of weights as plain numbers: :meth:`dequantize_expert` for those who have no torch.

        Raises:
            ShardError: there is no such expert.
        """
        part, at = self._around(expert)
        return part.numbers(dtype).narrow(0, at, 1).view(self.shape[1:])

    def _decode(self, out: npt.NDArray[np.uint8], dtype: DType) -> bool:
        from uqff.simd import output

        return self._dequantize_by_kernel(out, output.FORMS[dtype])

    def _dequantize_by_kernel(self, out: npt.NDArray[np.uint8], form: int) -> bool:
        """Write the numbers into ``out``, if there is a kernel for the weight.

        Args:
            out: the bytes of ``numel`` numbers.
            form: of the numbers, one of :data:`uqff.simd.output.FORMS`.

        Returns:
            Whether it was done.  If not, nothing was written: the weight is small or has unusual dtypes, or its parts
            do not fit each other, which the reference then reports.
        """
        return False

    @property
    def scale_inputs(self) -> int:
        """How many inputs, side by side, have scales that say nothing of others; 0 if that is not sure of any number.

        So many columns of a matrix quantise by themselves to what :meth:`join` puts together.
        """
        return self.alignment(-1)

    @property
    def code_values(self) -> npt.NDArray[np.float64] | None:
        """What codes stand for, ascending: a weight is ``offset + step * value``, both chosen for several weights.

        None if a weight is stored as a number of its own.
        """
        return None

    def with_codes(self, codes: npt.NDArray[np.uint8]) -> Self:
        """The weight with the same scales and other codes, on the CPU.

        Args:
            codes: indices into :attr:`code_values`, uint8 of the shape of the weight.
        """
        raise NotImplementedError(self.kind)

    def decoding(self) -> Decoding | None:
        """What kernels on the CPU need to multiply with the weight; None if there are none for it.

        It looks at sizes and dtypes, never at numbers, and has views of the parts.
        """
        return self._decoding() if self.place == "cpu" and simd.enabled() else None

    def _decoding(self) -> Decoding | None:
        """:meth:`decoding` of a weight on the CPU, whose parts may not fit each other."""
        return None

    @abstractmethod
    def alignment(self, dim: int) -> int:
        """A slice along ``dim`` can be cut where it begins and ends at multiples of this (or ends with the dimension).

        It is the size of the dimension where no smaller number is sure to work.  :meth:`can_narrow` knows single
        slices; HQQ can cut some that are not aligned.

        Raises:
            ShardError: there is no such dimension.
        """

    def can_narrow(self, dim: int, start: int, length: int) -> bool:
        """Whether :meth:`narrow` cuts that slice; the range must lie within the dimension."""
        unit, end = self.alignment(dim), start + length
        return start % unit == 0 and (end % unit == 0 or end == self.shape[dim])

    def narrow(self, dim: int, start: int, length: int) -> Self:
        """The slice ``start`` to ``start + length`` along a dimension, still quantised, without any loss.

        ``record.narrow(d, s, n).dequantize()`` has the bits of ``record.dequantize().narrow(d, s, n)``.  Stored tensors
        are views where the slice is contiguous, else copies of the slice alone; the rest of the record is not touched.

        Args:
            dim: of :attr:`shape`; from the end if negative.
            start: first element.
            length: number of elements, at least 1.

        Raises:
            ShardError: no such dimension, a range beyond it, or one that cuts a block or group.
        """
        axis = self._dim(dim)
        size = self.shape[axis]
        if start < 0 or length < 1 or start + length > size:
            raise ShardError(
                "slice beyond the dimension",
                expected=f"a range within the {size} of dimension {axis}",
                got=f"{start} to {start + length}",
            )
        if length == size:
            return self
        if not self.can_narrow(axis, start, length):
            raise ShardError(
                "slice cannot be cut exactly",
                expected=f"{self.kind} in multiples of {self.alignment(axis)} along dimension {axis} of {size}",
                got=f"{start} to {start + length}",
            )
        return self._narrow(axis, start, length)

    def join(self, slices: Sequence[tuple[int, Self]], dim: int) -> Self:
        """The whole from its slices, the inverse of :meth:`narrow`; ``self`` is the whole, possibly on the meta device.

        Args:
            slices: start and record of each slice, in any order; repeated slices count once.
            dim: along which they were cut.

        Raises:
            ShardError: the slices do not cover the dimension once, or were not cut from one record.
        """
        axis, at = self._dim(dim), 0
        unique = dict(sorted(slices, key=lambda each: each[0]))
        for start, part in unique.items():
            if start != at or part.kind != self.kind or part._frame(axis) != self._frame(axis):
                raise ShardError(
                    "slices do not make up the weight",
                    expected=f"{self.kind} {list(self.shape)}, dimension {axis} from {at} on",
                    got=f"{part.kind} {list(part.shape)} from {start} on",
                )
            at += part.shape[axis]
        if at != self.shape[axis]:
            raise ShardError(
                "slices do not make up the weight", expected=f"{self.shape[axis]} along dimension {axis}", got=at
            )
        return next(iter(unique.values())) if len(unique) == 1 else self._join(list(unique.items()), axis)

    def unstack(self) -> list[Self]:
        """The matrices of stacked experts, the inverse of :func:`uqff.families.stacking.stack`; views, as slices are.

        Raises:
            ShardError: there is no dimension to take apart, or an expert cannot be cut out exactly.
        """
        if len(self.shape) < 2:
            raise ShardError("weight is not a stack", expected="[experts, ...]", got=list(self.shape))
        return [self.narrow(0, expert, 1)._unstack() for expert in range(self.shape[0])]

    def dequantize_expert(
        self, expert: int, dtype: torch.dtype | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One of a stack of weights as plain numbers: ``dequantize(dtype)[expert]``.

        Works where no exact slice is a single expert, too: the smallest aligned range around it is dequantised.

        Args:
            expert: index along the first dimension.
            dtype: of the result; float32 if None, or the dtype of ``out``.
            out: where to write, as in :meth:`dequantize`, ``[out, in]``.

        Raises:
            ShardError: there is no such expert.
            ShapeError: ``out`` is not such a tensor.
        """
        part, at = self._around(expert)
        if out is None:
            return part.dequantize(dtype)[at]
        check_out(self.shape[1:], self.device, out, dtype or out.dtype)
        if part.shape[0] == 1:
            return part.dequantize(out=out.unsqueeze(0))[0]
        return out.copy_(part.dequantize(out.dtype)[at])

    def _around(self, expert: int) -> tuple[Self, int]:
        """The smallest slice of a stack with an expert, and the place of the expert in it."""
        start, length = expert, 1
        if not 0 <= expert < self.shape[0]:
            raise ShardError("no such expert", expected=f"0 to {self.shape[0] - 1}", got=expert)
        if not self.can_narrow(0, expert, 1):
            unit = self.alignment(0)
            start = expert // unit * unit
            length = min(unit, self.shape[0] - start)
        return self.narrow(0, start, length), expert - start

    STACKS_BY_VALUE: ClassVar[bool] = False
    """Whether a stack may not be exact though all shapes fit: something belongs to a whole tensor."""

    @classmethod
    def check_stack(cls, records: Sequence[Self]) -> None:
        """Make sure that a stack of records that are alike is exact, whatever their codes; ShardError if it is not."""

    @property
    def has_whole_experts(self) -> bool:
        """Of a stack: whether its experts are stored one after another, each by itself."""
        return self.can_narrow(0, 0, 1)

    @property
    def has_whole_rows(self) -> bool:
        """Whether every row is stored by itself, as whole blocks or groups."""
        return True

    def check_apart(self, experts: Sequence[Self]) -> None:
        """Make sure that the experts of this stack, without their bytes, can be stacked again once they are apart.

        Raises:
            ShardError: they cannot.
        """

    @property
    def ggml(self) -> tuple[str, Part] | None:
        """What a GGUF file would store of the weight: the ISQ name of a ggml type, and its blocks, U8 ``[..., row]``.

        None if GGUF has no such type.
        """
        return None

    TILE: ClassVar[int] = 1 << 17
    """Weights that are dequantised together: what stays in a cache."""

    def tiles(self) -> Iterator[tuple[Callable[[Any], Any], Self]]:
        """The weight in pieces of about :attr:`TILE` numbers, at least a row, to be looked at one by one; views.

        Yields:
            A function that takes the piece out of a plain array of the weight's shape, and the piece.
        """
        yield from row_tiles(self, self.TILE)

    def _frame(self, dim: int) -> tuple[int, ...]:
        return (*self.shape[:dim], *self.shape[dim + 1 :])

    @abstractmethod
    def _narrow(self, dim: int, start: int, length: int) -> Self:
        """Cut a slice that was checked and is not the whole."""

    @abstractmethod
    def _join(self, slices: list[tuple[int, Self]], dim: int) -> Self:
        """Join slices that were checked, in order, more than one."""

    @classmethod
    @abstractmethod
    def _stack(cls, records: list[Self]) -> Self:
        """Stack records that are alike and that :meth:`check_stack` has let pass."""

    @abstractmethod
    def _unstack(self) -> Self:
        """The one weight of a stack of one."""

    def _dim(self, dim: int) -> int:
        rank = len(self.shape)
        if not -rank <= dim < rank:
            raise ShardError("no such dimension", expected=f"0 to {rank - 1} for shape {list(self.shape)}", got=dim)
        return dim % rank
