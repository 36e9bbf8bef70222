"""The layers on one rank: constructors, everything a module must do, and what each family allows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import uqff
from tests.parallel.weights import INPUTS, KINDS, OUT, activations, blob, plain, rounding
from tests.support.roundtrip import same_bytes
from uqff import FormatError, Layer, ShapeError, ShardError, UnsupportedError
from uqff.codec.entries import from_entries, to_entries
from uqff.families import AFQ, GGUF
from uqff.families.gguf.blocks import block_type_of_kind
from uqff.parallel.comm import Comm
from uqff.parallel.fallback import NarrowedLayer
from uqff.parallel.layer import DistributedKind, QuantizedLinear
from uqff.parallel.linear import ColumnParallelLayer, DummyLayer, ReplicatedLayer, RowParallelLayer
from uqff.parallel.shard import Shard, Slice
from uqff.parallel.unloaded import Unloaded

pytestmark = pytest.mark.long

exact = pytest.mark.usefixtures("exact_products")
CLASSES: list[type[QuantizedLinear]] = [ReplicatedLayer, ColumnParallelLayer, RowParallelLayer]


def one_of(world_size: int, rank: int) -> Comm:
    """A rank without the others: enough to cut, not to reduce."""
    comm = Comm()
    comm.rank, comm.world_size = rank, world_size
    return comm


@exact
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_blob_becomes_a_layer_and_a_blob_again(cls: type[QuantizedLinear], kind: str) -> None:
    """The forward is the plain product with the dequantised weight, in any leading dimensions; bytes come back."""
    whole = blob(kind, bias=True)
    layer = cls.deserialize(whole, device="cpu", key="7")
    expected = uqff.deserialize(whole)
    assert expected.bias is not None
    assert layer.serialize() == layer.gather_serialize() == whole
    assert layer.weight == expected.weight
    assert layer.bias is not None
    assert torch.equal(layer.bias, expected.bias)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = activations(dtype)
        y = torch.nn.functional.linear(x, expected.weight.dequantize(dtype)) + expected.bias.to(dtype)
        for shaped in (x, x[0], x[0, 0], x[None]):
            got = layer(shaped)
            assert got.dtype is dtype
            assert got.shape == (*shaped.shape[:-1], OUT)
        assert torch.equal(layer(x), y)
        act = layer.quantized_act_type()
        assert torch.equal(layer.forward_autocast(x), layer(x if act is None else x.to(act)).to(dtype))
    assert layer.isq_serde_supported()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_right_up_to_rounding(cls: type[QuantizedLinear], kind: str) -> None:
    """As the machine multiplies: against float64, within what any order of adding up may lose."""
    layer = cls.deserialize(blob(kind, bias=True))
    assert layer.bias is not None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = activations(dtype)
        weight, bias = layer.dequantize_w(dtype).double(), layer.bias.to(dtype).double()
        y = x.double() @ weight.T + bias
        for shaped, expected in ((x, y), (x[0, 0], y[0, 0])):
            assert bool(((layer(shaped).double() - expected).abs() <= rounding(shaped, weight, bias)).all()), dtype


def test_the_version_of_a_blob_is_kept() -> None:
    """A blob of 0.1.3 is written as 0.1.3 again."""
    whole = blob("afq4", bias=False, version=(0, 1, 3))
    layer = ColumnParallelLayer.deserialize(whole)
    assert layer.serialize() == layer.gather_serialize() == whole


@pytest.mark.parametrize(
    ("kind", "name", "act", "nominal"),
    [
        ("q4k", "gguf", torch.float32, torch.float32),
        ("hqq4", "hqq", torch.float32, torch.float32),
        ("fp8", "fp8-linear", None, torch.float8_e4m3fn),
        ("afq4", "afq-layer", None, torch.float32),
        ("f8q8", "f8q8-linear", None, torch.float32),
        ("mxfp4", "mxfp4-layer", None, torch.bfloat16),
        ("unquant", "unquant-linear", None, torch.float32),
    ],
)
def test_what_a_layer_says_of_itself(kind: str, name: str, act: torch.dtype | None, nominal: torch.dtype) -> None:
    """Names and dtypes are the engine's."""
    layer = RowParallelLayer.deserialize(blob(kind, bias=False))
    assert (layer.name, layer.quantized_act_type()) == (name, act)
    assert layer.dtype_and_device() == (nominal, torch.device("cpu"))
    assert layer.is_distributed() is DistributedKind.ROW_PARALLEL
    assert ColumnParallelLayer.deserialize(blob(kind, bias=False)).is_distributed() is DistributedKind.COLUMN_PARALLEL
    assert ReplicatedLayer.deserialize(blob(kind, bias=False)).is_distributed() is DistributedKind.REPLICATED
    unquantised = layer.unquant_weight_bias()
    assert (unquantised is not None) == (kind == "unquant")
    if unquantised is not None:
        assert torch.equal(unquantised[0], plain())
        assert unquantised[1] is None


