"""How architectures are declared, and those of text: which linear layers a UQFF has of each, in which order, and under
which names.

A new architecture is one more :class:`Architecture` in :data:`TEXT`, or in :mod:`uqff.models.multimodal` if it has more
than text.  What no entry lists stays plain and goes into the residual: norms, routers, convolutions, biases of routers.

Authority: the order of pre-1.0 files, mistral.rs v0.6.0 and v0.8.0, ``mistralrs-core/src/models/*.rs`` and
``vision_models/gemma3/text.rs`` (``get_layers``); what 1.x files have, 0.9.5 from tiny checkpoints of each
architecture, but for GLM-4 and gpt-oss, of which it writes none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from uqff.errors import FormatError
from uqff.limits import MAX_MODEL_LAYERS

__all__ = ["TEXT", "Architecture", "Group", "Rule", "Table", "Tower", "count"]


@dataclass(frozen=True)
class Rule:
    """Which decoder layers have something.

    Attributes:
        text: in words, for the specification.
        holds: whether a layer has it, of the configuration and the layer's number.
    """

    text: str
    holds: Callable[[Mapping[str, Any], int], bool]


@dataclass(frozen=True)
class Group:
    """Weights that a decoder layer has all or none of.

    Attributes:
        paths: relative to the decoder layer, in order; of experts with ``{expert}``, their number.
        stacked: of experts, the paths of the 1.x layers that hold one of ``paths`` for all experts.
        when: which decoder layers have them; all if None.
        numbered: whether pre-1.0 files have them.
        promoted: whether the engine quantises them as finely as the embedding.
    """

    paths: tuple[str, ...]
    stacked: tuple[str, ...] = ()
    when: Rule | None = None
    numbered: bool = True
    promoted: bool = False


@dataclass(frozen=True)
class Tower:
    """Layers of an encoder, of what stands between it and the language model, or else outside of decoder layers.

    Attributes:
        path: of the list of blocks; or of a module, if there is neither ``depth`` nor ``default``.
        paths: of the weights, relative to a block or to the module; empty for the block itself.
        depth: where ``config.json`` says how many blocks there are, ``vision_config.num_hidden_layers``.
        default: how many the engine takes where it does not, or always if there is no ``depth``; None if it has to.
        needs: what ``config.json`` must have for these layers to be there, if not all models have them: neither null
            nor 0.
        promoted: whether the engine quantises them as finely as the embedding.
        less: how many blocks fewer there are than ``config.json`` says.
    """

    path: str
    paths: tuple[str, ...]
    depth: str = ""
    default: int | None = None
    needs: str = ""
    promoted: bool = False
    less: int = 0


@dataclass(frozen=True)
class Table:
    """A table that the engine looks up rows of in the file, whose dtype it takes as it is; no layer.

    Attributes:
        path: end of the path of the module.
        pieces: what checkpoints have in its place, one after another: ``shard_{piece}``.
        count: how many pieces there are, in the configuration of the language model.
        default: how many, where it does not say.
    """

    path: str
    pieces: str
    count: str
    default: int


@dataclass(frozen=True)
class Architecture:
    """What is declared of one architecture.

    Attributes:
        title: as its authors call it.
        classes: values of ``architectures`` in ``config.json``.
        groups: weights of a decoder layer, in order.
        expert_count: the number of experts in ``config.json``.
        tied: whether head and embedding are one matrix if ``tie_word_embeddings`` does not say; ``always``, whatever
            it says.
        numbered: whether its layers have numbers: an engine wrote pre-1.0 files of it, of weights of checkpoints.
        decoder: path of the module that has the embedding and the decoder layers; empty if there is none.
        blocks: path of the list of decoder layers, if it is not ``layers`` there.
        embeds: path of the embedding, if it is not ``embed_tokens`` there.
        head: path of the head.
        text_config: where the numbers of the language model are, if not at the top of ``config.json``.
        tie_at_top: whether ``tie_word_embeddings`` stands at the top, wherever the numbers are.
        numbers: what ``config.json`` calls ``num_hidden_layers`` and ``tie_word_embeddings``, if it has other words.
        defaults: numbers of the language model that the engine takes where the configuration has none.
        embeds_plainly: whether the embedding is no layer in any version.
        towers: what has linear layers besides the language model.
        runs_as: kinds of ``transformers`` (``model_type``) whose causal language models are this one's, if it has more
            than that: the one that the configuration names is taken, or the first.
        unmeasured: paths whose shapes :mod:`uqff.models.shapes` does not tell.
        drops_biases: beginnings of the paths whose biases the engine drops when it quantises, and adds when it loads.
        tables: what the engine does not load: it looks up rows in the file.
        takes_turns: whether gates and ups of experts take turns in ``gate_up_proj``, and do not follow each other.
        stacks: how plain checkpoints have experts, if not one by one: ``rows``, gates on ups in
            ``experts.gate_up_proj``, and ``experts.down_proj``, outputs before inputs; or ``columns``, the reverse.
        idle: of ``groups``, and of what stands beside them plain, what nothing computes with.
        modules: what ``transformers`` from 5 on calls parts of paths, and checkpoints do otherwise: pairs of the two.
    """

    title: str
    classes: tuple[str, ...]
    groups: tuple[Group, ...]
    expert_count: str = ""
    tied: bool | Literal["always"] = False
    numbered: bool = True
    decoder: str = "model"
    blocks: str = ""
    embeds: str = ""
    head: str = "lm_head"
    text_config: str = ""
    tie_at_top: bool = False
    numbers: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, int] = field(default_factory=dict)
    embeds_plainly: bool = False
    towers: tuple[Tower, ...] = ()
    runs_as: tuple[str, ...] = ()
    unmeasured: tuple[str, ...] = ()
    drops_biases: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    takes_turns: bool = False
    stacks: Literal["", "rows", "columns"] = ""
    idle: tuple[Group, ...] = ()
    modules: tuple[tuple[str, str], ...] = ()

    @property
    def stack(self) -> str:
        """Path of the list of decoder layers."""
        return self.blocks or f"{self.decoder}.layers"

    @property
    def embedding(self) -> str:
        """Path of the embedding."""
        return self.embeds or f"{self.decoder}.embed_tokens"


def count(config: Mapping[str, Any], key: str, *, least: int, most: int = MAX_MODEL_LAYERS) -> int:
    """A number of a configuration.

    Raises:
        FormatError: it is missing or senseless.
    """
    value = config.get(key)
    if type(value) is not int or not least <= value <= most:
        raise FormatError("not a count", field=f"config.{key}", expected=f"a number from {least} to {most}", got=value)
    return value


def given(config: Mapping[str, Any], key: str, default: int, *, least: int = 0) -> int:
    """A number of a configuration, or what stands for it where there is none.

    Raises:
        FormatError: it is senseless.
    """
    return default if config.get(key) is None else count(config, key, least=least)


def listed(config: Mapping[str, Any], key: str) -> list[Any]:
    """A list of a configuration; an empty one if it is missing.

    Raises:
        FormatError: it is something else.
    """
    value = config.get(key) or []
    if not isinstance(value, list):
        raise FormatError("not a list", field=f"config.{key}", got=type(value).__name__)
    return value


def _is_sparse_by_step(expert_count: str) -> Callable[[Mapping[str, Any], int], bool]:
    def holds(config: Mapping[str, Any], block: int) -> bool:
        dense, step = listed(config, "mlp_only_layers"), given(config, "decoder_sparse_step", 1, least=1)
        return count(config, expert_count, least=0) > 0 and (block + 1) % step == 0 and block not in dense

    return holds


def _is_sparse_after(first: str, expert_count: str) -> Callable[[Mapping[str, Any], int], bool]:
    def holds(config: Mapping[str, Any], block: int) -> bool:
        if config.get(expert_count) is None:
            return False
        kinds = listed(config, "mlp_layer_types")
        if block < len(kinds):
            return bool(kinds[block] == "sparse")
        return block >= given(config, first, 0) and block % given(config, "moe_layer_freq", 1, least=1) == 0

    return holds


ATTENTION_TYPES: Final = (
    *("full_attention", "sliding_attention", "attention"),
    *("indexed_attention", "qwen_sparse_attention"),  # Qwen4-Exp's, as transformers writes it since 5.18 and before
)


def _attends(config: Mapping[str, Any], block: int) -> bool:
    kinds = listed(config, "layer_types") or listed(config, "layers_block_type")
    return block >= len(kinds) or kinds[block] in ATTENTION_TYPES


def _attends_by_interval(config: Mapping[str, Any], block: int) -> bool:
    if config.get("layer_types"):
        return _attends(config, block)
    return (block + 1) % given(config, "full_attention_interval", 4, least=1) == 0


def otherwise(rule: Rule, text: str) -> Rule:
    """The decoder layers that a rule does not hold for."""
    return Rule(text, lambda config, block: not rule.holds(config, block))


def _both(rule: Rule, other: Rule, text: str) -> Rule:
    return Rule(text, lambda config, block: rule.holds(config, block) and other.holds(config, block))


def _positive(key: str) -> Rule:
    return Rule(f"`{key}` > 0", lambda config, block: given(config, key, 0) > 0)


SPARSE_BY_STEP: Final = Rule("sparse", _is_sparse_by_step("num_experts"))
DENSE_BY_STEP: Final = otherwise(SPARSE_BY_STEP, "dense")
ROUTED: Final = Rule("i ≥ `first_k_dense_replace`", _is_sparse_after("first_k_dense_replace", "n_routed_experts"))
UNROUTED: Final = otherwise(ROUTED, "i < `first_k_dense_replace`")
SHARED: Final = _both(ROUTED, _positive("n_shared_experts"), "i ≥ `first_k_dense_replace`, `n_shared_experts` > 0")
LATER: Final = Rule("i ≥ `num_dense_layers`", _is_sparse_after("num_dense_layers", "num_experts"))
EARLIER: Final = otherwise(LATER, "i < `num_dense_layers`")
ATTENDS: Final = Rule("attention", _attends)
CONVOLVES: Final = otherwise(ATTENDS, "convolution")
RECURS: Final = otherwise(ATTENDS, "Mamba")
ATTENDS_FULLY: Final = Rule("full attention", _attends_by_interval)
ATTENDS_LINEARLY: Final = otherwise(ATTENDS_FULLY, "linear attention")
LOW_RANK: Final = Rule("`q_lora_rank`", lambda config, block: config.get("q_lora_rank") is not None)
FULL_RANK: Final = otherwise(LOW_RANK, "no `q_lora_rank`")
SEVERAL: Final = Rule("`num_experts` > 1", lambda config, block: given(config, "num_experts", 1) > 1)
ONE: Final = otherwise(SEVERAL, "`num_experts` ≤ 1")
MIXED: Final = _both(
    SEVERAL, Rule("", lambda config, _: config.get("use_mixed_mlp_moe") is True), "`use_mixed_mlp_moe`"
)
LOCAL: Final = _positive("num_local_experts")

QKV: Final = tuple(f"self_attn.{name}_proj" for name in "qkv")
ATTENTION: Final = (*QKV, "self_attn.o_proj")
THREE: Final = ("gate_proj", "up_proj", "down_proj")
MLP: Final = tuple(f"mlp.{name}" for name in THREE)


def experts(
    path: str, names: tuple[str, ...] = THREE, stacked: tuple[str, ...] = THREE, when: Rule | None = None
) -> Group:
    """Experts under a path: one weight each, in order, and what their stacks are called."""
    experts = f"{path}.experts" if path else "experts"
    each = tuple(f"{experts}.{{expert}}.{name}" for name in names)
    return Group(each, tuple(f"{experts}.{name}" for name in stacked), when)


W123: Final = (("w1", "w2", "w3"), ("gate_proj", "down_proj", "up_proj"))
"""What Mixtral and others call gate, down and up of an expert."""

LATENT: Final = (
    Group(("self_attn.q_proj",), when=FULL_RANK),
    Group(("self_attn.q_a_proj", "self_attn.q_b_proj"), when=LOW_RANK),
    Group(("self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj", "self_attn.o_proj")),
)
"""Attention of DeepSeek."""

DEEPSEEK_MOE: Final = (
    Group(MLP, when=UNROUTED),
    experts("mlp", when=ROUTED),
    Group(tuple(f"mlp.shared_experts.{name}" for name in THREE), when=SHARED),
)

DENSE: Final = (Group(ATTENTION + MLP),)


def deltas(*paths: str) -> Group:
    """Linear attention, of which pre-1.0 files have the output only."""
    return Group(tuple(f"linear_attn.{path}" for path in paths), when=ATTENDS_LINEARLY, numbered=False)


BLOCK_SPARSE: Final = ((".mlp.", ".block_sparse_moe."),)

TEXT: Final = (
    Architecture("Llama", ("LlamaForCausalLM",), DENSE, drops_biases=("",)),
    Architecture("Mistral", ("MistralForCausalLM",), DENSE),
    Architecture("Qwen2", ("Qwen2ForCausalLM",), DENSE),
    Architecture("Qwen3", ("Qwen3ForCausalLM",), DENSE),
    Architecture(
        "Qwen3-MoE",
        ("Qwen3MoeForCausalLM",),
        (Group(ATTENTION), experts("mlp", when=SPARSE_BY_STEP), Group(MLP, when=DENSE_BY_STEP)),
        expert_count="num_experts",
    ),
    Architecture(
        "Qwen3-Next",
        ("Qwen3NextForCausalLM",),
        (
            Group(ATTENTION, when=ATTENDS_FULLY),
            deltas("in_proj_qkvz", "in_proj_ba"),
            Group(("linear_attn.out_proj",), when=ATTENDS_LINEARLY),
            experts("mlp", when=SPARSE_BY_STEP),
            Group(tuple(f"mlp.shared_expert.{name}" for name in THREE), when=SPARSE_BY_STEP),
            Group(MLP, when=DENSE_BY_STEP),
        ),
        expert_count="num_experts",
        tied=True,
        unmeasured=("self_attn.q_proj",),
    ),
    Architecture(
        "Qwen3.5",
        ("Qwen3_5ForCausalLM",),
        (
            Group(ATTENTION, when=ATTENDS_FULLY),
            deltas("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"),
            Group(MLP),
        ),
        numbered=False,
        unmeasured=("self_attn.q_proj",),
    ),
    Architecture(
        "Mixtral",
        ("MixtralForCausalLM",),
        (Group((*ATTENTION, "block_sparse_moe.gate")), experts("block_sparse_moe", *W123)),
        expert_count="num_local_experts",
        modules=BLOCK_SPARSE,
    ),
    Architecture(
        "Phi-2",
        ("PhiForCausalLM",),
        (Group((*QKV, "self_attn.dense", "mlp.fc1", "mlp.fc2")),),
        drops_biases=("lm_head",),
    ),
    Architecture(
        "Phi-3",
        ("Phi3ForCausalLM",),
        (Group(("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")),),
    ),
    Architecture(
        "Phi-3.5-MoE",
        ("PhiMoEForCausalLM", "PhimoeForCausalLM"),
        (Group(ATTENTION), experts("block_sparse_moe", *W123)),
        expert_count="num_local_experts",
        modules=((".mlp.router.", ".block_sparse_moe.gate."), *BLOCK_SPARSE),
    ),
    Architecture("Gemma", ("GemmaForCausalLM",), DENSE, tied="always"),
    Architecture("Gemma 2", ("Gemma2ForCausalLM",), DENSE, tied="always"),
    Architecture("Gemma 3 text", ("Gemma3ForCausalLM",), DENSE, tied=True),
    Architecture("StarCoder2", ("Starcoder2ForCausalLM",), (Group((*ATTENTION, "mlp.c_fc", "mlp.c_proj")),)),
    Architecture(
        "DeepSeek V2",
        ("DeepseekV2ForCausalLM",),
        (*LATENT, *DEEPSEEK_MOE),
        expert_count="n_routed_experts",
        unmeasured=("self_attn.q_proj", "self_attn.o_proj"),
    ),
    Architecture(
        "DeepSeek V3",
        ("DeepseekV3ForCausalLM",),
        (*LATENT, *DEEPSEEK_MOE),
        expert_count="n_routed_experts",
        unmeasured=("self_attn.q_proj", "self_attn.o_proj"),
    ),
    Architecture(
        "GLM-4",
        ("Glm4ForCausalLM",),
        (Group((*ATTENTION, "mlp.gate_up_proj", "mlp.down_proj")),),
        numbered=False,
    ),
    Architecture(
        "GLM-4-MoE",
        ("Glm4MoeForCausalLM",),
        (Group(ATTENTION), *DEEPSEEK_MOE),
        expert_count="n_routed_experts",
    ),
    Architecture(
        "GLM-4-MoE Lite",
        ("Glm4MoeLiteForCausalLM",),
        (*LATENT, *DEEPSEEK_MOE),
        expert_count="n_routed_experts",
        unmeasured=("self_attn.q_proj", "self_attn.o_proj"),
    ),
    Architecture("SmolLM3", ("SmolLM3ForCausalLM",), DENSE, tied=True),
    Architecture(
        "Granite 4",
        ("GraniteMoeHybridForCausalLM",),
        (
            Group(ATTENTION, when=ATTENDS),
            Group(("mamba.in_proj", "mamba.out_proj"), when=RECURS, numbered=False),
            Group(
                tuple(f"block_sparse_moe.{name}" for name in ("input_linear", "output_linear", "router.layer")),
                when=LOCAL,
                numbered=False,
            ),
            Group(("shared_mlp.input_linear", "shared_mlp.output_linear")),
        ),
        tied=True,
        modules=(
            (".block_sparse_moe.router.", ".block_sparse_moe.router.layer."),
            (".block_sparse_moe.experts.gate_up_proj.", ".block_sparse_moe.input_linear."),
            (".block_sparse_moe.experts.down_proj.", ".block_sparse_moe.output_linear."),
        ),
    ),
    Architecture("HunYuan dense", ("HunYuanDenseV1ForCausalLM",), DENSE, numbered=False),
    Architecture(
        "HunYuan MoE",
        ("HunYuanMoEV1ForCausalLM",),
        (
            Group(ATTENTION),
            Group(("mlp.gate.wg",), when=SEVERAL),
            experts("mlp", when=SEVERAL),
            Group(tuple(f"mlp.shared_mlp.{name}" for name in THREE), when=MIXED),
            Group(MLP, when=ONE),
        ),
        expert_count="num_experts",
        numbered=False,
    ),
    Architecture(
        "LFM2",
        ("Lfm2ForCausalLM",),
        (
            Group((*QKV, "self_attn.out_proj"), when=ATTENDS),
            Group(("conv.in_proj", "conv.out_proj"), when=CONVOLVES),
            Group(tuple(f"feed_forward.{name}" for name in W123[0])),
        ),
        tied=True,
        numbered=False,
    ),
    Architecture(
        "LFM2-MoE",
        ("Lfm2MoeForCausalLM",),
        (
            Group((*QKV, "self_attn.out_proj"), when=ATTENDS),
            Group(("conv.in_proj", "conv.out_proj"), when=CONVOLVES),
            Group(tuple(f"feed_forward.{name}" for name in W123[0]), when=EARLIER),
            experts("feed_forward", *W123, when=LATER),
        ),
        expert_count="num_experts",
        tied=True,
        numbered=False,
    ),
    Architecture(
        "gpt-oss",
        ("GptOssForCausalLM",),
        (Group((*ATTENTION, "mlp.experts.gate_up_proj", "mlp.experts.down_proj")),),
        numbered=False,
        takes_turns=True,
    ),
)
"""The architectures of text alone."""
