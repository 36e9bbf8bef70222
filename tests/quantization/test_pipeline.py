"""Checkpoint to pre-1.0 model: the client's bytes, one read for all types, what is a layer and what is not."""

from __future__ import annotations

import json
import os
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import uqff
from tests.support.golden_models import (
    DIRECTORIES,
    GOLDEN,
    TinyModel,
    differing_blocks,
    kinds_of,
    recipe_of,
    same_weight,
)
from tests.support.roundtrip import same_bytes
from uqff.checkpoints import TensorFiles
from uqff.codec.blob import serialize
from uqff.errors import FormatError, ShapeError, UnsupportedError
from uqff.families import GGUF
from uqff.models.patterns import Pattern
from uqff.progress import Step
from uqff.quantization.recipe import parse_recipe
from uqff.quantization.result import Result, result_document, type_rows
from uqff.quantization.run import quantize_model
from uqff.quantization.types import Fallback

COPIED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
quantize = partial(quantize_model, version="0.2")

WHEEL_DEFECT = {("v0/qwen2-f32", "q3k"), ("v0/llama-edge-256-f32", "q3k")}
"""The 0.6.0 wheel overlooks negative scales of sub-block 0; its source, later engines and we do not."""


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives what the pipeline makes of a golden directory's checkpoint, all types in one run."""

    @cache
    def make(directory: str) -> Result:
        case = DIRECTORIES[directory]
        folder = tmp_path_factory.mktemp("golden")
        TinyModel(**case["model"]).write(folder / "source")
        return quantize(
            folder / "source",
            folder / "model",
            kinds_of(directory),
            recipe=recipe_of(directory),
            version="0.1",
            engine="0.6",
            dtype=case["dtype"].lower(),
            engine_biases=True,
            on_fallback=lambda fallback: None,
        )

    return make


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A qwen2 checkpoint: 8 layers, biases, 64 wide."""
    TinyModel(architecture="qwen2", hidden_size=64, heads=2, intermediate_size=128).write(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_layers_are_the_clients(directory: str, made: Any) -> None:
    """Every blob of every type: size, weight, bias; and the whole file where no exempt zero differs."""
    result = made(directory)
    assert [output.kind for output in result.outputs] == kinds_of(directory)
    for output in result.outputs:
        assert output.shards == [f"{output.kind}-0.uqff"]
        ours = uqff.open(result.path / output.shards[0])
        theirs = uqff.open(GOLDEN / directory / output.shards[0])
        assert list(ours) == list(theirs)
        assert output.nbytes == theirs.paths[0].stat().st_size
        for key, layer in zip(ours, output.layers, strict=True):
            (weight, bias), (their_weight, their_bias) = ours[key], theirs[key]
            assert ours.place(key)[1:] == theirs.place(key)[1:]
            assert layer.stored == weight.kind == their_weight.kind
            assert (layer.nbytes, layer.shape) == (len(ours.blob(key)), weight.shape)
            assert same_bytes(bias, their_bias)
            if (directory, output.kind) in WHEEL_DEFECT and isinstance(weight, GGUF):
                assert differing_blocks(weight, their_weight) <= len(weight.blocks) // 8
            else:
                assert same_weight(weight, their_weight), (output.kind, key)


def test_whole_files_are_the_clients(made: Any) -> None:
    """Nearly all files are equal to the last byte: those with an exempt zero and those of the defect are not."""
    equal = {
        (directory, output.kind): (result.path / name).read_bytes() == (GOLDEN / directory / name).read_bytes()
        for directory in DIRECTORIES
        for result in [made(directory)]
        for output in result.outputs
        for name in output.shards
    }
    zeros = {("v0/llama-edge-64-f32", f"afq{bits}") for bits in (2, 3, 4, 6, 8)}
    assert {case for case, same in equal.items() if not same} <= WHEEL_DEFECT | zeros
    assert sum(equal.values()) >= 54


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_residual_and_config_are_the_clients(directory: str, made: Any) -> None:
    for name in ("residual.safetensors", "config.json"):
        assert (made(directory).path / name).read_bytes() == (GOLDEN / directory / name).read_bytes(), name


def test_companions_are_copied(source: Path, tmp_path: Path) -> None:
    (source / "merges.txt").write_text("a b\n")
    (source / "README.md").write_text("not copied")
    (source / "training_args.bin").write_bytes(b"not copied")
    quantize(source, tmp_path / "out", ["q8_0"])
    names = set(os.listdir(tmp_path / "out"))
    assert names == {*COPIED, "merges.txt", "residual.safetensors", "q8_0-0.uqff"}
    for name in (*COPIED, "merges.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


def test_the_layers_are_those_of_quantize(source: Path, tmp_path: Path) -> None:
    """The pipeline adds nothing to `quantize` and `cast_bias`, in either format."""
    tensors = load_file(source / "model.safetensors")
    for format, version in (("0.1", (0, 1, 3)), ("0.2", (0, 2, 0))):
        result = quantize(source, tmp_path / format, ["afq4"], version=format)
        file = uqff.open(tmp_path / format)
        assert result.version == file.version == version
        for layer in result.outputs[0].layers:
            weight = uqff.quantize(tensors[f"{layer.module}.weight"], "afq4")
            bias = tensors.get(f"{layer.module}.bias")
            assert layer.index is not None
            assert bytes(file.blob(layer.index)) == serialize(weight, bias, version=version)


def test_newer_types_need_the_newer_format(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"MXFP4 blobs did not exist yet.*layer lm_head"):
        quantize(source, tmp_path / "out", ["mxfp4"], version="0.1")
    result = quantize(source, tmp_path / "out", ["mxfp4", "f8q8"])
    assert [output.kind for output in result.outputs] == ["mxfp4", "f8q8"]


def test_all_types_share_one_read(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor is taken from the checkpoint once for weights, once per type for the (small) biases."""
    read: list[str] = []
    raw = TensorFiles.raw

    def noted(files: TensorFiles, name: str) -> memoryview:
        read.append(name)
        return raw(files, name)

    monkeypatch.setattr(TensorFiles, "raw", noted)
    quantize(source, tmp_path / "out", ["q8_0", "afq4", "hqq4", "q8_0"])
    weights = [name for name in read if not name.endswith("bias")]
    assert len(weights) == len(set(weights)) == len(load_file(source / "model.safetensors")) - 3
    assert sorted(name for name in os.listdir(tmp_path / "out") if name.endswith(".uqff")) == [
        "afq4-0.uqff",
        "hqq4-0.uqff",
        "q8_0-0.uqff",
    ]


