"""Layers on 1, 2, 3, 4 and 8 ranks against the unsharded layer; what happens when a rank is missing."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import uqff
from tests.parallel.ranks import run_ranks
from tests.parallel.weights import FAMILIES, KINDS, activations, blob, bound, dimensions, projections, routed, three
from uqff import CommError, Layer, ShardError
from uqff.parallel.comm import Comm
from uqff.parallel.experts import FusedExperts, PackedExperts
from uqff.parallel.heads import compute_kv_shard
from uqff.parallel.layer import QuantizedLinear
from uqff.parallel.linear import ColumnParallelLayer, ReplicatedLayer, RowParallelLayer
from uqff.parallel.mixture import Mixture
from uqff.parallel.shard import Shard

Blobs = dict[tuple[str, bool], bytes]
Stacks = dict[str, list[bytes]]


def check_family(comm: Comm, kind: str, whole: bytes) -> None:
    """Both kinds of split: numbers, gathered bytes, own bytes."""
    reference = ReplicatedLayer.deserialize(whole)
    weight = reference.dequantize_w()
    n, m = weight.shape[1] // comm.world_size, weight.shape[0] // comm.world_size
    inputs, outputs = slice(n * comm.rank, n * (comm.rank + 1)), slice(m * comm.rank, m * (comm.rank + 1))
    row, column = (cls.deserialize(whole, comm) for cls in (RowParallelLayer, ColumnParallelLayer))
    assert torch.equal(row.dequantize_w(), weight[:, inputs]), kind
    assert torch.equal(column.dequantize_w(), weight[outputs]), kind
    for layer in (row, column):
        assert layer.gather_serialize() == whole, kind
        own = type(layer).deserialize(layer.serialize())
        assert own.weight == layer.weight
    for dtype in (torch.float32, torch.bfloat16):
        x = activations(dtype, weight.shape[1])
        expected, error = reference(x), bound(x, weight, comm.world_size)
        y = row(x[..., inputs])
        assert y.dtype is dtype
        assert bool(((y - expected).abs() <= error).all()), (kind, dtype)
        assert all(torch.equal(y, other) for other in comm.all_gather(y)), "ranks differ"
        part = column(x)
        assert bool(((part - expected[..., outputs]).abs() <= error[..., outputs]).all()), (kind, dtype)


def check_experts(comm: Comm, kind: str, whole: list[bytes]) -> None:
    """Both forms: slices, gathered bytes, each projection, and the sum over experts and ranks."""
    reference = FusedExperts.deserialize(*three(whole))
    gate, down = reference.gate_proj.dequantize_w(), reference.down_proj.dequantize_w()
    fused = FusedExperts.deserialize(*three(whole), comm)
    n = gate.shape[1] // comm.world_size
    mine = slice(n * comm.rank, n * (comm.rank + 1))
    assert torch.equal(fused.gate_proj.dequantize_w(), gate[:, mine]), kind
    assert torch.equal(fused.down_proj.dequantize_w(), down[:, :, mine]), kind
    assert fused.gate_proj.gather_serialize() == whole[0], kind
    assert fused.down_proj.gather_serialize() == whole[2], kind
    forms: list[Mixture] = [fused]
    if all(uqff.deserialize(each).weight.can_narrow(0, 0, 1) for each in whole):
        gates, ups, downs = (uqff.deserialize(each).weight.unstack() for each in whole)
        forms.append(PackedExperts.from_layers(gates, ups, downs, comm, on_misaligned="replicate"))
    for dtype in (torch.float32, torch.bfloat16):
        x, indices, weights = routed(dtype, gate.shape[2])
        inner = torch.nn.functional.silu(reference.gate_proj(x[:, None], indices)) * reference.up_proj(
            x[:, None], indices
        )
        terms = reference.down_proj(inner, indices)
        magnitude = (inner.float().abs()[:, :, None] @ down.abs()[indices].mT).squeeze(2) + 1
        error = 4 * comm.world_size**0.5 * torch.finfo(dtype).eps * magnitude
        part = fused.down_proj(inner[..., mine], indices)
        assert bool(((part - terms).abs() <= error).all()), (kind, dtype)
        expected, allowed = reference(x, indices, weights), (error * weights[..., None]).sum(1)
        made = torch.stack([experts(x, indices, weights) for experts in forms])
        assert made.dtype is dtype
        assert bool(((made - expected).abs() <= allowed).all()), (kind, dtype)
        assert all(torch.equal(made, other) for other in comm.all_gather(made)), "ranks differ"


def check_families(comm: Comm, blobs: Blobs, stacks: Stacks) -> tuple[int, int] | None:
    for (kind, _), whole in blobs.items():
        check_family(comm, kind, whole)
    for kind, given in stacks.items():
        check_experts(comm, kind, given)
    check_exact(comm)
    check_exact_experts(comm)
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
    out, inputs = dimensions(comm.world_size)
    weight = torch.arange(out * inputs).remainder(15).sub(7).view(out, inputs).float()
    x, bias = torch.arange(2.0 * inputs).remainder(9).view(2, inputs) - 4, torch.arange(out) + 0.5
    expected = torch.nn.functional.linear(x, weight, bias)
    row, column = RowParallelLayer.new(weight, bias, comm), ColumnParallelLayer.new(weight, bias, comm)
    assert torch.equal(row(x.chunk(comm.world_size, -1)[comm.rank]), expected)
    assert torch.equal(torch.cat(comm.all_gather(column(x)), -1), expected)
    fused = ColumnParallelLayer.new_merged(weight, bias, comm, chunks=[out // 2, out // 4, out // 4])
    heads = 3 if comm.world_size == 3 else 2
    shard = compute_kv_shard(heads, out // heads, comm)  # on four ranks, two hold the same head
    values = ColumnParallelLayer.new_with_shard(weight, bias, comm, shard)
    assert isinstance(values, ColumnParallelLayer)
    assert torch.equal(values(x), expected.narrow(-1, *shard.resolve(weight.shape)[1:]))
    assert values.gather_serialize() == uqff.serialize(uqff.quantize(weight, "unquant"), bias)
    start = 0
    for layer, n in zip(fused, [out // 2, out // 4, out // 4], strict=True):
        assert isinstance(layer, ColumnParallelLayer)
        assert torch.equal(torch.cat(comm.all_gather(layer(x)), -1), expected[:, start : start + n])
        assert layer.gather_serialize() == uqff.serialize(
            uqff.quantize(weight[start : start + n], "unquant"), bias[start : start + n]
        )
        start += n


def check_exact_experts(comm: Comm) -> None:
    """Small integers again: each rank has its part of every expert, and every bias comes once."""
    inner = 3 * comm.world_size
    gate, up, down = (
        torch.arange(torch.Size(shape).numel()).remainder(5).sub(2 + i).view(shape).float()
        for i, shape in enumerate([(3, inner, 4), (3, inner, 4), (3, 4, inner)])
    )
    biases = [torch.arange(3.0 * inner).view(3, inner), torch.ones(3, inner), torch.arange(12.0).view(3, 4)]
    x, indices = torch.arange(8.0).view(2, 4), torch.tensor([[2, 0], [1, 1]])
    weights = torch.tensor([[0.5, 0.25], [1.0, 2.0]])
    for given in (biases, None):
        expected = torch.zeros(2, 4)
        for t, k in ((0, 0), (0, 1), (1, 0), (1, 1)):
            e = int(indices[t, k])
            g, u, d = (0.0, 0.0, 0.0) if given is None else (each[e] for each in given)
            expected[t] += weights[t, k] * (down[e] @ (torch.relu(gate[e] @ x[t] + g) * (up[e] @ x[t] + u)) + d)
        layers = [
            Layer(uqff.quantize(weight, "unquant"), None if given is None else given[i])
            for i, weight in enumerate((gate, up, down))
        ]
        forms: list[Mixture] = [FusedExperts.from_layers(*three(layers), comm, act=torch.relu)]
        if given is None:
            forms += [
                FusedExperts.from_fused(torch.cat([gate, up], 1), down, comm, act=torch.relu),
                PackedExperts.from_fused(torch.cat([gate, up], 1).mT, down.mT, comm, act=torch.relu),
            ]
        for experts in forms:
            assert torch.equal(experts(x, indices, weights), expected)
            assert all(map(torch.equal, comm.all_gather(experts(x, indices, weights)), [expected] * comm.world_size))
        fused = forms[0]
        assert isinstance(fused, FusedExperts)
        for made, layer in zip((fused.gate_proj, fused.up_proj, fused.down_proj), layers, strict=True):
            assert made.gather_layer() == layer


def check_uneven(comm: Comm) -> None:
    """The last rank holds all the groups that are left."""
    whole = uqff.deserialize(blob("afq4", bias=True, world_size=comm.world_size))
    inputs = whole.weight.shape[1]
    start = 64 * comm.rank
    end = inputs if comm.rank == comm.world_size - 1 else start + 64
    layer = RowParallelLayer.from_layer(whole, comm, shard=Shard.offset(1, start, end - start))
    x, reference = activations(torch.float32, inputs), ReplicatedLayer.from_layer(whole)
    error = (layer(x[..., start:end]) - reference(x)).abs()
    assert bool((error <= bound(x, reference.dequantize_w(), comm.world_size)).all())
    assert layer.gather_serialize() == uqff.serialize(whole)


def check_modes(comm: Comm) -> None:
    """What backends write to is no tensor of inference mode: torch 2.4 refuses to change those in their threads."""
    written: list[torch.Tensor] = []
    reduce, gather = dist.all_reduce, dist.all_gather

    def all_reduce(tensor: torch.Tensor, **more: Any) -> Any:
        written.append(tensor)
        return reduce(tensor, **more)

    def all_gather(tensors: list[torch.Tensor], tensor: torch.Tensor, **more: Any) -> Any:
        written.extend(tensors)
        return gather(tensors, tensor, **more)

    with mock.patch.multiple(dist, all_reduce=all_reduce, all_gather=all_gather), torch.inference_mode():
        for size in (3, 20_000):  # within the first message, and in a second turn
            x = torch.full((size,), float(comm.rank + 1))
            assert comm.sum_all_reduce(x)[0] == comm.world_size * (comm.world_size + 1) / 2
            assert [part[0] for part in comm.all_gather(x)] == [rank + 1 for rank in range(comm.world_size)]
    assert comm.world_size == 1 or len(written) > 4
    assert not any(tensor.is_inference() for tensor in written)


def check_collectives(comm: Comm) -> None:
    """Sums, bytes of different lengths, and the check that everybody has the same file."""
    x = torch.full((3,), float(comm.rank + 1))
    assert comm.sum_all_reduce(x).tolist() == [comm.world_size * (comm.world_size + 1) / 2] * 3
    assert x.tolist() == [comm.rank + 1] * 3
    tiny = torch.tensor([1.0 if comm.rank == 0 else 2**-8], dtype=torch.bfloat16)
    if comm.world_size == 4:  # 1 + 3/256: rounding after each addition would leave 1
        assert comm.sum_all_reduce(tiny).item() == torch.tensor(1 + 3 / 256).to(torch.bfloat16).item() != 1
    assert comm.all_gather_bytes(b"x" * comm.rank) == [b"x" * rank for rank in range(comm.world_size)]
    check_modes(comm)
    comm.barrier()
    comm.check_same(b"digest", "model")
    if comm.world_size > 1:
        with pytest.raises(ShardError, match=r"model differs between ranks: .*6c65.*, got another on rank 1$"):
            comm.check_same(b"right" if comm.rank == 1 else b"left!", "model")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_every_family_on_ranks(world_size: int) -> None:
    """Each rank's parameters are a slice; together they are the blob, byte for byte; products agree.

    On two ranks also: one is late, then killed. On four: the dimensions of a mesh.
    """
    with_bias = (True,) if world_size in (3, 8) else (False, True)
    kinds = FAMILIES if world_size == 8 else KINDS
    blobs = {(kind, bias): blob(kind, bias=bias, world_size=world_size) for kind in kinds for bias in with_bias}
    stacks = {kind: [uqff.serialize(each) for each in projections(kind, world_size)] for kind in kinds}
    results = run_ranks(world_size, check_families, blobs, stacks, dead=int(world_size == 2))
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
    comm = Comm(dist.new_group(timeout=timedelta(seconds=2 if how == "late" else 60)))
    layer = RowParallelLayer.deserialize(blob("fp8", bias=False), comm)
    x = activations(torch.float32)[..., : 1024 // 2]
    dist.barrier()  # of the world: both have joined the group
    if comm.rank == 1 and how == "killed":
        os._exit(9)
    if comm.rank == 1:
        dist.barrier()  # the other comes when it has given up
        return
    start = time.monotonic()
    with pytest.raises(CommError) as raised:
        layer(x)
    assert time.monotonic() - start < 30
    assert str(raised.value).startswith(
        "sum_all_reduce of float32 [1, 3, 32] failed on rank 0 of 2: expected every rank to take part within"
    )
    if how == "late":
        dist.barrier()


def end_without_a_word(comm: Comm) -> None:
    """As a rank that the kernel kills for its memory."""
    os._exit(9)


def test_a_rank_that_ends_without_a_word_is_a_failure_that_has_its_exit_code() -> None:
    """The other tests of this folder would wait for its result for ever."""
    with pytest.raises(AssertionError, match=r"ranks ended without a result, by exit code: \{0: 9\}"):
        run_ranks(1, end_without_a_word)


def test_a_world_of_one_needs_no_group() -> None:
    """Neither construction nor collectives look for one."""
    comm = Comm()
    assert (comm.rank, comm.world_size, comm.group) == (0, 1, None)
    assert not torch.distributed.is_initialized()
    check_collectives(comm)
    layer: QuantizedLinear = RowParallelLayer.from_layer(Layer(uqff.quantize(torch.ones(2, 4), "fp8")))
    assert torch.equal(layer(torch.ones(4)), torch.full((2,), 4.0))
    assert not torch.distributed.is_initialized()
