"""``make fuzz TIME=SECONDS``: only a UqffError comes out of a hostile input, within bounded time and memory.

An input is a changed one of the corpus: the seeds, and each input that gave an outcome (kind of error, problem, field)
which none before had given; these are kept, beyond the run, in ``~/.cache/uqff-fuzz`` or where ``UQFF_FUZZ`` says.
What breaks a promise is kept there too, under ``found``, with a text that says how, and what all runs have counted, in
``summary.json``.

Each target has the same time of the processor.  Several processes (``--jobs``) share the corpus.  One that dies of an
input, or never ends it, is begun anew; the input is kept as any other that breaks a promise.  A run that is interrupted
says what it has done, as one that ends.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import tempfile
import time
import warnings
from pathlib import Path

import torch

from tools.fuzz import coverage
from tools.fuzz.campaign import HANGING, Tally, keep_found, read_tallies, write_tallies
from tools.fuzz.share import Asked, Found, Share, Watch
from tools.fuzz.targets import targets
from tools.processes import ALONE, Ended, Workers, scratch

MOST_DEATHS = 50
"""Of processes, after which no other is begun."""

STUCK = 2.0 * HANGING
"""Seconds of the clock after which a process is ended that has not given up an input: it is in C code."""

STOOD_STILL = 5.0
"""Seconds of the clock after which the process that waits for the others should have been woken long ago."""


def main() -> None:
    """Begin the processes, and add up what they have found."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("--time", type=float, default=60, metavar="SECONDS", help="for all targets together")
    parser.add_argument("--inputs", type=int, metavar="N", help="of each target in each process, in place of a time")
    parser.add_argument("--seed", type=int, default=None, help="of the changes; another one each time without")
    parser.add_argument("--only", default="", metavar="NAME", help="only targets whose name begins so")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes side by side")
    parser.add_argument(
        "--engine", choices=("own", "atheris"), default="own", help="what chooses inputs; atheris if it is installed"
    )
    parser.add_argument("--light", action="store_true", help="without targets that need transformers")
    arguments = parser.parse_args()
    if arguments.engine == "atheris" and not coverage.available():
        parser.error("atheris is not installed here: pip install atheris, for Linux and some versions of Python")
    warnings.simplefilter("ignore")
    os.environ.update(ALONE)
    seed = int.from_bytes(os.urandom(4), "little") if arguments.seed is None else arguments.seed
    home = Path(os.environ.get("UQFF_FUZZ") or Path.home() / ".cache" / "uqff-fuzz")
    home.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    asked = Asked(home, arguments.only, arguments.light, arguments.inputs, begun + arguments.time, seed)
    summary, before = home / "summary.json", read_tallies(home / "summary.json")
    with tempfile.TemporaryDirectory(prefix="uqff-fuzz-", dir=scratch(arguments.jobs)) as folder:
        run = Run(Path(folder), asked, arguments.jobs)
        if arguments.engine == "atheris":
            run.reached(arguments.time)
        else:
            run.go()
    write_tallies(summary, added(before, run.tallies))
    if run.workers.asked:
        print("interrupted")
    print(f"seed {seed}")
    _print(run.tallies)
    print(*dict.fromkeys(run.problems), sep="\n", end="\n" if run.problems else "")
    if not run.weighed:
        print("memory was not looked at: this system does not tell the most that a process had")
    inputs = sum(tally.inputs for tally in run.tallies.values())
    problems = sum(tally.problems for tally in run.tallies.values())
    print(f"{time.monotonic() - begun:.0f} s in {arguments.jobs} processes, {run.deaths} of which died")
    if run.stood:
        print(f"this machine stood still for {', '.join(f'{each:.0f}' for each in run.stood)} s")
    print(f"{inputs} inputs, {problems} problems")
    if before:
        print("with earlier runs:")
        _print(added(before, run.tallies))
    raise SystemExit(bool(problems))


