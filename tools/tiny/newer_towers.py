"""Configurations of tiny multimodal checkpoints of 2026, see `tools.tiny.multimodal`."""

from __future__ import annotations

import dataclasses
from typing import Final

from tools.tiny import gemma3n, voxtral
from tools.tiny.architectures import HEAD_SIZE, HIDDEN
from tools.tiny.text import COMMON, DELTA, EXPERTS, LAYERS, QWEN_MOE, TWO_EXPERTS
from tools.tiny.towers import (
    END_TOKEN,
    IMAGE_TOKEN,
    MULTIMODALS,
    NO_HEAD_SIZE,
    PATCH,
    PROCESSOR,
    QWEN3_TOWER,
    QWEN_PROCESSOR,
    SIGLIP,
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

MINICPM_TENSORS: Final[dict[str, tuple[int, ...]]] = {
    "llm.lm_head.weight": (64, 128),
    "llm.model.embed_tokens.weight": (64, 128),
    "llm.model.layers.*.input_layernorm.weight": (128,),
    "llm.model.layers.*.mlp.down_proj.weight": (128, 96),
    "llm.model.layers.*.mlp.gate_proj.weight": (96, 128),
    "llm.model.layers.*.mlp.up_proj.weight": (96, 128),
    "llm.model.layers.*.post_attention_layernorm.weight": (128,),
    "llm.model.layers.*.self_attn.k_proj.bias": (64,),
    "llm.model.layers.*.self_attn.k_proj.weight": (64, 128),
    "llm.model.layers.*.self_attn.o_proj.weight": (128, 128),
    "llm.model.layers.*.self_attn.q_proj.bias": (128,),
    "llm.model.layers.*.self_attn.q_proj.weight": (128, 128),
    "llm.model.layers.*.self_attn.v_proj.bias": (64,),
    "llm.model.layers.*.self_attn.v_proj.weight": (64, 128),
    "llm.model.norm.weight": (128,),
    "resampler.attn.in_proj_bias": (384,),
    "resampler.attn.in_proj_weight": (384, 128),
    "resampler.attn.out_proj.bias": (128,),
    "resampler.attn.out_proj.weight": (128, 128),
    "resampler.kv_proj.weight": (128, 32),
    "resampler.ln_kv.bias": (128,),
    "resampler.ln_kv.weight": (128,),
    "resampler.ln_post.bias": (128,),
    "resampler.ln_post.weight": (128,),
    "resampler.ln_q.bias": (128,),
    "resampler.ln_q.weight": (128,),
    "resampler.proj": (128, 128),
    "resampler.query": (4, 128),
    "vpm.embeddings.patch_embedding.bias": (32,),
    "vpm.embeddings.patch_embedding.weight": (32, 3, 14, 14),
    "vpm.embeddings.position_embedding.weight": (4, 32),
    "vpm.encoder.layers.*.layer_norm1.bias": (32,),
    "vpm.encoder.layers.*.layer_norm1.weight": (32,),
    "vpm.encoder.layers.*.layer_norm2.bias": (32,),
    "vpm.encoder.layers.*.layer_norm2.weight": (32,),
    "vpm.encoder.layers.*.mlp.fc1.bias": (64,),
    "vpm.encoder.layers.*.mlp.fc1.weight": (64, 32),
    "vpm.encoder.layers.*.mlp.fc2.bias": (32,),
    "vpm.encoder.layers.*.mlp.fc2.weight": (32, 64),
    "vpm.encoder.layers.*.self_attn.k_proj.bias": (32,),
    "vpm.encoder.layers.*.self_attn.k_proj.weight": (32, 32),
    "vpm.encoder.layers.*.self_attn.out_proj.bias": (32,),
    "vpm.encoder.layers.*.self_attn.out_proj.weight": (32, 32),
    "vpm.encoder.layers.*.self_attn.q_proj.bias": (32,),
    "vpm.encoder.layers.*.self_attn.q_proj.weight": (32, 32),
    "vpm.encoder.layers.*.self_attn.v_proj.bias": (32,),
    "vpm.encoder.layers.*.self_attn.v_proj.weight": (32, 32),
    "vpm.post_layernorm.bias": (32,),
    "vpm.post_layernorm.weight": (32,),
}

PIECES: Final = 4
"""Of the table of n-grams of Qwen4-Exp."""

MISTRAL3: Final = MULTIMODALS["Mistral 3"]
MINISTRAL3: Final = {
    "model_type": "ministral3",
    "rope_parameters": {
        "rope_type": "yarn",
        "type": "yarn",
        "rope_theta": 10000.0,
        "factor": 16.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4,
        "max_position_embeddings": 64,
        "llama_4_scaling_beta": 0.1,
    },
    "max_position_embeddings": 64,
}
"""Positions stretched, and queries scaled by their place: here from the fourth token on, so that a prompt shows it."""

NEWER: Final[dict[str, Multimodal]] = {
    "Ministral 3": dataclasses.replace(
        MISTRAL3,
        values=MISTRAL3.values
        | {
            "text_config": {key: value for key, value in MISTRAL3.values["text_config"].items() if key != "rope_theta"}
            | MINISTRAL3
        },
    ),
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
    "Qwen4-Exp": Multimodal(
        "Qwen4ExpForConditionalGeneration",
        "Qwen4Exp",
        VISION_TOKENS
        | {
            "model_type": "qwen4_exp",
            "tie_word_embeddings": False,
            "text_config": {key: value for key, value in COMMON.items() if key != "intermediate_size"}
            | TWO_EXPERTS
            | DELTA
            | {
                "model_type": "qwen4_exp_text",
                "num_experts": EXPERTS,
                "moe_intermediate_size": HIDDEN,
                "shared_expert_intermediate_size": HIDDEN,
                "rope_parameters": MROPE_PARAMETERS["rope_parameters"] | {"mrope_interleaved": True},
                "output_gate_type": "sigmoid",
                "hc_count": 2,
                "hc_lowrank": 32,
                "indexer_n_heads": 2,
                "indexer_kv_heads": 1,
                "indexer_head_dim": 32,
                "indexer_budget": 64,
                "indexer_compress_ratio": 4,
                "ple_layer_ids": [1],
                "ple_embed_dim": 64,
                "ple_conv_kernel_size": 4,
                "ngram_size": 3,
                "heads_per_ngram": 2,
                "ngram_vocab_size_base": 50,
                "make_ngram_vocab_size_divisible_by": 8,
                "split_ngram_parts": PIECES,
            },
            "vision_config": QWEN35_TOWER | {"model_type": "qwen4_exp_vision"},
        },
        QWEN_PROCESSOR,
        dtypes={"ngram_embedding.shard": "float16"},
    ),
    "Gemma 3n": Multimodal(
        "Gemma3nForConditionalGeneration", "Gemma3n", gemma3n.VALUES, tensors=gemma3n.TENSORS, fixed=gemma3n.MOBILENET
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
    "Voxtral": Multimodal(
        "VoxtralRealtimeForConditionalGeneration",
        "Voxtral",
        voxtral.VALUES,
        tensors=voxtral.TENSORS,
        files=voxtral.FILES,
    ),
    "MiniCPM-o": Multimodal(
        "MiniCPMO",
        "MiniCpmO",
        NO_HEAD_SIZE
        | {
            "model_type": "minicpmo",
            "hidden_size": 128,
            "use_sliding_window": False,
            "sliding_window": 512,
            "max_window_layers": LAYERS,
            "vision_batch_size": 16,
            "query_num": 4,
            "vision_config": SIGLIP,
        },
        PROCESSOR
        | {
            "image_feature_size": 4,
            "max_slice_nums": 9,
            "scale_resolution": 28,
            "slice_mode": True,
            "patch_size": PATCH,
            "im_start": "t1",
            "im_end": "t2",
            "slice_start": "t3",
            "slice_end": "t4",
            "unk": "<unk>",
            "im_id_start": "t5",
            "im_id_end": "t6",
        },
        tensors=MINICPM_TENSORS,
    ),
}
"""By title, with variants: see `tools.tiny.multimodal`."""
