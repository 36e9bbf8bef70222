"""The same on a GPU: what is dequantised there has the CPU's bits, layers and collectives work with CUDA tensors.

``make test-gpu`` runs these, see tests/README.md.
"""

from __future__ import annotations

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import uqff
from tests.parallel.checkpoints import write_checkpoint
from tests.parallel.models import PROMPT, TinyCase, write
from tests.parallel.ranks import run_ranks
from tests.parallel.weights import KINDS, activations, blob, bound, projections, routed, stacked
from uqff.parallel import decoding, load_model
from uqff.parallel.comm import Comm
from uqff.parallel.experts import FusedExperts
from uqff.parallel.generate import generate
from uqff.parallel.layer import QuantizedLayer
from uqff.parallel.linear import ColumnParallelLayer, ReplicatedLayer, RowParallelLayer
from uqff.parallel.product import gather_multiply
from uqff.parallel.replay import Replayed
from uqff.parallel.upload import PIECE, upload_to
from uqff.parallel.weight import WeightBuffers
from uqff.quantization.recipe import parse_recipe

pytestmark = pytest.mark.cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_has_the_same_bits_on_the_gpu(kind: str) -> None:
    """Dequantised there or here, into every dtype; moved there and back, the blob is the same."""
    whole = blob(kind, bias=True)
    weight = uqff.deserialize(whole).weight
    on_gpu = weight.to("cuda")
    for dtype in DTYPES:
        assert torch.equal(on_gpu.dequantize(dtype).cpu(), weight.dequantize(dtype))
    layer = ReplicatedLayer.deserialize(whole, device="cuda")
    assert layer.dtype_and_device()[1].type == "cuda"
    assert layer.serialize() == layer.to("cpu").serialize() == whole


@pytest.mark.parametrize("cls", [ReplicatedLayer, ColumnParallelLayer, RowParallelLayer])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_product_with_the_weight(cls: Any, kind: str) -> None:
    """On the GPU; a copy does the same, bit for bit, and so does float32, which no kernel multiplies."""
    whole = blob(kind, bias=True)
    layer = cls.deserialize(whole, device="cuda")
    weight, bias = uqff.deserialize(whole)
    assert bias is not None
    for dtype in DTYPES:
        x, numbers, beside = activations(dtype).cuda(), weight.dequantize().cuda(), bias.to(dtype).cuda()
        got = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), got)
        if dtype is torch.float32:
            assert torch.equal(got, torch.nn.functional.linear(x, numbers) + beside)
            continue
        # Half an ulp each for the weights, where no kernel multiplies, for the product and for the sum with the bias;
        # another for what is added up in float32.
        magnitude = x.double().abs() @ numbers.double().abs().T + beside.double().abs()
        exact = x.double() @ numbers.double().T + beside.double()
        assert bool(((got.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * magnitude).all())


@pytest.mark.parametrize("kind", ["q4k", "afq4", "mxfp4", "hqq4"])
def test_graphs_and_compiled_layers_do_the_same(kind: str) -> None:
    """A replayed CUDA graph takes new activations; ``torch.compile`` sees one operator."""
    layer = ReplicatedLayer.deserialize(blob(kind, bias=True), device="cuda")
    x = activations(torch.bfloat16).cuda()
    expected = [layer(x), layer(-x)]
    graph, held = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph):
        y = layer(held)
    for given, wanted in zip((x, -x), expected, strict=True):
        held.copy_(given)
        graph.replay()
        assert torch.equal(y, wanted)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected[0])


@pytest.mark.parametrize("kind", ["q4k", "q6k", "afq4", "mxfp4"])
def test_experts_from_the_codes(kind: str) -> None:
    """In bfloat16, few tokens: the products of each are those with the numbers, shared or not; so in a CUDA graph."""
    weight = stacked(kind, (3, 40, 512))
    exact, buffers = weight.dequantize().double().cuda(), WeightBuffers(weight.to("cuda"))
    indices = torch.tensor([[0, 2], [1, 1], [2, 0]], device="cuda")
    for shared in (1, 2):
        x = torch.randn(3, shared, 512, device="cuda").bfloat16()
        got = gather_multiply(x, indices, buffers)
        each = x.double().expand(3, 2, -1)
        expected = torch.einsum("tki,tkoi->tko", each, exact[indices])
        magnitude = torch.einsum("tki,tkoi->tko", each.abs(), exact[indices].abs())
        assert bool(((got.double() - expected).abs() <= torch.finfo(torch.bfloat16).eps * magnitude).all())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = gather_multiply(x, indices, buffers)
        graph.replay()
        assert torch.equal(again, got)


@pytest.mark.parametrize("kind", ["q4k", "afq4", "mxfp4", "unquant"])
def test_experts_on_the_gpu(kind: str) -> None:
    """The sum over experts is that of the CPU up to the order of sums."""
    gate, up, down = projections(kind)
    x, indices, weights = routed(torch.float32, gate.shape[-1])
    here = FusedExperts.from_layers(gate, up, down)(x, indices, weights)
    there = FusedExperts.from_layers(gate, up, down, device="cuda")(x.cuda(), indices.cuda(), weights.cuda())
    torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-4)


