"""The vectors of the spec against this implementation: every field, every weight, every byte, every error."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import uqff
from uqff.codec import blob as uqff_blob

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
VECTORS = ROOT / "spec" / "vectors"
GOOD = sorted(
    path.relative_to(VECTORS).with_suffix("").as_posix()
    for path in VECTORS.rglob("*.bin")
    if path.parent.name not in ("bad", "encode")
)
BAD = json.loads((VECTORS / "bad" / "index.json").read_text("utf-8"))
SOUND_FILES = json.loads((VECTORS / "container" / "index.json").read_text("utf-8"))

KINDS = {
    *("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q8_1", "q2k", "q3k", "q4k", "q5k", "q6k", "q8k"),
    *("unquant", "hqq1", "hqq2", "hqq3", "hqq4", "hqq8", "fp8"),
    *("afq2", "afq3", "afq4", "afq6", "afq8", "f8q8", "mxfp4"),
}
EXHAUSTIVE = [
    "gguf/q4_0-bias-f32",
    "unquant/bf16-bias",
    "hqq/hqq4-bias",
    "fp8/bias-f32",
    "afq/afq3-bias-f32",
    "f8q8/bias-f32",
    "mxfp4/bias-bf16",
]
"""One vector a family, of which every byte of the framing is set to every value."""
PAYLOAD_SAMPLES = 16


DESCRIBED: dict[str, dict[str, Any]] = {
    name: json.loads((VECTORS / f"{name}.json").read_text("utf-8")) for name in GOOD
}


def load(name: str) -> tuple[bytes, dict[str, Any]]:
    """A vector's bytes and description."""
    return (VECTORS / f"{name}.bin").read_bytes(), DESCRIBED[name]


def version_of(data: bytes) -> uqff.Version:
    """The version that a valid blob states."""
    version: uqff.Version = uqff_blob.read_fields(data)[1]["version"]
    return version


def float32(tensor: Any) -> bytes:
    """The little-endian float32 bytes of a tensor."""
    import torch

    numbers: bytes = tensor.to(torch.float32).contiguous().numpy().astype("<f4").tobytes()
    return numbers


def test_vectors_cover_every_family_and_variant() -> None:
    """A type without a vector would be a type without a specification."""
    described = list(DESCRIBED.values())
    assert len(described) >= 60
    assert len(BAD) >= 60
    assert {d["kind"] for d in described} == KINDS
    for family in uqff.Family:
        biased = {d["bias"] is not None for d in described if d["family"] == family.title}
        assert biased == {True, False}, family
    assert {d["version"] for d in described} == {"0.1.0", "0.1.1", "0.1.2", "0.1.3", "0.2.0"}
    clients = [d["provenance"] for d in described if d["provenance"]["kind"] == "client"]
    assert clients
    assert {p["client"] for p in clients} == {"mistralrs 0.6.0"}
    assert all(p["command"] for p in clients)


@pytest.mark.parametrize("name", GOOD)
def test_fields(name: str) -> None:
    """Every field lies where the description says and has the value that it says."""
    data, description = load(name)
    assert len(data) == description["size"]
    assert hashlib.sha256(data).hexdigest() == description["sha256"]
    places = uqff_blob.trace(data)
    assert [(p.path, p.offset, p.size, p.type) for p in places] == [
        (f["path"], f["offset"], f["size"], f["type"]) for f in description["fields"]
    ]
    assert sum(p.size for p in places) == len(data)
    for field in description["fields"]:
        raw = data[field["offset"] : field["offset"] + field["size"]]
        if field["type"] in ("u8", "u32", "version"):
            assert int.from_bytes(raw, "little") == field["value"], field["path"]


