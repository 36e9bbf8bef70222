"""``make crash``: each writer, killed before each of its calls that change the file system, and on a full disk.

What must be there afterwards: for a reader, all that was there before or all that is new; after the writer has run
again, all that is new and nothing besides.  A full disk must be an error, not a death.

The calls are counted by a library that is loaded in front of the C library (``calls.c``).  The process is started once;
each case is a fork of it, which has imported everything and started no thread.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import uqff
from tools.crash.writers import WRITERS, State, Writer, make_sources, names

LIBRARY = "UQFF_CRASH_LIBRARY"
"""Names the library to the process that has it loaded."""

FAILED = 3
"""Exit code of a case whose writer gave an error, which a full disk is."""


def compiled(folder: Path) -> Path:
    """The library."""
    made = folder / "calls.so"
    source = Path(__file__).with_name("calls.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", made, source, "-ldl"], check=True)
    return made


@dataclass(frozen=True)
class Scene:
    """A writer, what was there before it, and what is there after it.

    Attributes:
        writer: it.
        before: a directory, to begin with.
        old: what a reader sees of that.
        new: what a reader sees afterwards.
        listed: names of all files that are there then.
        count: of the calls.
    """

    writer: Writer
    before: Path
    old: State
    new: State
    listed: list[str]
    count: int


class Cases:
    """Runs the writers of this process's forks.

    Attributes:
        kills: that were made.
        full: disks that were full.
        problems: what was there and should not have been.
    """

    def __init__(self, folder: Path, imported: Iterable[str] = ()) -> None:
        """Make the sources; what of the package is imported here, no fork has to import."""
        self.sources, self.place, self.library = folder / "sources", folder / "place", ctypes.CDLL(None)
        for name in imported:
            getattr(uqff, name)
        make = self._fork(lambda: make_sources(self.sources), 0, 0)[0]
        if make:
            raise SystemExit("the sources cannot be made")
        self.problems: list[str] = []
        self.kills = self.full = 0

    def _fork(self, work: object, kill_at: int, full_at: int) -> tuple[int, int]:
        """Exit code, and how many calls were counted."""
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            code = 0
            try:
                warnings.simplefilter("ignore")
                for number in (signal.SIGINT, signal.SIGTERM):
                    signal.signal(number, signal.SIG_IGN)
                self.library.crash_arm(ctypes.c_long(kill_at), ctypes.c_long(full_at))
                work()  # type: ignore[operator]
            except BaseException as error:  # noqa: BLE001  (a fork must not go on)
                code = FAILED
                if not isinstance(error, OSError) or not full_at:
                    traceback.print_exc()
            count = self.library.crash_count()
            self.library.crash_arm(ctypes.c_long(0), ctypes.c_long(0))
            os.write(writing, str(count).encode())
            os._exit(code)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            count = int(pipe.read() or 0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), count

    def _write(self, writer: Writer, kill_at: int = 0, full_at: int = 0) -> tuple[int, int]:
        return self._fork(lambda: writer.write(self.sources, self.place), kill_at, full_at)

    def _anew(self, before: Path) -> None:
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(before, self.place)

    def scene(self, writer: Writer) -> Scene:
        """What a writer finds, and what it makes of it."""
        before = self.place.with_name(f"before-{WRITERS.index(writer)}")
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
        return Scene(writer, before, old, new, listed, count)

    def every(self, scene: Scene, one_in: int, first: int) -> Iterator[None]:
        """A kill and a full disk at all calls of a writer, or at one in so many of them after the first so many."""
        for at in range(1 + first, scene.count + 1, one_in):
            self._anew(scene.before)
            self._case(scene, f"killed before call {at}", self._write(scene.writer, at)[0], -signal.SIGKILL)
            self._again(scene, f"after a kill before call {at}")
            self.kills += 1
            self._anew(scene.before)
            code = self._write(scene.writer, 0, at)[0]
            if code:  # else only calls that need no space came after
                self._case(scene, f"full disk from call {at}", code, FAILED)
                self.full += 1
            yield

    def chain(self, scene: Scene, random: Random) -> None:
        """Kills at any call, of the run that finds what the one before has left, too."""
        self._anew(scene.before)
        told: list[int] = []
        for _ in range(random.choice((1, 2, 2, 3, 4))):
            at = random.randint(1, scene.count)
            code = self._write(scene.writer, at)[0]
            told.append(at)
            if not code:  # it had less to do than the first one
                break
            self._case(scene, f"killed before calls {told}", code, -signal.SIGKILL)
            self.kills += 1
        self._again(scene, f"after kills before calls {told}")

    def _case(self, scene: Scene, what: str, code: int, expected: int) -> None:
        writer = scene.writer
        try:
            found = writer.look(self.place)
        except Exception as error:  # noqa: BLE001  (each is a problem to be told)
            self.problems.append(f"{writer.name}, {what}: {error}; {names(self.place)}")
            return
        if not writer.allows(found, scene.old, scene.new):
            self.problems.append(f"{writer.name}, {what}: neither old nor new; {names(self.place)}")
        if code != expected:
            self.problems.append(f"{writer.name}, {what}: ended with {code}")

    def _again(self, scene: Scene, what: str) -> None:
        writer = scene.writer
        code = self._write(writer)[0]
        if code or writer.look(self.place) != scene.new or names(self.place) != scene.listed:
            self.problems.append(f"{writer.name}, again {what}: ended with {code}, left {names(self.place)}")


def main() -> None:
    """Compile the library and begin again with it, or run the cases."""
    parser = argparse.ArgumentParser(prog="python -m tools.crash", description=__doc__)
    parser.add_argument(
        "--one-in", type=int, default=1, metavar="N", help="only one in N calls of each writer; 0: none"
    )
    parser.add_argument("--first", type=int, default=0, metavar="N", help="pass over the first N calls of each writer")
    parser.add_argument("--only", default="", metavar="NAME", help="only writers whose name begins so")
    parser.add_argument(
        "--chains", type=float, default=0, metavar="SECONDS", help="then kills at any calls, several in a row, so long"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --chains")
    arguments = parser.parse_args()
    room = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    if LIBRARY not in os.environ:
        with tempfile.TemporaryDirectory(prefix="uqff-crash-", dir=room) as folder:
            library = str(compiled(Path(folder)))
            own = {"LD_PRELOAD": library, LIBRARY: folder, "UQFF_NUM_THREADS": "1", "UQFF_KERNELS": "reference"}
            process = subprocess.Popen([sys.executable, "-m", "tools.crash", *sys.argv[1:]], env=os.environ | own)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda number, _: process.send_signal(number))
            sys.exit(process.wait())
    asked: list[int] = []  # to end
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: asked.append(number))
    cases = Cases(Path(os.environ[LIBRARY]), () if arguments.only else uqff.__all__)
    scenes = []
    for writer in (each for each in WRITERS if each.name.startswith(arguments.only)):
        kills, full, bad = cases.kills, cases.full, len(cases.problems)
        scenes.append(scene := cases.scene(writer))
        for _ in cases.every(scene, arguments.one_in, arguments.first) if arguments.one_in else ():
            if asked:
                break
        done = f"{cases.kills - kills} kills, {cases.full - full} full disks"
        print(f"{writer.name:34} {scene.count:5} calls  {done}, {len(cases.problems) - bad} problems", flush=True)
        if asked:
            break
    kills, bad, end, random = (
        cases.kills,
        len(cases.problems),
        time.monotonic() + arguments.chains,
        Random(arguments.seed),
    )
    while time.monotonic() < end and not asked:
        cases.chain(random.choice(scenes), random)
    if arguments.chains:
        print(f"{'in a row':34} {cases.kills - kills:11} kills, {len(cases.problems) - bad} problems")
    if asked:
        print("interrupted")
    for problem in cases.problems[:50]:
        print(problem)
    print(f"{cases.kills} kills, {cases.full} full disks, {len(cases.problems)} problems")
    sys.exit(bool(cases.problems))


if __name__ == "__main__":
    main()
