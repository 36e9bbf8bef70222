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
    ATTENDS_FULLY,
    ATTENTION,
    DENSE_BY_STEP,
    MLP,
    QKV,
    SPARSE_BY_STEP,
    TEXT,
    THREE,
    Architecture,
    Group,
    Rule,
    Table,
    Tower,
    count,
    deltas,
    experts,
    given,
    listed,
    otherwise,
)

__all__ = ["MULTIMODAL"]

TEXT_CONFIG: Final = "text_config"
DEPTH: Final = "vision_config.num_hidden_layers"
PER_LAYER_INPUT: Final = "text_config.hidden_size_per_layer_input"

ENCODER: Final = (*QKV, "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
"""A block of SigLIP and CLIP."""


def _crosses(config: Mapping[str, Any], block: int) -> bool:
    return block in listed(config, "cross_attention_layers")


def _has_own_keys(config: Mapping[str, Any], block: int) -> bool:
    own = count(config, "num_hidden_layers", least=1) - given(config, "num_kv_shared_layers", 0)
    return own <= 0 or block < own


def _has_own_values(config: Mapping[str, Any], block: int) -> bool:
    kinds = listed(config, "layer_types")
    return block < len(kinds) and kinds[block] == "sliding_attention"


def _is_sparse_by_interleaving(config: Mapping[str, Any], block: int) -> bool:
    if config.get("moe_layers") is not None:
        return block in listed(config, "moe_layers")
    return (block + 1) % count(config, "interleave_moe_layer_step", least=1) == 0


_GROUPS: Final = {each.title: each.groups for each in TEXT}
"""The layers of language models, by their titles."""

CROSSES: Final = Rule("i in `cross_attention_layers`", _crosses)
ATTENDS_TO_ITSELF: Final = otherwise(CROSSES, "others")
INTERLEAVED: Final = Rule("i in `moe_layers`, or every `interleave_moe_layer_step`-th", _is_sparse_by_interleaving)
OWN_KEYS: Final = Rule("i < `num_hidden_layers` - `num_kv_shared_layers`", _has_own_keys)
SHARED_KEYS: Final = otherwise(OWN_KEYS, "others")
SLIDES: Final = Rule("sliding attention", _has_own_values)
OWN_VALUES: Final = Rule(
    f"{OWN_KEYS.text}, with sliding attention or without `attention_k_eq_v`",
    lambda config, block: (
        OWN_KEYS.holds(config, block) and (config.get("attention_k_eq_v") is not True or SLIDES.holds(config, block))
    ),
)
MOE_BLOCK: Final = Rule("`enable_moe_block`", lambda config, _: config.get("enable_moe_block") is True)
MIXES: Final = Rule("`num_experts`", lambda config, _: config.get("num_experts") is not None)
PER_LAYER: Final = Rule(
    "`hidden_size_per_layer_input` > 0", lambda config, _: given(config, "hidden_size_per_layer_input", 0) > 0
)
BETWEEN: Final = otherwise(INTERLEAVED, "others")
LOOKS_UP: Final = Rule("i + 1 in `ple_layer_ids`", lambda config, block: block + 1 in listed(config, "ple_layer_ids"))

HYPER_CONNECTION: Final = ("input_mix_weight_down", "input_mix_weight_up")
"""What mixes the streams of a residual connection into the input of a layer."""


def _qwen_tower(*names: str) -> Tower:
    paths = ("attn.qkv", "attn.proj", *(f"mlp.{name}" for name in names))
    return Tower("visual.blocks", paths, "vision_config.depth", 32)


def _gemma_towers(path: str) -> tuple[Tower, ...]:
    linear = tuple(f"{name}.linear" for name in (*ATTENTION, *MLP))
    vision, audio = "vision_config", "audio_config"
    return (
        Tower(f"{path}.vision_tower.patch_embedder", ("input_proj",), needs=vision),
        Tower(f"{path}.vision_tower.encoder.layers", linear, DEPTH, 16, needs=vision),
        Tower(f"{path}.embed_vision", ("embedding_projection",), needs=vision),
        Tower(f"{path}.audio_tower.layers", CONFORMER, "audio_config.num_hidden_layers", 12, needs=audio),
        Tower(f"{path}.audio_tower", ("subsample_conv_projection.input_proj_linear", "output_proj"), needs=audio),
        Tower(f"{path}.embed_audio", ("embedding_projection",), needs=audio),
    )


CONFORMER: Final = (
    *(f"feed_forward{half}.ffw_layer_{each}.linear" for half in (1, 2) for each in (1, 2)),
    *(f"lconv1d.linear_{end}.linear" for end in ("start", "end")),
    *(f"self_attn.{name}.linear" for name in ("q_proj", "k_proj", "v_proj", "post")),
    "self_attn.relative_k_proj",
)
"""A block of Gemma 4's encoder of sound."""

CONFORMER3: Final = (
    *(f"ffw_layer_{half}.ffw_layer_{each}" for half in ("start", "end") for each in (1, 2)),
    *(f"lconv1d.linear_{end}" for end in ("start", "end")),
    *(f"attention.attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "relative_position_embedding.pos_proj")),
    "attention.post",
)
"""A block of Gemma 3n's."""

STREAMS: Final = "mm_streams_embeddings.embedding_module"
MISTRALS: Final = (*(f"attention.w{name}" for name in "qkvo"), *(f"feed_forward.w{each}" for each in (1, 2, 3)))
"""A block, by the names that its authors give to weights."""
TIMED: Final = Rule("`ada_rms_norm_t_cond`", lambda config, _: config.get("ada_rms_norm_t_cond") is True)

INPUTS: Final = "text_config.altup_num_inputs"

MULTIMODAL: Final = (
    Architecture(
        "Gemma 3",
        ("Gemma3ForConditionalGeneration",),
        _GROUPS["Llama"],
        tied=True,
        decoder="language_model.model",
        head="language_model.lm_head",
        text_config=TEXT_CONFIG,
        towers=(Tower("vision_tower.vision_model.encoder.layers", ENCODER, DEPTH, 12),),
        runs_as=("gemma3_text",),
    ),
    Architecture(
        "Qwen2-VL",
        ("Qwen2VLForConditionalGeneration",),
        _GROUPS["Llama"],
        numbered=False,
        towers=(_qwen_tower("fc1", "fc2"),),
        runs_as=("qwen2",),
    ),
    Architecture(
        "Qwen2.5-VL",
        ("Qwen2_5_VLForConditionalGeneration",),
        _GROUPS["Llama"],
        numbered=False,
        towers=(_qwen_tower(*THREE),),
        runs_as=("qwen2",),
    ),
    Architecture(
        "Qwen3-VL",
        ("Qwen3VLForConditionalGeneration",),
        _GROUPS["Llama"],
        numbered=False,
        decoder="model.language_model",
        text_config=TEXT_CONFIG,
        tie_at_top=True,
        runs_as=("qwen3",),
    ),
    Architecture(
        "Qwen3-VL-MoE",
        ("Qwen3VLMoeForConditionalGeneration",),
        _GROUPS["Qwen3-MoE"],
        expert_count="num_experts",
        stacks="columns",
        numbered=False,
        decoder="model.language_model",
        text_config=TEXT_CONFIG,
        tie_at_top=True,
        runs_as=("qwen3_moe",),
    ),
    Architecture(
        "LLaVA",
        ("LlavaForConditionalGeneration",),
        _GROUPS["Llama"],
        numbered=False,
        decoder="language_model.model",
        head="language_model.lm_head",
        text_config=TEXT_CONFIG,
        defaults={"num_hidden_layers": 32},
        towers=(Tower("vision_tower.vision_model.encoder.layers", ENCODER, DEPTH),),
        runs_as=("llama", "mistral"),
    ),
    Architecture(
        "LLaVA-NeXT",
        ("LlavaNextForConditionalGeneration",),
        _GROUPS["Llama"],
        numbered=False,
        decoder="language_model.model",
        head="language_model.lm_head",
        text_config=TEXT_CONFIG,
        defaults={"num_hidden_layers": 32},
        towers=(Tower("vision_tower.vision_model.encoder.layers", ENCODER, DEPTH),),
        runs_as=("mistral", "llama"),
    ),
    Architecture(
        "Idefics2",
        ("Idefics2ForConditionalGeneration",),
        _GROUPS["Llama"],
        numbered=False,
        decoder="model.text_model",
        text_config=TEXT_CONFIG,
        defaults={"num_hidden_layers": 32},
        runs_as=("mistral",),
    ),
    Architecture(
        "Idefics3",
        ("Idefics3ForConditionalGeneration",),
        _GROUPS["Llama"],
        numbered=False,
        decoder="model.text_model",
        text_config=TEXT_CONFIG,
        towers=(Tower("model.vision_model.encoder.layers", ENCODER, DEPTH),),
        runs_as=("llama",),
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
        runs_as=("mllama",),
    ),
    Architecture(
        "Mistral 3",
        ("Mistral3ForConditionalGeneration",),
        _GROUPS["Llama"],
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
        runs_as=("mistral", "ministral3"),
    ),
    Architecture(
        "LFM2-VL",
        ("Lfm2VlForConditionalGeneration",),
        _GROUPS["LFM2"],
        tied=True,
        numbered=False,
        decoder="model.language_model",
        text_config=TEXT_CONFIG,
        tie_at_top=True,
        towers=(Tower("model.vision_tower.vision_model.encoder.layers", ENCODER, DEPTH, 12),),
        runs_as=("lfm2",),
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
        stacks="columns",
        numbered=False,
        decoder="language_model.model",
        head="language_model.lm_head",
        text_config=TEXT_CONFIG,
        towers=(
            Tower("vision_model.model.layers", (*ATTENTION, "mlp.fc1", "mlp.fc2"), DEPTH),
            Tower("vision_model.vision_adapter.mlp", ("fc1", "fc2")),
        ),
        runs_as=("llama4_text",),
    ),
    Architecture(
        "Qwen3.5 with vision",
        ("Qwen3_5ForConditionalGeneration",),
        _GROUPS["Qwen3.5"],
        numbered=False,
        decoder="model.language_model",
        text_config=TEXT_CONFIG,
        tie_at_top=True,
        unmeasured=("self_attn.q_proj",),
        runs_as=("qwen3_5_text",),
    ),
    Architecture(
        "Qwen3.5-MoE",
        ("Qwen3_5MoeForConditionalGeneration",),
        (
            *_GROUPS["Qwen3.5"][:-1],
            experts("mlp", when=SPARSE_BY_STEP),
            Group(tuple(f"mlp.shared_expert.{name}" for name in THREE), when=SPARSE_BY_STEP),
            Group(MLP, when=DENSE_BY_STEP),
        ),
        expert_count="num_experts",
        numbered=False,
        decoder="model.language_model",
        text_config=TEXT_CONFIG,
        tie_at_top=True,
        unmeasured=("self_attn.q_proj",),
        runs_as=("qwen3_5_moe_text",),
    ),
    Architecture(
        "Qwen4-Exp",
        ("Qwen4ExpForConditionalGeneration",),
        (
            Group(ATTENTION, when=ATTENDS_FULLY),
            Group(("self_attn.indexer.index_qk_proj",), when=ATTENDS_FULLY, promoted=True),
            deltas("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
            Group(("ple.key_proj", "ple.value_proj"), when=LOOKS_UP, promoted=True),
            experts("mlp"),
            Group(tuple(f"mlp.shared_expert.{name}" for name in THREE)),
            Group(
                tuple(
                    f"{layer}_hyper_connection.{name}"
                    for layer in ("attn", "mlp")
                    for name in (*HYPER_CONNECTION, "block_inject_weight")
                ),
                promoted=True,
            ),
        ),
        expert_count="num_experts",
        numbered=False,
        decoder="model.language_model",
        text_config=TEXT_CONFIG,
        tie_at_top=True,
        unmeasured=("self_attn.q_proj",),
        towers=(Tower("model.language_model.hyper_connection_mixer", HYPER_CONNECTION, promoted=True),),
        runs_as=("qwen4_exp_text",),
        tables=(Table("ple.ple_embedding.ngram_embedding", "shard_{piece}", "split_ngram_parts", 512),),
    ),
    Architecture(
        "Gemma 3n",
        ("Gemma3nForConditionalGeneration",),
        _GROUPS["Llama"],
        tied=True,
        numbered=False,
        decoder="model.language_model",
        head="model.language_model.lm_head",
        text_config=TEXT_CONFIG,
        towers=(
            Tower("model.audio_tower.conformer", CONFORMER3, "audio_config.conf_num_hidden_layers", 12),
            Tower("model.audio_tower.subsample_conv_projection", ("input_proj_linear",)),
            *(Tower(f"model.embed_{kind}", ("embedding_projection",)) for kind in ("vision", "audio")),
            Tower("model.language_model.altup_projections", ("",), INPUTS, less=1),
            Tower("model.language_model.altup_unembed_projections", ("",), INPUTS, less=1),
            Tower("model.language_model", ("per_layer_model_projection",)),
            Tower("model.language_model", ("embed_tokens_per_layer",), promoted=True),
        ),
        idle=(Group(("self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm"), when=SHARED_KEYS),),
        runs_as=("gemma3n_text",),
    ),
    Architecture(
        "Gemma 4",
        ("Gemma4ForConditionalGeneration",),
        (
            Group(("self_attn.q_proj",)),
            Group(("self_attn.k_proj",), when=OWN_KEYS),
            Group(("self_attn.v_proj",), when=OWN_VALUES),
            Group(("self_attn.o_proj", *MLP)),
            experts("", when=MOE_BLOCK),
            Group(("per_layer_input_gate", "per_layer_projection"), when=PER_LAYER),
        ),
        expert_count="num_experts",
        stacks="rows",
        tied=True,
        numbered=False,
        decoder="model.language_model",
        text_config=TEXT_CONFIG,
        unmeasured=(*ATTENTION, *MLP),
        towers=(
            *_gemma_towers("model"),
            Tower("model.language_model", ("per_layer_model_projection",), needs=PER_LAYER_INPUT),
            Tower("model.language_model", ("embed_tokens_per_layer",), needs=PER_LAYER_INPUT, promoted=True),
        ),
        runs_as=("gemma4_text",),
    ),
    Architecture(
        "Muse-Glimmer",
        ("MuseGlimmerForConditionalGeneration",),
        (Group((*QKV, "self_attn.gate_proj", "self_attn.o_proj", *MLP)),),
        numbered=False,
        decoder="model.language_model",
        text_config=TEXT_CONFIG,
        unmeasured=("self_attn.gate_proj",),
        towers=(
            Tower(
                "model.vision_tower.layers",
                (*(f"attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "proj")), "mlp.fc1", "mlp.fc2"),
                DEPTH,
                50,
            ),
            Tower("model", ("vision_adapter.fc1", "vision_adapter.fc2", "vision_projection")),
        ),
    ),
    Architecture(
        "DiffusionGemma",
        ("DiffusionGemmaForBlockDiffusion",),
        (
            Group(("self_attn.q_proj", "self_attn.k_proj")),
            Group(("self_attn.v_proj",), when=SLIDES),
            Group(("self_attn.o_proj", *MLP)),
            experts("", when=MIXES),
        ),
        expert_count="num_experts",
        stacks="rows",
        tied=True,
        numbered=False,
        decoder="model.decoder",
        text_config=TEXT_CONFIG,
        unmeasured=(*ATTENTION, *MLP),
        embeds_plainly=True,
        towers=(
            *_gemma_towers("model.encoder")[:3],
            Tower("model.decoder.self_conditioning", THREE),
        ),
    ),
    Architecture(
        "Phi-3-V",
        ("Phi3VForCausalLM",),
        _GROUPS["Phi-3"],
        numbered=False,
        towers=(
            Tower(
                "model.vision_embed_tokens.img_processor.vision_model.encoder.layers",
                ENCODER,
                default=24,
            ),
            Tower("model.vision_embed_tokens", ("img_projection.0", "img_projection.2")),
        ),
        runs_as=("phi3",),
    ),
    Architecture(
        "Voxtral",
        ("VoxtralRealtimeForConditionalGeneration",),
        (
            Group(("ada_rms_norm_t_cond.0", "ada_rms_norm_t_cond.2"), when=TIMED),
            Group(MISTRALS),
        ),
        tied=True,
        numbered=False,
        decoder="",
        blocks="layers",
        embeds=f"{STREAMS}.tok_embeddings",
        head="output",
        numbers={"num_hidden_layers": "n_layers", "tie_word_embeddings": "tied_embeddings"},
        towers=(
            Tower(
                f"{STREAMS}.whisper_encoder.transformer.layers",
                MISTRALS,
                "multimodal.whisper_model_args.encoder_args.n_layers",
            ),
            Tower(f"{STREAMS}.audio_language_projection", ("0", "2")),
        ),
    ),
    Architecture(
        "MiniCPM-o",
        ("MiniCPMO",),
        _GROUPS["Qwen2"],
        numbered=False,
        decoder="llm.model",
        head="llm.lm_head",
        towers=(Tower("vpm.encoder.layers", ENCODER, DEPTH, 12),),
        runs_as=("qwen2",),
    ),
)
"""The architectures with towers."""
