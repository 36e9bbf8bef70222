"""``quantize_model(effort=, imatrix=)``: layers as ``uqff.quantize`` makes them with their importance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import uqff
from tests.parallel.checkpoints import write_checkpoint
from tests.parallel.models import TinyCase
from tools.tiny.models import TinyModel
from uqff import ShapeError, UnsupportedError
from uqff.cli import main
from uqff.importance.hessians import HessianWriter
from uqff.importance.matrix import InputSquares
from uqff.models.architectures import layer_names

pytestmark = pytest.mark.long


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


@pytest.mark.parametrize("version", ["1.2", "0.2"])
def test_calibrated_layers(version: str, tmp_path: Path) -> None:
    """``uqff quantize --effort calibrated --hessian`` makes of every layer what ``uqff.quantize`` does, experts too.

    An expert without tokens goes by those of the others; a layer that the file lacks is quantised without feedback.
    """
    source = tmp_path / "source"
    case = TinyCase("qwen3_moe", "q4_0", (1, 2, 0), expert_inner=64)
    weights, _ = write_checkpoint(case, source, hidden_size=128, intermediate_size=128)
    rng = np.random.default_rng(2)
    experts = 1 + max(int(name.split(".experts.")[1].split(".")[0]) for name in weights if ".experts." in name)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, weight in weights.items():
        if weight.ndim == 2 and ".0.self_attn.q_proj" not in name and "embed" not in name:
            stack, _, rest = name.removesuffix(".weight").partition(".experts.")
            path = f"{stack}.experts.{rest.partition('.')[2]}" if rest else stack
            shapes[path] = (experts,) * bool(rest) + (weight.shape[1],) * 2
    products: dict[str, np.ndarray] = {}
    writer = HessianWriter(tmp_path / "h", shapes)
    for path, shape in shapes.items():
        x = rng.standard_normal((*shape[:-2], 2 * shape[-1], shape[-1])).astype(np.float32).cumsum(-1)
        made = x.swapaxes(-1, -2) @ x
        counts = np.full(shape[0] if len(shape) == 3 else 1, x.shape[-2])
        if len(shape) == 3:
            made[1], counts[1] = 0, 0
        writer.add(path, made, counts)
        if len(shape) == 3:
            made[1] = made.sum(0, dtype=np.float32)
        products[path] = made
    writer.finish()
    arguments = ["quantize", str(source), str(tmp_path / "made"), "--isq", "q4_0", "--no-promote", "--quiet"]
    arguments += ["--uqff-version", version, "--effort", "calibrated"]
    run = CliRunner().invoke(main, [*arguments, "--hessian", str(tmp_path / "h")], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    assert "the file of Hessians has nothing of model." in run.stderr
    lacking = CliRunner().invoke(main, [*arguments[:2], str(tmp_path / "other"), *arguments[3:]])
    assert lacking.exit_code == 1
    assert "which calibrated needs" in lacking.stderr
    seen = 0
    with uqff.open(tmp_path / "made") as file:
        for key, layer in file.items():
            name = layer_module(source, key, version)
            stack, _, rest = name.partition(".experts.")
            names = (
                [f"{name}.weight"]
                if f"{name}.weight" in weights
                else [f"{stack}.experts.{at}.{rest}.weight" for at in range(experts)]
            )
            path = f"{stack}.experts.{rest.rpartition('.')[2]}" if rest else name
            records = layer.weight.unstack() if len(names) > 1 else [layer.weight]
            for at, (weight_name, record) in enumerate(zip(names, records, strict=True)):
                if path not in products:
                    expected = uqff.quantize(weights[weight_name], "q4_0", effort="best")
                else:
                    found = products[path]
                    expert = int(rest.partition(".")[0]) if rest and len(names) == 1 else at
                    found = found[expert] if found.ndim == 3 else found
                    expected = uqff.quantize(weights[weight_name], "q4_0", effort="calibrated", hessian=found)
                assert np.array_equal(record.dequantize().numpy(), expected.dequantize().numpy()), weight_name
                seen += 1
    assert seen >= len(weights) // 2


def layer_module(source: Path, key: str, version: str) -> str:
    """The path of a layer in the model: its key, or what its number stands for in 0.x."""
    if version != "0.2":
        return key
    return layer_names(json.loads((source / "config.json").read_text()))[int(key)].module


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
