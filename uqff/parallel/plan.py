"""How a model is partitioned over ranks: which part of each layer a rank holds, and which world sizes a model fits.

::

    q_proj                        outputs    the rank's query heads
    k_proj, v_proj                outputs    the rank's key and value heads; the one it shares, where there are fewer
    o_proj                        inputs     what the rank's query heads give
    gate_proj, up_proj            outputs    an equal part; of every expert, whole blocks
    down_proj                     inputs     the same part
    embed_tokens, lm_head         outputs    an equal part of the vocabulary; whole, where it does not divide
    norms, routers                -          whole
    what no plan splits           -          whole, which is told

What is split how, ``base_model_tp_plan`` of ``transformers`` says.  The arithmetic is that of mistral.rs v0.8.0,
``mistralrs-core/src/models/llama.rs`` and ``mistralrs-quant/src/distributed/layers.rs``; there embedding and head are
whole on every rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from uqff.errors import FormatError, ShardError
from uqff.models.architectures import layer_names
from uqff.parallel.shard import world_sizes

__all__ = ["EMBEDDING", "HEAD", "USUAL", "Role", "Sizes", "roles_of"]

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


@dataclass(frozen=True)
class Sizes:
    """The numbers of a model that ranks have to divide.

    Attributes:
        heads: query heads.
        kv_heads: key and value heads.
        inner: width of the feed-forward layers, None if all are experts: those are cut unevenly if need be.
    """

    heads: int
    kv_heads: int
    inner: int | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sizes:
        """The sizes that a ``config.json`` gives.

        Raises:
            FormatError: it lacks one.
        """
        heads = _count(config, "num_attention_heads")
        kv_heads = _count(config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else heads
        dense = any(layer.block is not None and layer.module.endswith("mlp.up_proj") for layer in layer_names(config))
        return cls(heads, kv_heads, _count(config, "intermediate_size") if dense else None)

    def fits(self, world_size: int) -> bool:
        """Whether the model can be partitioned over that many ranks."""
        kv = self.kv_heads % world_size == 0 or world_size % self.kv_heads == 0
        return kv and self.heads % world_size == 0 and (self.inner is None or self.inner % world_size == 0)

    def check(self, world_size: int) -> None:
        """Make sure that it does.

        Raises:
            ShardError: it does not; the world sizes that work are named.
        """
        if self.fits(world_size):
            return
        works = [size for size in world_sizes(self.heads) if self.fits(size)]
        raise ShardError(
            "model cannot be split over the ranks",
            expected=f"world sizes that work are {', '.join(map(str, works))}",
            got=f"world size {world_size} for {self.heads} query heads, {self.kv_heads} key and value heads, "
            f"feed-forward width {self.inner}",
        )


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise FormatError("not a count", field=f"config.{key}", expected="a number of at least 1", got=value)
    return value
