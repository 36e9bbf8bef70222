"""One token on the CPU, without what ``transformers`` does around its operations, gives the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.models import PROMPT, TinyCase, write
from uqff.parallel import load_model
from uqff.parallel.decoder_step_cpu import DecoderStepCpu
from uqff.parallel.generate import generate
from uqff.parallel.kv_cache import preallocated

TOKENS = 5


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "qwen3_moe"])
def test_answers_are_those_of_the_model(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases, norms of heads, experts, shared keys: ids, logits and log probabilities, and it is the step that runs."""
    directory, _ = write(TinyCase(architecture, "q8_0", (1, 2, 0), expert_inner=256), tmp_path)
    model: Any = load_model(directory)
    steps: list[torch.Tensor] = []
    call = DecoderStepCpu.__call__

    def counted(self: DecoderStepCpu, x: torch.Tensor) -> torch.Tensor | None:
        steps.append(x)
        return call(self, x)

    monkeypatch.setattr(DecoderStepCpu, "__call__", counted)
    made = generate(model, PROMPT, TOKENS)
    assert len(steps) == TOKENS - 1
    monkeypatch.setattr(DecoderStepCpu, "of", lambda *_: None)
    assert made == generate(model, PROMPT, TOKENS)
    assert len(steps) == TOKENS - 1


@torch.inference_mode()
def test_others_are_left_alone(tmp_path: Path) -> None:
    """A cache that is full, or of ``transformers`` alone; angles that change with tokens; hooks; another decoder."""
    directory, _ = write(TinyCase("llama", "q8_0", (1, 2, 0)), tmp_path)
    model: Any = load_model(directory)

    def prompted(cache: Any) -> Any:
        model(input_ids=torch.tensor([PROMPT]), use_cache=True, past_key_values=cache)
        return cache

    cache = prompted(preallocated(model, len(PROMPT) + 1))
    step, x = DecoderStepCpu.of(model, cache), model.get_input_embeddings()(torch.tensor([[7]]))
    assert step is not None
    assert step(x) is not None
    assert step(x) is None
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert DecoderStepCpu.of(model, cache) is None
    hook.remove()
    model.model.rotary_emb.rope_type = "dynamic"
    assert DecoderStepCpu.of(model, cache) is None
    model.model.rotary_emb.rope_type = "default"
    assert DecoderStepCpu.of(model, cache) is not None
    from transformers import DynamicCache

    assert DecoderStepCpu.of(model, prompted(DynamicCache(config=model.config))) is None
    type(model.model.layers[0]).__name__ = "OtherDecoderLayer"
    try:
        assert DecoderStepCpu.of(model, cache) is None
    finally:
        type(model.model.layers[0]).__name__ = "LlamaDecoderLayer"
