"""The inputs of one target, and what they took."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import hashlib
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import Protocol

from tools.fuzz.mutators import mutated
from tools.fuzz.target import Target
from uqff import UqffError
from uqff.container.atomic import atomic_file

__all__ = ["HANGING", "Campaign", "Tally", "keep_found", "read_tallies", "write_tallies"]

MOST_SECONDS = 2.0
"""Of processor time, for one input."""

MOST_BYTES, TIMES_INPUT = 64_000_000, 4
"""That memory may grow by for one input: so much, and so many times its size."""

SUSPECT_BYTES = MOST_BYTES // 4
"""That memory may grow by for some inputs together, after which each is read again and weighed by itself."""

HANGING = 30
"""Seconds of the clock after which an input is given up."""

LONGEST_KEPT, MOST_KEPT = 100_000, 4000
"""Bytes of an input that is kept in the corpus, and how many of these a target has."""

SETTLED = 3.0
"""Seconds of the clock before an input that took too long is read again: a host may have run others on this core."""

MOST_FOUND = 20
"""Inputs that are kept of one problem."""


class Hanging(BaseException):
    """An input that takes for ever."""


def _alarm(number: int, frame: FrameType | None) -> None:
    raise Hanging


class Memory:
    """By how much this process grows; Linux with glibc only."""

    def __init__(self) -> None:
        self.is_possible = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")
        self._before = 0
        try:  # some sandboxes have not all of /proc
            self.begin()
            self.grown()
        except (OSError, ValueError):
            self.is_possible = False

    def begin(self) -> None:
        if self.is_possible:
            ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps in reserve would hide as much
            Path("/proc/self/clear_refs").write_bytes(b"5")
            self._before = self._read(b"VmRSS:")

    def grown(self) -> int:
        return self._read(b"VmHWM:") - self._before if self.is_possible else 0

    def _read(self, name: bytes) -> int:
        status = Path("/proc/self/status").read_bytes()
        at = status.index(name) + len(name)
        return int(status[at : status.index(b"kB", at)]) * 1024


@dataclass
class Tally:
    """What was counted of a target.

    Attributes:
        inputs: that were read.
        refused: of which so many by a :class:`UqffError`.
        outcomes: kinds of error, problem and field; the most of any run.
        slowest: seconds of processor time.
        largest: bytes that memory grew by, beyond four times an input that was weighed by itself.
        problems: broken promises.
        stalls: inputs that took too long once, and not when they were read again: a machine was busy, or stood still.
    """

    inputs: int = 0
    refused: int = 0
    outcomes: int = 0
    slowest: float = 0.0
    largest: int = 0
    problems: int = 0
    stalls: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.inputs + other.inputs,
            self.refused + other.refused,
            max(self.outcomes, other.outcomes),
            max(self.slowest, other.slowest),
            max(self.largest, other.largest),
            self.problems + other.problems,
            self.stalls + other.stalls,
        )


def read_tallies(path: Path) -> dict[str, Tally]:
    """What earlier runs have counted, by target."""
    return {name: Tally(**tally) for name, tally in json.loads(path.read_bytes()).items()} if path.is_file() else {}


def write_tallies(path: Path, tallies: dict[str, Tally]) -> None:
    """See :func:`read_tallies`."""
    with atomic_file(path) as file:
        file.write(json.dumps({name: asdict(tally) for name, tally in tallies.items()}, indent=1).encode())


class Noted(Protocol):
    """Is told of each input before and after it is read."""

    def begin(self, target: str, data: bytes) -> None: ...

    def end(self) -> None: ...


@dataclass
class _Read:
    """What came of reading an input: its outcome, seconds of the processor, a broken promise and how it shows."""

    outcome: str = ""
    took: float = 0.0
    problem: str = ""
    told: str = ""
    is_refused: bool = False
    is_slow: bool = False


class Campaign:
    """The inputs of one target.

    Attributes:
        target: it.
        corpus: inputs that others are made of: the seeds, and each that gave an outcome which none before had given.
        tally: what was counted.
        problems: broken promises.
    """

    def __init__(self, target: Target, home: Path, random: Random, watch: Noted | None = None) -> None:
        self.target, self.random, self.memory, self.home, self._watch = target, random, Memory(), home, watch
        self.kept = home / "corpus" / _folder(target.name)
        self.kept.mkdir(parents=True, exist_ok=True)
        self._known = {path.name: path.read_bytes() for path in self._others()}
        self.corpus = [*target.seeds, *self._known.values()]
        self.outcomes: set[str] = set()
        self.tally = Tally()
        self.problems: list[str] = []
        self._reported: Counter[str] = Counter()
        self._warm = False
        signal.signal(signal.SIGALRM, _alarm)
        for data in self.corpus:
            self.outcomes.add(self.run(data)[0])
        self.tally.outcomes = len(self.outcomes)
        self._warm = True

    def _others(self) -> list[Path]:
        """Files of the corpus; of one that is being written, there is another name."""
        return sorted(path for path in self.kept.iterdir() if not path.name.startswith("."))

    def adopt(self) -> None:
        """Read what other processes have added to the corpus since."""
        for path in self._others():
            if path.name not in self._known:
                self._known[path.name] = data = path.read_bytes()
                self.take(data)

    def run(self, data: bytes) -> tuple[str, float]:
        """Read an input, again if it takes too long; its outcome, and seconds of processor time."""
        self.tally.inputs += 1
        read = self._read(data)
        if read.is_slow:
            time.sleep(SETTLED)
            with _told_where() as told:
                read = self._read(data)
            self.tally.stalls += not read.is_slow
            read.told = read.told or "\n".join(filter(None, [read.problem, *told]))
        self.tally.refused += read.is_refused
        if self._warm:
            self.tally.slowest = max(self.tally.slowest, read.took)
        if read.problem:
            self._report(data, read.problem, read.told)
        return read.outcome, read.took

    def _read(self, data: bytes) -> _Read:
        if self._watch is not None:
            self._watch.begin(self.target.name, data)
        read, start = _Read(), time.process_time()
        signal.alarm(HANGING)
        try:
            self._note(data, read)
        except Hanging:
            read.outcome, read.problem, read.is_slow = "hangs", f"takes more than {HANGING} s", True
        finally:
            signal.alarm(0)
        read.took = time.process_time() - start
        if self._watch is not None:
            self._watch.end()
        if self._warm and read.took > MOST_SECONDS:  # at first, modules are imported
            read.problem, read.is_slow = read.problem or f"took {read.took:.1f} s", True
        return read

    def _note(self, data: bytes, read: _Read) -> None:
        try:
            read.outcome = f"fine {self.target.read(data) or ''}"
        except UqffError as error:
            read.is_refused = True
            str(error)
            read.outcome = re.sub("[0-9]+", "#", f"{type(error).__name__} {error.problem} {str(error.field)[:60]}")
        except Exception as error:  # noqa: BLE001  (that is what is looked for)
            read.outcome = f"escape {type(error).__name__}"
            read.problem, read.told = f"{type(error).__name__}: {error}"[:300], traceback.format_exc()

    def take(self, data: bytes) -> None:
        """Read an input, and keep it if it gave an outcome which none before had given."""
        outcome, _ = self.run(data)
        if outcome not in self.outcomes:
            self.outcomes.add(outcome)
            self.tally.outcomes = len(self.outcomes)
            if len(data) <= LONGEST_KEPT and len(self.corpus) < MOST_KEPT:
                self.corpus.append(data)
                self._known[_keep(self.kept, data).name] = data

    def batch(self, inputs: int, seconds: float = float("inf")) -> None:
        """So many more inputs, or as many as a time of the processor allows."""
        end, ran = _spent() + seconds, []
        self.memory.begin()
        for _ in range(inputs):
            at = int(self.random.random() * len(self.corpus))
            data = mutated(self.corpus[at], self.target.kind, self.random, self.corpus)
            ran.append(data)
            self.take(data)
            if _spent() > end:
                break
        self.weigh(ran)

    def weigh(self, ran: list[bytes]) -> None:
        """Look by how much memory has grown for some inputs; if by much, for each again by itself."""
        grown = self.memory.grown()
        if grown > SUSPECT_BYTES:
            grown = max(map(self._weigh, ran))
        self.tally.largest = max(self.tally.largest, grown)

    def _weigh(self, data: bytes) -> int:
        """By how much memory grows for one input, beyond so many times its size."""
        counted = self.tally.inputs, self.tally.refused
        self.memory.begin()
        self.run(data)
        self.tally.inputs, self.tally.refused = counted
        beyond = self.memory.grown() - TIMES_INPUT * len(data)
        if beyond > MOST_BYTES:
            self._report(data, f"took {beyond} bytes and {TIMES_INPUT} times its own {len(data)}")
        return beyond

    def _report(self, data: bytes, problem: str, told: str = "") -> None:
        self.tally.problems += 1
        if self._reported[problem] < MOST_FOUND:
            self._reported[problem] += 1
            kept = keep_found(self.home, self.target.name, data, told or problem)
            self.problems.append(f"{self.target.name}: {problem}, kept as {kept}")


@contextlib.contextmanager
def _told_where() -> Iterator[list[str]]:
    """In what is given: how the time was spent, and in which lines Python was, should that take half of too long."""
    told: list[str] = []
    before = os.times()
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback_later(HANGING / 2, file=file)
        try:
            yield told
        finally:
            faulthandler.cancel_dump_traceback_later()
        file.seek(0)
        after = os.times()
        user, system = after.user - before.user, after.system - before.system
        told += [f"{user:.1f} s of the processor, and {system:.1f} s in the system's calls", file.read()]


def _spent() -> float:
    """Seconds of the processor that this process and its children have taken: templates are rendered in one each."""
    return sum(os.times()[:4])


def _folder(target: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", target.lower())


def keep_found(home: Path, target: str, data: bytes, told: str) -> str:
    """Keep an input that breaks a promise, and a text that says how; the path below the home."""
    path = _keep(home / "found" / _folder(target), data)
    path.with_suffix(".txt").write_text(told, "utf-8", "backslashreplace")
    return path.relative_to(home).as_posix()


def _keep(folder: Path, data: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(data).hexdigest()[:16]
    beside = folder / f".{path.name}-{os.getpid()}"
    beside.write_bytes(data)
    beside.rename(path)
    return path
