"""The 1.x layout: which safetensors entries a layer has, declared on top of the pre-1.0 fields.

A family stores the same parts in both generations; 1.x gives each an entry of its own instead of a place in a blob.  So
:class:`Entries` names, for each entry, the field of the family's :class:`~uqff.schema.layout.Layout` that it holds, and
how it is stored follows from that field's brick:

===================  ==================================================
field                entry
===================  ==================================================
tensor record R      the tensor itself: its dtype, its shape, its data
``Span``             ``U8 [nbytes]``
``Dims``             ``U32 [ndim]``
integer              a number ``[]`` of its width, ``U8`` or ``U32``
``Scalar`` f32       ``F32 []``
===================  ==================================================

Entries are declared in the order in which the engine writes them: it decides where a layer is cut between shards.

Authority: mistral.rs v0.9.2, ``mistralrs-quant/src/<family>/mod.rs`` (``serialize_uqff``, ``inspect_uqff_header``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import construct

from uqff.codes import DType, Version
from uqff.limits import MAX_RANK
from uqff.schema.bricks import Checked, Cursor, Derived, Dims, Scalar, Scope, Sink, Span, Violation
from uqff.schema.layout import Layout

__all__ = ["BIAS", "BIAS_RULE", "FORMAT", "STORABLE", "WEIGHT", "Entries", "Entry", "RawTensor"]

FORMAT = "weight.format"
"""Suffix of the entry that makes a key a layer: the number of its family, ``U8 []``."""
WEIGHT = "weight"
"""Suffix of the entry that every family has."""
BIAS = "bias"
"""Suffix of the entry of the layer's bias, which any layer may have."""

FIRST = Version(1, 0, 0)
"""The first version of this generation."""

STORABLE = tuple(dtype for dtype in DType if dtype.storable)
"""The dtypes that an entry can have."""


