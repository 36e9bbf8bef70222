"""Writing a mapping of layers, such as an open file, in the engine's own container bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uqff.codec.blob import LATEST
from uqff.codec.layer import Writable
from uqff.codes import ENTRY_VERSIONS, Version
from uqff.container.atomic import atomic_files, settle
from uqff.container.file import UqffFile
from uqff.container.mapped import TensorMap
from uqff.container.plan import SHARD_BYTES, plan_files
from uqff.container.shards import NUMBERED, PathLike, pending_directory, shard_name
from uqff.container.writer import LayerWriter
from uqff.errors import FormatError, ShardError
from uqff.progress import Progress, Steps
from uqff.schema.entries import RawTensor

__all__ = ["save", "shard_paths"]

NUMERIC = re.compile(r"\s*[+-]?\d+\s*")
"""A key that was meant as a number, well written or not; no weight has such a path."""


def save(
    layers: Mapping[Any, Writable],
    path: PathLike,
    *,
    version: str | tuple[int, int, int] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> list[Path]:
    """Write a ``.uqff`` file, or several if it grows beyond ``shard_bytes``.

    The keys of ``layers`` say which generation: paths of weights are 1.x, which current engines read, numbers are 0.x.
    To turn one into the other needs the model's configuration: :func:`uqff.migration.migrate` does.

    One layer is held at a time: a lazy mapping (such as an open file) is asked for each layer twice, first for its
    size, then for its bytes.  What an open 1.x file holds besides its layers is saved too.  Files are written under
    temporary names, flushed, and renamed when all are complete: a failure leaves an older set of the same name as it
    was.  A process that is killed while a set is renamed leaves a directory ``.<stem>.new`` with the rest of it, where
    :func:`uqff.open` finds it; the next ``save`` of that set brings the renaming to an end.

    Args:
        layers: to layers, from their indices (``int`` or decimal text) for 0.x, from the paths of their weights
            (``"model.layers.0.mlp.up_proj"``, ...) for 1.x.
        path: the file to write. If there is one shard it is written under this name; if there are more, shard N is
            named ``<stem>-N.uqff`` (a stem that ends in ``-0`` is taken without it).
        version: to write, 0.1.0 to 0.2.0, or 1.0.0 to 1.2.0, as a tuple or as text, with keys of that generation; if
            None, that of an open file, else the newest that has such keys: 0.2.0 or 1.2.0.
        shard_bytes: payload after which a new shard begins; a larger single layer (1.x: entry) still gets a shard of
            its own. A 1.x layer may be cut between two shards, as the engine does.
        progress: called after each layer.

    Returns:
        The files written.

    Raises:
        UqffError: a layer cannot be expressed in ``version``, a key is none of that generation, or a shard of an older
            set of the same name would stay behind.
        OSError: writing failed; no half-written file stays.

    >>> import numpy
    >>> weight = uqff.quantize(numpy.eye(32, dtype="f4"), "q8_0")
    >>> [path.name for path in uqff.save({"model.layers.0.mlp.up_proj": weight}, "layer.uqff")]
    ['layer.uqff']
    """
    if isinstance(version, str):
        version = Version.of(version)
    version = _version_of(layers) if version is None else Version(*version)
    plan = plan_files(layers, version, shard_bytes, extra=_extra(layers))
    pending = pending_directory(Path(path).parent, _stem(Path(path))[0])
    settle(pending)
    paths = shard_paths(Path(path), len(plan.shards))
    steps = Steps(progress, "save", len(plan.layers), plan.nbytes, "bytes")
    with atomic_files(pending) as stage, LayerWriter(plan, [stage(each) for each in paths]) as writer:
        for name, key in plan.keys.items():
            writer.write(name, layers[key])
            steps.add(name, plan.size(name))
        writer.finish()
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


def _extra(layers: Mapping[Any, Any]) -> dict[str, RawTensor]:
    """What an open file holds besides its layers: :attr:`uqff.UqffFile.extra`."""
    extra = getattr(layers, "extra", None)
    if not isinstance(extra, TensorMap):
        return {}
    return {name: RawTensor(extra.entry(name).dtype, extra.entry(name).shape, extra.raw(name)) for name in extra}


def _stem(path: Path) -> tuple[str, bool]:
    """What the names of a set's shards begin with, and whether the path is that of shard 0."""
    match = NUMBERED.fullmatch(path.name)
    first = match is not None and int(match["number"]) == 0
    return (match["stem"] if match is not None and first else path.name.removesuffix(".uqff")), first


def shard_paths(path: Path, count: int) -> list[Path]:
    """The file names of a set of ``count`` shards; refuses if other shards of that name would stay beside them."""
    stem, first = _stem(path)
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
