"""Experts on one rank: products by expert, every constructor, what is refused; slices of ranks without the others."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import uqff
from tests.parallel.weights import EXPERTS, HIDDEN, KINDS, plain, projections, routed, stacked, three
from uqff import FormatError, Layer, QuantizedTensor, ShapeError, ShardError, UnsupportedError
from uqff.families import stack
from uqff.parallel import (
    ColumnParallelLayer,
    ColumnParallelStack,
    Comm,
    DistributedKind,
    ExpertList,
    FusedExperts,
    PackedExperts,
    ReplicatedLayer,
    ReplicatedStack,
    RowParallelStack,
)
from uqff.parallel.partition import split_fused

pytestmark = pytest.mark.long

exact = pytest.mark.usefixtures("exact_products")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def one_of(world_size: int, rank: int) -> Comm:
    """A rank without the others: enough to cut, not to reduce."""
    comm = Comm()
    comm.rank, comm.world_size = rank, world_size
    return comm


def by_expert(x: torch.Tensor, indices: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """The same grouping with plain weights: what ``gather_forward`` must give, bit for bit where products are exact."""
    k = indices.shape[1]
    rows, flat = x.expand(-1, k, -1).reshape(-1, x.shape[-1]), indices.reshape(-1)
    y = torch.empty(len(flat), dense.shape[1], dtype=x.dtype)
    for expert in flat.unique():
        y[flat == expert] = torch.nn.functional.linear(rows[flat == expert], dense[expert].to(x.dtype))
    return y.view(*indices.shape, -1)


@exact
@pytest.mark.parametrize("kind", [*KINDS, "q8k", "hqq2", "hqq1"])
@pytest.mark.parametrize("cls", [ReplicatedStack, ColumnParallelStack, RowParallelStack])
def test_gather_forward(kind: str, cls: type[ReplicatedStack], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit-equal to plain weights; each expert in use is dequantised once, alone, the others never."""
    gate, _, _ = projections(kind)
    dense = gate.dequantize()
    layer = cls.deserialize(uqff.serialize(gate), key="experts")
    assert layer.serialize() == layer.gather_serialize() == uqff.serialize(gate)
    used: Counter[int] = Counter()
    original = QuantizedTensor.dequantize_expert

    def counted(self: QuantizedTensor, expert: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        used[expert] += 1
        return original(self, expert, *args, **kwargs)

    monkeypatch.setattr(QuantizedTensor, "dequantize_expert", counted)
    for dtype in DTYPES:
        x, indices, _ = routed(dtype, gate.shape[2])
        each = torch.stack([x, -x + 1], 1)
        for given in (x[:, None], each):
            used.clear()
            y = layer.gather_forward(given, indices)
            assert used == {0: 1, 1: 1, 3: 1}
            assert y.dtype is dtype
            assert torch.equal(y, by_expert(given, indices, dense)), dtype
            assert torch.equal(layer(given, indices.to(torch.int32)), y)
        act = layer.quantized_act_type() or dtype
        expected = by_expert(each.to(act), indices, dense).to(dtype)
        assert torch.equal(layer.gather_forward_autocast(each, indices), expected)


def test_each_place_by_itself() -> None:
    """Small integers: every product is exact, so each place is the token times its expert; biases of both shapes."""
    weight = torch.arange(3 * 4 * 8).remainder(7).sub(3).view(3, 4, 8).float()
    x = torch.arange(5.0 * 8).remainder(5).view(5, 1, 8)
    indices = torch.tensor([[2, 0], [1, 1], [0, 2], [2, 1], [0, 0]], dtype=torch.uint8)
    each, common = torch.arange(12.0).view(3, 4), torch.arange(4.0)
    for bias in (None, each, common):
        layer = ReplicatedStack(weight, bias)
        single = ExpertList([ReplicatedLayer(w, bias[e] if bias is each else bias) for e, w in enumerate(weight)])
        for t, row in enumerate(indices.tolist()):
            for k, e in enumerate(row):
                expected = weight[e] @ x[t, 0] + (0 if bias is None else bias[e] if bias is each else bias)
                assert torch.equal(layer.gather_forward(x, indices)[t, k], expected)
                assert torch.equal(single.gather_forward(x, indices)[t, k], expected)


def test_no_tokens() -> None:
    """An empty batch is empty."""
    layer = ReplicatedStack(stacked("q4_0", (2, 8, 32)))
    indices = torch.empty(0, 2, dtype=torch.int64)
    assert layer(torch.empty(0, 1, 32), indices).shape == (0, 2, 8)
    experts = FusedExperts.from_layers(*three(projections("q4_0")))
    assert experts(torch.empty(0, HIDDEN), indices, torch.empty(0, 2)).shape == (0, HIDDEN)


@pytest.mark.parametrize(
    ("x", "indices", "error", "message"),
    [
        ((2, 1, 32), [[0, 2], [0, 1]], ShapeError, "no such expert: expected 0 to 1, got 2 (layer e, field indices)"),
        ((2, 1, 32), [[0, -1], [0, 1]], ShapeError, "no such expert: expected 0 to 1, got -1 (layer e, field indices)"),
        ((2, 1, 32), [0, 1], ShapeError, "indices are not a matrix: expected [tokens, experts_per_token], got [2]"),
        ((2, 1, 32), [[0.0, 1.0]], UnsupportedError, "indices are not integers: expected an integer dtype, got torch"),
        ((2, 1, 32), [[True, False]], UnsupportedError, "got torch.bool (layer e)"),
        ((3, 1, 32), [[0, 1], [0, 1]], ShapeError, "expected [2, 2 or 1, 32], got [3, 1, 32] (layer e)"),
        ((2, 3, 32), [[0, 1], [0, 1]], ShapeError, "expected [2, 2 or 1, 32], got [2, 3, 32] (layer e)"),
        (
            (2, 1, 31),
            [[0, 1], [0, 1]],
            ShapeError,
            "activations do not fit weight and indices: expected [2, 2 or 1, 32]",
        ),
        ((2, 32), [[0, 1], [0, 1]], ShapeError, "expected [2, 2 or 1, 32], got [2, 32] (layer e)"),
    ],
)
def test_indices_and_activations_that_do_not_fit(x: tuple[int, ...], indices: Any, error: Any, message: str) -> None:
    """Each says what would have been right; stacks and lists alike."""
    weight = stacked("q4_0", (2, 8, 32))
    single = ExpertList([ReplicatedLayer(each) for each in weight.unstack()], "e")
    for layer in (ReplicatedStack(weight, key="e"), single):
        with pytest.raises(error) as raised:
            layer(torch.zeros(x), torch.tensor(indices))
        assert message in str(raised.value)


def mixture(x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, dense: list[torch.Tensor]) -> torch.Tensor:
    """The formula, with plain weights."""
    gate, up, down = dense
    inner = torch.nn.functional.silu(by_expert(x[:, None], indices, gate)) * by_expert(x[:, None], indices, up)
    return (by_expert(inner, indices, down).float() * weights[..., None]).sum(1).to(x.dtype)


@exact
@pytest.mark.parametrize("kind", KINDS)
def test_the_sum_over_experts(kind: str) -> None:
    """From a stack or single experts, plain leading dimensions or several: the bits of the formula."""
    stacks = projections(kind)
    dense = [each.dequantize() for each in stacks]
    fused = FusedExperts.from_layers(*three(stacks), key="experts")
    forms: list[Any] = [fused]
    if kind not in ("hqq4",):  # its groups of four rows of two codes: an expert alone would have half a byte
        singles = [each.unstack() for each in stacks]
        forms += [FusedExperts.from_layers(*three(singles)), PackedExperts.from_layers(*three(singles))]
        assert [p.serialize() for p in (forms[1].gate_proj, forms[1].down_proj)] == [
            p.serialize() for p in (fused.gate_proj, fused.down_proj)
        ]
    for dtype in DTYPES:
        x, indices, weights = routed(dtype, dense[0].shape[2])
        expected = mixture(x, indices, weights, dense)
        for experts in forms:
            assert torch.equal(experts(x, indices, weights), expected)
            shaped = experts(x.view(2, 3, -1), indices.view(2, 3, 2), weights.view(2, 3, 2))
            assert torch.equal(shaped, expected.view(2, 3, -1))
            act = fused.gate_proj.quantized_act_type() or dtype
            cast = mixture(x.to(act), indices, weights, dense).to(dtype)
            assert torch.equal(experts.forward_autocast(x, indices, weights), cast)


@exact
def test_files_of_both_generations(tmp_path: Path) -> None:
    """Stacked entries of 1.x, stacked blobs and single blobs of 0.x give the same experts."""
    stacks = projections("afq4")
    names = ("gate_proj", "up_proj", "down_proj")
    keys = [f"model.layers.0.mlp.experts.{name}" for name in names]
    uqff.save(dict(zip(keys, stacks, strict=True)), tmp_path / "new-0.uqff", version=(1, 2, 0))
    singles = [each.unstack() for each in stacks]
    in_order = [singles[p][e] for e in range(EXPERTS) for p in range(3)]
    uqff.save(dict(enumerate(in_order)), tmp_path / "old-0.uqff", version=(0, 1, 3))
    x, indices, weights = routed(torch.float32, HIDDEN)
    expected = mixture(x, indices, weights, [each.dequantize() for each in stacks])
    with uqff.open(tmp_path / "new-0.uqff") as new, uqff.open(tmp_path / "old-0.uqff") as old:
        gate, up, down = (new.layer(key) for key in keys)
        lists = [[old[3 * e + p] for e in range(EXPERTS)] for p in range(3)]
        blobs = [[uqff.serialize(layer, version=(0, 1, 3)) for layer in layers] for layers in lists]
        for experts in (
            FusedExperts.from_layers(gate, up, down),
            FusedExperts.from_layers(*three(lists)),
            PackedExperts.from_layers(*three(lists)),
            FusedExperts.deserialize(*three(blobs)),
            PackedExperts.deserialize(*three(blobs)),
            FusedExperts.deserialize(*three(uqff.serialize(each, version=(0, 1, 3)) for each in stacks)),
            *(cls.from_file(new, "model.layers.0.mlp.experts") for cls in (FusedExperts, PackedExperts)),
            PackedExperts.deserialize(*three(uqff.serialize(each, version=(0, 1, 3)) for each in stacks)),
            FusedExperts.from_layers(gate, lists[1], down),
        ):
            assert torch.equal(experts(x, indices, weights), expected)
        with pytest.raises(ShardError, match=r"\(file .*new-0.uqff, layer model.layers.0.mlp.experts\)"):
            FusedExperts.from_file(new, "model.layers.0.mlp.experts", one_of(2, 1))
        everything = FusedExperts.from_file(new, "model.layers.0.mlp.experts", one_of(2, 1), on_misaligned="replicate")
        assert everything.gate_proj.weight == stacks[0]
        with pytest.raises(KeyError):
            FusedExperts.from_file(new, "model.layers.7.mlp.experts")
        assert FusedExperts.deserialize(*three(blobs)).gate_proj.serialize() == uqff.serialize(
            stacks[0], version=(0, 1, 3)
        )
        assert PackedExperts.deserialize(*three(blobs)).down_proj[3].serialize() == blobs[2][3]


@pytest.mark.parametrize("cls", [FusedExperts, PackedExperts])
def test_a_part_of_the_experts_of_a_file(cls: Any, tmp_path: Path) -> None:
    """Outputs of gate and up, inputs of down, by the names of the file."""
    stacks, path = projections("q8_0"), "model.layers.0.mlp.experts"
    named = {f"{path}.{name}": each for name, each in zip(("gate_proj", "up_proj", "down_proj"), stacks, strict=True)}
    uqff.save(named, tmp_path / "new-0.uqff", version=(1, 2, 0))
    with uqff.open(tmp_path / "new-0.uqff") as file:
        experts = cls.from_file(file, path, one_of(2, 1))
    for held, whole, dim in zip(
        (experts.gate_proj, experts.up_proj, experts.down_proj), stacks, (1, 1, 2), strict=True
    ):
        expected = whole.narrow(dim, HIDDEN // 2, HIDDEN // 2)
        weight = held.weight if cls is FusedExperts else stack([held[e].weight for e in range(EXPERTS)])
        assert weight == expected
    assert experts.down_proj.key == f"{path}.down_proj"


def test_a_truncated_blob_is_named() -> None:
    """The error says which expert of which projection."""
    blobs = [[uqff.serialize(each) for each in p.unstack()] for p in projections("fp8")]
    blobs[1][2] = blobs[1][2][:-1]
    for cls in (FusedExperts, PackedExperts):
        with pytest.raises(FormatError, match=r"\(layer mlp.experts.up_proj.2, field"):
            cls.deserialize(*three(blobs), key="mlp.experts")


INTER = 6


@pytest.mark.parametrize("hidden", [5, INTER, 2 * INTER])
@pytest.mark.parametrize("cls", [FusedExperts, PackedExperts])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_fused_checkpoint_in_both_conventions(hidden: int, cls: Any, world_size: int) -> None:
    """Also where a square hides the convention; each rank has its outputs of both halves, its inputs of down."""
    gate, up = plain(3 * INTER, hidden).view(3, INTER, hidden), plain(3 * INTER, hidden).view(3, INTER, hidden) + 1
    down = plain(3 * hidden, INTER).view(3, hidden, INTER)
    outputs_first = torch.cat([gate, up], 1)
    conventions = [(outputs_first.mT.contiguous(), down.mT.contiguous()), (outputs_first, down)]
    if hidden == 5:  # nothing is square: halves of both conventions are told, too
        conventions += [(outputs_first.mT.contiguous(), down), (outputs_first, down.mT.contiguous())]
    n = INTER // world_size
    for gate_up, down_ in conventions:
        for rank in range(world_size):
            experts = cls.from_fused(gate_up, down_, one_of(world_size, rank), key="experts")
            mine = slice(n * rank, n * (rank + 1))
            wholes = [gate[:, mine], up[:, mine], down[:, :, mine]]
            for made, expected in zip((experts.gate_proj, experts.up_proj, experts.down_proj), wholes, strict=True):
                held = made if isinstance(made, ReplicatedStack) else None
                single = [made[e].dequantize_w() for e in range(3)] if held is None else []
                assert torch.equal(torch.stack(single) if held is None else held.dequantize_w(), expected)
                for name, buffer in made.named_buffers():
                    if not name.endswith("signature"):
                        assert buffer.untyped_storage().nbytes() == expected.nbytes // (3 if held is None else 1), name


def test_not_a_fused_checkpoint() -> None:
    """Shapes that fit in no way, among them another number of experts."""
    for gate_up, down in (((3, 5, 12), (3, 5, 7)), ((3, 5, 12), (2, 6, 5)), ((5, 12), (6, 5))):
        with pytest.raises(ShapeError, match=r"not a fused gate and up with its down: .*, got .* and .* \(layer e\)"):
            split_fused(torch.zeros(gate_up), torch.zeros(down), layer="e")


@exact
def test_experts_that_do_not_stack_are_packed() -> None:
    """FP8 scales of their own, mixed types: FusedExperts name the odd one, PackedExperts take them as they are."""
    wholes = [torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    singles = [[uqff.quantize(each, "fp8") for each in whole] for whole in wholes]
    message = r"fp8 has one dequant_w_scale for all: .* \(layer experts.gate_proj, field dequant_w_scale\)"
    with pytest.raises(ShardError, match=message):
        FusedExperts.from_layers(*three(singles), key="experts")
    singles[1][2] = uqff.quantize(wholes[1][2], "q8_0")
    with pytest.raises(ShardError, match=r"got q8_0 \[64, 64\] .* for number 2 \(layer experts.up_proj\)"):
        FusedExperts.from_layers(*three(singles), key="experts")
    experts = PackedExperts.from_layers(*three(singles))
    x, indices, weights = routed(torch.float32, HIDDEN)
    dense = [torch.stack([each.dequantize() for each in layers]) for layers in singles]
    assert torch.equal(experts(x, indices, weights), mixture(x, indices, weights, dense))


@exact
def test_biases() -> None:
    """PackedExperts refuse them; FusedExperts add them to each projection of each expert."""
    stacks = projections("q4_0")
    biases = [torch.linspace(-1, 1, EXPERTS * HIDDEN).view(EXPERTS, HIDDEN) + i for i in range(3)]
    singles = [[Layer(w, b[e]) for e, w in enumerate(p.unstack())] for p, b in zip(stacks, biases, strict=True)]
    with pytest.raises(UnsupportedError, match=r"PackedExperts take no bias \(layer experts.0.gate_proj\)"):
        PackedExperts.from_layers(*three(singles), key="experts")
    with pytest.raises(UnsupportedError, match=r"PackedExperts take no bias \(layer experts.0.gate_proj\)"):
        PackedExperts(*three([ReplicatedLayer(*each) for each in layers] for layers in singles), key="experts")
    with pytest.raises(UnsupportedError, match=r"PackedExperts take no bias \(layer experts\)"):
        PackedExperts.from_fused(torch.zeros(2, 4, 8), torch.zeros(2, 4, 4), bias=True, key="experts")
    x, indices, weights = routed(torch.float32, HIDDEN)
    gate, up, down = (each.dequantize() for each in stacks)
    inner = torch.nn.functional.silu(by_expert(x[:, None], indices, gate) + biases[0][indices])
    inner = inner * (by_expert(x[:, None], indices, up) + biases[1][indices])
    terms = by_expert(inner, indices, down) * weights[..., None]
    expected = terms.sum(1) + (biases[2][indices] * weights[..., None]).sum(1)
    layers = [Layer(p, b) for p, b in zip(stacks, biases, strict=True)]
    for experts in (FusedExperts.from_layers(*three(layers)), FusedExperts.from_layers(*three(singles))):
        assert torch.equal(experts(x, indices, weights), expected)
    second = FusedExperts.from_layers(*three(layers), one_of(2, 1))
    assert second.gate_proj.bias is not None
    assert second.down_proj.bias is not None
    assert torch.equal(second.gate_proj.bias, biases[0][:, HIDDEN // 2 :])
    assert torch.equal(second.down_proj.bias, biases[2])
    singles[2][1] = Layer(singles[2][1].weight)
    with pytest.raises(ShapeError, match=r"a bias for every expert or none, got 3 of 4 \(layer experts.down_proj\)"):
        FusedExperts.from_layers(*three(singles), key="experts")


def three_blocks(cls: Any, world_size: int, rank: int, on_misaligned: Any) -> Any:
    """Experts whose intermediate dimension is three blocks of q4k."""
    shapes = [(2, 768, 256), (2, 768, 256), (2, 256, 768)]
    stacks = [stacked("q4k", shape, seed) for seed, shape in enumerate(shapes)]
    if cls is PackedExperts:
        return cls.from_layers(
            *three(each.unstack() for each in stacks),
            one_of(world_size, rank),
            on_misaligned=on_misaligned,
            key="experts",
        )
    return cls.from_layers(*three(stacks), one_of(world_size, rank), on_misaligned=on_misaligned, key="experts")


@exact
@pytest.mark.parametrize("cls", [FusedExperts, PackedExperts])
def test_blocks_that_do_not_allow_equal_parts(cls: Any) -> None:
    """An error that says what works, whole blocks, or everything everywhere; all three parts of a rank alike."""
    with pytest.raises(ShardError) as raised:
        three_blocks(cls, 2, 0, "error")
    assert str(raised.value) == (
        "experts cannot be cut in equal parts: expected 768 intermediate values in multiples of 256: "
        "world sizes that work are 1, 3, got world size 2 (layer experts)"
    )
    whole = three_blocks(cls, 1, 0, "error")
    parts = [three_blocks(cls, 2, rank, "uneven") for rank in (0, 1)]
    assert [part.gate_proj.size()[1] for part in parts] == [256, 512]
    assert [part.down_proj.size()[2] for part in parts] == [256, 512]
    x, indices, weights = routed(torch.float32, 256)
    indices = indices.clamp(max=1)
    for part in parts:
        part.comm = Comm()  # its term alone
    total = parts[0](x, indices, weights) + parts[1](x, indices, weights)
    assert torch.allclose(total, whole(x, indices, weights), rtol=0, atol=1e-4)
    everything = three_blocks(cls, 2, 1, "replicate")
    assert not everything.sharded
    assert torch.equal(everything(x, indices, weights), whole(x, indices, weights))
    assert three_blocks(cls, 3, 1, "replicate").sharded, "what can be cut is cut"
    with pytest.raises(ShardError, match=r"in multiples of 256: world sizes up to 3 work, got world size 4 \(layer e"):
        three_blocks(cls, 4, 0, "uneven")


def test_projections_that_do_not_fit_each_other() -> None:
    """Sizes and numbers of experts; a matrix is no stack."""
    a, b = stacked("q8_0", (2, 32, 64)), stacked("q8_0", (2, 64, 64))
    with pytest.raises(ShapeError, match=r"projections do not fit each other: expected 32 between them, got 64"):
        FusedExperts.from_layers(a, a, b)
    with pytest.raises(ShapeError, match=r"fit each other: .*, got up \[2, 32, 64\], down \[3, 64, 32\]"):
        FusedExperts.from_layers(a, a, stacked("q8_0", (3, 64, 32)))
    with pytest.raises(ShapeError, match=r"weight is not a stack: .*, got \[64, 64\] \(layer e.down_proj\)"):
        FusedExperts.from_layers(b, b, uqff.quantize(plain(64, 64), "q8_0"), key="e")
    with pytest.raises(ShapeError, match=r"not a stack of matrices: expected \[experts, out, in\], got \[4, 4\]"):
        ReplicatedStack(torch.zeros(4, 4))
    with pytest.raises(ShapeError, match=r"bias does not fit weight: expected \[2, 3\] or \[3\], got \[2\]"):
        ReplicatedStack(torch.zeros(2, 3, 4), torch.zeros(2))
    with pytest.raises(ShapeError, match="no experts: expected at least 1, got 0"):
        PackedExperts.from_layers([], [], [])
    with pytest.raises(ShapeError, match=r"different shapes: expected \[2, 4\], got \[3, 4\] for expert 1"):
        ExpertList([ReplicatedLayer(torch.zeros(2, 4)), ReplicatedLayer(torch.zeros(3, 4))])
    experts = FusedExperts.from_layers(b, b, b)
    with pytest.raises(ShapeError, match=r"expected both \[6, 'experts_per_token'\], got \[6, 2\] and \[6, 1\]"):
        experts(torch.zeros(6, 64), torch.zeros(6, 2, dtype=torch.int64), torch.zeros(6, 1))


MAKERS: list[Callable[[list[QuantizedTensor], Comm], Any]] = [
    lambda stacks, comm: FusedExperts.from_layers(*three(stacks), comm),
    lambda stacks, comm: PackedExperts.from_layers(*three(each.unstack() for each in stacks), comm),
]


@exact
@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("kind", ["afq4", "q4_0", "f8q8"])
def test_modules_copy_save_load_compile_and_move(
    maker: Callable[[list[QuantizedTensor], Comm], Any], kind: str, tmp_path: Path
) -> None:
    """What every module can do, without pickle; slices of another rank are refused."""
    stacks = projections(kind, 2)
    experts = maker(stacks, Comm())
    x, indices, weights = routed(torch.float32, HIDDEN)
    expected = experts(x, indices, weights)
    state = experts.state_dict()
    assert {tensor.dtype for tensor in state.values()} == {torch.uint8}
    save_file(state, tmp_path / "state.safetensors")
    other = maker(projections(kind, 2, seed=7), Comm())
    assert not torch.equal(other(x, indices, weights), expected)
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert torch.equal(other(x, indices, weights), expected)
    copied = copy.deepcopy(experts).to(torch.bfloat16).half()
    assert copied.comm is experts.comm
    assert torch.equal(copied(x, indices, weights), expected)
    assert all(buffer.is_meta for buffer in copied.to("meta").buffers())
    with pytest.raises(RuntimeError, match="another quantised weight"):
        maker(stacks, one_of(2, 0)).load_state_dict(maker(stacks, one_of(2, 1)).state_dict())
    compiled: Any = torch.compile(experts, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, indices, weights), expected)


def test_what_experts_say_of_themselves() -> None:
    """How they are partitioned, how many they are; shown by print."""
    stacks = projections("q4_0")
    for maker in MAKERS:
        experts = maker(stacks, one_of(2, 1))
        assert (experts.num_experts, experts.sharded) == (EXPERTS, True)
        assert "4 experts, a part of each, <Comm rank 1 of 2>" in repr(experts)
    layer = RowParallelStack.from_layer(Layer(stacks[2]), one_of(2, 1))
    assert layer.is_distributed() is DistributedKind.ROW_PARALLEL
    assert layer.cut == (2, HIDDEN // 2, HIDDEN // 2)
    assert layer.name == "gguf"
    single = maker(stacks, one_of(2, 1)).gate_proj
    assert [type(each) for each in single] == [ColumnParallelLayer] * EXPERTS
    assert single[-1] is single[EXPERTS - 1]
    with pytest.raises(IndexError):
        single[EXPERTS]


def test_plain_experts_are_quantised() -> None:
    """Both forms, of the engine's bytes; types that stacks cannot be are refused."""
    wholes = [plain(EXPERTS * HIDDEN, HIDDEN).view(EXPERTS, HIDDEN, HIDDEN) * (i + 1) for i in range(3)]
    fused = FusedExperts.from_layers(*three(wholes)).apply_isq("q4_0")
    packed = PackedExperts.from_layers(*three(list(whole) for whole in wholes)).apply_isq("q4_0")
    expected = [uqff.quantize(whole, "q4_0") for whole in wholes]
    assert [p.weight for p in (fused.gate_proj, fused.up_proj, fused.down_proj)] == expected
    assert [stack([p[e].weight for e in range(EXPERTS)]) for p in (packed.gate_proj, packed.down_proj)] == [
        expected[0],
        expected[2],
    ]
    with pytest.raises(ShapeError, match="the shape cannot be mxfp4"):
        FusedExperts.from_layers(*three(wholes)).apply_isq("mxfp4")


def test_experts_of_a_list_track_their_inputs() -> None:
    """Each expert sees the tokens that go to it."""
    experts = PackedExperts.from_layers(*three(each.unstack() for each in projections("q8_0")))
    x, indices, weights = routed(torch.float32, HIDDEN)
    for expert in range(EXPERTS):
        experts.gate_proj[expert].begin_track_stats()
    experts(x, indices, weights)
    for expert in range(EXPERTS):
        seen = x.repeat_interleave(2, 0)[indices.reshape(-1) == expert]
        stats = experts.gate_proj[expert].end_track_stats()
        assert torch.equal(stats, seen.square().sum(0) / HIDDEN if len(seen) else torch.zeros(HIDDEN))


def test_gradients_of_activations() -> None:
    """Each expert's weight is that of its own product, also where several are used."""
    stacks = projections("q8_0")
    x, indices, weights = routed(torch.float32, HIDDEN)
    gradients = []
    for experts in (
        FusedExperts.from_layers(*three(stacks)),
        FusedExperts.from_layers(*three(s.dequantize() for s in stacks)),
    ):
        leaf = x.clone().requires_grad_()
        experts(leaf, indices, weights).square().sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    dense = [s.dequantize().double() for s in stacks]
    leaf = x.double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for t, row in enumerate(indices.tolist()):
        terms = [
            w * (dense[2][e] @ (torch.nn.functional.silu(dense[0][e] @ leaf[t]) * (dense[1][e] @ leaf[t])))
            for e, w in zip(row, weights[t], strict=True)
        ]
        total = total + (terms[0] + terms[1]).square().sum()
    total.backward()
    assert leaf.grad is not None
    # Five sums of up to 64 terms one after another: γ is 4e-6 for each, of magnitudes that are larger than the sums.
    bound = 1e-4 * leaf.grad.abs().max()
    assert all(bool(((each - leaf.grad).abs() <= bound).all()) for each in gradients)
