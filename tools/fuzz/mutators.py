"""Changes to inputs: of bytes, of little-endian numbers, of JSON documents, of safetensors headers, of lines."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

__all__ = ["mutated"]

NUMBERS = (0, 1, 2, 7, 8, 31, 32, 33, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62)
WIDE = (*NUMBERS, 2**63 - 1, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "a", "\u00e9\U0001f600", [], {}, [[]], 0.5, 1e300, -1, -(2**63), 10**30, "x" * 300),
    *NUMBERS,
)

Mutator = Callable[[bytes, Random, Sequence[bytes]], bytes]


def _place(data: bytes, random: Random) -> int:
    """Somewhere, more often near the beginning, where headers are."""
    span = len(data) if random.random() < 0.5 else min(len(data), 64)
    return int(span * random.random())


@functools.lru_cache(maxsize=2048)
def _loaded(data: bytes) -> Any:
    """A document, which is never changed: the same inputs are changed again and again."""
    return json.loads(data)


def _byte(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    if not data:
        return bytes((random.randrange(256),))
    at = _place(data, random)
    value = data[at] ^ (1 << random.randrange(8)) if random.random() < 0.5 else random.randrange(256)
    return data[:at] + bytes((value,)) + data[at + 1 :]


def _number(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    at, size = _place(data, random), random.choice((1, 2, 4, 8))
    before = int.from_bytes(data[at : at + size], "little")
    value = random.choice((*WIDE, before + 1, before - 1, before * 2, len(data), len(data) - at))
    return data[:at] + (value % 2 ** (8 * size)).to_bytes(size, "little") + data[at + size :]


def _cut(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    return data[: _place(data, random)]


def _without(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    at = _place(data, random)
    return data[:at] + data[at + random.choice((1, 2, 4, 8, 32, 256)) :]


def _twice(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    at, size = _place(data, random), random.choice((1, 4, 8, 64, 512))
    return data[:at] + data[at : at + size] * random.choice((2, 2, 3, 50)) + data[at + size :]


def _splice(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    other = random.choice(others)
    return data[: _place(data, random)] + other[_place(other, random) :]


def _header(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Of a safetensors file, the JSON; the rest stays, and the length is put right."""
    size = int.from_bytes(data[:8], "little")
    if not 2 <= size <= len(data) - 8:
        return _number(data, random, others)
    text = _document(data[8 : 8 + size], random, others)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def _document(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    try:
        value = _loaded(data)
    except (ValueError, RecursionError):
        return _byte(data, random, others)
    for _ in range(random.choice((1, 1, 2, 4))):
        value = _changed(value, random)
    return json.dumps(value, separators=(",", ":"), ensure_ascii=random.random() < 0.5).encode("utf-8", "replace")


def _changed(value: Any, random: Random) -> Any:
    """A document with one value changed, taken away, put elsewhere, or renamed."""
    if not isinstance(value, (dict, list)) or not value or random.random() < 0.15:
        if isinstance(value, int) and abs(value) < 2**64 and random.random() < 0.5:
            return random.choice((value + 1, value - 1, value * 2, -value, value / 2, str(value)))
        return random.choice(VALUES)
    if isinstance(value, list):
        made = list(value)
        at = random.randrange(len(made))
        made[at : at + 1] = random.choice(([_changed(made[at], random)],) * 4 + ([], [made[at]] * 2, [made[at]] * 200))
        return made
    pairs = list(value.items())
    at = random.randrange(len(pairs))
    key, each = pairs[at]
    change = random.random()
    if change < 0.1:
        del pairs[at]
    elif change < 0.2:
        pairs[at] = (str(random.choice(VALUES)), each)
    elif change < 0.3:
        pairs.append((f"{key}.{random.choice(('weight', 'bias', 'weight.format', '0'))}", each))
    else:
        pairs[at] = (key, _changed(each, random))
    return dict(pairs)


def _lines(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    lines[at : at + 1] = random.choice(
        ([], [lines[at]] * 2, [b" " + lines[at]], [random.choice(lines)], [_syntax(lines[at], random)])
    )
    return b"\n".join(lines)


def _syntax(line: bytes, random: Random) -> bytes:
    at = random.randrange(len(line) + 1)
    return line[:at] + random.choice(list(b"()[]{}*+?|\\^$./-:&!#,'\"0a\xff")).to_bytes(1, "little") + line[at:]


BYTES: tuple[Mutator, ...] = (_byte, _byte, _number, _number, _cut, _without, _twice, _splice)

KINDS: dict[str, tuple[Mutator, ...]] = {
    "bytes": BYTES,
    "safetensors": (*BYTES, *(_header,) * 12),
    "json": (*(_document,) * 12, _byte, _cut, _twice, _splice),
    "lines": (*(_lines,) * 6, _byte, _cut, _twice, _splice),
}


def mutated(data: bytes, kind: str, random: Random, others: Sequence[bytes]) -> bytes:
    """A changed input.

    Args:
        data: the input.
        kind: of :data:`KINDS`: what is known of its structure.
        random: decides.
        others: inputs of the same kind, of which parts may be taken.
    """
    for _ in range(random.choice((1, 1, 1, 2, 3, 5))):
        data = random.choice(KINDS[kind])(data, random, others)
    return data
