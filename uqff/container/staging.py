"""A directory that appears whole or not at all: filled beside its place, flushed to disk, renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from uqff.container.atomic import atomic_file, sync_directory
from uqff.container.beside import TEMPORARY, What, not_of
from uqff.container.document import read_at_most
from uqff.container.leftovers import create_beside, create_locked, is_left, remove_left
from uqff.container.shards import SUFFIX
from uqff.errors import UnsupportedError
from uqff.limits import MAX_HEADER_BYTES
from uqff.system import can_lock, exchange, link, lock

__all__ = [
    "Journal",
    "ResumeWarning",
    "allocated_bytes",
    "changed_directory",
    "check_space",
    "check_target",
    "resumable_directory",
    "staged_directory",
]


class ResumeWarning(UserWarning):
    """A run cannot be resumed, and begins anew."""


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
    names = [entry.name for entry in entries]
    folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    others = sorted({*not_of(what, names), *(name for name in folders if not TEMPORARY.fullmatch(name))})
    if not force:
        way_out = f"; --force replaces the {what}" if _is(what, names) and not others else ""
        raise FileExistsError(f"exists and is not empty: {target}{way_out}")
    if not _is(what, names):
        raise FileExistsError(f"is not a {what} and will not be replaced: {target}")
    if others:
        raise FileExistsError(f"holds what is not of the {what}, which would be lost: {target / others[0]}")


def _is(what: What, names: list[str]) -> bool:
    """Whether the files of a directory make it one: a UQFF model has a residual, but is no checkpoint."""
    is_model = any(name.endswith(SUFFIX) for name in names)
    return is_model if what == "UQFF model" else not is_model and any(name.endswith(".safetensors") for name in names)


def _check_and_clear(target: Path, *, force: bool, what: What) -> None:
    """As :func:`check_target`, after what a killed process has left in the target's place was set right."""
    if target.parent.is_dir():
        _bring_back(target)
    check_target(target, force=force, what=what)


@contextlib.contextmanager
def staged_directory(target: Path, *, force: bool = False, what: What = "UQFF model") -> Iterator[Path]:
    """A new directory to fill that becomes ``target`` when the block ends well, and vanishes when it does not.

    It lies beside the target and is named ``.<target>.tmp-<random>``; a process that is killed leaves it behind under
    that name, and the next one for the same target removes it, where the system can lock directories.  The files in it
    must have been flushed to the disk; the directory itself is flushed here.

    Raises:
        FileExistsError: see :func:`check_target`; it is asked before and after.
    """
    _check_and_clear(target, force=force, what=what)
    with _beside(target, lambda: check_target(target, force=force, what=what)) as staging:
        yield staging


