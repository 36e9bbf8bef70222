"""What the engine cannot load or run: each line of the table, and where it is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import uqff
from tools.tiny.models import TinyModel
from uqff import DType, UnsupportedError, Version
from uqff.cli import main
from uqff.codec.layer import Layer
from uqff.families.part import Part
from uqff.models.engine import RULES, limits_of, refuse_limits
from uqff.quantization.run import quantize_model
from uqff.quantization.types import planned

V0, V1 = Version(0, 2, 0), Version(1, 2, 0)


def layer(kind: str, *shape: int, bias: str | None = None, dtype: str = "F32") -> Layer:
    stored = None if bias is None else Part.planned((shape[-2],), DType[bias])
    return Layer(planned(kind, shape, DType[dtype]), stored)


def lines(version: Version, **layers: Layer) -> list[str]:
    return list(map(str, limits_of(layers, version)))


def rules(version: Version, made: Layer) -> list[str]:
    return [limit.rule for limit in limits_of({"a": made}, version)]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def test_types_that_are_not_loaded() -> None:
    for kind in ("q8_1", "q8k"):
        assert lines(V1, a=layer(kind, 2, 256), b=layer(kind, 2, 256)) == [
            f"2 {kind} layers: no release loads this type, though all write it"
        ]
        assert rules(V0, layer(kind, 2, 256)) == ["type-not-loaded"]
    assert rules(V1, layer("q8_0", 2, 256)) == rules(V0, layer("q6k", 2, 256)) == []


def test_stacked_experts() -> None:
    """Of AFQ they do not run on a CPU; of types with groups or scales across them they are not loaded."""
    assert lines(V1, a=layer("afq4", 2, 4, 64)) == ["1 stacks of AFQ experts: they do not run on a CPU"]
    for kind in ("hqq8", "fp8", "f8q8"):
        assert rules(Version(1, 1, 0), layer(kind, 2, 4, 64)) == ["stack-not-loaded"]
    assert rules(V1, layer("q4k", 2, 4, 256)) == []
    assert rules(V0, layer("afq4", 4, 64)) == rules(V1, layer("afq4", 4, 64)) == []


def test_biases_that_are_never_added() -> None:
    assert lines(V1, a=layer("fp8", 2, 32, bias="F8E4M3")) == [
        "1 biases of FP8 layers in F8E4M3: no release can add them: it loads the model and then fails"
    ]
    assert rules(V0, layer("fp8", 2, 32, bias="F8E4M3")) == ["bias-not-added"]
    assert rules(V1, layer("hqq8", 2, 32, bias="BF16")) == ["bias-not-added"]
    assert rules(V1, layer("hqq8", 2, 32, bias="F32")) == []
    assert rules(V0, layer("q8_0", 2, 32, bias="BF16")) == ["bias-not-added"]
    assert rules(V0, layer("q8_0", 2, 32, bias="F32")) == []


def test_biases_that_are_added_to_one_dtype() -> None:
    """Every family but HQQ, in 1.x; what `auto` takes otherwise is said."""
    for kind in ("q8_0", "fp8", "f8q8", "mxfp4", "afq4"):
        for dtype in ("F32", "BF16", "F16"):
            assert rules(V1, layer(kind, 2, 64, bias=dtype)) == ["bias-in-one-dtype"]
    text = "1 biases of AFQ layers in {}: they run with activations in {} only, and auto takes {}"
    for dtype, auto in (("F32", "BF16 on a GPU"), ("BF16", "F32 on a CPU"), ("F16", "F32 on a CPU and BF16 on a GPU")):
        assert lines(V1, a=layer("afq4", 2, 64, bias=dtype)) == [text.format(dtype, dtype, auto)]
    assert lines(V0, a=layer("afq4", 2, 64, bias="F16")) == [text.format("F16", "F16", "BF16 on a GPU")]


def test_plain_weights() -> None:
    """Unquantised ones are multiplied in their own dtype; ggml's are cast, but not narrowed, and 0.x loads none."""
    assert lines(V1, a=layer("unquant", 2, 8, dtype="BF16")) == [
        "1 unquant layers in BF16: they run with activations in BF16 only, and auto takes F32 on a CPU"
    ]
    assert rules(V1, layer("unquant", 2, 8, dtype="F64")) == ["weight-not-multiplied"]
    assert rules(V1, layer("f32", 2, 8)) == ["weight-in-one-dtype"]
    assert rules(V1, layer("f16", 2, 8)) == rules(V1, layer("bf16", 2, 8)) == []
    assert {*rules(V0, layer("f32", 2, 8)), *rules(V0, layer("f16", 2, 8))} == {"plain-blocks"}


