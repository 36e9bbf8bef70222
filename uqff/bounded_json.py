"""JSON of strangers: what it may cost is bounded before a value of it is made."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from uqff.errors import FormatError, located
from uqff.limits import MAX_DIGITS, MAX_HEADER_VALUES, MAX_WIDE_HEADER_BYTES

__all__ = ["check_values", "check_width", "parse_json"]

LONG: Final = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS + 1))
"""What may be an integer that is too long; it is looked for first, because checking every one costs time."""


def check_values(raw: bytes, *, field: str | None = None, offset: int | None = None, rule: str | None = None) -> None:
    """Refuse JSON that has so many values that it would outgrow its text many times.

    Raises:
        FormatError: with ``field``, ``offset`` and ``rule`` as given.
    """
    values = raw.count(b",") + raw.count(b"[") + 2 * raw.count(b"{")
    if values > MAX_HEADER_VALUES:
        raise FormatError(
            "too many values",
            rule=rule,
            field=field,
            offset=offset,
            expected=f"at most {MAX_HEADER_VALUES}",
            got=values,
        )


def check_width(raw: bytes, *, field: str | None = None, offset: int | None = None) -> None:
    """Refuse a long document with a character beyond ASCII, plain or escaped: Python would make it four times as long.

    Raises:
        FormatError: with ``field`` and ``offset`` as given.
    """
    if len(raw) > MAX_WIDE_HEADER_BYTES and (not raw.isascii() or b"\\u" in raw):
        raise FormatError(
            "too long for a document that is not plain ASCII",
            field=field,
            offset=offset,
            expected=f"at most {MAX_WIDE_HEADER_BYTES} bytes",
            got=len(raw),
        )


def _bounded(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def parse_json(raw: bytes, file: Path | str) -> dict[str, Any]:
    """A JSON object from its text, whose length is bounded already.

    Args:
        raw: the text.
        file: that it comes from, for messages.

    Raises:
        FormatError: it has too many values, or is not a JSON object.
    """
    with located(file=file):
        check_values(raw)
    try:
        value = json.loads(raw.decode("utf-8"), parse_int=_bounded if LONG.search(raw) else None)
        if b"\\u" in raw:  # an escape may name half a character, which could not be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as exc:
        raise FormatError("not JSON", file=str(file), got=str(exc)) from exc
    if not isinstance(value, dict):
        raise FormatError("not a JSON object", file=str(file), got=type(value).__name__)
    return value
