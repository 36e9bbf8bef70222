"""Tiny checkpoints of every text architecture, with the names that `transformers` gives to tensors.

    python -m tools.tiny.text --client PYTHON

lets `mistralrs==0.9.5` quantise each to Q8_0 and writes digests of the `.uqff` file and of the residual into
`tests/golden/v1/TEXT.json`: they prove names, order and bytes. The values are those of `tools.tiny.architectures`: each
hangs on a tensor's name and shape only, so a checkpoint is the same on every machine and with every `transformers` that
has the architecture.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tools.interop.client import Client, ClientError
from tools.tiny.architectures import GOLDEN, HEAD_SIZE, HEADS, HIDDEN, INNER, KV_HEADS, VOCABULARY, tensor
from tools.tiny.digests import command, written
from tools.tiny.models import TinyModel

DIGESTS = GOLDEN / "v1" / "TEXT.json"
CLIENT_VERSION = "0.9.5"
LAYERS = 2
EXPERTS = 4

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WITHOUT = "none"
"""In place of a value of `COMMON` that an architecture's configuration has not."""

NO_WINDOW = {"sliding_window": None}
QWEN = NO_WINDOW | {"use_sliding_window": False, "max_window_layers": LAYERS}
TWO_EXPERTS = {"num_experts_per_tok": 2, "norm_topk_prob": True}
QWEN_MOE = TWO_EXPERTS | {"num_experts": EXPERTS, "decoder_sparse_step": 1, "moe_intermediate_size": HIDDEN}
ROTARY_HALF = {"partial_rotary_factor": 0.5}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
DELTA = ROTARY_HALF | {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "full_attention_interval": 2,
}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "qk_head_dim": 32,
    "v_head_dim": 16,
    "num_key_value_heads": HEADS,
    "head_dim": 16,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "moe_layer_freq": 1,
}
ROUTED = TWO_EXPERTS | {
    "moe_intermediate_size": HIDDEN,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
    "n_group": 1,
    "topk_group": 1,
}
GELU = {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}
CONVOLUTION = {
    "conv_bias": False,
    "conv_L_cache": 3,
    "layer_types": ["conv", "full_attention"],
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "head_dim": WITHOUT,
}


@dataclasses.dataclass(frozen=True)
class Text:
    """An architecture: what `config.json` and `transformers` call it, and what its configuration has besides `COMMON`.

    `client` is the client's name of it in Python; None if it has none, and finds out by itself.
    """

    architecture: str
    model_type: str
    values: dict[str, Any]
    client: str | None = None

    def config(self) -> dict[str, Any]:
        """The values of its `config.json`, in the form of transformers 4."""
        values = COMMON | self.values
        return {key: value for key, value in values.items() if value != WITHOUT}