def test_shards_of_the_source_do_not_show(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "whole", ["q8_0"])
    tensors = load_file(source / "model.safetensors")
    weight_map = {name: f"model-{at % 3}.safetensors" for at, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, source / file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (source / "model.safetensors").unlink()
    quantize(source, tmp_path / "sharded", ["q8_0"])
    for name in os.listdir(tmp_path / "whole"):
        assert (tmp_path / "sharded" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_shards_of_the_model(source: Path, tmp_path: Path) -> None:
    """Cut by layer index, named by number, the same layers."""
    quantize(source, tmp_path / "whole", ["q8_0"])
    result = quantize(source, tmp_path / "cut", ["q8_0"], shard_bytes=10_000)
    assert result.outputs[0].shards == [f"q8_0-{n}.uqff" for n in range(5)]
    assert result.outputs[0].nbytes == sum(p.stat().st_size for p in (tmp_path / "cut").glob("*.uqff"))
    whole, cut = uqff.open(tmp_path / "whole"), uqff.open(tmp_path / "cut")
    assert list(whole) == list(cut) == [str(index) for index in range(8)]
    assert all(whole.blob(key) == cut.blob(key) for key in whole)


def test_progress_counts_layers_and_weights(source: Path, tmp_path: Path) -> None:
    steps: list[Step] = []
    result = quantize(source, tmp_path / "out", ["q8_0", "q4_0"], progress=steps.append)
    layers = result.outputs[0].layers
    assert [step.key for step in steps] == [layer.module for layer in layers]
    assert [step.done for step in steps] == list(range(1, 9))
    assert {step.total for step in steps} == {8}
    assert [step.work_done for step in steps] == [sum(layer.weights for layer in layers[: n + 1]) for n in range(8)]
    assert {step.work for step in steps} == {sum(layer.weights for layer in layers)}


def test_the_report_measures_what_is_stored(source: Path, tmp_path: Path) -> None:
    result = quantize(source, tmp_path / "out", ["q4_0"])
    tensors = load_file(source / "model.safetensors")
    file = uqff.open(tmp_path / "out")
    squares = norms = 0.0
    for layer in result.outputs[0].layers:
        weight = tensors[f"{layer.module}.weight"]
        assert layer.index is not None
        error = file[layer.index].weight.dequantize() - weight
        assert layer.distance.largest == error.abs().max().item()
        assert layer.distance.rms == pytest.approx(error.double().pow(2).mean().sqrt().item(), rel=1e-6)
        squares += error.double().pow(2).sum().item()
        norms += weight.double().pow(2).sum().item()
    (row,) = type_rows(result.outputs[0].layers)
    assert (row.kind, row.layers, row.weights) == ("q4_0", 8, sum(layer.weights for layer in result.outputs[0].layers))
    assert row.nbytes == sum(len(file.blob(key)) for key in file)
    assert row.relative == pytest.approx((squares / norms) ** 0.5, rel=1e-6)
    worst = sorted(result.outputs[0].layers, key=lambda layer: -layer.distance.relative)[:3]
    assert list(row.worst) == worst
    document = json.loads(json.dumps(result_document(result)))
    assert document["outputs"][0]["types"][0]["worst"] == [layer.module for layer in worst]
    assert len(document["outputs"][0]["layer_details"]) == 8


def test_fallbacks_are_reported_before_the_work(tmp_path: Path) -> None:
    TinyModel(hidden_size=96, intermediate_size=40, heads=2).write(tmp_path / "source")
    heard: list[Fallback] = []
    seen_first: list[int] = []
    result = quantize(
        tmp_path / "source",
        tmp_path / "out",
        ["q4k"],
        on_fallback=heard.append,
        progress=lambda step: seen_first.append(len(heard)),
    )
    assert set(seen_first) == {8}
    assert {(f.module, f.resolved) for f in heard if f.resolved != "q4_1"} == {("model.layers.0.mlp.down_proj", "f32")}
    assert result.outputs[0].fallbacks == heard
    with pytest.warns(uqff.FallbackWarning) as warned:
        quantize(tmp_path / "source", tmp_path / "again", ["q4k"])
    assert [str(w.message) for w in warned] == [str(fallback) for fallback in heard]
    with pytest.raises(ShapeError, match=r"multiples of 32, got 40 of \[96, 40\] \(layer model.layers.0.mlp.down_proj"):
        quantize(tmp_path / "source", tmp_path / "never", ["q4k"], engine="0.6")
    assert not (tmp_path / "never").exists()


def test_recipes(source: Path, tmp_path: Path) -> None:
    recipe = parse_recipe("/down/:\n  isq: q8_0\n/lm_head/:\n  isq: unquant\n/expert/:\n  isq: q4_0\n")
    result = quantize(source, tmp_path / "out", ["q4_0", "afq4"], recipe=recipe)
    for output in result.outputs:
        stored = {layer.module: layer.stored for layer in output.layers}
        assert stored.pop("lm_head") == "unquant"
        assert stored.pop("model.layers.0.mlp.down_proj") == "q8_0"
        assert set(stored.values()) == {output.kind}
    assert [rule.selector for rule in result.unmatched] == ["/expert/"]


@pytest.mark.parametrize(
    ("dtypes", "auto"),
    [
        ((torch.float32, torch.float32), "F32"),
        ((torch.bfloat16, torch.bfloat16), "BF16"),
        ((torch.float16, torch.float16), "F16"),
        ((torch.bfloat16, torch.float16), "F32"),
    ],
)
def test_auto_loses_nothing(source: Path, tmp_path: Path, dtypes: tuple[torch.dtype, ...], auto: str) -> None:
    """The layers' own dtype if they have one, else F32; norms and embedding are loaded like the layers."""
    tensors = load_file(source / "model.safetensors")
    tensors = {name: tensor.to(dtypes[at % 2]) for at, (name, tensor) in enumerate(tensors.items())}
    save_file(tensors, source / "model.safetensors")
    result = quantize(source, tmp_path / "out", ["unquant"])
    assert result.dtype == auto
    stored = uqff.open(tmp_path / "out")
    for layer in result.outputs[0].layers:
        assert layer.index is not None
        assert torch.equal(stored[layer.index].weight.dequantize(), tensors[f"{layer.module}.weight"].float())
    assert {str(tensor.dtype) for tensor in stored.residual.values()} == {
        {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16"}[auto]
    }


def test_what_is_residual(source: Path, tmp_path: Path) -> None:
    """A tied model keeps its dense embedding and drops a head nobody reads; other dtypes stay as they are."""
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["steps"] = torch.tensor([3], dtype=torch.int64)
    tensors["scalar"] = torch.tensor(2.5)
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    quantize(source, tmp_path / "out", ["q8_0"], dtype="bf16")
    file = uqff.open(tmp_path / "out")
    norms = {name for name in tensors if name.endswith("norm.weight")}
    assert set(file.residual) == {"model.embed_tokens.weight", "steps", "scalar", *norms}
    embedding = tensors["model.embed_tokens.weight"]
    assert torch.equal(file.residual["model.embed_tokens.weight"], embedding.bfloat16())
    assert file.residual["steps"].dtype is torch.int64
    assert file.residual["scalar"].shape == ()
    assert file[0].weight == uqff.quantize(embedding, "q8_0", dtype=torch.bfloat16)


def test_residual_tiles_do_not_show(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(source, tmp_path / "whole", ["q8_0"], dtype="f16")
    monkeypatch.setattr("uqff.models.assets.TILE", 100)
    quantize(source, tmp_path / "tiles", ["q8_0"], dtype="f16")
    whole, tiles = (tmp_path / name / "residual.safetensors" for name in ("whole", "tiles"))
    assert whole.read_bytes() == tiles.read_bytes()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("Phi4MMForCausalLM", "whose layers are not declared here; Phi-4-MM: mistral.rs 0.9.5 adds adapters"),
        ("VoxtralRealtimeForConditionalGeneration", r"layout of its authors only: expected params\.json and"),
        (None, r"Mistral's own layout, .*: expected config\.json, .*, got params\.json"),
    ],
)
def test_what_the_engine_loads_and_is_not_written(source: Path, tmp_path: Path, name: str | None, problem: str) -> None:
    """It is said by name, and why; layers by a pattern are another matter."""
    (source / "config.json").write_text(json.dumps({"architectures": [name]}))
    if name is None:
        (source / "config.json").rename(source / "params.json")
    with pytest.raises(UnsupportedError, match=problem) as caught:
        quantize(source, tmp_path / "out", ["q8_0"])
    assert caught.value.file is not None
    quantize(source, tmp_path / "out", ["q8_0"], layers=Pattern(r"mlp\.(up|down)_proj"))


def test_unknown_architectures_need_a_pattern(source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(UnsupportedError, match="unknown architecture: expected one of Llama, Mistral"):
        quantize(source, tmp_path / "out", ["q8_0"])
    result = quantize(source, tmp_path / "out", ["q8_0"], layers=Pattern(r"mlp\.(up|down)_proj"))
    assert [layer.module for layer in result.outputs[0].layers] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0.mlp.up_proj",
    ]
    assert "lm_head.weight" in uqff.open(tmp_path / "out").residual


def test_checkpoints_that_cannot_be_quantised(source: Path, tmp_path: Path) -> None:
    """The layer is named, nothing is written."""
    good = load_file(source / "model.safetensors")
    up, down = (f"model.layers.0.mlp.{name}_proj" for name in ("up", "down"))
    broken = good[f"{up}.weight"].clone()
    broken[3, 5] = float("nan")
    cases: list[tuple[dict[str, torch.Tensor], type[Exception], str]] = [
        ({f"{up}.weight": broken}, FormatError, rf"nan at \(3, 5\) \(layer {up}"),
        ({f"{up}.weight": good[f"{up}.weight"][0]}, ShapeError, rf"weight is no matrix.*layer {up}"),
        ({f"{up}.weight": good[f"{up}.weight"].to(torch.float8_e4m3fn)}, UnsupportedError, "got F8_E4M3"),
        ({f"{down}.bias": torch.zeros(3)}, ShapeError, rf"bias does not fit weight.*layer {down}"),
    ]
    for change, error, problem in cases:
        save_file(good | change, source / "model.safetensors")
        with pytest.raises(error, match=problem):
            quantize(source, tmp_path / "out", ["q8_0"])
    save_file({name: good[name] for name in good if name != f"{down}.weight"}, source / "model.safetensors")
    with pytest.raises(FormatError, match="the checkpoint lacks a weight"):
        quantize(source, tmp_path / "out", ["q8_0"])
    assert os.listdir(tmp_path) == ["source"]


def test_calls_that_make_no_sense(source: Path, tmp_path: Path) -> None:
    for arguments in [{"kinds": []}, {"kinds": ["q8_0"], "version": "1.3"}, {"kinds": ["q8_0"], "dtype": "f64"}]:
        with pytest.raises(UnsupportedError):
            quantize(source, tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["source"]
