"""1.x files that break exactly one rule each, with the valid file from which each was made.

A case starts from a valid model and replaces, drops or adds entries.  Class, field and place of the error are stated
by the case, by the spec; the words *expected* and *got* are what uqff says.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import uqff
from tools.vectors import bad_files, bad_layers
from tools.vectors.broken import SHARD, Broken
from tools.vectors.entries import read_file
from tools.vectors.good_entries import Files, models

FOLDER = "bad-entries"
CASES = (*bad_layers.CASES, *bad_files.CASES)


def files() -> Files:
    """``bad-entries/NAME.uqff`` (or ``NAME-0.uqff``, ...) and ``bad-entries/index.json``."""
    found: Files = {}
    index = []
    for bad in (bad for cases in CASES for bad in cases()):
        if bad.near_miss not in models():
            raise KeyError(bad.near_miss)
        index.append(_row(bad))
        for name, data in bad.files.items():
            if f"{FOLDER}/{name}" in found:
                raise ValueError(f"two files are called {name}")
            found[f"{FOLDER}/{name}"] = data
    rows = ",\n".join(f" {json.dumps(row)}" for row in index)
    found[f"{FOLDER}/index.json"] = f"[\n{rows}\n]\n".encode()
    return found


def _offset(bad: Broken) -> int | None:
    """Where the error is; None where no byte of a file is at fault."""
    file, entry = bad.place
    if bad.error == SHARD and entry is None:
        return None
    if entry is None:
        return 8
    if entry.startswith("@"):
        return int(entry[1:])
    return next(found.offset for found in read_file(bad.files[file])[0] if found.name == entry)


def _row(bad: Broken) -> dict[str, Any]:
    """A line of the index.

    Raises:
        AssertionError: uqff does not raise what the spec demands.
    """
    error = _raised(bad)
    file, offset = bad.place[0], _offset(bad)
    got = None if error is None else (type(error).__name__, error.field, Path(error.file or "").name, error.offset)
    if error is None or got != (bad.error, bad.field, file, offset):
        raise AssertionError(f"{bad.name}: expected {(bad.error, bad.field, file, offset)}, got {got}: {error}")
    return {
        "files": list(bad.files),
        "section": bad.section,
        "rule": bad.rule,
        "near_miss": bad.near_miss,
        "error": bad.error,
        "file": file,
        "field": bad.field,
        "offset": offset,
        "problem": error.problem,
    }


def _raised(bad: Broken) -> uqff.UqffError | None:
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory) / name for name in bad.files]
        for path, data in zip(paths, bad.files.values(), strict=True):
            path.write_bytes(data)
        try:
            with uqff.open(paths[0]) as file:
                for key in file:
                    file[key]
        except uqff.UqffError as error:
            return error
    return None
