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
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from uqff.checkpoints.gguf.declared import GgufArchitecture, Runs, SeveralMatrices
from uqff.checkpoints.gguf.forms import AS_IS, Form, Plus
from uqff.checkpoints.gguf.recurrent import recurrent_shape
from uqff.checkpoints.gguf.table import ARCHITECTURES
from uqff.codes import Version
from uqff.errors import UnsupportedError
from uqff.families.rows import Order
from uqff.gguf.names import BLOCK, ROOT
from uqff.models.architectures import EntryName, architecture_of, entry_names
from uqff.models.text import count

__all__ = [
    "ARCHITECTURES",
    "BLOCK",
    "LONG_FACTORS",
    "NEWEST",
    "ROOT",
    "ROPE_FACTORS",
    "SHORT_FACTORS",
    "GgufArchitecture",
    "PlainTensor",
    "architecture_of_config",
    "architecture_of_name",
    "columns_of",
    "gguf_name",
    "gguf_names",
    "heads_of",
    "inner_size",
    "joined_of",
    "order_of",
    "plain_tensors",
    "shape_of",
    "stack_name",
    "wanted_names",
]

ROPE_FACTORS: Final = "rope_freqs.weight"
"""Divisors of the rotary frequencies: the ``llama3`` rope scaling of a configuration, worked out."""

LONG_FACTORS: Final = "rope_factors_long.weight"
SHORT_FACTORS: Final = "rope_factors_short.weight"
"""Divisors of the rotary frequencies of Phi-3, as a configuration has them."""

NEWEST: Final = Version(1, 2, 0)
"""Of whose layers the tensors are named: experts are one, as in GGUF."""

_BLOCK_PATH: Final = re.compile(r"model\.layers\.([0-9]+)\.(.+)", re.DOTALL)

INTERLEAVED: Final = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
"""Projections whose rows are interleaved, and where ``config.json`` says how many heads they have."""


def architecture_of_name(name: object, *, experts: bool = False, gating: int | None = None) -> GgufArchitecture:
    """The architecture that a GGUF file names.

    Args:
        name: ``general.architecture``.
        experts: whether the model has any, by which some of one name differ.
        gating: how it chooses among them (``expert_gating_func``), by which others do; None is softmax.

    Raises:
        UnsupportedError: it is not one that is converted; those are listed.
    """
    found = [each for each in ARCHITECTURES if each.name == name]
    fitting = [each for each in found if bool(each.expert_count) == experts]
    if len(fitting) > 1:
        fitting = [each for each in fitting if each.stated["expert_gating_func"] == (gating or 1)] or fitting
    if fitting:
        return fitting[0]
    if found:
        problem = "experts of this architecture are not converted" if experts else "no experts"
        raise UnsupportedError(problem, field=f"{name}.expert_count", got="some" if experts else "none")
    expected = ", ".join(dict.fromkeys(architecture.name for architecture in ARCHITECTURES))
    raise UnsupportedError(
        "unknown architecture", field="general.architecture", expected=f"one of {expected}", got=name
    )


def architecture_of_config(config: Mapping[str, Any], name: object = None) -> GgufArchitecture:
    """The architecture that a ``config.json`` names.

    Args:
        config: the configuration.
        name: ``general.architecture`` of the one to take, if several fit; the first of them, if that is none.

    Raises:
        UnsupportedError: it is not one that is converted; those are listed.
    """
    known = architecture_of(config)
    found = [each for each in ARCHITECTURES if known.classes[0] in each.classes and not each.only_read]
    fitting = [each for each in found if each.only_if is None or each.only_if(config)]
    if fitting:
        return next((each for each in fitting if each.name == name), fitting[0])
    expected = ", ".join(dict.fromkeys(name for each in ARCHITECTURES if not each.only_read for name in each.classes))
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


def gguf_names(path: str, architecture: GgufArchitecture) -> tuple[str, ...]:
    """Names in a GGUF file of what a module of a model is made of: one, but of joined ones."""
    match = _BLOCK_PATH.fullmatch(path)
    if match is None or match[2] not in architecture.joined:
        return (str(gguf_name(path, architecture)),)
    return tuple(f"blk.{match[1]}.{name}" for name in architecture.stored_names(match[2]))


def joined_of(path: str, architecture: GgufArchitecture) -> SeveralMatrices | None:
    """How a module of a model is made of several matrices of GGUF; None if it is one."""
    match = _BLOCK_PATH.fullmatch(path)
    return None if match is None else architecture.joined.get(match[2])


def order_of(path: str, architecture: GgufArchitecture, config: Mapping[str, Any]) -> Order | None:
    """Where each row of a module of a model is in GGUF; None if they are in order, or only interleaved."""
    match = _BLOCK_PATH.fullmatch(path)
    made = None if match is None else architecture.orders.get(match[2])
    return None if made is None else made(config)


