"""A 1.x model that breaks one rule."""

from __future__ import annotations

from typing import NamedTuple

from tools.vectors.good_entries import Files

FORMAT, UNSUPPORTED, SHAPE, SHARD = "FormatError", "UnsupportedError", "ShapeError", "ShardError"
RULES, FILES, FRAMING = "entries.md#layers", "entries.md#entries-of-a-file", "container.md#framing"
HUGE = 2**32 - 1


class Broken(NamedTuple):
    """A broken model.

    Attributes:
        name: of the files.
        section: of the spec that has the rule.
        rule: in words.
        files: the shards by name; the first is opened.
        error: class.
        field: suffix or name of the entry that breaks the rule.
        place: file, and the entry at whose first byte the error is; None for the header.
        near_miss: the valid vector that it was made from.
    """

    name: str
    section: str
    rule: str
    files: Files
    error: str
    field: str | None
    place: tuple[str, str | None]
    near_miss: str
