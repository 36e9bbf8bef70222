"""``make crash``: each writer, killed before each of its calls that change the file system, and on a full disk.

What must be there afterwards: for a reader, all that was there before or all that is new; after the writer has run
again, all that is new and nothing besides.  A full disk must be an error, not a death.

The calls are counted by a library that is loaded in front of the C library (``calls.c``).  The process is started once
and has forks (``--jobs``); each case is a fork of one of these, which has imported everything and started no thread.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import NoReturn, TypeVar

from tools.crash.cases import IN_A_ROW, Cases, Counted, Scene
from tools.crash.writers import WRITERS
from tools.processes import ALONE, Workers, scratch

T = TypeVar("T")

LIBRARY = "UQFF_CRASH_LIBRARY"
"""Names the library to the process that has it loaded."""


def compiled(folder: Path) -> Path:
    """The library."""
    made = folder / "calls.so"
    source = Path(__file__).with_name("calls.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", made, source, "-ldl"], check=True)
    return made


class Share:
    """What one of the processes does.

    Attributes:
        cases: of this process.
        scenes: of all writers that were asked for.
    """

    def __init__(self, cases: Cases, scenes: list[Scene], jobs: int, worker: int) -> None:
        self.cases, self.scenes, self._jobs, self._worker = cases.at(worker), scenes, jobs, worker
        self._asked = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self._asked = True

    def every(self, one_in: int, first: int) -> None:
        """A kill and a full disk at all calls of each writer, or at one in so many after the first so many."""
        turn = 0
        for scene in self.scenes:
            calls = range(1 + first, scene.count + 1, one_in)
            mine = [at for index, at in enumerate(calls, turn) if index % self._jobs == self._worker]
            turn += len(calls)
            for _ in self.cases.each(scene, mine):
                if self._asked:
                    return

    def chains(self, end: float, seed: int) -> None:
        """Kills at any calls, several in a row, until then."""
        random = Random(f"{seed} {self._worker}")
        while time.monotonic() < end and not self._asked:
            self.cases.chain(random.choice(self.scenes), random)


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
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes side by side")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="copy there what shows a problem")
    arguments = parser.parse_args()
    if LIBRARY not in os.environ:
        _begin_again(arguments.jobs)
    if arguments.keep is not None:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    chosen = [number for number, each in enumerate(WRITERS) if each.name.startswith(arguments.only)]
    cases = Cases(Path(os.environ[LIBRARY]), arguments.keep)
    cases.make_sources(dict.fromkeys(name for number in chosen for name in WRITERS[number].imports))
    if not cases.exchanges:
        print("names cannot be exchanged here: for a moment, nothing may be there")
    jobs, shown = arguments.jobs, time.monotonic()
    makers = Workers(lambda worker: [cases.at(worker).scene(number) for number in chosen[worker::jobs]])
    scenes = sorted((each for made in _returned(makers, jobs) for each in made), key=lambda scene: scene.writer)

    def work(worker: int) -> dict[str, Counted]:
        share = Share(cases, scenes, jobs, worker)
        if arguments.one_in:
            share.every(arguments.one_in, arguments.first)
        if arguments.chains:
            share.chains(time.monotonic() + arguments.chains, arguments.seed)
        return share.cases.tallies

    workers = Workers(work)
    ended = workers.all(jobs)
    tallies: dict[str, Counted] = {}
    for each in ended:
        for name, tally in (each.made or {}).items():
            tallies[name] = tallies.get(name, Counted()) + tally
    for scene in scenes:
        _show(f"{WRITERS[scene.writer].name:34} {scene.count:5} calls", tallies.get(WRITERS[scene.writer].name))
    if arguments.chains:
        _show(f"{IN_A_ROW:45}", tallies.get(IN_A_ROW))
    whole = sum(tallies.values(), Counted())
    whole.problems += [f"process {each.worker} ended with {each.death}" for each in ended if each.death]
    if workers.asked:
        print("interrupted")
    print(*whole.problems, sep="\n", end="\n" if whole.problems else "")
    print(f"{time.monotonic() - shown:.0f} s in {jobs} processes")
    print(f"{whole.kills} kills, {whole.full} full disks, {len(whole.problems)} problems")
    sys.exit(bool(whole.problems))


def _begin_again(jobs: int) -> NoReturn:
    """With the library in front of all others."""
    with tempfile.TemporaryDirectory(prefix="uqff-crash-", dir=scratch(jobs)) as folder:
        library = str(compiled(Path(folder)))
        own = {"LD_PRELOAD": library, LIBRARY: folder, "UQFF_KERNELS": "reference"}
        process = subprocess.Popen([sys.executable, "-m", "tools.crash", *sys.argv[1:]], env=os.environ | own | ALONE)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: process.send_signal(number))
        sys.exit(process.wait())


def _returned(workers: Workers[T], count: int) -> list[T]:
    """What all of them made; the end of this process, if one died."""
    ended = workers.all(count)
    if any(each.death for each in ended) or workers.asked:
        raise SystemExit(", ".join(f"process {each.worker}: {each.death}" for each in ended if each.death))
    return [each.made for each in ended if each.made is not None]


def _show(what: str, tally: Counted | None) -> None:
    tally = tally or Counted()
    print(f"{what}  {tally.kills} kills, {tally.full} full disks, {len(tally.problems)} problems", flush=True)


if __name__ == "__main__":
    main()