def columns_of(path: str, architecture: GgufArchitecture, config: Mapping[str, Any]) -> Runs | None:
    """The same of its columns, by runs of them."""
    match = _BLOCK_PATH.fullmatch(path)
    made = None if match is None else architecture.columns.get(match[2])
    runs = None if made is None else made(config)
    return None if runs is None or bool((np.diff(runs.order) == 1).all()) else runs


class PlainTensor(NamedTuple):
    """A tensor of a model that is no layer of UQFF.

    Attributes:
        name: in the checkpoint.
        stored: in GGUF, what it is made of: one, but of some forms.
        optional: whether a model may be without.
        form: how it stands in GGUF.
    """

    name: str
    stored: tuple[str, ...]
    optional: bool = False
    form: Form = AS_IS


def plain_tensors(architecture: GgufArchitecture, config: Mapping[str, Any]) -> Iterator[PlainTensor]:
    """The tensors of a model that are no layers of UQFF; the embedding aside, and biases of layers."""
    ends = (".weight", ".bias") if architecture.norm_biases else (".weight",)
    norm = Plus(architecture.norm_offset) if architecture.norm_offset else AS_IS
    for block in range(config["num_hidden_layers"]):
        here, there = f"model.layers.{block}.", f"blk.{block}."
        for path in architecture.norms:
            for end in ends:
                stored = f"{there}{architecture.stored_name(path)}{end}"
                yield PlainTensor(f"{here}{path}{end}", (stored,), form=norm)
        for plain in architecture.plain:
            if plain.when is None or plain.when.holds(config, block):
                module, _, end = plain.name.rpartition(".")
                names = plain.stored or f"{architecture.stored_name(module)}.{end}"
                names = (names,) if isinstance(names, str) else names
                yield PlainTensor(here + plain.name, tuple(there + each for each in names), plain.optional, plain.form)
    for end in ends:
        yield PlainTensor(architecture.final_norm + end, (ROOT[architecture.final_norm] + end,), form=norm)


def stack_name(entry: EntryName) -> str:
    """What a stack of experts is called among a checkpoint's tensors: as MLX does. Other layers keep their names."""
    return entry.key.replace(".experts.", ".switch_mlp.") if entry.is_stacked else entry.key


def wanted_names(
    architecture: GgufArchitecture, config: Mapping[str, Any], entries: Iterable[EntryName] | None = None
) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """The tensors that a file of a model has: name in the checkpoint, names in the file of what it is made of, whether
    it may be absent.

    Args:
        architecture: of the file.
        config: of the model.
        entries: its layers, if the configuration is not of a class that says which there are.
    """
    layers: list[tuple[str, tuple[str, ...], bool]] = [("model.embed_tokens", ("token_embd",), False)]
    if not architecture.headless:
        layers.append(("lm_head", ("output",), bool(config.get("tie_word_embeddings"))))
    for entry in entry_names(config, NEWEST) if entries is None else entries:
        if entry.role is None:
            layers.append((stack_name(entry), gguf_names(entry.key, architecture), False))
    for path, stored, optional in layers:
        yield f"{path}.weight", tuple(f"{each}.weight" for each in stored), optional
        match = _BLOCK_PATH.fullmatch(path)
        module = path if match is None else match[2]
        if module in architecture.biases or module in architecture.optional_biases:
            yield f"{path}.bias", (f"{stored[0]}.bias",), optional or module in architecture.optional_biases
    for plain in plain_tensors(architecture, config):
        yield plain.name, plain.stored, plain.optional


