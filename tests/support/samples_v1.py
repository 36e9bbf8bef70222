"""Small 1.x layers and files written out by hand: what the tests of entries compare with. Nothing here uses uqff."""

from __future__ import annotations

import math
from pathlib import Path

from tests.support.samples import f32, framed, run, u32

Tensor = tuple[str, tuple[int, ...], bytes]
"""Safetensors dtype, shape, bytes."""

SIZES = {
    "I64": 8,
    "F64": 8,
    "F32": 4,
    "U32": 4,
    "I32": 4,
    "BF16": 2,
    "F16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of an element, in the order in which the reference implementation sorts."""


def number(value: int) -> Tensor:
    """A version entry, or any other U32 []."""
    return ("U32", (), u32(value))


def byte(value: int) -> Tensor:
    """A U8 []."""
    return ("U8", (), bytes([value]))


def dims(*shape: int) -> Tensor:
    """A shape as an entry."""
    return ("U32", (len(shape),), u32(*shape))


BIAS: Tensor = ("F32", (2,), f32(0.5, -2.0))

LAYERS: dict[str, dict[str, Tensor]] = {
    "gguf": {
        "weight.format": byte(0),
        "weight": ("U8", (36,), run(36)),
        "weight.dtype": number(2),
        "weight.shape": dims(2, 32),
    },
    "unquant": {"weight.format": byte(1), "weight": ("BF16", (2, 3), run(12))},
    "hqq": {
        "weight.format": byte(2),
        "weight": ("U8", (2, 2), run(4)),
        "weight.scales": ("F32", (1, 2), f32(1, 2)),
        "weight.zeros": ("F32", (1, 2), f32(3, 4)),
        "weight.shape": dims(2, 4),
        "weight.bits": byte(4),
        "weight.group_size": number(4),
        "weight.axis": byte(0),
        "weight.optimization_steps": number(10),
        "weight.round_zeros": byte(0),
        "weight.channel_wise": byte(1),
    },
    "fp8": {
        "weight.format": byte(3),
        "weight": ("F8_E4M3", (2, 3), run(6)),
        "weight.dequant_w_scale": ("F32", (), f32(0.25)),
        "weight.dequant_x_scale": ("F32", (), f32(0.25)),
        "weight.quant_scale": ("F32", (), f32(4.0)),
        "weight.dtype": number(9),
    },
    "afq": {
        "weight.format": byte(4),
        "weight.bits": byte(2),
        "weight.group_size": byte(32),
        "weight": ("U32", (2, 2), run(16)),
        "weight.scales": ("F32", (2, 1), f32(1, 2)),
        "weight.biases": ("F32", (2, 1), f32(3, 4)),
    },
    "f8q8": {
        "weight.format": byte(5),
        "weight": ("U8", (66,), run(66)),
        "weight.num_blocks": number(2),
        "weight.shape": dims(2, 20),
    },
    "mxfp4": {
        "weight.format": byte(6),
        "weight": ("U8", (2, 16), run(32)),
        "weight.scales": ("U8", (2, 1), b"\x7f\x80"),
    },
}
"""The layers of ``samples.BLOBS`` of the same names, entries in the order in which the engine writes them."""


def version(major: int = 1, minor: int = 2, patch: int = 0) -> dict[str, Tensor]:
    """The three version entries."""
    return {
        "uqff.version.major": number(major),
        "uqff.version.minor": number(minor),
        "uqff.version.patch": number(patch),
    }


def layer(key: str, entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """Entries under a key."""
    return {f"{key}.{suffix}": tensor for suffix, tensor in entries.items()}


def file_of(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file as the reference implementation orders it: by dtype, then by name."""
    order = sorted(tensors, key=lambda name: (list(SIZES).index(tensors[name][0]), name))
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    at, data = 0, b""
    for name in order:
        dtype, shape, content = tensors[name]
        assert math.prod(shape) * SIZES[dtype] == len(content), name
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(content)]}
        at += len(content)
        data += content
    return framed(header, data)


def write(path: Path, *parts: dict[str, Tensor]) -> Path:
    """Write a file of several dictionaries of entries."""
    path.write_bytes(file_of({name: tensor for part in parts for name, tensor in part.items()}))
    return path
