"""Golden: what the 0.6.0 client wrote, through our reader and writer and back, and against other people's decoders."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import gguf as gguf_py
import mlx.core as mx
import numpy as np
import pytest
import torch

import uqff
from tests.support.roundtrip import assert_tiled
from uqff import Version
from uqff.families import AFQ, FP8, GGUF, HQQ, Unquant

GOLDEN = Path(__file__).parent.parent / "golden"
MANIFEST = json.loads((GOLDEN / "MANIFEST.json").read_text("utf-8"))
FILES = {
    f"{directory}/{name}": about["isq"]
    for directory, described in MANIFEST["directories"].items()
    for name, about in described["files"].items()
    if name.endswith(".uqff")
}
ISQ = {
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q8_1", "q2k", "q3k", "q4k", "q5k", "q6k", "q8k"),
    *("hqq4", "hqq8", "fp8", "afq2", "afq3", "afq4", "afq6", "afq8"),
}
GGUF_PY = {
    **{name: name for name in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")},
    **{f"Q{n}K": f"Q{n}_K" for n in (2, 3, 4, 5, 6)},
}


@cache
def opened(name: str) -> uqff.UqffFile:
    """A golden file; the cache keeps the few of them open."""
    return uqff.open([GOLDEN / name])


def test_every_type_is_there() -> None:
    """All 20 types that the client writes, each as the type of some layer that is stored as asked."""
    assert set(FILES.values()) == ISQ
    kinds = {file[key].weight.kind for file in map(opened, FILES) for key in file}
    assert kinds == ISQ | {"unquant"}


@pytest.mark.parametrize("name", FILES)
def test_parse_and_serialize_give_the_same_bytes(name: str) -> None:
    """Every layer, under the version it was written with; every byte belongs to a field."""
    file = opened(name)
    assert file.version == Version(0, 1, 3)
    assert file.metadata == {}
    assert len(file) == len(MANIFEST["directories"][name.rsplit("/", 1)[0]]["layers"])
    for key, layer in file.items():
        blob = bytes(file.blob(key))
        assert uqff.serialize(layer, version=file.version) == blob, key
        assert uqff.deserialize(blob) == layer
        assert_tiled(blob)


@pytest.mark.parametrize("name", FILES)
def test_saved_again_is_the_same_file(name: str, tmp_path: Path) -> None:
    """Header, order, padding, every byte."""
    file = opened(name)
    (path,) = uqff.save(file, tmp_path / "again.uqff", version=file.version)
    assert path.read_bytes() == (GOLDEN / name).read_bytes()


@pytest.mark.parametrize("name", FILES)
def test_dequantised_by_others(name: str) -> None:
    """Bit-equal: gguf-py for the thirteen types it has, MLX for AFQ with F32 scales, formulas for the rest."""
    for key, layer in opened(name).items():
        ours = layer.weight.dequantize()
        theirs = by_others(layer.weight)
        assert tuple(ours.shape) == theirs.shape
        assert ours.numpy().tobytes() == theirs.tobytes(), (key, layer.weight)


def by_others(weight: Any) -> np.ndarray:
    """The weight as float32, by an implementation that is not uqff's."""
    if isinstance(weight, GGUF):
        return gguf_by_others(weight)
    if isinstance(weight, Unquant):
        return weight.weight.to(torch.float32).numpy()
    if isinstance(weight, FP8):
        return weight.weight.to(torch.float32).numpy() * np.float32(weight.dequant_w_scale.item())
    if isinstance(weight, HQQ):
        return hqq_by_formula(weight)
    assert isinstance(weight, AFQ)
    return afq_by_mlx(weight)


def gguf_by_others(weight: GGUF) -> np.ndarray:
    """gguf-py, or numpy for the two types it cannot dequantise."""
    name = weight.block_type.name
    if name in GGUF_PY:
        return gguf_py.dequantize(weight.data.numpy(), gguf_py.GGMLQuantizationType[GGUF_PY[name]])
    blocks = weight.blocks.numpy()
    d, qs = (blocks[:, :2], blocks[:, 4:36]) if name == "Q8_1" else (blocks[:, :4], blocks[:, 4:260])
    scale = np.ascontiguousarray(d).view("<f2" if name == "Q8_1" else "<f4").astype(np.float32)
    return (scale * np.ascontiguousarray(qs).view(np.int8).astype(np.float32)).reshape(weight.shape)


def hqq_by_formula(weight: HQQ) -> np.ndarray:
    """4 and 8 bit, axis 0, as the client writes them: the high nibbles are the first half of the rows."""
    words = weight.w_q.numpy()
    codes = words if weight.bits == 8 else np.concatenate([words >> 4, words & 15])
    return ((codes.astype(np.float32) - weight.zeros.numpy()) * weight.scales.numpy()).reshape(weight.shape)


def afq_by_mlx(weight: AFQ) -> np.ndarray:
    """MLX, with scales and biases widened to F32 as the engine widens them."""
    scales, biases = (mx.array(part.to(torch.float32).numpy()) for part in (weight.scales, weight.biases))
    words = mx.array(np.ascontiguousarray(weight.w_q.numpy()).view(np.uint32))
    return np.array(mx.dequantize(words, scales, biases, group_size=weight.group_size, bits=weight.bits))


COMPLETE = ["v0/llama-mixed-f32", "v0/qwen2-unquant-bf16"]


@pytest.mark.parametrize("directory", COMPLETE)
def test_complete_directory_opens_as_a_model(directory: str) -> None:
    """One set, its residual tensors beside it, as views of the file that equal the safetensors library's."""
    from safetensors.torch import load_file

    with uqff.open(GOLDEN / directory) as file:
        assert [int(key) for key in file] == list(range(len(MANIFEST["directories"][directory]["layers"])))
        expected = load_file(GOLDEN / directory / "residual.safetensors")
        assert set(file.residual) == set(expected)
        for name, tensor in expected.items():
            assert file.residual[name].dtype is tensor.dtype
            assert torch.equal(file.residual[name], tensor)


def test_directory_of_several_models_is_not_guessed() -> None:
    """Twenty types of one model."""
    with pytest.raises(uqff.ShardError, match="several models"):
        uqff.open(GOLDEN / "v0/qwen2-f32")