TEXTS: dict[str, Text] = {
    "Llama": Text("LlamaForCausalLM", "llama", {}, "Llama"),
    "Mistral": Text("MistralForCausalLM", "mistral", NO_WINDOW, "Mistral"),
    "Mixtral": Text(
        "MixtralForCausalLM",
        "mixtral",
        NO_WINDOW | {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
        "Mixtral",
    ),
    "Qwen2": Text("Qwen2ForCausalLM", "qwen2", QWEN | {"head_dim": WITHOUT}, "Qwen2"),
    "Qwen3": Text("Qwen3ForCausalLM", "qwen3", QWEN, "Qwen3"),
    "Qwen3-MoE": Text("Qwen3MoeForCausalLM", "qwen3_moe", QWEN | QWEN_MOE | {"mlp_only_layers": [1]}, "Qwen3Moe"),
    "Qwen3-Next": Text(
        "Qwen3NextForCausalLM",
        "qwen3_next",
        QWEN_MOE | DELTA | {"mlp_only_layers": [], "shared_expert_intermediate_size": HIDDEN},
        "Qwen3Next",
    ),
    "Qwen3.5": Text(
        "Qwen3_5ForCausalLM",
        "qwen3_5_text",
        DELTA
        | {
            "rope_parameters": ROTARY_HALF | {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        },
    ),
    "Phi-2": Text(
        "PhiForCausalLM",
        "phi",
        ROTARY_HALF
        | {
            "num_key_value_heads": HEADS,
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-5,
            "qk_layernorm": False,
            "head_dim": WITHOUT,
            "attention_bias": WITHOUT,
        },
        "Phi2",
    ),
    "Phi-3": Text(
        "Phi3ForCausalLM",
        "phi3",
        NO_WINDOW | {"rope_scaling": None, "original_max_position_embeddings": 1024, "head_dim": WITHOUT},
        "Phi3",
    ),
    "Phi-3.5-MoE": Text(
        "PhiMoEForCausalLM",
        "phimoe",
        NO_WINDOW
        | {
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "attention_bias": True,
            "lm_head_bias": True,
            "original_max_position_embeddings": 1024,
            "rope_scaling": None,
            "router_jitter_noise": 0.01,
            "input_jitter_noise": 0.01,
            "head_dim": WITHOUT,
        },
        "Phi3_5MoE",
    ),
    "Gemma": Text("GemmaForCausalLM", "gemma", GELU, "Gemma"),
    "Gemma 2": Text(
        "Gemma2ForCausalLM",
        "gemma2",
        GELU
        | {
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": 512,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": HEAD_SIZE,
        },
        "Gemma2",
    ),
    "StarCoder2": Text(
        "Starcoder2ForCausalLM",
        "starcoder2",
        NO_WINDOW | {"hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5, "use_bias": True, "head_dim": WITHOUT},
        "Starcoder2",
    ),
    "DeepSeek V2": Text(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        LATENT | ROUTED | {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False},
        "DeepseekV2",
    ),
    "DeepSeek V3": Text("DeepseekV3ForCausalLM", "deepseek_v3", LATENT | ROUTED, "DeepseekV3"),
    "GLM-4": Text("Glm4ForCausalLM", "glm4", ROTARY_HALF, "GLM4"),
    "GLM-4-MoE": Text("Glm4MoeForCausalLM", "glm4_moe", ROUTED | ROTARY_HALF | {"use_qk_norm": True}, "GLM4Moe"),
    "GLM-4-MoE Lite": Text(
        "Glm4MoeLiteForCausalLM",
        "glm4_moe_lite",
        LATENT | ROUTED | {"mlp_layer_types": ["dense", "sparse"]},
        "GLM4MoeLite",
    ),
    "SmolLM3": Text(
        "SmolLM3ForCausalLM",
        "smollm3",
        NO_WINDOW
        | {
            "no_rope_layers": [1, 0],
            "no_rope_layer_interval": 2,
            "use_sliding_window": False,
            "mlp_bias": False,
            "head_dim": WITHOUT,
        },
        "SmolLm3",
    ),
    "Granite 4": Text(
        "GraniteMoeHybridForCausalLM",
        "granitemoehybrid",
        {
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": INNER,
            "layer_types": ["mamba", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_chunk_size": 16,
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 0.25,
            "position_embedding_type": "rope",
            "head_dim": WITHOUT,
        },
        "GraniteMoeHybrid",
    ),
    "HunYuan dense": Text("HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense", {"use_qk_norm": True}, "HunYuanDenseV1"),
    "HunYuan MoE": Text(
        "HunYuanMoEV1ForCausalLM",
        "hunyuan_v1_moe",
        {
            "num_experts": EXPERTS,
            "moe_topk": [2] * LAYERS,
            "use_qk_norm": True,
            "moe_intermediate_size": [INNER] * LAYERS,
            "num_shared_expert": [1] * LAYERS,
            "use_mixed_mlp_moe": True,
        },
        "HunYuanMoEV1",
    ),
    "LFM2": Text(
        "Lfm2ForCausalLM",
        "lfm2",
        CONVOLUTION
        | {
            "block_ff_dim": INNER,
            "block_multiple_of": 32,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": False,
        },
        "Lfm2",
    ),
    "LFM2-MoE": Text(
        "Lfm2MoeForCausalLM",
        "lfm2_moe",
        CONVOLUTION
        | TWO_EXPERTS
        | {
            "num_experts": EXPERTS,
            "moe_intermediate_size": HIDDEN,
            "num_dense_layers": 1,
            "use_expert_bias": True,
            "routed_scaling_factor": 1.0,
        },
        "Lfm2Moe",
    ),
}
"""By title in the package's table."""


def has(name: str) -> bool:
    """Whether the `transformers` that is installed has an architecture."""
    from transformers import CONFIG_MAPPING

    return TEXTS[name].model_type in CONFIG_MAPPING


def write(name: str, folder: Path) -> None:
    """Write a checkpoint of an architecture: what `transformers` saves of it, with other values."""
    write_text(TEXTS[name], folder)


def write_text(text: Text, folder: Path) -> None:
    """The same of one that the client writes nothing of."""
    from safetensors import safe_open
    from safetensors.numpy import save_file
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    values = text.config()
    config = CONFIG_MAPPING[text.model_type].from_dict(values)
    TinyModel(hidden_size=HIDDEN, heads=2, vocab_size=VOCABULARY).write(folder)
    path = folder / "model.safetensors"
    path.unlink()
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with safe_open(path, "np") as saved:
        shapes = {key: tuple(saved.get_slice(key).get_shape()) for key in saved.keys()}  # noqa: SIM118
    save_file({key: values_of(key, shape) for key, shape in shapes.items()}, path)
    named = {"architectures": [text.architecture], "model_type": text.model_type, "torch_dtype": "float32"}
    made = _json_numbers(config.to_dict() | values | named)
    made.pop("transformers_version", None)
    (folder / "config.json").write_text(json.dumps(made, indent=2))


def _json_numbers(value: Any) -> Any:
    """A part of a configuration with what transformers 5 writes in place of infinity, which JSON has not."""
    if isinstance(value, dict):
        return {key: _json_numbers(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json_numbers(each) for each in value]
    return {"__float__": "Infinity"} if value == float("inf") else value


def values_of(name: str, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """As of other tiny checkpoints, but for vectors that are no norms: those are about 0."""
    made = np.asarray(tensor(name, shape))
    return made if len(shape) != 1 or "norm" in name else made - np.float32(1)


def client_digests(client: Client, name: str) -> dict[str, str] | None:
    """What the client writes for an architecture: digests by file name; None if it cannot."""
    try:
        return written(client, partial(write, name), architecture=TEXTS[name].client)
    except ClientError:
        return None


main = command(client_digests, TEXTS, {CLIENT_VERSION: DIGESTS})

if __name__ == "__main__":
    main()
