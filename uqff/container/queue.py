"""A thread that writes while others compute, with a bound on what waits for it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["WriteQueue"]


class _Closable(Protocol):
    def close(self) -> None: ...


_File = TypeVar("_File", bound=_Closable)


class WriteQueue:
    """Carries out jobs one after the other on a thread of its own.

    The first exception of a job ends the work and is raised by whatever is called next.  Leaving the block waits for
    the jobs if all is well, drops them if not, and closes the files.
    """

    def __init__(self) -> None:
        self._jobs: deque[tuple[Callable[[], None], int]] = deque()
        self._changed = threading.Condition()
        self._pending = 0
        self._unfinished = 0
        self._stopping = False
        self._failure: BaseException | None = None
        self._files: list[_Closable] = []
        self._thread = threading.Thread(target=self._work, name="uqff-writer", daemon=True)

    def own(self, file: _File) -> _File:
        """Close a file when the block is left; gives the file."""
        self._files.append(file)
        return file

    def submit(self, job: Callable[[], None], nbytes: int) -> None:
        """Add a job that keeps ``nbytes`` of memory until it is done."""
        with self._changed:
            self._raise()
            self._jobs.append((job, nbytes))
            self._pending += nbytes
            self._unfinished += 1
            self._changed.notify_all()

    def wait_below(self, nbytes: int) -> None:
        """Wait until the jobs that wait keep at most ``nbytes`` of memory, or none is left."""
        self._wait(lambda: self._pending <= nbytes)

    def join(self) -> None:
        """Wait until all jobs are done."""
        self._wait(lambda: False)

    def _wait(self, enough: Callable[[], bool]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not self._unfinished or enough())
            self._raise()

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._stopping)
                if self._stopping:
                    return
                job, nbytes = self._jobs.popleft()
            try:
                job()
            except BaseException as failure:  # noqa: BLE001  (raised again in the thread that submits)
                self._failure = failure
            # The job holds the memory it was counted with.
            del job
            with self._changed:
                self._pending -= nbytes
                self._unfinished -= 1
                self._stopping = self._stopping or self._failure is not None
                self._changed.notify_all()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.join()
        finally:
            with self._changed:
                self._stopping = True
                self._changed.notify_all()
            self._thread.join()
            for file in self._files:
                file.close()