def test_what_is_loaded_onto_a_gpu_is_what_the_file_has() -> None:
    """Through pinned buffers, in more than one piece; on a stream of its own, too."""
    given = torch.arange(3 * PIECE // 4 + 5, dtype=torch.int32)
    send = upload_to(torch.device("cuda", 0))
    made = [send(given), send(given.view(torch.float32))]
    with torch.cuda.stream(torch.cuda.Stream()):
        made.append(send(given[1:]))
        torch.cuda.current_stream().synchronize()
    assert torch.equal(made[0].cpu(), given)
    assert torch.equal(made[1].view(torch.int32).cpu(), given)
    assert torch.equal(made[2].cpu(), given[1:])


def test_nccl_with_one_rank(tmp_path: Path) -> None:
    """A process group of NCCL serves as communicator: collectives, bytes, the whole blob."""
    store = dist.FileStore(str(tmp_path / "store"), 1)  # type: ignore[attr-defined]
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, timeout=timedelta(seconds=60))
    try:
        group = dist.group.WORLD
        assert group is not None
        comm = Comm(group)
        x = torch.arange(6.0, device="cuda")
        assert torch.equal(comm.sum_all_reduce(x), x)
        assert comm.all_gather_bytes(b"digest", "cuda") == [b"digest"]
        comm.check_same(b"digest", "file", "cuda")
        whole = blob("q4k", bias=True)
        layer = RowParallelLayer.deserialize(whole, comm, device="cuda")
        assert layer.gather_serialize() == whole
    finally:
        dist.destroy_process_group()


def _on_one_gpu(comm: Comm, kind: str) -> bool:
    """Two ranks that share a GPU, over gloo: row and column layers against the whole."""
    whole = blob(kind, bias=True)
    column = ColumnParallelLayer.deserialize(whole, comm, device="cuda")
    row = RowParallelLayer.deserialize(whole, comm, device="cuda")
    replicated = ReplicatedLayer.deserialize(whole, device="cuda")
    x = activations(torch.float32).cuda()
    expected = replicated(x)
    allowed = bound(x.cpu(), uqff.deserialize(whole).weight.dequantize(), comm.world_size)
    outputs = torch.cat(comm.all_gather(column(x)), dim=-1)
    part = x.chunk(comm.world_size, dim=-1)[comm.rank]
    assert bool(((outputs - expected).abs().cpu() <= allowed).all())
    assert bool(((row(part) - expected).abs().cpu() <= allowed).all())
    assert column.gather_serialize() == row.gather_serialize() == whole
    return True


@pytest.mark.parametrize("kind", ["q4k", "afq4", "fp8", "mxfp4"])
def test_two_ranks_on_one_gpu(kind: str) -> None:
    """Slices on the GPU, reduced over gloo."""
    assert run_ranks(2, _on_one_gpu, kind, timeout=60) == [True, True]


def test_a_recorded_step_goes_on_from_where_it_was() -> None:
    """Recording does nothing by itself: each call adds its input once, the first, the recorded and the replayed."""
    total = torch.zeros(3, device="cuda")
    step = Replayed(lambda x: total.add_(x).clone(), Comm(), None)
    sums = [step(torch.full((3,), float(i), device="cuda")).tolist() for i in range(1, 6)]
    assert sums == [[float(n)] * 3 for n in (1, 3, 6, 10, 15)]


def test_a_step_that_cannot_be_recorded_is_done_each_time() -> None:
    """It waits for the device; nothing of the attempt remains."""
    total = torch.zeros(1, device="cuda")

    def add(x: torch.Tensor) -> torch.Tensor:
        return total.add_(float(x.sum())).clone()

    step = Replayed(add, Comm(), None)
    assert [float(step(torch.full((1,), float(i), device="cuda"))) for i in range(1, 5)] == [1.0, 3.0, 6.0, 10.0]


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe", "mistral"])
@pytest.mark.parametrize("kind", ["afq4", "q4k"])
def test_the_tokens_of_a_recorded_model(
    architecture: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Float32: those of the CPU, recorded or not."""
    directory, _ = write(TinyCase(architecture, kind, (1, 2, 0), expert_inner=256), tmp_path)
    expected = generate(load_model(directory), PROMPT, 12).ids
    model = load_model(directory, device="cuda")
    assert generate(model, PROMPT, 12).ids == expected
    monkeypatch.setattr(decoding, "_replays", lambda *_: (False, None))
    assert generate(model, PROMPT, 12).ids == expected


def test_layers_elsewhere(tmp_path: Path) -> None:
    """A model on the CPU, of which a recipe puts embedding, projections and experts on the GPU: the same logits."""
    directory = tmp_path / "model"
    write_checkpoint(TinyCase("qwen3_moe", "unquant", (1, 2, 0)), directory, "outputs first")
    rules = "'/embed|self_attn/': {isq: q8_0, device: 'cuda[0]'}\n'/experts/': {isq: q8_0, device: 'cuda[0]'}"
    there = load_model(directory, isq=parse_recipe(rules))
    here = load_model(directory, isq=parse_recipe(rules.replace("cuda[0]", "cpu")))
    devices = {
        name: each.weight.device.type for name, each in there.named_modules() if isinstance(each, QuantizedLayer)
    }
    assert {name for name, device in devices.items() if device == "cpu"} == {
        name for name in devices if "embed" not in name and "self_attn" not in name and "experts" not in name
    }
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        got, expected = there(ids).logits, here(ids).logits
    assert got.device.type == "cpu"
    assert float((got - expected).abs().max()) <= 2e-5
