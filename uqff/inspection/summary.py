"""A model at a glance: its files, its types, a row for every layer. A broken layer is a row with an error."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from uqff.codes import Version
from uqff.container import UqffFile
from uqff.container.document import is_present
from uqff.container.file import RESIDUAL_NAME
from uqff.errors import UqffError
from uqff.inspection.meta import LayerMeta, read_meta
from uqff.models.layouts import WeightLayout, layout_beside
from uqff.models.modules import config_beside, modules_of
from uqff.progress import Progress, Steps
from uqff.schema.bricks import FieldTrace

__all__ = [
    "CountedWeight",
    "ExtraRow",
    "FileRow",
    "FileSummary",
    "LayerRow",
    "ResidualRow",
    "Totals",
    "TypeRow",
    "layer_row",
    "module_names",
    "summarize",
]


@dataclass(frozen=True)
class FileRow:
    """A shard: path as opened, size in bytes, number of layers."""

    path: str
    nbytes: int
    layers: int


@dataclass(frozen=True)
class ResidualRow:
    """``residual.safetensors``: path, size in bytes, number of tensors, or what is wrong with it."""

    path: str
    nbytes: int
    tensors: int
    error: UqffError | None = None


@dataclass(frozen=True)
class TypeRow:
    """All layers of one type taken together."""

    kind: str
    layers: int
    weights: int
    payload_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, without framing and bias."""
        return 8 * self.payload_bytes / self.weights


@dataclass(frozen=True)
class LayerRow:
    """One layer.

    Attributes:
        key: as in the file.
        index: the number that the key stands for; None in 1.x.
        path: file that holds the blob, in 1.x the entry ``weight``.
        offset: of the blob or that entry, from the start of that file.
        nbytes: of the blob, or of all entries.
        module: path of the weight in the model, if the ``config.json`` beside a 0.x file tells; None in 1.x, whose keys
            are paths.
        meta: what the blob holds; None if it is broken.
        error: what is wrong with it, if anything.
    """

    key: str
    index: int | None
    path: str
    offset: int
    nbytes: int
    meta: LayerMeta | None
    error: UqffError | None = None
    module: str | None = None

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per weight, without framing and bias."""
        return None if self.meta is None else 8 * self.meta.payload_bytes / self.meta.weights


@dataclass(frozen=True)
class ExtraRow:
    """An entry of a 1.x file that belongs to no layer: readers of the format ignore it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class CountedWeight(Protocol):
    """A weight that is counted."""

    @property
    def kind(self) -> str:
        """Its type."""

    @property
    def weights(self) -> int:
        """Number of elements."""

    @property
    def payload_bytes(self) -> int:
        """What they take, without framing and biases."""


class Totals:
    """What the weights of a model take together, by their types too.

    Attributes:
        files: of the model.
    """

    files: tuple[FileRow, ...]

    @property
    @abstractmethod
    def stored(self) -> Sequence[CountedWeight]:
        """The weights that could be read."""

    @property
    def types(self) -> list[TypeRow]:
        """The types that occur, most weights first."""
        by_kind: dict[str, list[CountedWeight]] = {}
        for each in self.stored:
            by_kind.setdefault(each.kind, []).append(each)
        rows = [
            TypeRow(kind, len(group), sum(o.weights for o in group), sum(o.payload_bytes for o in group))
            for kind, group in by_kind.items()
        ]
        return sorted(rows, key=lambda row: (-row.weights, row.kind))

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(file.nbytes for file in self.files)

    @property
    def weights(self) -> int:
        """Number of weights of what could be read."""
        return sum(each.weights for each in self.stored)

    @property
    def payload_bytes(self) -> int:
        """Stored bytes of the same, without framing and biases."""
        return sum(each.payload_bytes for each in self.stored)

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits per weight over all of them; None if there is none."""
        return 8 * self.payload_bytes / self.weights if self.weights else None


@dataclass(frozen=True)
class FileSummary(Totals):
    """A model: its files, its layers in the order of their keys, whatever else its files hold, and how its rows lie."""

    files: tuple[FileRow, ...]
    metadata: dict[str, str]
    layers: tuple[LayerRow, ...]
    residual: ResidualRow | None
    generation: str
    extra: tuple[ExtraRow, ...] = ()
    layout: WeightLayout = field(default_factory=WeightLayout)

    @property
    def metas(self) -> list[LayerMeta]:
        """Of the layers that are not broken."""
        return [row.meta for row in self.layers if row.meta is not None]

    @property
    def broken(self) -> list[LayerRow]:
        """The layers that could not be read."""
        return [row for row in self.layers if row.error is not None]

    @property
    def versions(self) -> list[Version]:
        """Every version that occurs among the readable blobs, ascending."""
        return sorted({meta.version for meta in self.metas})

    @property
    def stored(self) -> list[LayerMeta]:
        """See :class:`Totals`."""
        return self.metas


def summarize(file: UqffFile, *, progress: Progress | None = None) -> FileSummary:
    """Read every layer's fields, and no payload.

    Args:
        file: an open model.
        progress: called after each layer.
    """
    names = module_names(file)
    rows = []
    work = sum(place.nbytes for key in file for place in file.places(key).values()) if progress is not None else 0
    steps = Steps(progress, "inspect", len(file), work, "bytes")
    for key in file:
        row = replace(layer_row(file, key), module=names.get(key))
        rows.append(row)
        steps.add(key, row.nbytes)
    layers = tuple(rows)
    counts = {str(path): 0 for path in file.paths}
    for row in layers:
        counts[row.path] += 1
    files = tuple(FileRow(str(path), path.stat().st_size, counts[str(path)]) for path in file.paths)
    entries = map(file.extra.entry, file.extra)
    extra = tuple(ExtraRow(entry.name, entry.dtype, entry.shape) for entry in entries)
    rest = _residual_row(file)
    return FileSummary(files, dict(file.metadata), layers, rest, file.generation, extra, _layout(file))


def _layout(file: UqffFile) -> WeightLayout:
    """What the configuration says; a broken one, which :func:`uqff.inspection.verify.verify` reports, says nothing."""
    try:
        return layout_beside(file)
    except (UqffError, OSError):
        return WeightLayout()


def module_names(file: UqffFile) -> dict[str, str]:
    """Paths of the weights of a 0.x file by key, if the ``config.json`` beside it tells; else none."""
    if file.generation != "0.x":
        return {}
    try:
        modules = modules_of(file, config_beside(file))
    except (UqffError, OSError):
        return {}
    named = (module for module in modules if module.parts)
    return {
        key: part.module if len(module.keys) > 1 else module.path
        for module in named
        for key, part in zip(module.keys, module.parts, strict=False)
    }


def layer_row(file: UqffFile, key: str, *, trace: list[FieldTrace] | None = None) -> LayerRow:
    """The row of one layer.

    Args:
        file: an open model.
        key: key of a layer in it.
        trace: a list that receives the fields with their places, up to the first broken one.
    """
    place = file.place(key)
    meta, error = None, None
    try:
        meta = read_meta(file, key, trace=trace)
    except UqffError as exc:
        error = exc
    index = int(key) if file.generation == "0.x" else None
    nbytes = sum(one.nbytes for one in file.places(key).values())
    return LayerRow(key, index, str(place.path), place.offset, nbytes, meta, error)


def _residual_row(file: UqffFile) -> ResidualRow | None:
    path = file.paths[0].parent / RESIDUAL_NAME
    if not is_present(path):
        return None
    try:
        return ResidualRow(str(path), path.stat().st_size, len(file.residual))
    except UqffError as error:
        return ResidualRow(str(path), path.stat().st_size, 0, error)
