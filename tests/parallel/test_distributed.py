"""Layers on 1, 2 and 4 ranks against the unsharded layer; what happens when a rank is missing."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from weights import INPUTS, KINDS, OUT, activations, blob, bound

import uqff
from uqff import CommError, Layer, ShardError
from uqff.parallel.comm import Comm
from uqff.parallel.heads import compute_kv_shard
from uqff.parallel.layer import QuantizedLinear
from uqff.parallel.linear import ColumnParallelLayer, ReplicatedLayer, RowParallelLayer
from uqff.parallel.shard import Shard


@pytest.fixture(scope="module")
def blobs() -> dict[tuple[str, bool], bytes]:
    """A blob of every kind, with and without bias; of an old version where the family has one."""
    return {(kind, bias): blob(kind, bias=bias) for kind in KINDS for bias in (False, True)}


def check_family(comm: Comm, kind: str, whole: bytes) -> None:
    """Both kinds of split: numbers, gathered bytes, own bytes."""
    reference = ReplicatedLayer.deserialize(whole)
    weight = reference.dequantize_w()
    n, m = INPUTS // comm.world_size, OUT // comm.world_size
    inputs, outputs = slice(n * comm.rank, n * (comm.rank + 1)), slice(m * comm.rank, m * (comm.rank + 1))
    row, column = (cls.deserialize(whole, comm) for cls in (RowParallelLayer, ColumnParallelLayer))
    assert torch.equal(row.dequantize_w(), weight[:, inputs]), kind
    assert torch.equal(column.dequantize_w(), weight[outputs]), kind
    for layer in (row, column):
        assert layer.gather_serialize() == whole, kind
        own = type(layer).deserialize(layer.serialize())
        assert own.weight == layer.weight
    for dtype in (torch.float32, torch.bfloat16):
        x = activations(dtype)
        expected, error = reference(x), bound(x, weight, comm.world_size)
        y = row(x[..., inputs])
        assert y.dtype is dtype
        assert bool(((y - expected).abs() <= error).all()), (kind, dtype)
        assert all(torch.equal(y, other) for other in comm.all_gather(y)), "ranks differ"
        part = column(x)
        assert bool(((part - expected[..., outputs]).abs() <= error[..., outputs]).all()), (kind, dtype)
        if comm.world_size == 1:
            assert torch.equal(y, expected)
            assert torch.equal(part, expected)


def check_families(comm: Comm, blobs: dict[tuple[str, bool], bytes]) -> tuple[int, int] | None:
    for (kind, _), whole in blobs.items():
        check_family(comm, kind, whole)
    check_exact(comm)
    check_uneven(comm)
    check_collectives(comm)
    if comm.world_size == 4:
        return check_mesh(comm)
    if comm.world_size == 2:
        check_gone("late")
        check_gone("killed")
    return None


def check_exact(comm: Comm) -> None:
    """Small integers: no product rounds, so every order of adding up gives the same bits; the bias comes once."""
    weight = torch.arange(OUT * INPUTS).remainder(15).sub(7).view(OUT, INPUTS).float()
    x, bias = torch.arange(2.0 * INPUTS).remainder(9).view(2, INPUTS) - 4, torch.arange(OUT) + 0.5
    expected = torch.nn.functional.linear(x, weight, bias)
    row, column = RowParallelLayer.new(weight, bias, comm), ColumnParallelLayer.new(weight, bias, comm)
    assert torch.equal(row(x.chunk(comm.world_size, -1)[comm.rank]), expected)
    assert torch.equal(torch.cat(comm.all_gather(column(x)), -1), expected)
    fused = ColumnParallelLayer.new_merged(weight, bias, comm, chunks=[OUT // 2, OUT // 4, OUT // 4])
    shard = compute_kv_shard(2, OUT // 2, comm)  # on four ranks, two hold the same head
    values = ColumnParallelLayer.new_with_shard(weight, bias, comm, shard)
    assert isinstance(values, ColumnParallelLayer)
    assert torch.equal(values(x), expected.narrow(-1, *shard.resolve(weight.shape)[1:]))
    assert values.gather_serialize() == uqff.serialize(uqff.quantize(weight, "unquant"), bias)
    start = 0
    for layer, n in zip(fused, [OUT // 2, OUT // 4, OUT // 4], strict=True):
        assert isinstance(layer, ColumnParallelLayer)
        assert torch.equal(torch.cat(comm.all_gather(layer(x)), -1), expected[:, start : start + n])
        assert layer.gather_serialize() == uqff.serialize(
            uqff.quantize(weight[start : start + n], "unquant"), bias[start : start + n]
        )
        start += n


def check_uneven(comm: Comm) -> None:
    """The last rank holds all the groups that are left."""
    whole = uqff.deserialize(blob("afq4", bias=True))
    start = 64 * comm.rank
    end = INPUTS if comm.rank == comm.world_size - 1 else start + 64
    layer = RowParallelLayer.from_layer(whole, comm, shard=Shard.offset(1, start, end - start))
    x, reference = activations(torch.float32), ReplicatedLayer.from_layer(whole)
    error = (layer(x[..., start:end]) - reference(x)).abs()
    assert bool((error <= bound(x, reference.dequantize_w(), comm.world_size)).all())
    assert layer.gather_serialize() == uqff.serialize(whole)


def check_collectives(comm: Comm) -> None:
    """Sums, bytes of different lengths, and the check that everybody has the same file."""
    x = torch.full((3,), float(comm.rank + 1))
    assert comm.sum_all_reduce(x).tolist() == [comm.world_size * (comm.world_size + 1) / 2] * 3
    assert x.tolist() == [comm.rank + 1] * 3
    tiny = torch.tensor([1.0 if comm.rank == 0 else 2**-8], dtype=torch.bfloat16)
    if comm.world_size == 4:  # 1 + 3/256: rounding after each addition would leave 1
        assert comm.sum_all_reduce(tiny).item() == torch.tensor(1 + 3 / 256).to(torch.bfloat16).item() != 1
    assert comm.all_gather_bytes(b"x" * comm.rank) == [b"x" * rank for rank in range(comm.world_size)]
    comm.barrier()
    comm.check_same(b"digest", "model")
    if comm.world_size > 1:
        with pytest.raises(ShardError, match=r"model differs between ranks: .*6c65.*, got another on rank 1$"):
            comm.check_same(b"right" if comm.rank == 1 else b"left!", "model")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_family_on_ranks(world_size: int, blobs: dict[tuple[str, bool], bytes]) -> None:
    """Each rank's parameters are a slice; together they are the blob, byte for byte; products agree.

    On two ranks also: one is late, then killed. On four: the dimensions of a mesh.
    """
    results = run_ranks(world_size, check_families, blobs, dead=int(world_size == 2))
    if world_size == 4:
        assert results == [(1, 2), (1, 4), (5, 2), (5, 4)]
    if world_size == 2:
        assert results == [None]


def check_mesh(comm: Comm) -> tuple[int, int]:
    """Ranks 0, 1 and 2, 3 share a model; 0, 2 and 1, 3 do not: groups of a mesh, not the world, add up."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    tensor, data = Comm.from_mesh(mesh, "tensor"), Comm.from_mesh(mesh, "data")
    assert (tensor.world_size, data.world_size) == (2, 2)
    assert (tensor.rank, data.rank) == (comm.rank % 2, comm.rank // 2)
    x = torch.tensor([comm.rank])
    return int(tensor.sum_all_reduce(x)), int(data.sum_all_reduce(x))


def check_gone(how: str) -> None:
    """A rank that is late, then one that is killed, is an error on the other, which names the collective."""
    comm = Comm(dist.new_group(timeout=timedelta(seconds=1 if how == "late" else 60)))
    layer = RowParallelLayer.deserialize(blob("fp8", bias=False), comm)
    x = activations(torch.float32)[..., : INPUTS // 2]
    if comm.rank == 1 and how == "killed":
        os._exit(9)
    if comm.rank == 1:
        time.sleep(4)
        return
    start = time.monotonic()
    with pytest.raises(CommError) as raised:
        layer(x)
    assert time.monotonic() - start < 30
    assert str(raised.value).startswith(
        f"sum_all_reduce of float32 [1, 3, {OUT}] failed on rank 0 of 2: expected every rank to take part within"
    )


def test_a_world_of_one_needs_no_group() -> None:
    """Neither construction nor collectives look for one."""
    comm = Comm()
    assert (comm.rank, comm.world_size, comm.group) == (0, 1, None)
    assert not torch.distributed.is_initialized()
    check_collectives(comm)
    layer: QuantizedLinear = RowParallelLayer.from_layer(Layer(uqff.quantize(torch.ones(2, 4), "fp8")))
    assert torch.equal(layer(torch.ones(4)), torch.full((2,), 4.0))
    assert not torch.distributed.is_initialized()
