"""Documents beside the weights, which are parsed whole: their length and the number of their values are bounded."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uqff.bounded_json import parse_json
from uqff.container.atomic import flush_to_disk
from uqff.errors import FormatError

__all__ = [
    "check_regular",
    "is_present",
    "json_bytes",
    "read_at_most",
    "read_json",
    "read_text",
    "write_json",
]


def read_at_most(path: Path, most: int) -> bytes:
    """The bytes of a file, or the first ``most + 1`` of a longer one.

    No more memory is taken than a file is long; what comes out of a pipe has no length beforehand.
    """
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        length = min(status.st_size, most) if stat.S_ISREG(status.st_mode) else most
        return file.read(length + 1)


def check_regular(path: Path) -> Path:
    """Refuse what is no file but a pipe, which would wait for a writer, or a device, which may have no end.

    Returns:
        The path.

    Raises:
        FormatError: it is a pipe, a socket or a device.
        OSError: it cannot be looked up.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a directory, whoever opens it says so
        raise FormatError("not a regular file", file=str(path))
    return path


def is_present(path: Path) -> bool:
    """Whether there is such a file; False for a directory of that name, too.

    Raises:
        FormatError: a pipe, a socket or a device: as good as nothing to a reader who would then do without the file.
        OSError: it cannot be looked up.
    """
    try:
        return check_regular(path).is_file()
    except (FileNotFoundError, NotADirectoryError):
        return False


def read_json(path: Path, most: int) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        path: of the file.
        most: bytes that are read at most.

    Raises:
        FormatError: it is no regular file, is longer, has too many values, or is not a JSON object.
    """
    raw = read_at_most(check_regular(path), most)
    if len(raw) > most:
        raise FormatError("file is too long", file=str(path), expected=f"at most {most} bytes")
    return parse_json(raw, path)


def read_text(path: Path, most: int) -> str:
    """A text from a file.

    Args:
        path: of the file.
        most: bytes that are read at most.

    Raises:
        FormatError: it is no regular file, is longer, or is not UTF-8.
    """
    raw = read_at_most(check_regular(path), most)
    if len(raw) > most:
        raise FormatError("file is too long", file=str(path), expected=f"at most {most} bytes")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError("text is not Unicode", file=str(path), offset=error.start) from error


def json_bytes(document: Mapping[str, Any], path: Path) -> bytes:
    """A JSON object as it is written.

    Args:
        document: the object.
        path: where it will stand, for messages.

    Raises:
        FormatError: a text in it is not Unicode: a file name of other bytes, for example.
    """
    try:
        return json.dumps(document, indent=2, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        text = error.object[max(0, error.start - 20) : error.end + 20].strip()
        raise FormatError("text is not Unicode", file=str(path), got=repr(text)) from None


def write_json(path: Path, document: Mapping[str, Any], *, text: bytes | None = None) -> None:
    """Write a JSON object to a new file, and flush it to the disk.

    Args:
        path: of the file.
        document: the object.
        text: of it; if None, it is made.

    Raises:
        FormatError: a text in it is not Unicode.
        OSError: the file is there, or cannot be written.
    """
    raw = json_bytes(document, path) + b"\n" if text is None else text
    with open(path, "xb") as file:
        file.write(raw)
        flush_to_disk(file)
