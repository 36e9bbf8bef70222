"""What shape a weight must have: from the numbers of ``config.json``, one rule for each projection.

A pre-1.0 file knows its layers by number only, so a shape that the configuration does not allow is the one sign that a
number stands for another weight than the architecture says.

Authority: mistral.rs v0.6.0, ``mistralrs-core/src/models/*.rs`` (the sizes that ``new`` of attention and MLP ask for).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from uqff.models.architectures import LayerName, architecture_of
from uqff.models.text import Architecture

__all__ = ["SHAPES", "expected_shape", "shape_label"]

SHAPES: Final[Mapping[str, tuple[str, str]]] = {
    "lm_head": ("vocabulary", "hidden"),
    "model.embed_tokens": ("vocabulary", "hidden"),
    "self_attn.q_proj": ("queries", "hidden"),
    "self_attn.k_proj": ("keys", "hidden"),
    "self_attn.v_proj": ("keys", "hidden"),
    "self_attn.qkv_proj": ("queries + 2 keys", "hidden"),
    "self_attn.o_proj": ("hidden", "queries"),
    "mlp.gate_proj": ("inner", "hidden"),
    "mlp.up_proj": ("inner", "hidden"),
    "mlp.gate_up_proj": ("2 inner", "hidden"),
    "mlp.down_proj": ("hidden", "inner"),
    "mlp.experts.gate_proj": ("expert inner", "hidden"),
    "mlp.experts.up_proj": ("expert inner", "hidden"),
    "mlp.experts.down_proj": ("hidden", "expert inner"),
    "block_sparse_moe.gate": ("experts", "hidden"),
    "block_sparse_moe.experts.gate_proj": ("inner", "hidden"),
    "block_sparse_moe.experts.up_proj": ("inner", "hidden"),
    "block_sparse_moe.experts.down_proj": ("hidden", "inner"),
}
"""Outputs and inputs of a weight, by its path in a decoder layer or in the model; experts are called as in 1.x."""


def expected_shape(config: Mapping[str, Any], name: LayerName) -> tuple[int | None, ...] | None:
    """The shape that a layer of a known architecture has.

    Args:
        config: the parsed ``config.json``.
        name: of the layer; with all experts in one if it is a stack (``expert`` is None, ``stacked`` is not).

    Returns:
        ``(out, in)`` or ``(experts, out, in)``, None in place of what the configuration does not say; None if there is
        no rule for the layer.

    Raises:
        UnsupportedError: the architecture is unknown.
    """
    architecture = architecture_of(config)
    path = _path(architecture, name)
    rule = None if path in architecture.unmeasured else SHAPES.get(path)
    if rule is None:
        return None
    if architecture.text_config:
        config = config[architecture.text_config]
    sizes = _sizes(config, architecture.expert_count)
    matrix = tuple(sizes[part] for part in rule)
    stacked = name.stacked is not None and name.expert is None
    return (sizes["experts"], *matrix) if stacked else matrix


def _path(architecture: Architecture, name: LayerName) -> str:
    """What :data:`SHAPES` calls a layer, if it has it."""
    if name.block is not None:
        return name.key.removeprefix(f"{architecture.stack}.{name.block}.")
    if name.key == architecture.head:
        return "lm_head"
    return "model.embed_tokens" if name.key == architecture.embedding else name.key


def shape_label(shape: tuple[int | None, ...]) -> str:
    """A shape as text, ``?`` for what is not known."""
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


def _sizes(config: Mapping[str, Any], expert_count: str) -> dict[str, int | None]:
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    kv_heads = _size(config, "num_key_value_heads") or heads
    head = _size(config, "head_dim") or (hidden // heads if hidden and heads else None)
    inner = _size(config, "intermediate_size")
    queries = heads * head if heads and head else None
    keys = kv_heads * head if kv_heads and head else None
    return {
        "vocabulary": _size(config, "vocab_size"),
        "hidden": hidden,
        "queries": queries,
        "keys": keys,
        "queries + 2 keys": queries + 2 * keys if queries and keys else None,
        "inner": inner,
        "2 inner": 2 * inner if inner else None,
        "expert inner": _size(config, "moe_intermediate_size"),
        "experts": _size(config, expert_count),
    }


def _size(config: Mapping[str, Any], key: str) -> int | None:
    value = config.get(key)
    return value if type(value) is int and value > 0 else None
