"""gpt-oss: a checkpoint in MXFP4 and in plain numbers, and UQFF made of either, against transformers' own model."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import uqff
from tests.parallel.models import PROMPT
from tests.parallel.ranks import run_ranks
from tests.support.checkpoints import same_bits
from uqff.parallel import Comm, FusedExperts, load_model
from uqff.parallel.generate import generate

pytest.importorskip("transformers.models.gpt_oss", reason="this transformers has no gpt-oss")
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # of torch, see test_model.py

EXPERTS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD, LAYERS = 4, 64, 96, 4, 2, 32, 2
BOUND = 2e-5
"""As in test_model.py; logits are of its size."""

CONFIG: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": HEAD,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 4096,
    "num_attention_heads": HEADS,
    "num_experts_per_tok": 2,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "num_local_experts": EXPERTS,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "rope_type": "yarn",
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 128,
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 4,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 96,
}
SKIPPED = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def dequantised(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``[experts, in, out]``, by transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch, at something else in the module
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors
    made: torch.Tensor = convert_moe_packed_tensors(blocks, scales)
    return made.float()


def write(folder: Path, tensors: dict[str, torch.Tensor], **more: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | more))
    save_file({name: each.contiguous() for name, each in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], torch.nn.Module]:
    """The directories, and the model that all of them are but the last."""
    from transformers import AutoModelForCausalLM, GptOssConfig

    folder = tmp_path_factory.mktemp("gpt-oss")
    generator = torch.Generator().manual_seed(3)
    plain_config = {name: value for name, value in CONFIG.items() if name != "architectures"}
    model = AutoModelForCausalLM.from_config(GptOssConfig(**plain_config)).float().eval()
    plain: dict[str, torch.Tensor] = {}
    packed: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.ndim == 3 and not name.endswith("_bias"):
            experts, inputs, outputs = tensor.shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator).byte()
            scales = torch.randint(120, 127, (experts, outputs, inputs // 32), generator=generator).byte()
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = dequantised(blocks, scales)
        else:
            plain[name] = torch.randn(tensor.shape, generator=generator) * 0.2 + (name.endswith("norm.weight"))
            packed[name] = plain[name]
    model.load_state_dict(plain)
    said = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": SKIPPED}}
    directories = {"mxfp4": write(folder / "mxfp4", packed, **said), "plain": write(folder / "plain", plain)}
    for name, source, kind in (("kept", "mxfp4", "keep"), ("unquant", "plain", "unquant"), ("q8_0", "mxfp4", "q8_0")):
        directories[name] = folder / name
        uqff.quantize_model(directories[source], directories[name], kind, measure=False)
    return directories, model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        made: torch.Tensor = model(torch.tensor([PROMPT])).logits[0]
        return made


@pytest.mark.parametrize("name", ["mxfp4", "plain", "kept", "unquant"])
def test_logits_are_transformers_own(made: tuple[dict[str, Path], torch.nn.Module], name: str) -> None:
    """Gates and ups that take turns, biases, sinks, clamped SwiGLU, router: whatever form the model is in."""
    directories, plain = made
    model = load_model(directories[name], dtype=torch.float32)
    expected = logits(plain)
    assert float(expected.abs().max()) > 1
    assert float((logits(model) - expected).abs().max()) <= BOUND
    state = plain.state_dict()
    for block in range(LAYERS):
        path = f"model.layers.{block}.mlp.experts"
        experts: Any = model.get_submodule(path)
        assert isinstance(experts, FusedExperts)
        assert experts.gate_proj.weight.kind == ("mxfp4" if name in ("mxfp4", "kept") else "unquant")
        both = state[f"{path}.gate_up_proj"].transpose(1, 2)
        projections: list[Any] = [experts.gate_proj, experts.up_proj, experts.down_proj]
        for at, projection in enumerate(projections[:2]):
            assert same_bits(projection.weight.dequantize(), both[:, at::2])
            assert torch.equal(projection.bias, state[f"{path}.gate_up_proj_bias"][:, at::2])
        assert same_bits(experts.down_proj.weight.dequantize(), state[f"{path}.down_proj"].transpose(1, 2))
        assert torch.equal(projections[2].bias, state[f"{path}.down_proj_bias"])


@pytest.mark.parametrize("name", ["kept", "unquant", "q8_0"])
def test_biases_of_experts_are_of_their_layers(
    made: tuple[dict[str, Path], torch.nn.Module], name: str, tmp_path: Path
) -> None:
    """Where the engine looks for them: those in the residual it passes over, and answers without. Both are read."""
    directories, plain = made
    state = plain.state_dict()
    layers, moved = {}, {}
    with uqff.open(directories[name]) as file:
        for key, layer in file.items():
            if ".experts." in key:
                assert layer.bias is not None
                assert torch.equal(layer.bias, state[f"{key}_bias"])
                moved[f"{key}_bias"], layer = layer.bias, uqff.Layer(layer.weight)
            layers[key] = layer
        residual = dict(file.residual)
        assert not any("experts" in each for each in residual)
        uqff.save(layers, tmp_path / "old.uqff", version=(1, 2, 0))
    assert len(moved) == 2 * LAYERS
    save_file({each: tensor.clone() for each, tensor in (residual | moved).items()}, tmp_path / "residual.safetensors")
    shutil.copy(directories[name] / "config.json", tmp_path)
    expected = logits(load_model(directories[name], dtype=torch.float32))
    assert torch.equal(logits(load_model(tmp_path, dtype=torch.float32)), expected)


def on_ranks(comm: Comm, directory: Path) -> tuple[Any, list[int]]:
    model = load_model(directory, comm, dtype=torch.float32)
    return logits(model).numpy(), generate(model, PROMPT, 4, comm=comm).ids


def test_ranks_agree_with_one(made: tuple[dict[str, Path], torch.nn.Module]) -> None:
    """Each of two ranks has its heads with their sinks, and its part of every expert."""
    directories, plain = made
    results = run_ranks(2, on_ranks, directories["mxfp4"], timeout=60)
    assert float((torch.from_numpy(results[0][0]) - logits(plain)).abs().max()) <= BOUND
    assert results[0][1] == results[1][1] == generate(plain, PROMPT, 4).ids


def test_quantised_while_loading(made: tuple[dict[str, Path], torch.nn.Module]) -> None:
    """Gate and up have the types and numbers that the file has whose stack is quantised whole."""
    directories, _ = made
    loaded, stored = load_model(directories["mxfp4"], isq="q8_0"), load_model(directories["q8_0"])
    for name, layer in stored.named_modules():
        if isinstance(layer, uqff.parallel.layer.QuantizedLayer):
            other: Any = loaded.get_submodule(name)
            assert other.weight == layer.weight, name


def test_dequantised_again(made: tuple[dict[str, Path], torch.nn.Module], tmp_path: Path) -> None:
    """``uqff dequantize`` gives the checkpoint that transformers would write."""
    directories, plain = made
    uqff.dequantize_model(directories["kept"], tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    state = plain.state_dict()
    assert tensors.keys() == state.keys()
    for name, tensor in tensors.items():
        assert same_bits(tensor, state[name]), name


def test_pre_1_0_files_are_refused(made: tuple[dict[str, Path], torch.nn.Module], tmp_path: Path) -> None:
    """mistral.rs 0.8 has the head last there, and no experts."""
    with pytest.raises(uqff.UnsupportedError, match="layers of this architecture have no numbers"):
        uqff.quantize_model(made[0]["plain"], tmp_path / "out", "q8_0", version=(0, 2, 0))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # of transformers, at what PEFT asks
def test_adapters_of_experts_in_turns(made: tuple[dict[str, Path], torch.nn.Module], tmp_path: Path) -> None:
    """PEFT's, of the stacks themselves: rows of B take turns as gates and ups do; merged, beside, by ``quantize``."""
    peft = pytest.importorskip("peft")
    directories, plain = made
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], target_parameters=parameters)
    adapted = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted)
    assert float((expected - logits(plain)).abs().max()) > 1
    for name, merge in (("plain", True), ("plain", False), ("mxfp4", None)):
        model = load_model(directories[name], dtype=torch.float32, lora=tmp_path / "adapter", merge_lora=merge)
        assert float((logits(model) - expected).abs().max()) <= BOUND, (name, merge)
    uqff.quantize_model(directories["plain"], tmp_path / "out", "unquant", lora=[tmp_path / "adapter"], measure=False)
    assert float((logits(load_model(tmp_path / "out")) - expected).abs().max()) <= BOUND
