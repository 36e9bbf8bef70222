"""Writing 1.x files: entries in the engine's order and shards, layer by layer.

The engine keeps the entries of a shard until it is full and lets safetensors sort them; here their places are known
beforehand, so that each layer is made, written to its places, and let go.

Authority: mistral.rs v0.9.2, ``mistralrs-core/src/pipeline/isq.rs`` (``write_uqff_type``: version entries first, layers
sorted by key, a shard is closed when the next *entry* would pass the bound; ``uqff_safetensors_metadata``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from uqff._version import __version__
from uqff.codec.entries import to_entries
from uqff.codec.layer import Writable
from uqff.codes import Version
from uqff.container.atomic import atomic_files
from uqff.container.framing import DTYPE_BITS, build_header
from uqff.container.mapped import TensorMap
from uqff.container.v1 import VERSION_KEYS
from uqff.errors import FormatError, located
from uqff.schema.bricks import Placeholder
from uqff.schema.entries import RawTensor

__all__ = ["Item", "entry_items", "metadata_of", "plan_items", "save_entries", "version_entries"]

METADATA_SINCE = Version(1, 1, 0)


class Item(NamedTuple):
    """An entry to be written: the layer it belongs to (None: to the file), its suffix or name, dtype and shape."""

    key: str | None
    suffix: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the entry in the file."""
        return self.suffix if self.key is None else f"{self.key}.{self.suffix}"

    @property
    def nbytes(self) -> int:
        """Bytes of its payload."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def metadata_of(version: Version) -> dict[str, str] | None:
    """The ``__metadata__`` of a file; None before 1.1, which has none."""
    if version < METADATA_SINCE:
        return None
    return {"uqff.producer": "uqff", "uqff.version": str(version), "uqff.producer.uqff.version": __version__}


def save_entries(
    layers: Mapping[Any, Writable],
    version: Version,
    shard_bytes: int,
    paths_of: Callable[[int], list[Path]],
    progress: Callable[[str, int, int], None] | None,
) -> list[Path]:
    """Write a 1.x file, or several; see :func:`uqff.save`.

    Args:
        layers: path of the weight to layer. Each is asked for once for its size, and once for each shard that holds a
            part of it.
        version: 1.0.0, 1.1.0 or 1.2.0.
        shard_bytes: payload after which a new shard begins.
        paths_of: gives the file names of so many shards.
        progress: called after each layer, or part of one.
    """
    own = version_entries(version) | _extra(layers)
    items = entry_items(layers, version)
    items += [Item(None, name, own[name].dtype, own[name].shape) for name in own if name not in VERSION_KEYS]
    shards = plan_items(items, shard_bytes)
    paths = paths_of(len(shards))
    total, done = sum(item.nbytes for shard in shards for item in shard), 0
    with atomic_files() as create:
        for shard, path in zip(shards, paths, strict=True):
            places, header = _places(shard, version)
            with create(path) as file:
                file.write(header)
                for key, parts in _by_layer(shard):
                    contents = own if key is None else _entries(layers, key, version)
                    for item in parts:
                        _write(file, places[item.name], item, contents.get(item.suffix))
                    done += sum(item.nbytes for item in parts)
                    if progress is not None and key is not None:
                        progress(key, done, total)
    return paths


def _extra(layers: Mapping[Any, Any]) -> dict[str, RawTensor]:
    """What an open file holds besides its layers: :attr:`uqff.UqffFile.extra`."""
    extra = getattr(layers, "extra", None)
    if not isinstance(extra, TensorMap):
        return {}
    return {name: RawTensor(extra.entry(name).dtype, extra.entry(name).shape, extra.raw(name)) for name in extra}


def version_entries(version: Version) -> dict[str, RawTensor]:
    """The entries that state the version."""
    numbers = (memoryview(number.to_bytes(4, "little")) for number in version)
    return {name: RawTensor("U32", (), number) for name, number in zip(VERSION_KEYS, numbers, strict=True)}


def entry_items(layers: Mapping[Any, Writable], version: Version) -> list[Item]:
    """All entries of a model in the engine's order: the version, then the layers sorted by key.

    Args:
        layers: path of the weight to layer; tensors may be on the meta device.
        version: 1.0.0, 1.1.0 or 1.2.0.

    Raises:
        UqffError: no layers, a key that is no path, or a layer that cannot be expressed in the version.
    """
    for key in layers:
        _check_key(key)
    if not layers:
        raise FormatError("no layers to save")
    items = [Item(None, name, "U32", ()) for name in VERSION_KEYS]
    for key in sorted(layers):
        for suffix, tensor in _entries(layers, key, version).items():
            items.append(Item(key, suffix, tensor.dtype, tensor.shape))
    return items


def _check_key(key: object) -> None:
    if not isinstance(key, str) or not key or key.isdecimal():
        expected = "a text, as all 1.x has; `uqff migrate` turns numbers into paths"
        raise FormatError("key is not the path of a weight", layer=str(key), expected=expected, got=repr(key))
    try:
        key.encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError("text is not Unicode", layer=key, got=repr(key)) from None


def _entries(layers: Mapping[Any, Writable], key: str, version: Version) -> dict[str, RawTensor]:
    with located(layer=key):
        return to_entries(layers[key], version)


def plan_items(items: list[Item], shard_bytes: int) -> list[list[Item]]:
    """Cut entries, in their order, into shards; a layer may be cut between two."""
    shards: list[list[Item]] = []
    filled = shard_bytes
    for item in items:
        if not shards or filled >= shard_bytes or filled + item.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += item.nbytes
    return shards


def _places(shard: list[Item], version: Version) -> tuple[dict[str, int], bytes]:
    """Where each entry begins in the file, and the bytes before all of them."""
    header, order = build_header(((item.name, item.dtype, item.shape) for item in shard), metadata_of(version))
    sizes = {item.name: item.nbytes for item in shard}
    places: dict[str, int] = {}
    at = len(header)
    for name in order:
        places[name] = at
        at += sizes[name]
    return places, header


def _by_layer(shard: list[Item]) -> Iterator[tuple[str | None, list[Item]]]:
    parts: dict[str | None, list[Item]] = {}
    for item in shard:
        parts.setdefault(item.key, []).append(item)
    return iter(parts.items())


def _write(file: BinaryIO, at: int, item: Item, tensor: RawTensor | None) -> None:
    if tensor is None or (tensor.dtype, tensor.shape) != (item.dtype, item.shape):
        got = "no such entry" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
        expected = f"{item.dtype} {list(item.shape)}"
        raise FormatError(
            "layer changed while it was written", layer=item.key, field=item.suffix, expected=expected, got=got
        )
    if isinstance(tensor.data, Placeholder):
        raise FormatError("payload has no bytes: it is on the meta device", layer=item.key, field=item.suffix)
    file.seek(at)
    file.write(tensor.data)
