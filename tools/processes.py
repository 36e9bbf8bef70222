"""Work spread over processes: forks of this one, which end when it ends, and whose death is told."""

from __future__ import annotations

import ctypes
import os
import pickle
import selectors
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

__all__ = ["ALONE", "Ended", "Workers", "scratch"]

T = TypeVar("T")

ALONE = {"UQFF_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Of the environment: each process has one thread, so that as many as there are cores do not hinder each other."""

DIES_WITH_PARENT = 1
"""``PR_SET_PDEATHSIG``, of Linux."""

LEAST_FREE = 1 << 28
"""Bytes for each process that must be free where files lie in memory."""


def scratch(jobs: int) -> str | None:
    """Where temporary files are made: in memory, if there is room for so many processes; None for the usual place."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        return None
    free = os.statvfs(memory)
    return str(memory) if free.f_bavail * free.f_frsize >= LEAST_FREE * jobs else None


class Ended(Generic[T]):
    """How a process has ended.

    Attributes:
        worker: its number.
        made: what its work returned; None if it died before.
        death: how it died: a signal's name, or an exit code; "" if it returned.
    """

    def __init__(self, worker: int, made: T | None, death: str) -> None:
        self.worker, self.made, self.death = worker, made, death


class Workers(Generic[T]):
    """Forks of this process, each with its number; SIGINT and SIGTERM reach them as SIGTERM, as does this one's end."""

    def __init__(self, work: Callable[[int], T]) -> None:
        """Nothing is begun.

        Args:
            work: is done in each fork, which is given its number; what it returns can be pickled.
        """
        self._work = work
        self._running: dict[int, tuple[int, int]] = {}
        self._made: dict[int, bytearray] = {}
        self._selector = selectors.DefaultSelector()
        self.asked = False
        self._handlers: dict[int, Any] = {}

    def _ask(self, number: int, frame: object) -> None:
        """End them all, each as it thinks fit."""
        self.asked = True
        for process, _ in self._running.values():
            os.kill(process, signal.SIGTERM)

    def begin(self, worker: int) -> None:
        """Start one."""
        if not self._handlers:
            self._handlers = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        parent = os.getpid()
        reading, writing = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        process = os.fork()
        if not process:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(DIES_WITH_PARENT, signal.SIGTERM)
            code = 1
            try:
                if os.getppid() == parent:
                    made = pickle.dumps(self._work(worker))
                    with os.fdopen(writing, "wb") as pipe:
                        pipe.write(made)
                    code = 0
            except BaseException:  # noqa: BLE001  (a fork must not go on)
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        os.close(writing)
        self._running[reading] = process, worker
        self._made[reading] = bytearray()
        self._selector.register(reading, selectors.EVENT_READ)
        if self.asked:
            os.kill(process, signal.SIGTERM)

    @property
    def running(self) -> bool:
        """Whether there is one that has not ended."""
        return bool(self._running)

    def kill(self, worker: int) -> None:
        """End one that does not answer."""
        for process, each in self._running.values():
            if each == worker:
                os.kill(process, signal.SIGKILL)

    def wait(self, seconds: float | None = None) -> Ended[T] | None:
        """The next one that has ended; None if none runs, or none has ended within so many seconds."""
        while self._running:
            ready = self._selector.select(seconds)
            if not ready and seconds is not None:
                return None
            for key, _ in ready:
                reading = key.fd
                if data := os.read(reading, 1 << 16):
                    self._made[reading] += data
                    continue
                self._selector.unregister(reading)
                os.close(reading)
                process, worker = self._running.pop(reading)
                code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                made = self._made.pop(reading)
                if not self._running:
                    for number, handler in self._handlers.items():
                        signal.signal(number, handler)
                    self._handlers = {}
                if code == 0:
                    return Ended(worker, pickle.loads(bytes(made)), "")
                return Ended(worker, None, signal.Signals(-code).name if code < 0 else f"exit code {code}")
        return None

    def all(self, count: int) -> list[Ended[T]]:
        """So many, from beginning to end, in the order of their numbers."""
        for worker in range(count):
            self.begin(worker)
        ended = []
        while (each := self.wait()) is not None:
            ended.append(each)
        return sorted(ended, key=lambda each: each.worker)
