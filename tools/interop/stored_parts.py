"""What a layer stores, as named byte strings, and the comparison of two of them.

A pre-1.0 layer is one part, its blob. A 1.x layer is several safetensors entries; this module knows their names and
dtypes, since the package itself does not read 1.x.

Only the sign of a zero may differ, and only in five fields: `m` of Q4_1 and Q5_1, `dmin` of Q4K and Q5K, and AFQ's
biases. They come from a minimum of -0.0 and 0.0, which the engine's compiler decides, differently in its releases.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import safetensors
import torch

import uqff
from uqff.codec.blob import trace
from uqff.families import AFQ, F8Q8, FP8, GGUF, HQQ, MXFP4, Unquant
from uqff.families.base import QuantizedTensor
from uqff.schema.layout import offset_of_field

UQFF_0 = (0, 1, 3)
"""The version that the 0.6.0 client writes."""
UQFF_1 = (1, 2, 0)
"""The version that the 0.9.5 client writes."""

FREE_ZEROS = {"Q4_1": "m", "Q5_1": "m", "Q4K": "dmin", "Q5K": "dmin"}
"""ggml types with a field whose zeros may have either sign."""

E4M3_CODE = 9
SAFETENSORS_DTYPES = {
    torch.uint8: "U8",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
}

Offsets = npt.NDArray[np.int64]


class Zeros(NamedTuple):
    """Floats whose zeros may have either sign: where each begins, and how many bytes it has."""

    offsets: Offsets
    width: int


NONE = Zeros(np.empty(0, np.int64), 2)


class Part(NamedTuple):
    """Something stored: dtype as safetensors names it, shape, little-endian bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes
    zeros: Zeros = NONE


class Difference(NamedTuple):
    """How two parts differ: bytes of the client's, of which differ, zeros of the other sign, first differing offset."""

    size: int
    differing: int
    zero_signs: int
    first: int | None


def compare(theirs: Part | None, ours: Part | None) -> Difference:
    """Compare what the client stored with what this package makes. A part that one side lacks differs in its whole."""
    if theirs is None or ours is None or (theirs.dtype, theirs.shape) != (ours.dtype, ours.shape):
        size = len(theirs.data) if theirs else 0
        return Difference(size, max(size, len(ours.data) if ours else 0, 1), 0, 0)
    size, excess = len(theirs.data), abs(len(theirs.data) - len(ours.data))
    if theirs.data == ours.data:
        return Difference(size, 0, 0, None)
    common = min(size, len(ours.data))
    a, b = (np.frombuffer(part.data, np.uint8, common) for part in (theirs, ours))
    different = a != b
    signs = _zeros_of_either_sign(a, b, ours.zeros) if not excess else ours.zeros.offsets[:0]
    different[signs + ours.zeros.width - 1] = False
    places = np.flatnonzero(different)
    first = int(places[0]) if len(places) else common if excess else None
    return Difference(size, len(places) + excess, len(signs), first)


def _zeros_of_either_sign(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8], zeros: Zeros) -> Offsets:
    """The offsets among `zeros` where one side has 0.0 and the other -0.0."""
    if not len(zeros.offsets):
        return zeros.offsets
    places = zeros.offsets[:, None] + np.arange(zeros.width)
    sign = np.array([0] * (zeros.width - 1) + [0x80], np.uint8)
    zero = ((a[places] | sign) == sign).all(axis=1) & ((b[places] | sign) == sign).all(axis=1)
    different: Offsets = zeros.offsets[zero & (a[places] != b[places]).any(axis=1)]
    return different


def free_zeros(weight: QuantizedTensor, start: int = 0) -> Zeros:
    """The floats of a weight whose zeros may have either sign, if its blocks or group biases begin at `start`."""
    if isinstance(weight, AFQ):
        width = weight.biases.itemsize
        return Zeros(start + width * np.arange(weight.biases.numel()), width)
    if isinstance(weight, GGUF) and weight.block_type.name in FREE_ZEROS:
        layout = weight.block_type.numpy
        assert layout.fields is not None
        dtype, at = layout.fields[FREE_ZEROS[weight.block_type.name]][:2]
        blocks = weight.data.numel() // weight.block_type.type_size
        return Zeros(start + at + weight.block_type.type_size * np.arange(blocks), dtype.itemsize)
    return NONE


