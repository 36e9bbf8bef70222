"""Attention heads on ranks: which key and value heads a rank holds where there are fewer of them than ranks.

Authority: mistral.rs v0.8.0, ``mistralrs-quant/src/distributed/layers.rs`` (``compute_kv_shard``,
``compute_n_kv_groups``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from uqff.errors import ShardError
from uqff.parallel.shard import Shard

if TYPE_CHECKING:
    from uqff.parallel.comm import Comm

__all__ = ["compute_kv_shard", "compute_n_kv_groups"]


def compute_kv_shard(total_num_kv_heads: int, head_dim: int, comm: Comm) -> Shard:
    """The slice of the key or value projection that a rank holds.

    With at least as many heads as ranks, each rank has its share of the heads.  With fewer, each head is held by
    ``world_size / total_num_kv_heads`` neighbouring ranks.

    Args:
        total_num_kv_heads: of the model.
        head_dim: outputs of a head.
        comm: rank and world size.

    Raises:
        ShardError: heads and ranks do not divide. (The engine rounds, and cuts through heads or reads beyond them.)

    >>> compute_kv_shard(8, 64, uqff.parallel.Comm())
    Shard(dim=0, rank=0, world_size=1, start=None, length=None)
    """
    replicas = _replicas(total_num_kv_heads, comm.world_size)
    if replicas == 1:
        return Shard.simple(0, comm.rank, comm.world_size)
    return Shard.offset(0, comm.rank // replicas * head_dim, head_dim)


def compute_n_kv_groups(total_num_kv_heads: int, num_attention_heads: int, comm: Comm) -> int:
    """How many query heads of a rank share one of its key and value heads; used with :func:`compute_kv_shard`.

    Raises:
        ShardError: query heads, key and value heads and ranks do not divide.

    >>> compute_n_kv_groups(8, 32, uqff.parallel.Comm())
    4
    """
    replicas = _replicas(total_num_kv_heads, comm.world_size)
    if num_attention_heads % (total_num_kv_heads * replicas) or num_attention_heads % comm.world_size:
        raise ShardError(
            "query heads are not divisible",
            expected=f"a multiple of {total_num_kv_heads * replicas} and of the world size {comm.world_size}",
            got=num_attention_heads,
        )
    return num_attention_heads // total_num_kv_heads // replicas


def _replicas(heads: int, world_size: int) -> int:
    """On how many ranks each key and value head is."""
    if heads < 1 or (heads % world_size and world_size % heads):
        raise ShardError(
            "key and value heads do not fit the ranks",
            expected=f"a world size that divides {heads} heads or is a multiple of them",
            got=f"world size {world_size}",
        )
    return max(1, world_size // heads)
