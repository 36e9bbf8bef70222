"""Every exception that uqff raises on purpose.

::

    UqffError
    ├── FormatError        bytes that break a rule of the format
    ├── UnsupportedError   a valid file that this library does not handle (newer version, unknown type)
    ├── ShapeError         a shape that a family, or a pair of weight and bias, cannot have
    ├── ShardError         a slice that cannot be cut, or a set of shards that does not fit together
    ├── MissingError       a layer or tensor that a file does not have; a KeyError too, as of every mapping
    ├── HubError           what the Hugging Face hub did not give, or gave otherwise than asked; an OSError too
    └── CommError          a collective that failed: a rank died, left, or did not come in time

Each error names what it knows of: file, layer, field path, byte offset, expected and got.  The parts are attributes and
joined, the message.  Lower modules know fields and offsets, higher ones layers and files: ``with located(...)``
fills in the parts that an error from within the block lacks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from os import PathLike
from typing import TypeVar

__all__ = [
    "CommError",
    "FormatError",
    "HubError",
    "MissingError",
    "ShapeError",
    "ShardError",
    "UnsupportedError",
    "UqffError",
    "located",
    "printable",
    "shortened",
]

_Self = TypeVar("_Self", bound="UqffError")


_LONGEST_PART = 400
"""Characters of a field, key or value that a message shows: a name in a hostile file may have a hundred million."""


_LONGEST_LIST = 700
"""Characters of what was expected that a message shows: mostly this package's own words, such as all architectures."""


def shortened(part: object, longest: int = _LONGEST_PART) -> str:
    """A name or value from a file, as much of it as a message shows."""
    text = str(part)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def printable(text: str) -> str:
    """Escape what a terminal would act on: names and values come from files."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class UqffError(Exception):
    """The root of the tree; catch it to catch everything.

    Attributes:
        problem: what is wrong, in one phrase.
        file: path of the file, if known.
        layer: key of the layer, if known.
        field: dotted path of the field, as in the spec's offset tables.
        offset: byte offset of the field, from the start of ``file`` if one is known, else from the start of the buffer.
        expected: what the rule asks for.
        got: what was found.
        rule: id of the rule of the format that is broken (:mod:`uqff.rules`), if it is one.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | None = None,
        layer: str | None = None,
        field: str | None = None,
        offset: int | None = None,
        expected: object = None,
        got: object = None,
        rule: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = file
        self.layer = layer
        self.field = field
        self.offset = offset
        self.expected = expected
        self.got = got
        self.rule = rule
        super().__init__(problem)

    def __str__(self) -> str:
        where = [
            f"file {self.file}" if self.file is not None else "",
            f"layer {shortened(self.layer)}" if self.layer is not None else "",
            f"field {shortened(self.field)}" if self.field is not None else "",
            f"offset {self.offset}" if self.offset is not None else "",
        ]
        what = [
            f"expected {shortened(self.expected, _LONGEST_LIST)}" if self.expected is not None else "",
            f"got {shortened(self.got)}" if self.got is not None else "",
        ]
        message = self.problem
        if any(what):
            message += ": " + ", ".join(filter(None, what))
        if any(where):
            message += " (" + ", ".join(filter(None, where)) + ")"
        return printable(message)

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.problem,), self.__dict__)

    def within(
        self: _Self, *, file: str | None = None, layer: str | None = None, base: int = 0, prefix: str = ""
    ) -> _Self:
        """Fill in the place, keeping what is known already.

        Args:
            file: path to name if no file is named yet.
            layer: key to name if no layer is named yet.
            base: where the buffer that ``offset`` counts from begins in the file.
            prefix: field path to put in front.
        """
        self.file = self.file if self.file is not None else file
        self.layer = self.layer if self.layer is not None else layer
        self.offset = self.offset + base if self.offset is not None else None
        if prefix:
            self.field = f"{prefix}.{self.field}" if self.field else prefix
        return self


@contextlib.contextmanager
def located(
    *, file: str | PathLike[str] | None = None, layer: str | None = None, base: int = 0, prefix: str = ""
) -> Iterator[None]:
    """Errors from within the block name the place, where they do not know a closer one.

    Args:
        file: path of the file.
        layer: key of the layer.
        base: where the buffer that offsets count from begins in the file.
        prefix: field path to put in front.
    """
    try:
        yield
    except UqffError as error:
        error.within(file=None if file is None else str(file), layer=layer, base=base, prefix=prefix)
        raise


class FormatError(UqffError):
    """The bytes break a rule of the format."""


class UnsupportedError(UqffError):
    """The bytes may be right, but this library does not handle them: a newer version, an unknown type."""


class ShapeError(UqffError):
    """A shape that the family cannot store, or that does not fit its companion."""


class ShardError(UqffError):
    """A slice that cannot be cut exactly, or a set of shard files with a gap or a repeated key."""


class MissingError(UqffError, KeyError):
    """A file has no layer or tensor of that name; what :class:`KeyError` is to every mapping."""


class HubError(UqffError, OSError):
    """The Hugging Face hub refused, could not be reached, or answered what was not asked for."""


class CommError(UqffError):
    """A collective failed on this rank: another one died, left, or did not come within the group's timeout."""
