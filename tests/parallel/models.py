"""Tiny random models of every architecture as model directories of either generation, and the same in plain numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import uqff
from uqff.families import stack
from uqff.models.architectures import layer_names, stacked_names
from uqff.quantization.bias import cast_bias

HIDDEN, INNER, VOCABULARY, LAYERS = 256, 512, 96, 2
HEADS, KV_HEADS = 8, 2
PROMPT = [5, 9, 17, 30, 41, 11, 23, 9]

NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}
EXPERTS = 4


@dataclasses.dataclass(frozen=True)
class TinyCase:
    """A model: architecture, type of its layers, version of its file, tied or not, load dtype."""

    architecture: str
    kind: str
    version: tuple[int, int, int]
    tied: bool = False
    dtype: torch.dtype = torch.float32
    kv_heads: int = KV_HEADS
    expert_inner: int = 128

    @property
    def name(self) -> str:
        """What the directory is called."""
        tied = "-tied" if self.tied else ""
        return f"{self.architecture}-{self.kind}-{'.'.join(map(str, self.version))}{tied}-{self.kv_heads}"

    def config(self) -> dict[str, Any]:
        """The ``config.json``."""
        more: dict[str, dict[str, Any]] = {
            "llama": {"attention_bias": True},
            "qwen3": {"head_dim": 48},
            "qwen3_moe": {
                "head_dim": 32,
                "num_experts": EXPERTS,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": self.expert_inner,
                "mlp_only_layers": [1],
                "decoder_sparse_step": 1,
                "norm_topk_prob": True,
            },
        }
        return {
            "architectures": [f"{NAMES[self.architecture]}ForCausalLM"],
            "model_type": self.architecture,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "max_position_embeddings": 128,
            "num_attention_heads": HEADS,
            "num_hidden_layers": LAYERS,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "sliding_window": None,
            "tie_word_embeddings": self.tied,
            "vocab_size": VOCABULARY,
            **more.get(self.architecture, {}),
        }


def plain_model(directory: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model of ``transformers`` that a ``config.json`` describes, with whatever weights; buffers stay float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def write(case: TinyCase, folder: Path) -> tuple[Path, torch.nn.Module]:
    """Write the model directory of a case.

    Returns:
        The directory, and the plain model with the dequantised weights, in the case's dtype.
    """
    directory = folder / case.name
    directory.mkdir(parents=True)
    config = case.config()
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)
    model = plain_model(directory, case.dtype)
    torch.manual_seed(sum(case.name.encode()))
    shapes = single_experts({name: tensor.to("meta") for name, tensor in model.state_dict().items()})
    plain = {name: torch.randn(tensor.shape) * 0.08 for name, tensor in shapes.items()}
    plain = {name: (each + 1 if "norm" in name else each).to(case.dtype) for name, each in plain.items()}
    if case.tied:
        plain.pop("lm_head.weight")
    dense = dict(plain)
    names = layer_names(config)
    layers: dict[Any, uqff.Layer] = {}
    for each in names:
        weight = uqff.quantize(plain[each.weight].float(), case.kind, dtype=case.dtype)
        bias = plain.get(each.bias)
        if bias is not None:
            bias = cast_bias(bias, weight, case.dtype, version=case.version)
            dense[each.bias] = bias.to(case.dtype)
        key: Any = each.index if case.version < (1, 0, 0) else each.module
        layers[key] = uqff.Layer(weight, bias)
        dense[f"{each.module}.weight"] = weight.dequantize(case.dtype)
    if case.version >= (1, 0, 0):
        for entry in stacked_names(names):
            if entry.is_stacked:
                layers[entry.key] = uqff.Layer(stack([layers.pop(part.module).weight for part in entry.parts]))
    kept = {each.weight for each in names} | {each.bias for each in names}
    if case.version >= (1, 2, 0):  # the embedding is a layer; a tied model has no head
        embedding = uqff.quantize(plain["model.embed_tokens.weight"].float(), case.kind, dtype=case.dtype)
        layers["model.embed_tokens"] = uqff.Layer(embedding)
        dense["model.embed_tokens.weight"] = embedding.dequantize(case.dtype)
        kept.add("model.embed_tokens.weight")
        if case.tied:
            layers.pop("lm_head")
            dense["lm_head.weight"] = dense["model.embed_tokens.weight"]
    else:
        kept.discard("model.embed_tokens.weight")
    uqff.save(layers, directory / "0-0.uqff", version=case.version)
    save_file(
        {name: each.contiguous() for name, each in plain.items() if name not in kept},
        directory / "residual.safetensors",
    )
    if case.tied:  # before 1.2 the quantised head is another matrix than the embedding
        head: Any = model.lm_head
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
    stacked = any(name.endswith(".gate_up_proj") for name in model.state_dict())  # since transformers 5
    model.load_state_dict(fused_experts(dense) if stacked else dense)
    return directory, model


def single_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, of those that ``transformers`` keeps: there, experts are stacked, gate on up."""
    found = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for expert, both in enumerate(tensor):
                found[f"{prefix}.{expert}.gate_proj.weight"], found[f"{prefix}.{expert}.up_proj.weight"] = both.chunk(2)
        elif last == "down_proj":
            found |= {f"{prefix}.{expert}.down_proj.weight": each for expert, each in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def fused_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of :func:`single_experts`."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for prefix in sorted({name.split(".experts.")[0] for name in tensors.keys() - found.keys()}):
        gate, up, down = (
            torch.stack([tensors[f"{prefix}.experts.{expert}.{name}_proj.weight"] for expert in range(EXPERTS)])
            for name in ("gate", "up", "down")
        )
        found[f"{prefix}.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        found[f"{prefix}.experts.down_proj"] = down
    return found


def write_tokenizer(directory: Path) -> None:
    """Whole words: token n is ``t<n>``; 0 to 2 are special."""
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {**{token: i for i, token in enumerate(special)}, **{f"t{i}": i for i in range(3, VOCABULARY)}}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "unk_token": "<unk>"}))
