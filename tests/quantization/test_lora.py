"""Adapters merged by `quantize`: the bytes that come of what PEFT has merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import uqff
from tests.support.lora_files import exact_numbers, factors, write_adapter
from tests.support.lora_models import write_gpt2, write_llama, write_qwen3_moe
from tests.support.small_models import config_of
from tools.tiny.models import TinyModel
from uqff.cli import main
from uqff.errors import FormatError
from uqff.models.architectures import layer_names
from uqff.models.patterns import Pattern
from uqff.models.shapes import expected_shape
from uqff.quantization.result import result_document

KINDS = ["q4k", "q8_0", "hqq4", "afq4", "fp8", "unquant"]


def same_files(ours: Path, theirs: Path) -> None:
    names = sorted(path.name for path in theirs.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


def test_merged_is_what_peft_has_merged(llama: Path, tmp_path: Path) -> None:
    """Byte for byte: every type, the residual, the configuration, the report."""
    lora: list[Path | tuple[str, float]] = [llama / "one", (str(llama / "two"), -0.5)]
    made = uqff.quantize_model(llama / "base", tmp_path / "ours", KINDS, lora=lora, on_fallback=lambda _: None)
    uqff.quantize_model(llama / "merged", tmp_path / "theirs", KINDS, on_fallback=lambda _: None)
    same_files(tmp_path / "ours", tmp_path / "theirs")
    assert [(each.path, each.weight, each.matrices) for each in made.lora] == [
        (llama / "one", 1.0, 14),
        (llama / "two", -0.5, 2),
    ]
    assert result_document(made)["lora"][1] == {
        "path": str(llama / "two"),
        "weight": -0.5,
        "matrices": 2,
        "missing": [],
    }
    plain = uqff.quantize_model(llama / "base", tmp_path / "plain", ["q8_0"])
    assert (tmp_path / "plain" / "q8_0-0.uqff").read_bytes() != (tmp_path / "ours" / "q8_0-0.uqff").read_bytes()
    assert result_document(plain)["lora"] == []


def test_the_command(llama: Path, tmp_path: Path) -> None:
    """A colon and a number behind the directory are the weight; what is done is said."""
    arguments = ["quantize", str(llama / "base"), str(tmp_path / "ours"), "--isq=q8_0", "--format=0.2"]
    done = CliRunner().invoke(main, [*arguments, f"--lora={llama / 'one'}", f"--lora={llama / 'two'}:-5e-1"])
    assert done.exit_code == 0, done.output
    lines = [" ".join(line.split()) for line in done.output.splitlines() if line.startswith("  adapter")]
    assert lines == [f"adapter {llama / 'one'}: 14 matrices", f"adapter {llama / 'two'}: 2 matrices, times -0.5"]
    uqff.quantize_model(llama / "merged", tmp_path / "theirs", "q8_0", version="0.2")
    same_files(tmp_path / "ours", tmp_path / "theirs")
    part = write_adapter(tmp_path / "part", factors("lm_head", 96, 64), target_modules=["lm_head", "up_proj"])
    done = CliRunner().invoke(main, [*arguments, "--force", "--quiet", f"--lora={part}"])
    told = f"uqff: adapter: {part} has no factors for 2 layers that its configuration names"
    assert done.output == f"{told}, such as model.layers.0.mlp.up_proj\n"
    done = CliRunner().invoke(main, [*arguments, "--force", f"--lora={llama / 'three'}"])
    assert done.exit_code == 2
    assert f"no such directory: {llama / 'three'}" in done.output


def test_what_is_merged_is_not_rounded_before_it_is_quantised(tmp_path: Path) -> None:
    """Of a bfloat16 checkpoint: the float32 sums are quantised; plain layers and the residual are rounded once."""
    TinyModel(hidden_size=64, heads=2, intermediate_size=128, weight_dtype="BF16").write(tmp_path / "base")
    base = load_file(tmp_path / "base" / "model.safetensors")
    up, q = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"
    made = factors(up, 128, 64, seed=3)
    lora = write_adapter(tmp_path / "lora", made, r=2, lora_alpha=0.25)
    uqff.quantize_model(tmp_path / "base", tmp_path / "made", ["q8_0", "afq4", "unquant"], lora=lora)
    delta = made[f"{up}.lora_B.weight"] @ made[f"{up}.lora_A.weight"] * 0.125
    total = base[f"{up}.weight"].float() + delta
    assert (total.bfloat16().float() != total).any()
    with uqff.open(tmp_path / "made", "q8_0") as file:
        assert (file[up].weight.dequantize() == uqff.quantize(total, "q8_0").dequantize()).all()
        rounded = uqff.quantize(total.bfloat16(), "q8_0").dequantize()
        assert (file[up].weight.dequantize() != rounded).any()
        assert (file[q].weight.dequantize() == uqff.quantize(base[f"{q}.weight"], "q8_0").dequantize()).all()
    with uqff.open(tmp_path / "made", "afq4") as file:
        weight = file[up].weight
        expected = uqff.quantize(total, "afq4")
        assert weight.nbytes < expected.nbytes, "scales in the load dtype"
        codes = [next(iter(each.parts.values())).array() for each in (weight, expected)]
        assert (codes[0] == codes[1]).all()
    with uqff.open(tmp_path / "made", "unquant") as file:
        assert (file[up].weight.dequantize(torch.bfloat16) == total.bfloat16()).all()


def write_checkpoint(path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")


def moe_tensors(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All matrices of a small Qwen3-MoE, its router and its embedding."""
    shapes = {name.weight: expected_shape(config, name) for name in layer_names(config)}
    shapes |= {"model.embed_tokens.weight": (32, 64), "model.layers.0.mlp.gate.weight": (2, 64)}
    return {name: exact_numbers(shape, at) for at, (name, shape) in enumerate(shapes.items())}  # type: ignore[arg-type]


