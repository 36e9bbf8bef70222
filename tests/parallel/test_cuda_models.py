"""Whole models on a GPU: what they answer is what they answer on the CPU, whichever way a token takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from tests.parallel.checkpoints import write_checkpoint
from tests.parallel.models import PROMPT, TinyCase, write
from uqff.cli import main
from uqff.parallel import decoding, load_model
from uqff.parallel.comm import Comm
from uqff.parallel.decoder_step import DecoderStep
from uqff.parallel.generate import generate
from uqff.parallel.joined import Joined

pytestmark = pytest.mark.cuda


def following(model: Any, tokens: list[int], *, fused: bool) -> list[torch.Tensor]:
    """Logits after a prompt and after each of some tokens."""
    step = decoding.NextToken(model, Comm(), len(PROMPT) + len(tokens))
    made = [step(torch.tensor([PROMPT], device="cuda")).clone()]
    assert step._fused is not None
    if not fused:
        step._fused = None
    for token in tokens:
        made.append(step(torch.tensor([[token]], device="cuda")).clone())
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3_moe"])
@torch.inference_mode()
def test_a_token_in_few_launches(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The logits are those of the layers of ``transformers``: in float32 closely, in 16 bits as those are sure."""
    directory, _ = write(TinyCase(architecture, "q4k", (1, 2, 0), expert_inner=256), tmp_path)
    model: Any = load_model(directory, device="cuda", dtype=dtype)
    tokens = [7, 50, 7, 33, 20]
    expected, got = (following(model, tokens, fused=fused) for fused in (False, True))
    bound = 1e-4 if dtype is torch.float32 else 32 * torch.finfo(dtype).eps
    for mine, theirs in zip(got, expected, strict=True):
        assert float((mine - theirs).abs().max()) <= bound * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("kind", ["q4k", "afq4", "mxfp4", "q8_0"])
@torch.inference_mode()
def test_a_mixture_is_recorded(kind: str, tmp_path: Path) -> None:
    """Experts are chosen on the device: the bits of a token are those of the same step, not recorded."""
    directory, _ = write(TinyCase("qwen3_moe", kind, (1, 2, 0), expert_inner=512), tmp_path)
    model: Any = load_model(directory, device="cuda", dtype=torch.bfloat16)
    recorded, eager = (decoding.NextToken(model, Comm(), len(PROMPT) + 8) for _ in range(2))
    assert recorded._replayed is not None
    assert eager._replayed is not None
    eager._replayed._refused = True
    for ids in ([PROMPT], [[7]], [[50]], [[7]], [[33]], [[20]]):
        given = torch.tensor(ids, device="cuda")
        assert torch.equal(recorded(given), eager(given))
    assert recorded._replayed._graph is not None
    assert eager._replayed._graph is None


@pytest.mark.parametrize("kind", ["q4k", "afq4", "mxfp4", "q8_0", "fp8", "hqq4"])
def test_tokens_of_every_way(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32: those of the CPU, with joined projections and without, however long the cache is."""
    directory, _ = write(TinyCase("llama", kind, (1, 2, 0)), tmp_path)
    expected = generate(load_model(directory), PROMPT, 24).ids
    model: Any = load_model(directory, device="cuda")
    before = {name: layer.serialize() for name, layer in model.named_modules() if hasattr(layer, "serialize")}
    assert generate(model, PROMPT, 24).ids == expected
    assert generate(model, PROMPT, 24).ids == expected  # a second answer, with what is joined already
    joined = Joined.of(*(getattr(model.model.layers[0].self_attn, f"{name}_proj") for name in "qkv"))
    assert (joined._whole is None) == (kind in ("fp8", "hqq4"))
    assert {name: layer.serialize() for name, layer in model.named_modules() if hasattr(layer, "serialize")} == before
    following_all = decoding.NextToken(model, Comm(), 2000)  # several chunks
    with torch.inference_mode():
        ids = torch.tensor([PROMPT], device="cuda")
        for token in expected:
            ids = following_all(ids).argmax().view(1, 1)
            assert int(ids) == token
    monkeypatch.setattr(DecoderStep, "of", lambda *_: None)
    assert generate(model, PROMPT, 24).ids == expected


@torch.inference_mode()
def test_the_arithmetic_of_the_engine_is_exact_there(tmp_path: Path) -> None:
    """It is one of CPUs; on a GPU the logits are those of the exact one, bit for bit."""
    directory, _ = write(TinyCase("llama", "q4k", (1, 2, 0)), tmp_path)
    models: list[Any] = [load_model(directory, device="cuda", arithmetic=each) for each in ("exact", "engine")]
    exact, engine = models
    ids = torch.tensor([PROMPT], device="cuda")
    assert torch.equal(exact(ids).logits, engine(ids).logits)
    assert generate(exact, PROMPT, 8).ids == generate(engine, PROMPT, 8).ids


def test_a_checkpoint_is_quantised_on_its_way(tmp_path: Path) -> None:
    """The weights are those that it becomes on the CPU; the tokens, too."""
    directory = tmp_path / "model"
    write_checkpoint(TinyCase("llama", "unquant", (1, 2, 0)), directory, "outputs first")
    here, there = (load_model(directory, isq="q4k", device=device) for device in ("cpu", "cuda"))
    layers: dict[str, Any] = {name: each for name, each in there.named_modules() if hasattr(each, "serialize")}
    assert layers
    for name, layer in layers.items():
        assert layer.weight.device.type == "cuda"
        same: Any = here.get_submodule(name)
        assert layer.serialize() == same.serialize()
    assert generate(there, PROMPT, 8).ids == generate(here, PROMPT, 8).ids


def test_the_command(tmp_path: Path) -> None:
    """``uqff run --device cuda`` says what it says on the CPU."""
    directory, _ = write(TinyCase("llama", "q4k", (1, 2, 0)), tmp_path)
    said = []
    for device in ("cpu", "cuda"):
        arguments = ["run", str(directory), "--prompt", "t5 t9 t17 t30", "--tokens", "6", "--device", device, "--json"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.stderr
        said.append(json.loads(result.stdout))
    assert said[0]["ids"] == said[1]["ids"]
