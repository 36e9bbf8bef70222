"""What a conversion made, and what of it there is to know."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uqff.models.engine import Limit, limits_document

__all__ = ["Conversion", "conversion_document"]


@dataclass(frozen=True)
class Conversion:
    """A finished conversion.

    Attributes:
        path: of what was made, a directory or a file.
        format: ``UQFF 1.2.0``, ``UQFF 0.2.0`` or ``GGUF 3``.
        files: names of the files that hold weights; of a GGUF file, its own.
        types: how many layers or tensors are of each type.
        nbytes: of those files.
        written: names of the other files, tokenizer and configuration.
        notes: what is missing, rounded or otherwise not as in the source, in sentences; and the limits.
        limits: why the engine would not load or not run it.
    """

    path: Path
    format: str
    files: tuple[str, ...]
    types: Counter[str]
    nbytes: int
    written: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    limits: tuple[Limit, ...] = ()


def conversion_document(conversion: Conversion) -> dict[str, Any]:
    """The result as JSON values."""
    return {
        "path": str(conversion.path),
        "format": conversion.format,
        "files": list(conversion.files),
        "bytes": conversion.nbytes,
        "types": dict(sorted(conversion.types.items())),
        "written": list(conversion.written),
        "notes": list(conversion.notes),
        "limits": limits_document(conversion.limits),
    }
