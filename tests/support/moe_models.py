"""A small mixture of experts as a model directory, experts apart in 0.2 or stacked in 1.2: the same layers in both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import uqff
from uqff.families import stack

__all__ = ["CONFIG", "save_moe"]

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_hidden_layers": 2,
    "num_experts": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
    "torch_dtype": "bfloat16",
}


def save_moe(
    directory: Path, *, stacked: bool, residual: bool = True, shard_bytes: int = 1 << 30, **config: Any
) -> Path:
    """A Qwen3-MoE with a sparse and a dense layer and biases, with experts apart in 0.2 or stacked in 1.2."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    (directory / "tokenizer.json").write_text("{}")
    generator = torch.Generator().manual_seed(1)

    def layer(bias: bool = False) -> uqff.Layer:
        weight = uqff.quantize(torch.randn(32, 32, generator=generator), "q4_0")
        return uqff.Layer(weight, torch.randn(32, generator=generator) if bias else None)

    layers: dict[str, uqff.Layer] = {"lm_head": layer()}
    for block in (0, 1):
        path = f"model.layers.{block}"
        layers |= {f"{path}.self_attn.{name}_proj": layer(bias=name != "o") for name in "qkvo"}
        projections = [f"{name}_proj" for name in ("gate", "up", "down")]
        where = ["mlp.experts.0", "mlp.experts.1"] if block == 0 else ["mlp"]
        layers |= {f"{path}.{place}.{name}": layer(bias=True) for place in where for name in projections}
    if residual:
        plain = {"model.embed_tokens.weight": torch.randn(32, 32, generator=generator, dtype=torch.float32)}
        plain["model.layers.0.mlp.gate.weight"] = torch.randn(2, 32, generator=generator).bfloat16()
        plain |= {f"model.layers.{block}.input_layernorm.weight": torch.ones(32) for block in (0, 1)}
        save_file(plain, directory / "residual.safetensors")
    if not stacked:
        uqff.save(dict(enumerate(layers.values())), directory / "q4_0.uqff", shard_bytes=shard_bytes)
        return directory
    for name in projections:
        pair = [layers.pop(f"model.layers.0.mlp.experts.{expert}.{name}") for expert in (0, 1)]
        biases = torch.stack([bias for _, bias in pair if bias is not None])
        layers[f"model.layers.0.mlp.experts.{name}"] = uqff.Layer(stack([weight for weight, _ in pair]), biases)
    uqff.save(layers, directory / "q4_0.uqff", version=(1, 2, 0), shard_bytes=shard_bytes)
    return directory
