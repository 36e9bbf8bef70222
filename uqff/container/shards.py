"""Which files make up a model: one file, a set of shards ``<stem>-N.uqff``, a list, a directory."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from uqff.errors import ShardError
from uqff.limits import MAX_SHARDS

__all__ = ["NUMBERED", "SUFFIX", "PathLike", "models_in", "resolve", "shard_name"]

SUFFIX = ".uqff"
NUMBERED = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{1,6})\.uqff", re.DOTALL)

PathLike = str | os.PathLike[str]


def shard_name(stem: str, number: int) -> str:
    """The file name of a shard."""
    return f"{stem}-{number}{SUFFIX}"


def resolve(path: PathLike | Sequence[PathLike]) -> tuple[list[Path], bool]:
    """The files of a model, in shard order, and whether they are a complete set as far as names can tell.

    Args:
        path: a ``.uqff`` file (its siblings are found), a list of files (taken as it is), or a directory that holds one
            set.

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
        return paths, True
    path = Path(path)
    if path.is_dir():
        return _resolve_directory(path)
    if not path.exists():
        raise FileNotFoundError(f"no such file or directory: {path}")
    match = NUMBERED.fullmatch(path.name)
    if match is None:
        return [path], True
    return _resolve_set(path.parent, match["stem"])


def models_in(directory: PathLike) -> dict[str, Path]:
    """The models of a directory, a type each as a rule: ``<stem>-N.uqff`` or a file's name, and one of its files.

    Raises:
        OSError: the directory cannot be read.
    """
    with os.scandir(directory) as entries:
        names = sorted(entry.name for entry in entries if entry.name.endswith(SUFFIX) and entry.is_file())
    models: dict[str, Path] = {}
    for name in names:
        match = NUMBERED.fullmatch(name)
        models.setdefault(match["stem"] + "-N" + SUFFIX if match else name, Path(directory) / name)
    return dict(sorted(models.items()))


def _resolve_directory(directory: Path) -> tuple[list[Path], bool]:
    models = models_in(directory)
    if not models:
        raise ShardError(f"no {SUFFIX} file in the directory", file=str(directory))
    if len(models) > 1:
        raise ShardError(
            "several models in the directory: name one of the files", file=str(directory), got=", ".join(models)
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
