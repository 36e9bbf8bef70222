"""Which tensor of a GGUF file is which weight of a model, and how the rows of Q and K are ordered in it.

======================  ==============================
GGUF                    model
======================  ==============================
``token_embd``          ``model.embed_tokens``
``output_norm``         ``model.norm``
``output``              ``lm_head``; absent if it is tied
``blk.N.attn_norm``     ``model.layers.N.input_layernorm``
``blk.N.attn_q``        ``model.layers.N.self_attn.q_proj``
...                     ...
======================  ==============================

The rotary embedding turns pairs of rows of a head of Q and K.  Hugging Face checkpoints, and UQFF with them, pair row
``j`` with row ``j + d/2``; ggml's ``llama`` graph pairs neighbours, so its converter interleaves the halves of each
head::

    model   a0 a1 a2 ... | b0 b1 b2 ...        GGUF   a0 b0 a1 b1 a2 b2 ...

Blocks run along a row, so that whole rows change places and no code is touched.  Qwen models keep the order.

Authority: llama.cpp, ``gguf-py/gguf/tensor_mapping.py`` and ``conversion/llama.py`` (``LlamaModel.permute``);
mistral.rs, ``mistralrs-core/src/gguf/normal_registry.rs`` (``RopePairing``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from uqff.errors import UnsupportedError
from uqff.models.architectures import architecture_of

if TYPE_CHECKING:
    pass

__all__ = [
    "ARCHITECTURES",
    "ROPE_FACTORS",
    "GgufArchitecture",
    "architecture_of_config",
    "architecture_of_name",
    "gguf_name",
    "heads_of",
    "norm_names",
    "shape_of",
    "stack_name",
    "wanted_names",
]

ROPE_FACTORS: Final = "rope_freqs.weight"
"""Divisors of the rotary frequencies: the ``llama3`` rope scaling of a configuration, worked out."""

ROOT: Final = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
BLOCK: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.gate_proj": "ffn_gate_exps",
    "block_sparse_moe.experts.up_proj": "ffn_up_exps",
    "block_sparse_moe.experts.down_proj": "ffn_down_exps",
}
"""Modules of a decoder layer; of experts, the layer of UQFF that has all of them."""
_BLOCK_PATH: Final = re.compile(r"model\.layers\.([0-9]+)\.(.+)", re.DOTALL)


ATTENTION: Final = tuple(f"self_attn.{name}_proj" for name in "qkvo")
MLP: Final = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class GgufArchitecture:
    """One architecture of GGUF.

    Attributes:
        name: ``general.architecture``.
        classes: values of ``architectures`` in ``config.json`` that it stands for; the first where nothing says more.
        interleaved: whether the rows of Q and K are interleaved.
        biases: projections that have a bias in every layer.
        optional_biases: projections that may have one.
        norms: of each layer, relative to it.
        rope_default: ``rope.freq_base`` of a file that has none; None if it must have one.
        matrices: of each layer, relative to it, experts aside.
        experts: stacks of experts of each layer.
        router: the matrix that chooses experts, if there are any.
        expert_count: the number of experts in ``config.json``.
        expert_size: the inner size of one in ``config.json``.
        fixed: what else ``config.json`` says of every such model.
        numbers: more of ``config.json``, and where the metadata says it.
        activation: ``hidden_act``.
        norm_offset: what norms have more in GGUF than in a checkpoint, whose models add it when they compute.
        renamed: names in GGUF that are others than in :data:`BLOCK`.
        headless: whether there is never a head beside the embedding.
        windowed: whether llama.cpp applies a sliding window.
    """

    name: str
    classes: tuple[str, ...]
    interleaved: bool
    biases: tuple[str, ...]
    optional_biases: tuple[str, ...]
    norms: tuple[str, ...]
    rope_default: float | None
    matrices: tuple[str, ...] = (*ATTENTION, *MLP)
    experts: tuple[str, ...] = ()
    router: str = ""
    expert_count: str = ""
    expert_size: str = "intermediate_size"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)
    activation: str = "silu"
    norm_offset: float = 0.0
    renamed: Mapping[str, str] = field(default_factory=dict)
    headless: bool = False
    windowed: bool = False

    def stored_name(self, module: str) -> str | None:
        """Name in GGUF of a module of a layer, None if there is none."""
        return self.renamed.get(module, BLOCK.get(module))


_QKV: Final = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_NORMS: Final = ("input_layernorm", "post_attention_layernorm")


def _experts(path: str) -> tuple[str, ...]:
    return tuple(f"{path}.experts.{name}_proj" for name in ("gate", "up", "down"))


ARCHITECTURES: Final = (
    GgufArchitecture(
        "llama",
        ("LlamaForCausalLM", "MistralForCausalLM"),
        interleaved=True,
        biases=(),
        optional_biases=(*_QKV, "self_attn.o_proj"),
        norms=_NORMS,
        rope_default=10000.0,
    ),
    GgufArchitecture(
        "qwen2",
        ("Qwen2ForCausalLM",),
        interleaved=False,
        biases=_QKV,
        optional_biases=(),
        norms=_NORMS,
        rope_default=None,
    ),
    GgufArchitecture(
        "qwen3",
        ("Qwen3ForCausalLM",),
        interleaved=False,
        biases=(),
        optional_biases=(),
        norms=(*_NORMS, "self_attn.q_norm", "self_attn.k_norm"),
        rope_default=None,
    ),
    GgufArchitecture(
        "qwen3moe",
        ("Qwen3MoeForCausalLM",),
        interleaved=False,
        biases=(),
        optional_biases=(),
        norms=(*_NORMS, "self_attn.q_norm", "self_attn.k_norm"),
        rope_default=None,
        matrices=ATTENTION,
        experts=_experts("mlp"),
        router="mlp.gate",
        expert_count="num_experts",
        expert_size="moe_intermediate_size",
        fixed={"decoder_sparse_step": 1, "mlp_only_layers": [], "model_type": "qwen3_moe", "norm_topk_prob": True},
    ),
    GgufArchitecture(
        "llama",
        ("MixtralForCausalLM",),
        interleaved=True,
        biases=(),
        optional_biases=(),
        norms=_NORMS,
        rope_default=10000.0,
        matrices=ATTENTION,
        experts=_experts("block_sparse_moe"),
        router="block_sparse_moe.gate",
        expert_count="num_local_experts",
    ),
    GgufArchitecture(
        "smollm3",
        ("SmolLM3ForCausalLM",),
        interleaved=True,
        biases=(),
        optional_biases=(),
        norms=_NORMS,
        rope_default=None,
        fixed={"no_rope_layer_interval": 4, "use_sliding_window": False},
    ),
    GgufArchitecture(
        "gemma",
        ("GemmaForCausalLM",),
        interleaved=False,
        biases=(),
        optional_biases=(),
        norms=_NORMS,
        rope_default=10000.0,
        activation="gelu_pytorch_tanh",
        norm_offset=1.0,
        headless=True,
    ),
    GgufArchitecture(
        "gemma2",
        ("Gemma2ForCausalLM",),
        interleaved=False,
        biases=(),
        optional_biases=(),
        norms=(*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        rope_default=10000.0,
        fixed={"hidden_activation": "gelu_pytorch_tanh"},
        numbers={each: each for each in ("attn_logit_softcapping", "final_logit_softcapping")},
        activation="gelu_pytorch_tanh",
        norm_offset=1.0,
        headless=True,
        renamed={"post_attention_layernorm": "post_attention_norm"},
        windowed=True,
    ),
)
"""The architectures that are converted."""

INTERLEAVED: Final = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
"""Projections whose rows are interleaved, and where ``config.json`` says how many heads they have."""


def architecture_of_name(name: object, *, experts: bool = False) -> GgufArchitecture:
    """The architecture that a GGUF file names.

    Args:
        name: ``general.architecture``.
        experts: whether the model has any, by which some of one name differ.

    Raises:
        UnsupportedError: it is not one that is converted; those are listed.
    """
    found = [each for each in ARCHITECTURES if each.name == name]
    for architecture in found:
        if bool(architecture.experts) == experts:
            return architecture
    if found:
        problem = "experts of this architecture are not converted" if experts else "no experts"
        raise UnsupportedError(problem, field=f"{name}.expert_count", got="some" if experts else "none")
    expected = ", ".join(dict.fromkeys(architecture.name for architecture in ARCHITECTURES))
    raise UnsupportedError(
        "unknown architecture", field="general.architecture", expected=f"one of {expected}", got=name
    )


def architecture_of_config(config: Mapping[str, Any]) -> GgufArchitecture:
    """The architecture that a ``config.json`` names.

    Raises:
        UnsupportedError: it is not one that is converted; those are listed.
    """
    known = architecture_of(config)
    for architecture in ARCHITECTURES:
        if known.classes[0] in architecture.classes:
            return architecture
    expected = ", ".join(name for architecture in ARCHITECTURES for name in architecture.classes)
    raise UnsupportedError(
        "architecture that is not converted",
        field="config.architectures",
        expected=f"one of {expected}",
        got=known.classes[0],
    )


def gguf_name(path: str, architecture: GgufArchitecture = ARCHITECTURES[0]) -> str | None:
    """Name in a GGUF file of a module's path in the model (both without ``.weight``), None if there is none."""
    match = _BLOCK_PATH.fullmatch(path)
    if match is None:
        return ROOT.get(path)
    name = architecture.stored_name(match[2])
    return None if name is None else f"blk.{match[1]}.{name}"


