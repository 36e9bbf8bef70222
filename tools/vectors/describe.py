"""NAME.json of a valid vector: what a reader must find in NAME.bin, computed twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np

import uqff
from tools.vectors import oracle
from tools.vectors.good import Vector
from uqff.codec import blob as uqff_blob
from uqff.codes import DType, Family
from uqff.families import family_of
from uqff.families.gguf.blocks import BlockType

ALL_VALUES = 512
"""Up to so many weights are listed in full; of more, a digest and samples are."""
SAMPLES = 16


def describe(vector: Vector) -> dict[str, Any]:
    """The JSON object.

    Raises:
        AssertionError: uqff and the second implementation disagree.
    """
    decoded = oracle.decode(vector.blob)
    layer = uqff.deserialize(vector.blob)
    weight = layer.weight
    same = (weight.family, weight.kind, weight.shape) == (decoded.family, decoded.kind, decoded.shape)
    same &= float32(weight.dequantize()) == decoded.values
    same &= (None if layer.bias is None else float32(layer.bias)) == decoded.bias
    if not same:
        raise AssertionError(f"{vector.folder}/{vector.name}: uqff and the oracle disagree")
    return {
        "name": vector.name,
        "note": vector.note,
        "family": family_of(decoded.family).family.title,
        "kind": decoded.kind,
        "version": decoded.version,
        "shape": list(decoded.shape),
        "size": len(vector.blob),
        "sha256": hashlib.sha256(vector.blob).hexdigest(),
        "fields": [_field(place) for place in uqff_blob.trace(vector.blob)],
        "float32": numbers(decoded.values),
        "bias": None if layer.bias is None else _bias(vector.blob, decoded.bias),
        "provenance": vector.provenance,
    }


def text(description: Mapping[str, Any]) -> str:
    """The JSON text: one field, one line."""
    lines = []
    for key, value in description.items():
        if key == "fields":
            rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in value)
            lines.append(f' "fields": [\n{rows}\n ]')
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _field(place: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"path": place.path, "offset": place.offset, "size": place.size, "type": place.type}
    value = place.value
    if isinstance(value, memoryview):
        return row
    if isinstance(value, (DType, BlockType)):
        return row | {"value": value.code, "means": value.name}
    if isinstance(value, Family):
        return row | {"value": value.value, "means": value.title}
    if isinstance(value, Enum):
        raise TypeError(f"no text for {value!r}")
    if place.type == "version":
        return row | {"value": value[0] << 16 | value[1] << 8 | value[2], "means": str(value)}
    return row | {"value": list(value) if isinstance(value, tuple) else value}


def numbers(values: bytes) -> dict[str, Any]:
    """Decoded weights: count, digest, and the bytes or some samples."""
    count = len(values) // 4
    digest = hashlib.sha256(values).hexdigest()
    if count <= ALL_VALUES:
        return {"count": count, "sha256": digest, "hex": values.hex()}
    places = [i * (count - 1) // (SAMPLES - 1) for i in range(SAMPLES)]
    samples = [[i, values[4 * i : 4 * i + 4].hex(), float(np.frombuffer(values, "<f4")[i])] for i in places]
    return {"count": count, "sha256": digest, "samples": samples}


def _bias(blob: bytes, values: bytes | None) -> dict[str, Any]:
    _, fields = uqff_blob.read_fields(blob)
    bias = fields["bias"]
    return {
        "dtype": bias["dtype"].name,
        "shape": list(bias["shape"]),
        "stored": bytes(bias["data"]).hex(),
        "float32": (values or b"").hex(),
    }


def float32(tensor: Any) -> bytes:
    """The little-endian float32 bytes of a tensor."""
    import torch

    numbers: bytes = tensor.to(torch.float32).contiguous().numpy().astype("<f4").tobytes()
    return numbers
