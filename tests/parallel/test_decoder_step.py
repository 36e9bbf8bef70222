"""One token in fewer operations gives what ``transformers`` gives: the step's formulas, by torch, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import uqff
from tests.gpu import token_reference
from tests.parallel.models import PROMPT, TinyCase, write
from uqff.parallel import load_model
from uqff.parallel.decoder_step import DecoderStep
from uqff.parallel.decoding import _static
from uqff.parallel.joined import Joined
from uqff.parallel.linear import ReplicatedLayer

OPERATIONS: Any = token_reference


def prompted(model: Any, tokens: int) -> Any:
    """The cache after the prompt; skips where ``transformers`` has none that counts on the device."""
    cache = _static(model.config, len(PROMPT) + tokens)
    if cache is None:
        pytest.skip("transformers has no such cache")
    model(input_ids=torch.tensor([PROMPT]), use_cache=True, past_key_values=cache)
    return cache


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3_moe"])
@torch.inference_mode()
def test_the_logits_of_a_step_are_those_of_the_model(architecture: str, tmp_path: Path) -> None:
    """Biases, norms of heads, experts; float32, three tokens after a prompt. So are keys and values."""
    directory, _ = write(TinyCase(architecture, "q4k", (1, 2, 0), expert_inner=256), tmp_path)
    model: Any = load_model(directory)
    mine, theirs = prompted(model, 3), prompted(model, 3)
    step = DecoderStep.of(model, mine, OPERATIONS)
    assert step is not None
    for token in (7, 50, 7):
        ids = torch.tensor([[token]])
        got = step(model.get_input_embeddings()(ids))
        expected = model(input_ids=ids, use_cache=True, past_key_values=theirs).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert int(got.argmax()) == int(expected.argmax())
    for one, other in zip(mine.layers, theirs.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.values, other.values, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_models_that_are_not_known_are_left_alone(tmp_path: Path) -> None:
    """Heads of a size without kernel; angles that change with the number of tokens; another decoder."""
    directory, _ = write(TinyCase("qwen3", "q8_0", (1, 2, 0)), tmp_path)
    model: Any = load_model(directory)
    assert DecoderStep.of(model, prompted(model, 1), OPERATIONS) is None
    directory, _ = write(TinyCase("llama", "q8_0", (1, 2, 0)), tmp_path)
    model = load_model(directory)
    cache = prompted(model, 1)
    assert DecoderStep.of(model, cache) is None  # no GPU
    model.model.rotary_emb.rope_type = "dynamic"
    assert DecoderStep.of(model, cache, OPERATIONS) is None
    model.model.rotary_emb.rope_type = "default"
    assert DecoderStep.of(model, cache, OPERATIONS) is not None
    type(model.model.layers[0]).__name__ = "OtherDecoderLayer"
    try:
        assert DecoderStep.of(model, cache, OPERATIONS) is None
    finally:
        type(model.model.layers[0]).__name__ = "LlamaDecoderLayer"


def layer(rows: int, kind: str, *, bias: bool = False) -> ReplicatedLayer:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, 512, generator=generator)
    return ReplicatedLayer(uqff.quantize(weight, kind), torch.randn(rows, generator=generator) if bias else None)


@pytest.mark.parametrize("kind", ["q4k", "q8_0", "afq4", "afq3", "mxfp4", "f8q8"])
def test_joined_layers_are_one_weight(kind: str) -> None:
    """The product has the outputs of each; the layers are views, with their bytes, and are not joined twice."""
    layers = [layer(16, kind, bias=True), layer(8, kind), layer(24, kind)]
    x = torch.randn(1, 1, 512)
    expected, blobs = [each(x) for each in layers], [each.serialize() for each in layers]
    made = Joined.of(*layers)
    assert made._whole is not None
    assert made._whole.shape == (48, 512)
    for got, wanted in zip(made(x), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        assert got.is_contiguous()
    assert [each.serialize() for each in layers] == blobs
    start, size = made._whole.addresses()[0], sum(part.nbytes for part in made._whole.record.parts.values())
    assert all(start <= each.weight_buffers.addresses()[0] < start + size for each in layers)
    assert Joined.of(*layers)._whole is made._whole
    layers[1].weight_buffers.to(torch.device("cpu"))
    layers[1]._store(uqff.deserialize(blobs[1]).weight, None)  # as a module that was moved has other memory
    again = Joined.of(*layers)
    assert again._whole is not None
    assert again._whole is not made._whole


def test_what_cannot_be_joined_is_multiplied_one_by_one() -> None:
    """One scale for a whole weight; codes of rows far apart, or scales that rows share; two types; plain numbers."""
    plain = torch.nn.Linear(512, 8)
    for layers in (
        [layer(16, "fp8"), layer(8, "fp8")],
        [layer(64, "hqq4"), layer(64, "hqq4")],
        [layer(64, "hqq8"), layer(64, "hqq8")],
        [layer(16, "q4k"), layer(16, "q6k")],
        [layer(16, "q4k"), plain],
    ):
        made, x = Joined.of(*layers), torch.randn(1, 1, 512)
        assert made._whole is None
        for got, each in zip(made(x), layers, strict=True):
            assert torch.equal(got, each(x))
