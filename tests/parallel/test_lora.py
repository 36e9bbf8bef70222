"""Adapters on layers: merged and beside the weight, cut among ranks, against slices by hand and PEFT's forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import uqff
from tests.parallel.ranks import run_ranks
from tests.support.lora_files import exact_numbers
from uqff.checkpoints.int8_rows import Int8Rows
from uqff.errors import ShapeError, UnsupportedError
from uqff.families.part import Part
from uqff.lora import LowRank
from uqff.parallel import (
    ColumnParallelLayer,
    ColumnParallelStack,
    Comm,
    ReplicatedLayer,
    ReplicatedStack,
    RowParallelLayer,
    RowParallelStack,
    Shard,
)
from uqff.parallel.fallback import column, row
from uqff.parallel.lora import adapted, adapted_stack
from uqff.parallel.unloaded import Unloaded
from uqff.simd.floats import Floats

OUT, IN = 48, 96


def integers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Small enough that every sum of products is exact, in any order."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-3, 4, shape)).float()


def low_rank(out: int, inputs: int, rank: int, seed: int, scale: float = 0.5) -> LowRank:
    b, a = integers(out, rank, seed=seed), integers(rank, inputs, seed=seed + 100)
    return LowRank(Floats.of_tensor(b), Floats.of_tensor(a), scale)


def plain(delta: LowRank) -> torch.Tensor:
    return torch.from_numpy(delta.delta())


DELTAS = [low_rank(OUT, IN, 2, 1), low_rank(OUT, IN, 5, 2, -2.0)]


def check_linear(comm: Comm) -> None:
    """Both kinds of split, merged and not: the products of the whole, sliced by hand, to the bit."""
    weight, bias, x = integers(OUT, IN), integers(OUT, seed=7), integers(3, IN, seed=8)
    total = weight + sum(map(plain, DELTAS))
    expected = x @ total.T + bias
    outputs = slice(OUT // comm.world_size * comm.rank, OUT // comm.world_size * (comm.rank + 1))
    inputs = slice(IN // comm.world_size * comm.rank, IN // comm.world_size * (comm.rank + 1))
    for merge in (None, True, False):
        split = adapted(ColumnParallelLayer(weight, bias, comm), DELTAS, merge=merge)
        assert torch.equal(split(x), expected[:, outputs])
        joined = adapted(RowParallelLayer(weight, bias, comm), DELTAS, merge=merge)
        assert torch.equal(joined(x[:, inputs]), expected)
        if merge is not False:
            assert torch.equal(split.dequantize_w(), total[outputs])
            assert torch.equal(joined.dequantize_w(), total[:, inputs])
            assert torch.equal(joined.gather_layer().weight.dequantize(), total), "still slices of a whole"
        else:
            factors = [
                [tuple(each.get_buffer(name).shape) for name in ("b0", "a0")] for each in (split.lora, joined.lora)
            ]
            n = comm.world_size
            assert factors == [[(OUT // n, 2), (2, IN)], [(OUT, 2), (2, IN // n)]]


def check_quantised(comm: Comm) -> None:
    """Beside a quantised weight nothing is lost: its own product plus that of the factors, on any number of ranks."""
    whole = uqff.quantize(integers(64, 768), "q8_0")  # whose numbers are not integers, but few bits
    codes = uqff.Layer(whole)
    x, deltas = integers(2, 768, seed=8), [low_rank(64, 768, 3, 4)]
    exact = x.double() @ (whole.dequantize().double() + plain(deltas[0]).double()).T
    size = x.abs() @ (whole.dequantize().abs() + plain(deltas[0]).abs()).T
    for made in (row, column):  # 64 is not whole blocks of 32 for 3 or 4 ranks
        if made is column and 64 % comm.world_size:
            continue
        layer = adapted(made(Unloaded.of(codes, "key"), comm)(), deltas)
        n = 768 // comm.world_size
        y = layer(x[:, n * comm.rank : n * (comm.rank + 1)] if made is row else x)
        m = 64 // comm.world_size
        mine = slice(None) if made is row else slice(m * comm.rank, m * (comm.rank + 1))
        assert bool(((y - exact[:, mine]).abs() <= (768 + comm.world_size) * 2.0**-24 * size[:, mine]).all())
        assert layer.lora is not None
        assert layer.weight.kind == "q8_0"


def check_stacks(comm: Comm) -> None:
    """Experts, of which some have deltas, by outputs and by inputs."""
    experts, out, inputs = 3, 24, 36
    stack, x = integers(experts, out, inputs), integers(4, 1, inputs, seed=5)
    deltas = {0: [low_rank(out, inputs, 2, 1)], 2: [low_rank(out, inputs, 3, 2), low_rank(out, inputs, 1, 3)]}
    total = stack.clone()
    for expert, each in deltas.items():
        total[expert] += sum(map(plain, each))
    indices = torch.tensor([[0, 1], [2, 0], [1, 2], [2, 2]])
    expected = torch.stack([torch.stack([total[e] @ x[t, 0] for e in indices[t].tolist()]) for t in range(4)])
    n, m = out // comm.world_size, inputs // comm.world_size
    outputs, mine = slice(n * comm.rank, n * (comm.rank + 1)), slice(m * comm.rank, m * (comm.rank + 1))
    for merge in (None, False):
        split = adapted_stack(ColumnParallelStack(stack, comm=comm), deltas, merge=merge)
        assert torch.equal(split(x, indices), expected[..., outputs])
        joined = adapted_stack(RowParallelStack(stack, comm=comm), deltas, merge=merge)
        assert torch.equal(joined(x[..., mine], indices), expected)
        whole = adapted_stack(ReplicatedStack(stack), deltas, merge=merge)
        assert torch.equal(whole(x, indices), expected)


def check_all(comm: Comm) -> None:
    for check in (check_linear, check_quantised, check_stacks):
        check(comm)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_slices_of_ranks_are_those_of_the_whole(world_size: int) -> None:
    if world_size == 1:
        check_all(Comm())
    else:
        run_ranks(world_size, check_all)


def test_a_delta_as_long_as_a_slice_is_no_delta_of_the_whole() -> None:
    """The engine takes A and B cut along one dimension; whatever is cut by hand is refused."""
    layer = ColumnParallelLayer(integers(OUT, IN), shard=Shard.simple(0, 1, 2), key="q_proj")
    with pytest.raises(
        ShapeError, match=r"delta does not fit the weight: expected \[48, 96\], got \[24, 96\]"
    ) as caught:
        adapted(layer, [DELTAS[0].narrow(0, 0, 24)])
    assert caught.value.layer == "q_proj"
    assert adapted(layer, []) is layer


def test_unmerged_forward_is_that_of_peft() -> None:
    """In the dtype of activations too: factors stay float32, the sum is rounded once."""
    peft = pytest.importorskip("peft", reason="the oracle")
    model = torch.nn.Sequential(torch.nn.Linear(IN, OUT))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"])).eval()
    theirs = model.base_model.model[0]
    a, b = exact_numbers((4, IN), 1) * 64, exact_numbers((OUT, 4), 2) * 64
    theirs.lora_A["default"].weight.data, theirs.lora_B["default"].weight.data = a, b
    for dtype in (torch.float32, torch.bfloat16):
        base = theirs.get_base_layer()
        base.weight.data, base.bias.data = integers(OUT, IN).to(dtype), torch.zeros(OUT, dtype=dtype)
        layer = ReplicatedLayer(base.weight.data)
        ours = adapted(layer, [LowRank(Floats.of_tensor(b), Floats.of_tensor(a), 1.5)], merge=False)
        x = integers(5, IN, seed=3).to(dtype)
        with torch.inference_mode():
            assert torch.equal(ours(x), theirs(x))
        assert ours(x).dtype is dtype
        assert layer.lora is None, "not modified"
        assert not torch.equal(layer(x), ours(x))


def test_merging_rounds_once() -> None:
    """Two deltas of a bfloat16 weight: each alone would be rounded away."""
    layer = ReplicatedLayer(torch.ones(1, 1, dtype=torch.bfloat16))
    b, a = (Floats.of_tensor(torch.tensor([[value]])) for value in (2.0**-9, 1.5))
    half = LowRank(b, a, 1.0)
    made = adapted(layer, [half, half])
    assert made.weight.dequantize().item() == 1 + 2.0**-7
    assert made.dtype_and_device()[0] is torch.bfloat16
    wide = adapted(ReplicatedLayer(torch.ones(1, 1, dtype=torch.float64)), [half])
    assert wide.weight.plain is not None
    assert wide.weight.plain.tensor().item() == 1 + 1.5 * 2.0**-9


def test_a_quantised_weight_is_made_anew_where_it_is_merged() -> None:
    weight = integers(OUT, IN)
    layer = ReplicatedLayer(uqff.quantize(weight, "q8_0"))
    made = adapted(layer, DELTAS, merge=True)
    assert made.lora is None
    total = layer.weight.dequantize() + sum(map(plain, DELTAS))
    assert made.weight == uqff.quantize(total, "q8_0", engine="0.8")
    for kind in ("hqq4", "mxfp4"):
        with pytest.raises(UnsupportedError, match=f"{kind} weights take no delta"):
            adapted(ReplicatedLayer(uqff.quantize(integers(64, 64), kind)), [low_rank(64, 64, 2, 1)], merge=True)
        beside = adapted(ReplicatedLayer(uqff.quantize(integers(64, 64), kind)), [low_rank(64, 64, 2, 1)])
        assert beside.weight.kind == kind
        assert beside.lora is not None
    parts = {"weight": torch.zeros(64, 64, dtype=torch.uint8), "scales": torch.ones(64, 1)}
    foreign = Int8Rows.made_of(**{name: Part.of_tensor(each) for name, each in parts.items()})
    with pytest.raises(UnsupportedError, match="int8-rows weights take no delta"):
        adapted(ReplicatedLayer(foreign), [low_rank(64, 64, 2, 1)], merge=True)


def refused(layer: Any) -> list[Callable[[], object]]:
    return [layer.serialize, layer.gather_serialize, layer.gather_layer, lambda: adapted(layer, DELTAS, merge=False)]


def test_what_is_beside_the_weight_is_not_lost() -> None:
    """Another type keeps it; a blob, which has no place for it, is refused."""
    layer = adapted(ReplicatedLayer(integers(OUT, IN), key="up_proj"), DELTAS, merge=False)
    for call in refused(layer):
        with pytest.raises(UnsupportedError, match="layer has adapters that are not merged") as caught:
            call()
        assert caught.value.layer == "up_proj"
    x = integers(2, IN, seed=3)
    changed = layer.apply_isq("q8_0")
    own = ReplicatedLayer(changed.weight)(x)
    assert torch.equal(changed(x), own + sum(x @ plain(delta).T for delta in DELTAS))
    half = layer.half()
    assert half.lora.get_buffer("a0").dtype is torch.float16
    assert torch.equal(half(x.half()), layer(x.half()))


def test_gradients_go_through_both_terms() -> None:
    layer = adapted(ReplicatedLayer(integers(OUT, IN)), DELTAS, merge=False)
    x = integers(2, IN, seed=3).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    total = integers(OUT, IN) + sum(map(plain, DELTAS))
    assert torch.equal(x.grad, total.sum(0).expand(2, IN))
