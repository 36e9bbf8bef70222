"""What users of torch do with a module: compile, export, pickle, copy and cast it, on one rank and on two."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import uqff
from tests.parallel.ranks import run_ranks
from tests.parallel.weights import INPUTS, KINDS, OUT, activations, blob, plain
from uqff import CommError, Layer
from uqff.families import Unquant
from uqff.parallel import ColumnParallelLayer, Comm, FusedExperts, ReplicatedLayer, RowParallelLayer
from uqff.parallel.weight import _read_spec, to_spec

pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script:DeprecationWarning"
)  # of torch, on import of its compiler


@pytest.fixture(autouse=True)
def _compile_anew() -> None:
    """Torch compiles one function for a few modules only, and counts them over all tests."""
    torch.compiler.reset()


CLASSES: list[Any] = [ReplicatedLayer, ColumnParallelLayer, RowParallelLayer]


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_compiles_whole(kind: str) -> None:
    """``fullgraph=True``: no graph breaks, with gradients and without, and the numbers are those of eager."""
    layer = RowParallelLayer.deserialize(blob(kind, bias=True))
    compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        x = activations(dtype)
        assert torch.equal(compiled(x), layer(x))
    x, y = activations(torch.float32).requires_grad_(), activations(torch.float32).requires_grad_()
    compiled(x).sum().backward()
    layer(y).sum().backward()
    assert torch.equal(x.grad, y.grad)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11 says so of what it saved itself
@pytest.mark.parametrize(
    ("cls", "kind"),
    [*((RowParallelLayer, kind) for kind in KINDS), (ColumnParallelLayer, "q4k"), (ReplicatedLayer, "unquant")],
)
def test_a_layer_is_exported_and_loaded(cls: Any, kind: str) -> None:
    """``torch.export`` of any batch; what is saved holds the bytes of the weight, and comes back."""
    layer = cls.deserialize(blob(kind, bias=True))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (activations(torch.float32)[0],), dynamic_shapes=({0: batch},))
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    loaded: Any = torch.export.load(stream).module()
    x = activations(torch.float32)[0].repeat(3, 1)
    assert torch.equal(loaded(x), layer(x))


@pytest.mark.parametrize("kind", [*KINDS, "f16", "q8k"])
def test_a_specification_holds_all_but_the_bytes(kind: str) -> None:
    """A record of it is the record."""
    record = uqff.quantize(plain(4, 256), "q8_0" if kind == "f16" else kind)
    again = _read_spec(to_spec(record.meta()))
    assert to_spec(again) == to_spec(record.meta())
    assert (again.kind, again.shape, type(again)) == (record.kind, record.shape, type(record))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_unquantised_layer_is_cast_like_any_other(cls: Any, dtype: torch.dtype) -> None:
    """Weight and bias, as those of ``torch.nn.Linear``; its state fits a layer of another dtype, too."""
    linear = torch.nn.Linear(INPUTS, OUT).requires_grad_(False)
    layer = cls.new(linear)
    copied = copy.deepcopy(layer).to(dtype)
    expected = copy.deepcopy(linear).to(dtype)
    assert copied.dtype_and_device() == (dtype, torch.device("cpu"))
    assert torch.equal(copied.weight.weight, expected.weight)
    assert torch.equal(copied.bias, expected.bias)
    x = activations(dtype)
    y = torch.nn.functional.linear(x, expected.weight) + expected.bias
    error = 64 * INPUTS**0.5 * torch.finfo(dtype).eps  # of sums in another order, of terms below 1
    assert float((copied(x) - y).abs().max()) <= error
    assert uqff.deserialize(copied.serialize()) == Layer(Unquant.of(expected.weight), expected.bias)
    assert layer.weight.weight.data_ptr() == linear.weight.data_ptr(), "the original is as it was"
    layer.load_state_dict(copied.state_dict())
    assert torch.equal(layer.weight.weight, expected.weight.float())
    back = copied.float()
    assert torch.equal(back.weight.weight, expected.weight.float())
    assert copy.deepcopy(layer).half().double().dtype_and_device()[0] is torch.float64


def test_unquantised_experts_are_cast() -> None:
    """Stacks likewise; a quantised neighbour stays."""
    stack = plain(64, 32).view(2, 32, 32)
    experts = FusedExperts.from_layers(stack, stack, uqff.quantize(stack, "q8_0")).bfloat16()
    assert experts.gate_proj.dtype_and_device()[0] is torch.bfloat16
    assert experts.down_proj.weight == uqff.quantize(stack, "q8_0")


def on_ranks(comm: Comm, whole: bytes) -> bytes:
    """Compiled on two ranks; pickled there, with what a pickle does not hold."""
    x = activations(torch.float32)
    n = INPUTS // comm.world_size
    row, column = (cls.deserialize(whole, comm) for cls in (RowParallelLayer, ColumnParallelLayer))
    for layer, given in ((row, x[..., n * comm.rank : n * (comm.rank + 1)]), (column, x)):
        compiled: Any = torch.compile(layer, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            assert torch.equal(compiled(given), layer(given))
        one, other = given.clone().requires_grad_(), given.clone().requires_grad_()
        compiled(one).sum().backward()
        layer(other).sum().backward()
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
    part = x[..., n * comm.rank : n * (comm.rank + 1)]
    sent = pickle.dumps(torch.nn.ModuleList([row, column]))
    both = pickle.loads(sent)
    assert both[0].serialize() == row.serialize()
    assert both[0].comm is both[1].comm
    with pytest.raises(CommError, match=r"on rank . of 2, which is not joined .*: expected Comm.attach\(group\) after"):
        both[0](part)
    assert torch.equal(both[1](x), column(x)), "no communication, no group"
    assert comm.group is not None
    both[0].comm.attach(comm.group)
    assert torch.equal(both[0](part), row(part))
    elsewhere = Comm()
    elsewhere.rank, elsewhere.world_size = 1 - comm.rank, 2
    with pytest.raises(CommError, match="layers hold the parts of another rank"):
        elsewhere.attach(comm.group)
    return sent


def test_two_ranks_compile_and_pickle(tmp_path: Path) -> None:
    """What a rank has pickled another process reads: its weights and its place, not its group."""
    sent = run_ranks(2, on_ranks, blob("q4k", bias=True), timeout=120)
    for rank, each in enumerate(sent):
        row, column = pickle.loads(each)
        assert (row.comm.rank, row.comm.world_size, row.comm.group) == (rank, 2, None)
        whole = uqff.deserialize(blob("q4k", bias=True)).weight
        assert row.weight == whole.narrow(1, INPUTS // 2 * rank, INPUTS // 2)
        assert column.weight == whole.narrow(0, OUT // 2 * rank, OUT // 2)
    layer = ReplicatedLayer.deserialize(blob("afq4", bias=True))
    torch.save(layer, tmp_path / "layer.pt")
    again = torch.load(tmp_path / "layer.pt", weights_only=False)
    x = activations(torch.float32)
    assert torch.equal(again(x), layer(x)), "a world of one is whole"
