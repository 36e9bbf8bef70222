"""1.x layers and files: entries made from the fields of a blob, files put together and read, by the tables of the spec.

The parts of a layer are the same in both generations.  So a layer of a vector is written as the entries of a ``Blob``
(:func:`entries_of`), and read by putting its entries into a blob again (:func:`blob_of`), whose weights the oracle
computes.  Nothing here uses uqff.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

from tools.vectors import wire
from tools.vectors.wire import Blob, Shape, Tensor, u8, u32

_WIDTHS = {
    8: ("U64", "I64", "F64"),
    4: ("F32", "U32", "I32"),
    2: ("BF16", "F16", "U16", "I16"),
    1: ("F8_E4M3", "I8", "U8", "BOOL"),
}
SIZES = {dtype: size for size, dtypes in _WIDTHS.items() for dtype in dtypes}
"""Bytes of an element of safetensors' dtypes, in the order in which writers sort tensors."""
BITS = {
    **{dtype: 8 * size for dtype, size in SIZES.items()},
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "C64": 64,
}
"""Bits of an element of all of them: those that no writer of UQFF stores, too."""

_NAMES = {code: name for name, (code, _) in wire.DTYPES.items()} | {9: "F8_E4M3"}
_OURS = {"F8_E4M3": "F8E4M3"}

VERSION = ("uqff.version.major", "uqff.version.minor", "uqff.version.patch")


class Part(NamedTuple):
    """The content of an entry, by the names of safetensors."""

    dtype: str
    shape: Shape
    data: bytes


Entries = dict[str, Part]
"""Suffix, or name, to content."""


def byte(number: int) -> Part:
    """A number ``U8 []``."""
    return Part("U8", (), u8(number))


def number(value: int) -> Part:
    """A number ``U32 []``."""
    return Part("U32", (), u32(value))


def dims(*shape: int) -> Part:
    """Dimensions, ``U32 [ndim]``."""
    return Part("U32", (len(shape),), u32(*shape))


def version(major: int = 1, minor: int = 2, patch: int = 0) -> Entries:
    """The three version entries."""
    return dict(zip(VERSION, map(number, (major, minor, patch)), strict=True))


