"""``quantize_model(effort=, imatrix=)``: layers as ``uqff.quantize`` makes them with their importance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import uqff
from tools.tiny.models import TinyModel
from uqff import ShapeError, UnsupportedError
from uqff.cli import main
from uqff.importance.matrix import InputSquares


def importance_of(weights: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    names = [name for name, weight in weights.items() if weight.ndim == 2 and "embed" not in name]
    return {name: rng.exponential(1, weights[name].shape[1]).astype(np.float32) for name in names}


def test_layers(tmp_path: Path) -> None:
    source = tmp_path / "source"
    TinyModel("llama").write(source)
    weights = load_file(source / "model.safetensors")
    importance = importance_of(weights)
    entries = {
        name.removesuffix(".weight"): InputSquares(each[None] * 2, np.array([2])) for name, each in importance.items()
    }
    del entries["model.layers.0.mlp.up_proj"]
    matrix = tmp_path / "imatrix.gguf"
    uqff.Importance(entries).save(matrix)
    arguments = ["quantize", str(source), str(tmp_path / "made"), "--isq", "q4_0", "--no-promote", "--quiet"]
    run = CliRunner().invoke(main, [*arguments, "--effort", "best", "--imatrix", str(matrix)])
    assert run.exit_code == 0, run.output
    assert "the importance matrix has nothing of " in run.stderr
    with uqff.open(tmp_path / "made") as file:
        for key, layer in file.items():
            weight = weights[f"{key}.weight"]
            found = importance[f"{key}.weight"] if key in entries else None
            expected = uqff.quantize(weight, "q4_0", effort="best", importance=found)
            assert bytes(layer.weight.parts["data"].array()) == bytes(expected.parts["data"].array()), key
    refused = CliRunner().invoke(main, ["quantize", str(source), str(tmp_path / "x"), "--isq", "q4_0", "--effort", "x"])
    assert refused.exit_code == 2


@pytest.mark.parametrize("promote", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_counts_as_head_if_it_is_one(tied: bool, promote: bool, tmp_path: Path) -> None:
    """The head's inputs are the embedding's in a tied model, promoted or not; of others nothing is known."""
    source = tmp_path / "source"
    TinyModel(hidden_size=256, intermediate_size=256, tied=tied).write(source)
    weight = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    means = np.random.default_rng(6).exponential(1, weight.shape[1]).astype(np.float32)
    matrix = uqff.Importance({"lm_head": InputSquares(means[None], np.array([1]))})
    uqff.quantize_model(source, tmp_path / "made", "q4_0", effort="best", imatrix=matrix, promote=promote)
    with uqff.open(tmp_path / "made") as file:
        made = file["model.embed_tokens"].weight
    with_head = uqff.quantize(weight, made.kind, effort="best", importance=means)
    expected = with_head if tied else uqff.quantize(weight, made.kind, effort="best")
    assert bytes(made.parts["data"].array()) == bytes(expected.parts["data"].array())
    assert tied or bytes(with_head.parts["data"].array()) != bytes(expected.parts["data"].array())


def test_what_is_refused(tmp_path: Path) -> None:
    TinyModel("llama").write(tmp_path / "source")
    key = "model.layers.0.self_attn.q_proj"
    matrix = uqff.Importance({key: InputSquares(np.ones((1, 8), np.float32), np.array([1]))})
    with pytest.raises(ShapeError, match=key):
        uqff.quantize_model(tmp_path / "source", tmp_path / "made", "q4_0", effort="best", imatrix=matrix)
    with pytest.raises(UnsupportedError, match="unknown effort"):
        uqff.quantize_model(tmp_path / "source", tmp_path / "made", "q4_0", effort="x")  # type: ignore[arg-type]
    assert not (tmp_path / "made").exists()