def norm_names(architecture: GgufArchitecture, blocks: int) -> list[str]:
    """Paths of a model's norms, without ``.weight``."""
    return [f"model.layers.{block}.{norm}" for block in range(blocks) for norm in architecture.norms] + ["model.norm"]


def stack_name(module: str) -> str:
    """What a stack of experts is called among a checkpoint's tensors: as MLX does. Other modules keep their names."""
    return module.replace(".experts.", ".switch_mlp.")


def wanted_names(architecture: GgufArchitecture, config: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """The tensors that a file of a model has: name in the checkpoint, name in the file, whether it may be absent."""
    yield "model.embed_tokens.weight", "token_embd.weight", False
    if not architecture.headless:
        yield "lm_head.weight", "output.weight", bool(config.get("tie_word_embeddings"))
    yield "model.norm.weight", "output_norm.weight", False
    for block in range(config["num_hidden_layers"]):
        router = (architecture.router,) if architecture.router else ()
        for module in (*architecture.matrices, *router, *architecture.experts, *architecture.norms):
            path = f"model.layers.{block}.{stack_name(module)}"
            stored = f"blk.{block}.{architecture.stored_name(module)}"
            yield f"{path}.weight", f"{stored}.weight", False
            if module in architecture.biases or module in architecture.optional_biases:
                yield f"{path}.bias", f"{stored}.bias", module in architecture.optional_biases


def shape_of(name: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of a weight or bias of the model, from its configuration."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, pairs = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    module, _, kind = name.rpartition(".")
    last = module.rpartition(".")[2]
    experts = next((config[key] for key in ("num_experts", "num_local_experts") if key in config), 0)
    matrices = {
        "embed_tokens": (vocabulary, hidden),
        "lm_head": (vocabulary, hidden),
        "q_proj": (query, hidden),
        "k_proj": (pairs, hidden),
        "v_proj": (pairs, hidden),
        "o_proj": (hidden, query),
        "gate": (experts, hidden),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    if ".switch_mlp." in name or ".experts." in name:
        size = config.get("moe_intermediate_size", inner)
        return (experts, hidden, size) if last == "down_proj" else (experts, size, hidden)
    if last in matrices:
        return matrices[last] if kind == "weight" else matrices[last][:1]
    return (head_dim,) if last in ("q_norm", "k_norm") else (hidden,)


def heads_of(architecture: GgufArchitecture, config: Mapping[str, Any], path: str) -> int | None:
    """How many heads of interleaved rows a module has in the GGUF file, None if its rows are not interleaved."""
    match = _BLOCK_PATH.fullmatch(path)
    if not architecture.interleaved or match is None or match[2] not in INTERLEAVED:
        return None
    heads: int = config[INTERLEAVED[match[2]]]
    return heads
