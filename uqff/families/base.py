"""What every family fulfils: :class:`QuantizedTensor`.

Every room has the same verbs in the same order: declared layout, record, ``parse`` / ``build``, ``validate``,
``check_payload``, ``dequantize``, ``quantize``, ``narrow`` / ``join``, ``stack`` / ``unstack``.  Families share
primitives and do not inherit from each other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np

from uqff.codes import DType, Family
from uqff.errors import ShapeError, ShardError
from uqff.families.biases import BiasRule
from uqff.families.encoded import Encoded
from uqff.families.fields import raw_bytes
from uqff.families.parts import Part, joined, narrowed
from uqff.schema.bricks import Scope, Violation
from uqff.schema.buffers import writable_alias
from uqff.schema.entries import Entries, RawTensor
from uqff.schema.layout import Layout

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

__all__ = [
    "PayloadProblem",
    "QuantizedTensor",
    "first_bad",
    "join_parts",
    "narrow_parts",
    "not_finite",
    "runs",
    "same_bytes",
]


_Record = TypeVar("_Record", bound="QuantizedTensor")


class PayloadProblem(NamedTuple):
    """A payload element that breaks a rule: which field, at which byte of that field, and what was expected."""

    field: str
    offset: int
    problem: str
    expected: str
    got: str


class QuantizedTensor(ABC):
    """A weight as it is stored: codes, scales and whatever else its family keeps. Frozen; a view of its file.

    Subclasses are frozen dataclasses whose tensor attributes are the stored parts, in file order.
    """

    family: ClassVar[Family]
    """Which of the seven families."""
    LAYOUT: ClassVar[Layout]
    """The whole pre-1.0 blob, header and bias included."""
    ENTRIES: ClassVar[Entries]
    """The entries of a 1.x layer, without ``weight.format`` and ``bias``; they hold fields of :attr:`LAYOUT`."""
    BIAS: ClassVar[BiasRule]
    """In which dtype the bias of a layer with such a weight is stored."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """The type's short name, as in-situ quantisation options spell it: ``q4k``, ``hqq4``, ``fp8``, ``afq3``, ..."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Logical dimensions of the weight, in elements: ``(out, in)`` or ``(experts, out, in)``."""

    @classmethod
    @abstractmethod
    def parse(cls, blob: Scope) -> Self:
        """The record of a parsed and validated blob; payload tensors are views of it."""

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
        """The record of the entries of a 1.x layer; payload tensors are views of them.

        Takes and raises what :meth:`fields_of` does.
        """
        aliased = {name: entry._replace(data=writable_alias(entry.data)) for name, entry in entries.items()}
        return cls.parse(cls.fields_of(aliased))

    def to_entries(self) -> dict[str, RawTensor]:
        """The entries of a 1.x layer by suffix, in the order in which they are written; payloads are not copied.

        Raises:
            UqffError: the record is not consistent; ``field`` is the suffix of the entry that cannot be written.
        """
        return self.entries_of(self.build())

    @classmethod
    def entries_of(cls, fields: Scope) -> dict[str, RawTensor]:
        """The reverse of :meth:`fields_of`; payloads are not copied and may be placeholders.

        Raises:
            UqffError: the fields are not consistent; ``field`` is the suffix of the entry that cannot be written.
        """
        try:
            entries = cls.ENTRIES.build(fields)
        except Violation as broken:
            raise broken.as_error() from None
        cls._validated(fields)
        return entries

    def encoded(self) -> Encoded:
        """The fields of the record; payloads are not copied if they are on the CPU."""
        return Encoded(type(self), self.build())

    @staticmethod
    @abstractmethod
    def kind_of(blob: Scope) -> str:
        """:attr:`kind`, from the fields of a blob."""

    @staticmethod
    @abstractmethod
    def shape_of(blob: Scope) -> tuple[int, ...]:
        """:attr:`shape`, from the fields of a valid blob."""

    @staticmethod
    def plain_dtype(blob: Scope) -> DType | None:
        """The dtype of a weight that is stored as plain numbers, from the fields of a blob; None if it is packed."""
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

        On the CPU a kernel does it if there is one (:mod:`uqff.simd`), else the reference; the bits are the same.

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

        from uqff import simd

        if out is not None:
            _check_out(self.shape, self.device, out, dtype or out.dtype)
        dtype = dtype or (torch.float32 if out is None else out.dtype)
        result = simd.dequantize(self, dtype, out)
        if result is not None:
            return result
        plain = self._dequantize()
        if out is not None:
            return out.copy_(plain)
        # Plain float32 weights need no arithmetic: the reference may give the stored tensor itself, a view of a file.
        memory = plain.untyped_storage().data_ptr()
        stored_itself = any(part.data.untyped_storage().data_ptr() == memory for part in self._parts().values())
        return plain.to(dtype, copy=stored_itself)

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

        Works where no exact slice is a single expert, too: the smallest aligned range around it is dequantised, which
        is two to a few experts.

        Args:
            expert: index along the first dimension.
            dtype: of the result; float32 if None, or the dtype of ``out``.
            out: where to write, as in :meth:`dequantize`, ``[out, in]``.

        Raises:
            ShardError: there is no such expert.
            ShapeError: ``out`` is not such a tensor.
        """
        start, length = expert, 1
        if not 0 <= expert < self.shape[0]:
            raise ShardError("no such expert", expected=f"0 to {self.shape[0] - 1}", got=expert)
        if not self.can_narrow(0, expert, 1):
            unit = self.alignment(0)
            start = expert // unit * unit
            length = min(unit, self.shape[0] - start)
        part = self.narrow(0, start, length)
        if out is None:
            return part.dequantize(dtype)[expert - start]
        _check_out(self.shape[1:], self.device, out, dtype or out.dtype)
        if length == 1:
            return part.dequantize(out=out.unsqueeze(0))[0]
        return out.copy_(part.dequantize(out.dtype)[expert - start])

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
        """Stack records that are alike; whether it is exact is for the family to check."""

    @abstractmethod
    def _unstack(self) -> Self:
        """The one weight of a stack of one."""

    def _dim(self, dim: int) -> int:
        rank = len(self.shape)
        if not -rank <= dim < rank:
            raise ShardError("no such dimension", expected=f"0 to {rank - 1} for shape {list(self.shape)}", got=dim)
        return dim % rank

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors, without framing and bias."""
        return sum(part.nbytes for part in self._parts().values())

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def device(self) -> torch.device:
        """Where the stored tensors are."""
        return next(iter(self._parts().values())).device

    def to(self, device: torch.device | str) -> Self:
        """The same record with its tensors on ``device``; the record itself if they are there already."""
        import torch

        target = torch.empty(0, device=device).device
        if all(part.device == target for part in self._parts().values()):
            return self
        moved = {name: getattr(self, name).to(target) for name in self._parts()}
        return replace(self, **moved)  # type: ignore[type-var]

    def _parts(self) -> dict[str, torch.Tensor | Part]:
        """What is stored, by attribute name, without making unaligned parts into tensors."""
        return {name: value for name, value in self.__dict__.items() if hasattr(value, "nbytes")}

    def __eq__(self, other: object) -> bool:
        """Equality by bytes: same family, same parameters, same bits in every stored tensor."""
        if type(other) is not type(self):
            return NotImplemented
        return all(
            same_bytes(getattr(self, f.name), getattr(other, f.name))
            for f in dataclass_fields(self)  # type: ignore[arg-type]
        )

    __hash__ = None  # type: ignore[assignment]  # compared by content that may be gigabytes

    def __repr__(self) -> str:
        bits = 8 * self.nbytes / max(self.numel, 1)
        return (
            f"<{type(self).__name__} {self.kind} {list(self.shape)}, "
            f"{self.nbytes:,} bytes, {bits:.2f} bits/weight, {self.device}>"
        )


