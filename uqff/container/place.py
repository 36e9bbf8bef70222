"""Where the bytes of a layer lie, and how their errors learn of it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from uqff.container.framing import Entry
from uqff.container.mapped import MappedFile

__all__ = ["Held", "Place"]


class Place(NamedTuple):
    """Where a blob or an entry lies: file, offset from the start of the file, length."""

    path: Path
    offset: int
    nbytes: int


class Held(NamedTuple):
    """An entry and the mapped file that holds it."""

    file: MappedFile
    entry: Entry

    @property
    def view(self) -> memoryview:
        """Its bytes."""
        return self.file.slice(self.entry)

    @property
    def place(self) -> Place:
        """Where they lie."""
        return Place(self.file.path, self.entry.begin, self.entry.end - self.entry.begin)
