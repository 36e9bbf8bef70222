"""Random models of transformers with adapters that PEFT has saved, and merged: the oracle of adapters."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from tests.support.lora_files import exact_numbers, make_exact

__all__ = ["write_gpt2", "write_llama", "write_qwen3_moe"]


def write_llama(folder: Path) -> Path:
    """A Llama as ``base``, adapters ``one`` (of every linear layer) and ``two``, and as ``merged`` both added by PEFT,
    the second with a weight of -0.5.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for what is called otherwise since
        return _write_llama(folder)


def write_gpt2(folder: Path) -> Path:
    """A GPT-2, whose weights are ``[in, out]``, as ``base``, an adapter of all these, and both as ``merged``."""
    peft = pytest.importorskip("peft", reason="the oracle")
    from transformers import GPT2Config, GPT2LMHeadModel

    tokens = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=32, **tokens))
    with torch.no_grad():
        for at, parameter in enumerate(model.parameters()):
            parameter.copy_(exact_numbers(tuple(parameter.shape), at))
    model.save_pretrained(folder / "base")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for what is called otherwise since
        wrapped = peft.get_peft_model(model, config)
    make_exact(wrapped)
    wrapped.save_pretrained(folder / "adapter", save_embedding_layers=False)
    wrapped.merge_and_unload().save_pretrained(folder / "merged")
    return folder


def write_qwen3_moe(folder: Path) -> Path:
    """A Qwen3-MoE as ``base``, an adapter of all that is linear, experts and routers too, and both as ``merged``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT finds no module for the tensors that it makes of all-linear itself
        return _write_qwen3_moe(folder)


def _write_qwen3_moe(folder: Path) -> Path:
    peft = pytest.importorskip("peft", reason="the oracle")
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=2,
        vocab_size=96,
        mlp_only_layers=[1],
        tie_word_embeddings=False,
    )
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for at, parameter in enumerate(model.parameters()):
            parameter.copy_(exact_numbers(tuple(parameter.shape), at))
    model.save_pretrained(folder / "base")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    make_exact(wrapped)
    wrapped.save_pretrained(folder / "adapter", save_embedding_layers=False)
    wrapped.merge_and_unload().save_pretrained(folder / "merged")
    return folder


def _write_llama(folder: Path) -> Path:
    """A Llama of random weights, an adapter of every linear layer, one of two, and both merged by PEFT."""
    peft = pytest.importorskip("peft", reason="the oracle")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    numbers = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**numbers, num_hidden_layers=2, vocab_size=96, tie_word_embeddings=False))
    with torch.no_grad():
        for at, parameter in enumerate(model.parameters()):
            parameter.copy_(exact_numbers(tuple(parameter.shape), at))
    model.save_pretrained(folder / "base")
    one = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        rank_pattern={"q_proj": 4, "layers.1.mlp.up_proj": 64},
        alpha_pattern={"k_proj": 3},
    )
    two = peft.LoraConfig(
        r=4, lora_alpha=1, use_rslora=True, target_modules=["lm_head", "o_proj"], layers_to_transform=1
    )
    wrapped = peft.get_peft_model(model, one, "one")
    wrapped.add_adapter("two", two)
    make_exact(wrapped)
    for name in ("one", "two"):
        wrapped.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False)
    for module in wrapped.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("two", -0.5)
    wrapped.merge_and_unload(adapter_names=["one", "two"]).save_pretrained(folder / "merged")
    return folder
