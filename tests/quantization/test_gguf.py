"""GGUF files quantised: plain ones as the checkpoint they are of, blocks kept, or quantised again on request."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

import uqff
from tools.tiny.gguf import write_gguf
from tools.tiny.models import TinyModel
from uqff import Layer
from uqff.conversion import uqff_of_gguf
from uqff.errors import UnsupportedError

KINDS = {"v_proj": "q6k", "up_proj": "tq2_0", "down_proj": "mxfp4", "lm_head": "f16", "o_proj": "bf16"}


def tiny(architecture: str = "llama") -> TinyModel:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "heads": 4, "kv_heads": 2}
    return TinyModel(architecture, vocab_size=32, **sizes)  # type: ignore[arg-type]


def layers(path: Path) -> dict[str, Layer]:
    with uqff.open(path) as file:
        return dict(file.items())


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_plain_file_is_quantised_as_its_checkpoint(tmp_path: Path, architecture: str) -> None:
    """The very files, but for the configuration: rows of Q and K and biases are in the model's order."""
    model = tiny(architecture)
    model.write(tmp_path / "checkpoint")
    write_gguf(model, tmp_path / "a.gguf", "f32", vocabulary=True)
    uqff.quantize_model(tmp_path / "checkpoint", tmp_path / "u", "q4_0")
    result = uqff.quantize_model(tmp_path / "a.gguf", tmp_path / "v", "q4_0")
    assert (tmp_path / "u/q4_0-0.uqff").read_bytes() == (tmp_path / "v/q4_0-0.uqff").read_bytes()
    both = [tmp_path / name / "residual.safetensors" for name in "uv"]
    with uqff.open(both[0].parent) as one, uqff.open(both[1].parent) as other:
        assert one.residual.keys() == other.residual.keys()
        assert all(torch.equal(one.residual[name], other.residual[name]) for name in one.residual)
    config, converted = json.loads((tmp_path / "v/config.json").read_text()), tmp_path / "w"
    uqff_of_gguf(tmp_path / "a.gguf", converted)
    assert config == json.loads((converted / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "v" / name).read_bytes() == (converted / name).read_bytes()
    assert result.notes == ["the file has no chat template"]


def test_blocks_are_kept(tmp_path: Path) -> None:
    """What UQFF has a form for has the bytes that convert gives it; the rest becomes the fallback; plain is plain."""
    write_gguf(tiny(), tmp_path / "a.gguf", "q4k", kinds=KINDS)
    with pytest.raises(UnsupportedError, match="a ggml type of its own has no form in UQFF") as caught:
        uqff.quantize_model(tmp_path / "a.gguf", tmp_path / "u", "keep")
    assert (caught.value.layer, caught.value.field) == ("model.layers.0.mlp.up_proj", "fallback")
    uqff.quantize_model(tmp_path / "a.gguf", tmp_path / "u", "keep", fallback="q8_0", on_fallback=lambda _: None)
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "v", requantize="q8_0")
    made, converted = layers(tmp_path / "u"), layers(tmp_path / "v")
    for name in ("lm_head", "model.layers.0.self_attn.o_proj"):
        kept, carried = made.pop(name).weight, converted.pop(name).weight
        assert (kept.kind, carried.kind in ("f16", "bf16")) == ("unquant", True)
        assert torch.equal(kept.dequantize(), carried.dequantize())
    assert made == converted
    assert {layer.weight.kind for layer in made.values()} == {"q4k", "q6k", "q8_0", "mxfp4"}


def test_blocks_are_quantised_again_on_request_only(tmp_path: Path) -> None:
    """The first layer that would be is named; on request the numbers are those of the gguf package."""
    model = tiny()
    write_gguf(model, tmp_path / "a.gguf", "f32", kinds={"up_proj": "tq2_0", "down_proj": "q8_0"})
    with pytest.raises(UnsupportedError, match="the layer is quantised already") as caught:
        uqff.quantize_model(tmp_path / "a.gguf", tmp_path / "u", "q4_0")
    assert (caught.value.layer, caught.value.field) == ("model.layers.0.mlp.down_proj", "requantize")
    assert "--requantize" in str(caught.value)
    assert not (tmp_path / "u").exists()
    uqff.quantize_model(tmp_path / "a.gguf", tmp_path / "u", "q4_0", requantize=True)
    for name, type in (("up_proj", GGMLQuantizationType.TQ2_0), ("down_proj", GGMLQuantizationType.Q8_0)):
        module = f"model.layers.0.mlp.{name}"
        if type is GGMLQuantizationType.TQ2_0:
            numbers = quants.dequantize(quants.quantize(model.tensors()[f"{module}.weight"], type), type)
        else:
            numbers = uqff.quantize(torch.from_numpy(model.tensors()[f"{module}.weight"]), "q8_0").dequantize().numpy()
        assert layers(tmp_path / "u")[module].weight == uqff.quantize(np.ascontiguousarray(numbers), "q4_0")


def test_layers_of_a_file(tmp_path: Path) -> None:
    """``open_checkpoint`` gives them by path, and slices of them; the model's own configuration is taken if given."""
    model = tiny()
    model.write(tmp_path / "own")
    write_gguf(model, tmp_path / "a.gguf", "q8_0")
    with uqff.open_checkpoint(tmp_path / "a.gguf", assets=tmp_path / "own") as checkpoint:
        layer = checkpoint.layer("model.layers.0.self_attn.k_proj")
        expected = uqff.quantize(torch.from_numpy(model.tensors()["model.layers.0.self_attn.k_proj.weight"]), "q8_0")
        assert layer.weight == expected
        shard = uqff.Shard.simple(0, rank=1, world_size=2)
        assert checkpoint.layer("model.layers.0.self_attn.k_proj", shard).weight == expected.narrow(0, 64, 64)
        assert checkpoint.kind("model.norm") == "unquant"
        assert checkpoint.config["model_type"] == "llama"
    with pytest.raises(UnsupportedError, match="only GGUF files take another configuration"):
        uqff.open_checkpoint(tmp_path / "own", assets=tmp_path / "own")


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    write_gguf(tiny(), tmp_path / "a.gguf", "tq2_0")
    code = (
        "import sys; from uqff.quantization.run import quantize_model; "
        "quantize_model(sys.argv[1], sys.argv[2], 'q8_0', requantize=True); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.gguf"), str(tmp_path / "u")], check=True)