@pytest.mark.parametrize("name", GOOD)
def test_weights(name: str) -> None:
    """Every dequantised weight and every bias is the stated float32, bit for bit."""
    data, description = load(name)
    layer = uqff.deserialize(data)
    weight = layer.weight
    assert (weight.family.title, weight.kind, list(weight.shape)) == (
        description["family"],
        description["kind"],
        description["shape"],
    )
    expected, values = description["float32"], float32(weight.dequantize())
    assert len(values) == 4 * expected["count"]
    assert hashlib.sha256(values).hexdigest() == expected["sha256"]
    if "hex" in expected:
        assert values.hex() == expected["hex"]
    else:
        for index, bits, _ in expected["samples"]:
            assert values[4 * index : 4 * index + 4].hex() == bits
    bias = description["bias"]
    assert (layer.bias is None) == (bias is None)
    if layer.bias is not None:
        assert list(layer.bias.shape) == bias["shape"]
        assert float32(layer.bias).hex() == bias["float32"]


GGUF_PY = {
    **{kind: kind.upper() for kind in ("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")},
    **{f"q{bits}k": f"Q{bits}_K" for bits in (2, 3, 4, 5, 6)},
}
"""The types of which gguf-py has a dequantiser, by our name."""


def payloads(description: dict[str, Any], data: bytes) -> dict[str, bytes]:
    """The bytes of every field."""
    return {f["path"]: data[f["offset"] : f["offset"] + f["size"]] for f in description["fields"]}


@pytest.mark.parametrize("name", [name for name, description in DESCRIBED.items() if description["kind"] in GGUF_PY])
def test_gguf_py_agrees(name: str) -> None:
    """The expected weights are those of ggml's own Python package, bit for bit."""
    quants = pytest.importorskip("gguf.quants")
    from gguf import GGMLQuantizationType

    data, description = load(name)
    kind = GGUF_PY[description["kind"]]
    blocks = np.frombuffer(payloads(description, data)["data"], np.uint8).copy()
    with np.errstate(all="ignore"):
        values = quants.dequantize(blocks, GGMLQuantizationType[kind])
    assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest() == description["float32"]["sha256"]


def scale_dtype(description: dict[str, Any]) -> str | None:
    """The dtype of the scales, if the vector has a tensor of that name."""
    return next((f["means"] for f in description["fields"] if f["path"] == "scales.dtype"), None)


@pytest.mark.parametrize(
    "name", [name for name, d in DESCRIBED.items() if d["family"] == "AFQ" and scale_dtype(d) == "F32"]
)
def test_mlx_agrees(name: str) -> None:
    """The expected weights are those of MLX, bit for bit, for F32 scales: it computes in the dtype of the scales."""
    mx = pytest.importorskip("mlx.core")
    data, description = load(name)
    parts, values = payloads(description, data), {f["path"]: f.get("value") for f in description["fields"]}
    w_q, scales, biases = (
        mx.array(np.frombuffer(parts[f"{part}.data"], code).reshape(values[f"{part}.shape"]))
        for part, code in (("w_q", "<u4"), ("scales", "<f4"), ("biases", "<f4"))
    )
    shape = (-1, w_q.shape[-1])
    weights = mx.dequantize(
        w_q.reshape(shape),
        scales.reshape(-1, scales.shape[-1]),
        biases.reshape(-1, biases.shape[-1]),
        group_size=values["group_size"],
        bits=values["bits"],
    )
    digest = hashlib.sha256(np.array(weights, "<f4").tobytes()).hexdigest()
    assert digest == description["float32"]["sha256"]


@pytest.mark.parametrize("name", GOOD)
def test_round_trip(name: str) -> None:
    """What was read is written as the same bytes, in the version it came from."""
    data, _ = load(name)
    assert uqff.serialize(uqff.deserialize(data), version=version_of(data)) == data


@pytest.mark.parametrize("name", GOOD)
def test_every_truncation_is_refused(name: str) -> None:
    """A blob that ends early is never taken for a whole one."""
    data, _ = load(name)
    view = memoryview(data)
    for end in _ends(name, len(data)):
        with pytest.raises(uqff.FormatError):
            uqff_blob.read_fields(view[:end])


def _ends(name: str, size: int) -> Iterator[int]:
    """All lengths; within the long payloads of client files, every 16th."""
    payloads = {
        at
        for field in load(name)[1]["fields"]
        if field["size"] > 512
        for at in range(field["offset"], field["offset"] + field["size"])
        if at % 16
    }
    return (end for end in range(size) if end not in payloads)


