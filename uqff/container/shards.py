"""Which files make up a model: one file, a set of shards ``<stem>-N.uqff``, a list, a directory.

A directory may hold several models, one for each type asked for. ``DIR:TYPE`` is the one of that type.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from uqff.errors import ShardError
from uqff.limits import MAX_SHARDS

__all__ = [
    "NUMBERED",
    "SUFFIX",
    "PathLike",
    "models_in",
    "resolve",
    "select",
    "shard_name",
    "shard_names",
    "stays_inside",
    "stem_of",
]

SUFFIX = ".uqff"
NUMBERED = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{1,6})\.uqff", re.DOTALL)

PathLike = str | os.PathLike[str]


def shard_name(stem: str, number: int) -> str:
    """The file name of a shard."""
    return f"{stem}-{number}{SUFFIX}"


def shard_names(directory: Path, stem: str, count: int) -> list[Path]:
    """The files of a set of shards."""
    return [directory / shard_name(stem, number) for number in range(count)]


def resolve(path: PathLike | Sequence[PathLike], isq: str | None = None) -> tuple[list[Path], bool]:
    """The files of a model, in shard order, and whether they are a complete set as far as names can tell.

    Args:
        path: a ``.uqff`` file (its siblings are found), a list of files (taken as it is), or a directory that holds one
            set; or ``DIR:TYPE``.
        isq: see :func:`select`; no list has one.

    Returns:
        The files, and False if the only file found bears a number other than 0 (its content must tell).

    Raises:
        ShardError: a gap in a set, two files of one number, or a directory with none or several sets.
        FileNotFoundError: there is no such file.
    """
    if not isinstance(path, (str, os.PathLike)):
        paths = [Path(p) for p in path]
        if not paths:
            raise ShardError("empty list of files")
        if isq is not None:
            raise ShardError("a list of files is one model: there is nothing to select", got=isq)
        return paths, True
    path = select(path, isq)
    if path.is_dir():
        return _resolve_directory(path)
    match = NUMBERED.fullmatch(path.name)
    if match is None:
        return [path], True
    return _resolve_set(path.parent, match["stem"])


def select(path: PathLike, isq: str | None = None) -> Path:
    """The model that is meant: one of its files if one of several is chosen, else the path as it is.

    Args:
        path: a directory, a ``.uqff`` file, or ``DIR:TYPE`` where nothing is of that very name.
        isq: the type, for a path that names none: the stem of the model's files in upper or lower case, or the end of
            it after ``-``, ``.`` or ``_``.

    Raises:
        ShardError: no model of that type, or several.
        FileNotFoundError: there is no such file or directory.
    """
    place = Path(path)
    if not place.exists():
        before, colon, after = os.fspath(path).rpartition(":")
        if not (colon and before and after and Path(before).exists()):
            raise FileNotFoundError(f"no such file or directory: {place}")
        place, isq = Path(before), after
    if isq is None:
        return place
    models = models_in(place) if place.is_dir() else {stem_of(place.name): place}
    ends = tuple(f"{mark}{isq.lower()}" for mark in ("-", ".", "_"))
    for rule in (isq.__eq__, lambda name: name.lower() == isq.lower(), lambda name: name.lower().endswith(ends)):
        found = {name: one for name, one in models.items() if rule(name)}
        if len(found) > 1:
            raise ShardError("several models of that type", file=str(place), expected=", ".join(found), got=isq)
        if found:
            return found.popitem()[1]
    raise ShardError(
        "no model of that type", file=str(place), expected=" or ".join(models) or f"a {SUFFIX} file", got=isq
    )


def stem_of(name: str) -> str:
    """What the shards of a model have in common: a file name without number and suffix."""
    match = NUMBERED.fullmatch(name)
    return match["stem"] if match is not None else name.removesuffix(SUFFIX)


def stays_inside(path: Path) -> bool:
    """Whether a file lies where it is named: a link may lead to a file beside it, or into the store of the hub."""
    target, home = path.resolve(), path.parent.resolve()
    # huggingface_hub: snapshots/<commit>/<name> -> blobs/<hash>.
    return target.parent in (home, home.parent.parent / "blobs")


def models_in(directory: PathLike) -> dict[str, Path]:
    """The models of a directory, a type each as a rule: what :func:`select` calls them, and one of their files.

    Raises:
        OSError: the directory cannot be read.
    """
    with os.scandir(directory) as entries:
        names = sorted(entry.name for entry in entries if entry.name.endswith(SUFFIX) and entry.is_file())
    models: dict[str, Path] = {}
    for name in sorted(names, key=lambda name: NUMBERED.fullmatch(name) is None):
        if NUMBERED.fullmatch(name):
            models.setdefault(stem_of(name), Path(directory) / name)
        else:  # a file beside a set of the same stem has its whole name
            models[name if stem_of(name) in models else stem_of(name)] = Path(directory) / name
    return dict(sorted(models.items()))


def _resolve_directory(directory: Path) -> tuple[list[Path], bool]:
    models = models_in(directory)
    if not models:
        raise ShardError(f"no {SUFFIX} file in the directory", file=str(directory))
    if len(models) > 1:
        raise ShardError(
            f"several models in the directory: choose one, such as {directory}:{next(iter(models))}",
            file=str(directory),
            got=", ".join(models),
        )
    (path,) = models.values()
    match = NUMBERED.fullmatch(path.name)
    return ([path], True) if match is None else _resolve_set(directory, match["stem"])


def _resolve_set(directory: Path, stem: str) -> tuple[list[Path], bool]:
    shards: dict[int, Path] = {}
    with os.scandir(directory) as entries:
        names = [entry.name for entry in entries if entry.is_file()]
    for name in names:
        match = NUMBERED.fullmatch(name)
        if match is None or match["stem"] != stem:
            continue
        number = int(match["number"])
        if number in shards:
            raise ShardError("two shards of one number", file=str(directory / name), got=f"also {shards[number].name}")
        shards[number] = directory / name
    if not shards:
        raise ShardError("shards are not regular files", file=str(directory / shard_name(stem, 0)))
    if len(shards) > MAX_SHARDS:
        raise ShardError(
            "too many shards", file=str(directory), expected=f"at most {MAX_SHARDS}", got=f"{len(shards)} of {stem}"
        )
    missing = next(n for n in range(len(shards) + 1) if n not in shards)
    if missing == 0 and len(shards) == 1:
        return list(shards.values()), False
    if missing < len(shards):
        raise ShardError(
            "gap in a set of shards",
            file=str(directory / shard_name(stem, missing)),
            expected=f"shards 0 to {max(shards)}",
            got=f"no shard {missing}",
        )
    return [shards[number] for number in sorted(shards)], True
