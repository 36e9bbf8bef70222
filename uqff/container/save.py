"""Writing a model: layer by layer, in the engine's own container bytes.

Authority: mistral.rs v0.6.0, ``mistralrs-core/src/pipeline/isq.rs`` (``write_uqff``: shards by cumulated blob size).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from uqff.codec.blob import LATEST, blob_size, chunks
from uqff.codec.layer import Layer
from uqff.codes import ENTRY_VERSIONS, Version
from uqff.container.atomic import atomic_file, atomic_files
from uqff.container.file import UqffFile
from uqff.container.framing import build_header
from uqff.container.save_v1 import save_entries
from uqff.container.shards import NUMBERED, PathLike, shard_name
from uqff.container.v0 import INDEX
from uqff.errors import FormatError, ShardError, located
from uqff.families.base import QuantizedTensor
from uqff.schema.entries import FIRST

__all__ = ["SHARD_BYTES", "BlobSource", "Progress", "plan_shards", "save", "shard_paths", "write_shard"]

SHARD_BYTES = 10 * 2**30
"""A shard is closed when the next blob would carry it beyond this (the engine's own bound)."""

NUMERIC = re.compile(r"\s*[+-]?\d+\s*")
"""A key that was meant as a number, well written or not; no weight has such a path."""

Progress = Callable[[str, int, int], None]
"""Called after each layer with its key, the bytes written so far and the bytes to write in all."""

BlobSource = Callable[[int], list[Any]]
"""Gives the chunks of the blob of a layer index; called once per layer, in file order."""


def save(
    layers: Mapping[Any, Layer | QuantizedTensor],
    path: PathLike,
    *,
    version: tuple[int, int, int] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> list[Path]:
    """Write a ``.uqff`` file, or several if it grows beyond ``shard_bytes``.

    The keys of ``layers`` say which generation: paths of weights are 1.x, which current engines read, numbers are 0.x.
    To turn one into the other needs the model's configuration: :func:`uqff.migration.migrate` does.

    One layer is held at a time: a lazy mapping (such as an open file) is asked for each layer twice, first for its
    size, then for its bytes.  What an open 1.x file holds besides its layers is saved too.  Files are written under
    temporary names, flushed, and renamed when all are complete: a failure leaves an older set of the same name as it
    was.

    Args:
        layers: to layers, from their indices (``int`` or decimal text) for 0.x, from the paths of their weights
            (``"model.layers.0.mlp.up_proj"``, ...) for 1.x.
        path: the file to write. If there is one shard it is written under this name; if there are more, shard N is
            named ``<stem>-N.uqff`` (a stem that ends in ``-0`` is taken without it).
        version: to write, 0.1.0 to 0.2.0, or 1.0.0 to 1.2.0, with keys of that generation; if None, that of an open
            file, else the newest that has such keys: 0.2.0 or 1.2.0.
        shard_bytes: payload after which a new shard begins; a larger single layer (1.x: entry) still gets a shard of
            its own. A 1.x layer may be cut between two shards, as the engine does.
        progress: see :data:`Progress`.

    Returns:
        The files written.

    Raises:
        UqffError: a layer cannot be expressed in ``version``, a key is none of that generation, or a shard of an older
            set of the same name would stay behind.
        OSError: writing failed; no half-written file stays.
    """
    version = _version_of(layers) if version is None else Version(*version)
    if Version(*version) >= FIRST:
        return save_entries(
            layers, Version(*version), shard_bytes, lambda count: shard_paths(Path(path), count), progress
        )
    keys = _indexed(layers)
    sizes: dict[int, int] = {}
    for index, key in sorted(keys.items()):
        with located(layer=str(key)):
            sizes[index] = blob_size(Layer.of(layers[key]), version=version)
    names = {index: key if isinstance(key, str) else str(key) for index, key in keys.items()}
    shards = plan_shards(sizes, shard_bytes)
    paths = shard_paths(Path(path), len(shards))
    total, done = sum(sizes.values()), 0

    def blob(index: int) -> list[Any]:
        with located(layer=names[index]):
            return chunks(Layer.of(layers[keys[index]]), version=version)

    with atomic_files() as create:
        for shard, target in zip(shards, paths, strict=True):

            def count(key: str, size: int, before: int = done) -> None:
                if progress is not None:
                    progress(key, before + size, total)

            write_shard(target, {names[index]: (sizes[index], index) for index in shard}, blob, count, create)
            done += sum(sizes[index] for index in shard)
    return paths


def _version_of(layers: Mapping[Any, Any]) -> Version:
    """The version that an open file has, or the newest of the generation that the keys are of."""
    if isinstance(layers, UqffFile):
        return layers.version
    paths = [key for key in layers if isinstance(key, str) and not NUMERIC.fullmatch(key)]
    if paths and len(paths) < len(layers):
        number = next(key for key in layers if key not in paths)
        raise FormatError(
            "keys of two generations",
            layer=paths[0],
            expected="numbers alone (0.x), or paths of weights alone (1.x)",
            got=f"also {number!r}",
        )
    return max(ENTRY_VERSIONS) if paths else LATEST


def _indexed(layers: Mapping[Any, Any]) -> dict[int, Any]:
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
    if not keys:
        raise FormatError("no layers to save")
    return keys


def plan_shards(sizes: Mapping[int, int], shard_bytes: int = SHARD_BYTES) -> list[list[int]]:
    """Cut the layers, in index order, into shards."""
    shards: list[list[int]] = [[]]
    filled = 0
    for index in sorted(sizes):
        if shards[-1] and filled + sizes[index] > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(index)
        filled += sizes[index]
    return shards


def shard_paths(path: Path, count: int) -> list[Path]:
    """The file names of a set of ``count`` shards; refuses if other shards of that name would stay beside them."""
    match = NUMBERED.fullmatch(path.name)
    first = match is not None and int(match["number"]) == 0
    stem = match["stem"] if match is not None and first else path.name.removesuffix(".uqff")
    if count == 1 and not first:
        return [path]
    names = [shard_name(stem, number) for number in range(count)]
    for present in sorted(os.listdir(path.parent)):
        other = NUMBERED.fullmatch(present)
        if other is not None and other["stem"] == stem and present not in names:
            raise ShardError(
                "a shard of another set of that name exists: remove it first", file=str(path.parent / present)
            )
    return [path.parent / name for name in names]


def write_shard(
    path: Path,
    blobs: Mapping[str, tuple[int, int]],
    blob: BlobSource,
    progress: Callable[[str, int], None],
    create: Callable[[Path], AbstractContextManager[BinaryIO]] = atomic_file,
) -> None:
    """Write one file of blobs, streaming.

    Args:
        path: the file.
        blobs: name in the file to (size, layer index).
        blob: gives the chunks of a layer.
        progress: called after each blob with its name and the bytes of blobs written to this file so far.
        create: opens the file for writing.

    Raises:
        FormatError: a blob turns out to have another size than announced; the file is not created.
    """
    header, order = build_header((name, "U8", (size,)) for name, (size, _) in blobs.items())
    done = 0
    with create(path) as file:
        file.write(header)
        for name in order:
            size, index = blobs[name]
            written = 0
            for chunk in blob(index):
                file.write(chunk)
                written += memoryview(chunk).nbytes
            if written != size:
                raise FormatError(
                    "layer changed while it was written", layer=name, expected=f"{size} bytes", got=written
                )
            done += written
            progress(name, done)
