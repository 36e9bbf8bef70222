"""How much longer a tokenizer makes a text, by what its own description says: a few short rules in a row can make a
thousand million characters of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from uqff.errors import UnsupportedError
from uqff.limits import MAX_TEXT_GROWTH, MAX_TEXT_PREPENDED

__all__ = ["check_growth"]

TABLE: Final = "Precompiled"
"""A table of characters, whose longest entry is not looked for: a second one is too much."""

GROWTH: Final = {
    "Strip": 1,
    "StripAccents": 1,
    "Nmt": 1,
    "Fuse": 1,
    "ByteFallback": 1,
    "Metaspace": 1,
    "Split": 1,
    "Punctuation": 1,
    "Digits": 1,
    "Whitespace": 1,
    "WhitespaceSplit": 1,
    "BertPreTokenizer": 1,
    "CharDelimiterSplit": 1,
    "UnicodeScripts": 1,
    "Prepend": 1,
    "ByteLevel": 2,
    "Lowercase": 3,
    "NFKC": 18,
    "NFKD": 18,
    TABLE: 18,
}
"""By type, characters that may become of one: U+FDFA has 18 in compatibility forms."""

OTHERS: Final = 4
"""Of all other types."""


def check_growth(part: Mapping[str, Any], field: str) -> None:
    """Refuse a normalizer, pre-tokenizer or decoder that may make a text too long.

    Args:
        part: as ``tokenizer.json`` describes it.
        field: its name there.

    Raises:
        UnsupportedError: it does.
    """
    growth, prepended, tables = 1, 0, 0
    for each in _steps(part):
        tables += each.get("type") == TABLE
        growth *= _growth(each) if tables < 2 else MAX_TEXT_GROWTH + 1
        prepended += len(str(each.get("prepend", ""))) if each.get("type") == "Prepend" else 0
        if growth > MAX_TEXT_GROWTH or prepended > MAX_TEXT_PREPENDED:
            break
    if growth > MAX_TEXT_GROWTH:
        raise UnsupportedError(
            "tokenizer makes texts too long", field=field, expected=f"{MAX_TEXT_GROWTH} times at most", got="more"
        )
    if prepended > MAX_TEXT_PREPENDED:
        raise UnsupportedError(
            "tokenizer puts too much in front", field=field, expected=f"{MAX_TEXT_PREPENDED} characters", got="more"
        )


def _steps(part: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """In order, those of sequences within sequences, too."""
    waiting = [part]
    while waiting:
        each = waiting.pop()
        inner = next((each[name] for name in ("normalizers", "pretokenizers", "decoders") if name in each), None)
        if inner is None:
            yield each
        else:
            waiting += reversed(inner)


def _growth(step: Mapping[str, Any]) -> int:
    if step.get("type") != "Replace":
        return GROWTH.get(str(step.get("type")), OTHERS)
    content, pattern = str(step.get("content", "")), step.get("pattern")
    text = pattern.get("String") if isinstance(pattern, Mapping) else None
    if text:
        return max(1, -(-len(content) // len(text)))
    return len(content) + 1  # an expression may match what is empty, between all characters
