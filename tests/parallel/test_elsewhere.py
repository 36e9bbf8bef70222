"""Layers that a recipe puts on another device than the model's; the numbers are compared in test_cuda.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.parallel.checkpoints import write_checkpoint
from tests.parallel.models import TinyCase
from tests.parallel.ranks import rank_of
from uqff import UnsupportedError
from uqff.lora.applied import Adapters
from uqff.parallel import Comm, FusedExperts, ReplicatedLayer, load_model, transformers_model
from uqff.parallel.adapting import Adapting
from uqff.parallel.elsewhere import place_of
from uqff.parallel.filling import Filling
from uqff.parallel.layer import QuantizedLayer
from uqff.parallel.loading import at_once
from uqff.parallel.source import open_source
from uqff.parallel.vocabulary import Embedding
from uqff.quantization.recipe import parse_recipe

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # of torch, see test_model.py

CPU, META = torch.device("cpu"), torch.device("meta")


def experts() -> FusedExperts:
    ones = torch.ones(2, 8, 8)
    return FusedExperts.from_layers(ones, ones, ones)


@pytest.mark.parametrize("make", [lambda: ReplicatedLayer(torch.ones(4, 8)), experts])
def test_activations_go_there_and_results_come_back(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors that only claim to be on a GPU; a layer that is not elsewhere takes them as they are."""
    layer = make()
    seen: list[list[torch.device]] = []

    def forward(self: Any, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        seen.append([each.device for each in (x, *others)])
        return x * 2

    monkeypatch.setattr(type(layer), "forward", forward)
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = [torch.empty(3, 8, device="cuda") for _ in range(1 if isinstance(layer, ReplicatedLayer) else 3)]
        here = given[0].device
        assert layer(*given).device == here
        layer.elsewhere = True
        assert layer(*given).device == here
    assert seen == [[here] * len(given), [CPU] * len(given)]


def test_one_token_of_an_embedding_comes_back() -> None:
    """A single id takes a way of its own through the embedding, whose rows may be elsewhere."""

    class Token:
        """An id that claims to be on another device, and can be read."""

        shape, device = (1, 1), META

        def numel(self) -> int:
            return 1

        def __int__(self) -> int:
            return 3

    token: Any = Token()
    assert Embedding(ReplicatedLayer(torch.ones(4, 8)), torch.float32).forward(token).device == META


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("elsewhere") / "model"
    write_checkpoint(TinyCase("qwen3_moe", "unquant", (1, 2, 0)), directory, "outputs first")
    return directory


def filled(checkpoint: Path, rules: str, device: torch.device) -> torch.nn.Module:
    """A model whose layers are in their places, and nothing else."""
    source, isq = open_source(checkpoint, parse_recipe(rules))
    with source:
        model = transformers_model.build(source.config, torch.float32)
        adapting = Adapting(Adapters.open(None), model, torch.float32)
        Filling(source, Comm(), device, torch.float32, model, adapting, isq, at_once).fill()
    return model


def test_rules_say_where(checkpoint: Path) -> None:
    """Projections, experts, embedding and head; of rules that give a type, as in the engine; the rest as the model."""
    rules = (
        "'/self_attn.o_proj|embed|lm_head/': {isq: q8_0, device: cpu}\n'/experts/': {isq: unquant, device: cpu}\n"
        "'/q_proj/': {device: cpu}"
    )
    model = filled(checkpoint, rules, META)
    layers = {name: each for name, each in model.named_modules() if isinstance(each, QuantizedLayer)}
    there = {name for name in layers if any(part in name for part in ("o_proj", "embed", "lm_head", "experts"))}
    assert {name for name, layer in layers.items() if layer.weight.device == CPU} == there
    held = {name for name, module in model.named_modules() if getattr(module, "elsewhere", False)}
    assert held == {name for name in there if "experts" not in name} | {"model.layers.0.mlp.experts"}


def test_devices_that_cannot_be(checkpoint: Path) -> None:
    """None of that number here; several for the projections of one mixture; another than a rank's own."""
    with pytest.raises(
        UnsupportedError, match=r"no such device here: expected cpu.*got cuda:99.*layers.0.self_attn.o_"
    ):
        load_model(checkpoint, isq=parse_recipe("'/o_proj/': {isq: unquant, device: 'cuda[99]'}"))
    with pytest.raises(UnsupportedError, match=r"experts on several devices: expected one .*, got cpu, meta"):
        filled(checkpoint, "'/down_proj/': {isq: unquant, device: cpu}", META)
    with pytest.raises(UnsupportedError, match="on several ranks: expected meta, got cpu"):
        place_of(CPU, META, rank_of(1, 2), "lm_head")
    assert place_of(None, META, rank_of(1, 2)) == place_of(META, META, Comm()) == META
