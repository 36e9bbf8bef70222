"""Where the layers of a file lie: what the indices of both generations have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, NamedTuple, NoReturn

from uqff.codec.layer import Layer
from uqff.codes import Version
from uqff.container.framing import TensorEntry
from uqff.container.mapped import MappedFile
from uqff.errors import UnsupportedError
from uqff.families.base import QuantizedTensor
from uqff.schema.bricks import FieldTrace, Scope
from uqff.schema.entries import RawTensor

__all__ = ["HeldEntry", "LayerIndex", "Place"]


class Place(NamedTuple):
    """Where a blob or an entry lies: file, offset from the start of the file, length."""

    path: Path
    offset: int
    nbytes: int


class HeldEntry(NamedTuple):
    """An entry and the mapped file that holds it."""

    file: MappedFile
    entry: TensorEntry

    @property
    def view(self) -> memoryview:
        """Its bytes."""
        return self.file.slice(self.entry)

    @property
    def place(self) -> Place:
        """Where they lie."""
        return Place(self.file.path, self.entry.begin, self.entry.end - self.entry.begin)


class LayerIndex(ABC):
    """The layers of a set of files by their keys; methods take a key that :meth:`name` gives.

    Attributes:
        generation: ``0.x`` or ``1.x``.
        keys: of the layers, in their order.
        extra: what belongs to no layer, by name.
    """

    generation: ClassVar[str]
    keys: list[str]
    extra: dict[str, HeldEntry]

    @property
    @abstractmethod
    def version(self) -> Version:
        """Of the files."""

    @abstractmethod
    def name(self, key: object) -> str | None:
        """The key of a layer given by key or by number; None if there is none."""

    @abstractmethod
    def layer(self, name: str) -> Layer:
        """A layer; errors name file, key and offset."""

    @abstractmethod
    def fields(self, name: str, trace: list[FieldTrace] | None) -> tuple[type[QuantizedTensor], Scope]:
        """Its fields, as :meth:`uqff.UqffFile.fields` gives them."""

    @abstractmethod
    def place(self, name: str) -> Place:
        """Where its blob lies, or its codes."""

    @abstractmethod
    def places(self, name: str) -> dict[str, Place]:
        """Where each of its entries lies, by suffix; that of a blob is empty."""

    def blob(self, name: str) -> memoryview:
        """Its bytes in 0.x."""
        self._refuse("a 1.x layer is no blob", name)

    def entries(self, name: str) -> dict[str, RawTensor]:
        """Its entries in 1.x, by suffix."""
        self._refuse("a 0.x layer has no entries", name)

    def _refuse(self, problem: str, name: str) -> NoReturn:
        raise UnsupportedError(problem, file=str(self.place(name).path), layer=name)
