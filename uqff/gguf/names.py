"""What GGUF calls the modules of models, where most of its architectures agree.

Authority: llama.cpp, ``gguf-py/gguf/tensor_mapping.py``.
"""

from __future__ import annotations

from typing import Final

__all__ = ["BLOCK", "ROOT"]

ROOT: Final = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.final_layernorm": "output_norm",
    "model.embedding_norm": "token_embd_norm",
    "lm_head": "output",
}
BLOCK: Final = {
    "input_layernorm": "attn_norm",
    "operator_norm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.out_proj": "attn_output",
    "self_attn.dense": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.query_layernorm": "attn_q_norm",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.key_layernorm": "attn_k_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "post_self_attn_layernorm": "post_attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "ffn_norm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "feed_forward.w1": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.fc1": "ffn_up",
    "mlp.c_fc": "ffn_up",
    "feed_forward.w3": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.fc2": "ffn_down",
    "mlp.c_proj": "ffn_down",
    "feed_forward.w2": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "post_mlp_layernorm": "post_ffw_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate.wg": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "feed_forward.gate": "ffn_gate_inp",
    "mamba.in_proj": "ssm_in",
    "mamba.out_proj": "ssm_out",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.out_proj": "ssm_out",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "conv.in_proj": "shortconv.in_proj",
    "conv.conv": "shortconv.conv",
    "conv.out_proj": "shortconv.out_proj",
    **{
        f"{path}.experts.{name}_proj": f"ffn_{name}_exps"
        for path in ("mlp", "block_sparse_moe", "feed_forward")
        for name in ("gate", "up", "down")
    },
    **{
        f"mlp.{path}.{name}_proj": f"ffn_{name}_shexp"
        for path in ("shared_experts", "shared_expert", "shared_mlp")
        for name in ("gate", "up", "down")
    },
}
"""Modules of a decoder layer; of experts, the layer of UQFF that has all of them."""
