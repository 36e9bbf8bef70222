"""uqff.parallel.immediate: layers quantised while they are loaded are those that ``uqff quantize`` writes."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import uqff
from tests.parallel.checkpoints import write_checkpoint
from tests.parallel.models import EXPERTS, TinyCase
from tests.parallel.ranks import rank_of
from tests.support.lora_models import write_llama
from uqff import FormatError, Layer, UnsupportedError, UqffError
from uqff.checkpoints import Checkpoint
from uqff.families import stack
from uqff.parallel import (
    ImmediateIsq,
    IsqPool,
    PackedExperts,
    PendingLayer,
    QuantizeOntoGuard,
    ReplicatedLayer,
    load_model,
)
from uqff.parallel.filling import Filling
from uqff.parallel.layer import QuantizedLayer
from uqff.quantization.recipe import parse_recipe
from uqff.quantization.types import FallbackWarning

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # of torch, see test_model.py

V = (1, 2, 0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2 with biases, tied."""
    directory = tmp_path_factory.mktemp("plain") / "qwen2"
    write_checkpoint(TinyCase("qwen2", "unquant", V, tied=True, dtype=torch.bfloat16), directory)
    return directory


def layers_of(model: torch.nn.Module) -> dict[str, QuantizedLayer]:
    """All layers by their paths."""
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if isinstance(module, QuantizedLayer)}


def check_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """The same layers, weights and biases, to the bit."""
    mine, theirs = layers_of(model), layers_of(other)
    assert mine.keys() == theirs.keys()
    for name, layer in mine.items():
        assert layer.weight == theirs[name].weight, name
        bias, expected = layer.bias, theirs[name].bias
        assert (bias is None) == (expected is None), name
        assert bias is None or expected is None or (bias.dtype is expected.dtype and torch.equal(bias, expected)), name


@pytest.mark.parametrize("kind", ["q4k", "afq4", "hqq8", "fp8", "f8q8"])
def test_layers_are_those_that_quantize_writes(plain: Path, tmp_path: Path, kind: str) -> None:
    """One rank: weights, biases, promoted embedding. Of three workers as of one."""
    uqff.quantize_model(plain, tmp_path / "made", kind)
    expected = load_model(tmp_path / "made")
    check_same(load_model(plain, isq=kind, workers=1), expected)
    if kind == "q4k":
        check_same(load_model(plain, isq=kind, workers=3), expected)


@pytest.mark.parametrize("kind", ["q8_0", "q4k", "hqq8", "fp8"])
def test_ranks_hold_slices_of_the_whole(plain: Path, kind: str) -> None:
    """Two ranks: each layer is the slice of the whole layer that was quantised, whatever its type, or all of it."""
    whole = layers_of(load_model(plain, isq=kind, workers=1))
    for rank in range(2):
        for name, layer in layers_of(load_model(plain, rank_of(rank, 2), isq=kind, workers=2)).items():
            assert layer.weight == whole[name].weight.narrow(*layer.cut), name
            assert layer.weight.kind == whole[name].weight.kind


def test_experts_and_a_recipe(tmp_path: Path) -> None:
    """Rules name the first expert of a projection, or the tensor of all; what nothing names gets the default."""
    single, joined = tmp_path / "single", tmp_path / "joined"
    write_checkpoint(TinyCase("qwen3_moe", "unquant", V), single)
    write_checkpoint(TinyCase("qwen3_moe", "unquant", V), joined, "inputs first")
    text = r"""
'/experts\.0\.up_proj\.weight$|experts\.gate_up_proj\.weight$/': {isq: q8_0}
'/self_attn\.o_proj/': {isq: unquant}
1: {isq: afq8}
"""
    (tmp_path / "recipe.yaml").write_text(text)
    isq = ImmediateIsq("q4_0", recipe=parse_recipe(text))
    one, other = load_model(single, isq=isq, workers=2), load_model(joined, isq=isq, workers=2)
    block: Any = one.get_submodule("model.layers.0.mlp.experts")
    stacks: Any = other.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(block, PackedExperts)
    for name, kind, joined_kind in (
        ("gate_proj", "q4_0", "q8_0"),
        ("up_proj", "q8_0", "q8_0"),
        ("down_proj", "q4_0", "q4_0"),
    ):
        experts = [getattr(block, name)[expert].weight for expert in range(EXPERTS)]
        assert {each.kind for each in experts} == {kind}
        assert getattr(stacks, name).weight.kind == joined_kind
        if kind == joined_kind:
            assert stack(experts) == getattr(stacks, name).weight
    kinds = {name: layer.weight.kind for name, layer in layers_of(one).items()}
    assert kinds["model.layers.0.self_attn.o_proj"] == "unquant" == kinds["model.layers.1.self_attn.o_proj"]
    assert kinds["model.layers.1.self_attn.q_proj"] == "afq8" == kinds["model.layers.1.mlp.up_proj"]
    assert kinds["model.layers.0.self_attn.q_proj"] == "q4_0"
    # A recipe alone quantises what it names, and nothing else; also from a file.
    alone = layers_of(load_model(joined, isq=tmp_path / "recipe.yaml"))
    assert alone["lm_head.rows"].weight.kind == alone["model.layers.0.self_attn.q_proj"].weight.kind == "unquant"
    assert alone["model.layers.1.mlp.down_proj"].weight.kind == "afq8"


