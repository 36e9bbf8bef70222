"""A model as a plain checkpoint: the names of the checkpoint it was made from, and the values of its codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import uqff
from tests.support.golden_models import DIRECTORIES, GOLDEN, TinyModel
from tests.support.moe_models import CONFIG, save_moe
from tests.support.roundtrip import same_bytes
from tools.golden.v1 import TinyMixtral
from uqff import DType
from uqff.checkpoints import open_tensors
from uqff.container.staging import check_target
from uqff.errors import ShapeError, ShardError, UnsupportedError
from uqff.export.dequantize import Dequantized, dequantize_model
from uqff.families import Unquant, stack
from uqff.models.modules import config_beside, modules_of

Tensors = dict[str, torch.Tensor]


def load(directory: Path) -> Tensors:
    """All tensors of a checkpoint; the files are those of its index."""
    with open_tensors(directory) as checkpoint:
        return {name: tensor.clone() for name, tensor in checkpoint.items()}


def expected(model: Path, dtype: torch.dtype) -> Tensors:
    """What a model holds, taken out layer by layer."""
    tensors: Tensors = {}
    with uqff.open(model) as file:
        for module in modules_of(file, config_beside(file)):
            layers = [file[key] for key in module.keys]
            if len(layers[0].weight.shape) == 3:
                layers = layers[0].unstack()
            for part, (weight, bias) in zip(module.parts, layers, strict=True):
                tensors[f"{part.module}.weight"] = weight.dequantize(dtype)
                if bias is not None:
                    tensors[f"{part.module}.bias"] = bias.to(dtype)
        tensors |= {name: tensor.to(dtype) for name, tensor in file.residual.items()}
    return tensors


def assert_same(made: Tensors, wanted: Tensors) -> None:
    assert sorted(made) == sorted(wanted)
    assert [name for name in made if not same_bytes(made[name], wanted[name])] == []


def golden_model(tmp_path: Path, name: str, kind: str, model: TinyModel | None = None) -> Path:
    """A model directory of a golden file: of 1.x, config and residual are those of the checkpoint."""
    directory = tmp_path / "model"
    directory.mkdir()
    shutil.copy(GOLDEN / name / f"{kind}-0.uqff", directory)
    if model is None:
        for each in ("config.json", "residual.safetensors"):
            shutil.copy(GOLDEN / name / each, directory)
        return directory
    model.write(tmp_path / "source")
    shutil.copy(tmp_path / "source" / "config.json", directory)
    with uqff.open(directory) as file:
        layers = {
            f"{part.module}.{what}"
            for module in modules_of(file, config_beside(file))
            for part in module.parts
            for what in ("weight", "bias")
        }
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if name not in layers}, directory / "residual.safetensors")
    return directory


MODELS = {
    "0.x qwen2": ("v0/qwen2-f32", "q4k", None),
    "0.x mixed": ("v0/llama-mixed-f32", "q8_0", None),
    "0.x bf16": ("v0/qwen2-unquant-bf16", "hqq8", None),
    "1.2 qwen2": ("v1/1.2.0/qwen2-f16", "fp8", TinyModel(**DIRECTORIES["v0/qwen2-f16"]["model"])),
    "1.1 mixtral": ("v1/1.1.0/mixtral-64-f32", "fp8", TinyMixtral()),
    "1.1 mixtral hqq": ("v1/1.1.0/mixtral-64-f32", "hqq8", TinyMixtral()),
    "1.1 mixtral f8q8": ("v1/1.1.0/mixtral-64-f32", "f8q8", TinyMixtral()),
    "1.2 mixtral": ("v1/1.2.0/mixtral-64-f32", "afq2", TinyMixtral()),
}


@pytest.mark.parametrize("case", MODELS)
def test_names_shapes_and_values(case: str, tmp_path: Path) -> None:
    """Every tensor of the source checkpoint is there again, by name and shape, with the values of its codes."""
    name, kind, model = MODELS[case]
    source = TinyModel(**DIRECTORIES[name]["model"]) if model is None else model
    directory = golden_model(tmp_path, name, kind, model)
    result = dequantize_model(directory, tmp_path / "out")
    made = load(tmp_path / "out")
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == source.shapes()
    assert {tensor.dtype for tensor in made.values()} == {torch.float32}
    if "mixtral" not in case or case == "1.2 mixtral":
        assert_same(made, expected(directory, torch.float32))
    with uqff.open(directory) as file:
        head = file["0" if file.generation == "0.x" else "lm_head"].weight.dequantize()
    assert same_bytes(made["lm_head.weight"], head)
    assert (result.tensors, result.files, result.untied) == (len(made), ["model.safetensors"], False)


@pytest.mark.parametrize("kind", ["hqq8", "f8q8", "fp8"])
def test_experts_of_any_stack(kind: str, tmp_path: Path) -> None:
    """Stacks whose experts cannot be cut out are taken apart as numbers."""
    directory = golden_model(tmp_path, "v1/1.1.0/mixtral-64-f32", kind, TinyMixtral())
    dequantize_model(directory, tmp_path / "out")
    made = load(tmp_path / "out")
    experts = "model.layers.0.block_sparse_moe.experts"
    with uqff.open(directory) as file:
        for stacked, name in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
            whole = file[f"{experts}.{stacked}"].weight.dequantize()
            for expert, weight in enumerate(whole):
                assert same_bytes(made[f"{experts}.{expert}.{name}.weight"], weight)


def test_both_generations_give_one_checkpoint(tmp_path: Path) -> None:
    """Experts apart in 0.x, stacked in 1.x, with their biases: the same bytes."""
    old, new = save_moe(tmp_path / "old", stacked=False), save_moe(tmp_path / "new", stacked=True)
    for model in (old, new):
        dequantize_model(model, tmp_path / f"{model.name}-out", dtype="bf16")
    names = ["config.json", "model.safetensors", "tokenizer.json"]
    for out in ("old-out", "new-out"):
        assert sorted(path.name for path in (tmp_path / out).iterdir()) == names
    assert len({(tmp_path / out / "model.safetensors").read_bytes() for out in ("old-out", "new-out")}) == 1
    made = load(tmp_path / "new-out")
    assert_same(made, expected(old, torch.bfloat16))
    assert "model.layers.0.mlp.experts.1.down_proj.bias" in made


def test_config_is_that_of_the_plain_model(tmp_path: Path) -> None:
    """Its dtype is stated where it was, in the text part too, and how the source was quantised is gone."""
    model = save_moe(tmp_path / "m", stacked=False, quantization_config={"bits": 4}, dtype="float16", ü="ü")
    dequantize_model(model, tmp_path / "out", dtype="f16")
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made == CONFIG | {"torch_dtype": "float16", "dtype": "float16", "ü": "ü"}
    header = (tmp_path / "out" / "model.safetensors").read_bytes()[8:60]
    assert header.startswith(b'{"__metadata__":{"format":"pt"}')


def test_shards_with_an_index(tmp_path: Path) -> None:
    """A file is full before its bound, named as the libraries expect, and the index knows every tensor and the size."""
    model = save_moe(tmp_path / "m", stacked=False)
    whole = dequantize_model(model, tmp_path / "whole")
    parts = dequantize_model(model, tmp_path / "parts", shard_bytes=20_000)
    assert_same(load(tmp_path / "parts"), load(tmp_path / "whole"))
    count = len(parts.files)
    assert parts.files == [f"model-{at:05d}-of-{count:05d}.safetensors" for at in range(1, count + 1)]
    held = {name: load_file(tmp_path / "parts" / name) for name in parts.files}
    assert all(sum(t.nbytes for t in tensors.values()) <= 20_000 for tensors in held.values())
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in held.values() for t in tensors.values())
    assert parts.tensors == whole.tensors


def test_tied_head_is_kept_and_the_model_untied(tmp_path: Path) -> None:
    """0.x has a quantised head beside the plain embedding: both are written, as the engine computes."""
    directory = golden_model(tmp_path, "v0/llama-96-f32", "q8k")
    result = dequantize_model(directory, tmp_path / "out")
    made = load(tmp_path / "out")
    assert_same(made, expected(directory, torch.float32))
    assert not same_bytes(made["lm_head.weight"], made["model.embed_tokens.weight"])
    assert (result.untied, result.dropped) == (True, [])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("kept", ["embedding", "head"])
def test_tied_with_one_of_the_two(kept: Any, tmp_path: Path) -> None:
    """The other one is left out, and said to be; the one that is kept stands in the embedding's place."""
    directory = golden_model(tmp_path, "v0/llama-96-f32", "q8k")
    result = dequantize_model(directory, tmp_path / "out", tie=kept)
    wanted = expected(directory, torch.float32)
    names = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}
    values = wanted[names[kept]]
    del wanted["lm_head.weight"]
    wanted["model.embed_tokens.weight"] = values
    assert_same(load(tmp_path / "out"), wanted)
    assert (result.untied, [result.dropped]) == (False, [[name] for key, name in names.items() if key != kept])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_embedding_that_is_the_head(tmp_path: Path) -> None:
    """A tied 1.2 model has one layer for both and stays tied; its checkpoint has no head."""
    model = TinyModel("llama", hidden_size=32, intermediate_size=32, heads=1, vocab_size=16, tied=True, seed=32)
    directory = golden_model(tmp_path, "v1/1.2.0/llama-32-tied-f32", "hqq4", model)
    result = dequantize_model(directory, tmp_path / "out")
    made = load(tmp_path / "out")
    assert sorted(made) == sorted(model.shapes())
    with uqff.open(directory) as file:
        assert same_bytes(made["model.embed_tokens.weight"], file["model.embed_tokens"].weight.dequantize())
    assert not result.untied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_1x_without_a_configuration(tmp_path: Path) -> None:
    """Paths are names enough for matrices; what a stack of experts is called in a checkpoint is not known."""
    layer = uqff.quantize(torch.ones(4, 32), "q8_0")
    uqff.save({"a.b": layer}, tmp_path / "a.uqff", version=(1, 2, 0))
    dequantize_model(tmp_path / "a.uqff", tmp_path / "out")
    assert_same(load(tmp_path / "out"), {"a.b.weight": layer.dequantize()})
    uqff.save({"a.b": stack([layer, layer])}, tmp_path / "s.uqff", version=(1, 2, 0))
    with pytest.raises(ShapeError, match="the experts have no known names"):
        dequantize_model(tmp_path / "s.uqff", tmp_path / "stack")
    assert not (tmp_path / "stack").exists()


