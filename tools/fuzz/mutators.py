"""Changes to inputs: of bytes, little-endian numbers, JSON documents, headers of safetensors and GGUF, lines."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from tools.fuzz.gguf import numbers

__all__ = ["mutated"]

NUMBERS = (0, 1, 2, 7, 8, 31, 32, 33, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62)
WIDE = (*NUMBERS, 2**63 - 1, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "a", "\u00e9\U0001f600", [], {}, [[]], 0.5, 1e300, -1, -(2**63), 10**30, "x" * 300),
    *NUMBERS,
)

LONGEST_SEARCHED = 20_000
"""Bytes of a document in which a place is looked for."""

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


WIDTHS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
"""Bytes of a number, by the dtypes of safetensors."""

MOST_NUMBERS = 1 << 14
"""Of a tensor that is made."""


def _tensors(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """A safetensors file whose framing is sound: a tensor has another shape, dtype, name, or other numbers."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = dict(_loaded(data[8 : 8 + size]))
        parts = {
            name: (str(entry["dtype"]), list(entry["shape"]), data[8 + size :][slice(*entry["data_offsets"])])
            for name, entry in header.items()
            if name != "__metadata__"
        }
        name = random.choice(list(parts))
    except (ValueError, RecursionError, KeyError, TypeError, IndexError):
        return _header(data, random, others)
    dtype, shape, numbers = parts[name]
    change = random.randrange(6)
    if change == 0:
        del parts[name]
    elif change == 1:
        parts[random.choice((f"{name}.0", "a", *parts))] = parts.pop(name)
    elif change == 2:
        width = WIDTHS.get(dtype, 1)
        made = bytes(random.choice((0, 1, 127, 128, 255)) for _ in range(width)) * (len(numbers) // width)
        parts[name] = dtype, shape, random.choice((made, random.choice(list(parts.values()))[2]))
    else:
        if change == 3 or not shape:
            dtype = random.choice(list(WIDTHS))
        elif change == 4:
            at = random.randrange(len(shape))
            shape = shape[:at] + random.choice(([], [1, shape[at]], [shape[at], 2], [0])) + shape[at + 1 :]
        else:
            at = random.randrange(len(shape))
            shape = [*shape[:at], random.choice((1, 3, 8, 32, 33, 64, 256)), *shape[at + 1 :]]
        length = math.prod(shape) * WIDTHS.get(dtype, 1) if all(isinstance(each, int) for each in shape) else -1
        if not 0 <= length <= MOST_NUMBERS:
            return _header(data, random, others)
        parts[name] = dtype, shape, (numbers * (length // (len(numbers) or 1) + 1) or bytes(length))[:length]
    entries, at = {}, 0
    for each, (dtype, shape, numbers) in parts.items():
        entries[each] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(numbers)]}
        at += len(numbers)
    told = {key: value for key, value in header.items() if key == "__metadata__"}
    text = json.dumps(told | entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(numbers for _, _, numbers in parts.values())


def _document(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    try:
        value = _loaded(data)
    except (ValueError, RecursionError):
        return _byte(data, random, others)
    for _ in range(random.choice((1, 1, 2, 4))):
        value = _changed(value, random)
    return json.dumps(value, separators=(",", ":"), ensure_ascii=random.random() < 0.5).encode("utf-8", "replace")


RAW = (
    *(
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"-0",
        b"1" * 400,
        b"0" * 400 + b".5",
        b'"\\ud800"',
        b'"\\u0000"',
        b'"\x00"',
        b"'a'",
    ),
    *(
        b"[" * 100_000,
        b'{"a":' * 5000,
        b"[" * 1000 + b"]" * 1000,
        b"\xff",
        b"\xef\xbb\xbf",
        b"/*",
        b"01",
        b"+1",
        b"nul",
    ),
)
"""What no document has, or not all readers take for the same."""


def _raw(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """A document that is none: one value another text, or a key that is there twice."""
    places = [at for at, byte in enumerate(data[:LONGEST_SEARCHED]) if byte in b":,["]
    if not places:
        return random.choice(RAW)
    at = random.choice(places) + 1
    end = min(
        (found for found in (data.find(each, at) for each in (b",", b"}", b"]")) if found >= 0), default=len(data)
    )
    if random.random() < 0.3:
        return data[:at] + data[at:end] + b"," + data[at:end] + data[end:]
    if random.random() < 0.3 and (key := re.search(rb'"[^"]*":', data[:at][-200:])) is not None:
        return data[:end] + b"," + key[0] + random.choice((b"0", b"null", *RAW)) + data[end:]
    return data[:at] + random.choice(RAW) + data[end:]


def _crossed(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """A document of which a value is that of another one."""
    try:
        value, other = _loaded(data), _loaded(random.choice(others))
    except (ValueError, RecursionError):
        return _byte(data, random, others)
    if isinstance(value, dict) and isinstance(other, dict) and other:
        key = random.choice(list(other))
        value = {**value, key: other[key]}
    else:
        value = other
    return json.dumps(value, separators=(",", ":")).encode()


def _framing(data: bytes, random: Random, others: Sequence[bytes]) -> bytes:
    """Of a GGUF file, a number of its framing: a count, a length, a type, a dimension, an offset."""
    places = [(at, size) for at, size in numbers(data) if at + size <= len(data)]
    if not places:
        return _number(data, random, others)
    at, size = random.choice(places)
    before = int.from_bytes(data[at : at + size], "little")
    value = random.choice((*WIDE, *range(13), random.randrange(48), before + 1, before - 1, before * 2, len(data)))
    return data[:at] + (value % 2 ** (8 * size)).to_bytes(size, "little") + data[at + size :]


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
    "safetensors": (*BYTES, *(_header,) * 8, *(_tensors,) * 12),
    "gguf": (*BYTES, *(_framing,) * 12),
    "json": (*(_document,) * 12, _raw, _raw, _crossed, _crossed, _byte, _cut, _twice, _splice),
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
