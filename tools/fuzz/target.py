"""What a target is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Target", "seed_of"]


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        name: what it is called.
        kind: of its inputs, see :mod:`tools.fuzz.mutators`.
        seeds: inputs to begin with.
        read: reads one, and may say what it found; whatever it raises but a :class:`uqff.UqffError` is an escape.
    """

    name: str
    kind: str
    seeds: list[bytes]
    read: Callable[[bytes], object]


def seed_of(path: Path) -> bytes:
    """A document in few bytes, anything else as it is."""
    data = path.read_bytes()
    return json.dumps(json.loads(data), separators=(",", ":")).encode() if path.suffix == ".json" else data