@exact
@pytest.mark.parametrize("kind", KINDS)
def test_modules_copy_save_load_and_move(kind: str, tmp_path: Path) -> None:
    """State dicts are bytes without pickle; a cast leaves quantised layers alone; copies share nothing."""
    layer = ColumnParallelLayer.deserialize(blob(kind, bias=True), one_of(2, 1))
    x = activations(torch.float32)
    state = layer.state_dict()
    numbers = {torch.float32} if kind == "unquant" else set()
    assert {tensor.dtype for tensor in state.values()} == {torch.uint8} | numbers
    held = sum(t.untyped_storage().nbytes() for name, t in state.items() if not name.endswith("signature"))
    assert held == layer.weight.nbytes + 4 * OUT // 2, "storages hold the slice and nothing else"
    save_file(state, tmp_path / "state.safetensors")
    zeros = Layer(uqff.deserialize(blob(kind, bias=False)).weight, torch.zeros(OUT))
    other = ColumnParallelLayer.from_layer(zeros, one_of(2, 1))
    other.load_state_dict(load_file(tmp_path / "state.safetensors"))
    assert other.serialize() == layer.serialize()
    copied = copy.deepcopy(layer)
    assert copied.comm is layer.comm
    for name, buffer in copied.named_buffers():
        assert buffer.data_ptr() != layer.get_buffer(name).data_ptr()
    if kind != "unquant":
        cast = copied.to(torch.bfloat16).half().double().to("cpu")
        assert cast.serialize() == layer.serialize()
        assert torch.equal(cast(x), layer(x))
    meta = copied.to("meta")
    assert all(buffer.is_meta for buffer in meta.buffers())
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.serialize() == layer.serialize()


