"""What goes into layers: plain numbers in whatever holds them; everything else is one typed error, never garbage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import uqff
from tests.parallel.weights import plain, three
from uqff import CommError, Layer, ShapeError, ShardError, UnsupportedError, UqffError
from uqff.codes import DType
from uqff.families import Unquant
from uqff.parallel import (
    ColumnParallelLayer,
    Comm,
    DistributedKind,
    DummyLayer,
    ExpertList,
    FusedExperts,
    PackedExperts,
    ReplicatedLayer,
    ReplicatedStack,
    RowParallelLayer,
)

WEIGHT = plain(4, 64)
STACK = plain(128, 64).view(2, 64, 64)

Make = Callable[[Any], Any]

MAKERS: dict[str, Make] = {
    "ReplicatedLayer": ReplicatedLayer,
    "ReplicatedLayer.new": ReplicatedLayer.new,
    "ColumnParallelLayer.new": ColumnParallelLayer.new,
    "RowParallelLayer.new": RowParallelLayer.new,
    "from_layer": ColumnParallelLayer.from_layer,
    "new_with_shard": lambda w: ColumnParallelLayer.new_with_shard(w, None, None, uqff.parallel.Shard.whole()),
    "new_merged": lambda w: ColumnParallelLayer.new_merged(w, chunks=2),
    "column matformer": lambda w: ColumnParallelLayer.new_matformer(w, None, None, 2),
    "row matformer": lambda w: RowParallelLayer.new_matformer(w, None, None, 32),
    "layers matformer": lambda w: ReplicatedLayer.new_layers_matformer_indices(w, None, [1], 2),
    "bias": lambda w: ReplicatedLayer(WEIGHT, w),
    "delta": lambda w: ReplicatedLayer(WEIGHT).add_delta_w(w),
    "PackedExperts": lambda w: PackedExperts.from_layers([w], [w], [w]),
    "FusedExperts, single": lambda w: FusedExperts.from_layers([w], [w], [w]),
    "quantize": lambda w: uqff.quantize(w, "q8_0"),
}
STACKED: dict[str, Make] = {
    "ReplicatedStack": ReplicatedStack,
    "FusedExperts": lambda w: FusedExperts.from_layers(w, w, w),
    "fused FusedExperts": lambda w: FusedExperts.from_fused(w, w),
    "fused PackedExperts": lambda w: PackedExperts.from_fused(w, w),
    "quantize": lambda w: uqff.quantize(w, "q8_0"),
}


def no_weights(plain: torch.Tensor) -> dict[str, Any]:
    """What would multiply and give garbage, and what is no tensor of numbers at all."""
    return {
        "float8": plain.to(torch.float8_e5m2),
        "int32": plain.to(torch.int32),
        "uint8": plain.to(torch.uint8),
        "bool": plain.to(torch.bool),
        "complex": plain.to(torch.complex64),
        "sparse": plain.to_sparse(),
        "array of int64": plain.numpy().astype(np.int64),
        "array of objects": plain.numpy().astype(object),
        "list": plain.tolist(),
        "text": "weight",
        "a module": torch.nn.Embedding(4, 64),
    }


@pytest.mark.parametrize("what", no_weights(WEIGHT))
@pytest.mark.parametrize("maker", MAKERS)
def test_no_weight(maker: str, what: str) -> None:
    """Codes without scales, other numbers, other things: refused wherever a weight, a bias or a delta comes in."""
    with pytest.raises(UnsupportedError):
        MAKERS[maker](no_weights(WEIGHT)[what])


@pytest.mark.parametrize("what", no_weights(STACK))
@pytest.mark.parametrize("maker", STACKED)
def test_no_stack_of_weights(maker: str, what: str) -> None:
    """Likewise, for the experts of a mixture."""
    with pytest.raises(UnsupportedError):
        STACKED[maker](no_weights(STACK)[what])


@pytest.mark.parametrize("maker", [name for name in MAKERS if name not in ("bias", "quantize")])
def test_raw_fp8_codes(maker: str) -> None:
    """FP8 codes whose scale is somewhere else: plain, or as an unquantised layer of a file."""
    codes = WEIGHT.to(torch.float8_e4m3fn)
    for given in (codes, Unquant.of(codes), Layer(Unquant.of(codes))):
        with pytest.raises(UnsupportedError) as raised:
            MAKERS[maker](given)
    if maker == "ReplicatedLayer":
        assert str(raised.value) == (
            "weight of a dtype that is none of plain numbers: expected float32, bfloat16, float16, float64, "
            "got torch.float8_e4m3fn (field weight)"
        )


@pytest.mark.parametrize("maker", [*MAKERS, *STACKED])
@pytest.mark.parametrize("shape", [(), (0, 64), (4, 0), (64,), (1, 1, 1, 1)])
def test_no_matrix(maker: str, shape: tuple[int, ...]) -> None:
    """Scalars, nothing, vectors: an error of ours."""
    with pytest.raises(UqffError):
        (MAKERS | STACKED)[maker](torch.zeros(shape))


def test_a_file_with_an_unquantised_layer_of_integers() -> None:
    """The format can store it; no product can be made of it."""
    blob = uqff.serialize(Unquant.of(torch.ones(4, 64, dtype=torch.int32)))
    with pytest.raises(UnsupportedError, match=r"none of plain numbers: .*, got torch.int32 \(layer 7, field weight\)"):
        RowParallelLayer.deserialize(blob, key="7")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ">f4"])
def test_numpy_arrays_are_weights(dtype: Any) -> None:
    """Of any byte order, writable or not; memory is shared where it can be."""
    array = WEIGHT.numpy().astype(dtype)
    array.flags.writeable = False
    expected = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    bias: Any = np.arange(4, dtype=np.float32)
    for made in (ReplicatedLayer(array, bias), ColumnParallelLayer.new(array, bias), RowParallelLayer.new(array, bias)):
        assert isinstance(made.weight, Unquant)
        assert made.weight.dtype is DType.of_torch(expected.dtype)
        assert torch.equal(made.weight.weight, expected)
        assert made.bias is not None
        assert made.bias.tolist() == [0, 1, 2, 3]
    if dtype == np.float32:
        assert ReplicatedLayer(array).weight_buffers.get_buffer("data").data_ptr() == array.ctypes.data
    experts = [array[:, :4], array[:, :4], array[:, :4]]
    for packed in (
        PackedExperts.from_layers(*three([e] for e in experts)),
        FusedExperts.from_layers(*three(e[None] for e in experts)),
    ):
        assert packed.num_experts == 1


def test_a_linear_layer_is_a_weight_with_its_bias() -> None:
    """``torch.nn.Linear`` in place of a weight, everywhere but in ``quantize``, which has no place for the bias."""
    linear = torch.nn.Linear(64, 4)
    x = torch.linspace(-1, 1, 64)
    for made in (
        ReplicatedLayer(linear),
        ReplicatedLayer.new(linear),
        ReplicatedLayer.from_layer(linear),
        ColumnParallelLayer.new(linear),
        RowParallelLayer.new(linear),
    ):
        assert not isinstance(made, DummyLayer)
        assert torch.equal(made.dequantize_w(), linear.weight)
        assert made.bias is not None
        assert torch.equal(made.bias, linear.bias)
        assert made(x).shape == (4,)
    with pytest.raises(UnsupportedError, match=r"two biases: expected the bias of the layer, or one beside a weight"):
        ReplicatedLayer.new(linear, torch.zeros(4))
    with pytest.raises(UnsupportedError, match=r"two biases"):
        ReplicatedLayer.new(Layer(Unquant.of(WEIGHT), torch.zeros(4)), torch.zeros(4))
    with pytest.raises(UnsupportedError, match=r"of a torch.nn.Linear, its weight, got Linear"):
        uqff.quantize(linear, "q8_0")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"not a linear layer: expected a torch.nn.Linear, got Tensor"):
        ReplicatedLayer.from_linear(WEIGHT)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"PackedExperts take no bias \(layer e.0.gate_proj\)"):
        PackedExperts.from_layers([linear], [linear], [linear], key="e")


@pytest.mark.parametrize("kind", ["unquant", "q8_0", "afq4"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint8])
def test_no_activations(kind: str, dtype: torch.dtype) -> None:
    """Integers and codes multiply without complaint, and give garbage."""
    layer = ReplicatedLayer(uqff.quantize(WEIGHT, kind), key="3")
    stack = ReplicatedStack(uqff.quantize(STACK, kind), key="3")
    experts = FusedExperts.from_layers(*three([uqff.quantize(STACK, kind)] * 3), key="3")
    x, indices, weights = torch.ones(2, 64).to(dtype), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    for call in (
        lambda: layer(x),
        lambda: layer.forward_autocast(x),
        lambda: layer.forward_partial(x),
        lambda: stack(x[:, None], indices),
        lambda: stack.gather_forward_autocast(x[:, None], indices),
        lambda: experts(x, indices, weights),
        lambda: experts.forward_autocast(x, indices, weights),
        lambda: experts(torch.ones(2, 64), indices, weights.to(dtype)),
    ):
        with pytest.raises(UnsupportedError) as raised:
            call()
        assert str(raised.value) == (
            "activations of a dtype that is none of plain numbers: expected float32, bfloat16, float16, float64, "
            f"got {dtype} (layer 3, field activations)"
        )


def test_activations_that_are_no_tensor_or_have_no_dimensions() -> None:
    """Arrays and lists are named; a scalar is no row."""
    layer, experts = ReplicatedLayer(WEIGHT), FusedExperts.from_layers(*three([STACK] * 3))
    none = torch.zeros((), dtype=torch.int64)
    for given in (np.ones(64, np.float32), [1.0] * 64, None):
        with pytest.raises(
            UnsupportedError, match=f"not a tensor: expected a torch.Tensor, got {type(given).__name__}"
        ):
            layer(given)
        with pytest.raises(UnsupportedError, match="activations are not a tensor"):
            experts(given, none, none)
    with pytest.raises(ShapeError, match=r"activations do not fit the weight: expected \[..., 64\], got \[\]"):
        layer(torch.tensor(1.0))
    with pytest.raises(ShapeError, match=r"expected \[..., 64\], got \[\]"):
        experts(torch.tensor(1.0), none, torch.tensor(1.0))
    with pytest.raises(UnsupportedError, match="indices are not integers: expected an integer dtype, got list"):
        ReplicatedStack(STACK)(torch.ones(1, 1, 64), [[0]])
    with pytest.raises(ShapeError, match="indices and weights do not fit the activations"):
        experts(torch.ones(2, 64), none, torch.tensor(1.0))


def test_float64_stays_float64() -> None:
    """Nothing is rounded to float32 on the way."""
    third = torch.full((1, 2, 1), 1 / 3, dtype=torch.float64)
    ones = torch.ones(1, 1, 2, dtype=torch.float64)
    assert ReplicatedLayer(third[0])(torch.ones(1, dtype=torch.float64)).tolist() == [1 / 3, 1 / 3]
    experts = FusedExperts.from_layers(third, third, ones, act=torch.relu)
    y = experts(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    assert y.tolist() == [[2 * (1 / 3 * (1 / 3))]]


@pytest.mark.parametrize(
    "indices", [[], torch.tensor([], dtype=torch.int64), [2], [-1], [0.5], [True], ["0"], torch.tensor([0.5])]
)
def test_hidden_layers_that_there_are_not(indices: Any) -> None:
    """Empty lists, places outside, fractions and truth values."""
    with pytest.raises(ShardError) as raised:
        ReplicatedLayer.new_layers_matformer_indices(WEIGHT, None, indices, 2, key="p")
    assert str(raised.value).startswith(
        "no such hidden layers: expected whole numbers from 0 to 1, at least one, got ["
    )
    assert str(raised.value).endswith("(layer p, field kept_layers_indices)")


@pytest.mark.parametrize("kept", [[1, 0], [1], [0, 1], [0, 0], [1, 1, 0], None])
@pytest.mark.parametrize("kind", ["unquant", "q8_0"])
def test_a_bias_moves_with_the_hidden_layers_it_belongs_to(kept: list[int] | None, kind: str) -> None:
    """Also where as many are kept as there were: rows 2, 3, 0, 1 have biases 2, 3, 0, 1."""
    weight, bias = uqff.quantize(WEIGHT, kind), torch.arange(4.0)
    layer = ReplicatedLayer.new_layers_matformer_indices(weight, bias, kept, 2)
    rows = [row for at in ([0, 1] if kept is None else kept) for row in (2 * at, 2 * at + 1)]
    assert isinstance(layer, ReplicatedLayer)
    assert torch.equal(layer.dequantize_w(), weight.dequantize()[rows])
    assert layer.bias is not None
    assert layer.bias.tolist() == rows
    as_tensor = None if kept is None else torch.tensor(kept)
    again = ReplicatedLayer.new_layers_matformer_indices(Layer(weight, bias), None, as_tensor, 2)
    assert isinstance(again, ReplicatedLayer)
    assert again.serialize() == layer.serialize()


def test_a_bias_of_the_kept_layers_stays() -> None:
    """It fits the result, and only that."""
    layer = ReplicatedLayer.new_layers_matformer_indices(WEIGHT, torch.tensor([5.0, 6.0]), [1], 2)
    assert isinstance(layer, ReplicatedLayer)
    assert layer.bias is not None
    assert layer.bias.tolist() == [5, 6]
    with pytest.raises(ShapeError, match=r"bias does not fit weight: expected \[2\], got \[3\]"):
        ReplicatedLayer.new_layers_matformer_indices(WEIGHT, torch.zeros(3), [1], 2)


def test_how_layers_are_spread() -> None:
    """A layer that every rank holds whole says so, as the engine's does."""
    assert ReplicatedLayer(WEIGHT).is_distributed() is DistributedKind.REPLICATED
    assert ReplicatedStack(STACK).is_distributed() is DistributedKind.REPLICATED
    assert ExpertList([ReplicatedLayer(WEIGHT)])[0].is_distributed() is DistributedKind.REPLICATED
    assert not FusedExperts(*three(ReplicatedStack(STACK) for _ in range(3))).sharded


