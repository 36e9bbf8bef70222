"""Which files make up a model: one file, a set of shards ``<stem>-N.uqff``, a list, a directory.

A directory may hold several models, one for each type asked for. ``DIR:TYPE`` is the one of that type.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from uqff.container.document import is_present
from uqff.errors import FormatError, ShardError
from uqff.hub.fetch import fetch
from uqff.hub.names import NO_PROJECTOR, hub_name
from uqff.limits import MAX_SHARDS

__all__ = [
    "NUMBERED",
    "SUFFIX",
    "PathLike",
    "are_in_force",
    "at_hand",
    "models_in",
    "pending_directory",
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


def pending_directory(directory: Path, stem: str) -> Path:
    """Where those files of a new set of shards lie that are not in their places yet; there mostly is none."""
    return directory / f".{stem}.new"


def _in_force(path: Path) -> Path:
    """The file that counts in the place of a shard: of a set whose renaming was cut off, one that is pending."""
    match = NUMBERED.fullmatch(path.name)
    if match is None:
        return path
    pending = pending_directory(path.parent, match["stem"])
    return pending / path.name if not pending.is_symlink() and (pending / path.name).is_file() else path


def are_in_force(paths: Iterable[Path]) -> bool:
    """Whether files that :func:`resolve` gave are what it would give now, as far as a set is being renamed."""
    return all(path == _in_force(path.parent.parent / path.name if _is_pending(path) else path) for path in paths)


def _is_pending(path: Path) -> bool:
    match = NUMBERED.fullmatch(path.name)
    return match is not None and path.parent.name == f".{match['stem']}.new"


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
        return list(map(_in_force, paths)), True
    path = select(at_hand(path, isq), isq)
    if path.is_dir():
        return _resolve_directory(path)
    match = NUMBERED.fullmatch(path.name)
    if match is None:
        return [path], True
    return _resolve_set(path.parent, match["stem"])


def select(path: PathLike, isq: str | None = None, *, mmproj: PathLike | None = NO_PROJECTOR) -> Path:
    """The model that is meant: one of its files if one of several is chosen, else the path as it is.

    Args:
        path: a directory, a ``.uqff`` file, or ``DIR:TYPE`` where nothing is of that very name; or the name of a
            repository of the hub, of which what is meant is fetched.
        isq: the type, for a path that names none: the stem of the model's files in upper or lower case, or the end of
            it after ``-``, ``.`` or ``_``.
        mmproj: see :func:`uqff.hub.fetch.fetch`.

    Raises:
        ShardError: no model of that type, or several.
        FileNotFoundError: there is no such file or directory.
    """
    place = Path(at_hand(path, isq, several=True, mmproj=mmproj))
    if not place.exists():
        before, colon, after = os.fspath(path).rpartition(":")
        if not (colon and before and after and Path(before).exists()):
            raise FileNotFoundError(f"no such file or directory: {place}")
        place, isq = Path(before), after
    if isq is None:
        return place
    return _of_type(models_in(place) if place.is_dir() else {stem_of(place.name): place}, isq, str(place))


_File = TypeVar("_File", Path, str)


def _of_type(models: Mapping[str, _File], isq: str, where: str) -> _File:
    """The one of several models that a type means."""
    ends = tuple(f"{mark}{isq.lower()}" for mark in ("-", ".", "_"))
    for rule in (isq.__eq__, lambda name: name.lower() == isq.lower(), lambda name: name.lower().endswith(ends)):
        found = {name: one for name, one in models.items() if rule(name)}
        if len(found) > 1:
            raise ShardError("several models of that type", file=where, expected=", ".join(found), got=isq)
        if found:
            return found.popitem()[1]
    raise ShardError("no model of that type", file=where, expected=" or ".join(models) or f"a {SUFFIX} file", got=isq)


def at_hand(
    path: PathLike, isq: str | None = None, *, several: bool = False, mmproj: PathLike | None = NO_PROJECTOR
) -> PathLike:
    """A path as it is; of what names a repository of the Hugging Face hub, the path under which it has been fetched.

    Args:
        path: a path, or the name of a repository, see :mod:`uqff.hub.names`.
        isq: of several models or GGUF files, the type of the one that is meant, for a name without one.
        several: whether all may be meant if none is named; else that is refused before any is fetched.
        mmproj: see :func:`uqff.hub.fetch.fetch`.

    Returns:
        A directory, of one model or, if several may be meant, of all; else one of its files; or a GGUF file.

    Raises:
        HubError: the hub did not give it.
        ShardError: no model of that type, or several and none is named.
    """
    name = hub_name(path)
    if name is None:
        return path
    meant = name.of(isq)

    def choose(names: Collection[str]) -> list[str]:
        if name.file is not None:
            stem, is_set = stem_of(name.file), NUMBERED.fullmatch(name.file) is not None
            return [each for each in names if each == name.file or (is_set and _is_of_set(each, stem))]
        models = _models_of(each for each in names if each.endswith(SUFFIX))
        if meant.kind is not None and models:
            models = {"": _of_type(models, meant.kind, str(name))}
        elif len(models) > 1 and not several:
            raise _several(models, str(name))
        single = {each for each in models.values() if NUMBERED.fullmatch(each) is None}
        stems = {stem_of(each) for each in models.values() if each not in single}
        return [each for each in names if each in single or any(_is_of_set(each, stem) for stem in stems)]

    found = fetch(name, choose, isq, mmproj)
    if meant.kind is None or not found.is_dir():
        return found
    models = models_in(found)  # of the files that are here: if the hub could not be asked, nothing was chosen
    return _of_type(models, meant.kind, str(name)) if models or name.kind is not None else found


def _is_of_set(name: str, stem: str) -> bool:
    match = NUMBERED.fullmatch(name)
    return match is not None and match["stem"] == stem


def stem_of(name: str) -> str:
    """What the shards of a model have in common: a file name without number and suffix."""
    match = NUMBERED.fullmatch(name)
    return match["stem"] if match is not None else name.removesuffix(SUFFIX)


def stays_inside(path: Path) -> bool:
    """Whether a file lies where it is named: a link may lead to a file beside it, or into the store of the hub."""
    store, home = path.resolve().parent, path.parent.resolve()
    if store == home:
        return True
    # huggingface_hub: snapshots/<commit>/<path> -> blobs/<hash>, and from there it may go on to ../blobs/<xx>/<hash>,
    # which several repositories share.
    owner = next((each.parent for each in home.parents if each.name == "snapshots"), None)
    return owner is not None and (store == owner / "blobs" or store.parent == owner.parent / "blobs")


def check_inside(path: Path) -> None:
    """Refuse a link whose target would be published in its place.

    Raises:
        FormatError: it leads out of the directory, see :func:`stays_inside`.
    """
    if path.is_symlink() and not stays_inside(path):
        raise FormatError("link out of the directory", file=str(path), got=path.resolve())


def models_in(directory: PathLike) -> dict[str, Path]:
    """The models of a directory, a type each as a rule: what :func:`select` calls them, and one of their files.

    Raises:
        OSError: the directory cannot be read.
    """
    with os.scandir(directory) as entries:
        names = [entry.name for entry in entries if entry.name.endswith(SUFFIX) and _is_file(entry)]
    return {model: Path(directory) / name for model, name in _models_of(names).items()}


def _models_of(names: Iterable[str]) -> dict[str, str]:
    """The models that files belong to, each with one of its files."""
    models: dict[str, str] = {}
    for name in sorted(names, key=lambda name: (NUMBERED.fullmatch(name) is None, name)):
        if NUMBERED.fullmatch(name):
            models.setdefault(stem_of(name), name)
        else:  # a file beside a set of the same stem has its whole name
            models[name if stem_of(name) in models else stem_of(name)] = name
    return dict(sorted(models.items()))


def _several(models: Iterable[str], where: str) -> ShardError:
    names = list(models)
    return ShardError(
        f"several models in the directory: choose one, such as {where}:{names[0]}", file=where, got=", ".join(names)
    )


def _resolve_directory(directory: Path) -> tuple[list[Path], bool]:
    models = models_in(directory)
    if not models:
        raise ShardError(f"no {SUFFIX} file in the directory", file=str(directory), got=_others(directory))
    if len(models) > 1:
        raise _several(models, str(directory))
    (path,) = models.values()
    match = NUMBERED.fullmatch(path.name)
    return ([path], True) if match is None else _resolve_set(directory, match["stem"])


def _files(directory: Path, stem: str) -> list[str]:
    """Names of the shards of a set in a directory."""
    with os.scandir(directory) as entries:
        return [entry.name for entry in entries if _is_of_set(entry.name, stem) and _is_file(entry)]


def _is_file(entry: os.DirEntry[str]) -> bool:
    """Whether a shard is a file; a directory of such a name is none, nor is a link to what a cache has removed.

    Raises:
        FormatError: a pipe or a device: passed over, it would make a set of fewer shards, which nothing in an older one
            tells from a whole set.
    """
    return entry.is_file() or is_present(Path(entry))


def _others(directory: Path) -> str | None:
    """What a directory without a model holds, if there are commands that take it."""
    names = [entry.name for entry in os.scandir(directory)]
    if any(name.endswith(".gguf") for name in names):
        return "a GGUF file, which uqff inspect, plan, convert, quantize and run take"
    if any(name.endswith(".safetensors") and name != "residual.safetensors" for name in names):
        return "a checkpoint, which uqff plan, quantize and run take"
    return None


def _resolve_set(directory: Path, stem: str) -> tuple[list[Path], bool]:
    shards: dict[int, Path] = {}
    places = [directory]
    pending = pending_directory(directory, stem)
    if pending.is_dir() and not pending.is_symlink():
        places.append(pending)
    names = {name for place in places for name in _files(place, stem)}
    for name in names:
        number = int(name[len(stem) + 1 : -len(SUFFIX)])
        if number in shards:
            raise ShardError(
                "two shards of one number",
                rule="FILE-17",
                file=str(directory / name),
                got=f"also {shards[number].name}",
            )
        shards[number] = _in_force(directory / name)
    if not shards:
        raise ShardError("shards are not regular files", file=str(directory / shard_name(stem, 0)))
    if len(shards) > MAX_SHARDS:
        raise ShardError(
            "too many shards",
            rule="FILE-21",
            file=str(directory),
            expected=f"at most {MAX_SHARDS}",
            got=f"{len(shards)} of {stem}",
        )
    missing = next(n for n in range(len(shards) + 1) if n not in shards)
    if missing == 0 and len(shards) == 1:
        return list(shards.values()), False
    if missing < len(shards):
        raise ShardError(
            "gap in a set of shards",
            rule="FILE-17",
            file=str(directory / shard_name(stem, missing)),
            expected=f"shards 0 to {max(shards)}",
            got=f"no shard {missing}",
        )
    return [shards[number] for number in sorted(shards)], True
