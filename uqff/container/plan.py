"""Which files a model will be, and what lies where in them: known from its layers without their payloads.

::

    0.x    a blob for each layer, in the order of the indices
    1.x    the version, the entries of the layers sorted by key, what else an open file holds

They are cut into shards in that order: a new one begins where the next blob or entry would pass the bound, so that a
layer of 1.x may be cut between two.  Within a file, safetensors has an order of its own.

Authority: mistral.rs v0.6.0 and v0.9.2, ``mistralrs-core/src/pipeline/isq.rs`` (``write_uqff``; ``write_uqff_type``,
``uqff_safetensors_metadata``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from uqff._version import __version__
from uqff.codec.blob import blob_size, chunks
from uqff.codec.entries import to_entries
from uqff.codec.layer import Writable
from uqff.codes import Version
from uqff.container.framing import DTYPE_BITS
from uqff.container.v0 import INDEX
from uqff.container.v1 import VERSION_KEYS
from uqff.errors import FormatError, located
from uqff.schema.bricks import Placeholder
from uqff.schema.entries import FIRST, RawTensor

__all__ = [
    "SHARD_BYTES",
    "FilesPlan",
    "Item",
    "Payload",
    "cut",
    "layer_size",
    "metadata_of",
    "payloads_of",
    "plan_files",
]

SHARD_BYTES = 10 * 2**30
"""A shard is closed when the next blob or entry would carry it beyond this (the engine's own bound)."""

METADATA_SINCE = Version(1, 1, 0)


class Item(NamedTuple):
    """A blob or an entry to be written.

    Attributes:
        key: of the layer that it belongs to; None if to the file.
        suffix: what follows the key in its name, empty for a blob; the whole name of what belongs to the file.
        dtype: as safetensors spells it.
        shape: in elements.
    """

    key: str | None
    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """In the file."""
        return ".".join(part for part in (self.key, self.suffix) if part)

    @property
    def nbytes(self) -> int:
        """Bytes of its payload."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


class Payload(NamedTuple):
    """What is written for an :class:`Item`: dtype, shape, and bytes-like objects that together are its bytes."""

    dtype: str
    shape: tuple[int, ...]
    chunks: list[Any]


@dataclass
class FilesPlan:
    """The files of a model.

    Attributes:
        version: that is written.
        metadata: texts that stand in every file; None for no metadata.
        keys: from the names of the layers in the files to their keys in what was planned, in the order of the files.
        layers: from these names to their items.
        shards: the items of each file.
        own: what belongs to no layer, by name.
        versions: of the blobs that have another version, by name.
        fixed: of layers that were planned without payload, the entries that need none, by suffix.
    """

    version: Version
    metadata: dict[str, str] | None
    keys: dict[str, Any]
    own: dict[str, RawTensor]
    versions: dict[str, Version]
    layers: dict[str, list[Item]] = field(default_factory=dict)
    fixed: dict[str, dict[str, RawTensor]] = field(default_factory=dict)
    shards: list[list[Item]] = field(default_factory=list)

    def version_of(self, key: str) -> Version:
        """The version that a layer is written in."""
        return self.versions.get(key, self.version)

    def size(self, key: str) -> int:
        """Bytes of a layer's payload."""
        return sum(item.nbytes for item in self.layers[key])

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' payloads."""
        return sum(map(self.size, self.layers))


def plan_files(
    layers: Mapping[Any, Writable],
    version: tuple[int, int, int],
    shard_bytes: int = SHARD_BYTES,
    *,
    metadata: Mapping[str, str] | None = None,
    versions: Mapping[str, tuple[int, int, int]] | None = None,
    extra: Mapping[str, RawTensor] | None = None,
) -> FilesPlan:
    """Plan the files of a model. Each layer is asked for once, and let go.

    Args:
        layers: index (a number or its decimal text, in 0.x) or weight path (in 1.x) to layer; tensors may be on the
            meta device.
        version: 0.1.0 to 0.2.0, or 1.0.0 to 1.2.0.
        shard_bytes: payload after which a new shard begins; a larger single blob or entry gets a shard of its own.
        metadata: of 1.x, texts that stand in every file beside those of the version.
        versions: of 0.x, those of the blobs that have another, by key.
        extra: of 1.x, tensors that belong to no layer.

    Raises:
        UqffError: there are no layers, a layer cannot be expressed in the version, or a key is none of its generation.
    """
    version = Version(*version)
    if version < FIRST:
        keys, own, texts = _indices(layers), {}, None
    else:
        keys, own = _paths(layers), version_entries(version) | dict(extra or {})
        texts = {**(metadata_of(version) or {}), **(metadata or {})} or None
    if not keys:
        raise FormatError("no layers to save")
    plan = FilesPlan(version, texts, keys, own, {key: Version(*each) for key, each in (versions or {}).items()})
    for name, key in keys.items():
        _plan_layer(plan, name, layers[key])
    items = [Item(None, name, entry.dtype, entry.shape) for name, entry in own.items()]
    first = [item for item in items if item.suffix in VERSION_KEYS]
    last = items[len(first) :]
    plan.shards = cut([*first, *(item for each in plan.layers.values() for item in each), *last], shard_bytes)
    return plan


def _plan_layer(plan: FilesPlan, name: str, layer: Writable) -> None:
    version = plan.version_of(name)
    with located(layer=name):
        if version < FIRST:
            plan.layers[name] = [Item(name, "", "U8", (blob_size(layer, version=version),))]
            return
        entries = to_entries(layer, version)
        plan.layers[name] = [Item(name, suffix, entry.dtype, entry.shape) for suffix, entry in entries.items()]
        fixed = {suffix: entry for suffix, entry in entries.items() if not isinstance(entry.data, Placeholder)}
        if len(fixed) < len(entries):
            plan.fixed[name] = fixed


def layer_size(layer: Writable, version: tuple[int, int, int]) -> int:
    """Bytes of a layer's payload: of its blob in 0.x, of all its entries in 1.x.

    Raises:
        UqffError: it cannot be expressed in the version.
    """
    if version < FIRST:
        return blob_size(layer, version=version)
    return sum(entry.data.nbytes for entry in to_entries(layer, version).values())


def payloads_of(layer: Writable, version: tuple[int, int, int]) -> dict[str, Payload]:
    """What is written for a layer, by the suffix of the item; nothing is copied.

    Raises:
        UqffError: it cannot be expressed in the version, or is on the meta device.
    """
    if version < FIRST:
        made = chunks(layer, version=version)
        return {"": Payload("U8", (sum(memoryview(chunk).nbytes for chunk in made),), made)}
    entries = to_entries(layer, version)
    for suffix, entry in entries.items():
        if isinstance(entry.data, Placeholder):
            raise FormatError("payload has no bytes: it is on the meta device", field=suffix)
    return {suffix: Payload(entry.dtype, entry.shape, [entry.data]) for suffix, entry in entries.items()}


def version_entries(version: Version) -> dict[str, RawTensor]:
    """The entries that state the version."""
    numbers = (memoryview(number.to_bytes(4, "little")) for number in version)
    return {name: RawTensor("U32", (), number) for name, number in zip(VERSION_KEYS, numbers, strict=True)}


def metadata_of(version: Version) -> dict[str, str] | None:
    """The ``__metadata__`` of a file; None before 1.1, which has none."""
    if version < METADATA_SINCE:
        return None
    return {"uqff.producer": "uqff", "uqff.version": str(version), "uqff.producer.uqff.version": __version__}


def cut(items: Iterable[Item], shard_bytes: int = SHARD_BYTES) -> list[list[Item]]:
    """Cut items, in their order, into shards."""
    shards: list[list[Item]] = []
    filled = shard_bytes
    for item in items:
        if not shards or filled >= shard_bytes or filled + item.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += item.nbytes
    return shards


def _indices(layers: Mapping[Any, Any]) -> dict[str, Any]:
    """Names of 0.x layers to their keys, in the order of the indices."""
    keys: dict[int, Any] = {}
    for key in layers:
        text = str(key)
        if isinstance(key, bool) or not INDEX.fullmatch(text):
            raise FormatError(
                "key is not a layer index",
                layer=text,
                expected="a decimal number, as all 0.x has; `uqff migrate` turns paths into numbers",
                got=repr(key),
            )
        if int(text) in keys:
            raise FormatError("layer index occurs twice", layer=text, got=f"also {keys[int(text)]!r}")
        keys[int(text)] = key
    return {str(key): key for _, key in sorted(keys.items())}


def _paths(layers: Mapping[Any, Any]) -> dict[str, Any]:
    """Names of 1.x layers, which are their keys, sorted."""
    for key in layers:
        if not isinstance(key, str) or not key or key.isdecimal():
            expected = "a text, as all 1.x has; `uqff migrate` turns numbers into paths"
            raise FormatError("key is not the path of a weight", layer=str(key), expected=expected, got=repr(key))
        try:
            key.encode("utf-8")
        except UnicodeEncodeError:
            raise FormatError("text is not Unicode", layer=key, got=repr(key)) from None
    return {key: key for key in sorted(layers)}
