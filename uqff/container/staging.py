"""A directory that appears whole or not at all: filled beside its place, flushed to disk, renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from uqff.container.atomic import sync_directory
from uqff.container.shards import SUFFIX

__all__ = ["check_target", "staged_directory"]

What = Literal["UQFF model", "checkpoint"]


def check_target(target: Path, *, force: bool = False, what: What = "UQFF model") -> None:
    """Refuse a directory that must not be replaced.

    Args:
        target: the directory to be made.
        force: whether a model that is there already may be replaced; what is no model never is.
        what: what it will be, and what may be replaced.

    Raises:
        FileExistsError: something is there; its message says why it stays.
        NotADirectoryError: the parent is not a directory.
        FileNotFoundError: there is no parent.
    """
    if not target.parent.is_dir():
        error = NotADirectoryError if target.parent.exists() else FileNotFoundError
        raise error(f"no such directory: {target.parent}")
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir():
        raise FileExistsError(f"exists and is not a directory: {target}")
    with os.scandir(target) as scan:
        entries = list(scan)
    if not entries:
        return
    if not force:
        raise FileExistsError(f"exists and is not empty: {target}")
    names = [entry.name for entry in entries]
    if any(entry.is_dir(follow_symlinks=False) for entry in entries) or not _is(what, names):
        raise FileExistsError(f"is not a {what} and will not be replaced: {target}")


def _is(what: What, names: list[str]) -> bool:
    """Whether the files of a directory make it one: a UQFF model has a residual, but is no checkpoint."""
    is_model = any(name.endswith(SUFFIX) for name in names)
    return is_model if what == "UQFF model" else not is_model and any(name.endswith(".safetensors") for name in names)


@contextlib.contextmanager
def staged_directory(target: Path, *, force: bool = False, what: What = "UQFF model") -> Iterator[Path]:
    """A new directory to fill that becomes ``target`` when the block ends well, and vanishes when it does not.

    It lies beside the target and is named ``.<target>.tmp-<random>``; a process that is killed leaves it behind under
    that name.  The files in it must have been flushed to the disk; the directory itself is flushed here.

    Raises:
        FileExistsError: see :func:`check_target`; it is asked before and after.
    """
    check_target(target, force=force, what=what)
    staging = _create_beside(target, "tmp")
    try:
        yield staging
        sync_directory(staging)
        check_target(target, force=force, what=what)
        _replace(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    sync_directory(target.parent)


def _replace(staging: Path, target: Path) -> None:
    """Directories cannot be exchanged portably: an old model steps aside first and comes back if the rename fails."""
    if not target.exists() or not os.listdir(target):
        if os.name == "nt" and target.exists():
            target.rmdir()
        os.rename(staging, target)
        return
    aside = _create_beside(target, "old")
    os.rename(target, aside)
    try:
        os.rename(staging, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _create_beside(target: Path, what: str) -> Path:
    """A new directory beside the target; the umask decides who may read it, as ever."""
    # Cut: with what is added, a name of 255 bytes would be too long for the file system.
    path = target.parent / f".{target.name[:50]}.{what}-{secrets.token_hex(8)}"
    path.mkdir()
    return path
