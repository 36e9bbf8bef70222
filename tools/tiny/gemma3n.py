"""Gemma 3n, tiny but for its tower of images: MobileNet V5, of which there is one size, of 294 million weights.

No layer of that tower is quantised, so that nothing here needs it but the client, which does not load a model without.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from tools.tiny.architectures import HEAD_SIZE, HEADS, HIDDEN, INNER, KV_HEADS, VOCABULARY
from tools.tiny.text import COMMON, LAYERS

__all__ = ["COMPUTED", "MOBILENET", "TENSORS", "VALUES"]

SOUND: Final = 32
"""Hidden size of the tower of sound."""
FEATURES: Final = 2048
"""What MobileNet V5 gives."""
BLOCKS: Final = 2 * LAYERS
PER_LAYER: Final = 32
LAUREL: Final = 16
INPUTS: Final = 4
TOKENS: Final = 8
"""Of images, and of sound."""
CHANNELS: Final = (128, 32)

Shapes = dict[str, tuple[int, ...]]

VALUES: Final[dict[str, Any]] = {
    "model_type": "gemma3n",
    "tie_word_embeddings": True,
    "audio_soft_tokens_per_image": 4,
    "vision_soft_tokens_per_image": 4,
    "image_token_id": 60,
    "audio_token_id": 59,
    "boi_token_id": 62,
    "eoi_token_id": 63,
    "boa_token_id": 58,
    "eoa_token_id": 57,
    "text_config": {key: value for key, value in COMMON.items() if key not in ("hidden_act", "rope_theta")}
    | {
        "model_type": "gemma3n_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "num_hidden_layers": BLOCKS,
        "intermediate_size": [INNER] * BLOCKS,
        "num_kv_shared_layers": 2,
        "sliding_window": 512,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": PER_LAYER,
        "altup_num_inputs": INPUTS,
        "altup_active_idx": 0,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "laurel_rank": LAUREL,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "final_logit_softcapping": 30.0,
    },
    "vision_config": {
        "model_type": "gemma3n_vision",
        "architecture": "mobilenetv5_300m_enc",
        "hidden_size": FEATURES,
        "vocab_size": TOKENS,
        "vocab_offset": VOCABULARY,
        "rms_norm_eps": 1e-6,
    },
    "audio_config": {
        "model_type": "gemma3n_audio",
        "hidden_size": SOUND,
        "input_feat_size": 128,
        "conf_num_attention_heads": 2,
        "conf_num_hidden_layers": LAYERS,
        "conf_conv_kernel_size": 5,
        "sscp_conv_channel_size": list(CHANNELS),
        "sscp_conv_kernel_size": [[3, 3], [3, 3]],
        "sscp_conv_stride_size": [[2, 2], [2, 2]],
        "vocab_size": TOKENS,
        "vocab_offset": VOCABULARY + TOKENS,
        "rms_norm_eps": 1e-6,
    },
}


def _decoder_layer() -> Shapes:
    query, kv = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE
    norms = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
    norms += ["post_per_layer_input_norm", "altup.router_norm", "laurel.post_laurel_norm"]
    return {f"{norm}.weight": (HIDDEN,) for norm in norms} | {
        "self_attn.q_proj.weight": (query, HIDDEN),
        "self_attn.k_proj.weight": (kv, HIDDEN),
        "self_attn.v_proj.weight": (kv, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, query),
        "self_attn.q_norm.weight": (HEAD_SIZE,),
        "self_attn.k_norm.weight": (HEAD_SIZE,),
        "mlp.gate_proj.weight": (INNER, HIDDEN),
        "mlp.up_proj.weight": (INNER, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INNER),
        "altup.correct_output_scale": (HIDDEN,),
        "altup.correction_coefs.weight": (INPUTS, INPUTS),
        "altup.prediction_coefs.weight": (INPUTS * INPUTS, INPUTS),
        "altup.modality_router.weight": (INPUTS, HIDDEN),
        "laurel.linear_left.weight": (LAUREL, HIDDEN),
        "laurel.linear_right.weight": (HIDDEN, LAUREL),
        "per_layer_input_gate.weight": (PER_LAYER, HIDDEN),
        "per_layer_projection.weight": (HIDDEN, PER_LAYER),
    }


def _conformer() -> Shapes:
    halves = ("ffw_layer_start", "ffw_layer_end")
    norms = [f"{half}.{end}_layer_norm" for half in halves for end in ("pre", "post")]
    norms += ["attention.pre_attn_norm", "attention.post_norm", "lconv1d.pre_layer_norm", "lconv1d.conv_norm", "norm"]
    square = [f"attention.attn.{name}_proj" for name in "qkv"]
    square += ["attention.attn.relative_position_embedding.pos_proj", "attention.post", "lconv1d.linear_end"]
    return (
        {f"{norm}.weight": (SOUND,) for norm in norms}
        | {f"{name}.weight": (SOUND, SOUND) for name in square}
        | {f"{half}.ffw_layer_1.weight": (4 * SOUND, SOUND) for half in halves}
        | {f"{half}.ffw_layer_2.weight": (SOUND, 4 * SOUND) for half in halves}
        | {
            "attention.attn.per_dim_scale": (SOUND // 2,),
            "lconv1d.linear_start.weight": (2 * SOUND, SOUND),
            "lconv1d.depthwise_conv1d.weight": (SOUND, 1, 5),
        }
    )


def _embedder(size: int) -> Shapes:
    return {
        "embedding.weight": (TOKENS, size),
        "hard_embedding_norm.weight": (size,),
        "soft_embedding_norm.weight": (size,),
        "embedding_projection.weight": (HIDDEN, size),
    }


def _subsampling() -> Shapes:
    first, second = CHANNELS
    return {
        "conv_0.conv.weight": (first, 1, 3, 3),
        "conv_0.norm.weight": (first,),
        "conv_1.conv.weight": (second, first, 3, 3),
        "conv_1.norm.weight": (second,),
        "input_proj_linear.weight": (SOUND, second * 128 // 4),
    }


def _within(path: str, shapes: Shapes) -> Shapes:
    return {f"{path}.{name}": shape for name, shape in shapes.items()}


def _text() -> Shapes:
    found: Shapes = {
        "embed_tokens.weight": (VOCABULARY, HIDDEN),
        "embed_tokens_per_layer.weight": (VOCABULARY, BLOCKS * PER_LAYER),
        "norm.weight": (HIDDEN,),
        "per_layer_model_projection.weight": (BLOCKS * PER_LAYER, HIDDEN),
        "per_layer_projection_norm.weight": (PER_LAYER,),
    }
    for each in range(INPUTS - 1):
        found |= {f"altup{un}_projections.{each}.weight": (HIDDEN, HIDDEN) for un in ("", "_unembed")}
    for layer in range(BLOCKS):
        found |= _within(f"layers.{layer}", _decoder_layer())
    return found


def _tensors() -> Shapes:
    sound = _within("subsample_conv_projection", _subsampling())
    for block in range(LAYERS):
        sound |= _within(f"conformer.{block}", _conformer())
    return (
        _within("model.language_model", _text())
        | _within("model.audio_tower", sound)
        | _within("model.embed_audio", _embedder(SOUND))
        | _within("model.embed_vision", _embedder(FEATURES))
    )


TENSORS: Final = _tensors()
"""All but the tower of images."""


COMPUTED: Final = (
    *(f"model.embed_{kind}.embedding_post_projection_norm.weight" for kind in ("audio", "vision")),
    *(f"model.language_model.layers.{layer}.self_attn.v_norm.weight" for layer in range(BLOCKS)),
    *(
        f"model.audio_tower.conformer.{block}.attention.attn.{name}"
        for block in range(LAYERS)
        for name in (
            "invalid_logits_tensor",
            "local_causal_valid_mask",
            "per_dim_scale_softplus",
            "relative_position_embedding.inv_timescales",
            "relative_position_embedding.pos_indices",
        )
    ),
)
"""What the client writes into the residual beside tensors of the checkpoint: norms of ones, and what it computes."""


def _block(before: int, after: int, kernels: tuple[int, int], ratio: int) -> Shapes:
    """An inverted bottleneck: convolutions along the image, if any, around two that mix channels."""
    inner, (start, middle) = before * ratio, kernels
    found: Shapes = {}
    if start:
        found |= {"dw_start.conv.weight": (before, 1, start, start), "dw_start.bn.weight": (before,)}
    found |= {"pw_exp.conv.weight": (inner, before, 1, 1), "pw_exp.bn.weight": (inner,)}
    if middle:
        found |= {"dw_mid.conv.weight": (inner, 1, middle, middle), "dw_mid.bn.weight": (inner,)}
    return found | {"pw_proj.conv.weight": (after, inner, 1, 1), "pw_proj.bn.weight": (after,)}


def _attention(size: int, heads: int, head: int, *, halved: bool) -> Shapes:
    """Attention of an image, with one head of keys and values; ``halved``, of an image of half the sides."""
    found: Shapes = {"norm.weight": (size,), "attn.query.proj.weight": (heads * head, size, 1, 1)}
    for each in ("key", "value"):
        if halved:
            found |= {f"attn.{each}.down_conv.weight": (size, 1, 3, 3), f"attn.{each}.norm.weight": (size,)}
        found[f"attn.{each}.proj.weight"] = (head, size, 1, 1)
    return found | {"attn.output.proj.weight": (size, heads * head, 1, 1)}


def _stages() -> Iterator[tuple[int, list[Shapes]]]:
    """Channels and blocks of the last three stages."""
    yield 256, [_block(128, 256, (3, 5), 6), *(_block(256, 256, (kernel, 0), 4) for kernel in (5, 3, 5, 3))]
    pair = [_attention(640, 12, 64, halved=True), _block(640, 640, (0, 0), 2)]
    wide = [_block(256, 640, (5, 5), 6), *(_block(640, 640, (5, 0), 4) for _ in range(7))]
    yield 640, [*wide, _block(640, 640, (0, 0), 1), *(each for _ in range(14) for each in pair)]
    pair = [_attention(1280, 16, 96, halved=False), _block(1280, 1280, (0, 0), 2)]
    yield 1280, [_block(640, 1280, (5, 5), 6), *(each for _ in range(19) for each in pair)]


def _mobilenet() -> Shapes:
    found: Shapes = {"conv_stem.conv.weight": (64, 3, 3, 3), "conv_stem.conv.bias": (64,), "conv_stem.bn.weight": (64,)}
    for block, before in enumerate((64, 128, 128)):
        expand: Shapes = {"conv_exp.weight": (4 * before, before, 3, 3), "bn1.weight": (4 * before,)}
        found |= _within(
            f"blocks.0.{block}", expand | {"conv_pwl.weight": (128, 4 * before, 1, 1), "bn2.weight": (128,)}
        )
    for stage, (channels, blocks) in enumerate(_stages(), 1):
        for block, shapes in enumerate(blocks):
            found |= _within(f"blocks.{stage}.{block}", shapes | {"layer_scale.gamma": (channels,)})
    return found | _within(
        "msfa",
        {f"ffn.{each}": s for each, s in _block(1920, FEATURES, (0, 0), 2).items()} | {"norm.weight": (FEATURES,)},
    )


MOBILENET: Final = _within("model.vision_tower.timm_model", _mobilenet())
"""The tower of images."""
