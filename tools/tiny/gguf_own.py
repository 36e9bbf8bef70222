"""What tiny GGUF files of single architectures have: metadata, and tensors in llama.cpp's shapes and order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import gguf
import numpy as np


def transposed(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Tensors of DeepSeek, with keys and values of the latent state apart, and the keys transposed."""
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    for name, values in tensors.items():
        if ".kv_b_proj." in name:
            whole = values.reshape(heads, -1, values.shape[-1])
            yield name.replace("kv_b", "k_b"), np.ascontiguousarray(whole[:, :nope].transpose(0, 2, 1))
            yield name.replace("kv_b", "v_b"), np.ascontiguousarray(whole[:, nope:])
        else:
            yield name, values


def recurrent(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Tensors of recurrent layers in llama.cpp's shapes and order; the others as they are."""
    for name, values in tensors.items():
        last = name.rpartition(".")[2]
        if last == "A_log":
            yield name, -np.exp(values).reshape((-1, 1) if ".mamba." in name else -1)
        elif last == "D":
            yield name, values[:, None]
        elif name.endswith(".mamba.norm.weight"):
            yield name, values.reshape(config["mamba_n_groups"], -1)
        elif name.endswith(".conv1d.weight"):
            yield name, values[:, 0]
        elif name.endswith(".in_proj_qkvz.weight"):
            keys, each = config["linear_num_key_heads"], config["linear_num_value_heads"]
            size, wide = config["linear_key_head_dim"], config["linear_value_head_dim"] * each // keys
            heads = values.reshape(keys, 2 * size + 2 * wide, -1)
            parts = np.split(heads, [size, 2 * size, 2 * size + wide], axis=1)
            query, key, value, z = (part.reshape(-1, values.shape[-1]) for part in parts)
            yield name.replace("in_proj_qkvz", "in_proj_qkv"), np.concatenate((query, key, value))
            yield name.replace("in_proj_qkvz", "in_proj_z"), np.ascontiguousarray(z)
        else:
            yield name, values


def tiled(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Tensors of Qwen3.5: of linear attention, the first value head of each key head, then the second of each, ..."""
    keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
    size, through = config["linear_value_head_dim"], 2 * keys * config["linear_key_head_dim"]
    each = values // keys
    order = [key * each + at for at in range(each) for key in range(keys)]

    def moved(values: np.ndarray[Any, Any], rows: int = size) -> np.ndarray[Any, Any]:
        return np.concatenate([values[head * rows : (head + 1) * rows] for head in order])

    for name, numbers in tensors.items():
        last = name.partition(".linear_attn.")[2]
        if last in ("in_proj_qkv.weight", "conv1d.weight"):
            yield name, np.concatenate((numbers[:through], moved(numbers[through:])))
        elif last == "in_proj_z.weight":
            yield name, moved(numbers)
        elif last == "in_proj_ba.weight":
            pairs = numbers.reshape(keys, 2, each, -1)
            for at, part in enumerate("ba"):
                rows = pairs[:, at].reshape(values, -1)
                yield name.replace("in_proj_ba", f"in_proj_{part}"), moved(rows, 1)
        elif last in ("in_proj_b.weight", "in_proj_a.weight", "A_log", "dt_bias"):
            yield name, moved(numbers, 1)
        elif last == "out_proj.weight":
            yield name, np.ascontiguousarray(moved(numbers.T).T)
        else:
            yield name, numbers


def add_own(writer: gguf.GGUFWriter, architecture: str, config: Mapping[str, Any]) -> None:
    """Metadata that files of one architecture have, as llama.cpp's converter gives it to them."""
    if architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(config["sliding_window"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if architecture == "phi2":
        writer.add_layer_norm_eps(config["layer_norm_eps"])
    if architecture == "starcoder2":
        writer.add_layer_norm_eps(config["norm_epsilon"])
    if architecture in ("phi3", "phimoe"):
        original, longest = config["original_max_position_embeddings"], config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        if config.get("rope_scaling"):
            writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(longest / original) / np.log(original))))
        writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
        writer.add_sliding_window(0)
    if architecture == "glm4moe":
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
    if architecture == "deepseek2":
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        sigmoid = config["scoring_func"] == "sigmoid"
        writer.add_expert_gating_func(
            gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX
        )
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        if config["norm_topk_prob"]:
            writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_q_lora_rank(config["q_lora_rank"])
        writer.add_kv_lora_rank(config["kv_lora_rank"])
        writer.add_rope_dimension_count(config["qk_rope_head_dim"])
        if scaling := config.get("rope_scaling"):
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(scaling["factor"])
            writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
            writer.add_rope_scaling_yarn_log_mul(scaling["mscale_all_dim"] / 10)
    if architecture == "gpt-oss":
        scaling = config["rope_scaling"]
        writer.add_sliding_window(config["sliding_window"])
        writer.add_expert_feed_forward_length(config["intermediate_size"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        if scaling["beta_fast"] is not None:
            writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])
    if architecture.startswith("granite"):
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if architecture == "granitehybrid":
        writer.add_rope_scaling_finetuned(False)
        writer.add_ssm_conv_kernel(config["mamba_d_conv"])
        writer.add_ssm_state_size(config["mamba_d_state"])
        writer.add_ssm_group_count(config["mamba_n_groups"])
        writer.add_ssm_inner_size(config["mamba_expand"] * config["hidden_size"])
        writer.add_ssm_time_step_rank(config["mamba_n_heads"])
        if not config["num_local_experts"]:
            writer.add_expert_count(0)
            writer.add_expert_used_count(0)
    if architecture.startswith("qwen35"):
        rope = config.get("rope_parameters") or {}
        writer.add_rope_dimension_sections([*rope.get("mrope_section", [2, 1, 1]), 0])
    if architecture in ("qwen3next", "qwen35", "qwen35moe"):
        writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
        writer.add_ssm_state_size(config["linear_key_head_dim"])
        writer.add_ssm_group_count(config["linear_num_key_heads"])
        writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
        writer.add_ssm_inner_size(config["linear_value_head_dim"] * config["linear_num_value_heads"])
        writer.add_full_attention_interval(config["full_attention_interval"])
    if architecture in ("qwen3next", "qwen35moe"):
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if architecture in ("granitemoe", "granitehybrid"):
        writer.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])
    if architecture == "hunyuan-moe":
        writer.add_expert_shared_feed_forward_length(config["intermediate_size"])
        writer.add_expert_shared_count(config["num_shared_expert"][0])
    if architecture.startswith("lfm2"):
        writer.add_shortconv_l_cache(config["conv_L_cache"])
        writer.add_layer_norm_rms_eps(config["norm_eps"])
    if architecture == "lfm2moe":
        writer.add_leading_dense_block_count(config["num_dense_layers"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
