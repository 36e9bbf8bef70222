"""Configurations of tiny multimodal checkpoints of 2026, see `tools.tiny.multimodal`."""

from __future__ import annotations

from typing import Final

from tools.tiny.architectures import HEAD_SIZE, HIDDEN
from tools.tiny.text import COMMON, DELTA, EXPERTS, LAYERS, QWEN_MOE
from tools.tiny.towers import (
    END_TOKEN,
    IMAGE_TOKEN,
    PATCH,
    QWEN3_TOWER,
    QWEN_PROCESSOR,
    START_TOKEN,
    TOWER,
    VIDEO_TOKEN,
    VISION_TOKENS,
    Multimodal,
)

QWEN35_TOWER = {key: value for key, value in QWEN3_TOWER.items() if key != "deepstack_visual_indexes"} | {
    "deepstack_visual_indexes": []
}
MROPE_PARAMETERS = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
    }
}
GEMMA_ROPE = {
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    }
}
GEMMA_LAYERS = {"sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]}
GEMMA_TOWER = {
    "model_type": "gemma4_vision",
    "hidden_size": TOWER,
    "intermediate_size": 2 * TOWER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "patch_size": 16,
    "position_embedding_size": 16,
    "pooling_kernel_size": 2,
    "default_output_length": 4,
    "use_clipped_linears": False,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "axial"},
}
GEMMA4_TEXT = (
    COMMON
    | GEMMA_ROPE
    | GEMMA_LAYERS
    | {
        "model_type": "gemma4_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 32,
        "global_head_dim": 2 * HEAD_SIZE,
        "num_global_key_value_heads": None,
        "num_kv_shared_layers": 0,
        "attention_k_eq_v": False,
        "enable_moe_block": False,
        "use_double_wide_mlp": False,
    }
)

NEWER: Final[dict[str, Multimodal]] = {
    "Qwen3.5 with vision": Multimodal(
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5",
        VISION_TOKENS
        | {
            "model_type": "qwen3_5",
            "tie_word_embeddings": False,
            "text_config": COMMON | DELTA | MROPE_PARAMETERS | {"model_type": "qwen3_5_text"},
            "vision_config": QWEN35_TOWER | {"model_type": "qwen3_5"},
        },
        QWEN_PROCESSOR,
    ),
    "Qwen3.5-MoE": Multimodal(
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5Moe",
        VISION_TOKENS
        | {
            "model_type": "qwen3_5_moe",
            "tie_word_embeddings": False,
            "text_config": COMMON
            | QWEN_MOE
            | DELTA
            | MROPE_PARAMETERS
            | {
                "model_type": "qwen3_5_moe_text",
                "mlp_only_layers": [],
                "shared_expert_intermediate_size": HIDDEN,
            },
            "vision_config": QWEN35_TOWER | {"model_type": "qwen3_5_moe"},
        },
        QWEN_PROCESSOR,
    ),
    "Gemma 4": Multimodal(
        "Gemma4ForConditionalGeneration",
        "Gemma4",
        {
            "model_type": "gemma4",
            "tie_word_embeddings": True,
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": VIDEO_TOKEN,
            "boi_token_id": START_TOKEN,
            "eoi_token_id": END_TOKEN,
            "audio_token_id": 59,
            "boa_token_id": 58,
            "eoa_token_id": 57,
            "eoa_token_index": 57,
            "vision_soft_tokens_per_image": 4,
            "text_config": GEMMA4_TEXT
            | {
                "num_hidden_layers": 2 * LAYERS,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "num_kv_shared_layers": 2,
                "use_double_wide_mlp": True,
            },
            "vision_config": GEMMA_TOWER,
            "audio_config": {
                "model_type": "gemma4_audio",
                "hidden_size": TOWER,
                "num_attention_heads": 2,
                "num_hidden_layers": LAYERS,
                "attention_chunk_size": 12,
                "attention_context_left": 13,
                "attention_context_right": 0,
                "conv_kernel_size": 5,
                "subsampling_conv_channels": [128, 4],
                "output_proj_dims": HIDDEN,
                "rms_norm_eps": 1e-6,
            },
        },
    ),
    "Gemma 4 MoE": Multimodal(
        "Gemma4ForConditionalGeneration",
        "Gemma4",
        {
            "model_type": "gemma4",
            "tie_word_embeddings": True,
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": VIDEO_TOKEN,
            "boi_token_id": START_TOKEN,
            "eoi_token_id": END_TOKEN,
            "audio_token_id": 59,
            "vision_soft_tokens_per_image": 4,
            "text_config": GEMMA4_TEXT
            | {
                "attention_k_eq_v": True,
                "num_global_key_value_heads": 1,
                "enable_moe_block": True,
                "num_experts": EXPERTS,
                "top_k_experts": 2,
                "moe_intermediate_size": HIDDEN,
                "expert_intermediate_size": HIDDEN,
                "hidden_size_per_layer_input": 0,
            },
            "vision_config": GEMMA_TOWER,
            "audio_config": None,
        },
    ),
    "Muse-Glimmer": Multimodal(
        "MuseGlimmerForConditionalGeneration",
        "MuseGlimmer",
        {
            "model_type": "muse_glimmer",
            "tie_word_embeddings": False,
            "image_token_id": IMAGE_TOKEN,
            "video_token_id": VIDEO_TOKEN,
            "out_hidden_size": 4 * TOWER,
            "projector_hidden_size": HIDDEN,
            "projector_hidden_act": "gelu",
            "text_config": {key: value for key, value in COMMON.items() if key != "hidden_act"}
            | {
                "model_type": "muse_glimmer_text",
                "hidden_activation": "silu",
                "sliding_window": 512,
                "layer_types": ["sliding_attention", "full_attention"],
                "layer_rope_theta": [10000.0, 0],
                "qk_scale_factor": 3.87,
                "output_multiplier": 0.2,
                "post_norm_eps": 1e-8,
                "final_logit_softcapping": 20.0,
                "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            },
            "vision_config": {
                "model_type": "muse_glimmer_vision",
                "patch_size": PATCH,
                "pos_emb_height": 4,
                "pos_emb_width": 4,
                "num_attention_heads": 2,
                "num_hidden_layers": LAYERS,
                "hidden_size": TOWER,
                "intermediate_size": 2 * TOWER,
                "hidden_act": "gelu",
                "patch_temporal": 2,
                "merge_size": 2,
                "max_position_embeddings": 64,
                "layer_norm_eps": 1e-5,
                "layer_types": ["window_attention", "full_attention"],
                "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
            },
        },
        QWEN_PROCESSOR,
    ),
    "DiffusionGemma": Multimodal(
        "DiffusionGemmaForBlockDiffusion",
        "DiffusionGemma",
        {
            "model_type": "diffusion_gemma",
            "tie_word_embeddings": True,
            "image_token_id": IMAGE_TOKEN,
            "boi_token_id": START_TOKEN,
            "eoi_token_id": END_TOKEN,
            "canvas_length": 16,
            "vision_soft_tokens_per_image": 4,
            "text_config": {key: value for key, value in GEMMA4_TEXT.items() if "per_layer_input" not in key}
            | {
                "model_type": "diffusion_gemma_text",
                "num_global_key_value_heads": 1,
                "num_experts": EXPERTS,
                "top_k_experts": 2,
                "moe_intermediate_size": HIDDEN,
                "expert_intermediate_size": HIDDEN,
            },
            "vision_config": GEMMA_TOWER,
        },
    ),
}
