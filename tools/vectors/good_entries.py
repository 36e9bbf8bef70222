"""The valid 1.x vectors: every type in 1.2, every family in every version that has it, and what a set of files may be.

The layers are those of the blobs in :mod:`tools.vectors.good`: same parts, another frame.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from tools.vectors import good, oracle
from tools.vectors.describe import float32, numbers
from tools.vectors.entries import (
    BITS,
    VERSION,
    Entries,
    Part,
    blob_of,
    byte,
    dims,
    entries_of,
    file_of,
    layers_of,
    named,
    number,
    read_file,
    version,
)
from tools.vectors.wire import Blob, f32

FOLDER = "entries"
UP, GATE, DOWN = (f"model.layers.0.mlp.{name}_proj" for name in ("up", "gate", "down"))
EXPERTS = "model.layers.0.mlp.experts.gate_proj"

V12 = (1, 2, 0)
Files = dict[str, bytes]


class Model(NamedTuple):
    """A valid model: its shards by file name, in order, and what it is for."""

    name: str
    files: Files
    note: str


@cache
def blobs() -> dict[str, Blob]:
    """``family/name`` to blob, of all synthetic vectors."""
    return {f"{folder}/{name}": blob for folder, cases in good.CASES.items() for name, blob, _ in cases()}


def layer(name: str) -> Entries:
    """The entries of a synthetic vector."""
    return entries_of(blobs()[name])


def metadata_of(numbers_: tuple[int, int, int]) -> dict[str, str] | None:
    """What the engine stores, with another producer; nothing before 1.1."""
    text = ".".join(map(str, numbers_))
    return None if numbers_ < (1, 1, 0) else {"uqff.producer": "vectors", "uqff.version": text}


def _one(name: str, parts: Entries, note: str, numbers_: tuple[int, int, int] = V12) -> Model:
    return Model(name, {f"{name}.uqff": file_of({**version(*numbers_), **parts}, metadata_of(numbers_))}, note)


_TYPES = {
    **{f"gguf/{kind}": "two rows" for kind in good.GGML},
    "gguf/q4_0-bias-f32": "bias F32, as the engine writes",
    "gguf/q8_0-bias-f16": "bias F16",
    "gguf/q4_1-edge": "scales and minima -0.0, subnormal, largest, negative",
    "gguf/q4_0-experts": "stacked experts",
    "gguf/q8_0-experts-bias": "stacked experts, a bias each",
    "gguf/q4k-experts-shared-bias": "stacked experts, one bias",
    "gguf/q6k-one-dimension": "a weight of one dimension",
    "unquant/f32": "F32",
    "unquant/f16-bias": "F16, bias of the same dtype",
    "unquant/bf16": "BF16",
    "unquant/i64": "a dtype that the engine never writes here",
    "unquant/f32-experts": "stacked experts, BF16 bias each",
    "hqq/hqq1": "1 bit",
    "hqq/hqq2": "2 bit",
    "hqq/hqq3": "3 bit: I32 words, 64 rows of M are padded to 70",
    "hqq/hqq4": "as the engine writes 4 bit",
    "hqq/hqq8": "as the engine writes 8 bit",
    "hqq/hqq4-bias": "bias F32, as the engine writes",
    "hqq/hqq4-axis1": "groups are rows of M: scales and zeros are columns",
    "hqq/hqq3-axis1": "3 bit, groups are rows of M",
    "hqq/hqq2-group16": "scales BF16",
    "hqq/hqq4-flags": "no steps stated, zeros rounded, not channel-wise",
    "fp8/plain": "the scale 1/416",
    "fp8/bias-f8e4m3": "bias F8_E4M3, as the engine writes",
    "fp8/every-code": "all 254 numbers; three different scales",
    "afq/afq2-g32": "2 bit",
    "afq/afq3-g128": "3 bit: codes cross words",
    "afq/afq4-g64": "4 bit",
    "afq/afq6-g64": "6 bit: codes cross words",
    "afq/afq8-g32": "8 bit",
    "afq/afq3-bias-f32": "bias in the dtype of the scales, as the engine writes",
    "afq/afq4-edge-bf16": "extreme scales and biases, BF16",
    "afq/afq4-experts": "stacked experts, a bias each",
    "f8q8/plain": "rows are whole blocks",
    "f8q8/bias-f32": "bias F32, as the engine writes",
    "f8q8/across-rows": "blocks run across rows; 4 codes of padding",
    "f8q8/one-weight": "31 codes of padding",
    "mxfp4/plain": "two rows of two blocks",
    "mxfp4/bias-bf16": "bias BF16, as the engine writes",
    "mxfp4/edge-scales": "every nibble; exponents 0, 1, 127, 252 and 254",
    "mxfp4/experts-bias": "stacked experts, a bias each",
}
"""What there is a 1.2 file of."""

FAMILIES = {
    "gguf": "gguf/q4_0",
    "unquant": "unquant/bf16-bias",
    "hqq": "hqq/hqq4-axis1",
    "fp8": "fp8/plain",
    "afq": "afq/afq4-g32",
    "f8q8": "f8q8/across-rows",
    "mxfp4": "mxfp4/plain",
}
"""A layer of each family, small, for files of several and of older versions."""


def name_of(vector: str) -> str:
    """The name of the 1.x vector of a pre-1.0 one."""
    family, _, name = vector.partition("/")
    return name if name.startswith(family) else f"{family}-{name}"


def _types() -> Iterator[Model]:
    for vector, note in _TYPES.items():
        key = EXPERTS if "experts" in vector else UP
        yield _one(name_of(vector), named(key, layer(vector)), note)


def _versions() -> Iterator[Model]:
    for family, vector in FAMILIES.items():
        for minor in (0, 1):
            if (family, minor) != ("unquant", 0):
                yield _one(f"{family}-v1.{minor}", named(UP, layer(vector)), f"{vector} in 1.{minor}", (1, minor, 0))
    for vector in ("hqq/hqq8-experts", "fp8/experts", "f8q8/experts"):
        for minor in (0, 1):
            note = "a stacked weight of a family that has none from 1.2 on"
            yield _one(f"{name_of(vector)}-v1.{minor}", named(EXPERTS, layer(vector)), note, (1, minor, 0))


def _contents() -> Iterator[Model]:
    small = layer("unquant/f16")
    parts = named("lm_head", layer("mxfp4/bias-f32"))
    yield _one("worked-example", parts, "one layer with a bias, taken apart in the spec")
    yield _one("patch-is-free", named(UP, small), "version 1.2.7: patch means nothing", (1, 2, 7))
    yield _one("no-layers", {}, "a version and nothing else")
    keys = sorted(f"model.layers.{i}.{family}" for i, family in enumerate(FAMILIES))
    mixed = {key: layer(FAMILIES[key.rpartition(".")[2]]) for key in keys}
    parts = {name: part for key in keys for name, part in named(key, mixed[key]).items()}
    yield _one("every-family", parts, "a layer of each family")
    named_like = dict.fromkeys(("a", "a.bias", "a.weight", "a.weight.bias", "a.weight.scales"), small)
    parts = {name: part for key, each in named_like.items() for name, part in named(key, each).items()}
    yield _one("keys-like-suffixes", parts, "the last word of a name decides, or the last two behind `weight`")
    extra = {
        "model.norm.weight": Part("BF16", (3,), bytes(6)),
        "other.bias": Part("U8", (1,), b"\7"),
        f"{UP}.weight.future": byte(1),
        f"{UP}.lora": Part("F32", (0,), b""),
        "lm_head": byte(1),
        "uqff.calibration": Part("F32", (2,), f32(1, 2)),
    }
    yield _one("extra-entries", {**named(UP, small), **extra}, "entries of no layer are kept and mean nothing")
    parts = {dtype: Part(dtype, (2, 4), bytes(range(bits))) for dtype, bits in BITS.items()}
    free = file_of({**named(UP, small), **version(), **parts}, metadata_of(V12), ordered=False)
    yield Model("every-dtype", {"every-dtype.uqff": free}, "entries of no layer, of each dtype of safetensors")
    tied = {**named("model.embed_tokens", layer("gguf/q6k")), **named(UP, layer("gguf/q4k"))}
    yield _one("embedding-is-a-layer", tied, "the embedding, promoted; a tied model has no head")
    tensors = {**named(UP, small), **version()}
    yield Model("no-metadata", {"no-metadata.uqff": file_of(tensors)}, "metadata may be missing, also in 1.2")
    other = file_of(tensors, {"uqff.version": "9.9.9", "format": "pt"})
    yield Model("metadata-means-nothing", {"metadata-means-nothing.uqff": other}, "the version is that of the entries")
    free = file_of(tensors, metadata_of(V12), ordered=False)
    yield Model("order-is-free", {"order-is-free.uqff": free}, "data and names in another order than writers choose")
    loose = file_of(named(UP, small) | version())
    header = json.dumps(json.loads(loose[8 : 8 + int.from_bytes(loose[:8], "little")]), indent=1).encode()
    data = loose[8 + int.from_bytes(loose[:8], "little") :]
    loose = len(header).to_bytes(8, "little") + header + data
    yield Model("white-space", {"white-space.uqff": loose}, "white space within the header is free")


def _shards(name: str, *shards: Entries, with_metadata: bool = True) -> Files:
    metadata = metadata_of(V12) if with_metadata else None
    return {f"{name}-{i}.uqff": file_of(entries, metadata) for i, entries in enumerate(shards)}


def _sets() -> Iterator[Model]:
    small, hqq = layer("unquant/f16"), layer("hqq/hqq4-axis1")
    up, gate = named(UP, small), named(GATE, small)
    yield Model("two-shards", _shards("two-shards", version() | gate, up), "version in the first shard only")
    repeated = _shards("version-repeated", version() | gate, version() | up)
    yield Model("version-repeated", repeated, "equal version entries in both shards")
    late = _shards("version-in-the-last", gate, version() | up)
    yield Model("version-in-the-last", late, "version in another shard than the first")
    names = list(named(UP, hqq).items())
    straddling = _shards("straddling", version() | dict(names[:3]), dict(names[3:]) | gate)
    yield Model("straddling", straddling, "a layer whose entries are in two shards")
    afq = list(named(DOWN, layer("afq/afq4-g32")).items())
    three = _shards("format-apart", version(), dict(afq[:1]), dict(afq[1:]))
    yield Model("format-apart", three, "three shards: version, format, and the rest of a layer")


def _numbers_of_dims() -> Iterator[Model]:
    """Near misses of size rules."""
    empty: Entries = {"e": Part("F32", (2, 0, 3), b""), "f": dims()}
    yield _one("empty-extra-entries", {**named(UP, layer("unquant/f16")), **empty}, "entries of no bytes at all")
    parts = layer("gguf/q4_0") | {"bias": Part("F64", (2,), bytes(16))}
    yield _one("q4_0-bias-f64", named(UP, parts), "bias F64")
    parts = layer("hqq/hqq4") | {"weight.optimization_steps": number(2**32 - 1)}
    yield _one("hqq4-steps", named(UP, parts), "any number of steps")


@cache
def models() -> dict[str, Model]:
    """All of them by name."""
    found: dict[str, Model] = {}
    for cases in (_types, _versions, _contents, _sets, _numbers_of_dims):
        for model in cases():
            if model.name in found:
                raise ValueError(f"two vectors are called {model.name}")
            found[model.name] = model
    return found


def files() -> Files:
    """``entries/NAME.uqff`` (or ``NAME-0.uqff``, ...) and ``entries/NAME.json``."""
    found: Files = {}
    for model in models().values():
        found |= {f"{FOLDER}/{name}": data for name, data in model.files.items()}
        found[f"{FOLDER}/{model.name}.json"] = text(describe(model)).encode()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# NAME.json
# ---------------------------------------------------------------------------------------------------------------------


def describe(model: Model) -> dict[str, Any]:
    """What a reader must find, computed twice.

    Raises:
        AssertionError: uqff and the second implementation disagree.
    """
    tensors: Entries = {}
    entries: list[Any] = []
    metadata: dict[str, str] = {}
    for at, data in enumerate(model.files.values()):
        found, texts = read_file(data)
        metadata |= texts or {}
        entries += [_entry(name, part, at, offset) for name, part, offset in found]
        tensors |= {name: part for name, part, _ in found}
    numbers_ = tuple(int.from_bytes(tensors[name].data, "little") for name in VERSION)
    layers, extra = layers_of(tensors)
    described = [_layer(key, parts) for key, parts in layers.items()]
    _check_against_uqff(model, described, extra)
    return {
        "name": model.name,
        "note": model.note,
        "version": ".".join(map(str, numbers_)),
        "metadata": metadata,
        "files": [
            {"file": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in model.files.items()
        ],
        "entries": entries,
        "layers": described,
        "extra": extra,
        "provenance": {"kind": "synthetic", "command": "python -m tools.vectors"},
    }


def text(description: Mapping[str, Any]) -> str:
    """The JSON text: one entry, one layer, one line."""
    lines = []
    for key, value in description.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n".join(f"  {json.dumps(row)}" for row in value)
            lines.append(f' "{key}": [\n{rows}\n ]')
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _entry(name: str, part: Part, file: int, offset: int) -> dict[str, Any]:
    row = {
        "name": name,
        "dtype": part.dtype,
        "shape": list(part.shape),
        "file": file,
        "offset": offset,
        "size": len(part.data),
    }
    if name.rpartition(".")[2] == "shape" or (part.dtype in ("U8", "U32") and not part.shape):
        value = np.frombuffer(part.data, "<u4" if part.dtype == "U32" else "u1").tolist()
        row["value"] = value if part.shape else value[0]
    return row


def _layer(key: str, parts: Entries) -> dict[str, Any]:
    decoded = oracle.decode(blob_of(parts))
    bias = parts.get("bias")
    return {
        "key": key,
        "suffixes": sorted(parts),
        "family": ("GGUF", "Unquant", "HQQ", "FP8", "AFQ", "F8Q8", "MXFP4")[decoded.family],
        "kind": decoded.kind,
        "shape": list(decoded.shape),
        "float32": numbers(decoded.values),
        "bias": None
        if bias is None
        else {"dtype": bias.dtype, "shape": list(bias.shape), "float32": (decoded.bias or b"").hex()},
    }


def _check_against_uqff(model: Model, described: list[dict[str, Any]], extra: list[str]) -> None:
    import tempfile
    from pathlib import Path

    import uqff

    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory) / name for name in model.files]
        for path, data in zip(paths, model.files.values(), strict=True):
            path.write_bytes(data)
        with uqff.open(paths if len(paths) == 1 else paths[0]) as file:
            read = []
            for key, (weight, bias) in file.items():
                values = None if bias is None else float32(bias).hex()
                shape = list(weight.shape)
                digest = hashlib.sha256(float32(weight.dequantize())).hexdigest()
                read.append((key, weight.family.title, weight.kind, shape, math.prod(shape), digest, values))
            same = sorted(file.extra) == extra
    wanted = [
        (
            each["key"],
            each["family"],
            each["kind"],
            each["shape"],
            each["float32"]["count"],
            each["float32"]["sha256"],
            None if each["bias"] is None else each["bias"]["float32"],
        )
        for each in described
    ]
    if read != wanted or not same:
        raise AssertionError(f"{FOLDER}/{model.name}: uqff and the oracle disagree")
