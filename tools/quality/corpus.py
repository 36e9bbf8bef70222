"""Text that every Python brings along: the sources of its standard library, in three parts that share no file."""

from __future__ import annotations

import sys
import sysconfig
import zlib
from pathlib import Path
from typing import Literal

Part = Literal["train", "calibrate", "evaluate"]
PARTS = 16
"""A file goes by the CRC of its name: one of so many parts is measured with, one is calibrated with."""
SKIPPED = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "ensurepip")
LARGEST = 200_000
"""Bytes: what is longer is a table."""


def texts(part: Part) -> list[str]:
    """The texts of a part, by path."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if any(each in SKIPPED for each in relative.parts) or path.stat().st_size > LARGEST:
            continue
        share = zlib.crc32(relative.as_posix().encode()) % PARTS
        if part == ("evaluate", "calibrate")[share] if share < 2 else part == "train":
            try:
                found.append(path.read_text("utf-8"))
            except UnicodeDecodeError:
                continue
    return found


def name() -> str:
    """Which Python's, as the texts differ from one to the next."""
    return ".".join(map(str, sys.version_info[:3]))


def write(part: Part, path: Path, most: int) -> Path:
    """Write a part as one file of at most so many characters, whole lines, unless it is there."""
    if not path.exists():
        text = "\n".join(texts(part))[:most]
        path.write_text(text[: text.rfind("\n") + 1], "utf-8")
    return path