@contextlib.contextmanager
def changed_directory(target: Path, leave: Callable[[str], bool]) -> Iterator[Path]:
    """As :func:`staged_directory`, but what a directory holds already stays, whatever it is.

    It is there under second names (hard links; copies, where there are none), so that files are to be replaced and not
    written into.  What somebody else writes into the target meanwhile is lost.

    Args:
        target: the directory; it need not be there, nor its parents.
        leave: whether a file of it does not stay, of its name.

    Raises:
        UnsupportedError: this process, or part of its path, is in there: it would be left in a directory that is gone.
    """
    target = Path(os.path.realpath(target))
    if target in (here := Path.cwd()).parents or target == here:
        raise UnsupportedError("the current directory cannot be replaced", file=str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    _bring_back(target)
    with _beside(target) as staging:
        if target.is_dir():
            for name in os.listdir(target):
                if not leave(name) and not TEMPORARY.fullmatch(name):
                    _take_along(target / name, staging / name)
        yield staging


@contextlib.contextmanager
def _beside(target: Path, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A new directory, locked, that takes the target's place when the block ends well and ``check`` raises nothing."""
    remove_left(target)
    staging, handle = create_locked(target)
    try:
        yield staging
        sync_directory(staging)
        check()
        _replace(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        if handle is not None:
            os.close(handle)
    sync_directory(target.parent)


def _take_along(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link)
    else:
        _link(source, target)


def _link(source: str | Path, target: str | Path) -> object:
    link(source, target)
    return target


class _NoNote(UnsupportedError):
    """There are files, and no note that can be read."""


class Journal:
    """What an interrupted run had done of a directory.

    Attributes:
        done: what the run noted of each finished step, JSON values.
        begun: whether there was such a run.
        lost: why what a run had left could not be gone on from, so that all is made anew; None otherwise.
    """

    NAME: Final = "progress.json"

    def __init__(self, directory: Path, run: Mapping[str, Any], *, what: What = "UQFF model") -> None:
        """Read what is there.

        Args:
            directory: that is being filled.
            run: what the work depends on, JSON values.
            what: what the directory will be.

        Raises:
            UnsupportedError: what is there was made of something else; the first difference is named. Or there are
                files without a note which no run has made.
        """
        self._path = directory / self.NAME
        self._run: dict[str, Any] = json.loads(json.dumps(run))
        self.done: list[Any] = []
        files: list[str] = []
        self.lost: str | None = None
        for path in directory.iterdir():  # of a file that was being made; nobody else is at work here
            if TEMPORARY.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
        present = os.listdir(directory)
        if present:
            try:
                files, self.done = self._read()
            except _NoNote as error:
                others = not_of(what, [name for name in present if name != self.NAME])
                if others or any(path.is_dir() for path in map(directory.joinpath, present)):
                    raise
                # A run was killed at its first note or its last, or the disk lost the note.
                self.lost = str(error)
        if not present or self.lost is not None:
            for name in present:
                os.unlink(directory / name)
            present = []
            self.commit([], [])  # before anything else: what is in a directory without a note is not ours
        self.begun = bool(files)
        for name in present:
            if name not in (self.NAME, *files):
                os.unlink(directory / name)

    def _read(self) -> tuple[list[str], list[Any]]:
        try:
            before = json.loads(read_at_most(self._path, MAX_HEADER_BYTES))
            run, files, done = before["run"], before["files"], before["done"]
            differing = next((name for name, value in self._run.items() if run.get(name) != value), None)
            if not isinstance(files, list) or not isinstance(done, list):
                raise TypeError("no lists")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _NoNote("not what an interrupted run leaves", file=str(self._path), got=error) from None
        if differing is not None:
            raise UnsupportedError(
                "the interrupted run was another: remove its directory, or ask for the same",
                file=str(self._path.parent),
                field=differing,
                expected=run.get(differing) if len(str(run.get(differing))) < 80 else None,
                got=self._run[differing] if len(str(self._run[differing])) < 80 else None,
            )
        return files, done

    def commit(self, files: Iterable[str], done: list[Any]) -> None:
        """Note what has been done; it must be on the disk.

        Args:
            files: names of those that have been begun.
            done: see :attr:`done`.
        """
        with atomic_file(self._path) as file:
            note = {"run": self._run, "files": list(files), "done": done, "directory": _number(self._path.parent)}
            file.write(json.dumps(note).encode())


def _number(directory: Path) -> int:
    """The number that a directory keeps when its name is exchanged for another."""
    return os.stat(directory).st_ino


def _note_beside(target: Path) -> Path:
    return target.parent / f".{target.name[:50]}.resume.json"


def _put_note_back(staging: Path, target: Path) -> None:
    """What a run left that was killed while its directory became the target."""
    beside = _note_beside(target)
    if beside.is_file():
        with contextlib.suppress(ValueError, RecursionError):
            note = json.loads(read_at_most(beside, MAX_HEADER_BYTES))
            if isinstance(note, dict) and note.get("directory") not in (None, _number(staging)):
                for path in staging.iterdir():  # the exchange had worked: these are the old model's files
                    path.unlink()
        if os.listdir(staging):
            os.rename(beside, staging / Journal.NAME)
        else:  # the rename had worked
            beside.unlink()


@contextlib.contextmanager
def resumable_directory(
    target: Path, run: Mapping[str, Any], *, force: bool = False, what: What = "UQFF model"
) -> Iterator[tuple[Path, Journal]]:
    """As :func:`staged_directory`, but what was done stays when the block does not end well, and is there next time.

    It lies beside the target and is named ``.<target>.resume``.  Where a run has left files but no note that can be
    read, all is made anew, with a :class:`ResumeWarning`.

    Raises:
        UnsupportedError: what is there was made of something else, or another process is at it.
        FileExistsError: see :func:`check_target`.
    """
    _check_and_clear(target, force=force, what=what)
    staging = target.parent / f".{target.name[:50]}.resume"
    staging.mkdir(exist_ok=True)
    with _locked(staging):
        _put_note_back(staging, target)
        journal = Journal(staging, run, what=what)
        if journal.lost is not None:
            warnings.warn(ResumeWarning(f"nothing is resumed, all is made anew: {journal.lost}"), stacklevel=2)
        yield staging, journal
        sync_directory(staging)
        check_target(target, force=force, what=what)
        # Beside first, so that no model holds it; gone last: until the rename has worked, there is a run to resume.
        os.rename(staging / Journal.NAME, _note_beside(target))
        _replace(staging, target)
        _note_beside(target).unlink()
    sync_directory(target.parent)


def allocated_bytes(directory: Path) -> int:
    """Bytes that the files of a directory take on the disk already, where the system says so."""
    with os.scandir(directory) as entries:
        return sum(getattr(entry.stat(), "st_blocks", 0) * 512 for entry in entries)


def check_space(target: Path, needed: int) -> None:
    """Refuse work for whose result there is no room.

    Args:
        target: what will be made; its parent is there.
        needed: bytes.

    Raises:
        OSError: of ``ENOSPC``.
    """
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"no space for the model: {needed:,} bytes needed, {free:,} free", str(target))


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Refuse to work on a directory that another process works on, where the system can lock one."""
    if not can_lock():
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    if not lock(handle):
        os.close(handle)
        raise UnsupportedError("another run is at work there", file=str(directory))
    try:
        yield
    finally:
        os.close(handle)


def _replace(staging: Path, target: Path) -> None:
    """Put a directory in the place of another, which it exchanges with where the system can.

    Elsewhere an old model steps aside first, and comes back if the rename fails; :func:`_bring_back` is for a process
    that was killed in between.
    """
    if not target.exists() or not os.listdir(target):
        if os.name == "nt" and target.exists():
            target.rmdir()
        os.rename(staging, target)
        return
    if exchange(staging, target):
        sync_directory(target.parent)
        shutil.rmtree(staging, ignore_errors=True)  # the old one
        return
    aside = create_beside(target, "old")
    os.rename(target, aside)
    try:
        os.rename(staging, target)
    except BaseException:
        os.rename(aside, target)
        raise
    sync_directory(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _bring_back(target: Path) -> None:
    """Put an old model back that had stepped aside when a process was killed; remove it, if the new one is there."""
    with os.scandir(target.parent) as entries:
        aside = [target.parent / each.name for each in entries if is_left(target, each.name, "old")]
    if not target.exists():
        for path in sorted(each for each in aside if each.is_dir() and any(each.iterdir()))[:1]:
            os.rename(path, target)
    remove_left(target, "old")
