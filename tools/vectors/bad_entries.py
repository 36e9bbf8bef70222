"""1.x files that break exactly one rule each, with the valid file from which each was made.

A case starts from a valid model and replaces, drops or adds entries.  Class, field and place of the error are stated
here, by the spec; the words *expected* and *got* are what uqff says.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import uqff
from tools.vectors.entries import Entries, Part, byte, dims, file_of, named, number, read_file, version
from tools.vectors.framing import framed
from tools.vectors.good_entries import EXPERTS, GATE, UP, Files, layer, metadata_of, models
from tools.vectors.wire import u32

FOLDER = "bad-entries"
FORMAT, UNSUPPORTED, SHAPE, SHARD = "FormatError", "UnsupportedError", "ShapeError", "ShardError"
RULES, FILES, FRAMING = "entries.md#layers", "entries.md#entries-of-a-file", "container.md#framing"
HUGE = 2**32 - 1


class Bad(NamedTuple):
    """A broken model.

    Attributes:
        name: of the files.
        section: of the spec that has the rule.
        rule: in words.
        files: the shards by name; the first is opened.
        error: class.
        field: suffix or name of the entry that breaks the rule.
        place: file, and the entry at whose first byte the error is; None for the header.
        near_miss: the valid vector that it was made from.
    """

    name: str
    section: str
    rule: str
    files: Files
    error: str
    field: str | None
    place: tuple[str, str | None]
    near_miss: str


def _layer(
    name: str,
    section: str,
    rule: str,
    vector: str,
    changes: Mapping[str, Part | None],
    field: str | None = None,
    *,
    near: str,
    error: str = FORMAT,
    at: str | None = None,
    numbers: tuple[int, int, int] = (1, 2, 0),
    key: str = UP,
) -> Bad:
    """A layer with some entries replaced (None: dropped); the error is in ``field``, else in the first changed."""
    field = field or next(iter(changes))
    merged = {**layer(vector), **changes}
    parts = {suffix: part for suffix, part in merged.items() if part is not None}
    at = at or (field if field in parts else "weight.format")
    data = file_of({**version(*numbers), **named(key, parts)}, metadata_of(numbers))
    file = f"{name}.uqff"
    return Bad(name, section, rule, {file: data}, error, field, (file, f"{key}.{at}"), near)


NEAR = {
    "gguf": ("gguf/q4_0", "gguf-q4_0"),
    "unquant": ("unquant/bf16", "unquant-bf16"),
    "hqq": ("hqq/hqq4", "hqq4"),
    "fp8": ("fp8/plain", "fp8-plain"),
    "afq": ("afq/afq4-g64", "afq4-g64"),
    "f8q8": ("f8q8/plain", "f8q8-plain"),
    "mxfp4": ("mxfp4/plain", "mxfp4-plain"),
}
"""A layer of each family to break, and its valid file."""


def _companions() -> Iterator[Bad]:
    rule = "a layer has all entries of its family"
    for family, (vector, near) in NEAR.items():
        for suffix in layer(vector):
            if suffix != "weight.format":
                short = suffix.removeprefix("weight").strip("._").replace("_", "-") or "weight"
                yield _layer(f"{family}-without-{short}", RULES, rule, vector, {suffix: None}, near=near)
    rule = "a layer has no entries of another family"
    others = {"gguf": "weight.scales", "unquant": "weight.bits", "afq": "weight.zeros", "mxfp4": "weight.biases"}
    for family, suffix in others.items():
        vector, near = NEAR[family]
        changes = {suffix: Part("F32", (1, 2), bytes(8))}
        short = suffix.rpartition(".")[2]
        yield _layer(f"{family}-with-{short}", RULES, rule, vector, changes, near=near)


def _formats() -> Iterator[Bad]:
    vector, near = NEAR["gguf"]
    rule = "the family is one of 0 to 6"
    for code in (7, 255):
        changes = {"weight.format": byte(code)}
        yield _layer(f"format-{code}-unknown", RULES, rule, vector, changes, near=near, error=UNSUPPORTED)
    rule = "the family is a number U8 []"
    for name, part in (("u32", number(0)), ("list", Part("U8", (1,), b"\0"))):
        yield _layer(f"format-{name}", RULES, rule, vector, {"weight.format": part}, near=near)
    rule = "Unquant layers exist since 1.1"
    vector, near = "unquant/bf16-bias", "unquant-v1.1"
    yield _layer("unquant-in-1.0", RULES, rule, vector, {}, "weight.format", near=near, numbers=(1, 0, 0))
    rule = "stacked weights of HQQ, FP8 and F8Q8 do not exist from 1.2 on"
    for vector in ("hqq/hqq8-experts", "fp8/experts", "f8q8/experts"):
        stem = vector.partition("/")[0]
        near = f"{'hqq8' if stem == 'hqq' else stem}-experts-v1.1"
        yield _layer(f"{stem}-stacked-in-1.2", RULES, rule, vector, {}, "weight", near=near, key=EXPERTS)


def _dtypes() -> Iterator[Bad]:
    rule = "an entry has the dtype of its table"
    cases: dict[str, tuple[str, str, Part]] = {
        "gguf-weight-i8": ("gguf", "weight", Part("I8", (72,), bytes(72))),
        "gguf-dtype-u8": ("gguf", "weight.dtype", byte(2)),
        "gguf-shape-i64": ("gguf", "weight.shape", Part("I64", (2,), bytes(16))),
        "unquant-weight-bool": ("unquant", "weight", Part("BOOL", (3, 5), bytes(15))),
        "hqq-weight-u32": ("hqq", "weight", Part("U32", (32, 4), bytes(512))),
        "hqq-scales-f64": ("hqq", "weight.scales", Part("F64", (1, 4), bytes(32))),
        "hqq-bits-u32": ("hqq", "weight.bits", number(4)),
        "hqq-group-size-u8": ("hqq", "weight.group_size", byte(64)),
        "hqq-axis-bool": ("hqq", "weight.axis", Part("BOOL", (), b"\0")),
        "fp8-weight-u8": ("fp8", "weight", Part("U8", (3, 16), bytes(48))),
        "fp8-scale-f64": ("fp8", "weight.dequant_w_scale", Part("F64", (), bytes(8))),
        "afq-weight-i32": ("afq", "weight", Part("I32", (2, 16), bytes(128))),
        "afq-scales-i16": ("afq", "weight.scales", Part("I16", (2, 2), bytes(8))),
        "afq-group-size-u32": ("afq", "weight.group_size", number(64)),
        "f8q8-weight-i8": ("f8q8", "weight", Part("I8", (132,), bytes(132))),
        "f8q8-num-blocks-u8": ("f8q8", "weight.num_blocks", byte(4)),
        "mxfp4-weight-f8": ("mxfp4", "weight", Part("F8_E4M3", (2, 32), bytes(64))),
        "mxfp4-scales-f8": ("mxfp4", "weight.scales", Part("F8_E4M3", (2, 2), bytes(4))),
        "bias-bool": ("gguf", "bias", Part("BOOL", (2,), bytes(2))),
        "bias-u16": ("afq", "bias", Part("U16", (2,), bytes(4))),
    }
    for name, (family, suffix, part) in cases.items():
        vector, near = NEAR[family]
        yield _layer(name, RULES, rule, vector, {suffix: part}, near=near)
    rule = "the codes are U8, of 3 bits I32"
    part = Part("I32", (32, 4), bytes(512))
    yield _layer("hqq4-weight-i32", "entries.md#hqq", rule, NEAR["hqq"][0], {"weight": part}, near=NEAR["hqq"][1])
    vector, near = "hqq/hqq3", "hqq3"
    part = Part("U8", (7, 4), bytes(28))
    yield _layer("hqq3-weight-u8", "entries.md#hqq", rule, vector, {"weight": part}, near=near)
    rule = "scales and their companions have one dtype"
    part = Part("F16", (1, 4), bytes(8))
    yield _layer(
        "hqq-zeros-other-dtype", "entries.md#hqq", rule, NEAR["hqq"][0], {"weight.zeros": part}, near=NEAR["hqq"][1]
    )
    part = Part("F64", (2, 2), bytes(32))
    yield _layer("afq-biases-f64", "entries.md#afq", rule, NEAR["afq"][0], {"weight.biases": part}, near=NEAR["afq"][1])


def _ranks() -> Iterator[Bad]:
    rule = "an entry has the dimensions of its table"
    cases: dict[str, tuple[str, str, Part]] = {
        "gguf-weight-two-dimensions": ("gguf", "weight", Part("U8", (2, 36), bytes(72))),
        "gguf-dtype-list": ("gguf", "weight.dtype", Part("U32", (1,), u32(2))),
        "gguf-shape-number": ("gguf", "weight.shape", number(128)),
        "unquant-number": ("unquant", "weight", Part("BF16", (), bytes(2))),
        "hqq-weight-flat": ("hqq", "weight", Part("U8", (128,), bytes(128))),
        "hqq-scales-flat": ("hqq", "weight.scales", Part("F32", (4,), bytes(16))),
        "hqq-bits-list": ("hqq", "weight.bits", Part("U8", (1,), b"\4")),
        "fp8-number": ("fp8", "weight", Part("F8_E4M3", (), b"8")),
        "fp8-scale-list": ("fp8", "weight.quant_scale", Part("F32", (1,), bytes(4))),
        "afq-number": ("afq", "weight", Part("U32", (), bytes(4))),
        "afq-bits-list": ("afq", "weight.bits", Part("U8", (1,), b"\4")),
        "f8q8-weight-blocks": ("f8q8", "weight", Part("U8", (4, 33), bytes(132))),
        "mxfp4-number": ("mxfp4", "weight", Part("U8", (), b"\0")),
        "bias-number": ("gguf", "bias", Part("F32", (), bytes(4))),
    }
    for name, (family, suffix, part) in cases.items():
        vector, near = NEAR[family]
        yield _layer(name, RULES, rule, vector, {suffix: part}, near=near)


def _values() -> Iterator[Bad]:
    cases: tuple[tuple[str, str, str, dict[str, Part | None]], ...] = (
        ("gguf", "type-unknown", "the ggml type is one of the table", {"weight.dtype": number(5)}),
        ("gguf", "type-huge", "the ggml type is one of the table", {"weight.dtype": number(HUGE)}),
        ("hqq", "bits-five", "bits is 1, 2, 3, 4 or 8", {"weight.bits": byte(5)}),
        ("hqq", "axis-two", "axis is 0 or 1", {"weight.axis": byte(2)}),
        ("hqq", "round-zeros-two", "round_zeros is 0 or 1", {"weight.round_zeros": byte(2)}),
        ("hqq", "channel-wise-two", "channel_wise is 0 or 1", {"weight.channel_wise": byte(2)}),
        ("hqq", "group-size-zero", "a group has at least one weight", {"weight.group_size": number(0)}),
        ("fp8", "dtype-f32", "the dtype of the codes is 9", {"weight.dtype": number(6)}),
        ("afq", "bits-five", "bits is 2, 3, 4, 6 or 8", {"weight.bits": byte(5)}),
        ("afq", "bits-forty", "bits is 2, 3, 4, 6 or 8", {"weight.bits": byte(40)}),
        ("afq", "group-size-sixteen", "group_size is 32, 64 or 128", {"weight.group_size": byte(16)}),
    )
    for family, name, rule, changes in cases:
        vector, near = NEAR[family]
        yield _layer(f"{family}-{name}", f"entries.md#{family}", rule, vector, changes, near=near)


def _sizes() -> Iterator[Bad]:
    page = "entries.md#gguf"
    vector, near = NEAR["gguf"]
    rule = "weight has exactly the bytes that type and shape ask for"
    for name, size in (("missing", 71), ("superfluous", 73), ("none", 0)):
        part = Part("U8", (size,), bytes(size))
        yield _layer(f"gguf-byte-{name}", page, rule, vector, {"weight": part}, near=near)
    yield _layer("gguf-shape-larger", page, rule, vector, {"weight.shape": dims(3, 64)}, "weight", near=near)
    rule = "a row is whole blocks"
    yield _layer("gguf-row-not-whole-blocks", page, rule, vector, {"weight.shape": dims(4, 33)}, near=near)
    rule = "the data is there, whatever the product of the shape"
    shape = dims(*[HUGE] * 7, 2**31)
    yield _layer("gguf-shape-huge", page, rule, vector, {"weight.shape": shape}, "weight", near=near)
    rule = "a weight has 1 to 8 dimensions, none of them 0"
    for name, part in (
        ("no-dimensions", dims()),
        ("nine-dimensions", dims(*[1] * 7, 2, 64)),
        ("empty-dimension", dims(0, 64)),
    ):
        yield _layer(f"gguf-{name}", RULES, rule, vector, {"weight.shape": part}, near=near)
    vector, near = NEAR["unquant"]
    yield _layer("unquant-empty-dimension", RULES, rule, vector, {"weight": Part("BF16", (3, 0), b"")}, near=near)
    yield from _sizes_hqq()
    yield from _sizes_others()


def _sizes_hqq() -> Iterator[Bad]:
    page = "entries.md#hqq"
    vector, near = NEAR["hqq"]
    rule = "weight, scales and zeros fit the shape, the group size and the axis"
    yield _layer("hqq-group-size-other", page, rule, vector, {"weight.group_size": number(48)}, near=near)
    yield _layer("hqq-group-size-huge", page, rule, vector, {"weight.group_size": number(HUGE)}, near=near)
    yield _layer("hqq-shape-larger", page, rule, vector, {"weight.shape": dims(8, 64)}, "weight", near=near)
    yield _layer("hqq-shape-huge", page, rule, vector, {"weight.shape": dims(HUGE, 64)}, "weight", near=near)
    yield _layer("hqq-axis-other", page, rule, vector, {"weight.axis": byte(1)}, "weight", near=near)
    transposed = Part("F32", (4, 1), bytes(16))
    yield _layer("hqq-scales-transposed", page, rule, vector, {"weight.scales": transposed}, near=near)
    yield _layer("hqq-zeros-short", page, rule, vector, {"weight.zeros": Part("F32", (1, 3), bytes(12))}, near=near)


def _sizes_others() -> Iterator[Bad]:
    rule = "scales and biases have one number per group"
    vector, near = NEAR["afq"]
    columns = layer(vector)["weight.scales"]
    turned = columns._replace(shape=(1, columns.shape[0] * columns.shape[1]))
    yield _layer("afq-scales-turned", "entries.md#afq", rule, vector, {"weight.scales": turned}, near=near)
    yield _layer("afq-biases-turned", "entries.md#afq", rule, vector, {"weight.biases": turned}, near=near)
    rule = "a row is whole groups"
    part = Part("U32", (2, 15), bytes(120))
    yield _layer("afq-row-not-whole-groups", "entries.md#afq", rule, vector, {"weight": part}, near=near)
    vector, near = NEAR["f8q8"]
    rule = "weight is 33 bytes for each block, and there are as many blocks as the shape needs"
    for name, changes, field in (
        ("blocks-other", {"weight.num_blocks": number(3)}, "weight"),
        ("blocks-huge", {"weight.num_blocks": number(HUGE)}, "weight"),
        ("shape-larger", {"weight.shape": dims(2, 65)}, "weight.num_blocks"),
        ("shape-huge", {"weight.shape": dims(*[HUGE] * 2)}, "weight.num_blocks"),
    ):
        yield _layer(f"f8q8-{name}", "entries.md#f8q8", rule, vector, changes, field, near=near)
    vector, near = NEAR["mxfp4"]
    part = Part("U8", (2, 31), bytes(62))
    yield _layer(
        "mxfp4-row-not-whole-blocks", "entries.md#mxfp4", "a row is whole blocks", vector, {"weight": part}, near=near
    )
    rule = "scales have one exponent per block"
    part = Part("U8", (4, 1), bytes(4))
    yield _layer("mxfp4-scales-turned", "entries.md#mxfp4", rule, vector, {"weight.scales": part}, near=near)
    rule = "a bias is [out], or [experts, out]"
    for name, family, shape in (
        ("too-long", "gguf", (3,)),
        ("too-short", "afq", (1,)),
        ("two-dimensions", "mxfp4", (2, 1)),
    ):
        vector, near = NEAR[family]
        part = Part("F32", shape, bytes(4 * shape[0]))
        yield _layer(f"bias-{name}", FILES, rule, vector, {"bias": part}, near=near, error=SHAPE)
    part = Part("F32", (256,), bytes(1024))
    vector, near = "gguf/q6k-one-dimension", "gguf-q6k-one-dimension"
    yield _layer("bias-of-a-vector", FILES, rule, vector, {"bias": part}, near=near, error=SHAPE)
    part = Part("F32", (3, 2), bytes(24))
    vector, near = "gguf/q8_0-experts-bias", "gguf-q8_0-experts-bias"
    yield _layer("bias-experts-turned", FILES, rule, vector, {"bias": part}, near=near, error=SHAPE, key=EXPERTS)


# ---------------------------------------------------------------------------------------------------------------------
# Files and sets
# ---------------------------------------------------------------------------------------------------------------------

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
) -> Bad:
    return Bad(
        name,
        section,
        rule,
        {f"{name}.uqff": file_of(tensors, metadata_of((1, 2, 0)))},
        error,
        field,
        (f"{name}.uqff", at),
        near,
    )


def _versions() -> Iterator[Bad]:
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


def _keys() -> Iterator[Bad]:
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


def _sets() -> Iterator[Bad]:
    small, gate = named(UP, _SMALL), named(GATE, _SMALL)

    def shards(name: str, *parts: Entries, first: int = 0) -> Files:
        return {f"{name}-{first + i}.uqff": file_of(part, metadata_of((1, 2, 0))) for i, part in enumerate(parts)}

    rule = "the version entries of all shards are equal"
    for short, numbers in (("minor", (1, 1, 0)), ("patch", (1, 2, 1))):
        name = f"versions-other-{short}"
        place = (f"{name}-1.uqff", f"uqff.version.{short}")
        files = shards(name, version() | gate, version(*numbers) | small)
        yield Bad(name, FILES, rule, files, SHARD, f"uqff.version.{short}", place, "version-repeated")
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
        yield Bad(name, FILES, rule, files, SHARD, entry, (f"{name}-1.uqff", entry), "two-shards")
    rule = "shard numbers run from 0 without a gap"
    name = "shard-missing"
    parts = shards(name, version() | gate) | shards(name, small, first=2)
    yield Bad(name, "container.md#shards", rule, parts, SHARD, None, (f"{name}-1.uqff", None), "two-shards")
    name = "first-shard-missing"
    parts = shards(name, small, first=1)
    yield Bad(name, "container.md#shards", rule, parts, SHARD, None, (f"{name}-1.uqff", None), "two-shards")
    rule = "a file holds layers of one generation"
    name = "blob-in-another-shard"
    parts = shards(name, version() | small, {"0": Part("U8", (32,), bytes(32))})
    yield Bad(name, FILES, rule, parts, FORMAT, "header.0", (f"{name}-1.uqff", None), "two-shards")
    rule = "a layer of two shards has all entries of its family"
    name = "straddling-incomplete"
    afq = named(UP, layer("afq/afq4-g64"))
    first = {entry: part for entry, part in afq.items() if entry.endswith(("format", "bits", "weight"))}
    files = shards(
        name,
        version() | first,
        {f"{UP}.weight.group_size": byte(64), f"{UP}.weight.scales": afq[f"{UP}.weight.scales"]},
    )
    yield Bad(
        name, RULES, rule, files, FORMAT, "weight.biases", (f"{name}-0.uqff", f"{UP}.weight.format"), "straddling"
    )
    name = "straddling-broken"
    rest = {entry: part for entry, part in afq.items() if entry not in first} | {f"{UP}.weight.group_size": byte(16)}
    files = shards(name, version() | first, rest)
    place = (f"{name}-1.uqff", f"{UP}.weight.group_size")
    yield Bad(
        name, "entries.md#afq", "group_size is 32, 64 or 128", files, FORMAT, "weight.group_size", place, "straddling"
    )


def _framing() -> Iterator[Bad]:
    """The rules of the frame bind these files, too."""
    good = file_of(version() | named(UP, _SMALL), metadata_of((1, 2, 0)))
    n = int.from_bytes(good[:8], "little")
    header, data = json.loads(good[8 : 8 + n]), good[8 + n :]
    weight = f"{UP}.weight"
    begin, end = header[weight]["data_offsets"]

    def changed(**entry: Any) -> bytes:
        return framed({**header, weight: {**header[weight], **entry}}, data)

    def case(name: str, rule: str, content: bytes, field: str | None, error: str = FORMAT, offset: int = 8) -> Bad:
        file = f"{name}.uqff"
        place = (file, None if offset == 8 else f"@{offset}")
        return Bad(name, FRAMING, rule, {file: content}, error, field, place, _NEAR)

    rule = "the tensors fill the data: no overlap, no hole, nothing behind"
    yield case("data-byte-behind", rule, good + b"\0", None, offset=len(good))
    yield case("data-cut", rule, good[:-1], f"header.{next(reversed(header))}.data_offsets")
    moved = changed(data_offsets=[begin - 2, end - 2])
    yield case("data-overlap", rule, moved, f"header.{weight}.data_offsets")
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


ROOMS = (_companions, _formats, _dtypes, _ranks, _values, _sizes, _versions, _keys, _sets, _framing)


def files() -> Files:
    """``bad-entries/NAME.uqff`` (or ``NAME-0.uqff``, ...) and ``bad-entries/index.json``."""
    found: Files = {}
    index = []
    for bad in (bad for room in ROOMS for bad in room()):
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


def _offset(bad: Bad) -> int | None:
    """Where the error is; None where no byte of a file is at fault."""
    file, entry = bad.place
    if bad.error == SHARD and entry is None:
        return None
    if entry is None:
        return 8
    if entry.startswith("@"):
        return int(entry[1:])
    return next(found.offset for found in read_file(bad.files[file])[0] if found.name == entry)


def _row(bad: Bad) -> dict[str, Any]:
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


def _raised(bad: Bad) -> uqff.UqffError | None:
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