class RawTensor(NamedTuple):
    """An entry's content.

    Attributes:
        dtype: as safetensors spells it.
        shape: dimensions in elements.
        data: its bytes: a memoryview, or anything with ``nbytes`` where only the size counts.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Any


@dataclass(frozen=True)
class Entry:
    """The declaration of one entry.

    Attributes:
        suffix: what follows the layer's key and a dot.
        field: the field of the family's layout that it holds.
        dtypes: those that it may have.
        dims: names of its dimensions; the first may be ``...``, which stands for any number of them.
        meaning: one phrase; that of the field if empty.
        since: the first version that has it.
    """

    suffix: str
    field: str
    dtypes: tuple[DType, ...]
    dims: tuple[str, ...] = ()
    meaning: str = ""
    since: Version = FIRST

    @property
    def dtype_label(self) -> str:
        """The dtypes as the spec writes them."""
        return "any" if self.dtypes == STORABLE else " or ".join(dtype.safetensors for dtype in self.dtypes)

    @property
    def shape_label(self) -> str:
        """The shape as the spec writes it."""
        return f"[{', '.join(self.dims)}]"

    def check(self, tensor: RawTensor) -> DType:
        """The dtype of a content that fits the declaration by dtype, rank and size.

        Raises:
            Violation: naming the suffix.
        """
        dtype = DType.of_safetensors(tensor.dtype)
        if dtype is None or dtype not in self.dtypes:
            raise Violation(
                "wrong dtype", rule="ENT-07", field=self.suffix, expected=self.dtype_label, got=tensor.dtype
            )
        rank = len(tensor.shape)
        open_ended = self.dims[:1] == ("...",)
        if rank > MAX_RANK or (rank < len(self.dims) - 1 if open_ended else rank != len(self.dims)):
            raise Violation(
                "wrong rank", rule="ENT-08", field=self.suffix, expected=self.shape_label, got=list(tensor.shape)
            )
        nbytes = math.prod(tensor.shape) * dtype.itemsize
        if tensor.data.nbytes != nbytes:
            raise Violation(
                "payload has the wrong size",
                rule="ENT-17",
                field=self.suffix,
                expected=f"{nbytes} bytes",
                got=tensor.data.nbytes,
            )
        return dtype


BIAS_RULE = Entry(
    BIAS, "bias", STORABLE, ("...", "out"), "bias of the layer, one number per output; no layer needs to have one"
)


class Entries:
    """All entries of a family, in the order in which they are written.

    Args:
        layout: the pre-1.0 layout whose fields they hold.
        entries: their declarations, ``weight`` among them; ``weight.format`` and ``bias`` are those of every family.
        stacked_before: the version from which on weights of three dimensions are refused; None if never.

    Raises:
        TypeError: a declaration contradicts the layout.
    """

    def __init__(self, layout: Layout, *entries: Entry, stacked_before: Version | None = None) -> None:
        members = {name: (brick, meaning) for name, brick, meaning in layout.members}
        self.members = tuple(replace(e, meaning=e.meaning or members[e.field][1]) for e in entries)
        self.stacked_before = stacked_before
        self._bricks = {entry.field: members[entry.field][0] for entry in entries}
        # Parsed in the order of the layout, where no field depends on a later one.
        self._parsing = tuple(e for name in members for e in self.members if e.field == name)
        self._suffix_of = {entry.field: entry.suffix for entry in entries}
        for entry in entries:
            brick = self._bricks[entry.field]
            if isinstance(brick, Dims):
                self._suffix_of[brick.count] = entry.suffix
            if (entry.dtypes, len(entry.dims)) not in _storages(brick, entry):
                raise TypeError(f"{entry.suffix}: the layout has another type or rank")
        if WEIGHT not in self.suffixes:
            raise TypeError("no weight")

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The suffixes of all entries that a layer must have, without ``weight.format``."""
        return tuple(entry.suffix for entry in self.members)

    @property
    def since(self) -> Version:
        """The first version with layers of the family."""
        return max(entry.since for entry in self.members)

    def suffix_of(self, path: str | None) -> str:
        """The entry that holds a field, by the field's dotted path in the pre-1.0 layout."""
        name = (path or "").partition(".")[0]
        return BIAS if name == BIAS else self._suffix_of.get(name, WEIGHT)

    def parse(self, tensors: Mapping[str, RawTensor]) -> dict[str, Any]:
        """The fields that entries hold; payloads are views of them.

        Args:
            tensors: contents by suffix; those that are not declared are not looked at.

        Raises:
            Violation: naming the suffix.
        """
        scope: dict[str, Any] = {}
        for entry in self._parsing:
            tensor = tensors.get(entry.suffix)
            if tensor is None:
                expected = f"{entry.dtype_label} {entry.shape_label}"
                raise Violation(
                    "missing entry", rule="ENT-01", field=entry.suffix, expected=expected, got="no such entry"
                )
            scope[entry.field] = self._parse(entry, entry.check(tensor), tensor, scope)
        return scope

    def _parse(self, entry: Entry, dtype: DType, tensor: RawTensor, scope: Scope) -> Any:
        brick = self._bricks[entry.field]
        if isinstance(brick, Layout):
            if 0 in tensor.shape:
                raise Violation(
                    "empty dimension",
                    rule="BLOB-12",
                    field=entry.suffix,
                    expected="every dimension at least 1",
                    got=list(tensor.shape),
                )
            return {"dtype": dtype, "shape": tensor.shape, "data": tensor.data}
        try:
            if isinstance(brick, Span):
                size = brick.size(scope)
                if tensor.data.nbytes != size:
                    raise Violation(
                        "payload has the wrong size", rule="ENT-17", expected=f"{size} bytes", got=tensor.data.nbytes
                    )
                return tensor.data
            context = {brick.count: tensor.shape[0]} if isinstance(brick, Dims) else scope
            return brick._parse(Cursor(tensor.data), context, "")
        except Violation as broken:
            raise self._renamed(broken, entry) from None

    def _renamed(self, broken: Violation, entry: Entry) -> Violation:
        """The same violation with the entry's suffix in place of the field's name."""
        broken.field = entry.suffix if broken.field is None else self.suffix_of(broken.field)
        return broken

    def build(self, fields: Scope) -> dict[str, RawTensor]:
        """The entries of fields: the reverse of :meth:`parse`. Payloads are not copied and may be placeholders.

        Raises:
            Violation: naming the suffix.
        """
        scope = dict(fields)
        made = {entry.suffix: self._build(entry, scope) for entry in self._parsing}
        return {suffix: made[suffix] for suffix in self.suffixes}

    def _build(self, entry: Entry, scope: dict[str, Any]) -> RawTensor:
        brick, value = self._bricks[entry.field], scope.get(entry.field)
        if isinstance(brick, Layout):
            assert value is not None
            tensor = RawTensor(value["dtype"].safetensors, tuple(value["shape"]), value["data"])
            self._parse(entry, entry.check(tensor), tensor, scope)
            return tensor
        sink = Sink()
        try:
            scope[entry.field] = brick._build(value, sink, scope, "")
        except Violation as broken:
            raise self._renamed(broken, entry) from None
        data = sink.chunks[0] if sink.chunks else b""
        count = sink.nbytes // entry.dtypes[0].itemsize
        shape = (count,) if entry.dims else ()
        return RawTensor(entry.dtypes[0].safetensors, shape, memoryview(data) if isinstance(data, bytes) else data)


def _storages(brick: Any, entry: Entry) -> list[tuple[tuple[DType, ...], int]]:
    """The dtypes and ranks that an entry of a brick can be declared with."""
    while isinstance(brick, (Checked, Derived)):
        brick = brick.subcon
    if isinstance(brick, Layout):
        return [(entry.dtypes, len(entry.dims))] if entry.dims else []
    if isinstance(brick, Span):
        return [((DType.U8,), 1)]
    if isinstance(brick, Dims):
        return [((DType.U32,), 1)]
    if isinstance(brick, Scalar):
        return [((DType.F32,), 0)] if brick.code.format == "<f" else []
    if isinstance(brick, construct.FormatField):
        return [({1: (DType.U8,), 4: (DType.U32,)}[brick.sizeof()], 0)]
    return []
