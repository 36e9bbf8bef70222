"""Quantised checkpoints through the pipeline: kept where UQFF has a form, requantised where not; and compared with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import uqff
from tests.parallel.checkpoints import write_checkpoint as plain_checkpoint
from tests.parallel.models import TinyCase
from tests.parallel.sources import MATRICES, doubled, ternary
from tests.support.checkpoints import same_bits, write_checkpoint
from tests.support.moe_models import CONFIG
from tools.tiny.models import TinyModel
from tools.tiny.quantised import METHODS, write_quantised
from uqff import UnsupportedError
from uqff.cli import main
from uqff.families import Unquant
from uqff.models.patterns import Pattern
from uqff.quantization.recipe import parse_recipe

UP = "model.layers.0.mlp.up_proj"
EXACT = {"mlx": "afq4", "mxfp4": "mxfp4", "fp8": "fp8", "hqq": "hqq4", "gptq": "afq4", "compressed-tensors": "afq4"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in BF16 with biases."""
    path = tmp_path_factory.mktemp("plain") / "plain"
    TinyModel(architecture="qwen2", hidden_size=64, heads=4, weight_dtype="BF16").write(path)
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["quantize", *map(str, arguments)])


@pytest.mark.parametrize("method", sorted(EXACT))
def test_what_has_a_form_is_carried_over(plain: Path, tmp_path: Path, method: str) -> None:
    """The very records, biases in what their readers add, and a configuration without the method."""
    source = write_quantised(method, plain, tmp_path / "source")
    result = uqff.quantize_model(source, tmp_path / "out", "keep")
    with uqff.open_checkpoint(source) as checkpoint, uqff.open(tmp_path / "out") as file:
        assert len(file) == 9  # 7 projections, embedding and head
        for key in file:
            weight, bias = checkpoint.layer(key)
            assert file[key].weight == weight
            assert (bias is None) == (file[key].bias is None)
            if bias is not None:
                made = file[key].bias
                assert made is not None
                assert torch.equal(made.float(), bias.float())
        assert file[UP].weight.kind == EXACT[method]
        assert file["lm_head"].weight.kind == ("afq4" if method == "mlx" else "unquant")
        assert {*file.residual} == {name for name in checkpoint.tensors if "norm" in name}
    assert result.dtype == "BF16"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "uqff"}
    assert "quantization" not in config
    report = json.loads((tmp_path / "out" / "uqff_report.json").read_text())
    assert report["outputs"][0]["quant"] == "keep"
    assert report["outputs"][0]["fallback_count"] == 0
    (output,) = result.outputs
    assert all(layer.kept and layer.distance.largest == 0 for layer in output.layers)
    assert output.fallbacks == []
    assert not any(each.distance.largest for each in uqff.diff(source, tmp_path / "out") if each.distance is not None)
    uqff.verify(tmp_path / "out")


def test_the_rest_becomes_the_fallback(plain: Path, tmp_path: Path) -> None:
    """Quantised from the float32 numbers of the source, not rounded to the load dtype; the summary tells which."""
    source = write_quantised("fp8-blocks", plain, tmp_path / "source")
    with pytest.raises(UnsupportedError, match=r"cannot be kept: FP8 with several scales has no form.*--fallback KIND"):
        uqff.quantize_model(source, tmp_path / "out", "keep")
    assert not (tmp_path / "out").exists()
    shown = run(source, tmp_path / "out", "--isq", "keep", "--fallback", "q8_0")
    assert shown.exit_code == 0, shown.output
    assert "keep as they were  2 of 9 layers: 2 unquant" in shown.stdout
    assert "fallback: keep -> q8_0, 7 layers: FP8 with several scales has no form in UQFF" in shown.stderr
    with uqff.open_checkpoint(source) as checkpoint, uqff.open(tmp_path / "out") as file:
        numbers = checkpoint.layer(UP).weight.dequantize()
        assert not torch.equal(numbers.bfloat16().float(), numbers)
        assert file[UP].weight == uqff.quantize(numbers, "q8_0")
        head = file["lm_head"].weight
        assert isinstance(head, Unquant)
        assert torch.equal(head.weight, checkpoint.tensors["lm_head.weight"])
    told = run(source, tmp_path / "out", "--isq", "keep", "--fallback", "q8_0", "--force", "--json")
    (output,) = json.loads(told.stdout)["outputs"]
    kept = {layer["module"] for layer in output["layer_details"] if layer["kept"]}
    assert kept == {"lm_head", "model.embed_tokens"}
    assert {each["module"] for each in output["fallbacks"]} == {
        layer["module"] for layer in output["layer_details"]
    } - kept


