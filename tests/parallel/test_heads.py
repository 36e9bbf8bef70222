"""uqff.parallel.heads: which rank holds which key and value heads."""

from __future__ import annotations

import pytest

from uqff import ShardError
from uqff.parallel.comm import Comm
from uqff.parallel.heads import compute_kv_shard, compute_n_kv_groups


def comm(rank: int, world_size: int) -> Comm:
    """A rank, without the others."""
    made = Comm()
    made.rank, made.world_size = rank, world_size
    return made


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12, 16])
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("queries_per_head", [1, 3, 4])
def test_every_query_head_meets_its_key_head(world_size: int, kv_heads: int, queries_per_head: int) -> None:
    """Rank r holds the query heads r·q/w and on; local head j must use local key head j // groups. For all that fit."""
    head_dim, heads = 8, kv_heads * queries_per_head
    if (kv_heads % world_size and world_size % kv_heads) or heads % world_size:
        with pytest.raises(ShardError):
            compute_n_kv_groups(kv_heads, heads, comm(0, world_size))
        return
    local = heads // world_size
    for rank in range(world_size):
        slice_ = compute_kv_shard(kv_heads, head_dim, comm(rank, world_size)).resolve((kv_heads * head_dim, 64))
        groups = compute_n_kv_groups(kv_heads, heads, comm(rank, world_size))
        assert slice_.dim == 0
        assert slice_.start % head_dim == 0
        assert slice_.length == max(1, kv_heads // world_size) * head_dim
        assert local == groups * slice_.length // head_dim
        for head in range(local):
            held = slice_.start // head_dim + head // groups
            assert held == (rank * local + head) // queries_per_head


@pytest.mark.parametrize(
    ("kv_heads", "world_size"),
    [(2, 3), (3, 2), (4, 6), (0, 1)],
)
def test_heads_that_would_be_cut_or_missing(kv_heads: int, world_size: int) -> None:
    """The engine rounds: 2 heads on 3 ranks would let rank 2 read a third head."""
    with pytest.raises(
        ShardError, match=f"divides {kv_heads} heads or is a multiple of them, got world size {world_size}"
    ):
        compute_kv_shard(kv_heads, 64, comm(0, world_size))


def test_query_heads_that_do_not_divide() -> None:
    """Three query heads cannot share two key heads."""
    with pytest.raises(
        ShardError, match="query heads are not divisible: expected a multiple of 2 and of the world size 1"
    ):
        compute_n_kv_groups(2, 3, comm(0, 1))
