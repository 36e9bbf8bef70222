"""Architectures that take images or sound: where their language model is, and which layers their towers have.

The language model of each has the layers of an architecture of text, declared in :mod:`uqff.models.text`.  Of towers
the engine quantises some and leaves others plain; what is not listed here is in the residual.

Authority: mistral.rs 0.9.5, from tiny checkpoints of each architecture; for numbers that a configuration may lack,
v0.9.2, ``mistralrs-core/src/vision_models/*``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from uqff.models.text import (
    ATTENDS,
    ATTENTION,
    CONVOLVES,
    DENSE,
    DENSE_BY_STEP,
    MLP,
    QKV,
    SPARSE_BY_STEP,
    THREE,
    W123,
    Architecture,
    Group,
    Rule,
    Tower,
    count,
    experts,
    listed,
    otherwise,
)

__all__ = ["MULTIMODAL"]

TEXT_CONFIG: Final = "text_config"
DEPTH: Final = "vision_config.num_hidden_layers"

ENCODER: Final = (*QKV, "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
"""A block of SigLIP and CLIP."""


def _crosses(config: Mapping[str, Any], block: int) -> bool:
    return block in listed(config, "cross_attention_layers")


def _is_sparse_by_interleaving(config: Mapping[str, Any], block: int) -> bool:
    if config.get("moe_layers") is not None:
        return block in listed(config, "moe_layers")
    return (block + 1) % count(config, "interleave_moe_layer_step", least=1) == 0


CROSSES: Final = Rule("i in `cross_attention_layers`", _crosses)
ATTENDS_TO_ITSELF: Final = otherwise(CROSSES, "others")
INTERLEAVED: Final = Rule("i in `moe_layers`, or every `interleave_moe_layer_step`-th", _is_sparse_by_interleaving)
BETWEEN: Final = otherwise(INTERLEAVED, "others")


def _qwen_tower(*names: str) -> Tower:
    paths = ("attn.qkv", "attn.proj", *(f"mlp.{name}" for name in names))
    return Tower("visual.blocks", paths, "vision_config.depth", 32)


MULTIMODAL: Final = (
    Architecture(
        "Gemma 3",
        ("Gemma3ForConditionalGeneration",),
        DENSE,
        tied=True,
        decoder="language_model.model",
        head="language_model.lm_head",
        text_config=TEXT_CONFIG,
        towers=(Tower("vision_tower.vision_model.encoder.layers", ENCODER, DEPTH, 12),),
    ),
    Architecture(
        "Qwen2-VL",
        ("Qwen2VLForConditionalGeneration",),
        DENSE,
        numbered=False,
        towers=(_qwen_tower("fc1", "fc2"),),
    ),
    Architecture(
        "Qwen2.5-VL",
        ("Qwen2_5_VLForConditionalGeneration",),
        DENSE,
        numbered=False,
        towers=(_qwen_tower(*THREE),),
    ),
    Architecture(
        "Qwen3-VL",
        ("Qwen3VLForConditionalGeneration",),
        DENSE,
        numbered=False,
        decoder="model.language_model",
        text_config=TEXT_CONFIG,
        tie_at_top=True,
    ),
    Architecture(
        "Qwen3-VL-MoE",
        ("Qwen3VLMoeForConditionalGeneration",),
        (Group(ATTENTION), experts("mlp", when=SPARSE_BY_STEP), Group(MLP, when=DENSE_BY_STEP)),
        expert_count="num_experts",
        numbered=False,
        decoder="model.language_model",
        text_config=TEXT_CONFIG,
        tie_at_top=True,
    ),
    Architecture(
        "LLaVA",
        ("LlavaForConditionalGeneration",),
        DENSE,
        numbered=False,
        decoder="language_model.model",
        head="language_model.lm_head",
        text_config=TEXT_CONFIG,
        defaults={"num_hidden_layers": 32},
        towers=(Tower("vision_tower.vision_model.encoder.layers", ENCODER, DEPTH),),
    ),
    Architecture(
        "LLaVA-NeXT",
        ("LlavaNextForConditionalGeneration",),
        DENSE,
        numbered=False,
        decoder="language_model.model",
        head="language_model.lm_head",
        text_config=TEXT_CONFIG,
        defaults={"num_hidden_layers": 32},
        towers=(Tower("vision_tower.vision_model.encoder.layers", ENCODER, DEPTH),),
    ),
    Architecture(
        "Idefics2",
        ("Idefics2ForConditionalGeneration",),
        DENSE,
        numbered=False,
        decoder="model.text_model",
        text_config=TEXT_CONFIG,
        defaults={"num_hidden_layers": 32},
    ),
    Architecture(
        "Idefics3",
        ("Idefics3ForConditionalGeneration",),
        DENSE,
        numbered=False,
        decoder="model.text_model",
        text_config=TEXT_CONFIG,
        towers=(Tower("model.vision_model.encoder.layers", ENCODER, DEPTH),),
    ),
    Architecture(
        "Llama 3.2 Vision",
        ("MllamaForConditionalGeneration",),
        (
            Group(ATTENTION, when=ATTENDS_TO_ITSELF),
            Group(tuple(f"cross_attn.{name}_proj" for name in "qkvo"), when=CROSSES),
            Group(MLP),
        ),
        numbered=False,
        decoder="language_model.model",
        head="language_model.lm_head",
        text_config=TEXT_CONFIG,
        towers=(
            Tower("vision_model.transformer.layers", (*ATTENTION, "mlp.fc1", "mlp.fc2"), DEPTH),
            Tower(
                "vision_model.global_transformer.layers",
                (*ATTENTION, "mlp.fc1", "mlp.fc2"),
                "vision_config.num_global_layers",
            ),
        ),
    ),
    Architecture(
        "Mistral 3",
        ("Mistral3ForConditionalGeneration",),
        DENSE,
        numbered=False,
        decoder="language_model.model",
        head="language_model.lm_head",
        text_config=TEXT_CONFIG,
        towers=(
            Tower(
                "vision_tower.transformer.layers",
                (*(f"attention.{name}_proj" for name in "qkvo"), *(f"feed_forward.{name}" for name in THREE)),
                DEPTH,
                24,
            ),
        ),
    ),
    Architecture(
        "LFM2-VL",
        ("Lfm2VlForConditionalGeneration",),
        (
            Group((*QKV, "self_attn.out_proj"), when=ATTENDS),
            Group(("conv.in_proj", "conv.out_proj"), when=CONVOLVES),
            Group(tuple(f"feed_forward.{name}" for name in W123[0])),
        ),
        tied=True,
        numbered=False,
        decoder="model.language_model",
        text_config=TEXT_CONFIG,
        tie_at_top=True,
        towers=(Tower("model.vision_tower.vision_model.encoder.layers", ENCODER, DEPTH, 12),),
    ),
    Architecture(
        "Llama 4",
        ("Llama4ForConditionalGeneration",),
        (
            Group(ATTENTION),
            Group(("feed_forward.router",), when=INTERLEAVED),
            experts("feed_forward", when=INTERLEAVED),
            Group(tuple(f"feed_forward.shared_expert.{name}" for name in THREE), when=INTERLEAVED),
            Group(tuple(f"feed_forward.{name}" for name in THREE), when=BETWEEN),
        ),
        expert_count="num_local_experts",
        numbered=False,
        decoder="language_model.model",
        head="language_model.lm_head",
        text_config=TEXT_CONFIG,
        towers=(
            Tower("vision_model.model.layers", (*ATTENTION, "mlp.fc1", "mlp.fc2"), DEPTH),
            Tower("vision_model.vision_adapter.mlp", ("fc1", "fc2")),
        ),
    ),
)
"""The architectures with towers."""