def test_other_arguments() -> None:
    """Communicators, shards, ways with blocks that do not fit, activations, numbers of experts."""
    single = list(STACK)
    for make in (
        lambda comm: RowParallelLayer.new(WEIGHT, None, comm),
        lambda comm: ReplicatedLayer(WEIGHT, None, comm),
        lambda comm: ColumnParallelLayer.new_merged(WEIGHT, None, comm, chunks=2),
        lambda comm: FusedExperts.from_layers(STACK, STACK, STACK, comm),
        lambda comm: PackedExperts.from_layers(single, single, single, comm),
        lambda comm: ReplicatedLayer(WEIGHT).gather_serialize(comm),
    ):
        with pytest.raises(CommError, match=r"not a communicator: expected a uqff.parallel.Comm, .*, got str"):
            make("x")
    with pytest.raises(CommError, match=r"not a process group: expected a process group .*, got 'x'"):
        Comm("x")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match=r"not a shard: expected a uqff.parallel.Shard, got str \(layer k\)"):
        RowParallelLayer.new(WEIGHT, None, shard="x", key="k")  # type: ignore[arg-type]
    for cls, given in ((FusedExperts, STACK), (PackedExperts, single)):
        make_experts: Any = cls.from_layers
        with pytest.raises(
            UnsupportedError, match=r"expected error, uneven, replicate, got pad \(layer e, field on_misaligned\)"
        ):
            make_experts(given, given, given, on_misaligned="pad", key="e")
        with pytest.raises(UnsupportedError, match=r"activation is no function: expected such as .*, got 'silu'"):
            make_experts(given, given, given, act="silu")
        for lists in (([], [], []), (single, single, []), ([], single, single), (single, single[:1], single)):
            with pytest.raises(ShapeError, match=r"no experts|projections of different numbers of experts"):
                cls.from_layers(*three(lists))
        with pytest.raises(ShapeError, match=r"no experts: expected at least 1"):
            cls.deserialize([], [], [])
    with pytest.raises(UnsupportedError, match=r"not a layer: expected a parallel layer for each expert, got Tensor"):
        ExpertList(single)
    with pytest.raises(ShardError, match=r"chunks do not make up the weight: expected 4, got 0"):
        ColumnParallelLayer.new_merged(WEIGHT, chunks=[])
    with pytest.raises(ShardError, match="world without ranks"):
        ColumnParallelLayer.new_merged(WEIGHT, chunks=0)
