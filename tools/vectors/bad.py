"""Blobs that break exactly one rule each, and what a reader must say to each.

A case starts from a valid blob and replaces fields.  Class, field and offset of the error are stated here, by the spec;
the words *expected* and *got* are what uqff says.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import uqff
from tools.vectors import framing
from tools.vectors.good import afq_parts, bias_of, f8q8_blocks, ggml_blocks, mxfp4_parts
from tools.vectors.wire import (
    V010,
    V011,
    V012,
    V013,
    Blob,
    Chance,
    afq,
    f8q8,
    f32,
    fp8,
    gguf,
    hqq,
    mxfp4,
    record,
    tensor,
    u8,
    u32,
    unquant,
)

FORMAT, UNSUPPORTED, SHAPE = "FormatError", "UnsupportedError", "ShapeError"


class Bad(NamedTuple):
    """A broken blob."""

    name: str
    section: str
    rule: str
    data: bytes
    error: str
    field: str | None
    offset: int


_c = Chance("bad")
B2, B3 = bias_of(_c, "F32", 2), bias_of(_c, "F32", 3)
Q4_0 = gguf("q4_0", (2, 32), ggml_blocks(_c, "q4_0", 2), B2)
Q4K = gguf("q4k", (1, 256), ggml_blocks(_c, "q4k", 1))
UNQUANT = unquant(tensor("F32", 2, 3, data=_c.numbers("F32", 6)), B2)
_GROUPS = tensor("F32", 1, 2, data=_c.scales("F32", 2))
HQQ4 = hqq((tensor("U8", 32, 2, data=_c.take(64)), _GROUPS, _GROUPS), (2, 64), 4, 64, 0, bias=B2)
HQQ3 = hqq((tensor("I32", 7, 2, data=bytes(56)), _GROUPS, _GROUPS), (2, 64), 3, 64, 0)
_COLUMN = tensor("F32", 2, 1, data=_c.scales("F32", 2))
HQQ4_AXIS1 = hqq((tensor("U8", 1, 64, data=_c.take(64)), _COLUMN, _COLUMN), (2, 64), 4, 64, 1)
FP8 = fp8(tensor("F8E4M3", 2, 4, data=bytes(range(8))), (f32(0.5), f32(0.5), f32(2.0)), B2)
AFQ4 = afq(afq_parts(_c, 4, 32, (2, 64), "F32"), 4, 32, B2)
F8Q8 = f8q8((2, 32), f8q8_blocks(_c, 64), B2)
MXFP4 = mxfp4(*mxfp4_parts(_c, (2, 32)), B2)
EXPERTS = mxfp4(*mxfp4_parts(_c, (2, 3, 32)))


def _version(blob: Blob, *parts: int) -> dict[str, bytes]:
    major, minor, patch = parts
    return {"version": bytes((patch, minor, major, 0))}


def _broken(
    name: str,
    section: str,
    rule: str,
    blob: Blob,
    changes: dict[str, bytes],
    field: str | None = None,
    error: str = FORMAT,
    at: str | None = None,
) -> Bad:
    """A blob with some fields replaced; the error is at ``field``, by default the only one replaced."""
    field = field or next(iter(changes))
    broken = blob.replaced(changes)
    return Bad(name, section, rule, bytes(broken), error, field, broken.offset(at or field))


def _cut(name: str, section: str, blob: Blob, field: str, keep: int | None = None) -> Bad:
    """A blob that ends within a field, by default before its last byte."""
    size = blob.size(field)
    end = blob.offset(field) + (size - 1 if keep is None else keep)
    return Bad(name, section, "a field is there in full", bytes(blob)[:end], FORMAT, field, blob.offset(field))


def _header() -> Iterator[Bad]:
    page, rule = "tensor.md#header", "the version is one that was ever written"
    yield Bad("empty", page, "a blob has a header", b"", FORMAT, "version", 0)
    yield _cut("truncated-version", page, UNQUANT, "version")
    yield _cut("truncated-type", page, UNQUANT, "quant_type")
    for parts in ((0, 0, 0), (0, 1, 4), (0, 3, 0), (1, 2, 0)):
        text = ".".join(map(str, parts))
        yield _broken(f"version-{text}", page, rule, UNQUANT, _version(UNQUANT, *parts), error=UNSUPPORTED)
    rule = "the top byte of the version word is 0"
    yield _broken("version-top-byte", page, rule, UNQUANT, {"version": bytes((0, 1, 0, 1))}, error=UNSUPPORTED)
    rule = "the version word is little endian"
    yield _broken("version-big-endian", page, rule, UNQUANT, {"version": bytes((0, 0, 1, 0))}, error=UNSUPPORTED)
    for number in (7, 255):
        rule = "the type byte is 0 to 6"
        yield _broken(f"type-{number}", page, rule, UNQUANT, {"quant_type": u8(number)}, error=UNSUPPORTED)
    page = "README.md#versions"
    for name, blob, version in (("fp8", FP8, V011), ("afq", AFQ4, V012), ("f8q8", F8Q8, V013), ("mxfp4", MXFP4, V013)):
        text = ".".join(map(str, version))
        rule = "a family does not occur before the version that introduced it"
        yield _broken(f"{name}-in-{text}", page, rule, blob, _version(blob, *version))
    rule = "a dtype does not occur before the version that introduced it"
    i16 = unquant(tensor("I16", 1, 2, data=bytes(4)), version=V010)
    yield Bad("i16-in-0.1.0", page, rule, bytes(i16), FORMAT, "weight.dtype", i16.offset("weight.dtype"))
    e4m3 = unquant(tensor("F8E4M3", 2, 1, data=bytes(2)), version=V011)
    yield Bad("f8e4m3-in-0.1.1", page, rule, bytes(e4m3), FORMAT, "weight.dtype", e4m3.offset("weight.dtype"))
    bias = gguf("f32", (1, 1), bytes(4), tensor("F8E4M3", 1, data=b"8"), V010)
    yield Bad("f8e4m3-bias-in-0.1.0", page, rule, bytes(bias), FORMAT, "bias.dtype", bias.offset("bias.dtype"))


def _bias() -> Iterator[Bad]:
    page = "tensor.md#bias"
    for name, blob in (("unquant", UNQUANT), ("gguf", Q4_0), ("mxfp4", MXFP4)):
        yield _broken(f"bias-flag-2-{name}", page, "the bias flag is 0 or 1", blob, {"bias_flag": u8(2)})
    yield _broken("bias-flag-255", page, "the bias flag is 0 or 1", AFQ4, {"bias_flag": u8(255)})
    for name, blob in (("unquant", UNQUANT), ("hqq", HQQ4)):
        yield _cut(f"bias-missing-{name}", page, blob, "bias.length", 0)
    for field in ("length", "dtype", "ndim", "shape", "data"):
        yield _cut(f"bias-truncated-{field}", page, F8Q8, f"bias.{field}")
    unannounced = UNQUANT.replaced({"bias_flag": u8(0)})
    rule = "nothing follows the last field"
    yield Bad("bias-unannounced", page, rule, bytes(unannounced), FORMAT, None, unannounced.offset("bias.length"))
    rule = "a bias has one number per output"
    weight = tensor("F32", 2, 3, data=bytes(24))
    wrong = {
        "too-long": (weight, tensor("F32", 3, data=bytes(12))),
        "too-short": (weight, tensor("F32", 1, data=bytes(4))),
        "two-dimensions": (weight, tensor("F32", 2, 1, data=bytes(8))),
        "no-dimensions": (weight, tensor("F32", data=bytes(4))),
        "of-a-vector": (tensor("F32", 3, data=bytes(12)), tensor("F32", 3, data=bytes(12))),
        "experts-transposed": (tensor("F32", 2, 3, 1, data=bytes(24)), tensor("F32", 3, 2, data=bytes(24))),
        "experts-count": (tensor("F32", 2, 3, 1, data=bytes(24)), tensor("F32", 2, data=bytes(8))),
    }
    for name, (plain, bias) in wrong.items():
        blob = unquant(plain, bias)
        yield Bad(f"bias-{name}", page, rule, bytes(blob), SHAPE, "bias.shape", blob.offset("bias.shape"))


def _tensor() -> Iterator[Bad]:
    page = "tensor.md#record"
    for field in ("length", "dtype", "ndim", "shape", "data"):
        yield _cut(f"tensor-truncated-{field}", page, UNQUANT.replaced({}), f"weight.{field}")
    rule = "length is the number of elements times their size"
    for name, length in (("short", 23), ("long", 25), ("zero", 0), ("huge", 2**32 - 1)):
        yield _broken(f"tensor-length-{name}", page, rule, UNQUANT, {"weight.length": u32(length)})
    longer = {"weight.length": u32(28), "weight.data": bytes(28)}
    yield _broken("tensor-data-longer-than-shape", page, rule, UNQUANT, longer, "weight.length")
    for code in (14, 255, 2**32 - 1):
        rule = "the dtype code is known"
        yield _broken(f"tensor-dtype-{code}", page, rule, UNQUANT, {"weight.dtype": u32(code)})
    for code in (10, 11, 12, 13):
        rule = "dtype codes 10 to 13 are reserved names"
        yield _broken(f"tensor-dtype-{code}-reserved", page, rule, UNQUANT, {"weight.dtype": u32(code)})
    rule = "at most 8 dimensions"
    nine = {"weight.ndim": u32(9), "weight.shape": u32(2, 3, 1, 1, 1, 1, 1, 1, 1)}
    yield _broken("tensor-nine-dimensions", page, rule, UNQUANT, nine)
    yield _broken("tensor-ndim-huge", page, rule, UNQUANT, {"weight.ndim": u32(2**32 - 1)})
    rule = "no dimension is 0"
    empty = {"weight.shape": u32(0, 3), "weight.length": u32(0), "weight.data": b""}
    yield _broken("tensor-zero-dimension", page, rule, UNQUANT, empty)
    rule = "the data is there, whatever the product of the shape"
    # 8 * (2**30 * 4 * 3) is a multiple of 2**32, so the wrapped length fits and only the data is missing.
    huge = {"weight.shape": u32(2**31, 2**31), "weight.length": u32(0)}
    yield _broken("tensor-shape-huge", page, rule, UNQUANT, huge, "weight.data")
    scalar = unquant(tensor("F32", data=bytes(4)))
    rule = "a weight has at least one dimension"
    yield Bad("unquant-no-dimensions", page, rule, bytes(scalar), FORMAT, "weight.ndim", scalar.offset("weight.ndim"))
    rule = "nothing follows the last field"
    for name, blob in (("unquant", UNQUANT), ("gguf", Q4K), ("fp8", FP8)):
        yield Bad(f"trailing-byte-{name}", page, rule, bytes(blob) + b"\0", FORMAT, None, len(bytes(blob)))


def _gguf() -> Iterator[Bad]:
    page = "families/gguf.md#layout"
    for field in ("data_length", "bias_flag", "ggml_dtype", "ndim", "shape", "data"):
        yield _cut(f"gguf-truncated-{field}", page, Q4_0, field)
    rule = "data_length follows from type and shape"
    yield _broken("gguf-length-short", page, rule, Q4_0, {"data_length": u32(18), "data": bytes(18)})
    yield _broken("gguf-length-other", page, rule, Q4_0, {"data_length": u32(37)})
    yield _broken("gguf-length-long", page, rule, Q4_0, {"data_length": u32(54), "data": bytes(54)})
    for code in (4, 5, 16, 31, 2**32 - 1):
        rule = "the ggml type is one of the table"
        yield _broken(f"gguf-type-{code}", page, rule, Q4_0, {"ggml_dtype": u32(code)})
    rule = "a row is whole blocks"
    yield _broken("gguf-row-not-whole-blocks", page, rule, Q4_0, {"shape": u32(4, 16)})
    yield _broken("gguf-row-not-whole-super-blocks", page, rule, Q4K, {"shape": u32(2, 128)})
    rule = "a weight has at least one dimension"
    yield _broken("gguf-no-dimensions", page, rule, Q4_0, {"ndim": u32(0), "shape": b""})
    nine = {"ndim": u32(9), "shape": u32(*[1] * 7, 2, 32)}
    yield _broken("gguf-nine-dimensions", page, "at most 8 dimensions", Q4_0, nine)
    yield _broken("gguf-zero-dimension", page, "no dimension is 0", Q4_0, {"shape": u32(0, 32)})


def _hqq() -> Iterator[Bad]:
    page = "families/hqq.md#layout"
    scalars = ("ndim", "shape", "bits", "group_size", "axis", "optimization_steps", "round_zeros", "channel_wise")
    for field in ("w_q.data", "scales.data", "zeros.data", *scalars):
        yield _cut(f"hqq-truncated-{field.replace('.', '-').replace('_', '-')}", page, HQQ4, field)
    rule = "w_q is U8, for 3 bits I32"
    words = dict(record("w_q", tensor("I32", 32, 2, data=bytes(256))))
    yield _broken("hqq4-codes-i32", page, rule, HQQ4, words, "w_q.dtype")
    octets = dict(record("w_q", tensor("U8", 7, 2, data=bytes(14))))
    yield _broken("hqq3-codes-u8", page, rule, HQQ3, octets, "w_q.dtype")
    numbers = tensor("F64", 1, 2, data=bytes(16))
    double = dict(record("scales", numbers)) | dict(record("zeros", numbers))
    yield _broken("hqq-scales-f64", page, "scales are F32, F16 or BF16", HQQ4, double, "scales.dtype")
    half = dict(record("zeros", tensor("F16", 1, 2, data=bytes(4))))
    yield _broken("hqq-zeros-other-dtype", page, "zeros have the dtype of scales", HQQ4, half, "zeros.dtype")
    for bits in (0, 5, 16):
        yield _broken(f"hqq-bits-{bits}", page, "bits is 1, 2, 3, 4 or 8", HQQ4, {"bits": u8(bits)})
    yield _broken("hqq-axis-2", page, "axis is 0 or 1", HQQ4_AXIS1, {"axis": u8(2)})
    yield _broken("hqq-round-zeros-2", page, "round_zeros is 0 or 1", HQQ4, {"round_zeros": u8(2)})
    yield _broken("hqq-channel-wise-255", page, "channel_wise is 0 or 1", HQQ4, {"channel_wise": u8(255)})
    yield _broken("hqq-group-size-0", page, "a group has at least one weight", HQQ4, {"group_size": u32(0)})
    rule = "the weight is whole groups"
    yield _broken("hqq-group-size-48", page, rule, HQQ4, {"group_size": u32(48)})
    yield _broken("hqq-group-and-a-rest", page, rule, HQQ4, {"shape": u32(2, 65)}, "group_size")
    yield _broken("hqq-group-size-huge", page, rule, HQQ4, {"group_size": u32(2**32 - 1)})
    rule = "the rows of M fill the packed elements"
    yield _broken("hqq4-group-size-1", page, rule, HQQ4, {"group_size": u32(1)}, "w_q.shape")
    full = dict(record("w_q", tensor("U8", 33, 2, data=bytes(66)))) | {"shape": u32(2, 65), "group_size": u32(65)}
    yield _broken("hqq4-group-size-65", page, rule, HQQ4, full, "w_q.shape")
    rule = "a weight has at least one dimension"
    yield _broken("hqq-no-dimensions", page, rule, HQQ4, {"ndim": u32(0), "shape": b""})
    yield _broken("hqq-zero-dimension", page, "no dimension is 0", HQQ4, {"shape": u32(0, 64)})
    rule = "w_q fits shape, bits and group_size"
    yield _broken("hqq-codes-transposed", page, rule, HQQ4, {"w_q.shape": u32(2, 32)})
    rule = "scales and zeros are [1, N] for axis 0, [N, 1] for axis 1"
    yield _broken("hqq-scales-transposed", page, rule, HQQ4, {"scales.shape": u32(2, 1)})
    yield _broken("hqq-zeros-transposed", page, rule, HQQ4_AXIS1, {"zeros.shape": u32(1, 2)})
    flat = {"zeros.ndim": u32(1), "zeros.shape": u32(2)}
    yield _broken("hqq-zeros-flat", page, rule, HQQ4, flat, "zeros.shape")


def _fp8() -> Iterator[Bad]:
    page = "families/fp8.md#layout"
    for field in ("dequant_w_scale", "dequant_x_scale", "quant_scale", "dtype"):
        yield _cut(f"fp8-truncated-{field.replace('_', '-')}", page, FP8, field)
    yield _broken("fp8-weight-u8", page, "the weight is F8E4M3", FP8, {"weight.dtype": u32(0)})
    yield _broken("fp8-dtype-6", page, "the dtype of the codes is F8E4M3", FP8, {"dtype": u32(6)})
    scalar = fp8(tensor("F8E4M3", data=b"8"), (f32(1.0),) * 3)
    rule = "a weight has at least one dimension"
    yield Bad("fp8-no-dimensions", page, rule, bytes(scalar), FORMAT, "weight.ndim", scalar.offset("weight.ndim"))


def _afq() -> Iterator[Bad]:
    page = "families/afq.md#layout"
    yield _cut("afq-truncated-bits", page, AFQ4, "bits", 0)
    yield _cut("afq-truncated-group-size", page, AFQ4, "group_size", 0)
    octets = dict(record("w_q", tensor("U8", 2, 8, data=bytes(16))))
    yield _broken("afq-codes-u8", page, "w_q is U32", AFQ4, octets, "w_q.dtype")
    rule = "scales are F32, F16 or BF16"
    integers = {"scales.dtype": u32(2), "biases.dtype": u32(2)}
    yield _broken("afq-scales-i32", page, rule, AFQ4, integers)
    half = dict(record("biases", tensor("F16", 2, 2, data=bytes(8))))
    yield _broken("afq-biases-other-dtype", page, "biases have the dtype of scales", AFQ4, half, "biases.dtype")
    for bits in (0, 5, 40):
        yield _broken(f"afq-bits-{bits}", page, "bits is 2, 3, 4, 6 or 8", AFQ4, {"bits": u8(bits)})
    for size in (0, 16, 255):
        rule = "group_size is 32, 64 or 128"
        yield _broken(f"afq-group-size-{size}", page, rule, AFQ4, {"group_size": u8(size)})
    rule = "a row is whole groups"
    yield _broken("afq-row-not-whole-groups", page, rule, AFQ4, {"group_size": u8(128)}, "w_q.shape")
    longer = dict(record("w_q", tensor("U32", 2, 9, data=bytes(72))))
    yield _broken("afq-row-of-groups-and-a-rest", page, rule, AFQ4, longer, "w_q.shape")
    rule = "a weight has at least one dimension"
    scalar = dict(record("w_q", tensor("U32", data=bytes(4))))
    yield _broken("afq-no-dimensions", page, rule, AFQ4, scalar, "w_q.ndim")
    rule = "scales and biases have one number per group"
    yield _broken("afq-scales-shape", page, rule, AFQ4, {"scales.shape": u32(4, 1)})
    yield _broken("afq-biases-shape", page, rule, AFQ4, {"biases.shape": u32(1, 4)})
    scalar = dict(record("biases", tensor("F32", data=bytes(4))))
    yield _broken("afq-biases-no-dimensions", page, rule, AFQ4, scalar, "biases.shape")


def _f8q8() -> Iterator[Bad]:
    page = "families/f8q8.md#layout"
    for field in ("num_blocks", "ndim", "shape", "data"):
        yield _cut(f"f8q8-truncated-{field.replace('_', '-')}", page, F8Q8, field)
    rule = "there are as many blocks as the shape needs"
    short = {"num_blocks": u32(1), "data": bytes(33)}
    yield _broken("f8q8-blocks-missing", page, rule, F8Q8, short)
    yield _broken("f8q8-blocks-superfluous", page, rule, F8Q8, {"num_blocks": u32(3), "data": bytes(99)})
    yield _broken("f8q8-blocks-zero", page, rule, F8Q8, {"num_blocks": u32(0), "data": b""})
    rule = "a weight has at least one dimension"
    yield _broken("f8q8-no-dimensions", page, rule, F8Q8, {"ndim": u32(0), "shape": b""})
    yield _broken("f8q8-zero-dimension", page, "no dimension is 0", F8Q8, {"shape": u32(2, 0)})


def _mxfp4() -> Iterator[Bad]:
    page = "families/mxfp4.md#layout"
    yield _cut("mxfp4-truncated-blocks", page, MXFP4, "blocks.data")
    yield _cut("mxfp4-truncated-scales", page, MXFP4, "scales.data")
    yield _broken("mxfp4-blocks-f8e4m3", page, "blocks are U8", MXFP4, {"blocks.dtype": u32(9)})
    yield _broken("mxfp4-scales-f8e4m3", page, "scales are U8", MXFP4, {"scales.dtype": u32(9)})
    yield _broken(
        "mxfp4-scales-e8m0", page, "dtype codes 10 to 13 are reserved names", MXFP4, {"scales.dtype": u32(13)}
    )
    rule = "a row is whole blocks"
    yield _broken("mxfp4-row-not-whole-blocks", page, rule, MXFP4, {"blocks.shape": u32(4, 8)})
    longer = dict(record("blocks", tensor("U8", 2, 24, data=bytes(48))))
    yield _broken("mxfp4-row-of-blocks-and-a-rest", page, rule, MXFP4, longer, "blocks.shape")
    rule = "scales have one exponent per block"
    yield _broken("mxfp4-scales-shape", page, rule, MXFP4, {"scales.shape": u32(1, 2)})
    flat = {"scales.ndim": u32(2), "scales.shape": u32(6, 1)}
    yield _broken("mxfp4-experts-scales-flat", page, rule, EXPERTS, flat, "scales.shape")
    rule = "a weight has at least one dimension"
    scalar = dict(record("blocks", tensor("U8", data=bytes(1))))
    yield _broken("mxfp4-no-dimensions", page, rule, MXFP4, scalar, "blocks.ndim")


CASES: tuple[Callable[[], Iterator[Bad]], ...] = (_header, _bias, _tensor, _gguf, _hqq, _fp8, _afq, _f8q8, _mxfp4)


def files() -> dict[str, bytes]:
    """``bad/NAME.bin``, ``bad/NAME.uqff`` and ``bad/index.json``."""
    found: dict[str, bytes] = {}
    index = []
    for bad in (bad for cases in CASES for bad in cases()):
        index.append(_entry(f"{bad.name}.bin", bad, _raised(lambda data=bad.data: uqff.deserialize(data))))  # type: ignore[misc]
        _add(found, f"bad/{bad.name}.bin", bad.data)
    for file in framing.broken():
        index.append(_entry(f"{file.name}.uqff", file, _raised_by_file(file)))
        _add(found, f"bad/{file.name}.uqff", file.data)
    rows = ",\n".join(f" {json.dumps(row)}" for row in index)
    found["bad/index.json"] = f"[\n{rows}\n]\n".encode()
    return found


def _add(found: dict[str, bytes], path: str, data: bytes) -> None:
    if path in found:
        raise ValueError(f"two files are called {path}")
    found[path] = data


def _raised(read: Callable[[], object]) -> uqff.UqffError | None:
    try:
        read()
    except uqff.UqffError as error:
        return error
    return None


def _raised_by_file(file: framing.BrokenFile) -> uqff.UqffError | None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"{file.name}.uqff"
        path.write_bytes(file.data)

        def read() -> None:
            with uqff.open(path) as opened:
                for key in opened:
                    opened[key]

        return _raised(read)


def _entry(name: str, bad: Any, error: uqff.UqffError | None) -> dict[str, Any]:
    """A line of the index.

    Raises:
        AssertionError: uqff does not raise what the spec demands.
    """
    got = None if error is None else (type(error).__name__, error.field, error.offset)
    if error is None or got != (bad.error, bad.field, bad.offset):
        raise AssertionError(f"{name}: expected {(bad.error, bad.field, bad.offset)}, got {got}: {error}")
    return {
        "file": name,
        "section": bad.section,
        "rule": bad.rule,
        "error": bad.error,
        "field": bad.field,
        "offset": bad.offset,
        "problem": error.problem,
        "expected": None if error.expected is None else str(error.expected),
        # What a JSON parser says of broken JSON differs between Python's releases.
        "got": None if error.got is None or error.problem == "header is not JSON" else str(error.got),
    }
