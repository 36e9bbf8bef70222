"""Qwen3.5, whose value heads GGUF has in another order: rows change places, and columns where blocks allow it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import uqff
from tools.tiny.gguf import OWN, checkpoint_of, saved, write_checkpoint
from uqff.checkpoints import open_gguf
from uqff.container.document import write_json
from uqff.conversion import gguf_of_uqff, uqff_of_gguf
from uqff.errors import FormatError, UnsupportedError


def write_small(folder: Path, value_heads: int, kind: str) -> dict[str, Any]:
    """Qwen3.5 whose value heads are half a block wide, and its tensors."""
    made = OWN["Qwen3.5"]
    sizes = {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_value_heads": value_heads}
    config, tensors = saved("Qwen3.5", dataclasses.replace(made, values=made.values | sizes))
    write_checkpoint(config, tensors, folder / "a.gguf", kind)
    (folder / "checkpoint").mkdir()
    write_json(folder / "checkpoint/config.json", config)
    save_file(tensors, folder / "checkpoint/model.safetensors")
    return tensors


def test_configuration_of_qwen35(tmp_path: Path) -> None:
    """The axes of rotary positions stand where transformers and the engine look for them, and come back."""
    source, tensors = checkpoint_of("Qwen3.5")
    write_checkpoint(source, tensors, tmp_path / "a.gguf", "f32")
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    config = json.loads((tmp_path / "u/config.json").read_text())
    assert config["rope_parameters"] == source["rope_parameters"]
    assert config["rope_parameters"]["mrope_section"] == [2, 1, 1]
    assert config["layer_types"] == ["linear_attention", "full_attention"]
    (tmp_path / "u/config.json").unlink()
    write_json(tmp_path / "u/config.json", {**config, "rope_parameters": {"mrope_section": [1, 2]}})
    with pytest.raises(FormatError, match="not the axes of rotary positions") as caught:
        gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf")
    assert caught.value.field == "rope_parameters.mrope_section"
    write_checkpoint(source, tensors, tmp_path / "c.gguf", "f32", metadata={"qwen35.rope.dimension_sections": 3})
    with pytest.raises(FormatError) as caught:
        uqff_of_gguf(tmp_path / "c.gguf", tmp_path / "v")
    assert caught.value.field == "qwen35.rope.dimension_sections"


def test_blocks_across_value_heads(tmp_path: Path) -> None:
    """Blocks that hold numbers of two heads, which are no neighbours in the model: only their numbers can be had."""
    tensors = write_small(tmp_path, 4, "q8_0")
    place = "model.layers.0.linear_attn.out_proj"
    with pytest.raises(UnsupportedError, match="the blocks of 1 layers run across the value heads") as caught:
        uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    assert (caught.value.field, caught.value.got) == (f"{place}.weight", "Q8_0")
    result = uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u", requantize="unquant")
    assert "quantised anew, from types that UQFF does not have: 1 in another order" in result.notes
    with uqff.open(tmp_path / "u") as file:
        kinds = {key: layer.weight.kind for key, layer in file.items()}
        numbers = file[place].weight.dequantize().numpy()
    assert {key for key, kind in kinds.items() if kind != "q8_0"} == {place}
    given = tensors[f"{place}.weight"]  # of the model's order: a half of each block of the file
    heads = given.reshape(len(given), 4, 16)[:, [0, 2, 1, 3]].reshape(given.shape)
    stored = uqff.quantize(torch.from_numpy(np.ascontiguousarray(heads)), "q8_0").dequantize().numpy()
    assert np.array_equal(numbers, stored.reshape(len(given), 4, 16)[:, [0, 2, 1, 3]].reshape(given.shape))
    gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf")
    with open_gguf(tmp_path / "b.gguf") as back:
        assert back["blk.0.ssm_out.weight"].type_name == "F32"
        assert np.array_equal(back["blk.0.ssm_out.weight"].float32().reshape(stored.shape), stored)
    uqff.quantize_model(tmp_path / "checkpoint", tmp_path / "v", "q8_0", measure=False)
    with pytest.raises(UnsupportedError, match="1 layers whose blocks run across value heads") as caught:
        gguf_of_uqff(tmp_path / "v", tmp_path / "c.gguf")
    assert caught.value.got == f"{place} (q8_0)"


def test_as_many_value_heads_as_key_heads(tmp_path: Path) -> None:
    """They are in order then, and every block is kept."""
    write_small(tmp_path, 2, "q8_0")
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf")
    with open_gguf(tmp_path / "a.gguf") as one, open_gguf(tmp_path / "b.gguf") as other:
        for name, tensor in one.items():
            assert bytes(tensor.blocks().payload) == bytes(other[name].blocks().payload), name
