"""How far a run is, noted now and then beside what it makes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from uqff.container.queue import WriteQueue
    from uqff.container.staging import Journal
    from uqff.container.tensors import TensorWriter

__all__ = ["NOTED_EVERY", "Notes"]

NOTED_EVERY: Final = 5.0
"""Seconds of work that an interruption may cost."""


class Notes:
    """Notes now and then how far a run is, so that it can be resumed: all measures of each finished layer, in order."""

    def __init__(self, journal: Journal, queue: WriteQueue, files: list[TensorWriter]) -> None:
        self._journal = journal
        self._writer = queue
        self._files = files
        self._done = list(journal.done)
        self._noted = time.monotonic()

    def of(self, at: int) -> list[list[Sequence[Any]]] | None:
        """The note of layer ``at``; None if it is still to be made."""
        return self._done[at] if at < len(self._done) else None

    def add(self, note: list[list[Sequence[Any]]]) -> None:
        """Note the next layer, whose parts the queue has or will have written before it comes to this."""
        self._done.append(note)
        if time.monotonic() - self._noted >= NOTED_EVERY:
            self._noted = time.monotonic()
            self._writer.submit(partial(self._commit, list(self._done)), 0)

    def _commit(self, done: list[Any]) -> None:
        for file in self._files:
            file.flush()
        self._journal.commit([file.path.name for file in self._files], done)