def named(key: str, layer: Mapping[str, Part]) -> Entries:
    """Entries of a layer under its key."""
    return {f"{key}.{suffix}": part for suffix, part in layer.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------------


def entries_of(blob: Blob) -> Entries:
    """The entries of a blob's layer by suffix, in the order of the tables."""
    fields = dict(blob.fields)
    family = fields["quant_type"][0]

    def tensor(path: str) -> Part:
        (code,) = struct.unpack("<I", fields[f"{path}.dtype"])
        return Part(_NAMES[code], _numbers(fields[f"{path}.shape"]), fields[f"{path}.data"])

    def row(path: str) -> Part:
        return Part("U8", (len(fields[path]),), fields[path])

    def one(path: str, dtype: str = "") -> Part:
        return Part(dtype or {1: "U8", 4: "U32"}[len(fields[path])], (), fields[path])

    shape = dims(*_numbers(fields["shape"])) if "shape" in fields else dims()
    layers: tuple[Any, ...] = (
        lambda: {"weight": row("data"), "weight.dtype": one("ggml_dtype"), "weight.shape": shape},
        lambda: {"weight": tensor("weight")},
        lambda: {
            "weight": tensor("w_q"),
            "weight.scales": tensor("scales"),
            "weight.zeros": tensor("zeros"),
            "weight.shape": shape,
            **{f"weight.{name}": one(name) for name in _HQQ_NUMBERS},
        },
        lambda: {
            "weight": tensor("weight"),
            **{f"weight.{name}": one(name, "F32") for name in _FP8_SCALES},
            "weight.dtype": one("dtype"),
        },
        lambda: {
            "weight.bits": one("bits"),
            "weight.group_size": one("group_size"),
            "weight": tensor("w_q"),
            "weight.scales": tensor("scales"),
            "weight.biases": tensor("biases"),
        },
        lambda: {"weight": row("data"), "weight.num_blocks": one("num_blocks"), "weight.shape": shape},
        lambda: {"weight": tensor("blocks"), "weight.scales": tensor("scales")},
    )
    bias = {"bias": tensor("bias")} if "bias.data" in fields else {}
    return {"weight.format": byte(family), **layers[family](), **bias}


_HQQ_NUMBERS = ("bits", "group_size", "axis", "optimization_steps", "round_zeros", "channel_wise")
_FP8_SCALES = ("dequant_w_scale", "dequant_x_scale", "quant_scale")


def _numbers(data: bytes) -> Shape:
    return struct.unpack(f"<{len(data) // 4}I", data)


def blob_of(layer: Mapping[str, Part]) -> bytes:
    """A blob of the latest pre-1.0 version with the parts of a layer: what a reader can do that knows blobs."""

    def tensor(suffix: str) -> Tensor:
        part = layer[suffix]
        return Tensor(_OURS.get(part.dtype, part.dtype), part.shape, part.data)

    def value(suffix: str) -> int:
        return int.from_bytes(layer[suffix].data, "little")

    family = value("weight.format")
    shape = _numbers(layer["weight.shape"].data) if "weight.shape" in layer else ()
    data = layer["weight"].data
    bias = tensor("bias") if "bias" in layer else None
    if family == 0:
        kind = next(name for name, (code, _, _) in wire.GGML.items() if code == value("weight.dtype"))
        return bytes(wire.gguf(kind, shape, data, bias, wire.V020))
    if family == 1:
        return bytes(wire.unquant(tensor("weight"), bias, wire.V020))
    if family == 2:
        parts = (tensor("weight"), tensor("weight.scales"), tensor("weight.zeros"))
        bits, group_size, axis, steps, round_zeros, channel_wise = (value(f"weight.{name}") for name in _HQQ_NUMBERS)
        flags = {"steps": steps, "round_zeros": round_zeros, "channel_wise": channel_wise}
        return bytes(wire.hqq(parts, shape, bits, group_size, axis, **flags, bias=bias, version=wire.V020))
    if family == 3:
        w_scale, x_scale, quant_scale = (layer[f"weight.{name}"].data for name in _FP8_SCALES)
        return bytes(wire.fp8(tensor("weight"), (w_scale, x_scale, quant_scale), bias, wire.V020))
    if family == 4:
        parts = (tensor("weight"), tensor("weight.scales"), tensor("weight.biases"))
        return bytes(wire.afq(parts, value("weight.bits"), value("weight.group_size"), bias, wire.V020))
    if family == 5:
        return bytes(wire.f8q8(shape, data, bias))
    return bytes(wire.mxfp4(tensor("weight"), tensor("weight.scales"), bias))


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def file_of(tensors: Mapping[str, Part], metadata: Mapping[str, str] | None = None, *, ordered: bool = True) -> bytes:
    """A safetensors file; sorted by dtype and name as writers do, or in the order given."""
    rank = list(SIZES)
    order = sorted(tensors, key=lambda name: (rank.index(tensors[name].dtype), name)) if ordered else list(tensors)
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        dtype, shape, data = tensors[name]
        if 8 * len(data) != math.prod(shape) * BITS[dtype]:
            raise ValueError(f"{name}: {dtype} {shape} is not {len(data)} bytes")
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(tensors[name].data for name in order)


class Found(NamedTuple):
    """An entry in a file."""

    name: str
    part: Part
    offset: int


def read_file(data: bytes) -> tuple[list[Found], dict[str, str] | None]:
    """The entries of a file in the order of their bytes, and its metadata."""
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    metadata = header.pop("__metadata__", None)
    found = []
    for name, entry in header.items():
        first, last = (begin + at for at in entry["data_offsets"])
        found.append(Found(name, Part(entry["dtype"], tuple(entry["shape"]), data[first:last]), first))
    return sorted(found, key=lambda one: (one.offset, len(one.part.data))), metadata


SUFFIXES = {
    *("weight.format", "weight", "bias", "weight.dtype", "weight.shape", "weight.scales", "weight.zeros"),
    *("weight.biases", "weight.num_blocks"),
    *(f"weight.{name}" for name in (*_HQQ_NUMBERS, *_FP8_SCALES)),
}


def layers_of(tensors: Mapping[str, Part]) -> tuple[dict[str, Entries], list[str]]:
    """The layers of all entries of a model, and the names that belong to none."""
    layers: dict[str, Entries] = {
        name.removesuffix(".weight.format"): {} for name in tensors if name.endswith(".weight.format")
    }
    extra = []
    for name, part in tensors.items():
        *front, last = name.split(".")
        if last not in ("weight", "bias") and front and front[-1] == "weight":
            key, suffix = ".".join(front[:-1]), f"weight.{last}"
        else:
            key, suffix = ".".join(front), last
        if key in layers and suffix in SUFFIXES:
            layers[key][suffix] = part
        elif name not in VERSION:
            extra.append(name)
    return dict(sorted(layers.items())), sorted(extra)
