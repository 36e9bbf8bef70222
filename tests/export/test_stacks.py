"""Experts in stacks: dequantised as the architecture's checkpoints have them, as `transformers` reads them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import uqff
from tools.tiny import multimodal
from uqff.checkpoints import open_tensors
from uqff.errors import UnsupportedError
from uqff.export.dequantize import dequantize_model
from uqff.models.architectures import architecture_of
from uqff.models.config import read_config
from uqff.quantization.run import quantize_model

KIND = "q8_0"
NAMES = ("Qwen3-VL-MoE", "Gemma 4 MoE", "DiffusionGemma", "Llama 4")


def loaded(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the model of `transformers`; none is missing, and none is left."""
    import transformers

    made: Any = getattr(transformers, multimodal.MULTIMODALS[name].architecture)
    model, told = made.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(told.values()), told
    tensors: dict[str, torch.Tensor] = model.state_dict()
    return tensors


def through_codes(tensor: torch.Tensor, stacks: str) -> torch.Tensor:
    """What is left of a weight of outputs and inputs."""
    turned = tensor.ndim == 3 and stacks == "columns"
    weight = tensor.transpose(1, 2).contiguous() if turned else tensor
    rows = uqff.quantize(weight.reshape(-1, weight.shape[-1]), KIND).dequantize().reshape(weight.shape)
    return rows.transpose(1, 2) if turned else rows


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_every_weight(name: str, tmp_path: Path) -> None:
    """Each is that of the checkpoint, or what its codes are worth; those of experts are the latter."""
    if not multimodal.has(name):
        pytest.skip("this transformers has no such architecture")
    multimodal.write(name, tmp_path / "model")
    quantize_model(tmp_path / "model", tmp_path / "uqff", [KIND], dtype="f32")
    dequantize_model(tmp_path / "uqff", tmp_path / "plain")
    stacks = architecture_of(read_config(tmp_path / "model" / "config.json")).stacks
    own = "columns" if name == "Llama 4" else "rows"  # in memory
    wanted, got = loaded(name, tmp_path / "model"), loaded(name, tmp_path / "plain")
    assert stacks
    assert got.keys() == wanted.keys()
    for key, tensor in got.items():
        stack = tensor.ndim == 3 and ".experts." in key
        assert (not stack and torch.equal(tensor, wanted[key])) or torch.equal(
            tensor, through_codes(wanted[key], own)
        ), key


def test_shards_and_steps_and_biases(tmp_path: Path) -> None:
    """In several files it is the same; all weights are counted; a bias, which no checkpoint has, is not lost."""
    name = NAMES[0]
    if not multimodal.has(name):
        pytest.skip("this transformers has no such architecture")
    multimodal.write(name, tmp_path / "model")
    quantize_model(tmp_path / "model", tmp_path / "uqff", [KIND], dtype="f32")
    steps: list[uqff.Step] = []
    whole = dequantize_model(tmp_path / "uqff", tmp_path / "whole")
    parts = dequantize_model(tmp_path / "uqff", tmp_path / "parts", shard_bytes=1 << 15, progress=steps.append)
    assert len(whole.files) == 1
    assert len(parts.files) > 2
    with open_tensors(tmp_path / "whole") as a, open_tensors(tmp_path / "parts") as b:
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert steps[-1].work_done == steps[-1].work
    with uqff.open(tmp_path / "uqff") as file:
        assert steps[-1].work == sum(math.prod(layer.weight.shape) for layer in file.values())
        layers = dict(file.items())
        key = "model.language_model.layers.0.mlp.experts.up_proj"
        weight = layers[key].weight
        layers[key] = uqff.Layer(weight, torch.zeros(weight.shape[:2]))
        (tmp_path / "biased").mkdir()
        uqff.save(layers, tmp_path / "biased" / "0.uqff", version=file.version)
    for each in ("config.json", "residual.safetensors"):
        (tmp_path / "biased" / each).symlink_to(tmp_path / "uqff" / each)
    with pytest.raises(UnsupportedError, match="no biases of these experts") as caught:
        dequantize_model(tmp_path / "biased", tmp_path / "refused")
    assert caught.value.layer == key
