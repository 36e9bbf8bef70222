"""GGUF files to begin with: of each foreign type, and split ones; and where the numbers of their framing lie."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from uqff.gguf.schema import Value, ValueType
from uqff.gguf.types import FOREIGN_TYPES
from uqff.gguf.writer import PlannedTensor, write_gguf

__all__ = ["numbers", "of_each_type", "split"]

SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TEXT, ARRAY = 8, 9
MOST = 400
"""Numbers of a file that are known: the rest of a long vocabulary is more of the same."""


def of_each_type(folder: Path) -> list[bytes]:
    """A file of one tensor for each type that UQFF has not, of random blocks."""
    random, made = np.random.default_rng(0), []
    for each in FOREIGN_TYPES:
        blocks = random.bytes(2 * each.type_size)
        tensor = PlannedTensor(
            "blk.0.ffn_up.weight", (2, each.block_size), each.code, len(blocks), partial(list, (blocks,))
        )
        write_gguf(folder / "type.gguf", [("general.architecture", Value(ValueType.TEXT, "llama"))], [tensor])
        made.append((folder / "type.gguf").read_bytes())
    return made


def split(folder: Path, pairs: Sequence[tuple[str, Value]] = ()) -> list[Path]:
    """A set of two files, each with a tensor."""
    folder.mkdir()
    paths = [folder / f"m-{number:05}-of-00002.gguf" for number in (1, 2)]
    data = np.ones((2, 4), "<f4").tobytes()
    for number, path in enumerate(paths):
        tensor = PlannedTensor(f"blk.{number}.ffn_up.weight", (2, 4), 0, len(data), partial(list, (data,)))
        claims = (("split.no", 2, number), ("split.count", 2, 2), ("split.tensors.count", 5, 2))
        own = [(key, Value(next(t for t in ValueType if t.number == kind), value)) for key, kind, value in claims]
        write_gguf(path, [*pairs, *own], [tensor])
    return paths


@functools.lru_cache(maxsize=512)
def numbers(data: bytes) -> tuple[tuple[int, int], ...]:
    """Where the numbers of the framing lie, and of how many bytes they are, as far as the file can be followed."""
    if len(data) < 24:
        return ()
    found: list[tuple[int, int]] = [(4, 4), (8, 8), (16, 8)]
    at = 24

    def take(size: int) -> int:
        nonlocal at
        if at + size > len(data) or len(found) > MOST:
            raise IndexError
        found.append((at, size))
        at += size
        return int.from_bytes(data[at - size : at], "little")

    def text() -> None:
        nonlocal at
        length = take(8)  # moves `at` itself
        at += length

    def value(kind: int) -> None:
        nonlocal at
        if kind == TEXT:
            text()
        elif kind == ARRAY:
            of, count = take(4), take(8)
            if of == TEXT:
                for _ in range(count):
                    text()
            else:
                at += count * SIZES[of]
        else:
            take(SIZES[kind])

    try:
        tensors, pairs = struct.unpack_from("<QQ", data, 8)
        for _ in range(pairs):
            text()
            value(take(4))
        for _ in range(tensors):
            text()
            math.prod(take(8) for _ in range(take(4)))
            take(4)
            take(8)
    except (IndexError, KeyError, struct.error):
        pass
    return tuple(found)
