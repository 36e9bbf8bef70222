"""Adapter directories as PEFT writes them, of numbers that add up without rounding."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

__all__ = ["PREFIX", "exact_numbers", "factors", "make_exact", "write_adapter"]

PREFIX = "base_model.model."


def write_adapter(path: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """An adapter of tensors by their names without PEFT's prefix; its configuration names their modules."""
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}, path / "adapter_model.safetensors"
    )
    modules = sorted({name.split(".lora_")[0] for name in tensors}) or ["none"]
    document = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": modules, **config}
    (path / "adapter_config.json").write_text(json.dumps(document))
    return path


def exact_numbers(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Multiples of 2**-10 up to 2**-7: products of two, and sums of hundreds of these, are exact in float32."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-8, 9, shape)).float() / 1024


def factors(path: str, out: int, inputs: int, rank: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """A and B of a module."""
    a, b = exact_numbers((rank, inputs), 2 * seed), exact_numbers((out, rank), 2 * seed + 1)
    return {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}


def make_exact(model: torch.nn.Module, seed: int = 0) -> None:
    """Give the factors of a PEFT model such numbers, B too, which is zero otherwise."""
    with torch.no_grad():
        for at, (name, parameter) in enumerate(model.named_parameters()):
            if ".lora_" in name:
                parameter.copy_(exact_numbers(tuple(parameter.shape), 1000 * seed + at))
