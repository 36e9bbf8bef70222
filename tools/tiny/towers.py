"""What the configurations of tiny multimodal checkpoints say, see `tools.tiny.multimodal`."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from tools.tiny.architectures import HEAD_SIZE, HIDDEN, INNER
from tools.tiny.text import COMMON, CONVOLUTION, EXPERTS, LAYERS, QWEN_MOE

IMAGE: Final = 28
PATCH: Final = 14
TOWER: Final = 32
"""Hidden size of a tower."""
IMAGE_TOKEN, VIDEO_TOKEN, START_TOKEN, END_TOKEN = 60, 61, 62, 63

NO_HEAD_SIZE = {key: value for key, value in COMMON.items() if key != "head_dim"}
MROPE = {"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]}}
VISION_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": START_TOKEN,
    "vision_end_token_id": END_TOKEN,
}
ENCODER = {
    "hidden_size": TOWER,
    "intermediate_size": 2 * TOWER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_channels": 3,
    "image_size": IMAGE,
    "patch_size": PATCH,
}
SIGLIP = ENCODER | {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
CLIP = ENCODER | {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "projection_dim": TOWER}
QWEN_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": PATCH,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "min_pixels": IMAGE * IMAGE,
    "max_pixels": 4 * IMAGE * IMAGE,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
PROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "rescale_factor": 1 / 255,
    "resample": 3,
    "size": {"height": IMAGE, "width": IMAGE},
}
QWEN3_TOWER = {
    "depth": LAYERS,
    "hidden_size": TOWER,
    "intermediate_size": 2 * TOWER,
    "out_hidden_size": HIDDEN,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "hidden_act": "gelu_pytorch_tanh",
}
NESTED_TOWER = (("vision_tower.", "vision_tower.vision_model."),)
TILED_TOWER = {
    "hidden_size": TOWER,
    "intermediate_size": 2 * TOWER,
    "num_hidden_layers": LAYERS,
    "num_channels": 3,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "norm_eps": 1e-5,
    "hidden_act": "gelu",
}


@dataclasses.dataclass(frozen=True)
class Multimodal:
    """An architecture: what its `config.json` says, and what the client calls it.

    Attributes:
        architecture: the class in `config.json` and in `transformers`.
        client: the client's name of it in Python.
        values: of `config.json`, in the form that the engine reads.
        preprocessor: `preprocessor_config.json`.
        processor: `processor_config.json`, if there is one.
        tensors: names and shapes where `transformers` has no such architecture; `*` is the number of each layer.
        dtypes: what tensors are stored in whose names have a part, if not in F32.
        fixed: names and shapes of what only the client needs, and has one size: all zeros, in F16.
        files: what files are called that have other names than usual; the configuration names no architecture then.
        renamed: parts of names as `transformers` 5 saves them, and as published checkpoints have them.
    """

    architecture: str
    client: str
    values: dict[str, Any]
    preprocessor: dict[str, Any] = dataclasses.field(default_factory=lambda: PROCESSOR)
    processor: dict[str, Any] | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    tensors: dict[str, tuple[int, ...]] | None = None
    dtypes: dict[str, str] = dataclasses.field(default_factory=dict)
    fixed: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    files: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def model_type(self) -> str:
        """What `transformers` calls its configuration."""
        return str(self.values["model_type"])


MULTIMODALS: dict[str, Multimodal] = {
    "Qwen2-VL": Multimodal(
        "Qwen2VLForConditionalGeneration",
        "Qwen2VL",
        NO_HEAD_SIZE
        | MROPE
        | VISION_TOKENS
        | {
            "model_type": "qwen2_vl",
            "use_sliding_window": False,
            "sliding_window": 512,
            "max_window_layers": LAYERS,
            "vision_config": {
                "model_type": "qwen2_vl",
                "depth": LAYERS,
                "embed_dim": TOWER,
                "hidden_size": HIDDEN,
                "mlp_ratio": 2,
                "num_heads": 2,
                "in_chans": 3,
                "patch_size": PATCH,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
            },
        },
        QWEN_PROCESSOR,
    ),
    "Qwen2.5-VL": Multimodal(
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5VL",
        NO_HEAD_SIZE
        | MROPE
        | VISION_TOKENS
        | {
            "model_type": "qwen2_5_vl",
            "use_sliding_window": False,
            "sliding_window": 512,
            "max_window_layers": LAYERS,
            "vision_config": {
                "model_type": "qwen2_5_vl",
                "depth": LAYERS,
                "hidden_size": TOWER,
                "hidden_act": "silu",
                "intermediate_size": 2 * TOWER,
                "out_hidden_size": HIDDEN,
                "num_heads": 2,
                "in_chans": 3,
                "patch_size": PATCH,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 4 * PATCH,
                "fullatt_block_indexes": [1],
                "tokens_per_second": 2,
            },
        },
        QWEN_PROCESSOR,
    ),
    "Qwen3-VL": Multimodal(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VL",
        VISION_TOKENS
        | {
            "model_type": "qwen3_vl",
            "tie_word_embeddings": False,
            "text_config": COMMON | MROPE | {"model_type": "qwen3_vl_text"},
            "vision_config": QWEN3_TOWER | {"model_type": "qwen3_vl"},
        },
        QWEN_PROCESSOR,
    ),
    "Qwen3-VL-MoE": Multimodal(
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoE",
        VISION_TOKENS
        | {
            "model_type": "qwen3_vl_moe",
            "tie_word_embeddings": False,
            "text_config": COMMON
            | MROPE
            | QWEN_MOE
            | {"model_type": "qwen3_vl_moe_text", "mlp_only_layers": [1], "moe_intermediate_size": INNER},
            "vision_config": QWEN3_TOWER | {"model_type": "qwen3_vl_moe"},
        },
        QWEN_PROCESSOR,
    ),
    "Gemma 3": Multimodal(
        "Gemma3ForConditionalGeneration",
        "Gemma3",
        {
            "model_type": "gemma3",
            "tie_word_embeddings": True,
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": START_TOKEN,
            "eoi_token_index": END_TOKEN,
            "mm_tokens_per_image": 1,
            "text_config": COMMON
            | {
                "model_type": "gemma3_text",
                "hidden_activation": "gelu_pytorch_tanh",
                "query_pre_attn_scalar": HEAD_SIZE,
                "sliding_window": 512,
                "sliding_window_pattern": 2,
                "rope_local_base_freq": 5000.0,
                "rope_theta": 1000000.0,
                "tie_word_embeddings": True,
            },
            "vision_config": SIGLIP | {"vision_use_head": False},
        },
        renamed=NESTED_TOWER,
    ),
    "Gemma 3 text": Multimodal(
        "Gemma3ForCausalLM",
        "Gemma3",
        COMMON
        | {
            "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": HEAD_SIZE,
            "sliding_window": 512,
            "sliding_window_pattern": 2,
            "rope_local_base_freq": 5000.0,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
        },
    ),
    "LLaVA": Multimodal(
        "LlavaForConditionalGeneration",
        "LLaVA",
        {
            "model_type": "llava",
            "image_token_index": IMAGE_TOKEN,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "tie_word_embeddings": False,
            "text_config": NO_HEAD_SIZE | {"model_type": "llama"},
            "vision_config": CLIP,
        },
        PROCESSOR | {"size": {"shortest_edge": IMAGE}, "crop_size": {"height": IMAGE, "width": IMAGE}},
        renamed=NESTED_TOWER,
    ),
    "LLaVA-NeXT": Multimodal(
        "LlavaNextForConditionalGeneration",
        "LLaVANext",
        {
            "model_type": "llava_next",
            "image_token_index": IMAGE_TOKEN,
            "image_grid_pinpoints": [[IMAGE, 2 * IMAGE], [2 * IMAGE, IMAGE]],
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "use_image_newline_parameter": True,
            "tie_word_embeddings": False,
            "text_config": NO_HEAD_SIZE | {"model_type": "mistral", "sliding_window": None},
            "vision_config": CLIP,
        },
        PROCESSOR | {"size": {"shortest_edge": IMAGE}, "crop_size": {"height": IMAGE, "width": IMAGE}},
        renamed=NESTED_TOWER,
    ),
    "Idefics2": Multimodal(
        "Idefics2ForConditionalGeneration",
        "Idefics2",
        {
            "model_type": "idefics2",
            "image_token_id": IMAGE_TOKEN,
            "tie_word_embeddings": False,
            "use_cache": True,
            "text_config": NO_HEAD_SIZE | {"model_type": "mistral", "sliding_window": 512},
            "vision_config": SIGLIP | {"model_type": "idefics2_vision"},
            "perceiver_config": {
                "model_type": "idefics2_perceiver",
                "hidden_act": "silu",
                "hidden_size": HIDDEN,
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 4,
                "resampler_head_dim": HEAD_SIZE,
                "num_key_value_heads": 2,
            },
        },
        processor={"image_seq_len": 4, "processor_class": "Idefics2Processor"},
    ),
    "Idefics3": Multimodal(
        "Idefics3ForConditionalGeneration",
        "Idefics3",
        {
            "model_type": "idefics3",
            "image_token_id": IMAGE_TOKEN,
            "scale_factor": 2,
            "tie_word_embeddings": False,
            "use_cache": True,
            "text_config": NO_HEAD_SIZE | {"model_type": "llama"},
            "vision_config": SIGLIP | {"model_type": "idefics3_vision"},
        },
    ),
    "Llama 3.2 Vision": Multimodal(
        "MllamaForConditionalGeneration",
        "VLlama",
        {
            "model_type": "mllama",
            "image_token_index": IMAGE_TOKEN,
            "tie_word_embeddings": False,
            "text_config": NO_HEAD_SIZE
            | {
                "model_type": "mllama_text_model",
                "cross_attention_layers": [1],
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 512,
                },
            },
            "vision_config": TILED_TOWER
            | {
                "model_type": "mllama_vision_model",
                "attention_heads": 2,
                "num_global_layers": 1,
                "vision_output_dim": 2 * TOWER,
                "max_num_tiles": 4,
                "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
            },
        },
        PROCESSOR | {"max_image_tiles": 4, "do_pad": True},
    ),
    "Mistral 3": Multimodal(
        "Mistral3ForConditionalGeneration",
        "Mistral3",
        {
            "model_type": "mistral3",
            "image_token_index": IMAGE_TOKEN,
            "multimodal_projector_bias": False,
            "projector_hidden_act": "gelu",
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
            "tie_word_embeddings": False,
            "text_config": COMMON | {"model_type": "mistral", "sliding_window": None},
            "vision_config": ENCODER
            | {
                "model_type": "pixtral",
                "head_dim": 16,
                "hidden_act": "silu",
                "rope_theta": 10000.0,
            },
        },
        PROCESSOR | {"patch_size": PATCH, "size": {"longest_edge": IMAGE}},
        {
            "image_break_token": "t61",
            "image_end_token": "t62",
            "image_token": "t60",
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "processor_class": "PixtralProcessor",
        },
    ),
    "LFM2-VL": Multimodal(
        "Lfm2VlForConditionalGeneration",
        "Lfm2Vl",
        {
            "model_type": "lfm2_vl",
            "image_token_id": IMAGE_TOKEN,
            "projector_hidden_act": "gelu",
            "projector_hidden_size": 2 * HIDDEN,
            "projector_bias": True,
            "projector_use_layernorm": True,
            "downsample_factor": 2,
            "tie_word_embeddings": True,
            "text_config": {key: value for key, value in (COMMON | CONVOLUTION).items() if value != "none"}
            | {
                "model_type": "lfm2",
                "block_ff_dim": INNER,
                "block_multiple_of": 32,
                "block_ffn_dim_multiplier": 1.0,
                "block_auto_adjust_ff_dim": False,
            },
            "vision_config": {key: value for key, value in SIGLIP.items() if key != "image_size"}
            | {"model_type": "siglip2_vision_model", "num_patches": 16, "vision_use_head": False},
        },
        renamed=NESTED_TOWER,
    ),
    "Llama 4": Multimodal(
        "Llama4ForConditionalGeneration",
        "Llama4",
        {
            "model_type": "llama4",
            "image_token_index": IMAGE_TOKEN,
            "boi_token_index": START_TOKEN,
            "eoi_token_index": END_TOKEN,
            "tie_word_embeddings": False,
            "text_config": COMMON
            | {
                "model_type": "llama4_text",
                "intermediate_size": HIDDEN,
                "intermediate_size_mlp": INNER,
                "num_local_experts": EXPERTS,
                "num_experts_per_tok": 1,
                "interleave_moe_layer_step": 2,
                "use_qk_norm": True,
                "attention_chunk_size": 512,
                "rope_scaling": None,
                "no_rope_layers": [1, 0],
            },
            "vision_config": TILED_TOWER
            | {
                "model_type": "llama4_vision_model",
                "num_attention_heads": 2,
                "intermediate_size": 4 * TOWER,
                "vision_output_dim": HIDDEN,
                "pixel_shuffle_ratio": 0.5,
                "projector_input_dim": HIDDEN,
                "projector_output_dim": HIDDEN,
                "vision_feature_layer": -1,
                "rope_theta": 10000.0,
            },
        },
    ),
}
"""By title in the package's table."""
