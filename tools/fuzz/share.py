"""What one process of a campaign does: turns among all targets, and a note of what it is at, should it die of it."""

from __future__ import annotations

import gc
import mmap
import signal
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tools.fuzz.campaign import Campaign, Tally, write_tallies
from tools.fuzz.targets import targets

__all__ = ["Asked", "Found", "Share", "Watch"]

TURN = 0.5
"""Seconds of the processor that a target has before the next one has its turn."""

MOST_TOGETHER = 4096
"""Inputs of a turn."""

SAVED = 20.0
"""Seconds after which the count is written again, and the corpus read for what other processes have found."""

LONGEST_NOTED = 1 << 24
"""Bytes of an input that are noted before it is read."""


@dataclass(frozen=True)
class Asked:
    """What a campaign is to do.

    Attributes:
        home: of the corpus.
        only: the beginning of the targets' names.
        light: without targets that need ``transformers``.
        inputs: of each target, or None.
        end: time at which to end, if there is no number of inputs.
        seed: of the changes.
        first: target and input which a process before this one was ended at: to be read before all others.
    """

    home: Path
    only: str
    light: bool
    inputs: int | None
    end: float
    seed: int
    first: tuple[str, bytes] | None = None


@dataclass(frozen=True)
class Found:
    """What a process has found.

    Attributes:
        tallies: by target.
        problems: broken promises.
        weighed: whether memory was looked at.
    """

    tallies: dict[str, Tally]
    problems: list[str]
    weighed: bool


class Watch:
    """The input that a process is at: a file that both map, so that it outlives the process.

    ::

        f64 when it was begun, 0 if none is    u32 length of the target's name    u64 length of the input    both
    """

    HEAD = struct.Struct("<dIQ")

    def __init__(self, path: Path) -> None:
        with open(path, "w+b") as file:
            file.truncate(LONGEST_NOTED)
            self._map = mmap.mmap(file.fileno(), LONGEST_NOTED)

    def begin(self, target: str, data: bytes) -> None:
        """Note an input, or the beginning of a very long one."""
        name = target.encode()
        told = name + data[: LONGEST_NOTED - self.HEAD.size - len(name)]
        self._map[self.HEAD.size : self.HEAD.size + len(told)] = told
        self.HEAD.pack_into(self._map, 0, time.monotonic(), len(name), len(told) - len(name))

    def end(self) -> None:
        """It was read."""
        self.HEAD.pack_into(self._map, 0, 0.0, 0, 0)

    def at(self) -> tuple[float, str, bytes] | None:
        """Since when which target has read which input."""
        begun, name, length = self.HEAD.unpack_from(self._map, 0)
        if not begun:
            return None
        start = self.HEAD.size + name
        return begun, self._map[self.HEAD.size : start].decode(), self._map[start : start + length]


class Share:
    """The turns of one process."""

    def __init__(self, folder: Path, worker: int, asked: Asked, watch: Watch) -> None:
        """Make the models that inputs lie in, and read the corpus.

        Args:
            folder: an empty one.
            worker: number of the process; in others than the first, seeds are read, but not counted.
            asked: what to do.
            watch: for what it is at.
        """
        self._asked, self._is_over, self._counts = asked, False, folder / "counts.json"
        signal.signal(signal.SIGTERM, self._ask)
        chosen = targets(folder, asked.only, light=asked.light)
        begin = worker * 7 % max(len(chosen), 1)  # not all processes at the same targets at the end
        self.campaigns: list[Campaign] = []
        for each in chosen[begin:] + chosen[:begin]:
            if self._is_over:
                break
            self.campaigns.append(Campaign(each, asked.home, Random(f"{asked.seed} {worker} {each.name}"), watch))
            if worker:
                self.campaigns[-1].tally.inputs = self.campaigns[-1].tally.refused = 0
            if asked.first is not None and asked.first[0] == each.name:
                self.campaigns[-1].take(asked.first[1])
        gc.freeze()

    def _ask(self, number: int, frame: object) -> None:
        self._is_over = True

    @property
    def found(self) -> Found:
        """So far."""
        problems = [problem for each in self.campaigns for problem in each.problems]
        weighed = all(each.memory.is_possible for each in self.campaigns)
        return Found({each.target.name: each.tally for each in self.campaigns}, problems, weighed)

    def run(self) -> Found:
        """All turns."""
        saved = time.monotonic()
        for campaign, inputs, seconds in self._turns():
            if self._is_over:
                break
            campaign.batch(inputs, seconds)
            if time.monotonic() > saved + SAVED:
                write_tallies(self._counts, self.found.tallies)
                for each in self.campaigns:
                    each.adopt()
                saved = time.monotonic()
        return self.found

    def _turns(self) -> Iterator[tuple[Campaign, int, float]]:
        """Whose turn it is, for how many inputs and how long."""
        left = self._asked.inputs
        while self.campaigns and (left if left is not None else time.monotonic() < self._asked.end):
            turn = min(left or MOST_TOGETHER, MOST_TOGETHER)
            for campaign in self.campaigns:
                if left is None and time.monotonic() >= self._asked.end:
                    break
                yield campaign, turn, TURN if left is None else float("inf")
            left = None if left is None else left - turn
