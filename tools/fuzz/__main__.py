"""``make fuzz TIME=SECONDS``: only a UqffError comes out of a hostile input, within bounded time and memory.

An input is a changed one of the corpus: the seeds, and each input that gave an outcome (kind of error, problem, field)
which none before had given; these are kept, beyond the run, in ``~/.cache/uqff-fuzz`` or where ``UQFF_FUZZ`` says.
What breaks a promise is kept there too, under ``found``.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from types import FrameType

from tools.fuzz.mutators import mutated
from tools.fuzz.targets import Target, targets
from uqff import UqffError

MOST_SECONDS = 2.0
"""Of processor time, for one input."""

MOST_BYTES, TIMES_INPUT = 64_000_000, 4
"""That memory may grow by for one input: so much, and so many times its size."""

HANGING = 30
"""Seconds of the clock after which an input is given up."""


class Hanging(BaseException):
    """An input that takes for ever."""


def _alarm(number: int, frame: FrameType | None) -> None:
    raise Hanging


class Memory:
    """By how much this process grows for an input; Linux only."""

    def __init__(self) -> None:
        self._possible = sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)
        self._before = 0

    def begin(self) -> None:
        if self._possible:
            Path("/proc/self/clear_refs").write_bytes(b"5")
            self._before = self._read(b"VmRSS:")

    def grown(self) -> int:
        return self._read(b"VmHWM:") - self._before if self._possible else 0

    def _read(self, name: bytes) -> int:
        status = Path("/proc/self/status").read_bytes()
        at = status.index(name) + len(name)
        return int(status[at : status.index(b"kB", at)]) * 1024


class Campaign:
    """The inputs of one target."""

    def __init__(self, target: Target, home: Path, random: Random) -> None:
        self.target, self.random, self.memory = target, random, Memory()
        name = re.sub(r"[^a-z0-9]+", "-", target.name.lower())
        self.kept, self.found = home / "corpus" / name, home / "found" / name
        self.kept.mkdir(parents=True, exist_ok=True)
        grown = [path.read_bytes() for path in sorted(self.kept.iterdir())]
        self.corpus = [*target.seeds, *grown]
        self.outcomes: set[str] = set()
        self.inputs = self.errors = 0
        self.slowest, self.largest = 0.0, 0
        self.problems: list[str] = []
        for data in self.corpus:
            self.outcomes.add(self.run(data))

    def run(self, data: bytes) -> str:
        """Read an input; its outcome."""
        self.inputs += 1
        self.memory.begin()
        start, problem = time.process_time(), ""
        signal.alarm(HANGING)
        try:
            outcome = f"fine {self.target.read(data) or ''}"
        except UqffError as error:
            self.errors += 1
            str(error)
            outcome = f"{type(error).__name__} {error.problem} {re.sub('[0-9]+', '#', str(error.field))[:60]}"
        except Hanging:
            outcome, problem = "hangs", f"takes more than {HANGING} s"
        except Exception as error:  # noqa: BLE001  (that is what is looked for)
            outcome = f"escape {type(error).__name__}"
            problem = f"{type(error).__name__}: {error}"[:300]
        finally:
            signal.alarm(0)
        took, grown = time.process_time() - start, self.memory.grown()
        self.slowest, self.largest = max(self.slowest, took), max(self.largest, grown - TIMES_INPUT * len(data))
        if took > MOST_SECONDS and self.inputs > len(self.corpus):  # at first, modules are imported
            problem = problem or f"took {took:.1f} s"
        if grown > MOST_BYTES + TIMES_INPUT * len(data) and self.inputs > len(self.corpus):
            problem = problem or f"took {grown} bytes for {len(data)}"
        if problem:
            self._keep(self.found, data)
            self.problems.append(f"{self.target.name}: {problem}")
        return outcome

    def step(self) -> None:
        """One more input."""
        data = mutated(self.random.choice(self.corpus), self.target.kind, self.random, self.corpus)
        outcome = self.run(data)
        if outcome not in self.outcomes:
            self.outcomes.add(outcome)
            if len(data) < 100_000:
                self.corpus.append(data)
                self._keep(self.kept, data)

    def _keep(self, folder: Path, data: bytes) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def main() -> None:
    """Take turns among the targets until the time is over."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("--time", type=float, default=60, metavar="SECONDS", help="for all targets together")
    parser.add_argument("--inputs", type=int, metavar="N", help="of each target, in place of a time")
    parser.add_argument("--seed", type=int, default=None, help="of the changes; another one each time without")
    parser.add_argument("--only", default="", metavar="NAME", help="only targets whose name begins so")
    arguments = parser.parse_args()
    seed = int.from_bytes(os.urandom(4), "little") if arguments.seed is None else arguments.seed
    home = Path(os.environ.get("UQFF_FUZZ") or Path.home() / ".cache" / "uqff-fuzz")
    signal.signal(signal.SIGALRM, _alarm)
    with tempfile.TemporaryDirectory(prefix="uqff-fuzz-") as folder:
        chosen = [each for each in targets(Path(folder)) if each.name.startswith(arguments.only)]
        campaigns = [Campaign(each, home, Random(f"{seed} {each.name}")) for each in chosen]
        end = time.monotonic() + arguments.time
        for turn in itertools.count():
            if turn >= arguments.inputs if arguments.inputs else time.monotonic() > end:
                break
            for campaign in campaigns:
                campaign.step()
    print(f"seed {seed}")
    print(f"{'target':18} {'inputs':>9} {'refused':>9} outcomes slowest s MB over 4x problems")
    for each in campaigns:
        print(
            f"{each.target.name:18} {each.inputs:9} {each.errors:9} {len(each.outcomes):8} {each.slowest:9.2f} "
            f"{each.largest / 1e6:10.1f} {len(each.problems):8}"
        )
    problems = [problem for each in campaigns for problem in each.problems]
    for problem in list(dict.fromkeys(problems))[:40]:
        print(problem)
    print(f"{sum(each.inputs for each in campaigns)} inputs, {len(problems)} problems")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
