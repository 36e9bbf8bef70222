"""Gradients on 2, 3 and 4 ranks: those of the dense layer, bit for bit, since small integers in float64 never round."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import uqff
from tests.parallel.ranks import run_ranks
from tests.parallel.weights import three
from uqff import CommError, Layer
from uqff.families import Unquant
from uqff.parallel import ColumnParallelLayer, Comm, FusedExperts, PackedExperts, ReplicatedLayer, RowParallelLayer
from uqff.parallel.comm import HEADER, MESSAGE
from uqff.parallel.fallback import GatheredLayer, GatheringLayer, NarrowedLayer
from uqff.parallel.shard import Slice
from uqff.parallel.unloaded import Unloaded
from uqff.parallel.vocabulary import Head

F64 = torch.float64

EXACT = 2**47
"""Integers below it, and sums of a few of them, are exact in float64; what is larger is not compared."""


def integers(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> torch.Tensor:
    """Small integers of both signs."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def blocks(out: int, inputs: int, seed: int = 0) -> uqff.QuantizedTensor:
    """Q8_0 of integers, exactly: the largest of each block is 127, so that its scale is 1."""
    weight = integers(out, inputs, seed=seed, dtype=torch.float32)
    weight[:, ::32] = 127
    record = uqff.quantize(weight, "q8_0")
    assert torch.equal(record.dequantize(), weight)
    return record