def blob_part(layer: uqff.Layer) -> Part:
    """A layer as its pre-1.0 blob."""
    blob = uqff.serialize(layer, version=UQFF_0)
    zeros = NONE
    field = {AFQ: "biases.data", GGUF: "data"}.get(type(layer.weight))
    if field is not None:
        start = offset_of_field(trace(blob), field)
        assert start is not None
        zeros = free_zeros(layer.weight, start)
    return Part("U8", (len(blob),), blob, zeros)


def entries(key: str, layer: uqff.Layer) -> dict[str, Part]:
    """A layer as the safetensors entries of UQFF 1.2."""
    weight = layer.weight
    own = {"": _main(weight), ".format": _u8(int(weight.family)), **_others(weight)}
    named = {f"{key}.weight{suffix}": part for suffix, part in own.items()}
    if layer.bias is not None:
        named[f"{key}.bias"] = _tensor(layer.bias)
    return named


def _main(weight: QuantizedTensor) -> Part:
    """The entry `weight`, under whose name the others hang."""
    if isinstance(weight, GGUF):
        return _tensor(weight.data.reshape(-1))._replace(zeros=free_zeros(weight))
    if isinstance(weight, AFQ):
        *outer, row = weight.w_q.shape
        return Part("U32", (*outer, row // 4), _tensor(weight.w_q).data)
    if isinstance(weight, HQQ):
        return _tensor(weight.w_q)
    if isinstance(weight, FP8):
        return _tensor(weight.weight)
    if isinstance(weight, F8Q8 | MXFP4):
        return _tensor(weight.blocks if isinstance(weight, MXFP4) else weight.blocks.reshape(-1))
    assert isinstance(weight, Unquant)
    return _tensor(weight.weight)


def _others(weight: QuantizedTensor) -> dict[str, Part]:
    if isinstance(weight, GGUF):
        return {".dtype": _scalar(weight.block_type.code), ".shape": _vector(weight.shape)}
    if isinstance(weight, AFQ):
        biases = _tensor(weight.biases)._replace(zeros=free_zeros(weight))
        sizes = {".bits": _u8(weight.bits), ".group_size": _u8(weight.group_size)}
        return {".scales": _tensor(weight.scales), ".biases": biases, **sizes}
    if isinstance(weight, HQQ):
        return {
            ".scales": _tensor(weight.scales),
            ".zeros": _tensor(weight.zeros),
            ".shape": _vector(weight.shape),
            ".bits": _u8(weight.bits),
            ".group_size": _scalar(weight.group_size),
            ".axis": _u8(weight.axis),
            ".optimization_steps": _scalar(weight.optimization_steps or 0),
            ".round_zeros": _u8(int(weight.round_zeros)),
            ".channel_wise": _u8(int(weight.channel_wise)),
        }
    if isinstance(weight, FP8):
        names = ("dequant_w_scale", "dequant_x_scale", "quant_scale")
        scales = {f".{name}": _tensor(getattr(weight, name)) for name in names}
        return {**scales, ".dtype": _scalar(E4M3_CODE)}
    if isinstance(weight, F8Q8):
        return {".num_blocks": _scalar(len(weight.blocks)), ".shape": _vector(weight.shape)}
    if isinstance(weight, MXFP4):
        return {".scales": _tensor(weight.scales)}
    return {}


def _tensor(tensor: torch.Tensor) -> Part:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return Part(SAFETENSORS_DTYPES[tensor.dtype], tuple(tensor.shape), raw)


def _u8(number: int) -> Part:
    return Part("U8", (), bytes([number]))


def _scalar(number: int) -> Part:
    return Part("U32", (), number.to_bytes(4, "little"))


def _vector(numbers: tuple[int, ...]) -> Part:
    return Part("U32", (len(numbers),), np.array(numbers, "<u4").tobytes())


def version_entries() -> dict[str, Part]:
    """The three entries that say which version a 1.x file is."""
    parts = zip(("major", "minor", "patch"), UQFF_1, strict=True)
    return {f"uqff.version.{name}": _scalar(number) for name, number in parts}


def read_parts(file: Path) -> dict[str, Part]:
    """Every tensor of a safetensors file, read by the `safetensors` package: blobs by index, or 1.x entries."""
    stored: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(file.read_bytes())
    return {name: Part(entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in stored}
