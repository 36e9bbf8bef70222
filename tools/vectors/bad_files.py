"""The 1.x files and sets of shards that break a rule of the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tools.vectors.broken import FILES, FORMAT, FRAMING, HUGE, RULES, SHARD, UNSUPPORTED, Broken
from tools.vectors.entries import Entries, Part, byte, file_of, named, version
from tools.vectors.framing import framed
from tools.vectors.good_entries import GATE, UP, Files, layer, metadata_of
from tools.vectors.wire import u32

_SMALL = layer("unquant/f16")
_NEAR = "unquant-f32"


def _file(
    name: str,
    rule: str,
    tensors: Entries,
    field: str | None,
    at: str | None,
    *,
    error: str = FORMAT,
    near: str = _NEAR,
    section: str = FILES,
) -> Broken:
    return Broken(
        name,
        section,
        rule,
        {f"{name}.uqff": file_of(tensors, metadata_of((1, 2, 0)))},
        error,
        field,
        (f"{name}.uqff", at),
        near,
    )


def _versions() -> Iterator[Broken]:
    small = named(UP, _SMALL)
    rule = "all three version entries are there"
    for entry in version():
        short = entry.rpartition(".")[2]
        rest = {name: part for name, part in version().items() if name != entry}
        yield _file(f"version-without-{short}", rule, rest | small, entry, None)
    rule = "major is 1, minor at most 2"
    for name, numbers, short in (
        ("major-zero", (0, 2, 0), "major"),
        ("major-two", (2, 0, 0), "major"),
        ("minor-three", (1, 3, 0), "minor"),
        ("minor-huge", (1, HUGE, 0), "minor"),
    ):
        entry = f"uqff.version.{short}"
        near = "patch-is-free"
        yield _file(f"version-{name}", rule, version(*numbers) | small, entry, entry, error=UNSUPPORTED, near=near)
    rule = "a version entry is U32 []"
    for name, part in (("u8", byte(1)), ("list", Part("U32", (1,), u32(1))), ("i64", Part("I64", (), bytes(8)))):
        entry = "uqff.version.major"
        yield _file(f"version-{name}", rule, version() | {entry: part} | small, entry, entry)


def _keys() -> Iterator[Broken]:
    small = named(UP, _SMALL)
    rule = "no entry is named by a number"
    part = Part("U8", (4,), bytes(4))
    for name, key in (("decimal", "0"), ("zeros", "007")):
        yield _file(f"key-{name}", rule, version() | small | {key: part}, f"header.{key}", None, near="extra-entries")
    rule = "the key of a layer is not empty"
    tensors = version() | {f".{suffix}": part for suffix, part in _SMALL.items()}
    yield _file("key-empty", rule, tensors, "header..weight", None)
    rule = "an entry of a known suffix has a format beside it"
    for suffix in ("weight.scales", "weight.bits", "weight.quant_scale", "weight.num_blocks", "weight.dtype"):
        tensors = version() | small | {f"{GATE}.{suffix}": byte(4)}
        short = suffix.partition(".")[2].replace("_", "-")
        at = f"{GATE}.{suffix}"
        yield _file(f"{short}-without-format", rule, tensors, "weight.format", at, near="extra-entries")


def _sets() -> Iterator[Broken]:
    small, gate = named(UP, _SMALL), named(GATE, _SMALL)

    def shards(name: str, *parts: Entries, first: int = 0) -> Files:
        return {f"{name}-{first + i}.uqff": file_of(part, metadata_of((1, 2, 0))) for i, part in enumerate(parts)}

    rule = "the version entries of all shards are equal"
    for short, numbers in (("minor", (1, 1, 0)), ("patch", (1, 2, 1))):
        name = f"versions-other-{short}"
        place = (f"{name}-1.uqff", f"uqff.version.{short}")
        files = shards(name, version() | gate, version(*numbers) | small)
        yield Broken(name, FILES, rule, files, SHARD, f"uqff.version.{short}", place, "version-repeated")
    rule = "no other entry occurs twice in a set of shards"
    weight = f"{UP}.weight"
    twice = {
        "layer-twice": ({weight: small[weight]}, weight),
        "layer-twice-other-bytes": ({weight: Part("F16", (3, 5), bytes(30))}, weight),
        "format-twice": ({f"{UP}.weight.format": byte(1)}, f"{UP}.weight.format"),
        "extra-twice": ({"extra": byte(1)}, "extra"),
    }
    for name, (again, entry) in twice.items():
        files = shards(name, version() | small | {"extra": byte(1)}, gate | again)
        yield Broken(name, FILES, rule, files, SHARD, entry, (f"{name}-1.uqff", entry), "two-shards")
    rule = "shard numbers run from 0 without a gap"
    name = "shard-missing"
    parts = shards(name, version() | gate) | shards(name, small, first=2)
    yield Broken(name, "container.md#shards", rule, parts, SHARD, None, (f"{name}-1.uqff", None), "two-shards")
    name = "first-shard-missing"
    parts = shards(name, small, first=1)
    yield Broken(name, "container.md#shards", rule, parts, SHARD, None, (f"{name}-1.uqff", None), "two-shards")
    rule = "a file holds layers of one generation"
    name = "blob-in-another-shard"
    parts = shards(name, version() | small, {"0": Part("U8", (32,), bytes(32))})
    yield Broken(name, FILES, rule, parts, FORMAT, "header.0", (f"{name}-1.uqff", None), "two-shards")
    rule = "a layer of two shards has all entries of its family"
    name = "straddling-incomplete"
    afq = named(UP, layer("afq/afq4-g64"))
    first = {entry: part for entry, part in afq.items() if entry.endswith(("format", "bits", "weight"))}
    files = shards(
        name,
        version() | first,
        {f"{UP}.weight.group_size": byte(64), f"{UP}.weight.scales": afq[f"{UP}.weight.scales"]},
    )
    yield Broken(
        name, RULES, rule, files, FORMAT, "weight.biases", (f"{name}-0.uqff", f"{UP}.weight.format"), "straddling"
    )
    name = "straddling-broken"
    rest = {entry: part for entry, part in afq.items() if entry not in first} | {f"{UP}.weight.group_size": byte(16)}
    files = shards(name, version() | first, rest)
    place = (f"{name}-1.uqff", f"{UP}.weight.group_size")
    yield Broken(
        name, "entries.md#afq", "group_size is 32, 64 or 128", files, FORMAT, "weight.group_size", place, "straddling"
    )


def _framing() -> Iterator[Broken]:
    """The rules of the frame bind these files, too."""
    good = file_of(version() | named(UP, _SMALL), metadata_of((1, 2, 0)))
    n = int.from_bytes(good[:8], "little")
    header, data = json.loads(good[8 : 8 + n]), good[8 + n :]
    weight = f"{UP}.weight"
    begin, end = header[weight]["data_offsets"]

    def changed(**entry: Any) -> bytes:
        return framed({**header, weight: {**header[weight], **entry}}, data)

    def case(name: str, rule: str, content: bytes, field: str | None, error: str = FORMAT, offset: int = 8) -> Broken:
        file = f"{name}.uqff"
        place = (file, None if offset == 8 else f"@{offset}")
        return Broken(name, FRAMING, rule, {file: content}, error, field, place, _NEAR)

    rule = "the tensors fill the data: no overlap, no hole, nothing behind"
    yield case("data-byte-behind", rule, good + b"\0", None, offset=len(good))
    yield case("data-cut", rule, good[:-1], f"header.{next(reversed(header))}.data_offsets")
    moved = changed(data_offsets=[begin - 2, end - 2])
    yield case("data-overlap", rule, moved, f"header.{weight}.data_offsets")

    def extra(name: str, rule: str, entry: dict[str, Any], field: str, error: str = FORMAT) -> Broken:
        """A file with one more entry, of no layer."""
        return case(name, rule, framed({**header, "extra": entry}, data), field, error)

    empty = [len(data), len(data)]
    rule = "an entry has dtype, shape and data_offsets, nothing else"
    byte_more = framed({**header, "extra": {"dtype": "U8", "data_offsets": [len(data), len(data) + 1]}}, data + b"\0")
    yield case("extra-without-shape", rule, byte_more, "header.extra")
    rule = "dimensions are integers from 0"
    large = {"dtype": "U8", "shape": [2**63, 0], "data_offsets": empty}
    yield extra("extra-dimension-too-large", rule, large, "header.extra.shape")
    rule = "the size follows from dtype and shape"
    wraps = {"dtype": "U8", "shape": [2**32, 2**32], "data_offsets": empty}
    yield extra("extra-size-wraps", rule, wraps, "header.extra.data_offsets")
    for name, size in (("half-a-byte", 1), ("half-a-byte-filled", 2)):
        three = {"dtype": "F4", "shape": [3], "data_offsets": [len(data), len(data) + size]}
        more = framed({**header, "extra": three}, data + bytes(size))
        yield case(f"extra-{name}", rule, more, "header.extra.data_offsets")
    rule = "a key occurs once"
    nothing = json.dumps({"dtype": "U8", "shape": [0], "data_offsets": empty}).encode()
    pair = json.dumps(header).encode()[:-1] + b',"extra":' + nothing + b',"extra":' + nothing + b"}"
    yield case("extra-twice-empty", rule, framed(pair, data), "header.extra")
    rule = "the size follows from dtype and shape"
    yield case("entry-size", rule, changed(shape=[3, 6]), f"header.{weight}.data_offsets")
    yield case("entry-size-wraps", rule, changed(shape=[2**32, 2**32, 2]), f"header.{weight}.data_offsets")
    yield case(
        "entry-dtype-unknown",
        "the dtype is one of safetensors",
        changed(dtype="Q4"),
        f"header.{weight}.dtype",
        UNSUPPORTED,
    )
    yield case(
        "entry-nine-dimensions", "at most 8 dimensions", changed(shape=[1] * 7 + [3, 5]), f"header.{weight}.shape"
    )
    rule = "a key occurs once"
    text = json.dumps(header, separators=(",", ":")).encode()
    twice = text[:-1] + b',"uqff.version.minor":' + json.dumps(header["uqff.version.minor"]).encode() + b"}"
    yield case("header-key-twice", rule, framed(twice, data), "header.uqff.version.minor")
    rule = "metadata is a map of texts"
    yield case("metadata-number", rule, framed({**header, "__metadata__": {"uqff.version": 1}}, data), "__metadata__")
    rule = "the header lies within the file"
    yield case("header-cut", rule, good[: n // 2], "header length", offset=0)


CASES = (_versions, _keys, _sets, _framing)
