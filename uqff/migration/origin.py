"""What a model was before it was migrated: noted where the format has room for it, and read again on the way back.

Metadata of 1.x files:

========================================  ==================================================================
``uqff.migrated_from``                    version of the blobs that the layers were: ``0.1.3``
``uqff.migrated_from.layers``             those of another version, a JSON object: ``{"7": "0.2.0"}``
``uqff.migrated_from.experts``            ``stacked``, if the experts of a layer were one blob
========================================  ==================================================================

Metadata of ``residual.safetensors``:

========================================  ==================================================================
``uqff.dequantized``                      its tensors that were dequantised from layers, a JSON list of names
========================================  ==================================================================
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

from uqff.codes import Version
from uqff.container.file import UqffFile
from uqff.container.mapped import MappedFile
from uqff.errors import FormatError
from uqff.schema.header import HEADER

__all__ = [
    "DEQUANTIZED",
    "MIGRATED_FROM",
    "blob_versions",
    "dequantized",
    "inherited",
    "note_of",
    "were_stacked",
    "with_dequantized",
]

MIGRATED_FROM: Final = "uqff.migrated_from"
LAYERS: Final = "uqff.migrated_from.layers"
EXPERTS: Final = "uqff.migrated_from.experts"
STACKED: Final = "stacked"
DEQUANTIZED: Final = "uqff.dequantized"


def note_of(file: UqffFile, *, stacked: bool) -> dict[str, str]:
    """The metadata that a 0.x model leaves in 1.x files.

    Args:
        file: the 0.x model.
        stacked: whether it has experts, in one blob for all.
    """
    versions = {int(key): _version_of_blob(file, key) for key in file}
    usual = Counter(versions.values()).most_common(1)[0][0]
    others = {str(index): str(version) for index, version in sorted(versions.items()) if version != usual}
    note = {MIGRATED_FROM: str(usual)}
    if others:
        note[LAYERS] = json.dumps(others)
    if stacked:
        note[EXPERTS] = STACKED
    return note


def inherited(metadata: Mapping[str, str]) -> dict[str, str]:
    """The notes among the metadata of a 1.x file."""
    return {name: metadata[name] for name in (MIGRATED_FROM, LAYERS, EXPERTS) if name in metadata}


def were_stacked(metadata: Mapping[str, str]) -> bool:
    """Whether the experts of a 1.x file were one blob for each projection."""
    return metadata.get(EXPERTS) == STACKED


def blob_versions(metadata: Mapping[str, str], keys: Iterable[str], newest: Version) -> dict[str, Version]:
    """The versions that blobs had, by key; ``newest`` in place of a newer one, nothing where there is no note.

    Raises:
        FormatError: a note is not one.
    """
    if MIGRATED_FROM not in metadata:
        return {}
    usual = _version(metadata[MIGRATED_FROM], MIGRATED_FROM)
    others = {key: _version(text, LAYERS) for key, text in _json(metadata, LAYERS, dict).items()}
    return {key: min(others.get(key, usual), newest) for key in keys}


def dequantized(residual: MappedFile | None) -> list[str]:
    """The tensors of a residual that were dequantised from layers.

    Raises:
        FormatError: the note is not one.
    """
    if residual is None:
        return []
    marks = _json(residual.header.metadata, DEQUANTIZED, list)
    return [mark for mark in marks if mark in residual.header.entries]


def with_dequantized(metadata: Mapping[str, str], names: Iterable[str]) -> dict[str, str] | None:
    """The metadata of a residual with another note; None if none is left."""
    texts = {name: text for name, text in metadata.items() if name != DEQUANTIZED}
    marks = sorted(names)
    return texts | ({DEQUANTIZED: json.dumps(marks)} if marks else {}) or None


def _version_of_blob(file: UqffFile, key: str) -> Version:
    version: Version = HEADER.read(file.blob(key)[: HEADER.fixed_size], exact=False)["version"]
    return version


def _version(text: str, name: str) -> Version:
    parts = text.split(".")
    if len(parts) != 3 or not all(part.isascii() and part.isdecimal() and len(part) < 4 for part in parts):
        raise FormatError("not a version", field=name, expected="0.1.0, ...", got=text)
    return Version(*map(int, parts))


def _json(metadata: Mapping[str, str], name: str, kind: type) -> Any:
    """A JSON object or list of texts; empty if there is none."""
    if name not in metadata:
        return kind()
    try:
        value = json.loads(metadata[name])
    except (ValueError, RecursionError) as exc:
        raise FormatError("note is not JSON", field=name, got=str(exc)) from exc
    texts = [*value, *value.values()] if isinstance(value, dict) else value
    if not isinstance(value, kind) or not all(isinstance(each, str) for each in texts):
        raise FormatError("unexpected note", field=name, expected=f"a JSON {kind.__name__} of texts", got=value)
    return value
