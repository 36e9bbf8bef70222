"""Calibration: every input of every layer, block by block, is what goes in when the whole model runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import uqff
from tests.parallel.checkpoints import write_checkpoint
from tests.parallel.models import EXPERTS, VOCABULARY, TinyCase
from tools.tiny import text
from uqff.cli import main
from uqff.errors import FormatError, ShapeError, UnsupportedError
from uqff.evaluation.evaluate import text_windows
from uqff.importance.hessians import Hessians
from uqff.parallel.gather import ExpertList
from uqff.parallel.layer import QuantizedLinear
from uqff.parallel.mixture import Mixture
from uqff.parallel.vocabulary import Head
from uqff.progress import Step

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # of torch, see test_model.py

IDS = [3 + (7 * at * at + at // 3) % (VOCABULARY - 3) for at in range(100)]
CONTEXT = 32


def dequantised(projection: Any, expert: int) -> torch.Tensor:
    one = isinstance(projection, ExpertList)
    made: torch.Tensor = (projection[expert].weight if one else projection.weight).dequantize()
    return made if one else made[expert]


def inputs_of(model: Any) -> dict[str, list[torch.Tensor]]:
    """What goes into each layer, in float64, when the whole model reads one window after the other."""
    seen: dict[str, list[torch.Tensor]] = {}

    def watch(name: str, x: Any) -> None:
        seen.setdefault(name, []).append(x.reshape(-1, x.shape[-1]).double())

    def experts(name: str, mixture: Mixture, given: Any) -> None:
        x, indices, _ = given
        x, indices = x.reshape(-1, x.shape[-1]), indices.reshape(-1, indices.shape[-1])
        for expert in range(mixture.num_experts):
            rows = x[(indices == expert).any(1)]
            gate, up = (
                rows.double() @ dequantised(each, expert).double().T for each in (mixture.gate_proj, mixture.up_proj)
            )
            watch(f"{name}.gate_proj.{expert}", rows)
            watch(f"{name}.up_proj.{expert}", rows)
            watch(f"{name}.down_proj.{expert}", torch.sigmoid(gate) * gate * up)

    for name, module in model.named_modules():
        if isinstance(module, Mixture):
            module.register_forward_pre_hook(lambda m, args, name=name: experts(name, m, args))
        elif isinstance(module, Head) or (
            isinstance(module, QuantizedLinear) and not name.endswith(".rows") and ".experts." not in name
        ):
            module.register_forward_pre_hook(lambda _, args, name=name: watch(name, args[0]))
    with torch.inference_mode():
        for at in range(0, len(IDS) - CONTEXT + 1, CONTEXT):
            model(input_ids=torch.tensor([IDS[at : at + CONTEXT]]), use_cache=False)
    return seen


@pytest.mark.parametrize(
    ("case", "form"),
    [
        (TinyCase("llama", "q8_0", (1, 2, 0), tied=True), "single"),
        (TinyCase("qwen3_moe", "q8_0", (1, 2, 0)), "single"),
        (TinyCase("qwen3_moe", "q8_0", (1, 2, 0)), "outputs first"),
    ],
    ids=["tied", "experts", "stacked experts"],
)
def test_what_goes_in(case: TinyCase, form: Any, tmp_path: Path) -> None:
    """Mean squares and products of all, to the rounding of float32; experts by their tokens; the head, also if tied."""
    write_checkpoint(case, tmp_path / "model", form)
    (tmp_path / "text").write_text(" ".join(f"t{each}" for each in IDS))
    told: list[Step] = []
    found = uqff.calibrate(
        tmp_path / "model",
        text=tmp_path / "text",
        out=tmp_path / "m.gguf",
        hessian=tmp_path / "h",
        context=CONTEXT,
        progress=told.append,
    )
    seen = inputs_of(uqff.load_model(tmp_path / "model", dtype=torch.float32))
    if case.tied:
        seen["model.embed_tokens"] = seen["lm_head"]
    with Hessians(tmp_path / "h") as hessians:
        assert set(found) == set(hessians) == {name.rpartition(".")[0] if name[-1].isdigit() else name for name in seen}
        for name, squares in found.items():
            stacked = name not in seen
            parts = [
                torch.cat(seen.pop(f"{name}.{at}" if stacked else name)) for at in range(EXPERTS if stacked else 1)
            ]
            assert squares.counts.tolist() == hessians.counts(name).tolist() == [len(x) for x in parts]
            sums = torch.stack([x.square().sum(0) for x in parts]).numpy()
            scale = np.abs(sums).max()
            assert np.abs(squares.sums - sums).max() < 2**-18 * scale, name
            products = torch.stack([x.T @ x for x in parts]).numpy().reshape(hessians[name].shape)
            assert np.abs(hessians[name] - products).max() < 2**-18 * scale, name
            with pytest.raises(ShapeError, match="Hessian does not fit the weight"):
                hessians.layer(name, (5, 5))
    assert not seen
    kept = uqff.Importance.open(tmp_path / "m.gguf")
    assert all(np.array_equal(kept[name].sums, found[name].sums) for name in kept)
    assert told[-1] == Step("calibrate", "head", 2, 2, 9 * CONTEXT, 9 * CONTEXT, "tokens")


@pytest.mark.parametrize("name", ["Phi-2", "LFM2"])
def test_whatever_the_last_norm_is_called(name: str, tmp_path: Path) -> None:
    """`final_layernorm`, `embedding_norm`: what goes into the head is behind it. There was an AttributeError."""
    if not text.has(name):
        pytest.skip("this transformers does not have it")
    text.write(name, tmp_path / "model")
    (tmp_path / "text").write_text(" ".join(f"t{each}" for each in range(40)))
    found = uqff.calibrate(tmp_path / "model", text=tmp_path / "text", context=32, windows=1)
    model: Any = uqff.load_model(tmp_path / "model")
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    windows = text_windows(tmp_path / "model", None, tmp_path / "text", context=32, first=0, most=1)
    with torch.inference_mode():
        model(input_ids=torch.tensor([list(next(iter(windows)))]), use_cache=False)
    wanted = (seen[0][0] ** 2).mean(0)
    assert torch.allclose(torch.tensor(found["lm_head"].means[0]).double(), wanted, rtol=1e-5, atol=0)


def test_places_are_looked_at_before_the_work(tmp_path: Path) -> None:
    """An hour of work is not thrown away because a folder is not there, nor one file written over the other."""
    write_checkpoint(TinyCase("llama", "q8_0", (1, 2, 0)), tmp_path / "model")
    (tmp_path / "text").write_text(" ".join(f"t{each}" for each in IDS))
    steps: list[Step] = []
    options: Any = {"text": tmp_path / "text", "context": 32, "progress": steps.append}
    with pytest.raises(FileNotFoundError, match="nowhere"):
        uqff.calibrate(tmp_path / "model", out=tmp_path / "nowhere" / "m.gguf", **options)
    with pytest.raises(UnsupportedError, match="two outputs in one file"):
        uqff.calibrate(tmp_path / "model", out=tmp_path / "m.gguf", hessian=tmp_path / "." / "m.gguf", **options)
    assert not steps
    assert {each.name for each in tmp_path.iterdir()} == {"model", "text"}


def test_command_and_what_is_refused(tmp_path: Path) -> None:
    write_checkpoint(TinyCase("llama", "q8_0", (1, 2, 0)), tmp_path / "model")
    (tmp_path / "text").write_text(" ".join(f"t{each}" for each in IDS))
    call = ["calibrate", str(tmp_path / "model"), "--text", str(tmp_path / "text"), "--context", "32", "--windows", "1"]
    done = CliRunner().invoke(main, [*call, "-o", str(tmp_path / "m.cimatrix"), "--json"], catch_exceptions=False)
    told = json.loads(done.stdout)
    assert (told["layers"], told["tokens"], told["experts_without_tokens"]) == (15, 32, {})
    assert len(uqff.Importance.open(tmp_path / "m.cimatrix")) == 15
    with pytest.raises(UnsupportedError, match="unknown form of an importance matrix"):
        uqff.calibrate(tmp_path / "model", text=tmp_path / "text", out=tmp_path / "m.txt", context=32)
    with pytest.raises(FormatError, match="no file of Hessians"):
        Hessians(tmp_path / "model" / "model.safetensors")
