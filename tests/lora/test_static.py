"""Adapters that stand in the checkpoint: which layers a pattern chooses, sums, slices, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import uqff
from tests.support.lora_files import exact_numbers
from uqff.errors import FormatError, MissingError, ShapeError, UnsupportedError, UqffError
from uqff.lora import StaticLora, static_loras, static_weight

QKV, DOWN = "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.down_proj"
CONFIG = {
    "vision_lora": {"dp": 0.0, "layer": r"layers.*self_attn\.(qkv|o)_proj", "r": 4, "lora_alpha": 8},
    "speech_lora": {"layer": "layers.*(self_attn|mlp)", "r": 2, "lora_alpha": 1},
    "other_lora": {"r": 2},
}


def tensors_of(path: str, out: int, inputs: int) -> dict[str, torch.Tensor]:
    made = {f"{path}.base_layer.weight": exact_numbers((out, inputs), 1).bfloat16()}
    for at, (name, rank) in enumerate((("vision", 4), ("speech", 2))):
        made[f"{path}.lora_A.{name}.weight"] = exact_numbers((rank, inputs), 10 + at)
        made[f"{path}.lora_B.{name}.weight"] = exact_numbers((out, rank), 20 + at)
    return made


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def delta(tensors: dict[str, torch.Tensor], path: str, name: str, scale: float) -> torch.Tensor:
    return tensors[f"{path}.lora_B.{name}.weight"] @ tensors[f"{path}.lora_A.{name}.weight"] * scale


def test_what_patterns_choose_is_added(tmp_path: Path) -> None:
    tensors = tensors_of(QKV, 24, 16) | tensors_of(DOWN, 16, 24)
    loras = static_loras(CONFIG)
    assert loras == {
        "vision": StaticLora(r"layers.*self_attn\.(qkv|o)_proj", 4, 8),
        "speech": StaticLora("layers.*(self_attn|mlp)", 2, 1),
    }
    with uqff.open_checkpoint(write(tmp_path, tensors)) as checkpoint:
        files = checkpoint.tensors
        qkv, down = (static_weight(files, path, loras) for path in (QKV, DOWN))
        assert static_weight(files, "model.layers.1.self_attn.qkv_proj", loras) is None
        base = static_weight(files, QKV, {})
        parts = [static_weight(files, QKV, loras, dim=dim, part=slice(4, 12)) for dim in (0, 1)]
    assert qkv is not None
    assert down is not None
    both = delta(tensors, QKV, "vision", 2.0) + delta(tensors, QKV, "speech", 0.5)
    weight = tensors[f"{QKV}.base_layer.weight"].float()
    assert torch.equal(torch.from_numpy(qkv), weight + both)
    assert torch.equal(torch.from_numpy(base), weight)
    expected = tensors[f"{DOWN}.base_layer.weight"].float() + delta(tensors, DOWN, "speech", 0.5)
    assert torch.equal(torch.from_numpy(down), expected)
    rows, columns = parts
    assert rows is not None
    assert columns is not None
    assert np.array_equal(rows, qkv[4:12])
    assert np.array_equal(columns, qkv[:, 4:12])
    layer = uqff.parallel.ColumnParallelLayer.new(qkv)
    assert torch.equal(layer.dequantize_w(), weight + both)


@pytest.mark.parametrize(
    ("change", "loras", "error", "field"),
    [
        ({f"{QKV}.lora_B.vision.weight": None}, {}, MissingError, f"{QKV}.lora_B.vision.weight"),
        ({f"{QKV}.lora_A.vision.weight": torch.ones(4, 15)}, {}, ShapeError, None),
        ({f"{QKV}.lora_B.vision.weight": torch.ones(24, 3)}, {}, ShapeError, None),
        (
            {f"{QKV}.lora_A.vision.weight": torch.ones(4, 16).double()},
            {},
            UnsupportedError,
            f"{QKV}.lora_A.vision.weight",
        ),
        ({}, {"vision": StaticLora("qkv", 3, 8)}, FormatError, f"{QKV}.lora_A.vision.weight"),
        ({}, {"vision": StaticLora("qkv", 0, 8)}, FormatError, "r"),
        ({}, {"vision": StaticLora("(qkv", 4, 8)}, FormatError, "column 4"),
    ],
)
def test_bad_ones_are_named(
    change: Any, loras: dict[str, StaticLora], error: type[UqffError], field: str | None, tmp_path: Path
) -> None:
    tensors = {name: each for name, each in (tensors_of(QKV, 24, 16) | change).items() if each is not None}
    with uqff.open_checkpoint(write(tmp_path, tensors)) as checkpoint, pytest.raises(error) as caught:
        static_weight(checkpoint.tensors, QKV, loras or static_loras(CONFIG))
    assert caught.value.file is not None
    if field is not None:
        assert caught.value.field == field