def test_what_has_no_form_becomes_a_k_quant(tmp_path: Path) -> None:
    """NF4 of rows that are wide enough for blocks of 256."""
    TinyModel(hidden_size=256, heads=4, weight_dtype="BF16").write(tmp_path / "plain")
    source = write_quantised("nf4", tmp_path / "plain", tmp_path / "source")
    told = run(source, tmp_path / "out", "--isq", "keep", "--fallback", "q4k")
    assert told.exit_code == 0, told.output
    with uqff.open_checkpoint(source) as checkpoint, uqff.open(tmp_path / "out") as file:
        assert checkpoint.kind(UP) == "nf4"
        assert file[UP].weight.kind == "q4k"
        assert file[UP].weight == uqff.quantize(checkpoint.layer(UP).weight.dequantize(), "q4k")


@pytest.mark.parametrize("method", sorted(METHODS))
def test_quantised_anew(plain: Path, tmp_path: Path, method: str) -> None:
    source = write_quantised(method, plain, tmp_path / "source")
    uqff.quantize_model(source, tmp_path / "out", ["q4_0"], version="0.2")
    with uqff.open_checkpoint(source) as checkpoint, uqff.open(tmp_path / "out") as file:
        names = [f"model.layers.0.{each}_proj" for each in ("self_attn.q", "self_attn.k", "self_attn.v")]
        for key, name in zip("123", names, strict=True):
            assert file[key].weight == uqff.quantize(checkpoint.layer(name).weight.dequantize(), "q4_0")
        bias = file["1"].bias
        assert bias is not None
        assert bias.shape == (64,)


def test_a_recipe_counts_first(plain: Path, tmp_path: Path) -> None:
    source = write_quantised("mlx", plain, tmp_path / "source")
    recipe = parse_recipe("'/up_proj/':\n  isq: q8_0\n")
    uqff.quantize_model(source, tmp_path / "out", ["keep", "q4_0"], recipe=recipe, promote=False)
    with uqff.open(f"{tmp_path / 'out'}:keep") as kept, uqff.open(f"{tmp_path / 'out'}:q4_0") as other:
        assert (kept[UP].weight.kind, other[UP].weight.kind) == ("q8_0", "q8_0")
        assert (kept["lm_head"].weight.kind, other["lm_head"].weight.kind) == ("afq4", "q4_0")


def test_what_a_version_does_not_have_falls_back(plain: Path, tmp_path: Path) -> None:
    """1.0 has no plain layers."""
    source = write_quantised("mxfp4", plain, tmp_path / "source")
    result = uqff.quantize_model(
        source, tmp_path / "out", "keep", fallback="q8_0", version="1.0", on_fallback=lambda change: None
    )
    (change,) = result.outputs[0].fallbacks
    assert (change.module, change.requested, change.resolved) == ("lm_head", "keep", "q8_0")
    assert change.reason == "Unquant layers did not exist yet"


@pytest.mark.parametrize("names", ["switch_mlp", "experts"])
def test_experts_of_mlx(tmp_path: Path, names: str) -> None:
    """In one tensor a projection, or each by itself: stacks of the file, of the same codes; or the fallback's."""
    stacks = {
        name: torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(1)) for name in ("gate", "up", "down")
    }
    matrices = {"lm_head": torch.ones(32, 32), "model.embed_tokens": torch.ones(32, 32)}
    matrices |= {f"model.layers.0.self_attn.{name}_proj": torch.ones(32, 32) for name in "qkvo"}
    for name, stack in stacks.items():
        path = f"model.layers.0.mlp.{names}"
        one_by_one = {f"{path}.{expert}.{name}_proj": stack[expert] for expert in (0, 1)}
        matrices |= {f"{path}.{name}_proj": stack} if names == "switch_mlp" else one_by_one
    tensors = {"model.layers.0.mlp.gate.weight": torch.ones(2, 32)}
    for path, matrix in matrices.items():
        record: Any = uqff.quantize(matrix, "afq4", group_size=32)
        parts = {"weight": record.w_q.view(torch.uint32), "scales": record.scales, "biases": record.biases}
        tensors |= {f"{path}.{name}": part for name, part in parts.items()}
    config = CONFIG | {"num_hidden_layers": 1, "mlp_only_layers": [], "quantization": {"bits": 4, "group_size": 32}}
    source = write_checkpoint(tmp_path / "source", tensors, **config)
    uqff.quantize_model(source, tmp_path / "kept", ["keep", "q8_0"])
    with uqff.open(f"{tmp_path / 'kept'}:keep") as file, uqff.open(f"{tmp_path / 'kept'}:q8_0") as other:
        for name, stack in stacks.items():
            key = f"model.layers.0.mlp.experts.{name}_proj"
            exact = uqff.quantize(stack, "afq4", group_size=32)
            assert file[key].weight == exact
            assert other[key].weight == uqff.quantize(exact.dequantize(), "q8_0")