def test_layers_that_suit_no_activations_together() -> None:
    (*_, line) = lines(V1, a=layer("q8_0", 2, 64, bias="F32"), b=layer("unquant", 2, 8, dtype="BF16"))
    assert line == "2 layers, each for one of F32, BF16: no activations suit all of them, so the model never runs"


def test_every_rule_has_an_authority() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(rule.seen and rule.majors for rule in RULES)


def test_all_limits_are_refused_at_once() -> None:
    limits = limits_of({"a": layer("q8k", 2, 256), "b": layer("fp8", 2, 32, bias="F8E4M3")}, V1)
    with pytest.raises(UnsupportedError, match=r"1 q8k layers: .*; 1 biases of FP8 layers"):
        refuse_limits(limits)
    refuse_limits([])


@pytest.fixture
def biased(tmp_path: Path) -> Path:
    TinyModel("qwen2", hidden_size=64, heads=2, intermediate_size=64).write(tmp_path / "source")
    return tmp_path / "source"


def test_quantize_tells_and_strictly_refuses(biased: Path, tmp_path: Path) -> None:
    """Grouped, one line a reason; of a strict run nothing is left."""
    made = run("quantize", biased, tmp_path / "out", "--isq", "q8_1", "--isq", "fp8", "--engine-biases", "--quiet")
    assert made.exit_code == 0
    said = [line for line in made.stderr.splitlines() if "lost something" not in line]
    assert said == [
        "uqff: q8_1: 7 q8_1 layers: no release loads this type, though all write it",
        "uqff: q8_1: 3 biases of GGUF layers in F32: they run with activations in F32 only, "
        "and auto takes BF16 on a GPU",
        "uqff: fp8: 3 biases of FP8 layers in F8E4M3: no release can add them: it loads the model and then fails",
    ]
    document = json.loads(run("quantize", biased, tmp_path / "json", "--isq", "q8_1", "--json").stdout)
    assert [limit["rule"] for limit in document["outputs"][0]["limits"]] == ["type-not-loaded", "bias-in-one-dtype"]
    assert len(document["outputs"][0]["limits"][1]["layers"]) == 3
    for kind in ("q8_1", "fp8"):
        refused = run("quantize", biased, tmp_path / "strict", "--isq", kind, "--strict")
        assert refused.exit_code != 0
        assert "the engine could not load or run this" in refused.stderr
        assert not (tmp_path / "strict").exists()
    assert run("quantize", biased, tmp_path / "hqq", "--isq", "hqq8", "--strict").exit_code == 0


def test_migrate_and_verify_tell(biased: Path, tmp_path: Path) -> None:
    quantize_model(biased, tmp_path / "old", ["fp8"], version="0.2", engine_biases=True)
    migrated = run("migrate", tmp_path / "old", tmp_path / "new", "--json")
    assert [limit["rule"] for limit in json.loads(migrated.stdout)["models"][0]["limits"]] == ["bias-not-added"]
    assert "no release can add them" in migrated.stderr
    refused = run("migrate", tmp_path / "old", tmp_path / "strict", "--strict")
    assert (refused.exit_code != 0, (tmp_path / "strict").exists()) == (True, False)
    assert "the engine could not load or run this" in refused.stderr
    verified = run("verify", tmp_path / "new")
    assert (verified.exit_code, verified.stdout.count("note: ")) == (0, 2)
    assert "note: 3 biases of FP8 layers in F8E4M3: no release can add them" in verified.stdout


def test_a_model_without_limits_says_nothing(tmp_path: Path) -> None:
    TinyModel(hidden_size=64, heads=2, intermediate_size=64).write(tmp_path / "source")
    made = run("quantize", tmp_path / "source", tmp_path / "out", "--isq", "q8_0", "--strict", "--quiet")
    assert (made.exit_code, made.stderr) == (0, "")
    assert "note" not in run("verify", tmp_path / "out").stdout
    with uqff.open(tmp_path / "out") as file:
        assert file["lm_head"].weight.kind == "q8_0"