def test_a_state_dict_of_another_weight_is_refused() -> None:
    """AFQ with other bits and groups can have buffers of the same sizes."""
    a, b = (uqff.quantize(plain(4, 128), "afq4", group_size=g) for g in (64, 128))
    layer = ReplicatedLayer(a)
    with pytest.raises(RuntimeError, match=r"another quantised weight: expected AFQ .* group_size=64, got AFQ .*=128"):
        layer.load_state_dict(ReplicatedLayer(b).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({})
    first, second = (ColumnParallelLayer.new(a, None, one_of(2, rank)) for rank in (0, 1))
    with pytest.raises(RuntimeError, match=r"expected AFQ .* 0 to 2 of dimension 0, got AFQ .* 2 to 4 of dimension 0"):
        first.load_state_dict(second.state_dict())
    ColumnParallelLayer.new(a).load_state_dict(layer.state_dict())  # the whole is the whole, however it is partitioned


@pytest.mark.parametrize("kind", ["q4_0", "afq4", "unquant"])
def test_a_forward_compiles(kind: str) -> None:
    """``torch.compile`` gives the same numbers."""
    layer = RowParallelLayer.deserialize(blob(kind, bias=True))
    compiled: Any = torch.compile(layer, backend="aot_eager")
    x = activations(torch.float32)
    with torch.no_grad():
        apart = (compiled(x) - layer(x)).abs()
    assert layer.bias is not None
    assert bool((apart <= 2 * rounding(x, layer.dequantize_w(), layer.bias)).all())


@exact
def test_constructors() -> None:
    """Plain or quantised, whole or a shard, fused, reduced: each holds what it says."""
    weight, bias = plain(8, 64), torch.arange(8.0)
    record = uqff.quantize(weight, "q4_0")
    comm = one_of(2, 1)
    for given, dense in ((weight, weight), (record, record.dequantize()), (Layer(record, bias), record.dequantize())):
        extra = None if isinstance(given, Layer) else bias
        column = ColumnParallelLayer.new(given, extra, comm)
        row = RowParallelLayer.new(given, extra, comm)
        assert isinstance(column, ColumnParallelLayer)
        assert isinstance(row, RowParallelLayer)
        assert torch.equal(column.dequantize_w(), dense[4:])
        assert torch.equal(row.dequantize_w(), dense[:, 32:])
        assert column.bias is not None
        assert row.bias is not None
        assert (column.bias.tolist(), row.bias.tolist()) == ([4, 5, 6, 7], list(range(8)))
        some = ColumnParallelLayer.new_with_shard(given, extra, comm, Shard.offset(0, 1, 3))
        assert torch.equal(some.dequantize_w(), dense[1:4])
        gate, up = ColumnParallelLayer.new_merged(given, extra, comm, chunks=2)
        assert torch.equal(gate.dequantize_w(), dense[2:4])
        assert torch.equal(up.dequantize_w(), dense[6:8])
        assert isinstance(up, ColumnParallelLayer)
        assert up.bias is not None
        assert up.bias.tolist() == [6, 7]
        matformer = ColumnParallelLayer.new_matformer(given, extra, comm, 4)
        assert torch.equal(matformer.dequantize_w(), dense[2:4])
    narrow = RowParallelLayer.new_matformer(weight, bias, comm, 32)
    assert torch.equal(narrow.dequantize_w(), weight[:, 16:32])
    kept = ReplicatedLayer.new_layers_matformer_indices(record, bias, [3, 0], 4)
    assert isinstance(kept, ReplicatedLayer)
    assert torch.equal(kept.dequantize_w(), record.dequantize()[[6, 7, 0, 1]])
    assert kept.bias is not None
    assert kept.bias.tolist() == [6, 7, 0, 1]
    fine = uqff.quantize(plain(8, 96), "afq4", group_size=32)
    kept = ReplicatedLayer.new_layers_matformer_indices(fine, None, [1, 2], 4)
    assert isinstance(kept, ReplicatedLayer)
    assert kept.weight == fine.narrow(0, 2, 4)
    replicated = ReplicatedLayer.new(record, bias)
    assert isinstance(replicated, ReplicatedLayer)
    assert replicated.serialize() == uqff.serialize(record, bias)
    linear = torch.nn.Linear(64, 8)
    layer = ReplicatedLayer.from_linear(linear)
    assert torch.equal(layer(weight), linear(weight))
    assert layer.weight_buffers.get_buffer("data").data_ptr() == linear.weight.data_ptr()


def test_refusals() -> None:
    """Shapes, shards and slices that make no layer; each names the layer."""
    record = uqff.quantize(plain(8, 64), "q4_0")
    with pytest.raises(ShapeError, match=r"weight is not a matrix: expected \[out, in\], got \[2, 2, 32\] \(layer 3\)"):
        ReplicatedLayer(torch.zeros(2, 2, 32), key="3")
    with pytest.raises(ShapeError, match=r"bias does not fit weight: expected \[8\], got \[7\] \(layer 3\)"):
        ReplicatedLayer(record, torch.zeros(7), key="3")
    with pytest.raises(ShapeError, match=r"activations do not fit the weight: expected \[..., 64\], got \[3, 32\]"):
        ReplicatedLayer(record, key="3")(torch.zeros(3, 32))
    with pytest.raises(
        ShardError, match=r"in multiples of 32: world sizes that work are 1, 2, got .*size 4 \(layer 3\)"
    ):
        RowParallelLayer.new(record, None, one_of(4, 0), key="3")
    with pytest.raises(ShardError, match=r"chunks do not make up the weight: expected 8, got 6 \(layer 3\)"):
        ColumnParallelLayer.new_merged(record, chunks=[4, 2], key="3")
    made = ColumnParallelLayer.new_with_shard(record, None, None, Shard.offset(0, 0, 4))
    assert isinstance(made, ColumnParallelLayer)
    with pytest.raises(ShardError, match=r"slices do not make up the weight"):
        made.gather_serialize()


def test_a_dummy_says_which_weight_is_absent() -> None:
    """It stands where a weight is to come, and nowhere else."""
    for layer in (
        RowParallelLayer.new(None, key="model.o_proj"),
        ColumnParallelLayer.new(None, key="model.o_proj"),
        ColumnParallelLayer.new_merged(None, chunks=3, key="model.o_proj")[2],
        ReplicatedLayer.new_layers_matformer_indices(None, None, [0], 1, key="model.o_proj"),
        RowParallelLayer.new_matformer(None, None, None, 1, key="model.o_proj"),
        ReplicatedLayer.new(None, key="model.o_proj"),
    ):
        assert isinstance(layer, DummyLayer)
        assert (layer.name, layer.isq_serde_supported(), layer.apply_isq("q4k")) == ("dummy", False, layer)
        for call in (layer, layer.forward_autocast, layer.add_delta_w):
            with pytest.raises(FormatError, match=r"layer has no weight: .* \(layer model.o_proj\)"):
                call(torch.zeros(1))
        for absent in (layer.dequantize_w, layer.serialize, layer.begin_track_stats):
            with pytest.raises(FormatError, match=r"layer has no weight: .* \(layer model.o_proj\)"):
                absent()


@pytest.mark.parametrize("kind", ["q4_0", "q4k", "fp8", "afq4", "f8q8", "unquant"])
def test_a_delta_is_added_and_quantised_again(kind: str) -> None:
    """The same type, of the sum; the delta may be that of the whole, of which each rank takes its part."""
    delta = plain(OUT, INPUTS).flip(0)
    layer = RowParallelLayer.deserialize(blob(kind, bias=True), one_of(2, 1))
    total = layer.dequantize_w() + delta[:, INPUTS // 2 :]
    expected = uqff.quantize(total, kind, engine="0.8")
    before = layer.serialize()
    for given in (delta, delta[:, INPUTS // 2 :]):
        changed = layer.add_delta_w(given)
        assert changed.weight == expected
        assert torch.equal(changed.bias, layer.bias)  # type: ignore[arg-type]
    assert layer.serialize() == before
    with pytest.raises(ShapeError, match="delta does not fit the weight"):
        layer.add_delta_w(delta[:1])


def test_deltas_of_plain_ggml_types_and_refusals() -> None:
    """F16 blocks stay F16; HQQ and MXFP4 take none."""
    block_type = block_type_of_kind("f16")
    assert block_type is not None
    half = plain(2, 4).half()
    layer = ReplicatedLayer(GGUF(half.view(torch.uint8), block_type))
    assert torch.equal(layer.add_delta_w(torch.ones(2, 4)).dequantize_w(torch.float16), half + 1)
    for kind in ("hqq4", "mxfp4"):
        with pytest.raises(UnsupportedError, match=f"{kind} weights take no delta"):
            ReplicatedLayer.deserialize(blob(kind, bias=False)).add_delta_w(plain())


@pytest.mark.parametrize("kind", ["q4k", "q8_0", "hqq8", "fp8", "afq4", "f8q8", "mxfp4"])
def test_a_plain_layer_is_quantised(kind: str) -> None:
    """Every type, with the bias as it was, or on request as the engine has it; the layer itself stays as it is."""
    bias = torch.full((OUT,), 600.0009)
    layer = ColumnParallelLayer.new(plain(), bias, one_of(2, 1))
    assert isinstance(layer, ColumnParallelLayer)
    made = layer.apply_isq(kind)
    assert made.weight == uqff.quantize(plain()[OUT // 2 :], kind, engine="0.8")
    assert made.bias is not None
    assert same_bytes(made.bias, bias[OUT // 2 :])
    engines = layer.apply_isq(kind, engine_biases=True).bias
    lossy = {"fp8": torch.tensor(448.0).to(torch.float8_e4m3fn), "mxfp4": torch.tensor(600.0, dtype=torch.bfloat16)}
    assert same_bytes(engines, lossy[kind].repeat(OUT // 2) if kind in lossy else bias[OUT // 2 :])
    assert layer.weight.kind == "unquant"


def test_biases_of_layers_that_change_their_type() -> None:
    """Rows and columns widen a bias to float32 beside types whose readers want that; a replicated layer never does."""
    bias = torch.linspace(-600, 600, OUT).to(torch.bfloat16)
    for kind, added in (("q8_0", torch.float32), ("hqq8", torch.float32), ("fp8", torch.bfloat16)):
        column = ColumnParallelLayer.new(plain(), bias, Comm())
        assert isinstance(column, ColumnParallelLayer)
        assert same_bytes(column.apply_isq(kind).bias, bias.to(added))
        replicated = ReplicatedLayer.new(plain(), bias)
        assert isinstance(replicated, ReplicatedLayer)
        assert same_bytes(replicated.apply_isq(kind).bias, bias)


def test_slices_quantised_apart_make_up_a_whole_where_blocks_do() -> None:
    """Row-wise blocks do; HQQ's groups are those of the slice, and FP8's scale too."""
    parts = [ColumnParallelLayer.new(plain(), None, one_of(2, rank)) for rank in (0, 1)]
    for kind, whole in (("q4k", True), ("afq4", True), ("hqq4", False)):
        made: Any = [part.apply_isq(kind) for part in parts]
        if whole:
            joined = made[0]._whole.join([(part.cut.start, part.weight) for part in made], 0)
            assert joined == uqff.quantize(plain(), kind, engine="0.8")
        else:
            with pytest.raises(ShardError, match="slice was quantised by itself and is part of no whole"):
                made[0].gather_serialize(Comm())


ALLOWED = {"q4k": {"q8_0", "f8q8"}, "hqq8": {"hqq4"}, "fp8": {"f8q8"}, "afq4": {"f8q8"}, "mxfp4": set()}


@pytest.mark.parametrize("stored", ["q4k", "hqq8", "fp8", "afq4", "f8q8", "mxfp4"])
def test_requantising(stored: str) -> None:
    """Only what the engine does; None moves and changes nothing, not even a ggml weight."""
    layer = ReplicatedLayer.deserialize(blob(stored, bias=True))
    assert layer.apply_isq(None, "cpu").serialize() == layer.serialize()
    targets = ["q8_0", "f8q8", "hqq4", "afq4", "fp8"]
    for target in targets:
        if stored != "f8q8" and target not in ALLOWED[stored]:
            with pytest.raises(UnsupportedError, match=f"{stored} weights are not requantised to {target}"):
                layer.apply_isq(target)
            continue
        made = layer.apply_isq(target)
        same = stored == target
        assert made.weight == (layer.weight if same else uqff.quantize(layer.dequantize_w(), target, engine="0.8"))


def test_apply_isq_with_importance() -> None:
    """What a layer has tracked is what its weight is quantised with."""
    layer = ReplicatedLayer(torch.randn(8, 256, generator=torch.Generator().manual_seed(1)))
    importance = torch.rand(256, generator=torch.Generator().manual_seed(2))
    for effort in ("engine", "best"):
        made = layer.apply_isq("q4k", imatrix_weight=importance, effort=effort)
        assert made.weight == uqff.quantize(layer.dequantize_w(), "q4k", effort=effort, importance=importance)
        assert made.weight != layer.apply_isq("q4k", effort=effort).weight
    with pytest.raises(ShapeError, match=r"importance: expected \[256\], got \[3\]"):
        layer.apply_isq("q4k", imatrix_weight=[1.0, 1.0, 1.0])


def test_input_stats() -> None:
    """Sum of squares over the length of a row, as the engine has it; stopped means stopped."""
    layer = ReplicatedLayer.deserialize(blob("fp8", bias=False))
    with pytest.raises(UnsupportedError, match="layer does not track stats"):
        layer.end_track_stats()
    layer.begin_track_stats()
    x = activations(torch.bfloat16)
    layer(x)
    layer(2 * x)
    squares = x[0].float().square().sum(0) + (2 * x)[0].float().square().sum(0)
    assert torch.equal(layer.end_track_stats(), squares / (2 * INPUTS) * 2)
    layer(x)
    with pytest.raises(UnsupportedError):
        layer.end_track_stats()


def test_unaligned_parts_of_a_blob_stay_views() -> None:
    """Scales at an odd address are bytes until they are needed; a layer of a whole blob copies no payload."""
    memory = memoryview(bytearray(blob("afq4", bias=False)))
    layer = ReplicatedLayer.deserialize(memory)
    first = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    for part in ("w_q", "scales", "biases"):
        assert first <= layer.weight_buffers.get_buffer(part).data_ptr() < first + len(memory)
    assert isinstance(layer.weight, AFQ)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_halves_are_added_up_in_float32(dtype: torch.dtype, rows: int) -> None:
    """8192 ones: a sum in bfloat16 would stop at 256, one in float16 at 2048."""
    layer = ReplicatedLayer(torch.ones(4, 8192))
    assert torch.equal(layer(torch.ones(rows, 8192, dtype=dtype)), torch.full((rows, 4), 8192.0, dtype=dtype))


def test_a_whole_layer_goes_into_either_generation() -> None:
    """What the slices of ranks are gathered to is a layer like any other."""
    layer = Layer(uqff.quantize(plain(8, 64), "q4_0"), torch.arange(8.0))
    gathered = ColumnParallelLayer.from_layer(layer).gather_layer()
    assert gathered == layer
    assert to_entries(gathered).keys() == to_entries(layer).keys()
    assert ColumnParallelLayer.from_layer(from_entries(to_entries(gathered))).gather_layer() == layer


def test_a_broken_blob_names_its_layer() -> None:
    """A rank with a truncated file says which layer is cut short."""
    with pytest.raises(FormatError, match=r"\(layer model.q_proj, field"):
        ColumnParallelLayer.deserialize(blob("q4k", bias=True)[:-5], key="model.q_proj")


@exact
@pytest.mark.parametrize("cls", [ColumnParallelLayer, ReplicatedLayer])
def test_a_partial_product_has_no_bias(cls: type[QuantizedLinear]) -> None:
    """For callers that add up several layers at once."""
    layer = cls.deserialize(blob("q8_0", bias=True))
    x = activations(torch.float32)
    assert torch.equal(layer.forward_partial(x), torch.nn.functional.linear(x, layer.dequantize_w()))


@pytest.mark.parametrize("version", [(0, 1, 3), (1, 2, 0)])
def test_one_way_to_say_which_slice_of_which_weight(version: tuple[int, int, int], tmp_path: Path) -> None:
    """Constructor, layer, file of either generation and blob: the same slice, by rank or by shard."""
    whole = Layer(uqff.quantize(plain(8, 64), "q4_0"), torch.arange(8.0))
    uqff.save({"0" if version[0] == 0 else "lm_head": whole}, tmp_path / "a-0.uqff", version=version)
    comm = one_of(2, 1)
    with uqff.open(tmp_path / "a-0.uqff") as file:
        (key,) = file
        for cls, shard in (
            (ColumnParallelLayer, None),
            (RowParallelLayer, None),
            (ReplicatedLayer, None),
            (RowParallelLayer, Shard.offset(1, 32, 32)),
        ):
            made: list[QuantizedLinear] = [
                cls(whole.weight, whole.bias, comm, shard=shard),
                cls.from_layer(whole, comm, shard=shard),
                cls.from_file(file, key, comm, shard=shard),
                cls.from_file(file, 0, comm, shard=shard, device="cpu"),
                cls.deserialize(uqff.serialize(whole), comm, shard=shard),
            ]
            dim = 1 if cls is RowParallelLayer else 0
            expected = whole if cls is ReplicatedLayer else whole.narrow(dim, [4, 32][dim], [4, 32][dim])
            for layer in made:
                assert Layer(layer.weight, layer.bias) == expected
            assert [layer.key for layer in made] == [None, None, key, key, None]
            assert made[2].serialize() == uqff.serialize(expected, version=made[2].version)
        with pytest.raises(ShardError, match=rf"\(file .*a-0.uqff, layer {key}\)"):
            RowParallelLayer.from_file(file, key, one_of(4, 0))
        with pytest.raises(KeyError):
            ColumnParallelLayer.from_file(file, "model.layers.7.mlp.up_proj", comm)


def test_a_narrowed_layer_stays_one() -> None:
    """A layer that holds all of a weight and gives a part of the outputs still does so in another type."""
    whole = Layer(uqff.quantize(plain(8, 64), "f8q8"))
    layer = NarrowedLayer.narrowed(Unloaded.of(whole, "k"), Slice(0, 4, 4), one_of(2, 1))
    x = activations(torch.float32, 64)
    for changed in (layer.apply_isq("q8_0"), layer.add_delta_w(torch.zeros(8, 64))):
        assert changed(x).shape == (1, 3, 4)
        assert torch.equal(changed(x), ReplicatedLayer(changed.weight)(x)[..., 4:])


def test_a_dummy_takes_what_a_layer_takes() -> None:
    """Who watches or quantises all layers of a model gets the error that names the layer, or the layer itself."""
    dummy = ReplicatedLayer.new(None, key="up_proj")
    assert isinstance(dummy, DummyLayer)
    assert dummy.apply_isq("q4k", effort="best", engine="0.9", imatrix_weight=[1.0], on_fallback=print) is dummy
    for call in (lambda: dummy.begin_track_stats(products=True), dummy.take_stats, dummy.end_track_stats):
        with pytest.raises(FormatError, match=r"no weight.*up_proj"):
            call()
