"""Tiny GGUF files as llama.cpp's converter would write them, from the checkpoints of `tiny_models.py`.

Metadata and framing come from the `gguf` package, the order of the rows of Q and K from an index formula of its own
here, the blocks from `uqff.quantize`, or from the package. So a converter that is tested with them has all but the
blocks from elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tools.tiny import architectures
from tools.tiny.models import WEIGHT_DTYPES as DENSE
from tools.tiny.models import TinyModel, round_to, to_bytes
from uqff.families.gguf.tensor import GGUF
from uqff.quantization.types import quantize

BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
FOREIGN = ("tq1_0", "tq2_0", "mxfp4")
"""Types that UQFF's quantisers do not make as GGUF has them, and the package does."""
ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe"}
"""``general.architecture`` of a ``model_type``, if it is not that."""
ROOT_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def checkpoint_of(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and tensors of one of `architectures`; of Qwen3-MoE with experts in every layer, because
    GGUF has no other.
    """
    like = "Mistral" if name == "SmolLM3" else name
    config, shapes = architectures.config(like), architectures.shapes(like)
    if name == "SmolLM3":
        config |= {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "use_sliding_window": False}
    if name == "Qwen3Moe":
        config |= {"model_type": "qwen3_moe", "mlp_only_layers": []}
        first = {each: shape for each, shape in shapes.items() if each.startswith("model.layers.0.mlp.")}
        shapes = {each: shape for each, shape in shapes.items() if not each.startswith("model.layers.1.mlp.")}
        shapes |= {each.replace(".0.", ".1.", 1): shape for each, shape in first.items()}
    tensors = {each: architectures.tensor(each, shape) for each, shape in shapes.items()}
    if name.startswith("Gemma"):  # plus 1, and less 1, is exact
        tensors |= {
            each: np.round(values * np.float32(256)) / np.float32(256)
            for each, values in tensors.items()
            if values.ndim == 1
        }
    return config, tensors


def gguf_name(name: str) -> str:
    """Name of a checkpoint's tensor in a GGUF file."""
    module, _, kind = name.rpartition(".")
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", module)
    return f"blk.{match[1]}.{BLOCK_NAMES[match[2]]}.{kind}" if match else f"{ROOT_NAMES[module]}.{kind}"


def interleaved(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rows of Q or K as ggml's llama wants them: row `2j + s` of a head was row `j + s * d/2`."""
    size = rows.shape[0] // heads
    order = [head * size + j + s * (size // 2) for head in range(heads) for j in range(size // 2) for s in (0, 1)]
    return rows[order]


def stored(
    name: str, values: np.ndarray[Any, Any], kinds: Mapping[str, str], default: str
) -> tuple[Any, gguf.GGMLQuantizationType]:
    """A tensor as it is stored: its bytes (rows of blocks) or numbers, and its ggml type."""
    if values.ndim == 1 or re.search(r"\.gate\.", name):  # and what chooses experts
        return values, gguf.GGMLQuantizationType.F32
    kind = next((kind for part, kind in kinds.items() if part in name), default)
    if kind.upper() in DENSE:
        rows = np.frombuffer(to_bytes(round_to(values, kind.upper()), kind.upper()), np.uint8)
        return rows.reshape(*values.shape[:-1], -1), gguf.GGMLQuantizationType[kind.upper()]
    if kind in FOREIGN:
        type = gguf.GGMLQuantizationType[kind.upper()]
        return gguf.quants.quantize(values, type), type
    record = quantize(torch.from_numpy(np.ascontiguousarray(values)), kind)
    if not isinstance(record, GGUF):
        raise ValueError(f"{name}: {kind} gives {record}")
    return record.data.numpy(), gguf.GGMLQuantizationType(record.block_type.code)


def stacks(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors with the experts of each projection as one, called by the name of one without its number."""
    found: dict[str, Any] = {}
    for name, values in tensors.items():
        found.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", name), []).append(values)
    return {name: np.stack(values) if ".experts." in name else values[0] for name, values in found.items()}


def write_gguf(model: TinyModel, path: Path, kind: str, **options: Any) -> None:
    """Write a checkpoint as GGUF; see `write_checkpoint`."""
    write_checkpoint(model.config(), model.tensors(), path, kind, **options)


def write_checkpoint(
    config: Mapping[str, Any],
    tensors: Mapping[str, Any],
    path: Path,
    kind: str,
    *,
    kinds: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
    without: Collection[str] = (),
    metadata: Mapping[str, int] | None = None,
    split_max_tensors: int = 0,
    vocabulary: bool = False,
) -> None:
    """Write a checkpoint as GGUF: matrices in `kind`, or in what `kinds` gives for a part of their name.

    `extra` tensors are written under their own names and float32, those named in `without` are not, `metadata` are
    more pairs of uint32, and `split_max_tensors` is as the gguf package takes it. With a `vocabulary` the file has a
    byte pair encoding that makes next to nothing of texts, but names the tokens: llama.cpp does not answer without.
    """
    architecture = ARCHITECTURES.get(config["model_type"], config["model_type"])
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    writer.add_name(path.stem)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    experts = config.get("num_experts", config.get("num_local_experts"))
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        if "moe_intermediate_size" in config:
            writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
        writer.add_sliding_window(config["sliding_window"])
    if architecture == "llama":
        writer.add_rope_dimension_count(config.get("head_dim", config["hidden_size"] // heads))
    for key, value in (metadata or {}).items():
        writer.add_uint32(key, value)
    tokens = list(TinyModel(vocab_size=config["vocab_size"]).tokenizer()["model"]["vocab"])
    writer.add_tokenizer_model("gpt2" if vocabulary else "none")
    writer.add_token_list(tokens)
    if vocabulary:
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
        writer.add_token_merges(["t 3"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    theirs = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture), 64)
    for name, values in stacks(tensors).items():
        if name in without:
            continue
        data, type = stored(name, values, kinds or {}, kind)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            data = data + np.float32(1)
        if architecture in ("llama", "smollm3") and re.search(r"\.[qk]_proj\.", name):
            data = interleaved(data, heads if ".q_proj." in name else kv_heads)
        writer.add_tensor(str(theirs.get_name(name, (".weight", ".bias"))), data, raw_dtype=type)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
