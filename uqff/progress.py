"""How a long operation tells what it has done: it calls a function with one :class:`Step` after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

__all__ = ["Progress", "Stage", "Step", "Steps", "Unit"]

Stage = Literal[
    "quantize",
    "migrate",
    "convert",
    "dequantize",
    "load",
    "save",
    "verify",
    "checksum",
    "inspect",
    "diff",
    "report",
    "evaluate",
    "calibrate",
    "push",
    "plan",
]
Unit = Literal["weights", "bytes", "layers", "tokens"]


class Step(NamedTuple):
    """What has been done so far.

    Attributes:
        stage: the operation.
        key: what has just been done: path or key of a layer, name of a tensor or of a file.
        done: how many of them are done.
        total: of how many.
        work_done: how much of the work is done, in ``unit``. It is what time goes by.
        work: of how much.
        unit: ``weights`` where numbers are made, ``bytes`` where they are moved or read, ``layers`` where they are
            counted, ``tokens`` where a model runs.
    """

    stage: Stage
    key: str
    done: int
    total: int
    work_done: int
    work: int
    unit: Unit


Progress = Callable[[Step], None]
"""What ``progress=`` takes everywhere; called in the thread of the operation, which ends with what it raises."""


class Steps:
    """Counts what is done of an operation, and tells it."""

    def __init__(self, progress: Progress | None, stage: Stage, total: int, work: int, unit: Unit) -> None:
        """Nothing is told yet.

        Args:
            progress: is told; None for nobody.
            stage: see :class:`Step`, like the others.
            total: how many things are to be done.
            work: how much work they are in all.
            unit: of ``work``.
        """
        self._progress = progress
        self._stage: Stage = stage
        self._unit: Unit = unit
        self.done = 0
        self.total = total
        self.work_done = 0
        self.work = work

    def add(self, key: str, work: int, *, done: int = 1, tell: bool = True) -> None:
        """Count so much work.

        Args:
            key: what it was done on.
            work: how much, in the unit.
            done: how many things are done by it; 0 for a part of one.
            tell: whether to tell it: what an earlier run has done is only counted.
        """
        self.done += done
        self.work_done += work
        if tell and self._progress is not None:
            self._progress(Step(self._stage, key, self.done, self.total, self.work_done, self.work, self._unit))
