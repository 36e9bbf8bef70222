"""Client files read without uqff, for the tests of the quantisers: no parser of ours stands in between."""

from __future__ import annotations

import json
import struct
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tools.tiny.models import TinyModel, round_to

TESTS = Path(__file__).resolve().parent.parent
GOLDEN = TESTS / "golden"

if TYPE_CHECKING:
    from collections.abc import Iterator

Array = npt.NDArray[Any]

RECORD_DTYPES = {0: "u1", 1: "<u4", 2: "<i4", 4: "<u2", 5: "<u2", 6: "<f4", 9: "u1"}
"""Element types of tensor records by dtype code; F16 (4), BF16 (5) and F8E4M3 (9) as bit patterns."""

SAFETENSORS_DTYPES = {
    "U8": "u1",
    "U32": "<u4",
    "I32": "<i4",
    "F16": "<u2",
    "BF16": "<u2",
    "F32": "<f4",
    "F8_E4M3": "u1",
}


@cache
def manifest() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((GOLDEN / "MANIFEST.json").read_text())
    return loaded


def golden_files(family: str) -> list[str]:
    """Golden files of 0.6.0 with blobs of the family: ``directory/file``, for parametrisation."""
    return [
        f"{directory}/{file}"
        for directory, about in manifest()["directories"].items()
        for file, entry in about["files"].items()
        if entry.get("isq", "").startswith(family)
    ]


def v0_layers(file: str) -> Iterator[tuple[str, bytes, npt.NDArray[np.float32], str]]:
    """Name, blob and source weight (rounded to the load dtype) of each layer, and the load dtype."""
    directory = file.rsplit("/", 1)[0]
    about = manifest()["directories"][directory]
    weights = TinyModel(**about["model"]).tensors()
    blobs = {key: value.tobytes() for key, value in safetensors(GOLDEN / file).items()}
    assert len(blobs) == len(about["layers"])
    for index, name in enumerate(about["layers"]):
        weight = weights.get(f"{name}.weight")
        if weight is None:
            weight = weights["model.embed_tokens.weight"]
        yield name, blobs[str(index)], round_to(weight, about["dtype"]), about["dtype"]


def safetensors(path: Path) -> dict[str, Array]:
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for key, entry in header.items():
        start, end = entry["data_offsets"]
        raw = np.frombuffer(data[8 + length + start : 8 + length + end], SAFETENSORS_DTYPES[entry["dtype"]])
        tensors[key] = raw.reshape(entry["shape"])
    return tensors


class Blob:
    """A cursor over a pre-1.0 blob."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return values

    def record(self) -> Array:
        """A tensor record: u32 length, u32 dtype code, u32 ndim, u32 x ndim shape, data."""
        length, code, ndim = self.take("III")
        shape = self.take(f"{ndim}I")
        values = np.frombuffer(self.data[self.at : self.at + length], RECORD_DTYPES[code])
        self.at += length
        return values.reshape(shape)


@cache
def manifest_v1() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((GOLDEN / "v1" / "MANIFEST.json").read_text())
    return loaded


def golden_files_v1(isq: str) -> list[str]:
    """Golden files of 0.9.5 of that type: ``directory/file``, for parametrisation."""
    return [
        f"{directory}/{file}"
        for directory, about in manifest_v1()["directories"].items()
        for file, entry in about["files"].items()
        if entry["isq"] == isq
    ]


def v1_layers(file: str) -> Iterator[tuple[str, dict[str, Array], npt.NDArray[np.float32]]]:
    """Name, entries (``weight``, ``weight.scales``, ...) and source weight of each layer."""
    directory = file.rsplit("/", 1)[0]
    about = manifest_v1()["directories"][directory]
    weights = TinyModel(**about["model"]).tensors()
    entries = safetensors(GOLDEN / "v1" / file)
    names = [key.removesuffix(".weight.format") for key in entries if key.endswith(".weight.format")]
    assert len(names) >= 8
    for name in names:
        layer = {key[len(name) + 1 :]: value for key, value in entries.items() if key.startswith(f"{name}.")}
        yield name, layer, round_to(weights[f"{name}.weight"], about["dtype"])
