"""The 1.x files in which an entry of a layer breaks a rule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from tools.vectors.broken import FILES, FORMAT, HUGE, RULES, SHAPE, UNSUPPORTED, Broken
from tools.vectors.entries import Part, byte, dims, file_of, named, number, version
from tools.vectors.good_entries import EXPERTS, UP, layer, metadata_of
from tools.vectors.wire import u32


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
) -> Broken:
    """A layer with some entries replaced (None: dropped); the error is in ``field``, else in the first changed."""
    field = field or next(iter(changes))
    merged = {**layer(vector), **changes}
    parts = {suffix: part for suffix, part in merged.items() if part is not None}
    at = at or (field if field in parts else "weight.format")
    data = file_of({**version(*numbers), **named(key, parts)}, metadata_of(numbers))
    file = f"{name}.uqff"
    return Broken(name, section, rule, {file: data}, error, field, (file, f"{key}.{at}"), near)


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


def _companions() -> Iterator[Broken]:
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


def _formats() -> Iterator[Broken]:
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


def _dtypes() -> Iterator[Broken]:
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
    part = Part("F16", (2, 2), bytes(8))
    yield _layer("afq-biases-f16", "entries.md#afq", rule, NEAR["afq"][0], {"weight.biases": part}, near=NEAR["afq"][1])


def _ranks() -> Iterator[Broken]:
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
    }
    for name, (family, suffix, part) in cases.items():
        vector, near = NEAR[family]
        yield _layer(name, RULES, rule, vector, {suffix: part}, near=near)


def _values() -> Iterator[Broken]:
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


def _sizes() -> Iterator[Broken]:
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


def _sizes_hqq() -> Iterator[Broken]:
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


def _sizes_others() -> Iterator[Broken]:
    rule = "scales and biases have one number per group"
    vector, near = NEAR["afq"]
    columns = layer(vector)["weight.scales"]
    turned = columns._replace(shape=(1, columns.shape[0] * columns.shape[1]))
    yield _layer("afq-scales-turned", "entries.md#afq", rule, vector, {"weight.scales": turned}, near=near)
    yield _layer("afq-biases-turned", "entries.md#afq", rule, vector, {"weight.biases": turned}, near=near)
    rule = "a row is whole groups"
    part = Part("U32", (2, 18), bytes(144))
    yield _layer("afq-row-of-groups-and-a-rest", "entries.md#afq", rule, vector, {"weight": part}, near=near)
    part = Part("U32", (2, 15), bytes(120))
    yield _layer("afq-row-not-whole-groups", "entries.md#afq", rule, vector, {"weight": part}, near=near)
    vector, near = NEAR["f8q8"]
    rule = "weight is 33 bytes for each block, and there are as many blocks as the shape needs"
    for name, changes, field in (
        ("blocks-other", {"weight.num_blocks": number(3)}, "weight"),
        ("blocks-huge", {"weight.num_blocks": number(HUGE)}, "weight"),
        ("bytes-more", {"weight": Part("U8", (165,), bytes(165))}, "weight"),
        (
            "blocks-more",
            {"weight": Part("U8", (165,), bytes(165)), "weight.num_blocks": number(5)},
            "weight.num_blocks",
        ),
        ("shape-larger", {"weight.shape": dims(2, 65)}, "weight.num_blocks"),
        ("shape-huge", {"weight.shape": dims(*[HUGE] * 2)}, "weight.num_blocks"),
    ):
        yield _layer(f"f8q8-{name}", "entries.md#f8q8", rule, vector, changes, field, near=near)
    vector, near = NEAR["mxfp4"]
    part = Part("U8", (2, 40), bytes(80))
    yield _layer(
        "mxfp4-row-of-blocks-and-a-rest",
        "entries.md#mxfp4",
        "a row is whole blocks",
        vector,
        {"weight": part},
        near=near,
    )
    part = Part("U8", (2, 31), bytes(62))
    yield _layer(
        "mxfp4-row-not-whole-blocks", "entries.md#mxfp4", "a row is whole blocks", vector, {"weight": part}, near=near
    )
    rule = "scales have one exponent per block"
    part = Part("U8", (4, 1), bytes(4))
    yield _layer("mxfp4-scales-turned", "entries.md#mxfp4", rule, vector, {"weight.scales": part}, near=near)
    rule = "a bias is [out], or [experts, out]"
    for name, family, shape in (
        ("number", "gguf", ()),
        ("too-long", "gguf", (3,)),
        ("too-short", "afq", (1,)),
        ("two-dimensions", "mxfp4", (2, 1)),
    ):
        vector, near = NEAR[family]
        part = Part("F32", shape, bytes(4 * math.prod(shape[:1])))
        yield _layer(f"bias-{name}", FILES, rule, vector, {"bias": part}, near=near, error=SHAPE)
    part = Part("F32", (256,), bytes(1024))
    vector, near = "gguf/q6k-one-dimension", "gguf-q6k-one-dimension"
    yield _layer("bias-of-a-vector", FILES, rule, vector, {"bias": part}, near=near, error=SHAPE)
    part = Part("F32", (3, 2), bytes(24))
    vector, near = "gguf/q8_0-experts-bias", "gguf-q8_0-experts-bias"
    yield _layer("bias-experts-turned", FILES, rule, vector, {"bias": part}, near=near, error=SHAPE, key=EXPERTS)


CASES = (_companions, _formats, _dtypes, _ranks, _values, _sizes)