def gradients(forward: Callable[..., torch.Tensor], *given: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradients of a quadratic loss, and gradients of their square, in all that was given."""
    leaves = [each.clone().requires_grad_() for each in given]
    y = forward(*leaves)
    loss = (y * y * torch.arange(1, y.shape[-1] + 1)).sum()
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(torch.stack([(each * each).sum() for each in first]).sum(), leaves)
    made = [y.detach(), *(each.detach() for each in (*first, *second))]
    return [each for each in made if float(each.abs().max()) < EXACT]


def same(comm: Comm, found: list[torch.Tensor], expected: list[torch.Tensor], what: str) -> None:
    """Bits, on every rank."""
    assert len(found) == len(expected) >= 2, what
    for i, (mine, dense) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(mine, dense), (what, i, comm)


def square(x: torch.Tensor) -> torch.Tensor:
    """An activation function that keeps integers."""
    return x * x


def check_linear(comm: Comm) -> None:
    """A feed-forward layer, column- then row-parallel; what is gathered; layers of slices that cannot be cut."""
    n = comm.world_size
    hidden, inner = 4 * n, 32 * n
    linear = torch.nn.functional.linear
    for a, b in ((integers(inner, hidden), integers(hidden, inner, seed=1)), (None, None)):
        up_weight: Any = blocks(32 * n, 32 * n) if a is None else a
        down_weight: Any = blocks(4 * n, 32 * n, seed=1) if b is None else b
        up_dense, down_dense = (
            w if isinstance(w, torch.Tensor) else w.dequantize(F64) for w in (up_weight, down_weight)
        )
        up_bias, down_bias = integers(len(up_dense), seed=2), integers(len(down_dense), seed=3)
        up = ColumnParallelLayer.new(up_weight, up_bias, comm)
        assert isinstance(up, ColumnParallelLayer)
        down = RowParallelLayer.new(down_weight, down_bias, comm)
        x = integers(3, up_dense.shape[1], seed=4)
        dense = gradients(lambda x, u=up_dense, d=down_dense, p=up_bias, q=down_bias: linear(linear(x, u, p), d, q), x)
        same(comm, gradients(lambda x, u=up, d=down: d(u(x)), x), dense, "feed-forward")
        dense = gradients(lambda x, u=up_dense, p=up_bias: linear(x, u, p), x)
        same(comm, gradients(lambda x, u=up: comm.gather_last(u(x)), x), dense, "gathered")
        same(comm, gradients(Head(up), x), dense, "head")
    whole = Layer(Unquant.of(integers(8 * n, 4 * n)), integers(8 * n, seed=2))
    reference, x = ReplicatedLayer.from_layer(whole), integers(3, 4 * n, seed=4)
    narrowed = NarrowedLayer.narrowed(Unloaded.of(whole, "k"), Slice(0, 8 * comm.rank, 8), comm)
    same(comm, gradients(lambda x: comm.gather_last(narrowed(x)), x), gradients(reference, x), "narrowed")
    part = slice(4 * comm.rank, 4 * comm.rank + 4)
    for cls in (GatheringLayer, GatheredLayer, RowParallelLayer):
        layer = cls.from_layer(whole, comm)
        # The second derivative is of the sum over all inputs, of which this rank's loss has its part only: left out.
        y, first, _ = gradients(layer, x[:, part])
        y_dense, first_dense, _ = gradients(reference, x)
        same(comm, [y, first], [y_dense, first_dense[:, part]], cls.__name__)


def check_experts(comm: Comm) -> None:
    """In activations and in the router's weights; with biases, which no rank may count twice."""
    n = comm.world_size
    experts, hidden, inner = 3, 4, 2 * n
    gate, up = integers(experts, inner, hidden), integers(experts, inner, hidden, seed=1)
    down = integers(experts, hidden, inner, seed=2)
    biases = [integers(experts, inner, seed=3), integers(experts, inner, seed=4), integers(experts, hidden, seed=5)]
    x, indices, weights = integers(2, hidden, seed=6), torch.tensor([[2, 0], [1, 1]]), integers(2, 2, seed=7)
    for with_bias in (False, True):
        layers = [
            Layer(Unquant.of(weight), bias if with_bias else None)
            for weight, bias in zip((gate, up, down), biases, strict=True)
        ]
        alone = FusedExperts.from_layers(*three(layers), act=square)
        dense = gradients(lambda x, w, e=alone: e(x, indices, w), x, weights)
        forms: list[Any] = [FusedExperts.from_layers(*three(layers), comm, act=square)]
        if not with_bias:
            singles = [list(each) for each in (gate, up, down)]
            forms += [
                PackedExperts.from_layers(*three(singles), comm, act=square),
                FusedExperts.from_layers(*three(singles), comm, act=square),
            ]
        for form in forms:
            assert form.sharded
            same(comm, gradients(lambda x, w, e=form: e(x, indices, w), x, weights), dense, "experts")
            column = form.gate_proj
            y = gradients(lambda x, e=column: comm.gather_last(e(x[:, None], indices)), x)
            whole = FusedExperts.from_layers(*three(layers), act=square).gate_proj
            same(comm, y, gradients(lambda x, e=whole: e(x[:, None], indices), x), "gather_forward")


def check_half(comm: Comm) -> None:
    """Gradients in bfloat16 are added up in float32: 1 + 3/256 where each addition alone would round to 1."""
    rows = torch.full((comm.world_size, 1), 2**-8)
    rows[0] = 1
    x = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
    y = ColumnParallelLayer.new(rows, None, comm)(x)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.item() == torch.tensor(1 + (comm.world_size - 1) / 256).to(torch.bfloat16).item()


def on_ranks(comm: Comm) -> None:
    """All of it, any warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_linear(comm)
        check_experts(comm)
        check_half(comm)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_gradients_are_those_of_the_dense_layer(world_size: int) -> None:
    """First and second derivatives of every way in which a layer is partitioned."""
    run_ranks(world_size, on_ranks, timeout=60)


def disagreeing(comm: Comm) -> list[str]:
    """What ranks are told when one brings something else; every time, the next collective works."""
    weight = torch.ones(4, 2 * comm.world_size)
    row, column = RowParallelLayer.new(weight, None, comm), ColumnParallelLayer.new(weight, None, comm)
    odd = comm.rank == 1
    large = MESSAGE // 16  # rows of four float32

    def backward() -> None:
        x = torch.ones(3 if odd else 2, 2 * comm.world_size, requires_grad=True)
        column(x).sum().backward()

    told = []
    for call in (
        lambda: row(torch.ones(3 if odd else 2, 2)),
        lambda: row(torch.ones(large + 1 if odd else large, 2)),
        lambda: row(torch.ones(large if odd else 1, 2)),
        lambda: row(torch.ones(2, 2, dtype=torch.bfloat16 if odd else torch.float32)),
        lambda: row(torch.ones(2, 2)) if odd else comm.all_gather(torch.ones(2, 4)),
        lambda: comm.all_gather_bytes(b"x") if odd else comm.gather_last(torch.ones(2)),
        backward,
    ):
        with pytest.raises(CommError) as raised:
            call()
        told.append(str(raised.value))
        assert torch.equal(row(torch.ones(2, 2)), torch.full((2, 4), 2.0 * comm.world_size))
    return told


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_that_disagree_are_told(world_size: int) -> None:
    """Another batch size, dtype or collective: gloo would end the process, or wait; here every rank gets an error."""
    for rank, told in enumerate(run_ranks(world_size, disagreeing, timeout=60)):
        start = f"ranks do not agree on a collective, on rank {rank} of {world_size}: expected "
        pairs = [
            ("sum_all_reduce of float32 [2, 4]", "sum_all_reduce of float32 [3, 4]"),
            ("sum_all_reduce of float32 [2048, 4]", "sum_all_reduce of float32 [2049, 4]"),
            ("sum_all_reduce of float32 [1, 4]", "sum_all_reduce of float32 [2048, 4]"),
            ("sum_all_reduce of float32 [2, 4]", "sum_all_reduce of bfloat16 [2, 4]"),
            ("all_gather of float32 [2, 4]", "sum_all_reduce of float32 [2, 4]"),
            ("all_gather of float32 [2]", "all_gather_bytes"),
            (f"sum_all_reduce of float32 [2, {2 * world_size}]", f"sum_all_reduce of float32 [3, {2 * world_size}]"),
        ]
        assert told == [f"{start}{first}, as on rank 0, got {second} on rank 1" for first, second in pairs]


def around_the_message(comm: Comm) -> None:
    """Sums, parts and bytes that just fit the first message, and that just do not."""
    room = MESSAGE - HEADER
    for n in (0, 1, room // 8 - 1, room // 8, room // 8 + 1, 3 * room):
        x = torch.arange(float(n), dtype=F64) + comm.rank
        total = comm.world_size * torch.arange(float(n), dtype=F64) + sum(range(comm.world_size))
        assert torch.equal(comm.sum_all_reduce(x), total)
        assert all(torch.equal(each - rank, x - comm.rank) for rank, each in enumerate(comm.all_gather(x)))
    for n in (0, room - 1, room, room + 1):
        mine = bytes([comm.rank]) * (n + comm.rank)
        assert comm.all_gather_bytes(mine) == [bytes([rank]) * (n + rank) for rank in range(comm.world_size)]
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.complex64):
        x = torch.ones(2, 3).to(dtype)
        expected = x if dtype is torch.bool else comm.world_size * x
        assert torch.equal(comm.sum_all_reduce(x.mT), expected.mT)
        assert comm.sum_all_reduce(x[0, 0]).shape == ()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_collectives_of_every_size(world_size: int) -> None:
    """The first message holds small ones; larger ones follow it."""
    run_ranks(world_size, around_the_message)