def _framing_bytes(description: dict[str, Any]) -> list[int]:
    payload = ("data", "scale")
    return [
        at
        for field in description["fields"]
        if not field["path"].endswith(payload)
        for at in range(field["offset"], field["offset"] + field["size"])
    ]


def _refused_or_faithful(data: bytes) -> bool:
    """Whether changed bytes are read as what they are; True if they are, False if they are refused.

    Raises:
        AssertionError: they are read as something else.
        Exception: whatever is not a UqffError.
    """
    try:
        layer = uqff.deserialize(data)
    except uqff.UqffError:
        return False
    assert uqff.serialize(layer, version=version_of(data)) == data
    return True


@pytest.mark.parametrize("name", EXHAUSTIVE)
def test_every_value_of_every_framing_byte(name: str) -> None:
    """No value of a length, count, code or flag makes a reader crash or read what is not there."""
    data, description = load(name)
    faithful = 0
    for at in _framing_bytes(description):
        changed = bytearray(data)
        for value in range(256):
            changed[at] = value
            faithful += _refused_or_faithful(bytes(changed))
    assert faithful >= len(_framing_bytes(description))  # the original value, at least


@pytest.mark.parametrize("name", [name for name in GOOD if "/client-" not in name])
def test_changed_bytes(name: str) -> None:
    """A byte with one bit flipped, or all, is refused or kept: never lost, never an error of another kind."""
    data, description = load(name)
    framing = _framing_bytes(description)
    payload = sorted(set(range(len(data))) - set(framing))
    samples = payload[:: max(1, len(payload) // PAYLOAD_SAMPLES)]
    for at in [*framing, *samples]:
        for flipped in (1 << at % 8, 0xFF):
            changed = bytearray(data)
            changed[at] ^= flipped
            kept = _refused_or_faithful(bytes(changed))
            assert kept or at in framing, "a payload byte may have any value"


def read_blob(path: Path) -> None:
    """Read a file that is one blob."""
    uqff.deserialize(path.read_bytes())


def read_file(path: Path) -> None:
    """Open a file and read every layer."""
    with uqff.open([path]) as file:
        for key in file:
            file[key]


@pytest.mark.parametrize("entry", BAD, ids=lambda entry: entry["file"])
def test_broken(entry: dict[str, Any]) -> None:
    """Each broken file is refused with the stated class, field and offset."""
    path = VECTORS / "bad" / entry["file"]
    read = read_blob if path.suffix == ".bin" else read_file
    with pytest.raises(uqff.UqffError) as caught:
        read(path)
    error = caught.value
    assert type(error).__name__ == entry["error"]
    assert (error.field, error.offset, error.problem) == (entry["field"], entry["offset"], entry["problem"])
    assert entry["expected"] is None or str(error.expected) == entry["expected"]
    assert entry["got"] is None or str(error.got) == entry["got"]
    if path.suffix == ".uqff":
        assert error.file == str(path)


def test_every_broken_file_is_in_the_index() -> None:
    """A file beside the index would be checked by nobody."""
    present = {path.name for path in (VECTORS / "bad").iterdir() if path.suffix in (".bin", ".uqff")}
    assert present == {entry["file"] for entry in BAD}


@pytest.mark.parametrize("entry", SOUND_FILES, ids=lambda entry: entry["file"])
def test_sound_files(entry: dict[str, Any]) -> None:
    """Near misses of the broken files open, and their blobs lie where the index says."""
    with uqff.open([VECTORS / "container" / entry["file"]]) as file:
        assert list(file) == [layer["key"] for layer in entry["layers"]]
        for layer in entry["layers"]:
            place = file.place(layer["key"])
            assert (place.offset, place.nbytes) == (layer["offset"], layer["size"])
            assert hashlib.sha256(file.blob(layer["index"])).hexdigest() == layer["sha256"]


def test_vectors_are_what_the_script_makes() -> None:
    """The script that makes the vectors, and its second implementation, agree with what is stored."""
    command = [sys.executable, "-m", "tools.vectors", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