def failing(tmp_path: Path, error: type[Exception], match: str, model: Path, **options: Any) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=match):
        dequantize_model(model, tmp_path / "out", **options)
    assert sorted(tmp_path.iterdir()) == before


def test_errors_leave_nothing_behind(tmp_path: Path) -> None:
    """A model without its residual, of another size or of an unknown architecture; a dtype that is none."""
    bare = save_moe(tmp_path / "bare", stacked=True, residual=False)
    failing(tmp_path, ShardError, "lacks a weight.*model.embed_tokens", bare)
    other = save_moe(tmp_path / "other", stacked=False, num_hidden_layers=3)
    message = r"expected 28 layers, got 18, without 18 \(model.layers.2.self_attn.q_proj\), 19 .*, 22 \(.*\), \.\.\."
    failing(tmp_path, ShardError, message, other)
    short = save_moe(tmp_path / "short", stacked=True, num_experts=3)
    failing(tmp_path, ShapeError, "stack does not fit: expected 3 experts, got", short)
    unknown = save_moe(tmp_path / "unknown", stacked=False, architectures=["X"])
    failing(tmp_path, UnsupportedError, "unknown architecture", unknown)
    failing(tmp_path, UnsupportedError, "unknown dtype", bare, dtype="f64")


def test_a_layer_that_is_in_the_residual_too(tmp_path: Path) -> None:
    """Which of the two a model computes with would be a guess."""
    model = save_moe(tmp_path / "m", stacked=True)
    save_file(load_file(model / "residual.safetensors") | {"lm_head.weight": torch.ones(1)}, tmp_path / "more")
    shutil.move(tmp_path / "more", model / "residual.safetensors")
    failing(tmp_path, ShardError, "is a layer and in the residual", model)


