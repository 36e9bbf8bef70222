"""The architectures of GGUF that have recurrent layers, or are of a family that does: Granite with Mamba, Qwen3-Next.

::

    Granite      mamba        in_proj   ssm_in        [2 inner + 2 groups * state + heads, hidden]
                              conv1d    ssm_conv1d    [inner + 2 groups * state, kernel]; the model: [.., 1, kernel]
                              A_log     ssm_a         [heads, 1], -exp of it
                              D         ssm_d         [heads, 1]
                              norm      ssm_norm      [groups, inner / groups]
    Qwen3-Next   linear_attn  in_proj_qkvz   of each key head q, k, its v's, its z's
                                             attn_qkv: all q, all k, all v; attn_gate: all z
                              in_proj_ba     ssm_ba   the same
    Qwen3.5      linear_attn  in_proj_qkv, z, b, a   attn_qkv, attn_gate, ssm_beta, ssm_alpha
                  the value heads: of each key head all           of all key heads one, of all the next, ...
                  out_proj       ssm_out   its columns by value heads, likewise

Authority: llama.cpp, ``conversion/granite.py``, ``mamba.py`` (``Mamba2Model``), ``qwen.py`` (``Qwen3NextModel``);
transformers, ``modeling_qwen3_next.py`` (``fix_query_key_value_ordering``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import numpy as np

from uqff.checkpoints.gguf.declared import BlockTensor, GgufArchitecture, OtherNumbers, Runs, SeveralMatrices
from uqff.checkpoints.gguf.forms import COLUMN, SQUEEZED, Ordered, Plus, Rate, Shaped
from uqff.errors import FormatError
from uqff.families.rows import Order
from uqff.models.text import ATTENDS, ATTENDS_FULLY, ATTENDS_LINEARLY, RECURS, count

__all__ = ["GRANITES", "QWEN3_NEXT", "QWEN35", "QWEN35_MOE", "recurrent_shape"]


def _all_attend(config: Mapping[str, Any]) -> bool:
    """Whether a model of Granite 4 has no Mamba layer."""
    return all(ATTENDS.holds(config, block) for block in range(count(config, "num_hidden_layers", least=1)))


def _is_hybrid(mixed: bool, config: Mapping[str, Any]) -> bool:
    return not _all_attend(config) and bool(config.get("num_local_experts")) == mixed


def _attending(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"layer_types": ["attention"] * config["num_hidden_layers"]}


def _divided(what: str, number: int, by: int) -> int:
    if number % by:
        raise FormatError("sizes that do not divide", field=what, expected=f"a multiple of {by}", got=number)
    return number // by


def _mamba_read(stored: Mapping[str, int], config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner, heads = stored["ssm.inner_size"], stored["ssm.time_step_rank"]
    return {
        "mamba_expand": _divided("ssm.inner_size", inner, config["hidden_size"]),
        "mamba_n_heads": heads,
        "mamba_d_head": _divided("ssm.inner_size", inner, heads),
    }


def _mamba_write(config: Mapping[str, Any]) -> Mapping[str, int]:
    expand, heads, size, hidden = (
        count(config, key, least=1) for key in ("mamba_expand", "mamba_n_heads", "mamba_d_head", "hidden_size")
    )
    if heads * size != expand * hidden:
        raise FormatError("heads of another size", field="mamba_d_head", expected=expand * hidden, got=heads * size)
    return {"ssm.inner_size": expand * hidden, "ssm.time_step_rank": heads}


_SCALES: Final = {
    "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention.scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_MODEL_TYPE: Final = "granitemoehybrid"
_ROTATED: Final = {"model_type": _MODEL_TYPE, "position_embedding_type": "rope"}
_UNROTATED: Final = {
    "model_type": _MODEL_TYPE,
    "position_embedding_type": "nope",
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}
_MAMBA: Final = (
    BlockTensor("mamba.conv1d.weight", "ssm_conv1d.weight", when=RECURS, form=SQUEEZED),
    BlockTensor("mamba.conv1d.bias", "ssm_conv1d.bias", when=RECURS),
    BlockTensor("mamba.dt_bias", "ssm_dt.bias", when=RECURS),
    BlockTensor("mamba.A_log", "ssm_a", when=RECURS, form=Rate(column=True)),
    BlockTensor("mamba.D", "ssm_d", when=RECURS, form=COLUMN),
    BlockTensor(
        "mamba.norm.weight",
        "ssm_norm.weight",
        when=RECURS,
        form=Shaped(lambda shape, config: (config["mamba_n_groups"], shape[0] // config["mamba_n_groups"])),
    ),
)
_STATE: Final = {
    "mamba_d_conv": "ssm.conv_kernel",
    "mamba_d_state": "ssm.state_size",
    "mamba_n_groups": "ssm.group_count",
}
_DENSE_NAMES: Final = {"shared_mlp.output_linear": "ffn_down"}
_DENSE: Final = {"shared_mlp.input_linear": SeveralMatrices(("ffn_gate", "ffn_up"))}
_MIXED_NAMES: Final = {
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "block_sparse_moe.output_linear": "ffn_down_exps",
    "shared_mlp.output_linear": "ffn_down_shexp",
}
_MIXED: Final = {
    "block_sparse_moe.input_linear": SeveralMatrices(("ffn_gate_exps", "ffn_up_exps")),
    "shared_mlp.input_linear": SeveralMatrices(("ffn_gate_shexp", "ffn_up_shexp")),
}

GRANITES: Final = (
    GgufArchitecture(
        "granite",
        ("GraniteMoeHybridForCausalLM",),
        lambda config: _all_attend(config) and not config.get("num_local_experts"),
        interleaved=True,
        rope_default=10000.0,
        fixed={**_ROTATED, "num_local_experts": 0},
        implied=_attending,
        numbers=_SCALES,
        counts={"shared_intermediate_size": "feed_forward_length"},
        stated={"rope.scaling.finetuned": True},
        own_head_size=False,
        renamed=_DENSE_NAMES,
        joined=_DENSE,
    ),
    GgufArchitecture(
        "granitemoe",
        ("GraniteMoeHybridForCausalLM",),
        lambda config: _all_attend(config) and bool(config.get("num_local_experts")),
        interleaved=True,
        rope_default=10000.0,
        expert_count="num_local_experts",
        expert_size="intermediate_size",
        fixed=_ROTATED,
        implied=_attending,
        numbers=_SCALES,
        counts={"shared_intermediate_size": "expert_shared_feed_forward_length"},
        stated={"rope.scaling.finetuned": True},
        own_head_size=False,
        renamed=_MIXED_NAMES,
        joined=_MIXED,
    ),
    *(
        GgufArchitecture(
            "granitehybrid",
            ("GraniteMoeHybridForCausalLM",),
            partial(_is_hybrid, mixed),
            interleaved=True,
            rope_default=10000.0,
            plain=_MAMBA,
            expert_count="num_local_experts" if mixed else "",
            expert_size="intermediate_size" if mixed else "",
            fixed=_UNROTATED if mixed else {**_UNROTATED, "num_local_experts": 0},
            numbers=_SCALES,
            counts={**_STATE, "shared_intermediate_size": "expert_shared_feed_forward_length"},
            stated={"rope.scaling.finetuned": False, **({} if mixed else {"expert_count": 0, "expert_used_count": 0})},
            own_head_size=False,
            kinds=("attention", "mamba"),
            derived=OtherNumbers(
                ("ssm.inner_size", "ssm.time_step_rank"),
                ("mamba_expand", "mamba_n_heads", "mamba_d_head"),
                _mamba_read,
                _mamba_write,
            ),
            renamed=_MIXED_NAMES if mixed else _DENSE_NAMES,
            joined=_MIXED if mixed else _DENSE,
        )
        for mixed in (True, False)
    ),
)
"""Granite 3 and 4."""


def _heads_of(config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Of linear attention: heads of keys, and how many numbers each has; value heads of each; numbers of one."""
    keys, values, key_size, value_size = (
        count(config, f"linear_{key}", least=1)
        for key in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    )
    return keys, key_size, _divided("linear_num_value_heads", values, keys), value_size


