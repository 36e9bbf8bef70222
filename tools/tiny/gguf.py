"""Tiny GGUF files as llama.cpp's converter would write them, from the checkpoints of `tiny_models.py`.

Metadata and framing come from the `gguf` package, the order of the rows of Q and K from an index formula of its own
here, the blocks from `uqff.quantize`, or from the package. So a converter that is tested with them has all but the
blocks from elsewhere.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tools.tiny import architectures, text
from tools.tiny.gguf_own import add_own, recurrent, tiled, transposed
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
ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "glm4_moe": "glm4moe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "glm4_moe_lite": "deepseek2",
    "gpt_oss": "gpt-oss",
    "granitemoehybrid": "granite",
    "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe",
    "lfm2_moe": "lfm2moe",
    "mistral": "llama",
    "mixtral": "llama",
    "phi": "phi2",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
    "qwen3_5_text": "qwen35",
}
"""``general.architecture`` of a ``model_type``, if it is not that."""
NAMED = {"Qwen3.5-MoE": "qwen35moe"}
"""The same of a checkpoint that has another one's class."""
ROOT_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def checkpoint_of(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and tensors of one of `architectures`; of Qwen3-MoE with experts in every layer, because
    GGUF has no other.
    """
    if name in (*TEXTS, *OWN):
        return saved(name, OWN.get(name, text.TEXTS.get(name)))
    like = {"SmolLM3": "Mistral", "Gemma3": "Gemma2"}.get(name, name)
    config, shapes = architectures.config(like), architectures.shapes(like)
    if name == "SmolLM3":
        config |= {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "use_sliding_window": False}
        config |= {"pad_token_id": 0}
    if name == "Gemma3":
        config |= {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "sliding_window": 8}
        config |= {"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window_pattern": 6}
        config |= {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0}
        blocks, size = range(config["num_hidden_layers"]), config["head_dim"]
        shapes |= {f"model.layers.{block}.self_attn.{each}_norm.weight": (size,) for block in blocks for each in "qk"}
    if name == "Qwen3Moe":
        config |= {"model_type": "qwen3_moe", "mlp_only_layers": []}
        first = {each: shape for each, shape in shapes.items() if each.startswith("model.layers.0.mlp.")}
        shapes = {each: shape for each, shape in shapes.items() if not each.startswith("model.layers.1.mlp.")}
        shapes |= {each.replace(".0.", ".1.", 1): shape for each, shape in first.items()}
    tensors = {each: architectures.tensor(each, shape) for each, shape in shapes.items()}
    if name.startswith("Gemma"):
        tensors |= even(tensors)
    return config, tensors


TEXTS: dict[str, dict[str, Any]] = {
    "Phi-2": {},
    "Phi-3": {"original_max_position_embeddings": 512},
    "Phi-3.5-MoE": {},
    "StarCoder2": {},
    "GLM-4": {},
    "GLM-4-MoE": {"routed_scaling_factor": 2.5},
    "HunYuan dense": {},
    "HunYuan MoE": {},
    "LFM2": {},
    "LFM2-MoE": {},
}
"""What the configuration has otherwise of those that are made as `tools.tiny.text` makes them."""


THETA = 172235.0
"""With which the bounds of YaRN are whole numbers: llama.cpp rounds them, and gpt-oss says not to."""
OWN = {
    "gpt-oss": text.Text(
        "GptOssForCausalLM",
        "gpt_oss",
        {
            "attention_bias": True,
            "num_local_experts": text.EXPERTS,
            "num_experts_per_tok": 2,
            "swiglu_limit": 7.0,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_theta": THETA,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        },
    ),
}
for _name in ("DeepSeek V2", "GLM-4-MoE Lite"):
    OWN[_name] = text.TEXTS[_name]
MINISTRAL3 = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 16.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
    "rope.scaling.yarn_log_multiplier": 1.0,
    "rope.scaling.original_context_length": 4,
    "attention.temperature_scale": 0.1,
}
"""What files of Ministral 3 say beside those of Mistral 3; queries are scaled from the fourth token on."""
MINISTRAL3_SCALING = {
    "rope_type": "yarn",
    "factor": 16.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4,
    "llama_4_scaling_beta": 0.1,
}
"""The same in a configuration."""

_yarn = {
    "rope_type": "yarn",
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 0.75,
    "mscale_all_dim": 0.75,
}
OWN["DeepSeek V3"] = text.Text(
    "DeepseekV3ForCausalLM",
    "deepseek_v3",
    text.TEXTS["DeepSeek V3"].values | {"rope_scaling": _yarn, "routed_scaling_factor": 2.5},
)
GRANITE = text.TEXTS["Granite 4"]
SCALES = {
    "embedding_multiplier": 1.5,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.25,
    "attention_multiplier": 0.125,
}
for _name, _experts in (("Granite", 0), ("Granite-MoE", text.EXPERTS)):
    _own = SCALES | {"num_local_experts": _experts, "layer_types": ["attention"] * text.LAYERS}
    OWN[_name] = text.Text(GRANITE.architecture, GRANITE.model_type, GRANITE.values | _own)
for _name, _experts in (("Granite-Hybrid", text.EXPERTS), ("Granite-Hybrid dense", 0)):
    _own = SCALES | {"num_local_experts": _experts, "position_embedding_type": "nope"}
    OWN[_name] = text.Text(GRANITE.architecture, GRANITE.model_type, GRANITE.values | _own)
OWN["Qwen3-Next"] = text.TEXTS["Qwen3-Next"]
WIDE = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
for _name, _like in (("Qwen3.5", "Qwen3.5"), ("Qwen3.5-MoE", "Qwen3-Next")):  # heads of whole blocks
    _made = text.TEXTS[_like]
    OWN[_name] = dataclasses.replace(_made, values=_made.values | WIDE)
"""Those that the client is asked less about: it writes no UQFF of gpt-oss' checkpoints, and runs neither Granite
without Mamba, nor DeepSeek of a GGUF file."""


def with_even_heads(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A DeepSeek whose values have the size of its keys: the only ones that the client can run on a CPU."""
    made = OWN[name]
    size = made.values["qk_nope_head_dim"] + made.values["qk_rope_head_dim"]
    return saved(name, dataclasses.replace(made, values=made.values | {"v_head_dim": size}))


def saved(name: str, made: text.Text | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of what `transformers` saves of a text."""
    from safetensors.numpy import load_file

    assert made is not None
    with tempfile.TemporaryDirectory() as scratch:
        text.write_text(made, Path(scratch) / "model")
        tensors = load_file(Path(scratch) / "model/model.safetensors")
    named = {"architectures": [made.architecture], "model_type": made.model_type, "torch_dtype": "float32"}
    config = made.config() | named | TEXTS.get(name, {})
    if name == "Phi-3":  # whose factors the GGUF file has as tensors
        factors = {
            "short_factor": [1.0 + each / 16 for each in range(8)],
            "long_factor": [2.0 + each for each in range(8)],
        }
        config["rope_scaling"] = {"type": "longrope", **factors}
    if name.startswith(("Qwen3-Next", "Qwen3.5")):
        tensors |= even(tensors)
    for each, values in tensors.items():
        if each.endswith(".A_log"):  # the logarithm of its exponential is the number itself
            tensors[each] = 2 + np.arange(values.size, dtype=np.float32) / np.float32(8)
    return config, tensors


def even(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Vectors rounded, so that plus 1, and less 1, is exact."""
    return {
        each: np.round(values * np.float32(256)) / np.float32(256)
        for each, values in tensors.items()
        if values.ndim == 1
    }


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
    if values.ndim == 1 or re.search(
        r"\.gate\.|\.router\.|\.conv\.conv\.|\.conv1d\.|\.experts\.\w+\.bias|shared_expert_gate|A_log|\.D$|\.norm\.",
        name,
    ):  # and what chooses experts
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
    for name, values in apart(tensors):
        found.setdefault(re.sub(r"\.experts\.\d+\.", ".experts.", name), []).append(values)
    numbered = {re.sub(r"\.experts\.\d+\.", ".experts.", name) for name in tensors if re.search(r"\.experts\.\d", name)}
    return {name: np.stack(values) if name in numbered else values[0] for name, values in found.items()}


def apart(tensors: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Tensors, those that are several in GGUF one by one, by the names that llama.cpp's converter looks up."""
    experts = any(".block_sparse_moe.router." in name for name in tensors)
    for name, values in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.gate_up_proj_bias")):  # inputs before outputs; in turns
            turned = values.swapaxes(1, 2) if values.ndim == 3 else values
            for at, part in enumerate(("gate_proj", "up_proj")):
                kind = "bias" if name.endswith("_bias") else "weight"
                yield f"{name.partition('gate_up_proj')[0]}{part}.{kind}", np.ascontiguousarray(turned[:, at::2])
        elif name.endswith(("experts.down_proj", "experts.down_proj_bias")):
            turned = values.swapaxes(1, 2) if values.ndim == 3 else values
            yield name.replace("_bias", "") + (".bias" if values.ndim == 2 else ".weight"), np.ascontiguousarray(turned)
        elif name.endswith(("_mlp.input_linear.weight", "_moe.input_linear.weight")):
            for part, rows in zip(("gate", "up"), np.split(values, 2, axis=-2), strict=True):
                yield granite_name(name, f"{part}_proj", experts), np.ascontiguousarray(rows)
        elif name.endswith((".shared_mlp.output_linear.weight", "_moe.output_linear.weight")):
            yield granite_name(name, "down_proj", experts), values
        elif name.endswith(".sinks"):
            yield f"{name}.weight", values
        elif name.endswith(".dt_bias"):
            yield name.replace(".dt_bias", ".dt_proj.bias"), values
        else:
            yield name, values


def granite_name(name: str, projection: str, experts: bool) -> str:
    """A projection of Granite by a name that the package knows."""
    block = ".".join(name.split(".")[:3])
    if ".block_sparse_moe." in name:
        return f"{block}.mlp.experts.{projection}.weight"
    return f"{block}.mlp.{'shared_expert.' if experts else ''}{projection}.weight"


EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def known_name(name: str) -> str:
    """A tensor's name as the package knows it: llama.cpp's converter gives some of them another end first."""
    name = name.replace("e_score_correction_bias", "e_score_correction.bias").replace(
        ".expert_bias", ".expert_bias.bias"
    )
    return name.removeprefix("model.") if ".feed_forward.experts." in name else name


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
    metadata: Mapping[str, Any] | None = None,
    split_max_tensors: int = 0,
    vocabulary: bool = False,
    absorbed: bool | None = None,
    architecture: str | None = None,
) -> None:
    """Write a checkpoint as GGUF: matrices in `kind`, or in what `kinds` gives for a part of their name.

    `extra` tensors are written under their own names and float32, those named in `without` are not, `metadata` are
    more pairs of uint32, and `split_max_tensors` is as the gguf package takes it. With a `vocabulary` the file has a
    byte pair encoding that makes next to nothing of texts, but names the tokens: llama.cpp does not answer without.
    DeepSeek's keys are transposed if they are plain numbers, or as `absorbed` says. The `architecture` is another than
    the model's own where two are one.
    """
    architecture = architecture or ARCHITECTURES.get(config["model_type"], config["model_type"])
    if architecture == "granite":
        mixed = "granitemoe" if config["num_local_experts"] else "granite"
        architecture = "granitehybrid" if "mamba" in config["layer_types"] else mixed
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    writer.add_name(path.stem)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    hybrid = architecture.startswith("lfm2") or architecture == "granitehybrid"
    kinds_of_layers = config.get("layer_types", []) if hybrid else []
    tensors = dict(recurrent(config, tensors))
    if architecture.startswith("qwen35"):
        tensors = dict(tiled(config, tensors))
    absorbed = architecture == "deepseek2" and (kind == "f32" if absorbed is None else absorbed)
    if absorbed:
        kv_heads, tensors = 1, dict(transposed(config, tensors))
    writer.add_head_count_kv([0 if each in ("conv", "mamba") else kv_heads for each in kinds_of_layers] or kv_heads)
    if "rms_norm_eps" in config and "norm_eps" not in config and architecture not in ("phi2", "starcoder2"):
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    add_own(writer, architecture, config)
    writer.add_rope_freq_base(config["rope_theta"])
    experts = next((config[each] for each in EXPERT_COUNTS if each in config), None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.get("num_experts_per_tok") or config["moe_topk"][0])
        size = config.get("moe_intermediate_size")
        if size is not None:
            writer.add_expert_feed_forward_length(size[0] if isinstance(size, list) else size)
    if architecture == "deepseek2":
        key, rank = config["qk_nope_head_dim"] + config["qk_rope_head_dim"], config["kv_lora_rank"]
        writer.add_key_length(rank + config["qk_rope_head_dim"] if absorbed else key)
        writer.add_value_length(rank if absorbed else config["v_head_dim"])
        if absorbed:
            writer.add_key_length_mla(key)
            writer.add_value_length_mla(config["v_head_dim"])
    elif "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    if architecture in ("llama", "mistral3") or "partial_rotary_factor" in config:
        writer.add_rope_dimension_count(int(head_dim * config.get("partial_rotary_factor", 1)))
    for key, value in (metadata or {}).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
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
    if "pad_token_id" in config:
        writer.add_pad_token_id(config["pad_token_id"])
    theirs = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture), 64)
    for name, values in stacks(tensors).items():
        if name in without:
            continue
        data, type = stored(name, values, kinds or {}, kind)
        shifted = name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight")
        if shifted and architecture.startswith(("gemma", "qwen3next", "qwen35")):
            data = data + np.float32(1)
        if name.endswith(".conv.conv.weight"):
            data = data[:, 0]
        if architecture in ("llama", "mistral3", "smollm3", "granite", "granitemoe", "granitehybrid") and re.search(
            r"\.[qk]_proj\.", name
        ):
            data = interleaved(data, heads if ".q_proj." in name else kv_heads)
        writer.add_tensor(str(theirs.get_name(known_name(name), (".weight", ".bias"))), data, raw_dtype=type)
    scaling = config.get("rope_scaling") or {}
    factors = {f"rope_factors_{key[:-7]}.weight": values for key, values in scaling.items() if key.endswith("_factor")}
    if architecture in ("phi3", "phimoe"):
        extra = {**{key: np.array(values, np.float32) for key, values in factors.items()}, **(extra or {})}
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