def test_fallbacks_are_told_once(plain: Path, tmp_path: Path) -> None:
    """Inputs of 96 are no blocks of 256: the types that the engine takes, and one warning."""
    narrow = tmp_path / "narrow"
    write_checkpoint(TinyCase("qwen3", "unquant", V), narrow, head_dim=12)
    with pytest.warns(FallbackWarning, match=r"self_attn.o_proj: q4k -> q4_1, .*; and 1 more") as told:
        model = load_model(narrow, isq="q4k")
    assert len([each for each in told if each.category is FallbackWarning]) == 1
    assert layers_of(model)["model.layers.0.self_attn.o_proj"].weight.kind == "q4_1"


def test_what_may_be_asked_for(plain: Path, tmp_path: Path) -> None:
    """Types that do not exist, workers that are none, a recipe for what is quantised already."""
    with pytest.raises(UnsupportedError, match="unknown type"):
        load_model(plain, isq="q9")
    with pytest.raises(UnsupportedError, match=r"not a number of workers.*got 0"):
        load_model(plain, isq="q4k", workers=0)
    uqff.quantize_model(plain, tmp_path / "made", "q8_0")
    with pytest.raises(UnsupportedError, match="the model is quantised already"):
        load_model(tmp_path / "made", isq=parse_recipe("0: {isq: q4k}"))
    assert ImmediateIsq("q4k", predicates=["down_proj"]).kind_of("model.layers.0.mlp.down_proj") == "q4k"
    assert ImmediateIsq("q4k", predicates=["down_proj"]).kind_of("model.layers.0.mlp.up_proj") is None
    assert ImmediateIsq(4).kind_of("lm_head", sensitive=True) == "q6k"


def test_a_worker_names_the_layer(tmp_path: Path) -> None:
    """A weight that is not finite: the error of the thread, with the layer; and nothing hangs."""
    directory = tmp_path / "broken"
    tensors, _ = write_checkpoint(TinyCase("llama", "unquant", V), directory)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    from safetensors.torch import save_file

    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(FormatError, match=r"layer model.layers.1.mlp.down_proj"):
        load_model(directory, isq="q8_0", workers=2)