def test_a_broken_layer_is_found_before_anything_is_written(tmp_path: Path) -> None:
    """All layers are looked at first."""
    model = save_moe(tmp_path / "m", stacked=False)
    raw = bytearray((model / "q4_0.uqff").read_bytes())
    with uqff.open(model) as file:
        at = file.place("10").offset
    raw[at + 4] = 99
    (model / "q4_0.uqff").write_bytes(raw)
    failing(tmp_path, UnsupportedError, "unknown type.*layer 10", model)


def test_only_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    """A UQFF model holds safetensors files too; it is never replaced by what was made of it."""
    model = save_moe(tmp_path / "m", stacked=False)
    for force, match in ((False, "not empty"), (True, "is not a checkpoint")):
        with pytest.raises(FileExistsError, match=match):
            dequantize_model(model, model, force=force)
    dequantize_model(model, tmp_path / "out")
    with pytest.raises(FileExistsError, match="is not a UQFF model"):
        check_target(tmp_path / "out", force=True)
    with pytest.raises(FileExistsError, match="not empty"):
        dequantize_model(model, tmp_path / "out")
    dequantize_model(model, tmp_path / "out", dtype="f16", force=True)
    assert load(tmp_path / "out")["lm_head.weight"].dtype == torch.float16


def test_numbers_that_the_dtype_does_not_reach_are_counted(tmp_path: Path) -> None:
    """f16 ends at 65504: what becomes infinite is named, in weights, biases and the residual; f32 has them all."""
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weight = torch.zeros(2, 32)
    weight[0, :3] = 1e5
    weight[1, 0] = torch.inf
    layers = {
        index: uqff.Layer(Unquant(weight.view(torch.uint8), DType.F32), torch.tensor([1e6, 1])) for index in range(8)
    }
    uqff.save(layers, tmp_path / "m.uqff")
    save_file({"model.embed_tokens.weight": torch.full((2, 2), -7e4)}, tmp_path / "residual.safetensors")
    result = dequantize_model(tmp_path, tmp_path / "f16", dtype="f16")
    counts = {"lm_head.weight": 3, "lm_head.bias": 1, "model.embed_tokens.weight": 4}
    assert {name: result.overflows[name] for name in counts} == counts
    assert len(result.overflows) == 17
    assert dequantize_model(tmp_path, tmp_path / "f32").overflows == {}


def test_progress_counts_layers_and_weights(tmp_path: Path) -> None:
    """Once a layer, to the last."""
    steps: list[Any] = []
    dequantize_model(save_moe(tmp_path / "m", stacked=True), tmp_path / "out", progress=steps.append)
    assert [step.done for step in steps] == list(range(1, 16))
    assert (steps[-1].work_done, steps[-1].work) == (18 * 1024, 18 * 1024)


def test_summary(tmp_path: Path) -> None:
    """What was made is said."""
    result = dequantize_model(save_moe(tmp_path / "m", stacked=True), tmp_path / "out", dtype="bf16")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert result == Dequantized(tmp_path / "out", "bfloat16", ["model.safetensors"], 37, size)