class Run:
    """The processes of a campaign.

    Attributes:
        tallies: what was counted, by target.
        problems: broken promises.
        weighed: whether memory was looked at.
        deaths: of processes.
        stood: seconds for which the machine ran none of them, each time.
        workers: they.
    """

    def __init__(self, folder: Path, asked: Asked, jobs: int) -> None:
        self._folder, self._asked, self._jobs = folder, asked, jobs
        self._watches = [Watch(folder / f"watch-{worker}") for worker in range(jobs)]
        self._begun = 0
        self.tallies: dict[str, Tally] = {}
        self.problems: list[str] = []
        self.weighed, self.deaths = True, 0
        self.stood: list[float] = []
        self._first: dict[int, tuple[str, bytes]] = {}
        self._stuck: set[int] = set()
        self._homes = [folder] * jobs
        self.workers: Workers[Found] = Workers(self._work)

    def _begin(self, worker: int) -> None:
        self._homes[worker] = self._folder / str(self._begun)
        self._homes[worker].mkdir()
        self._begun += 1
        self._watches[worker].end()
        self.workers.begin(worker)

    def _work(self, worker: int) -> Found:
        torch.set_num_threads(1)
        home, watch = self._homes[worker], self._watches[worker]
        asked = dataclasses.replace(self._asked, first=self._first.get(worker))
        return Share(home, int(home.name), asked, watch).run()

    def go(self) -> None:
        """From beginning to end."""
        for worker in range(self._jobs):
            self._begin(worker)
        while self.workers.running:
            asleep = time.monotonic()
            ended = self.workers.wait(1.0)
            if (slept := time.monotonic() - asleep) > STOOD_STILL:
                self.stood.append(slept)
            if ended is not None:
                self._end(ended)
            for worker, watch in enumerate(self._watches):
                at = watch.at()
                if at is not None and time.monotonic() - at[0] > STUCK:
                    self._stuck.add(worker)
                    self.workers.kill(worker)

    def _end(self, ended: Ended[Found]) -> None:
        if ended.made is not None:
            self._add(ended.made.tallies, ended.made.problems)
            self.weighed &= ended.made.weighed
            return
        self.deaths += 1
        counts = read_tallies(self._homes[ended.worker] / "counts.json")
        self._add(
            counts,
            [
                f"{name}: {tally.problems} found before a process died"
                for name, tally in counts.items()
                if tally.problems
            ],
        )
        at, first = self._watches[ended.worker].at(), self._first.pop(ended.worker, None)
        told, name = f"a process ended with {ended.death}", "all"
        if at is not None and ended.worker in self._stuck and first != at[1:] and not self.workers.asked:
            self._stuck.remove(ended.worker)
            self._first[ended.worker] = at[1:]
            self._add({at[1]: Tally(stalls=1)}, [])
            self._begin(ended.worker)
            return
        self._stuck.discard(ended.worker)
        if at is not None:
            begun, name, data = at
            told = f"{told}, {time.monotonic() - begun:.0f} s after it began to read an input"
            told += f", kept as {keep_found(self._asked.home, name, data, told)}"
        self._add({name: Tally(problems=1)}, [f"{name}: {told}"])
        is_early = self._asked.inputs is None and time.monotonic() < self._asked.end
        if is_early and at is not None and not self.workers.asked and self.deaths < MOST_DEATHS:
            self._begin(ended.worker)

    def _add(self, tallies: dict[str, Tally], problems: list[str]) -> None:
        self.tallies = added(self.tallies, tallies)
        self.problems += problems

    def reached(self, seconds: float) -> None:
        """The same with the other engine, which has a process of its own for each target."""
        asked = self._asked
        chosen = [each.name for each in targets(self._folder, asked.only, light=asked.light)]
        each = max(1, math.ceil(seconds * self._jobs / len(chosen)))

        def work(worker: int) -> Found:
            tallies: dict[str, Tally] = {}
            for name in chosen[worker :: self._jobs]:
                counts = self._folder / f"counts-{worker}.json"
                coverage.run(name, asked.home, each, asked.seed, counts)
                tallies = added(tallies, read_tallies(counts))
                counts.unlink(missing_ok=True)
            return Found(tallies, [f"{name}: see found" for name, tally in tallies.items() if tally.problems], True)

        self.workers = Workers(work)
        for ended in self.workers.all(self._jobs):
            if ended.made is None:
                self._add({"all": Tally(problems=1)}, [f"a process ended with {ended.death}"])
            else:
                self._add(ended.made.tallies, ended.made.problems)


def added(before: dict[str, Tally], now: dict[str, Tally]) -> dict[str, Tally]:
    """What two runs have counted."""
    return {name: before.get(name, Tally()) + now.get(name, Tally()) for name in {**before, **now}}


def _print(tallies: dict[str, Tally]) -> None:
    width = max(map(len, tallies), default=0)
    print(f"{'target':{width}} {'inputs':>9} {'refused':>9} outcomes slowest s       MB stalls problems")
    whole = Tally()
    for name, tally in {**tallies, "all": None}.items():
        whole += tally or Tally()
        shown = tally or whole
        print(
            f"{name:{width}} {shown.inputs:9} {shown.refused:9} {shown.outcomes:8} {shown.slowest:9.2f} "
            f"{shown.largest / 1e6:8.1f} {shown.stalls:6} {shown.problems:8}"
        )


if __name__ == "__main__":
    main()