def test_experts_and_their_router(tmp_path: Path) -> None:
    """Factors of single experts, and of the router, which stays in the residual; in either generation."""
    config = config_of("Qwen3Moe")
    tensors = moe_tensors(config)
    write_checkpoint(tmp_path / "base", config, tensors)
    stack = "model.layers.0.mlp.experts"
    chosen = [f"{stack}.1.up_proj", f"{stack}.0.down_proj", "model.layers.0.mlp.gate"]
    made: dict[str, Any] = {}
    for at, path in enumerate(chosen):
        out, inputs = tensors[f"{path}.weight"].shape
        made |= factors(path, out, inputs, seed=at)
    lora = write_adapter(tmp_path / "lora", made, target_modules=[path.split(".", 3)[-1] for path in chosen])
    for path in chosen:
        delta = made[f"{path}.lora_B.weight"] @ made[f"{path}.lora_A.weight"] * 2
        tensors[f"{path}.weight"] = tensors[f"{path}.weight"] + delta
    write_checkpoint(tmp_path / "merged", config, tensors)
    for version in ("0.2", "1.1"):
        for name, given in (("base", lora), ("merged", None)):
            uqff.quantize_model(
                tmp_path / name, tmp_path / f"{name}-{version}", ["q8_0", "f8q8"], version=version, lora=given
            )
        same_files(tmp_path / f"base-{version}", tmp_path / f"merged-{version}")


def test_experts_that_peft_has_merged(tmp_path: Path) -> None:
    """As the release of transformers at hand has them: one by one, or as tensors of all, gate and up joined."""
    write_qwen3_moe(tmp_path)
    made = uqff.quantize_model(tmp_path / "base", tmp_path / "ours", "q8_0", lora=tmp_path / "adapter")
    uqff.quantize_model(tmp_path / "merged", tmp_path / "theirs", "q8_0")
    same_files(tmp_path / "ours", tmp_path / "theirs")
    assert made.lora[0].matrices >= 8 + 1 + 12, "attention, router, experts"


def test_weights_that_lie_as_inputs_by_outputs(tmp_path: Path) -> None:
    """Those of GPT-2: square ones as layers, where no shape tells, the others in the residual."""
    write_gpt2(tmp_path)
    chosen = Pattern(r"attn\.c_proj")
    made = uqff.quantize_model(tmp_path / "base", tmp_path / "ours", "q8_0", layers=chosen, lora=tmp_path / "adapter")
    uqff.quantize_model(tmp_path / "merged", tmp_path / "theirs", "q8_0", layers=chosen)
    same_files(tmp_path / "ours", tmp_path / "theirs")
    assert made.lora[0].matrices == 8


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    """Nothing is written."""
    TinyModel(hidden_size=64, heads=2).write(tmp_path / "base")
    lora = write_adapter(tmp_path / "lora", factors("model.layers.7.mlp.up_proj", 64, 64))
    with pytest.raises(FormatError, match="adapter has factors for no weight of the model") as caught:
        uqff.quantize_model(tmp_path / "base", tmp_path / "made", "q8_0", lora=lora)
    assert caught.value.file == str(lora / "adapter_model.safetensors")
    assert not (tmp_path / "made").exists()


def test_an_interrupted_run_does_not_go_on_with_other_weights(tmp_path: Path) -> None:
    """What a run depends on has the adapters in it, their weights and files."""
    from uqff.checkpoints import open_checkpoint
    from uqff.checkpoints.numbers import NumberFiles
    from uqff.lora import Adapters
    from uqff.quantization.effort import Known
    from uqff.quantization.run import QuantizeJob

    TinyModel(hidden_size=64, heads=2).write(tmp_path / "base")
    lora = write_adapter(tmp_path / "lora", factors("model.layers.0.mlp.up_proj", 64, 64))

    def described(*given: Any) -> Any:
        with open_checkpoint(tmp_path / "base") as checkpoint, Adapters.open(list(given)) as adapters:
            options: dict[str, Any] = {"recipe": None, "layers": None, "base_model": None, "repo_id": None}
            job = QuantizeJob(
                NumberFiles(checkpoint),
                ["q8_0"],
                version="1.2",
                engine="0.9",
                dtype="auto",
                promote=True,
                engine_biases=False,
                measure=True,
                shard_bytes=2**30,
                adapters=adapters,
                known=Known(),
                **options,
            )
            return json.dumps(job.description())

    runs = [described(), described(lora), described((lora, 0.5)), described(lora, lora)]
    assert len(set(runs)) == 4
    assert described(lora) == runs[1]
    assert "lora" not in json.loads(runs[0])
    save_file(
        {f"base_model.model.{k}": v + 1 for k, v in factors("model.layers.0.mlp.up_proj", 64, 64).items()},
        lora / "adapter_model.safetensors",
    )
    assert described(lora) != runs[1]
