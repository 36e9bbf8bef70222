"""How a model is partitioned over ranks: which part of each layer a rank holds.

::

    q_proj                        outputs    the rank's query heads
    k_proj, v_proj                outputs    the rank's key and value heads; the one it shares, where there are fewer
    o_proj                        inputs     what the rank's query heads give
    gate_proj, up_proj            outputs    an equal part; of every expert, whole blocks
    down_proj                     inputs     the same part
    embed_tokens, lm_head         outputs    an equal part of the vocabulary; whole, where it does not divide
    norms, routers                -          whole
    what no plan splits           -          whole, which is told
    attention, MLPs               -          whole, which is told, where heads or widths do not divide by the ranks

What is split how, ``base_model_tp_plan`` of ``transformers`` says.  The arithmetic is that of mistral.rs v0.8.0,
``mistralrs-core/src/models/llama.rs`` and ``mistralrs-quant/src/distributed/layers.rs``; there embedding and head are
whole on every rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, Literal, NamedTuple

__all__ = ["EMBEDDING", "HEAD", "USUAL", "Heads", "Role", "fitting", "roles_of"]

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
"""Paths of the two modules that hold a row for each token."""

NUMBER: Final = re.compile(r"\.[0-9]+(?=\.)")

Role = Literal["query", "key-value", "column", "row", "whole"]
"""How a linear layer is split; ``whole`` is not at all."""

STYLES: Final[Mapping[str, Role]] = {"colwise": "column", "rowwise": "row"}
"""Roles by the styles of ``base_model_tp_plan`` of ``transformers``; whatever has another is whole on every rank."""

USUAL: Final[Mapping[str, Role]] = {
    "q_proj": "query",
    "k_proj": "key-value",
    "v_proj": "key-value",
    "o_proj": "row",
    "gate_proj": "column",
    "up_proj": "column",
    "down_proj": "row",
    "lm_head": "column",
    "embed_tokens": "column",
}
"""Roles by the last word of a path, for estimates: most models have no others that are split."""

HEADED: Final[Mapping[str, Role]] = {
    "q_proj": "query",
    "q_b_proj": "query",
    "kv_b_proj": "query",
    "k_proj": "key-value",
    "v_proj": "key-value",
}
"""Of layers whose outputs are split, those that are whole heads, by the last word of their path."""

LOW_RANK: Final = ("q_a_proj", "kv_a_proj_with_mqa")
"""Never split: all of their outputs are normalised together.  Some releases have them in the plan."""


def roles_of(plan: Mapping[str, str], paths: Iterable[str]) -> dict[str, Role]:
    """The roles of linear layers.

    Args:
        plan: styles by paths with ``*`` for numbers, as ``transformers`` has them.
        paths: of the layers, relative as in the plan.

    Returns:
        Whatever the plan splits; ``whole`` for others, and for those of a module that splits outputs and takes no split
        inputs, or the other way round.
    """
    roles: dict[str, Role] = {}
    for path in paths:
        name = path.rpartition(".")[2]
        role = STYLES.get(plan.get(NUMBER.sub(".*", path), ""), "whole")
        roles[path] = HEADED.get(name, role) if role == "column" else role
        if name in LOW_RANK:
            roles[path] = "whole"
    children: dict[str, list[str]] = {}
    for path in roles:
        children.setdefault(path.rpartition(".")[0], []).append(path)
    for each in children.values():
        split = [path for path in each if roles[path] != "whole"]
        if len({roles[path] == "row" for path in split}) < 2:
            roles.update(dict.fromkeys(each, "whole"))
    return roles


def fitting(
    roles: Mapping[str, Role], shapes: Mapping[str, tuple[int, ...]], heads: Heads, ranks: int
) -> dict[str, Role]:
    """The roles that a number of ranks allows: all layers of a module are whole if one of them has no equal shares.

    Args:
        roles: of linear layers, by their paths.
        shapes: of their weights, ``(out, in)``.
        heads: of attention.
        ranks: how many there are.
    """
    found: dict[str, Role] = {}
    uneven = {path.rpartition(".")[0] for path, role in roles.items() if not _divides(role, shapes[path], heads, ranks)}
    for path, role in roles.items():
        found[path] = "whole" if path.rpartition(".")[0] in uneven else role
    return found


class Heads(NamedTuple):
    """Of attention: how many there are.

    Attributes:
        query: of queries.
        pairs: of keys and values.
    """

    query: int
    pairs: int


def _divides(role: Role, shape: tuple[int, ...], heads: Heads, ranks: int) -> bool:
    if role == "query":
        return heads.query % ranks == 0
    if role == "key-value":
        return heads.query % ranks == 0 and (heads.pairs % ranks == 0 or ranks % heads.pairs == 0)
    return role == "whole" or shape[role == "row"] % ranks == 0
