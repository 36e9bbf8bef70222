"""Checkpoint to 1.x model: the clients' files and reports, stacked experts, promoted heads, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import uqff
from tests.support.golden_models import GOLDEN, TinyModel, same_weight  # puts tools on the path
from tests.support.quantize_child import run_child
from tests.support.roundtrip import same_bytes
from tools.golden.v1 import CASES as GOLDEN_CASES
from tools.golden.v1 import Case, TinyMixtral
from tools.tiny.architectures import write
from uqff.container.report import read_report
from uqff.errors import FormatError, ShapeError, UnsupportedError
from uqff.models.patterns import Pattern
from uqff.progress import Step
from uqff.quantization.recipe import Recipe, parse_recipe
from uqff.quantization.result import Result, result_document
from uqff.quantization.run import quantize_model
from uqff.quantization.types import KINDS, promoted

QUIET: dict[str, Any] = {"on_fallback": lambda fallback: None}
GOLDEN_RUNS = [(version, case) for case in GOLDEN_CASES for version in case.kinds]
EXPERTS = "model.layers.0.block_sparse_moe.experts"
FUTURE = {"1.0.0": "0.8", "1.1.0": "0.9", "1.2.0": "0.9"}
"""Whose rules the client of a version follows."""


def recipe_of(case: Case) -> Recipe | None:
    if case.topology is None:
        return None
    return parse_recipe("".join(f"{selector}:\n  isq: {kind or 'null'}\n" for selector, kind in case.topology.items()))


def header_of(path: Path) -> tuple[list[tuple[str, Any]], dict[str, str]]:
    """Entries in their order, with dtype, shape and place; and the metadata."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = header.pop("__metadata__", {})
    return list(header.items()), metadata


def without_maker(report: Path) -> str:
    document = json.loads(report.read_text())
    del document["generated_by"]
    return json.dumps(document)


@pytest.mark.parametrize(("version", "case"), GOLDEN_RUNS, ids=[f"{v}-{case.name}" for v, case in GOLDEN_RUNS])
def test_files_are_the_clients(version: str, case: Case, tmp_path: Path) -> None:
    """Of every type: header but for ``__metadata__``, layers (the sign of exempt zeros aside), and the report."""
    case.model.write(tmp_path / "source")
    for kind in case.kinds[version]:
        result = quantize_model(
            tmp_path / "source",
            tmp_path / kind,
            [kind],
            recipe=recipe_of(case),
            version=version[:3],
            engine=FUTURE[version],  # type: ignore[arg-type]
            dtype=case.dtype.lower(),
            engine_biases=True,
            **QUIET,
        )
        theirs = GOLDEN / "v1" / version / case.name / f"{kind}-0.uqff"
        made = result.path / theirs.name
        assert header_of(made)[0] == header_of(theirs)[0]
        with uqff.open(made) as ours, uqff.open(theirs) as golden:
            for key, (weight, bias) in golden.items():
                assert same_weight(ours[key].weight, weight), (kind, key)
                assert same_bytes(ours[key].bias, bias), (kind, key)
        if version != "1.0.0":
            assert without_maker(result.path / "uqff_report.json") == without_maker(
                theirs.with_name(f"{kind}.uqff_report.json")
            )


