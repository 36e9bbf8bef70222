"""The declared table of GGUF's architectures: what a file of each has beside what all have, and other names.

Which layers there are, :mod:`uqff.models.table` says; here stand their names in GGUF, norms and other tensors that are
no layers, and where the metadata says which number of ``config.json``.

Authority: llama.cpp, ``gguf-py/gguf/tensor_mapping.py``, ``conversion/*.py``, ``src/models/*.cpp``; mistral.rs v0.9.2,
``mistralrs-core/src/gguf/normal_config.rs`` and ``gemma3_config.rs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from uqff.checkpoints.gguf.declared import BlockTensor, GgufArchitecture, OtherNumbers, SeveralMatrices
from uqff.checkpoints.gguf.forms import SQUEEZED, TURNS
from uqff.checkpoints.gguf.recurrent import GRANITES, QWEN3_NEXT, QWEN35
from uqff.models.table import architecture_of
from uqff.models.text import ATTENDS, CONVOLVES, LATER, LOW_RANK, ROUTED

__all__ = ["ARCHITECTURES"]


def _gemma2_scale(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What llama.cpp scales queries by, whose metadata do not say it: of 27B, whose depth it knows that by, another
    number than of the others.
    """
    if config["num_hidden_layers"] == 46:
        return {"query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]}
    return {"query_pre_attn_scalar": _head_size(config)}


def _gemma3_scale(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same of Gemma 3, and that every sixth layer sees the whole text."""
    if config["num_hidden_layers"] == 62:
        scale = config["hidden_size"] // config["num_attention_heads"]
    else:
        scale = _head_size(config)
    return {"query_pre_attn_scalar": scale, "sliding_window_pattern": 6}


def _unrotated(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Every fourth layer of SmolLM3 has no rotary embedding."""
    return {"no_rope_layers": [int((block + 1) % 4 != 0) for block in range(config["num_hidden_layers"])]}


def _alternating(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Every second layer of gpt-oss has a sliding window, the first among them."""
    kinds = ("sliding_attention", "full_attention")
    return {"layer_types": [kinds[block % 2] for block in range(config["num_hidden_layers"])]}


def _noaux(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """How DeepSeek V3 chooses experts."""
    return {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def _greedy(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """How DeepSeek V2 does."""
    grouped = (config.get("n_group") or 1) > 1
    return {"scoring_func": "softmax", "topk_method": "group_limited_greedy" if grouped else "greedy"}


def _head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


_QKV: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_NORMS: Final = ("input_layernorm", "post_attention_layernorm")
_SANDWICH: Final = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_QK_NORMS: Final = ("self_attn.q_norm", "self_attn.k_norm")
_GELU: Final = "gelu_pytorch_tanh"
_SIGMOID: Final = 2
_SOFTMAX: Final = 1
"""``expert_gating_func``."""

_DEEPSEEK: Final = {
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
}

_DEEPSTACK: Final = OtherNumbers(("n_deepstack_layers",), (), lambda stored, config: {}, lambda config: {})
"""How many layers take in states of the tower of Qwen3-VL, which says nothing of a text."""

_LFM2: Final = (
    BlockTensor("self_attn.q_layernorm.weight", when=ATTENDS),
    BlockTensor("self_attn.k_layernorm.weight", when=ATTENDS),
    BlockTensor("conv.conv.weight", when=CONVOLVES, form=SQUEEZED),
)


def _is_ministral(config: Mapping[str, Any]) -> bool:
    """Whether a Mistral has what a file can say of Ministral 3 alone."""
    scaling = config.get("rope_scaling")
    named = architecture_of(config).title == "Mistral"
    return named and isinstance(scaling, Mapping) and scaling.get("mscale_all_dim") is not None


_QWEN2: Final = GgufArchitecture("qwen2", ("Qwen2ForCausalLM",), biases=_QKV)
_QWEN3: Final = GgufArchitecture("qwen3", ("Qwen3ForCausalLM",), norms=(*_NORMS, *_QK_NORMS))
_QWEN3_MOE: Final = GgufArchitecture(
    "qwen3moe",
    ("Qwen3MoeForCausalLM",),
    norms=(*_NORMS, *_QK_NORMS),
    plain=(BlockTensor("mlp.gate.weight"),),
    expert_count="num_experts",
    expert_size="moe_intermediate_size",
    fixed={"decoder_sparse_step": 1, "mlp_only_layers": [], "model_type": "qwen3_moe", "norm_topk_prob": True},
)

ARCHITECTURES: Final = (
    GgufArchitecture(
        "llama",
        ("LlamaForCausalLM", "MistralForCausalLM"),
        interleaved=True,
        optional_biases=(*_QKV, "self_attn.o_proj"),
        rope_default=10000.0,
        scalings=("linear", "llama3"),
        only_if=lambda config: not _is_ministral(config),
    ),
    GgufArchitecture(
        "mistral3",
        ("MistralForCausalLM",),
        interleaved=True,
        rope_default=10000.0,
        scalings=("yarn",),
        yarn={"mscale": 1.0},
        tempered=True,
    ),
    _QWEN2,
    replace(_QWEN2, name="qwen2vl", axes="", only_read=True),
    _QWEN3,
    replace(_QWEN3, name="qwen3vl", derived=_DEEPSTACK, axes="", only_read=True),
    _QWEN3_MOE,
    replace(_QWEN3_MOE, name="qwen3vlmoe", derived=_DEEPSTACK, axes="", only_read=True),
    GgufArchitecture(
        "llama",
        ("MixtralForCausalLM",),
        interleaved=True,
        rope_default=10000.0,
        expert_count="num_local_experts",
        expert_size="intermediate_size",
        scalings=("linear", "llama3"),
    ),
    GgufArchitecture(
        "smollm3",
        ("SmolLM3ForCausalLM",),
        interleaved=True,
        fixed={"no_rope_layer_interval": 4, "use_sliding_window": False},
        implied=_unrotated,
    ),
    GgufArchitecture(
        "gemma",
        ("GemmaForCausalLM",),
        rope_default=10000.0,
        activation=_GELU,
        norm_offset=1.0,
        headless=True,
    ),
    GgufArchitecture(
        "gemma2",
        ("Gemma2ForCausalLM",),
        norms=_SANDWICH,
        rope_default=10000.0,
        fixed={"hidden_activation": _GELU},
        implied=_gemma2_scale,
        numbers={each: each for each in ("attn_logit_softcapping", "final_logit_softcapping")},
        activation=_GELU,
        norm_offset=1.0,
        headless=True,
        renamed={"post_attention_layernorm": "post_attention_norm"},
        windowed=True,
    ),
    GgufArchitecture(
        "gemma3",
        ("Gemma3ForCausalLM",),
        norms=(*_SANDWICH, *_QK_NORMS),
        rope_default=1000000.0,
        fixed={"hidden_activation": _GELU, "model_type": "gemma3_text", "attn_logit_softcapping": None},
        implied=_gemma3_scale,
        numbers={"rope_local_base_freq": "rope.freq_base_swa", "final_logit_softcapping": "final_logit_softcapping"},
        unless={"rope_local_base_freq": 10000.0, "final_logit_softcapping": None},
        activation=_GELU,
        norm_offset=1.0,
        renamed={"post_attention_layernorm": "post_attention_norm"},
        windowed=True,
        needs_window=True,
        scalings=("linear",),
    ),
    GgufArchitecture(
        "phi2",
        ("PhiForCausalLM",),
        norms=("input_layernorm",),
        norm_biases=True,
        final_norm="model.final_layernorm",
        biases=(*_QKV, "self_attn.dense", "mlp.fc1", "mlp.fc2", "lm_head"),
        rope_default=10000.0,
        epsilon=("layer_norm_eps", "attention.layer_norm_epsilon"),
        fixed={"model_type": "phi", "qk_layernorm": False},
        rotated=0.5,
        activation="gelu_new",
        own_head_size=False,
    ),
    GgufArchitecture(
        "phi3",
        ("Phi3ForCausalLM",),
        rope_default=10000.0,
        counts={"original_max_position_embeddings": "rope.scaling.original_context_length"},
        rotated=1.0,
        own_head_size=False,
        scalings=("longrope",),
    ),
    GgufArchitecture(
        "phimoe",
        ("PhiMoEForCausalLM",),
        norm_biases=True,
        optional_biases=(*_QKV, "self_attn.o_proj", "lm_head"),
        rope_default=10000.0,
        plain=(BlockTensor("block_sparse_moe.gate.weight"),),
        expert_count="num_local_experts",
        expert_size="intermediate_size",
        fixed={"model_type": "phimoe", "router_jitter_noise": 0.01},
        written={"input_jitter_noise": 0.01},
        counts={"original_max_position_embeddings": "rope.scaling.original_context_length"},
        told_by={"lm_head_bias": "output.bias"},
        own_head_size=False,
        scalings=("longrope",),
        mscales=True,
    ),
    GgufArchitecture(
        "starcoder2",
        ("Starcoder2ForCausalLM",),
        norm_biases=True,
        biases=(*_QKV, "self_attn.o_proj", "mlp.c_fc", "mlp.c_proj"),
        epsilon=("norm_epsilon", "attention.layer_norm_epsilon"),
        fixed={"use_bias": True},
        activation=_GELU,
        own_head_size=False,
    ),
    GgufArchitecture(
        "glm4",
        ("Glm4ForCausalLM",),
        norms=(*_NORMS, "post_self_attn_layernorm", "post_mlp_layernorm"),
        optional_biases=_QKV,
        rope_default=10000.0,
        rotated=0.5,
    ),
    GgufArchitecture(
        "glm4moe",
        ("Glm4MoeForCausalLM",),
        optional_biases=_QKV,
        plain=(
            *(BlockTensor(f"{each}.weight", optional=True) for each in _QK_NORMS),
            BlockTensor("mlp.gate.weight", when=ROUTED),
            BlockTensor("mlp.gate.e_score_correction_bias", "exp_probs_b.bias", when=ROUTED),
        ),
        expert_count="n_routed_experts",
        expert_size="moe_intermediate_size",
        fixed={"model_type": "glm4_moe", "n_group": 1, "topk_group": 1},
        numbers={"routed_scaling_factor": "expert_weights_scale"},
        counts={
            "n_shared_experts": "expert_shared_count",
            "first_k_dense_replace": "leading_dense_block_count",
            "norm_topk_prob": "expert_weights_norm",
        },
        stated={"expert_gating_func": _SIGMOID},
        told_by={"use_qk_norm": "blk.0.attn_q_norm.weight"},
        unless={"routed_scaling_factor": 1.0, "first_k_dense_replace": 0, "norm_topk_prob": False},
        rotated=0.5,
        renamed={"post_attention_layernorm": "post_attention_norm"},
    ),
    *(
        GgufArchitecture(
            "deepseek2",
            classes,
            norms=(*_NORMS, "self_attn.kv_a_layernorm"),
            rope_default=10000.0,
            plain=(
                BlockTensor("self_attn.q_a_layernorm.weight", when=LOW_RANK),
                BlockTensor("mlp.gate.weight", when=ROUTED),
                *plain,
            ),
            expert_count="n_routed_experts",
            expert_size="moe_intermediate_size",
            fixed=fixed,
            implied=implied,
            numbers={"routed_scaling_factor": "expert_weights_scale"},
            counts={
                "n_shared_experts": "expert_shared_count",
                "first_k_dense_replace": "leading_dense_block_count",
                "norm_topk_prob": "expert_weights_norm",
                "n_group": "expert_group_count",
                "topk_group": "expert_group_used_count",
                "kv_lora_rank": "attention.kv_lora_rank",
                "q_lora_rank": "attention.q_lora_rank",
            },
            stated={"expert_gating_func": gating},
            unless=_DEEPSEEK,
            scalings=("yarn",),
            yarn={"type": "yarn"},
            latent=True,
        )
        for classes, gating, fixed, implied, plain in (
            (
                ("DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM"),
                _SIGMOID,
                {"moe_layer_freq": 1},
                _noaux,
                (BlockTensor("mlp.gate.e_score_correction_bias", "exp_probs_b.bias", when=ROUTED),),
            ),
            (("DeepseekV2ForCausalLM",), _SOFTMAX, {"moe_layer_freq": 1}, _greedy, ()),
        )
    ),
    *GRANITES,
    QWEN3_NEXT,
    *QWEN35,
    GgufArchitecture(
        "gpt-oss",
        ("GptOssForCausalLM",),
        biases=(*_QKV, "self_attn.o_proj"),
        plain=(
            BlockTensor("self_attn.sinks", "attn_sinks.weight"),
            BlockTensor("mlp.router.weight"),
            BlockTensor("mlp.router.bias"),
            BlockTensor("mlp.experts.gate_up_proj_bias", ("ffn_gate_exps.bias", "ffn_up_exps.bias"), form=TURNS),
            BlockTensor("mlp.experts.down_proj_bias", "ffn_down_exps.bias"),
        ),
        expert_count="num_local_experts",
        expert_size="intermediate_size",
        counts={"intermediate_size": "expert_feed_forward_length"},
        fixed={"model_type": "gpt_oss", "attention_bias": True, "swiglu_limit": 7.0},
        implied=_alternating,
        renamed={"post_attention_layernorm": "post_attention_norm"},
        windowed=True,
        needs_window=True,
        scalings=("yarn",),
        yarn={"truncate": False},
        joined={"mlp.experts.gate_up_proj": SeveralMatrices(("ffn_gate_exps", "ffn_up_exps"), turns=True)},
    ),
    GgufArchitecture(
        "hunyuan-dense",
        ("HunYuanDenseV1ForCausalLM",),
        norms=(*_NORMS, "self_attn.query_layernorm", "self_attn.key_layernorm"),
        rope_default=10000.0,
        fixed={"model_type": "hunyuan_v1_dense", "use_qk_norm": True},
    ),
    GgufArchitecture(
        "hunyuan-moe",
        ("HunYuanMoEV1ForCausalLM",),
        norms=(*_NORMS, "self_attn.query_layernorm", "self_attn.key_layernorm"),
        rope_default=10000.0,
        expert_count="num_experts",
        listed={
            "moe_intermediate_size": "expert_feed_forward_length",
            "moe_topk": "expert_used_count",
            "num_shared_expert": "expert_shared_count",
        },
        counts={"intermediate_size": "expert_shared_feed_forward_length"},
        fixed={"model_type": "hunyuan_v1_moe", "use_qk_norm": True, "use_mixed_mlp_moe": True},
    ),
    GgufArchitecture(
        "lfm2",
        ("Lfm2ForCausalLM",),
        norms=("operator_norm", "ffn_norm"),
        final_norm="model.embedding_norm",
        plain=_LFM2,
        kinds=("full_attention", "conv"),
        epsilon=("norm_eps", "attention.layer_norm_rms_epsilon"),
        fixed={"conv_bias": False},
        written={"block_auto_adjust_ff_dim": False},
        counts={"conv_L_cache": "shortconv.l_cache"},
        own_head_size=False,
    ),
    GgufArchitecture(
        "lfm2moe",
        ("Lfm2MoeForCausalLM",),
        norms=("operator_norm", "ffn_norm"),
        final_norm="model.embedding_norm",
        kinds=("full_attention", "conv"),
        plain=(
            *_LFM2,
            BlockTensor("feed_forward.gate.weight", when=LATER),
            BlockTensor("feed_forward.expert_bias", "exp_probs_b.bias", when=LATER),
        ),
        expert_count="num_experts",
        expert_size="moe_intermediate_size",
        epsilon=("norm_eps", "attention.layer_norm_rms_epsilon"),
        fixed={
            "model_type": "lfm2_moe",
            "conv_bias": False,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "use_expert_bias": True,
        },
        counts={"conv_L_cache": "shortconv.l_cache", "num_dense_layers": "leading_dense_block_count"},
        stated={"expert_gating_func": _SIGMOID},
        headless=True,
        own_head_size=False,
    ),
)
"""The architectures that are converted."""