def narrow_parts(record: _Record, dim: int, start: int, length: int, unit: int, **per_unit: int) -> _Record:
    """Cut parts that have the record's dimensions, the last one in other units.

    Args:
        record: the record.
        dim: which dimension.
        start: first element.
        length: number of elements.
        unit: elements of the last dimension that belong together.
        per_unit: elements of each part for one unit.
    """
    last = dim == len(record.shape) - 1
    changed = {}
    for name, count in per_unit.items():
        begin, n = (start // unit * count, length // unit * count) if last else (start, length)
        changed[name] = narrowed(record._parts()[name], dim, begin, n)
    return replace(record, **changed)  # type: ignore[type-var]


def join_parts(slices: list[tuple[int, _Record]], dim: int, *names: str) -> _Record:
    """Join the named parts; everything else must be the same in all slices, and is kept.

    Raises:
        ShardError: the slices differ in something else, like the one scale of a tensor.
    """
    first = slices[0][1]
    for field in dataclass_fields(first):  # type: ignore[arg-type]
        same = all(same_bytes(getattr(first, field.name), getattr(each, field.name)) for _, each in slices[1:])
        if field.name not in names and not same:
            raise ShardError(
                "slices were not cut from one weight", field=field.name, expected="the same in every slice"
            )
    return replace(first, **{name: joined([each._parts()[name] for _, each in slices], dim) for name in names})  # type: ignore[type-var]


def runs(shape: tuple[int, ...], dim: int) -> tuple[int, int, int]:
    """A slice along ``dim`` in the flattened weight is one range in each of several runs.

    Returns:
        How many runs there are, their length, and the length for one step along ``dim``.
    """
    inner = math.prod(shape[dim + 1 :])
    return math.prod(shape[:dim]), shape[dim] * inner, inner


def same_bytes(a: Any, b: Any) -> bool:
    """Whether two tensors have the same dtype, shape and bits, on whatever devices; else whether two values are equal.

    A tensor on the meta device has no bits: it is the same as itself only.
    """
    import torch

    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return bool(a == b)
    if a is b:
        return True
    if a.dtype != b.dtype or a.shape != b.shape or a.is_meta or b.is_meta:
        return False
    return bool(torch.equal(raw_bytes(a).reshape(-1), raw_bytes(b).reshape(-1).to(a.device)))


def _check_out(shape: tuple[int, ...], device: torch.device, out: torch.Tensor, dtype: torch.dtype) -> None:
    import torch

    allowed = (torch.float32, torch.bfloat16, torch.float16)
    problem, expected, got = "", "", ""
    if out.dtype not in allowed or out.dtype != dtype:
        wanted = (dtype,) if dtype in allowed else allowed
        problem, expected, got = "wrong dtype", " or ".join(map(str, wanted)), str(out.dtype)
    elif tuple(out.shape) != shape:
        problem, expected, got = "wrong shape", str(list(shape)), str(list(out.shape))
    elif out.device != device:
        problem, expected, got = "wrong device", str(device), str(out.device)
    elif not out.is_contiguous():
        problem, expected, got = "not contiguous", "a contiguous tensor", f"strides {out.stride()}"
    if problem:
        raise ShapeError(problem, field="out", expected=expected, got=got)


_EXPONENT_BITS = {
    DType.F8E4M3: ("u1", 0x7F),
    DType.F16: ("<u2", 0x7C00),
    DType.BF16: ("<u2", 0x7F80),
    DType.F32: ("<u4", 0x7F800000),
    DType.F64: ("<u8", 0x7FF0000000000000),
}
"""The bits that are all set in infinities and NaNs; of e4m3, which has no infinity, all but the sign."""

_LOOKED_AT = 2**20
"""Elements that are looked at together: a layer may have billions, and each look takes memory."""


def not_finite(record: Scope, field: str) -> Iterator[PayloadProblem]:
    """Report the first element of a tensor record that is infinite or not a number. Integers have none."""
    dtype: DType = record["dtype"]
    if dtype not in _EXPONENT_BITS:
        return
    code, mask = _EXPONENT_BITS[dtype]
    bits = np.frombuffer(record["data"], code)
    count, first = 0, 0
    for at in range(0, len(bits), _LOOKED_AT):
        bad = (bits[at : at + _LOOKED_AT] & mask) == mask
        found = int(np.count_nonzero(bad))
        first = at + int(np.argmax(bad)) if found and not count else first
        count += found
    yield from _problems(count, first, field, dtype.itemsize, "a finite number")


def first_bad(
    bad: np.ndarray[Any, np.dtype[np.bool_]], field: str, stride: int, expected: str
) -> Iterator[PayloadProblem]:
    """Report how many elements are bad, and where the first is."""
    yield from _problems(int(np.count_nonzero(bad)), int(np.argmax(bad)) if bad.size else 0, field, stride, expected)


def _problems(count: int, first: int, field: str, stride: int, expected: str) -> Iterator[PayloadProblem]:
    if count:
        what = "1 element breaks a rule" if count == 1 else f"{count} elements break a rule"
        yield PayloadProblem(field, first * stride, what, expected, f"element {first}")
