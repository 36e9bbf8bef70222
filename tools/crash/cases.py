"""Forks of this process that write and are killed at it, and what they leave behind."""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from random import Random

from tools.crash.writers import WRITERS, State, Writer, make_sources, names
from uqff.system import exchange

__all__ = ["FAILED", "HANGS", "IN_A_ROW", "Cases", "Counted", "Scene"]

FAILED = 3
"""Exit code of a case whose writer gave an error, which a full disk is."""

HANGS = 99
"""In place of the exit code of a case that was given up."""

PATIENCE = 60.0
"""Seconds after which it is."""

IN_A_ROW = "in a row"
"""What is counted of several kills, one after the other."""

MOST_KEPT = 20
"""Directories that are kept of each process, of those that show a problem."""


@dataclass(frozen=True)
class Scene:
    """A writer, what was there before it, and what is there after it.

    Attributes:
        writer: its number among :data:`~tools.crash.writers.WRITERS`.
        before: a directory, to begin with.
        old: what a reader sees of that.
        new: what a reader sees afterwards.
        listed: names of all files that are there then.
        count: of the calls.
    """

    writer: int
    before: Path
    old: State
    new: State
    listed: list[str]
    count: int


@dataclass
class Counted:
    """What was done.

    Attributes:
        kills: that were made.
        full: disks that were full.
        problems: what was there and should not have been.
    """

    kills: int = 0
    full: int = 0
    problems: list[str] = field(default_factory=list)

    def __add__(self, other: Counted) -> Counted:
        return Counted(self.kills + other.kills, self.full + other.full, self.problems + other.problems)