def shape_of(name: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of a tensor of the model, from its configuration."""
    if (shape := recurrent_shape(name, config)) is not None:
        return shape
    sizes = _sizes(config)
    if "kv_lora_rank" in config:
        sizes |= _latent_sizes(config)
    module, _, kind = name.rpartition(".")
    last = module.rpartition(".")[2]
    if kind in ("e_score_correction_bias", "expert_bias"):
        return (sizes["experts"],)
    if kind == "sinks":
        return (config["num_attention_heads"],)
    if kind in ("gate_up_proj_bias", "down_proj_bias"):
        return (sizes["experts"], sizes[MATRICES[kind.removesuffix("_bias")][0]])
    if name.endswith("conv.conv.weight"):
        return (sizes["hidden"], 1, config["conv_L_cache"])
    if ".switch_mlp." in name or ".experts." in name:
        matrix = ("hidden", "expert") if last in ("down_proj", "w2") else ("expert", "hidden")
        matrix = ("2 inner", "hidden") if last == "gate_up_proj" else matrix
        return (sizes["experts"], *(sizes[each] for each in matrix))
    if ".block_sparse_moe." in name and last in ("input_linear", "output_linear"):
        matrix = ("2 inner", "hidden") if last == "input_linear" else ("hidden", "inner")
        return (sizes["experts"], *(sizes[each] for each in matrix))
    if ".shared_experts." in name or ".shared_expert." in name:
        matrix = ("hidden", "shared") if last == "down_proj" else ("shared", "hidden")
    elif ".conv." in name:
        matrix = ("3 hidden" if last == "in_proj" else "hidden", "hidden")
    elif last in MATRICES:
        matrix = MATRICES[last]
    else:
        return (sizes[NORMS.get(last, "hidden")],)
    return tuple(sizes[each] for each in (matrix if kind == "weight" else matrix[:1]))


MATRICES: Final = {
    **dict.fromkeys(("embed_tokens", "lm_head"), ("vocabulary", "hidden")),
    "q_proj": ("query", "hidden"),
    **dict.fromkeys(("k_proj", "v_proj"), ("pairs", "hidden")),
    "qkv_proj": ("query + 2 pairs", "hidden"),
    "q_a_proj": ("query rank", "hidden"),
    "q_b_proj": ("query", "query rank"),
    "kv_a_proj_with_mqa": ("rank + rotated", "hidden"),
    "kv_b_proj": ("keys and values", "rank"),
    **dict.fromkeys(("o_proj", "out_proj", "dense"), ("hidden", "attended")),
    **dict.fromkeys(("gate", "wg", "router", "layer"), ("experts", "hidden")),
    **dict.fromkeys(("gate_proj", "up_proj", "fc1", "c_fc", "w1", "w3"), ("inner", "hidden")),
    "gate_up_proj": ("2 inner", "hidden"),
    "input_linear": ("2 shared", "hidden"),
    "output_linear": ("hidden", "shared"),
    **dict.fromkeys(("down_proj", "fc2", "c_proj", "w2"), ("hidden", "inner")),
}
"""Outputs and inputs of matrices, by the last part of their paths."""

NORMS: Final = {
    **dict.fromkeys(("q_norm", "k_norm", "query_layernorm", "key_layernorm", "q_layernorm", "k_layernorm"), "head"),
    "q_a_layernorm": "query rank",
    "kv_a_layernorm": "rank",
}
"""Sizes of norms that are not of hidden states."""
EXPERT_COUNTS: Final = ("num_experts", "num_local_experts", "n_routed_experts")


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    hidden, inner, heads = config["hidden_size"], inner_size(config), config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    query, pairs = heads * head, config["num_key_value_heads"] * head
    expert = config.get("moe_intermediate_size", inner)
    expert = expert[0] if isinstance(expert, list) and expert else expert
    shared = config.get("shared_intermediate_size") or expert * config.get("n_shared_experts", 1)
    return {
        "hidden": hidden,
        "3 hidden": 3 * hidden,
        "inner": inner,
        "2 inner": 2 * inner,
        "vocabulary": config["vocab_size"],
        "head": head,
        "query": query,
        "attended": query,
        "pairs": pairs,
        "query + 2 pairs": query + 2 * pairs,
        "experts": next((config[key] for key in EXPERT_COUNTS if config.get(key) is not None), 0),
        "expert": expert,
        "shared": shared,
        "2 shared": 2 * shared,
    }


def _latent_sizes(config: Mapping[str, Any]) -> dict[str, int]:
    """What DeepSeek's attention has otherwise."""
    heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
    keys, rotated, values = (config[f"{each}_head_dim"] for each in ("qk_nope", "qk_rope", "v"))
    return {
        "query": heads * (keys + rotated),
        "attended": heads * values,
        "query rank": config.get("q_lora_rank") or 0,
        "rank": rank,
        "rank + rotated": rank + rotated,
        "keys and values": heads * (keys + values),
    }


def inner_size(config: Mapping[str, Any]) -> int:
    """The inner size of the MLP, of which LFM2 has two thirds if it says so."""
    inner = count(config, "intermediate_size", least=1, most=2**31 - 1)
    if config.get("block_auto_adjust_ff_dim", "block_multiple_of" in config):
        multiple = config.get("block_multiple_of", 256)
        inner = int(config.get("block_ffn_dim_multiplier", 1.0) * int(2 * inner / 3))
        inner = multiple * -(-inner // multiple)
    return inner


def heads_of(architecture: GgufArchitecture, config: Mapping[str, Any], path: str) -> int | None:
    """How many heads of interleaved rows a module has in the GGUF file, None if its rows are not interleaved."""
    match = _BLOCK_PATH.fullmatch(path)
    if not architecture.interleaved or match is None or match[2] not in INTERLEAVED:
        return None
    heads: int = config[INTERLEAVED[match[2]]]
    return heads
