"""A GGUF file at a glance: its metadata, its types, a row for every tensor. Only its head is read."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from uqff.checkpoints.gguf.files import is_gguf
from uqff.container.shards import SUFFIX, PathLike, at_hand
from uqff.errors import UnsupportedError, UqffError
from uqff.gguf.reader import GgufFile, open_gguf
from uqff.gguf.schema import Array, Value
from uqff.hub.client import RemoteFolder, Unreachable
from uqff.hub.names import hub_name
from uqff.inspection.document import SCHEMA, totals_document, types_document
from uqff.inspection.remote import gguf_looked_into
from uqff.inspection.summary import FileRow, Totals
from uqff.inspection.values import json_value

__all__ = ["GgufSummary", "ListedArray", "TensorRow", "gguf_document", "gguf_meant", "inspect_gguf", "summarize_gguf"]

LISTED: Final = 8
"""Elements of an array of metadata that are listed."""


@dataclass(frozen=True)
class ListedArray:
    """An array of metadata: the type of its elements, how many there are, and the first ones."""

    type: str
    count: int
    first: tuple[Any, ...]


@dataclass(frozen=True)
class TensorRow:
    """A tensor.

    Attributes:
        name: of the tensor.
        type: as UQFF or else ggml spells it.
        shape: in elements, outermost first.
        path: of the file that holds it.
        offset: from the start of that file.
        nbytes: of its blocks; None of a type that is not read.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    path: str
    offset: int
    nbytes: int | None

    @property
    def kind(self) -> str:
        """See :attr:`type`."""
        return self.type

    @property
    def weights(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def payload_bytes(self) -> int:
        """Bytes of its blocks; 0 of a type that is not read."""
        return self.nbytes or 0


@dataclass(frozen=True)
class GgufSummary(Totals):
    """A GGUF file: its files, the version of the format, its metadata, its tensors in their order."""

    files: tuple[FileRow, ...]
    version: int
    metadata: dict[str, Any]
    tensors: tuple[TensorRow, ...]

    @property
    def stored(self) -> list[TensorRow]:
        """The tensors of types that are read."""
        return [row for row in self.tensors if row.nbytes is not None]


def inspect_gguf(path: PathLike, *, isq: str | None = None) -> GgufSummary:
    """What is in a GGUF file; ``uqff inspect`` shows it.

    Args:
        path: of a file, or of one of a split set; or the name of a repository on the hub, of which the head is read.
        isq: of several files there, the type of the one that is meant.

    Raises:
        UnsupportedError: no GGUF file.
        UqffError: it breaks a rule; or see :func:`uqff.inspection.remote.gguf_looked_into`.
        OSError: it cannot be read.
    """
    with gguf_looked_into(path, isq) as looked:
        if looked is None:
            raise UnsupportedError("no GGUF file", file=str(path))
        with open_gguf(looked.path) as file:
            return looked.shown(summarize_gguf(file))


def gguf_meant(path: PathLike) -> GgufSummary | None:
    """What is in a GGUF file, if a path or the name of a repository means one; None if it means something else.

    Raises:
        UqffError: see :func:`inspect_gguf`.
        OSError: see :func:`inspect_gguf`.
    """
    name = hub_name(path)
    if name is None:
        return inspect_gguf(path) if is_gguf(path) and Path(path).suffix != SUFFIX else None
    if name.file is not None:
        return inspect_gguf(path) if name.file.endswith(".gguf") else None
    try:
        names = list(RemoteFolder(name).files)
    except Unreachable:
        with contextlib.suppress(UqffError):  # what else the cache has, whoever opens it says
            found = at_hand(path)
            return inspect_gguf(found) if is_gguf(found) else None
        return None
    has_models = any(each.endswith(SUFFIX) for each in names)
    return None if has_models or not any(each.endswith(".gguf") for each in names) else inspect_gguf(path)


def summarize_gguf(file: GgufFile) -> GgufSummary:
    """What the head of an open file says.

    Raises:
        FormatError: a text of the metadata that is listed is not UTF-8.
    """
    rows = tuple(
        TensorRow(
            tensor.name,
            tensor.type_name,
            tensor.shape,
            str(tensor.file.path),
            tensor.begin,
            None if tensor.ggml_type is None else tensor.nbytes,
        )
        for tensor in file.values()
    )
    counts = {str(path): 0 for path in file.paths}
    for row in rows:
        counts[row.path] += 1
    files = tuple(FileRow(str(path), path.stat().st_size, counts[str(path)]) for path in file.paths)
    return GgufSummary(files, file.version, {key: _listed(value) for key, value in file.pairs.items()}, rows)


def _listed(value: Value) -> Any:
    array = value.value
    if not isinstance(array, Array):
        return array
    return ListedArray(array.type.name.lower(), array.count, tuple(array.values(LISTED)))


def gguf_document(summary: GgufSummary) -> dict[str, Any]:
    """A file as a JSON object, described in ``docs/pages/reference/inspect-json.md``."""
    return {
        "schema": SCHEMA,
        "generation": "gguf",
        "version": summary.version,
        "files": [{"path": f.path, "bytes": f.nbytes, "tensors": f.layers} for f in summary.files],
        "metadata": {key: _metadata(value) for key, value in summary.metadata.items()},
        "totals": {
            "tensors": len(summary.tensors),
            **totals_document(summary),
        },
        "types": types_document(summary, "tensors"),
        "tensors": [
            {
                "name": row.name,
                "type": row.type,
                "shape": list(row.shape),
                "weights": row.weights,
                "file": row.path,
                "offset": row.offset,
                "bytes": row.nbytes,
            }
            for row in summary.tensors
        ],
    }


def _metadata(value: Any) -> Any:
    if isinstance(value, ListedArray):
        return {"type": value.type, "count": value.count, "first": [_metadata(each) for each in value.first]}
    return value if isinstance(value, (str, bool)) else json_value(value)