def test_nearly_all_files_are_equal_to_the_last_byte(tmp_path: Path) -> None:
    """A file without exempt zeros has the client's data as it is, behind a header of its own."""
    case = next(case for case in GOLDEN_CASES if case.name == "qwen2-mixed-bf16")
    case.model.write(tmp_path / "source")
    given = {"recipe": recipe_of(case), "dtype": "bf16", "engine_biases": True, **QUIET}
    quantize_model(tmp_path / "source", tmp_path / "out", ["q8_0"], **given)
    ours, theirs = (
        (folder / "q8_0-0.uqff").read_bytes()
        for folder in (tmp_path / "out", GOLDEN / "v1" / "1.2.0" / "qwen2-mixed-bf16")
    )
    assert ours[8 + int.from_bytes(ours[:8], "little") :] == theirs[8 + int.from_bytes(theirs[:8], "little") :] != b""


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    """A tied llama checkpoint, 256 wide, with a head that nobody reads."""
    TinyModel(hidden_size=256, intermediate_size=256, tied=True).write(tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    tensors["lm_head.weight"] = torch.ones(64, 256)
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    return tmp_path / "source"


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    """A llama checkpoint, 256 wide."""
    TinyModel(hidden_size=256, intermediate_size=256).write(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def mixtral(tmp_path: Path) -> Path:
    """Three experts in one layer, 64 x 32."""
    TinyMixtral(experts=3).write(tmp_path / "source")
    return tmp_path / "source"


def kinds_in(path: Path) -> dict[str, str]:
    with uqff.open(path) as file:
        return {key: layer.weight.kind for key, layer in file.items()}


def test_what_a_tied_model_has(tied: Path, tmp_path: Path) -> None:
    """1.2: the embedding, promoted, is a layer and the head; before: a head as asked for, and a dense embedding."""
    for format, layer, kind, dense in (
        ("1.0", "lm_head", "q4k", True),
        ("1.1", "lm_head", "q4k", True),
        ("1.2", "model.embed_tokens", "q6k", False),
    ):
        quantize_model(tied, tmp_path / format, ["q4k"], version=format)
        stored = kinds_in(tmp_path / format)
        assert stored.pop(layer) == kind
        assert set(stored.values()) == {"q4k"}
        assert not {"lm_head", "model.embed_tokens"} & stored.keys()
        with uqff.open(tmp_path / format) as file:
            assert str(file.version) == f"{format}.0"
            assert ("model.embed_tokens.weight" in file.residual) == dense
            assert "lm_head.weight" not in file.residual
            assert all("norm" in name or "embed" in name for name in file.residual)


def test_metadata(tied: Path, tmp_path: Path) -> None:
    """Of layers and residual alike: none in 1.0; since 1.1 who made it, and the version."""
    for format in ("1.0", "1.1", "1.2"):
        quantize_model(tied, tmp_path / format, ["q4k"], version=format)
        for name in ("q4k-0.uqff", "residual.safetensors"):
            with safe_open(tmp_path / format / name, "pt") as file:
                expected = {"uqff.producer": "uqff", "uqff.version": f"{format}.0"}
                expected["uqff.producer.uqff.version"] = uqff.__version__
                assert file.metadata() == (None if format == "1.0" else expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("hqq4", "hqq8", "fp8", "f8q8", "mxfp4")])
def test_head_and_embedding_are_promoted(kind: str, untied: Path, tmp_path: Path) -> None:
    """To the engine's type, whatever the family; not if that is switched off, and it is no fallback."""
    better = quantize_model(untied, tmp_path / "better", [kind]).outputs[0]
    plain = quantize_model(untied, tmp_path / "plain", [kind], promote=False).outputs[0]
    assert better.fallbacks == plain.fallbacks == []
    for output, folder, expected in ((better, "better", promoted(kind)), (plain, "plain", kind)):
        stored = kinds_in(tmp_path / folder)
        assert {stored.pop("lm_head"), stored.pop("model.embed_tokens")} == {expected}
        assert set(stored.values()) == {kind}
        changed = [layer.module for layer in output.layers if layer.promoted]
        assert changed == (["lm_head", "model.embed_tokens"] if expected != kind else [])


def test_families_that_are_not_promoted(untied: Path, tmp_path: Path) -> None:
    kinds = ["hqq4", "fp8", "f8q8", "mxfp4", "unquant"]
    result = quantize_model(untied, tmp_path / "out", kinds)
    for output in result.outputs:
        assert {(layer.stored, layer.promoted) for layer in output.layers} == {(output.kind, False)}


def test_a_recipe_counts_before_promotion(untied: Path, tmp_path: Path) -> None:
    """A type that it names is taken as it is; an entry without one leaves the promoted default."""
    text = "/lm_head/:\n  isq: q4k\n/embed_tokens/:\n  device: cpu\n/down/:\n  isq: q5k\n"
    recipe = parse_recipe(text)
    (tmp_path / "recipe.yml").write_text(text, "utf-8")
    output = quantize_model(untied, tmp_path / "out", ["q4k"], recipe=tmp_path / "recipe.yml").outputs[0]
    stored = {layer.module: (layer.default, layer.requested, layer.promoted) for layer in output.layers}
    assert stored["lm_head"] == ("q4k", "q4k", False)
    assert stored["model.embed_tokens"] == ("q4k", "q6k", True)
    assert stored["model.layers.0.mlp.down_proj"] == ("q4k", "q5k", False)
    assert kinds_in(tmp_path / "out") == {module: kind for module, (_, kind, _) in stored.items()}
    document = result_document(quantize_model(untied, tmp_path / "again", ["q4k"], recipe=recipe))
    assert document["outputs"][0]["promoted"] == [{"module": "model.embed_tokens", "from": "q4k", "to": "q6k"}]
    details = {layer["module"]: layer for layer in document["outputs"][0]["layer_details"]}
    assert details["lm_head"]["resolved_target"] == "q4k"
    assert "index" not in details["lm_head"]


def test_a_fallback_of_a_promoted_layer(tmp_path: Path) -> None:
    """The promoted type does not fit either: that is the fallback, from the type it would have had."""
    TinyModel(hidden_size=96, intermediate_size=96, heads=2).write(tmp_path / "source")
    output = quantize_model(tmp_path / "source", tmp_path / "out", ["q4k"], **QUIET).outputs[0]
    assert {(f.requested, f.resolved) for f in output.fallbacks if "proj" not in str(f.module)} == {("q6k", "q5_1")}
    report = read_report(tmp_path / "out")
    assert report is not None
    head = report.outputs[0].layer_details[0]
    assert (head.module, head.default_target, head.resolved_target, head.stored) == ("lm_head", "q4k", "q6k", "q5_1")
    assert report.outputs[0].fallback_count == 0


def test_several_types_in_one_run(untied: Path, tmp_path: Path) -> None:
    """Each as it is alone; one residual, one report of all."""
    together = quantize_model(untied, tmp_path / "both", ["q4k", "afq3"])
    report = read_report(together.path)
    assert report is not None
    assert [(output.quant, output.shards) for output in report.outputs] == [
        ("q4k", ("q4k-0.uqff",)),
        ("afq3", ("afq3-0.uqff",)),
    ]
    for at, kind in enumerate(("q4k", "afq3")):
        alone = quantize_model(untied, tmp_path / kind, [kind])
        for name in (f"{kind}-0.uqff", "residual.safetensors"):
            assert (together.path / name).read_bytes() == (alone.path / name).read_bytes()
        own = read_report(alone.path)
        assert own is not None
        assert own.outputs[0] == report.outputs[at]


def test_shards(untied: Path, tmp_path: Path) -> None:
    """Cut between entries where the payload is full; named in the report, the same layers."""
    quantize_model(untied, tmp_path / "whole", ["q4k"])
    result = quantize_model(untied, tmp_path / "cut", ["q4k"], shard_bytes=40_000)
    names = [f"q4k-{n}.uqff" for n in range(8)]
    assert result.outputs[0].shards == names
    assert result.outputs[0].nbytes == sum((tmp_path / "cut" / name).stat().st_size for name in names)
    report = read_report(tmp_path / "cut")
    assert report is not None
    assert report.outputs[0].shards == tuple(names)
    with uqff.open(tmp_path / "whole") as whole, uqff.open(tmp_path / "cut") as cut:
        assert {key: cut[key] for key in cut} == {key: whole[key] for key in whole}


def stack(source: Path, name: str) -> torch.Tensor:
    tensors = load_file(source / "model.safetensors")
    return torch.stack([tensors[f"{EXPERTS}.{expert}.{name}.weight"] for expert in range(3)])


@pytest.mark.parametrize("kind", ["q4_0", "q5k", "afq3", "unquant"])
def test_experts_are_stacked(kind: str, mixtral: Path, tmp_path: Path) -> None:
    """Quantised expert by expert and written so: the bytes of the whole stack."""
    result = quantize_model(mixtral, tmp_path / "out", [kind], **QUIET)
    with uqff.open(tmp_path / "out") as file:
        for projection, name in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            expected = uqff.quantize(stack(mixtral, name), kind, on_fallback=lambda fallback: None)
            assert file[f"{EXPERTS}.{projection}_proj"].weight == expected
    layers = {layer.module: layer for layer in result.outputs[0].layers}
    down = layers[f"{EXPERTS}.down_proj"]
    assert down.shape == (3, 64, 32)
    expected = uqff.quantize(stack(mixtral, "w2"), kind, on_fallback=lambda fallback: None)
    error = expected.dequantize() - stack(mixtral, "w2")
    assert down.distance.largest == error.abs().max().item()
    assert down.distance.rms == pytest.approx(error.double().pow(2).mean().sqrt().item(), rel=1e-6, abs=1e-12)
    assert down.nbytes == sum(place.nbytes for place in file.places(f"{EXPERTS}.down_proj").values())


def test_stacks_with_scales_across_experts(mixtral: Path, tmp_path: Path) -> None:
    """HQQ, FP8 and F8Q8 in 1.1: quantised as one weight, also beside a type that is not."""
    kinds = ["hqq8", "fp8", "q8_0", "f8q8"]
    quantize_model(mixtral, tmp_path / "out", kinds, version="1.1")
    for kind in kinds:
        with uqff.open(tmp_path / "out" / f"{kind}-0.uqff") as file:
            assert file[f"{EXPERTS}.up_proj"].weight == uqff.quantize(stack(mixtral, "w3"), kind)


@pytest.mark.parametrize("joined", ["Mixtral", "Qwen3Moe"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("format", ["0.2", "1.2"])
def test_joined_experts(joined: str, transposed: bool, format: str, tmp_path: Path) -> None:
    """Checkpoints that hold all experts in two tensors, either way round, make the same model."""
    write(joined, tmp_path / "single")
    write(joined, tmp_path / "joined", joined=True, transposed=transposed)
    for name in ("single", "joined"):
        quantize_model(tmp_path / name, tmp_path / f"{name}-made", ["q8_0"], version=format)
    for file in ("q8_0-0.uqff", "residual.safetensors"):
        assert (tmp_path / "joined-made" / file).read_bytes() == (tmp_path / "single-made" / file).read_bytes()


@pytest.mark.parametrize(
    ("kind", "format", "error", "problem"),
    [
        ("hqq4", "1.2", UnsupportedError, "stacked HQQ weights no longer exist"),
        ("fp8", "1.2", UnsupportedError, "stacked FP8 weights no longer exist"),
        ("f8q8", "1.2", UnsupportedError, "stacked F8Q8 weights no longer exist"),
        (
            "mxfp4",
            "1.2",
            ShapeError,
            r"the shape cannot be mxfp4: expected a matrix: the engine quantises no stack of experts",
        ),
        ("mxfp4", "1.0", ShapeError, "the shape cannot be mxfp4"),
        ("afq4", "1.0", UnsupportedError, "Unquant layers did not exist yet"),
    ],
)
def test_experts_that_cannot_be(
    kind: str, format: str, error: type[Exception], problem: str, mixtral: Path, tmp_path: Path
) -> None:
    """Refused before any work, and the layer is named; a recipe that gives them another type helps."""
    with pytest.raises(error, match=rf"{problem}.*layer {EXPERTS}.down_proj"):
        quantize_model(mixtral, tmp_path / "out", [kind], version=format)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    recipe = parse_recipe(r"/experts\.[0-9]+\.w[123]\.weight$/:" + "\n  isq: q8_0\n")
    assert quantize_model(mixtral, tmp_path / "out", [kind], version=format, recipe=recipe).unmatched == []
    assert kinds_in(tmp_path / "out")[f"{EXPERTS}.down_proj"] == "q8_0"


@pytest.mark.parametrize(
    ("name", "joined", "selector", "chosen"),
    [
        ("Qwen3Moe", False, r"experts\.0\.up_proj\.weight$", {"up"}),
        ("Qwen3Moe", False, r"experts\.up_proj", set()),
        ("Qwen3Moe", False, r"experts\.1\.up_proj", set()),
        ("Qwen3Moe", True, r"experts\.gate_up_proj\.weight$", {"gate", "up"}),
        ("Qwen3Moe", True, r"experts\.gate_proj", set()),
        ("Qwen3Moe", True, r"experts\.0\.", set()),
        ("Qwen3Moe", True, r"experts\.down_proj", {"down"}),
        ("Mixtral", False, r"experts.*gate_proj", set()),
        ("Mixtral", False, r"down_proj", set()),
        ("Mixtral", False, r"experts\.0\.w3", {"up"}),
        ("Mixtral", False, r"experts.*gate", set()),
        ("Mixtral", True, r"down_proj", {"down"}),
        ("Mixtral", True, r"w2", set()),
    ],
)
def test_names_of_experts_in_recipes(name: str, joined: bool, selector: str, chosen: set[str], tmp_path: Path) -> None:
    """By the first expert or by the joined tensor, as the engine has it; not by another or the stack's own path."""
    write(name, tmp_path / "source", joined=joined)
    recipe = parse_recipe(f"/{selector}/:\n  isq: q4_0\n")
    result = quantize_model(tmp_path / "source", tmp_path / "out", ["q8_0"], recipe=recipe)
    experts = {key: kind for key, kind in kinds_in(tmp_path / "out").items() if "experts" in key}
    assert {key for key, kind in experts.items() if kind == "q4_0"} == {
        key for key in experts if any(key.endswith(f".{each}_proj") for each in chosen)
    }
    assert bool(result.unmatched) == (not chosen)


def test_progress_goes_by_experts(mixtral: Path, tmp_path: Path) -> None:
    steps: list[Step] = []
    quantize_model(mixtral, tmp_path / "out", ["q8_0"], progress=steps.append)
    of_experts = [step for step in steps if step.key == f"{EXPERTS}.down_proj"]
    assert [step.done for step in of_experts] == [2, 2, 3]
    assert len(steps) == 10 + 3 * 2
    assert (steps[-1].done, steps[-1].work_done) == (steps[-1].total, steps[-1].work) == (10, steps[0].work)


def test_checkpoints_with_wrong_experts(mixtral: Path, tmp_path: Path) -> None:
    """Each is refused with its name, and nothing is written."""
    good = load_file(mixtral / "model.safetensors")
    single = {name: tensor for name, tensor in good.items() if ".experts." not in name}
    one = f"{EXPERTS}.1.w2"
    pair = {f"{EXPERTS}.gate_up_proj": torch.zeros(3, 64, 64), f"{EXPERTS}.down_proj": torch.zeros(3, 64, 32)}
    cases: list[tuple[dict[str, torch.Tensor], type[Exception], str]] = [
        (good | {f"{one}.weight": torch.zeros(64, 31)}, ShapeError, rf"experts of several shapes.*layer {one}"),
        (good | {f"{one}.bias": torch.zeros(64)}, UnsupportedError, rf"no biases of experts.*layer {one}"),
        (single, FormatError, rf"the checkpoint lacks a weight.*got {EXPERTS}.0.w2.weight"),
        (single | pair | {f"{EXPERTS}.down_proj": torch.zeros(3, 64, 33)}, ShapeError, "experts of another shape"),
        (single | {name: tensor[:2] for name, tensor in pair.items()}, ShapeError, "too few experts"),
        (single | {name: tensor[0] for name, tensor in pair.items()}, ShapeError, "experts of another shape"),
    ]
    for tensors, error, problem in cases:
        save_file(tensors, mixtral / "model.safetensors")
        with pytest.raises(error, match=problem):
            quantize_model(mixtral, tmp_path / "out", ["q8_0"])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    nan = good[f"{one}.weight"].clone()
    nan[3, 5] = float("nan")
    save_file(good | {f"{one}.weight": nan}, mixtral / "model.safetensors")
    with pytest.raises(FormatError, match=rf"nan at \(3, 5\) \(layer {EXPERTS}.down_proj"):
        quantize_model(mixtral, tmp_path / "out", ["q8_0"])


def test_layers_by_pattern(mixtral: Path, tmp_path: Path) -> None:
    """Of a known architecture stacks are found by any name; of another, matrices and stacks as they are."""
    quantize_model(mixtral, tmp_path / "known", ["q8_0"], layers=Pattern(r"experts\.2\.w1|o_proj"))
    assert list(kinds_in(tmp_path / "known")) == [f"{EXPERTS}.gate_proj", "model.layers.0.self_attn.o_proj"]
    (mixtral / "config.json").write_text('{"architectures": ["BertModel"]}')
    tensors = load_file(mixtral / "model.safetensors")
    whole = torch.stack([tensors.pop(f"{EXPERTS}.{expert}.w1.weight") for expert in range(3)])
    save_file(tensors | {"all.weight": whole, "flat.weight": torch.ones(4)}, mixtral / "model.safetensors")
    with pytest.raises(UnsupportedError, match="unknown architecture"):
        quantize_model(mixtral, tmp_path / "no", ["q8_0"])
    quantize_model(mixtral, tmp_path / "other", ["q8_0"], layers=Pattern(r"all|flat|o_proj"))
    with uqff.open(tmp_path / "other") as file:
        assert list(file) == ["all", "model.layers.0.self_attn.o_proj"]
        assert file["all"].weight == uqff.quantize(whole, "q8_0")
        assert "flat.weight" in file.residual
        assert "all.weight" not in file.residual
    with pytest.raises(FormatError, match="no weight matches"):
        quantize_model(mixtral, tmp_path / "no", ["q8_0"], layers=Pattern("flat"))


def test_gemmas_say_that_they_are_tied(tmp_path: Path) -> None:
    """Their authors' config.json leaves it out, and the engine would look for a head; before 1.2 it never does."""
    write("Gemma2", tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    del config["tie_word_embeddings"]
    path.write_text(json.dumps(config))
    stated = {"tie_word_embeddings": True, "quantization_config": {"quant_method": "uqff"}}
    for format, told in (("1.2", config | stated), ("1.1", config), ("0.2", config)):
        quantize_model(tmp_path / "source", tmp_path / format, ["q8_0"], version=format)
        assert json.loads((tmp_path / format / "config.json").read_text()) == told
    path.write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.ones(64, 64)}, tmp_path / "source" / "model.safetensors")
    with pytest.raises(UnsupportedError, match="head and embedding of this architecture are one matrix"):
        quantize_model(tmp_path / "source", tmp_path / "no", ["q8_0"])


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_is_bounded_by_an_expert_not_by_the_stack(tmp_path: Path) -> None:
    """A stack of 50 MB with 100 MB of float32 each; an expert has 2 + 4 + 1 MB."""
    experts, width, inner = 24, 1024, 1024
    tensors = {
        f"{EXPERTS}.{expert}.{name}.weight": torch.full((rows, width), 0.5, dtype=torch.bfloat16)
        for expert in range(experts)
        for name, rows in (("w1", inner), ("w2", 32), ("w3", 32))
    }
    square = torch.ones(64, width).bfloat16()
    tensors |= {f"model.layers.0.self_attn.{name}_proj.weight": square.clone() for name in "qkvo"}
    tensors |= {
        f"{name}.weight": square.clone()
        for name in ("lm_head", "model.embed_tokens", "model.layers.0.block_sparse_moe.gate")
    }
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    config = {"architectures": ["MixtralForCausalLM"], "num_hidden_layers": 1, "num_local_experts": experts}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    del tensors
    run_child(tmp_path / "source", tmp_path / "first", "1.2", "pass")  # compiles the kernels, if nobody has
    child = run_child(tmp_path / "source", tmp_path / "out", "1.2", "pass")
    assert child.returncode == 0, child.stderr
    growth, peak = map(int, child.stdout.split())
    assert growth < 120
    assert peak < 2 + 4 + 1 + 300


def documents(result: Result) -> Any:
    return json.loads(json.dumps(result_document(result)))


def test_the_report_is_the_results(untied: Path, tmp_path: Path) -> None:
    result = quantize_model(untied, tmp_path / "out", ["q4k"])
    report = read_report(tmp_path / "out")
    assert report is not None
    (output,) = documents(result)["outputs"]
    assert [
        (layer["module"], layer["default_target"], layer["resolved_target"], layer["stored"])
        for layer in output["layer_details"]
    ] == [
        (layer.module, layer.default_target, layer.resolved_target, layer.stored)
        for layer in report.outputs[0].layer_details
    ]
    assert report.generated_by == {"tool": "uqff", "uqff_version": uqff.__version__}
    assert (report.base_model, report.repo_id) == (None, None)


def test_names_in_the_report(untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is said; else the name that the checkpoint has on the hub."""
    monkeypatch.setattr("uqff.checkpoints.checkpoint.fetch", lambda name, choose, **_: untied)
    for name, source, given, expected in (
        ("said", untied, {"base_model": "a/b", "repo_id": "c/d"}, ("a/b", "c/d")),
        ("hub", "who/what", {}, ("who/what", None)),
        ("branch", "hf://who/what@main", {}, ("who/what", None)),
        ("both", "who/what", {"base_model": "a/b"}, ("a/b", None)),
    ):
        quantize_model(source, tmp_path / name, ["q4k"], **given)  # type: ignore[arg-type]
        report = read_report(tmp_path / name)
        assert report is not None
        assert (report.base_model, report.repo_id) == expected


def test_afq_of_misaligned_rows_of_engine_0_8(tmp_path: Path) -> None:
    """0.8.23, which writes 1.1, stores them unquantised, as its golden file; 0.8.12, which writes 1.0, fails."""
    index = json.loads((GOLDEN / "v1" / "1.1.0" / "MANIFEST.json").read_text())["directories"]["qwen2-40-f16"]
    TinyModel(**index["model"]).write(tmp_path / "source")
    options: dict[str, Any] = {"engine": "0.8", "dtype": "f16", "on_fallback": lambda fallback: None}
    quantize_model(tmp_path / "source", tmp_path / "1.1", ["afq4"], version="1.1", **options)
    golden = GOLDEN / "v1" / "1.1.0" / "qwen2-40-f16" / "afq4-0.uqff"
    with uqff.open(golden) as theirs, uqff.open(tmp_path / "1.1") as ours:
        assert {key: ours[key] for key in ours} == {key: theirs[key] for key in theirs}
        assert {layer.weight.kind for layer in theirs.values()} == {"unquant"}
    with pytest.raises(ShapeError, match="the shape cannot be afq4"):
        quantize_model(tmp_path / "source", tmp_path / "1.0", ["afq4"], version="1.0", **options)