def test_torch_is_not_imported(plain: Path, tmp_path: Path) -> None:
    source = write_quantised("mlx", plain, tmp_path / "source")
    code = (
        "import sys, uqff; uqff.quantize_model(sys.argv[1], sys.argv[2], 'keep', measure=False); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(source), str(tmp_path / "out")], check=True)


def test_stacks_of_gpt_oss(tmp_path: Path) -> None:
    """Layers by a pattern, stacks kept as they are, with their biases."""
    generator = torch.Generator().manual_seed(2)
    path = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {
        f"{path}_blocks": torch.randint(0, 256, (2, 64, 2, 16), generator=generator).byte(),
        f"{path}_scales": torch.randint(120, 130, (2, 64, 2), generator=generator).byte(),
        f"{path}_bias": torch.ones(2, 64).bfloat16(),
        "lm_head.weight": torch.randn(32, 64, generator=generator).bfloat16(),
    }
    said = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    source = write_checkpoint(tmp_path / "source", tensors, architectures=["GptOssForCausalLM"], **said)
    uqff.quantize_model(source, tmp_path / "out", ["keep", "q8_0"], layers=Pattern("_proj|lm_head"))
    with uqff.open_checkpoint(source) as checkpoint, uqff.open(f"{tmp_path / 'out'}:keep") as file:
        assert file[path].weight == checkpoint.layer(path).weight
        assert file["lm_head"].weight.kind == "unquant"
        assert not file.residual
        bias = file[path].bias
        assert bias is not None
        assert torch.equal(bias, tensors[f"{path}_bias"])
        with uqff.open(f"{tmp_path / 'out'}:q8_0") as other:
            assert other[path].weight == uqff.quantize(checkpoint.layer(path).weight.dequantize(), "q8_0")


@pytest.mark.parametrize(
    ("source", "alike", "kind"), [("fp8", True, "fp8"), ("fp8", False, "q8_0"), ("hqq", False, "hqq4")]
)
def test_experts_one_by_one(tmp_path: Path, source: str, alike: bool, kind: str) -> None:
    """They are kept as the stack that they make, with their very codes, if it is exact; else requantised."""
    case = TinyCase("qwen3_moe", "unquant", (1, 2, 0))
    tensors, _ = plain_checkpoint(case, tmp_path / "plain")
    made: dict[str, torch.Tensor] = {}
    config: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            made[name] = tensor
            continue
        stored, config = MATRICES[source](name.removesuffix(".weight"), ternary(*tensor.shape))
        made |= stored if alike or ".1." not in name else doubled(stored)
    write_checkpoint(tmp_path / "source", made, **case.config(), quantization_config=config)
    told: list[Any] = []
    uqff.quantize_model(
        tmp_path / "source", tmp_path / "out", "keep", fallback="q8_0", version="1.1", on_fallback=told.append
    )
    stacks = [f"model.layers.0.mlp.experts.{name}_proj" for name in ("gate", "up", "down")]
    assert sorted(each.module for each in told) == ([] if kind != "q8_0" else sorted(stacks))
    with uqff.open(tmp_path / "out") as file, uqff.open_checkpoint(tmp_path / "source") as checkpoint:
        for path in stacks:
            weight = file[path].weight
            assert weight.kind == kind
            single = [f"{path.rpartition('.')[0]}.{at}.{path.rpartition('.')[2]}" for at in range(4)]
            plain = torch.stack([checkpoint.layer(each).weight.dequantize() for each in single])
            assert same_bits(weight.dequantize(), plain) or kind == "q8_0"
