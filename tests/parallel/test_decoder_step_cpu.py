"""One token on the CPU, without what ``transformers`` does around its operations, gives the same bits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.models import PROMPT, TinyCase, write
from uqff.parallel import alone, decoder_step_cpu, decoding, load_model
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

    def through_transformers(model: Any, cache: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        name = decoding._name_of_cache(model)

        def step(x: torch.Tensor) -> torch.Tensor:
            with alone.torch_alone():  # threads have memory at different addresses, of which attention's bits tell
                logits: torch.Tensor = model(inputs_embeds=x, use_cache=True, **{name: cache}).logits
            return logits

        return step

    monkeypatch.setattr(DecoderStepCpu, "of", through_transformers)
    assert made == generate(model, PROMPT, TOKENS)
    assert len(steps) == TOKENS - 1


@torch.inference_mode()
def test_attention_is_alone_where_it_is_short_and_products_are_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads would keep the CPUs that ours need; a long one is shared, and so is a plain model's."""
    if alone._openmp() is None:
        pytest.skip("OpenMP of this torch cannot be found")
    directory, _ = write(TinyCase("llama", "q8_0", (1, 2, 0)), tmp_path)
    ours: Any = load_model(directory)
    plain = type(ours)(ours.config).eval()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for model, expected in ((ours, [1, 1, 3]), (plain, [3, 3, 3])):
            cache = preallocated(model, 16)
            model(input_ids=torch.tensor([PROMPT]), use_cache=True, **{decoding._name_of_cache(model): cache})
            step = DecoderStepCpu.of(model, cache)
            seen: list[int] = []
            assert step is not None
            attend = step._attend

            def counted(*args: Any, attend: Any = attend, seen: list[int] = seen, **more: Any) -> Any:
                seen.append(torch.get_num_threads())
                return attend(*args, **more)

            step._attend = counted
            two_more = cache.layers[0].keys.numel() // len(PROMPT) * (len(PROMPT) + 2)
            monkeypatch.setattr(decoder_step_cpu, "SHORT", two_more)
            for token in range(3):
                step(model.get_input_embeddings()(torch.tensor([[token]])))
            assert seen[:: len(model.model.layers)] == expected
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_torch_is_alone_in_this_thread_only() -> None:
    """One that begins meanwhile has as many as ever; so has this one afterwards, and after an error."""
    if alone._openmp() is None:
        pytest.skip("OpenMP of this torch cannot be found")
    before, seen = torch.get_num_threads(), []

    def fail() -> None:
        with alone.torch_alone():
            thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            seen.append(torch.get_num_threads())
            raise KeyError

    torch.set_num_threads(3)
    try:
        with pytest.raises(KeyError):
            fail()
        assert (seen, torch.get_num_threads()) == ([3, 1], 3)
    finally:
        torch.set_num_threads(before)


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