class Cases:
    """Runs the writers in this process's forks.

    Attributes:
        tallies: what was counted, by the name of the writer, or as "in a row".
        exchanges: whether two names can be exchanged here; else nothing may be there, for a moment.
    """

    def __init__(self, folder: Path, keep: Path | None = None) -> None:
        """Nothing is made yet.

        Args:
            folder: for all files; those of several processes have folders of their own in it.
            keep: where directories that show a problem are copied to.
        """
        self.sources, self.place, self.library = folder / "sources", folder / "place", ctypes.CDLL(None)
        self.keep = keep
        self.tallies: dict[str, Counted] = {}
        self.exchanges = _exchanges(folder)

    def make_sources(self, imported: Iterable[str] = ()) -> None:
        """Make what the writers read; modules that are imported here, no fork has to import."""
        for name in imported:
            import_module(name)
        if self._fork(lambda: make_sources(self.sources), 0, 0)[0]:
            raise SystemExit("the sources cannot be made")

    def at(self, worker: int) -> Cases:
        """The same for another process, which counts by itself."""
        home = self.sources.parent / f"worker-{worker}"
        home.mkdir(exist_ok=True)
        made = Cases(home, self.keep)
        made.sources = self.sources
        return made

    def _fork(self, work: Callable[[], object], kill_at: int, full_at: int) -> tuple[int, int]:
        """Exit code, and how many calls were counted."""
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            code = 0
            try:
                warnings.simplefilter("ignore")
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_IGN)
                self.library.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
                self.library.crash_arm(ctypes.c_long(kill_at), ctypes.c_long(full_at))
                work()
            except BaseException as error:  # noqa: BLE001  (a fork must not go on)
                code = FAILED
                if not isinstance(error, OSError) or not full_at:
                    traceback.print_exc()
            count = self.library.crash_count()
            self.library.crash_arm(ctypes.c_long(0), ctypes.c_long(0))
            os.write(writing, str(count).encode())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        os.close(writing)
        hangs = not select.select([reading], [], [], PATIENCE)[0]
        if hangs:
            os.kill(child, signal.SIGKILL)
        with os.fdopen(reading, "rb") as pipe:
            count = int(pipe.read() or 0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return (HANGS if hangs else code), count

    def _write(self, writer: Writer, kill_at: int = 0, full_at: int = 0) -> tuple[int, int]:
        return self._fork(lambda: writer.write(self.sources, self.place), kill_at, full_at)

    def _anew(self, before: Path) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(before, self.place)

    def scene(self, number: int) -> Scene:
        """What a writer finds, and what it makes of it."""
        writer = WRITERS[number]
        before = self.sources.with_name(f"before-{number}")
        shutil.rmtree(before, ignore_errors=True)
        before.mkdir()
        code = self._fork(lambda: writer.old(self.sources, before), 0, 0)[0]
        if code:
            raise SystemExit(f"{writer.name}: what it is to replace cannot be made ({code})")
        old = writer.look(before)
        self._anew(before)
        code, count = self._write(writer)
        new, listed = writer.look(self.place), names(self.place)
        if code or not count or old == new:
            raise SystemExit(f"{writer.name}: does not write ({code}, {count} calls)")
        return Scene(number, before, old, new, listed, count)

    def each(self, scene: Scene, calls: Iterable[int]) -> Iterator[None]:
        """A kill and a full disk at calls of a writer."""
        writer = WRITERS[scene.writer]
        tally = self.tallies.setdefault(writer.name, Counted())
        for at in calls:
            self._anew(scene.before)
            self._case(tally, scene, f"killed before call {at}", self._write(writer, at)[0], -signal.SIGKILL)
            self._again(tally, scene, f"after a kill before call {at}")
            tally.kills += 1
            self._anew(scene.before)
            code = self._write(writer, 0, at)[0]
            if code:  # else only calls that need no space came after
                self._case(tally, scene, f"full disk from call {at}", code, FAILED)
                tally.full += 1
            yield

    def chain(self, scene: Scene, random: Random) -> None:
        """Kills at any call, of the run that finds what the one before has left, too."""
        tally = self.tallies.setdefault(IN_A_ROW, Counted())
        self._anew(scene.before)
        told: list[int] = []
        for _ in range(random.choice((1, 2, 2, 3, 4))):
            at = random.randint(1, scene.count)
            code = self._write(WRITERS[scene.writer], at)[0]
            told.append(at)
            if not code:  # it had less to do than the first one
                break
            self._case(tally, scene, f"killed before calls {told}", code, -signal.SIGKILL)
            tally.kills += 1
        self._again(tally, scene, f"after kills before calls {told}")

    def _case(self, tally: Counted, scene: Scene, what: str, code: int, expected: int) -> None:
        writer = WRITERS[scene.writer]
        try:
            found = writer.look(self.place)
        except Exception as error:  # noqa: BLE001  (each is a problem to be told)
            self._problem(tally, f"{writer.name}, {what}: {type(error).__name__}: {error}; {names(self.place)}")
            return
        allowed = writer.allows(found, scene.old, scene.new) or (not self.exchanges and not found)
        if not allowed:
            self._problem(tally, f"{writer.name}, {what}: neither old nor new; {names(self.place)}")
        if code != expected:
            self._problem(tally, f"{writer.name}, {what}: ended with {code}")

    def _again(self, tally: Counted, scene: Scene, what: str) -> None:
        writer = WRITERS[scene.writer]
        code = self._write(writer)[0]
        try:
            is_new = writer.look(self.place) == scene.new
        except Exception as error:  # noqa: BLE001  (each is a problem to be told)
            self._problem(tally, f"{writer.name}, again {what}: {type(error).__name__}: {error}; {names(self.place)}")
            return
        if code or not is_new or names(self.place) != scene.listed:
            self._problem(tally, f"{writer.name}, again {what}: ended with {code}, left {names(self.place)}")

    def _problem(self, tally: Counted, told: str) -> None:
        tally.problems.append(told)
        count = sum(len(each.problems) for each in self.tallies.values())
        if self.keep is not None and count <= MOST_KEPT:
            number = f"{self.place.parent.name}-{count}"
            shutil.copytree(self.place, self.keep / number, symlinks=True, dirs_exist_ok=True)


def _exchanges(folder: Path) -> bool:
    """Whether two directories can be exchanged here."""
    one, other = folder / "one", folder / "other"
    one.mkdir()
    other.mkdir()
    try:
        return exchange(one, other)
    finally:
        one.rmdir()
        other.rmdir()
