"""Whole models with adapters: PEFT's weights to the bit where they are merged, its logits where they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import uqff
from tests.parallel.ranks import run_ranks
from tests.support.lora_files import exact_numbers, factors, write_adapter
from tests.support.lora_models import write_llama
from uqff.errors import FormatError, ShardError
from uqff.parallel.comm import Comm
from uqff.parallel.layer import QuantizedLinear

IDS = [[3, 14, 15, 92, 65, 35, 89]]
CLOSE = 2e-6
"""Relative: some sums of float32 in another order."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_llama(tmp_path_factory.mktemp("llama"))
    uqff.quantize_model(folder / "base", folder / "q8_0", "q8_0")
    return folder


def adapters(folder: Path) -> list[Any]:
    return [folder / "one", (folder / "two", -0.5)]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        made: torch.Tensor = model(torch.tensor(IDS)).logits
    return made


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def linears(model: torch.nn.Module) -> dict[str, QuantizedLinear]:
    return {
        name.removesuffix(".rows"): module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def test_a_checkpoint_has_the_weights_that_peft_has_merged(llama: Path) -> None:
    """Every one, to the bit; beside the weights the model says the same."""
    expected = load_file(llama / "merged" / "model.safetensors")
    model = uqff.load_model(llama / "base", lora=adapters(llama))
    found = linears(model)
    assert len(found) == 16
    for path, layer in found.items():
        assert torch.equal(layer.dequantize_w(), expected[f"{path}.weight"]), path
        assert layer.lora is None
    beside = uqff.load_model(llama / "base", lora=adapters(llama), merge_lora=False)
    base = load_file(llama / "base" / "model.safetensors")
    for path, layer in linears(beside).items():
        assert torch.equal(layer.dequantize_w(), base[f"{path}.weight"]), path
        assert (layer.lora is None) == (path == "model.embed_tokens")
    assert distance(logits(beside), logits(model)) < CLOSE
    assert distance(logits(uqff.load_model(llama / "base")), logits(model)) > 100 * CLOSE


def plain_of_quantised(folder: Path) -> torch.Tensor:
    """What transformers says with the quantised weights as numbers, and what PEFT has added to the plain ones."""
    from transformers import AutoModelForCausalLM

    base, merged = (load_file(folder / name / "model.safetensors") for name in ("base", "merged"))
    model = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    with uqff.open(folder / "q8_0") as file:
        weights = {f"{key}.weight": weight.dequantize() for key, (weight, _) in file.items()}
    model.load_state_dict(
        {name: merged[name] - base[name] + weights.get(name, base[name]) for name in base}, strict=True
    )
    return logits(model)


def rank_logits(comm: Comm, folder: Path) -> list[Any]:
    made = []
    for name in ("q8_0", "base"):
        model = uqff.load_model(folder / name, comm, lora=adapters(folder))
        assert linears(model)["model.layers.0.mlp.up_proj"].weight.kind == {"base": "unquant"}.get(name, name)
        made.append(logits(model).numpy())
    if comm.world_size > 1:
        with pytest.raises(ShardError, match="ranks"):
            uqff.load_model(folder / "base", comm, lora=(folder / "one", 1.0 + comm.rank))
    return made


@pytest.mark.parametrize("world_size", [1, 2])
def test_beside_quantised_weights_nothing_is_lost(world_size: int, llama: Path) -> None:
    """On any number of ranks, which must all have the same adapters."""
    expected = plain_of_quantised(llama), logits(uqff.load_model(llama / "base", lora=adapters(llama)))
    ranks = [rank_logits(Comm(), llama)] if world_size == 1 else run_ranks(world_size, rank_logits, llama)
    for made in ranks:
        assert all((a == b).all() for a, b in zip(made, ranks[0], strict=True))
        for ours, theirs in zip(made, expected, strict=True):
            assert distance(torch.from_numpy(ours), theirs) < CLOSE


def test_quantised_weights_are_made_anew_where_adapters_are_merged(llama: Path) -> None:
    model = uqff.load_model(llama / "q8_0", lora=llama / "one", merge_lora=True)
    plain = linears(uqff.load_model(llama / "q8_0"))
    with uqff.lora.open_adapter(llama / "one") as adapter:
        for path, layer in linears(model).items():
            assert layer.lora is None
            if path in adapter:
                total = plain[path].dequantize_w() + torch.from_numpy(adapter[path].delta())
                assert layer.weight == uqff.quantize(total, "q8_0", engine="0.8"), path


def test_a_checkpoint_that_others_quantised(llama: Path, tmp_path: Path) -> None:
    """FP8: adapters stand beside the codes; quantised to another type, they are added to the numbers first."""
    numbers = load_file(llama / "base" / "model.safetensors")
    codes: dict[str, torch.Tensor] = {}
    for name, weight in numbers.items():
        codes[name] = weight
        if "_proj" in name:
            scale = weight.abs().max() / 448
            codes[name], codes[f"{name}_scale_inv"] = (weight / scale).to(torch.float8_e4m3fn), scale
            numbers[name] = codes[name].float() * scale
    config = json.loads((llama / "base" / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}
    for folder, tensors, document in (("plain", numbers, config), ("fp8", codes, quantised)):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps(document))
    lora = adapters(llama)
    model = uqff.load_model(tmp_path / "fp8", lora=lora)
    layer = linears(model)["model.layers.0.mlp.up_proj"]
    assert layer.weight.kind == "fp8"
    assert layer.lora is not None
    assert distance(logits(model), logits(uqff.load_model(tmp_path / "plain", lora=lora))) < CLOSE
    for folder in ("plain", "fp8"):
        uqff.quantize_model(tmp_path / folder, tmp_path / f"{folder}-made", "q8_0", lora=lora)
    made, same = (tmp_path / f"{folder}-made" / "q8_0-0.uqff" for folder in ("plain", "fp8"))
    assert made.read_bytes() == same.read_bytes()
    loaded = linears(uqff.load_model(tmp_path / "fp8", lora=lora, isq="q8_0"))
    with uqff.open(same) as file:
        assert all(loaded[key].weight == weight for key, (weight, _) in file.items())


def test_layers_without_factors_are_told(llama: Path, tmp_path: Path) -> None:
    made = factors("model.layers.1.mlp.up_proj", 128, 64)
    lora = write_adapter(tmp_path / "lora", made, target_modules=["up_proj"])
    with pytest.warns(
        uqff.lora.LoraWarning, match=r"no factors for a layer .*, such as model\.layers\.0\.mlp\.up_proj$"
    ):
        model = uqff.load_model(llama / "q8_0", lora=lora)
    assert [path for path, layer in linears(model).items() if layer.lora is not None] == ["model.layers.1.mlp.up_proj"]


def test_adapters_that_do_not_fit(llama: Path, tmp_path: Path) -> None:
    """Of another model."""
    lora = write_adapter(tmp_path / "lora", factors("model.layers.2.mlp.up_proj", 128, 64))
    with pytest.raises(FormatError, match="adapter has factors for no weight of the model") as caught:
        uqff.load_model(llama / "base", lora=lora)
    assert caught.value.file == str(lora / "adapter_model.safetensors")


def test_experts(tmp_path: Path) -> None:
    """A stack of experts, single experts and the router of Qwen3-MoE, of a checkpoint and of what is made of it."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_hidden_layers=2, vocab_size=96,
        mlp_only_layers=[1], decoder_sparse_step=1, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    stack = "model.layers.0.mlp.experts"
    made: dict[str, torch.Tensor] = {}
    for at, (path, out, inputs) in enumerate(
        [(f"{stack}.1.up_proj", 32, 64), (f"{stack}.3.down_proj", 64, 32), ("model.layers.0.mlp.gate", 4, 64)]
    ):
        made |= {name: 16 * each for name, each in factors(path, out, inputs, seed=at).items()}
    single = write_adapter(tmp_path / "single", made, target_modules=["1.up_proj", "3.down_proj", "gate"])
    wide = {
        f"{stack}.lora_A.weight": 16 * exact_numbers((8, 64), 5),
        f"{stack}.lora_B.weight": 16 * exact_numbers((64, 8), 6),
    }
    whole = write_adapter(tmp_path / "whole", wide, target_modules=None, target_parameters=["experts.gate_up_proj"])
    lora: list[Any] = [single, (whole, 0.5)]
    uqff.quantize_model(tmp_path / "base", tmp_path / "merged", "unquant", lora=lora)
    uqff.quantize_model(tmp_path / "base", tmp_path / "plain", "unquant")
    uqff.quantize_model(tmp_path / "base", tmp_path / "old", "unquant", version="0.2")
    expected = uqff.load_model(tmp_path / "merged")
    assert distance(logits(uqff.load_model(tmp_path / "plain")), logits(expected)) > 100 * CLOSE
    for name in ("base", "plain", "old"):
        for merge in (None, False):
            model = uqff.load_model(tmp_path / name, lora=lora, merge_lora=merge)
            assert distance(logits(model), logits(expected)) < CLOSE, (name, merge)
    assert torch.equal(
        uqff.load_model(tmp_path / "base", lora=lora).get_submodule("model.layers.0.mlp.gate").weight,  # type: ignore[arg-type]
        expected.get_submodule("model.layers.0.mlp.gate").weight,  # type: ignore[arg-type]
    )


def test_experts_that_are_called_otherwise(tmp_path: Path) -> None:
    """Those of Mixtral, by the names of checkpoints, which adapters have: w1 is gate_proj, w2 is down_proj."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=64, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, num_attention_heads=4,
        num_key_value_heads=2, num_hidden_layers=1, vocab_size=96, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    path, made = "model.layers.0.block_sparse_moe.experts", dict[str, torch.Tensor]()
    for at, (name, out, inputs) in enumerate([("1.w1", 32, 64), ("3.w2", 64, 32), ("0.w3", 32, 64)]):
        made |= {key: 16 * each for key, each in factors(f"{path}.{name}", out, inputs, seed=at).items()}
    lora = write_adapter(tmp_path / "lora", made, target_modules=["w1", "w2", "w3"])
    for name, adapter in (("merged", lora), ("plain", None)):
        uqff.quantize_model(tmp_path / "base", tmp_path / name, "unquant", lora=adapter)
    expected = logits(uqff.load_model(tmp_path / "merged"))
    assert distance(logits(uqff.load_model(tmp_path / "base")), expected) > 100 * CLOSE
    for name in ("base", "plain"):
        for merge in (None, False):
            model = uqff.load_model(tmp_path / name, lora=lora, merge_lora=merge)
            assert distance(logits(model), expected) < CLOSE, (name, merge)
