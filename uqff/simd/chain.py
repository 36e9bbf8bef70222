"""Stages one after the other, made once and then done by one call: what one of them writes, the next one reads.

Of a product that takes a fraction of a millisecond, much is what it takes to begin: Python, arguments, memory for the
result.  In a chain all of that is there beforehand, and threads wait in compiled code from one stage to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from uqff.simd import crew
from uqff.simd.crew import RANGES, Memory, Shared

__all__ = ["Chain", "Task"]

_RUN: Any = crew.run_stages


class Task(NamedTuple):
    """What a stage does, or a part of that.

    Attributes:
        shared: for ranges of items.
        arguments: of it; arrays stay where they are.
        n: items.
        grain: the smallest range worth a thread, or the alignment that the function needs.
    """

    shared: Shared
    arguments: tuple[Any, ...]
    n: int = 1
    grain: int = 1

    def __call__(self) -> None:
        """Do it now."""
        self.shared(self.arguments, self.n, grain=self.grain)


class Chain:
    """Stages of tasks: those of a stage are done at the same time.

    Example:
        >>> from uqff.simd.chain import Chain
        >>> Chain([], threads=2)(1)
    """

    def __init__(self, stages: Sequence[Sequence[Task]], threads: int) -> None:
        """Compile what has not been compiled, and put arguments in their places.

        Args:
            stages: in order.
            threads: that ranges are made for.
        """
        self._held: list[Any] = []
        self._alone: Memory = np.zeros(crew.SIZE, np.int64)
        self._stages = np.array([word for stage in stages for word in self._stage(stage, threads)], np.int64)

    def _stage(self, tasks: Sequence[Task], threads: int) -> list[int]:
        grains = sum(-(-task.n // task.grain) for task in tasks)
        threads = max(min(threads, grains), 1)
        items = sum(task.n for task in tasks)
        words: list[int] = []
        ranges = 0
        for task in tasks:
            frame = task.shared.frame(task.arguments)
            self._held.append((frame, task))
            share = -(-items // (threads * RANGES)) if threads > 1 else task.n
            step = max(-(-share // task.grain), 1) * task.grain
            ranges += -(-task.n // step)
            words += [frame.ctypes.data, task.n, step, ranges]
        return [3 + len(words), threads - 1, ranges, *words]

    def __call__(self, threads: int, held: Any = None) -> None:
        """Do it.

        Args:
            threads: that take part at most, this one included.
            held: what else is to be kept as long as they do.
        """
        if not len(self._stages):
            return
        if threads <= 1 or not crew._crew().run(self._stages, (self._held, held), threads - 1):
            _RUN(self._alone, self._stages, 0, 0, 1)

    def places(self, array: Any) -> list[tuple[Memory, int]]:
        """Where the address of an array is kept: of each frame that has it, the frame and the number there.

        Another address may be put there, between one call and the next.
        """
        address = array.ctypes.data
        return [(frame, int(at)) for frame, _ in self._held for at in np.flatnonzero(frame == address)]
