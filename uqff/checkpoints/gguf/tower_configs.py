"""What each kind of ``mmproj`` file says of a configuration, and what goes without saying: :class:`TowerConfig`.

Authority: llama.cpp and transformers as :mod:`uqff.checkpoints.gguf.vision` cites them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from uqff.checkpoints.gguf.pairs import INTEGERS
from uqff.checkpoints.gguf.projectors import GEMMA3, IDEFICS3, LFM2, LLAMA4, PIXTRAL, QWEN2, QWEN3, QWEN25
from uqff.errors import UnsupportedError

if TYPE_CHECKING:
    from uqff.checkpoints.gguf.vision import Vision

__all__ = ["COLOURS", "MARKED", "MERGE", "SCALE", "TOWER_CONFIGS", "TowerConfig", "Values"]

Values = dict[str, Any]

SCALE: Final = "projector.scale_factor"
MERGE: Final = "spatial_merge_size"
_WINDOWS: Final = "n_wa_pattern"
MARKED: Final = "is_deepstack_layers"
COLOURS: Final = 3


@dataclass(frozen=True)
class TowerConfig:
    """What a kind of file says, and what goes without saying.

    Attributes:
        model_types: of each class, its ``model_type``.
        vision: what the file says of ``vision_config``.
        granted: what else stands there.
        vision_type: its ``model_type``, if it is not the model's.
        tokens: keys at the top of ``config.json``, and the texts of the tokens whose numbers they have.
        whole: what else the file says of ``config.json``.
        fixed: what else stands there.
        text_types: of each class, the ``model_type`` of ``text_config``, if it is not that of the text alone; empty if
            there is no ``text_config``.
        axes: of rotary positions with several: what else is said of them.
        scale: :attr:`Vision.scale` of a file that does not say it.
        flags: what activations there are, of metadata that says so.
        keys: more metadata that is known.
        processor: what ``preprocessor_config.json`` has beside what all have.
        beside: what ``processor_config.json`` has; None if there is none.
        processors: classes of processors that are not called like the model's.
        sizes: numbers of the text that ``text_config`` calls otherwise: names in a text model, and there.
        special: tokens that ``tokenizer_config.json`` must name for processors, by their names.
    """

    model_types: Mapping[str, str]
    vision: Callable[[Vision], Values]
    granted: Values
    tokens: Mapping[str, str]
    processor: Callable[[Vision], Values]
    vision_type: str = ""
    whole: Callable[[Vision], Values] = lambda vision: {}
    fixed: Values = field(default_factory=dict)
    text_types: Mapping[str, str] = field(default_factory=dict)
    axes: Values | None = None
    scale: int = 2
    flags: Mapping[str, bool] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    beside: Callable[[Vision], Values | None] = lambda vision: None
    processors: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
    special: Mapping[str, str] = field(default_factory=dict)


def _encoder(vision: Vision) -> Values:
    """What is said of SigLIP and its like."""
    return {
        "hidden_size": vision.sizes["hidden"],
        "intermediate_size": vision.sizes["inner"],
        "num_attention_heads": vision.heads,
        "num_hidden_layers": vision.blocks(),
        "patch_size": vision.sizes["patch"],
    }


def _siglip(vision: Vision) -> Values:
    epsilon = vision.number("attention.layer_norm_epsilon")
    return {**_encoder(vision), "image_size": vision.integer("image_size"), "layer_norm_eps": epsilon}


def _blocks(vision: Vision) -> Values:
    """What is said of the towers of Qwen."""
    return {"depth": vision.blocks(), "num_heads": vision.heads, "patch_size": vision.sizes["patch"]}


def _qwen2(vision: Vision) -> Values:
    hidden, inner = vision.sizes["hidden"], vision.sizes["inner"]
    if inner % hidden:
        raise vision.error("sizes that do not divide", "feed_forward_length", f"a multiple of {hidden}", inner)
    return {
        **_blocks(vision),
        "embed_dim": hidden,
        "hidden_size": vision.sizes["text"],
        "mlp_ratio": inner // hidden,
    }


def _qwen_sizes(vision: Vision) -> Values:
    return {
        **_blocks(vision),
        "hidden_size": vision.sizes["hidden"],
        "intermediate_size": vision.sizes["inner"],
        "out_hidden_size": vision.sizes["text"],
    }


def _qwen25(vision: Vision) -> Values:
    step = vision.integer(_WINDOWS)
    return {**_qwen_sizes(vision), "fullatt_block_indexes": list(range(step - 1, vision.blocks(), step))}


def _qwen3(vision: Vision) -> Values:
    return {
        **_qwen_sizes(vision),
        "deepstack_visual_indexes": vision.marked,
        "num_position_embeddings": vision.sizes["positions"],
        "spatial_merge_size": vision.scale,
    }


def _pixtral(vision: Vision) -> Values:
    hidden, heads = vision.sizes["hidden"], vision.heads
    if hidden % heads:
        raise vision.error("sizes that do not divide", "embedding_length", f"a multiple of {heads}", hidden)
    return {**_encoder(vision), "head_dim": hidden // heads, "image_size": vision.integer("image_size")}


def _pixtral_whole(vision: Vision) -> Values:
    if vision.get(MERGE, INTEGERS) is None:
        raise UnsupportedError(
            "a projector that merges no patches, of Pixtral alone, is not converted",
            field=f"clip.vision.{MERGE}",
            expected="a number",
            got="none",
        )
    return {"multimodal_projector_bias": vision.has("mm.1.bias"), "spatial_merge_size": vision.scale}


def _lfm2(vision: Vision) -> Values:
    epsilon = vision.number("attention.layer_norm_epsilon")
    return {**_encoder(vision), "layer_norm_eps": epsilon, "num_patches": vision.sizes["positions"]}


def _llama4(vision: Vision) -> Values:
    return {
        **_encoder(vision),
        "image_size": vision.integer("image_size"),
        "norm_eps": vision.number("attention.layer_norm_epsilon"),
        "pixel_shuffle_ratio": 1 / vision.scale,
        "projector_input_dim": vision.sizes["adapted"],
        "projector_output_dim": vision.sizes["seen"],
        "vision_output_dim": vision.sizes["seen"],
    }


def _lfm2_whole(vision: Vision) -> Values:
    return {
        "downsample_factor": vision.scale,
        "projector_bias": vision.has("mm.1.bias"),
        "projector_hidden_size": vision.sizes["projector"],
        "projector_use_layernorm": vision.has("mm.input_norm.weight"),
    }


def _tokens_of_image(vision: Vision) -> int:
    return (vision.integer("image_size") // vision.sizes["patch"] // vision.scale) ** 2


def _qwen_processor(vision: Vision) -> Values:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "max_pixels": vision.integer("image_max_pixels", default=12845056),
        "merge_size": vision.scale,
        "min_pixels": vision.integer("image_min_pixels", default=3136),
        "patch_size": vision.sizes["patch"],
        "resample": 3,
        "temporal_patch_size": 2,
    }


def _square(vision: Vision) -> Values:
    size = vision.integer("image_size")
    return {"size": {"height": size, "width": size}}


_QWEN_TOKENS: Final = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_end_token_id": "<|vision_end|>",
    "vision_start_token_id": "<|vision_start|>",
}
_QWEN_PIXELS: Final = ("image_min_pixels", "image_max_pixels")
_QWEN: Final = {"in_channels": COLOURS, "spatial_merge_size": 2, "temporal_patch_size": 2}
_QWEN3: Final = {
    "Qwen3VLForConditionalGeneration": ("qwen3_vl", "qwen3_vl_text"),
    "Qwen3VLMoeForConditionalGeneration": ("qwen3_vl_moe", "qwen3_vl_moe_text"),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", "qwen3_5_text"),
    "Qwen3_5MoeForConditionalGeneration": ("qwen3_5_moe", "qwen3_5_moe_text"),
}
"""Kinds of models and of their texts, by class."""
_SIGLIP: Final = {"hidden_act": "gelu_pytorch_tanh", "num_channels": COLOURS}

TOWER_CONFIGS: Final = {
    GEMMA3.kind: TowerConfig(
        {"Gemma3ForConditionalGeneration": "gemma3"},
        _siglip,
        {**_SIGLIP, "vision_use_head": False},
        {
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
            "image_token_index": "<image_soft_token>",
        },
        lambda vision: {
            "image_processor_type": "Gemma3ImageProcessor",
            "image_seq_length": _tokens_of_image(vision),
            "resample": 2,
            **_square(vision),
        },
        vision_type="siglip_vision_model",
        whole=lambda vision: {"mm_tokens_per_image": _tokens_of_image(vision)},
        text_types={"Gemma3ForConditionalGeneration": "gemma3_text"},
        scale=4,
        flags={"use_gelu": True},
        keys=(SCALE,),
        beside=lambda vision: {"image_seq_length": _tokens_of_image(vision)},
        special={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    ),
    IDEFICS3.kind: TowerConfig(
        {"Idefics3ForConditionalGeneration": "idefics3"},
        _siglip,
        _SIGLIP,
        {"image_token_id": "<image>"},
        lambda vision: {
            "do_image_splitting": True,
            "do_pad": True,
            "image_processor_type": "Idefics3ImageProcessor",
            "max_image_size": {"longest_edge": vision.integer("image_size")},
            "resample": 1,
            "size": {"longest_edge": vision.integer("preproc_image_size", default=4 * vision.integer("image_size"))},
        },
        vision_type="idefics3_vision",
        whole=lambda vision: {"scale_factor": vision.scale},
        text_types={"Idefics3ForConditionalGeneration": "llama"},
        flags={"use_gelu": True},
        keys=(SCALE, "preproc_image_size"),
        beside=lambda vision: {"image_seq_len": _tokens_of_image(vision)},
    ),
    LFM2.kind: TowerConfig(
        {"Lfm2VlForConditionalGeneration": "lfm2_vl"},
        _lfm2,
        {**_SIGLIP, "vision_use_head": False},
        {"image_token_id": "<image>"},
        lambda vision: {
            "downsample_factor": vision.scale,
            "encoder_patch_size": vision.sizes["patch"],
            "image_processor_type": "Lfm2VlImageProcessorFast",
            "resample": 2,
        },
        vision_type="siglip2_vision_model",
        whole=_lfm2_whole,
        fixed={"projector_hidden_act": "gelu", "vision_feature_layer": -1},
        text_types={"Lfm2VlForConditionalGeneration": "lfm2"},
        flags={"use_gelu": True},
        keys=(SCALE,),
    ),
    LLAMA4.kind: TowerConfig(
        {"Llama4ForConditionalGeneration": "llama4"},
        _llama4,
        {"hidden_act": "gelu", "num_channels": COLOURS, "rope_theta": 10000.0, "vision_feature_layer": -1},
        {
            "boi_token_index": "<|image_start|>",
            "eoi_token_index": "<|image_end|>",
            "image_token_index": "<|patch|>",
        },
        lambda vision: {
            "image_processor_type": "Llama4ImageProcessorFast",
            "max_patches": 16,
            "resample": 2,
            **_square(vision),
        },
        vision_type="llama4_vision_model",
        text_types={"Llama4ForConditionalGeneration": "llama4_text"},
        sizes={"intermediate_size": "intermediate_size_mlp", "moe_intermediate_size": "intermediate_size"},
        flags={"use_gelu": True},
        keys=(SCALE,),
        beside=lambda vision: {"patch_size": vision.sizes["patch"], "pixel_shuffle_ratio": 1 / vision.scale},
    ),
    PIXTRAL.kind: TowerConfig(
        {"Mistral3ForConditionalGeneration": "mistral3"},
        _pixtral,
        {"hidden_act": "silu", "num_channels": COLOURS, "rope_theta": 10000.0},
        {"image_token_index": "[IMG]"},
        lambda vision: {
            "image_processor_type": "PixtralImageProcessor",
            "patch_size": vision.sizes["patch"],
            "resample": 3,
            "size": {"longest_edge": vision.integer("image_size")},
        },
        vision_type="pixtral",
        whole=_pixtral_whole,
        fixed={"projector_hidden_act": "gelu", "vision_feature_layer": -1},
        text_types={"Mistral3ForConditionalGeneration": "mistral"},
        flags={"use_silu": True, "use_gelu": False},
        keys=(MERGE,),
        beside=lambda vision: {
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
            "image_token": "[IMG]",
            "patch_size": vision.sizes["patch"],
            "spatial_merge_size": vision.scale,
        },
        processors={"Mistral3ForConditionalGeneration": "PixtralProcessor"},
    ),
    QWEN2.kind: TowerConfig(
        {"Qwen2VLForConditionalGeneration": "qwen2_vl"},
        _qwen2,
        _QWEN,
        _QWEN_TOKENS,
        _qwen_processor,
        axes={"type": "mrope"},
        keys=_QWEN_PIXELS,
    ),
    QWEN25.kind: TowerConfig(
        {"Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl"},
        _qwen25,
        {**_QWEN, "hidden_act": "silu", "tokens_per_second": 2, "window_size": 112},
        _QWEN_TOKENS,
        _qwen_processor,
        axes={"type": "mrope"},
        flags={"use_silu": True},
        keys=(*_QWEN_PIXELS, _WINDOWS),
    ),
    QWEN3.kind: TowerConfig(
        {name: kind for name, (kind, _) in _QWEN3.items()},
        _qwen3,
        {"hidden_act": "gelu_pytorch_tanh", "in_channels": COLOURS, "temporal_patch_size": 2},
        _QWEN_TOKENS,
        _qwen_processor,
        text_types={name: text for name, (_, text) in _QWEN3.items()},
        axes={"mrope_interleaved": True},
        flags={"use_gelu": True},
        keys=(*_QWEN_PIXELS, MARKED, MERGE),
        processors=dict.fromkeys(_QWEN3, "Qwen3VLProcessor"),
    ),
}
"""By ``clip.projector_type``."""