def test_an_interrupt_ends_all_threads(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while layers are handed out: no thread is left, and no layer is made any more."""

    def interrupted(self: Filling) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Filling, "_vocabulary", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_model(plain, isq="q8_0", workers=2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("uqff-isq")]


@pytest.mark.parametrize("isq", [None, "q8_0"])
def test_a_rank_reads_its_slices_only(plain: Path, monkeypatch: pytest.MonkeyPatch, isq: str | None) -> None:
    """Of two ranks, each asks for half of every layer, whether it is quantised or not."""
    asked: dict[str, Any] = {}
    layer = Checkpoint.layer

    def watched(self: Checkpoint, path: str, shard: Any = None) -> Layer:
        asked[path] = shard
        return layer(self, path, shard)

    monkeypatch.setattr(Checkpoint, "layer", watched)
    load_model(plain, rank_of(1, 2), isq=isq, workers=None if isq is None else 2)
    norms = {path for path, shard in asked.items() if shard is None}
    assert all("norm" in path for path in norms)
    sizes = {path.rpartition(".")[2]: tuple(shard.resolve((512, 512))) for path, shard in asked.items() if shard}
    assert sizes["down_proj"] == (1, 256, 256)
    assert sizes["up_proj"] == (0, 256, 256)
    assert sizes["embed_tokens"] == (0, 48, 48)


def test_at_most_one_more_than_workers_is_outstanding() -> None:
    """The caller waits before it hands out one more; at no time do more run than there are workers."""
    running, most, lock, gate = 0, 0, threading.Lock(), threading.Event()
    handed: list[int] = []

    def work() -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait(10)
        with lock:
            running -= 1
        return 1

    with IsqPool(2) as pool:

        def hand_out() -> None:
            for at in range(6):
                handed.append(at)
                results.append(pool(str(at), work))

        results: list[Any] = []
        caller = threading.Thread(target=hand_out)
        caller.start()
        deadline = time.monotonic() + 10
        while len(handed) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        caller.join(0.2)
        assert (len(results), most) == (3, 2)  # the fourth is being handed out
        gate.set()
        caller.join(10)
        assert [each() for each in results] == [1] * 6
    assert most == 2


@pytest.mark.parametrize("interrupted", [KeyboardInterrupt, RuntimeError])
def test_what_was_not_begun_is_dropped(interrupted: type[BaseException]) -> None:
    """An interrupt of the caller, or an error: the running layer ends, those that wait are never made."""
    begun, made = threading.Event(), []

    def slow() -> None:
        begun.set()
        time.sleep(0.05)
        made.append("slow")

    waiting: list[Any] = []

    def caller() -> None:
        with IsqPool(1) as pool:
            pool("a", slow)
            waiting.append(pool("b", lambda: made.append("b")))
            begun.wait(10)
            raise interrupted

    with pytest.raises(interrupted):
        caller()
    assert made == ["slow"]
    with pytest.raises(UqffError, match=r"layer was not loaded: loading was given up \(layer b\)"):
        waiting[0]()


def test_a_failure_ends_the_handing_out() -> None:
    """The first error comes out of what is handed out next, or out of its own result, with the name of its layer."""

    def fail() -> None:
        raise ValueError("no disk")

    with IsqPool(1) as pool:
        first = pool("model.layers.0.mlp.up_proj", fail)
        with pytest.raises(UqffError, match=r"got ValueError: no disk \(layer model.layers.0.mlp.up_proj\)") as raised:
            first()
        assert isinstance(raised.value.__cause__, ValueError)
        with pytest.raises(UqffError, match=r"layer model.layers.0.mlp.up_proj"):
            pool("b", lambda: None)


def test_a_pending_layer_is_the_layer_when_it_is_used() -> None:
    """It waits on first use, also of attributes; its error comes each time."""
    gate = threading.Event()

    def make() -> torch.nn.Module:
        gate.wait(10)
        return ReplicatedLayer(torch.eye(2), torch.ones(2), key="a")

    def fail() -> torch.nn.Module:
        raise FormatError("broken", layer="b")

    with IsqPool(1) as pool:
        layer = PendingLayer("a", pool("a", make))
        assert not list(layer.children())
        gate.set()
        assert torch.equal(layer(torch.ones(1, 2)), torch.full((1, 2), 2.0))
        assert (layer.weight.kind, layer.name) == ("unquant", "unquant-linear")
        assert layer.resolve() is layer.resolve()
        assert PendingLayer("c", pool("c", make)).to(torch.bfloat16).bias.dtype is torch.bfloat16
        broken = PendingLayer("b", pool("b", fail))
        for _ in range(2):
            with pytest.raises(FormatError, match=r"broken \(layer b\)"):
                broken(torch.ones(2))
        with pytest.raises(AttributeError):
            _ = layer._absent


def test_one_at_a_time_onto_a_device() -> None:
    """Another thread waits for a GPU, not for the CPU."""
    guard, entered, order = QuantizeOntoGuard(), threading.Event(), []

    def other() -> None:
        with guard.on("cpu"):
            order.append("cpu")
        entered.set()
        with guard.on("cuda:0"):
            order.append("second")

    with guard.on("cuda:1"):
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait(10)
        thread.join(0.1)
        order.append("first")
    thread.join(10)
    assert order == ["cpu", "first", "second"]


def test_adapters_are_merged_before(tmp_path: Path) -> None:
    """Adapters on layers that are quantised while loading: what ``quantize --lora`` writes; on ranks, slices of it."""
    folder = write_llama(tmp_path)
    uqff.quantize_model(folder / "base", tmp_path / "made", "q8_0", lora=folder / "one")
    whole = load_model(tmp_path / "made")
    check_same(load_model(folder / "base", isq="q8_0", lora=folder / "one"), whole)
    held = layers_of(whole)
    for name, layer in layers_of(load_model(folder / "base", rank_of(1, 2), isq="q8_0", lora=folder / "one")).items():
        assert layer.weight == held[name].weight.narrow(*layer.cut), name