def _qkvz_rows(config: Mapping[str, Any]) -> tuple[int, ...]:
    keys, key_size, each, value_size = _heads_of(config)
    values = keys * each * value_size
    return 2 * keys * key_size + values, values


def _qkvz_order(config: Mapping[str, Any]) -> Order:
    """Where the rows of a model are, of all of ``attn_qkv`` and ``attn_gate``."""
    keys, key_size, each, value_size = _heads_of(config)
    sizes = (key_size, key_size, each * value_size, each * value_size)
    starts = np.cumsum([0, *(keys * size for size in sizes[:-1])])
    return np.concatenate(
        [
            start + head * size + np.arange(size)
            for head in range(keys)
            for start, size in zip(starts, sizes, strict=True)
        ]
    ).astype(np.int64)


def _inner_read(stored: Mapping[str, int], config: Mapping[str, Any]) -> Mapping[str, Any]:
    inner, heads = stored["ssm.inner_size"], config["linear_num_value_heads"]
    return {"linear_value_head_dim": _divided("ssm.inner_size", inner, heads)}


def _inner_write(config: Mapping[str, Any]) -> Mapping[str, int]:
    keys, _, each, size = _heads_of(config)
    return {"ssm.inner_size": keys * each * size}


def _by_interval(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Every so many layers there is one with full attention."""
    interval = count(config, "full_attention_interval", least=1)
    kinds = ("full_attention", "linear_attention")
    blocks = count(config, "num_hidden_layers", least=1)
    return {"layer_types": [kinds[(block + 1) % interval != 0] for block in range(blocks)]}


QWEN3_NEXT: Final = GgufArchitecture(
    "qwen3next",
    ("Qwen3NextForCausalLM",),
    rope_default=10000.0,
    norm_offset=1.0,
    rotated=0.25,
    plain=(
        *(BlockTensor(f"self_attn.{each}_norm.weight", when=ATTENDS_FULLY, form=Plus(1.0)) for each in "qk"),
        BlockTensor("linear_attn.conv1d.weight", "ssm_conv1d.weight", when=ATTENDS_LINEARLY, form=SQUEEZED),
        BlockTensor("linear_attn.dt_bias", "ssm_dt.bias", when=ATTENDS_LINEARLY),
        BlockTensor("linear_attn.A_log", "ssm_a", when=ATTENDS_LINEARLY, form=Rate()),
        BlockTensor("linear_attn.norm.weight", "ssm_norm.weight", when=ATTENDS_LINEARLY),
        BlockTensor("mlp.gate.weight"),
        BlockTensor("mlp.shared_expert_gate.weight"),
    ),
    expert_count="num_experts",
    expert_size="moe_intermediate_size",
    fixed={"model_type": "qwen3_next", "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    implied=_by_interval,
    counts={
        "linear_conv_kernel_dim": "ssm.conv_kernel",
        "linear_key_head_dim": "ssm.state_size",
        "linear_num_key_heads": "ssm.group_count",
        "linear_num_value_heads": "ssm.time_step_rank",
        "full_attention_interval": "full_attention_interval",
        "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    },
    derived=OtherNumbers(("ssm.inner_size",), ("linear_value_head_dim",), _inner_read, _inner_write),
    renamed={"post_attention_layernorm": "post_attention_norm"},
    joined={"linear_attn.in_proj_qkvz": SeveralMatrices(("attn_qkv", "attn_gate"), rows=_qkvz_rows, order=_qkvz_order)},
)


def _tiles(config: Mapping[str, Any]) -> Order:
    """Where each value head of a model is in GGUF: of each key head all in the former, one in turn in the latter."""
    keys, _, each, _ = _heads_of(config)
    heads: Order = np.arange(keys * each, dtype=np.int64)
    return heads % each * keys + heads // each


def _tiled_rows(config: Mapping[str, Any]) -> Order:
    """The same of the rows of all value heads."""
    size = _heads_of(config)[3]
    rows: Order = (_tiles(config)[:, None] * size + np.arange(size)).reshape(-1)
    return rows


def _tiled_through(config: Mapping[str, Any]) -> Order:
    """The same of queries and keys, which are in order, and values."""
    keys, key_size, _, _ = _heads_of(config)
    before = 2 * keys * key_size
    return np.concatenate((np.arange(before, dtype=np.int64), before + _tiled_rows(config)))


def _tiled_runs(config: Mapping[str, Any]) -> Runs:
    """The same of columns."""
    return Runs(_heads_of(config)[3], _tiles(config))


def _tiled_qkvz(config: Mapping[str, Any]) -> Order:
    """:func:`_qkvz_order` of tensors whose value heads are in GGUF's order."""
    through, _ = _qkvz_rows(config)
    there = np.concatenate((_tiled_through(config), through + _tiled_rows(config)))
    made: Order = there[_qkvz_order(config)]
    return made


def _tiled_ba(config: Mapping[str, Any]) -> Order:
    """Where the rows of ``in_proj_ba``, of each key head its b's and its a's, are among all b and all a."""
    keys, _, each, _ = _heads_of(config)
    heads = _tiles(config).reshape(keys, each)
    made: Order = np.concatenate((heads, heads + keys * each), axis=1).reshape(-1)
    return made


_TILED: Final = (
    *(BlockTensor(f"self_attn.{each}_norm.weight", when=ATTENDS_FULLY, form=Plus(1.0)) for each in "qk"),
    BlockTensor(
        "linear_attn.conv1d.weight",
        "ssm_conv1d.weight",
        when=ATTENDS_LINEARLY,
        form=Ordered(_tiled_through, SQUEEZED),
    ),
    BlockTensor("linear_attn.dt_bias", "ssm_dt.bias", when=ATTENDS_LINEARLY, form=Ordered(_tiles)),
    BlockTensor("linear_attn.A_log", "ssm_a", when=ATTENDS_LINEARLY, form=Ordered(_tiles, Rate())),
    BlockTensor("linear_attn.norm.weight", "ssm_norm.weight", when=ATTENDS_LINEARLY),
)
_DELTAS: Final = {key: stored for key, stored in QWEN3_NEXT.counts.items() if key.startswith(("linear", "full"))}

QWEN35: Final = (
    GgufArchitecture(
        "qwen35",
        ("Qwen3_5ForCausalLM",),
        rope_default=10000.0,
        norm_offset=1.0,
        rotated=0.25,
        plain=_TILED,
        fixed={"model_type": "qwen3_5_text"},
        implied=_by_interval,
        counts=_DELTAS,
        derived=QWEN3_NEXT.derived,
        renamed=QWEN3_NEXT.renamed,
        orders={
            "linear_attn.in_proj_qkv": _tiled_through,
            "linear_attn.in_proj_z": _tiled_rows,
            "linear_attn.in_proj_b": _tiles,
            "linear_attn.in_proj_a": _tiles,
        },
        columns={"linear_attn.out_proj": _tiled_runs},
        axes="rope_parameters",
    ),
    dataclasses.replace(
        QWEN3_NEXT,
        name="qwen35moe",
        plain=(*_TILED, BlockTensor("mlp.gate.weight"), BlockTensor("mlp.shared_expert_gate.weight")),
        joined={
            "linear_attn.in_proj_qkvz": SeveralMatrices(("attn_qkv", "attn_gate"), rows=_qkvz_rows, order=_tiled_qkvz),
            "linear_attn.in_proj_ba": SeveralMatrices(("ssm_beta", "ssm_alpha"), order=_tiled_ba),
        },
        columns={"linear_attn.out_proj": _tiled_runs},
        axes="",
    ),
)
"""Qwen3.5: its model with experts is Qwen3-Next's in other tensors, as which the engine takes it, too."""

QWEN35_MOE: Final = dataclasses.replace(
    QWEN35[0],
    name="qwen35moe",
    classes=("Qwen3_5MoeForConditionalGeneration",),
    plain=QWEN35[1].plain,
    expert_count=QWEN35[1].expert_count,
    expert_size=QWEN35[1].expert_size,
    fixed={**QWEN35[1].fixed, "model_type": "qwen3_5_moe_text"},
    counts=QWEN35[1].counts,
)
"""The same beside a part that sees, which makes it Qwen3.5-MoE, of whose text alone the engine knows nothing."""


def recurrent_shape(name: str, config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Shape of a tensor of a recurrent layer, or of the full attention beside one; None of any other."""
    hidden: int = config["hidden_size"]
    if ".mamba." in name:
        each_head: int = config["mamba_n_heads"]
        inner, states = config["mamba_expand"] * hidden, 2 * config["mamba_n_groups"] * config["mamba_d_state"]
        shapes: dict[str, tuple[int, ...]] = {
            "in_proj.weight": (2 * inner + states + each_head, hidden),
            "out_proj.weight": (hidden, inner),
            "conv1d.weight": (inner + states, 1, config["mamba_d_conv"]),
            "conv1d.bias": (inner + states,),
            "norm.weight": (inner,),
        }
        return shapes.get(name.partition(".mamba.")[2], (each_head,))
    if "linear_num_key_heads" not in config:
        return None
    keys, key_size, each, value_size = _heads_of(config)
    if ".linear_attn." in name:
        through, values = 2 * keys * key_size, keys * each * value_size
        return {
            "in_proj_qkvz.weight": (through + 2 * values, hidden),
            "in_proj_qkv.weight": (through + values, hidden),
            "in_proj_z.weight": (values, hidden),
            "in_proj_b.weight": (keys * each, hidden),
            "in_proj_a.weight": (keys * each, hidden),
            "in_proj_ba.weight": (2 * keys * each, hidden),
            "out_proj.weight": (hidden, values),
            "conv1d.weight": (through + values, 1, config["linear_conv_kernel_dim"]),
            "norm.weight": (value_size,),
        }.get(name.partition(".linear_attn.")[2], (keys * each,))
    if name.endswith(".self_attn.q_proj.weight"):  # queries, and what their outputs are multiplied by
        heads: int = config["num_attention_heads"]
        return 2 * heads * (config.get("head_dim") or hidden // heads), hidden
    if name.endswith(".shared_expert_gate.weight"):
        return 1, hidden
    if ".shared_expert." in name:
        shared: int = config["shared_expert_intermediate_size"]
        return (hidden, shared) if name.endswith(".down_proj.weight") else (shared, hidden)
    return None
