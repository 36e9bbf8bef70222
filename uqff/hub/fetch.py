"""Fetching what is needed of a repository into the hub's cache: a model, a checkpoint, a GGUF file; nothing else of it.

What a repository holds decides what is fetched::

    *.uqff                   the shards of the models that are meant, their residual, and the documents
    *.safetensors            consolidated.safetensors where that is what is read, see uqff.consolidated; else
                             model.safetensors; or those of the index; or all: and the documents
    *.gguf                   the only one, or the one of the type that is meant; of a split one, all parts; and the
                             mmproj file beside it, where that is wanted

Files come from huggingface_hub's ``snapshot_download``: what is in the cache already is not fetched again, what broke
off is gone on with, and several processes wait for each other.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import itertools
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Final

from uqff._version import __version__
from uqff.bounded_json import parse_json
from uqff.consolidated import CONSOLIDATED_NAME, is_read_as_consolidated
from uqff.errors import FormatError, HubError, ShardError
from uqff.hub.client import RemoteFolder, Unreachable, hub_error, imported, passes, redacted_logs
from uqff.hub.names import GGUF_PART, NO_PROJECTOR, HubName, is_projector_name, several_projectors
from uqff.limits import MAX_HEADER_BYTES, MAX_HUB_FILES

__all__ = [
    "BARS",
    "INDEX",
    "Choice",
    "bars",
    "checkpoint_gguf",
    "checkpoint_weights",
    "fetch",
    "no_models",
    "projectors",
]

DOCUMENTS: Final = (".json", ".jinja", ".model")
"""Endings of what stands beside weights and is read with them."""

NAMED: Final = ("merges.txt", "vocab.txt", "metadata.gguf")
"""The others by name."""

SINGLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"

LOCAL_ERRORS: Final = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
"""What may go wrong with the hub's cache on this machine; anything else is the hub's answer."""

BARS: Final[ContextVar[bool]] = ContextVar("BARS", default=False)
"""Whether bars of progress may be shown on the terminal: the command line says so, nobody else."""

COMMIT: Final = re.compile(r"[0-9a-f]{40}")

Choice = Callable[[Collection[str]], Sequence[str]]
"""From the names of files to those of the models that are meant; none, if no file is of a model."""


def no_models(names: Collection[str]) -> list[str]:
    """The choice of one who wants a checkpoint, whatever else there is."""
    return []


def fetch(
    name: HubName, choose: Choice, isq: str | None = None, mmproj: str | os.PathLike[str] | None = NO_PROJECTOR
) -> Path:
    """Have what a name means on this machine.

    Args:
        name: of a repository, a folder or a file in it.
        choose: which of the files are the model's.
        isq: of several GGUF files, the type of the one that is meant, for a name without one.
        mmproj: beside a GGUF file, the one of this name, unless it is here; ``none`` for none. None: the only one, if
            there is one.

    Returns:
        The folder, or the file if one is named, or if it is a GGUF file; in the hub's cache.

    Raises:
        HubError: the hub did not give it; if it cannot be reached, the cache has it not.
        UqffError: there are several, and none was named.
        OSError: the cache cannot be written.
    """
    try:
        folder = RemoteFolder(name)
    except Unreachable as error:
        return _cached(name, error, isq)
    wanted, meant = _wanted(folder, choose, isq)
    if meant is not None and meant.endswith(".gguf"):
        wanted += projectors(folder, mmproj)
    directory = _download(name, [f"{name.folder}/{each}" if name.folder else each for each in wanted])
    if directory.name != folder.commit:
        raise HubError("the repository was changed while it was read", file=str(name), got=directory.name)
    home = directory / name.folder
    return home / meant if meant is not None else home


def _wanted(folder: RemoteFolder, choose: Choice, isq: str | None) -> tuple[list[str], str | None]:
    """The files that are to be fetched, and the one among them that is meant if it is one."""
    name, files = folder.name, folder.files
    if name.file is not None and name.file not in files:
        raise HubError("no such file in the repository", file=str(name))
    documents = [each for each in files if each.endswith(DOCUMENTS) or each in NAMED]
    if name.file is not None and not name.file.endswith(".uqff"):
        return [*documents, *_parts(name.file, files)], name.file
    models = choose(files)
    if models:
        beside = [each for each in files if each == "residual.safetensors" or each.endswith(".kept.safetensors")]
        return [*documents, *beside, *models], name.file
    weights, ggufs = _weights(folder), _ggufs(files)
    if weights and (name.kind is None or not ggufs):
        if name.kind is not None:
            raise ShardError("no model of that type", file=str(name), expected="a .uqff file", got=name.kind)
        return [*documents, *weights], None
    if not ggufs:
        raise HubError("no model in the repository", file=str(name), expected=".uqff, .safetensors or .gguf files")
    meant = _gguf(ggufs, name, isq)
    return _parts(meant, files), meant


def projectors(folder: RemoteFolder, mmproj: str | os.PathLike[str] | None) -> list[str]:
    """The ``mmproj`` file that goes with a GGUF file of a folder, see :func:`fetch`: one, or none.

    Raises:
        HubError: there is none of that name.
        ShardError: there are several, and none was named.
    """
    there = [each for each in folder.files if is_projector_name(each)]
    if mmproj is not None:
        wanted = os.fspath(mmproj)
        if wanted == NO_PROJECTOR or os.path.exists(wanted):
            return []
        if wanted not in folder.files:
            raise HubError("no such file in the repository", file=folder.shown(wanted), expected=" or ".join(there))
        return [wanted]
    if len(there) > 1:
        raise ShardError(several_projectors(there), file=str(folder.name), got=", ".join(there[:10]))
    return there


def checkpoint_weights(folder: RemoteFolder) -> list[str]:
    """The files of a checkpoint's weights; none if a GGUF file, or any other one, is what the name means.

    Raises:
        UqffError: the index breaks a rule, or the hub did not give it.
    """
    name = folder.name
    return [] if name.file is not None or name.kind is not None else _weights(folder)


def checkpoint_gguf(folder: RemoteFolder) -> list[str]:
    """The GGUF file that a name means for a checkpoint, and after it the other parts of a split one; none if it means
    something else.

    Raises:
        UqffError: there are several, and none was named; see :func:`checkpoint_weights`, too.
    """
    name, files = folder.name, folder.files
    if name.file is not None:
        meant = name.file if name.file in files and name.file.endswith(".gguf") else None
    else:
        ggufs = _ggufs(files)
        others = not ggufs or (name.kind is None and bool(_weights(folder)))
        meant = None if others else _gguf(ggufs, name, None)
    return [] if meant is None else [meant, *(each for each in _parts(meant, files) if each != meant)]


def _weights(folder: RemoteFolder) -> list[str]:
    """The weights of a checkpoint: of files that hold the same twice, those that are looked into first."""
    if is_read_as_consolidated(
        folder.files, lambda name: parse_json(folder.read(name, MAX_HEADER_BYTES), folder.shown(name))
    ):
        return [CONSOLIDATED_NAME]
    if SINGLE in folder.files:
        return [SINGLE]
    if INDEX not in folder.files:
        return [each for each in folder.files if each.endswith(".safetensors")]
    weight_map = parse_json(folder.read(INDEX, MAX_HEADER_BYTES), folder.shown(INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FormatError("not a map of tensors to file names", file=folder.shown(INDEX), field="weight_map")
    names = set(weight_map.values())
    return [each for each in folder.files if each in names]


def _ggufs(files: Iterable[str]) -> list[str]:
    """The GGUF files of models, of a split one its first part."""
    found = [each for each in files if each.endswith(".gguf") and each not in NAMED and not is_projector_name(each)]
    return [each for each in found if (part := GGUF_PART.fullmatch(each)) is None or int(part["number"]) == 1]


def _parts(file: str, files: Iterable[str]) -> list[str]:
    """A file, and of a split GGUF file all that are there."""
    part = GGUF_PART.fullmatch(file)
    if part is None:
        return [file]
    others = ((each, GGUF_PART.fullmatch(each)) for each in files)
    return [each for each, one in others if one is not None and one["stem"] == part["stem"]]


def _gguf(files: list[str], name: HubName, isq: str | None) -> str:
    """The one that is meant."""
    if len(files) > 1:  # to a caller, the only one may become that type
        name = name.of(isq)
    kind = "" if name.kind is None else name.kind.lower()
    found = [each for each in files if kind in each.lower()]
    if len(found) > 1:
        raise ShardError(
            f"several GGUF files: choose one, such as {name}/{found[0]}", file=str(name), got=", ".join(found)
        )
    if not found:
        raise ShardError("no model of that type", file=str(name), expected=" or ".join(files), got=name.kind)
    return found[0]


def _download(name: HubName, wanted: Iterable[str]) -> Path:
    hub = imported(name.text)
    patterns = [glob.escape(each) for each in wanted]
    if len(patterns) > MAX_HUB_FILES:
        raise HubError("too many files", file=str(name), expected=f"at most {MAX_HUB_FILES}", got=len(patterns))
    for attempt in itertools.count():
        try:
            with bars(hub), redacted_logs():
                return Path(
                    hub.snapshot_download(
                        name.repo,
                        revision=name.revision,
                        allow_patterns=patterns,
                        library_name="uqff",
                        library_version=__version__,
                        etag_timeout=hub.constants.HF_HUB_ETAG_TIMEOUT,
                    )
                )
        except Exception as error:
            if isinstance(error, OSError) and error.errno in LOCAL_ERRORS:
                if error.filename is None:
                    error.filename = hub.constants.HF_HUB_CACHE  # a full disk does not say which
                raise
            if not passes(error, attempt):
                raise hub_error(error, name, "the hub did not give the files") from None
    raise AssertionError("unreachable")


@contextlib.contextmanager
def bars(hub: ModuleType) -> Iterator[None]:
    """Whether the package shows what it does."""
    if BARS.get() or hub.utils.are_progress_bars_disabled():
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a variable of the environment may insist on them
        hub.utils.disable_progress_bars()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            hub.utils.enable_progress_bars()


def _cached(name: HubName, reason: HubError, isq: str | None) -> Path:
    """What the cache has, if the hub cannot be asked."""
    hub = imported(name.text)
    documents = ["config.json", "uqff_report.json", "model.safetensors", "residual.safetensors", "adapter_config.json"]
    for each in [name.file, *documents] if name.file is not None else documents:
        path = f"{name.folder}/{each}" if name.folder else each
        found = hub.try_to_load_from_cache(name.repo, path, revision=name.revision)
        if isinstance(found, str):
            return _meant_here(Path(found).parent, name, isq)
    home = _snapshot(Path(hub.constants.HF_HUB_CACHE), name) / name.folder
    if name.file is not None or not home.is_dir() or not _ggufs(each.name for each in home.iterdir()):
        raise reason
    return _meant_here(home, name, isq)


def _snapshot(cache: Path, name: HubName) -> Path:
    """Where the cache has the files of a repository at a revision, if it has any."""
    home, commit = cache / f"models--{name.repo.replace('/', '--')}", name.revision or "main"
    reference = home / "refs" / commit
    if ".." not in reference.parts and reference.is_file():
        commit = reference.read_text("utf-8", "replace").strip()
    return home / "snapshots" / (commit if COMMIT.fullmatch(commit) else "none")


def _meant_here(home: Path, name: HubName, isq: str | None) -> Path:
    """The folder, or the file that is meant: of a folder of GGUF files, one of them."""
    if name.file is not None:
        return home / name.file
    names = sorted(each.name for each in home.iterdir())
    others = any(each.endswith((".uqff", ".safetensors")) for each in names)
    ggufs = [] if others and name.kind is None else _ggufs(names)
    return home if not ggufs or any(each.endswith(".uqff") for each in names) else home / _gguf(ggufs, name, isq)
