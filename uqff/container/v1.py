"""The layers of 1.x files: several entries per layer, its key the path of the weight.

::

    uqff.version.major  uqff.version.minor  uqff.version.patch     U32 [], in one shard or, equal, in several
    KEY.weight.format   KEY.weight   KEY.weight.*   KEY.bias       a layer, in one shard or cut between two
    anything else                                                  kept, not interpreted

Rules, each with its reason: a key occurs once in a set of shards (two readers must not see two models); major is 1 and
minor at most 2 (a newer one may mean something else); no entry of a layer stands without ``weight.format`` (its family
would be a guess); no key is a number (that is a pre-1.0 blob).

Authority: mistral.rs v0.9.2, ``mistralrs-quant/src/uqff/reader.rs`` (``UqffReader::open``,
``validate_shard_tensor_keys``) and ``report.rs`` (``is_invalid_uqff_tensor_key``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from uqff.codec.entries import LATEST, from_entries, read_fields, suffixes, trace_of
from uqff.codec.layer import Layer
from uqff.codes import Version
from uqff.container.framing import LENGTH_BYTES
from uqff.container.index import HeldEntry, LayerIndex, Place
from uqff.container.mapped import MappedFile
from uqff.container.shards import shard_name
from uqff.errors import FormatError, ShardError, UnsupportedError, UqffError
from uqff.families.base import QuantizedTensor
from uqff.schema.bricks import FieldTrace, Scope
from uqff.schema.entries import BIAS, FORMAT, WEIGHT, RawTensor

__all__ = ["VERSION_KEYS", "EntryIndex", "is_entry_file"]

VERSION_KEYS = ("uqff.version.major", "uqff.version.minor", "uqff.version.patch")


def is_entry_file(file: MappedFile) -> bool:
    """Whether a file names itself as 1.x: by a version entry, or by the format of a layer."""
    return any(name in VERSION_KEYS or name.endswith(f".{FORMAT}") for name in file.header.entries)


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of an entry, if it were one of a layer; the last word decides, so that there is one answer."""
    key, _, word = name.rpartition(".")
    if word in (WEIGHT, BIAS):
        return key, word
    return key.removesuffix(f".{WEIGHT}"), f"{WEIGHT}.{word}" if key.endswith(f".{WEIGHT}") else ""


class EntryIndex(LayerIndex):
    """Weight paths to the entries of their layers, over all shards."""

    generation = "1.x"

    def __init__(self, files: Sequence[MappedFile], *, complete: bool) -> None:
        held: dict[str, HeldEntry] = {}
        for file in files:
            for name, entry in file.header.entries.items():
                _add(held, name, HeldEntry(file, entry))
        self._version = _version(held, files, complete)
        self._layers: dict[str, dict[str, HeldEntry]] = {}
        self.extra: dict[str, HeldEntry] = {}
        self._suffixes = suffixes()
        for name, one in held.items():
            if name not in VERSION_KEYS:
                self._sort_in(name, one, held)
        self.keys = sorted(self._layers)

    @property
    def version(self) -> Version:
        """What the entries of the version say."""
        return self._version

    def _sort_in(self, name: str, one: HeldEntry, held: dict[str, HeldEntry]) -> None:
        key, suffix = _split(name)
        if f"{key}.{FORMAT}" in held and suffix in self._suffixes:
            if not key:
                raise _in_header("ENT-13", "layer without a key", name, one, "the path of a weight", repr(key))
            self._layers.setdefault(key, {})[suffix] = one
        elif suffix in self._suffixes - {WEIGHT, BIAS}:  # any tensor may be called a weight or a bias
            raise FormatError(
                "missing entry",
                rule="ENT-14",
                file=str(one.file.path),
                layer=key,
                field=FORMAT,
                offset=one.entry.begin,
                expected=f"a format beside {suffix}",
                got="no such entry",
            )
        elif name.isdecimal():
            raise _in_header("ENT-12", "pre-1.0 blob in a 1.x file", name, one, "the path of a weight", name)
        else:
            self.extra[name] = one

    def name(self, key: object) -> str | None:
        """The key of a layer given by key or by its place among the sorted keys; None if there is none."""
        if isinstance(key, int) and not isinstance(key, bool):
            return self.keys[key] if 0 <= key < len(self.keys) else None
        return key if isinstance(key, str) and key in self._layers else None

    def layer(self, name: str) -> Layer:
        """The layer of a key."""
        with self._located(name):
            return from_entries(self.entries(name), self.version)

    def entries(self, name: str) -> dict[str, RawTensor]:
        """The entries of a layer by suffix; views of the files."""
        held = self._layers[name]
        return {suffix: RawTensor(one.entry.dtype, one.entry.shape, one.view) for suffix, one in held.items()}

    def place(self, name: str) -> Place:
        """Where the codes lie; of a layer without any, where its format lies."""
        held = self._layers[name]
        return (held.get(WEIGHT) or held[FORMAT]).place

    def places(self, name: str) -> dict[str, Place]:
        """Where each entry of a layer lies."""
        return {suffix: one.place for suffix, one in self._layers[name].items()}

    def fields(self, name: str, trace: list[FieldTrace] | None) -> tuple[type[QuantizedTensor], Scope]:
        """The fields of a layer; offsets in the trace count from the start of the file that holds the entry."""
        entries = self.entries(name)
        with self._located(name):
            record, fields = read_fields(entries, self.version)
        if trace is not None:
            offsets = {suffix: place.offset for suffix, place in self.places(name).items()}
            trace.extend(trace_of(record, fields, entries, offsets))
        return record, fields

    @contextlib.contextmanager
    def _located(self, name: str) -> Iterator[None]:
        """Errors name the file and the offset of the entry that they are about."""
        held = self._layers[name]
        try:
            yield
        except UqffError as error:
            file, entry = held.get(error.field or FORMAT) or held[FORMAT]
            error.offset = entry.begin
            error.within(file=str(file.path), layer=name)
            raise


