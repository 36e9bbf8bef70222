"""What is in a model, or in one layer of it: :func:`inspect`."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import overload

from uqff.container.file import UqffFile, open_uqff
from uqff.container.shards import PathLike, models_in, select
from uqff.errors import UnsupportedError, printable
from uqff.inspection.layer import RAW_BYTES, LayerReport, report_layer
from uqff.inspection.remote import Looked, looked_into
from uqff.inspection.summary import FileSummary, module_names, summarize
from uqff.progress import Progress, Steps

__all__ = ["find_layer", "inspect", "inspect_layer", "inspect_models"]


class NoSuchLayer(UnsupportedError):
    """A layer was asked for that the model does not have."""


LONGEST_KEY = 200
"""Characters of a mistyped key that are compared with those that there are."""


@overload
def inspect(
    path: PathLike, key: None = None, *, isq: str | None = None, progress: Progress | None = None
) -> FileSummary: ...


@overload
def inspect(
    path: PathLike,
    key: str | int,
    *,
    isq: str | None = None,
    statistics: bool = True,
    dump: bool = False,
    limit: int = RAW_BYTES,
    progress: Progress | None = None,
) -> LayerReport: ...


def inspect(
    path: PathLike,
    key: str | int | None = None,
    *,
    isq: str | None = None,
    statistics: bool = True,
    dump: bool = False,
    limit: int = RAW_BYTES,
    progress: Progress | None = None,
) -> FileSummary | LayerReport:
    """What is in a model, or in one layer of it; ``uqff inspect`` shows it.

    Only headers and small fields are read; a layer's payload for its statistics and its dump alone.

    Args:
        path: what :func:`uqff.open` takes. Of a model on the hub, headers and small fields are read by ranges, and the
            bytes of the one layer that is asked for.
        key: of a layer: its path, or its index in the order of the file. The model as a whole if None.
        isq: of a directory with several models, the type of the one that is meant.
        statistics: dequantise the layer's weight and measure it; imports torch.
        dump: make the annotated dump of the layer's bytes.
        limit: bytes of each field in the dump; 0 for all.
        progress: called after each layer, see :class:`uqff.progress.Step`.

    Returns:
        The summary of the model: versions, shards, types, bits per weight, a row for each layer, those that are broken
        among them. Of a layer: its row, every field with offset, size, type and value, statistics and dump.

    Raises:
        UqffError: the container breaks a rule, or there is no such layer.
        OSError: a file cannot be read.

    >>> summary = uqff.inspect("model")
    >>> summary.generation, [(row.layers, row.kind) for row in summary.types]
    ('1.x', [(28, 'q4k'), (1, 'q6k')])
    >>> [field.path for field in uqff.inspect("model", 3).fields]
    ['weight.dtype', 'weight.shape', 'weight', 'weight.format']
    """
    with looked_into(path, isq) as looked:
        if key is None:
            with open_uqff(looked.path, isq=looked.isq) as file:
                return looked.shown(summarize(file, progress=progress))
        report = inspect_layer(looked, key, statistics=statistics, dump=dump, limit=limit)
        if progress is not None:
            Steps(progress, "inspect", 1, report.row.nbytes, "bytes").add(report.row.key, report.row.nbytes)
        return looked.shown(report)


def inspect_layer(looked: Looked, key: str | int, *, statistics: bool, dump: bool, limit: int) -> LayerReport:
    """One layer of a model that is looked into; arguments as for :func:`inspect`. Of one on the hub, it is read now."""
    with open_uqff(looked.path, isq=looked.isq) as file:
        found = find_layer(file, key)
        if not looked.remote:
            return report_layer(file, found, statistics=statistics, dump=dump, limit=limit)
    looked.read_layer(found, limit=0 if statistics or (dump and not limit) else max(RAW_BYTES, limit))
    with open_uqff(looked.path) as file:
        return report_layer(file, found, statistics=statistics, dump=dump, limit=limit)


def inspect_models(path: PathLike) -> dict[str, Path]:
    """The models of a directory by the names that choose them, if it has several; else none.

    Args:
        path: a directory, a file, or ``DIR:TYPE``.
    """
    chosen = select(path)
    models = models_in(chosen) if chosen.is_dir() else {}
    return models if len(models) > 1 else {}


def find_layer(file: UqffFile, key: str | int) -> str:
    """The key of a layer that is called by its key, by its path in the model, or by its index.

    Raises:
        NoSuchLayer: there is none; those that there are, and the nearest name, are told.
    """
    found = file.find(key) if isinstance(key, int) else key if key in file else None
    names = {name: one for one, name in module_names(file).items()}
    text = str(key)
    if found is None and text in names:
        found = names[text]
    if found is None and text.isascii() and text.isdecimal() and len(text) < 10:
        found = file.find(int(text))
    if found is not None:
        return found
    keys = list(file)
    known = f"{keys[0]} to {keys[-1]}, {len(keys)} layers" if keys else "none at all"
    close = get_close_matches(text[:LONGEST_KEY], names or keys, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise NoSuchLayer(printable(f"no layer {text}; there are: {known}{hint}"), file=str(file.paths[0]))