def _add(held: dict[str, HeldEntry], name: str, one: HeldEntry) -> None:
    other = held.setdefault(name, one)
    if other is one:
        return
    if name not in VERSION_KEYS:
        raise ShardError(
            "key occurs in two shards",
            rule="ENT-16",
            file=str(one.file.path),
            field=name,
            offset=one.entry.begin,
            got=f"also in {other.file.path.name}",
        )
    first, second = _number(name, other), _number(name, one)
    if first != second:
        raise ShardError(
            "shards of several versions",
            rule="ENT-15",
            file=str(one.file.path),
            field=name,
            offset=one.entry.begin,
            expected=f"{first} as in {other.file.path.name}",
            got=second,
        )


def _number(name: str, one: HeldEntry) -> int:
    if (one.entry.dtype, one.entry.shape) != ("U32", ()):
        raise FormatError(
            "version is not a number",
            rule="ENT-11",
            file=str(one.file.path),
            field=name,
            offset=one.entry.begin,
            expected="U32 []",
            got=f"{one.entry.dtype} {list(one.entry.shape)}",
        )
    return int.from_bytes(one.view, "little")


def _version(held: dict[str, HeldEntry], files: Sequence[MappedFile], complete: bool) -> Version:
    path = files[0].path
    missing = [name for name in VERSION_KEYS if name not in held]
    if missing and not complete:
        raise ShardError(
            "gap in a set of shards",
            rule="FILE-17",
            file=str(path),
            expected=f"its sibling {shard_name(path.stem.rpartition('-')[0], 0)}",
            got="no such file, and no version in this one",
        )
    if missing:
        raise FormatError(
            "missing entry",
            rule="ENT-09",
            file=str(path),
            field=missing[0],
            offset=LENGTH_BYTES,
            expected="U32 []",
            got="no such entry",
        )
    version = Version(*(_number(name, held[name]) for name in VERSION_KEYS))
    for name, wrong in zip(VERSION_KEYS, (version.major != LATEST.major, version.minor > LATEST.minor), strict=False):
        if wrong:
            raise UnsupportedError(
                "unknown version",
                rule="ENT-10",
                file=str(held[name].file.path),
                field=name,
                offset=held[name].entry.begin,
                expected=f"{LATEST.major}.0 to {LATEST.major}.{LATEST.minor}",
                got=version,
            )
    return version


def _in_header(rule: str, problem: str, name: str, one: HeldEntry, expected: str, got: str) -> FormatError:
    return FormatError(
        problem,
        file=str(one.file.path),
        field=f"header.{name}",
        offset=LENGTH_BYTES,
        expected=expected,
        got=got,
        rule=rule,
    )
