"""Keys and values in memory that is taken once: the numbers of transformers' own cache, and no copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from uqff.parallel.generate import generate
from uqff.parallel.kv_cache import preallocated

transformers = pytest.importorskip("transformers")

PROMPT = [5, 9, 17, 30]


def model_of(**more: Any) -> Any:
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, more.pop("config", "LlamaConfig"))(**sizes, **heads, **more)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def own(model: Any, tokens: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their logits with the cache that the model makes."""
    ids, cache, made = torch.tensor([PROMPT]), None, []
    with torch.inference_mode():
        for _ in range(tokens):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits = output.past_key_values, output.logits[0, -1]
            ids = logits.argmax().view(1, 1)
            made.append((int(ids), float(logits.max())))
    return [id_ for id_, _ in made], [logit for _, logit in made]


@pytest.mark.parametrize("more", [{}, {"config": "MistralConfig", "sliding_window": 3}])
def test_numbers_are_those_of_the_models_own_cache(more: dict[str, Any]) -> None:
    """To the bit; layers with a window have no other cache than before."""
    model = model_of(**more)
    made = generate(model, PROMPT, 8)
    assert (made.ids, made.logits) == own(model, 8)


def test_tokens_are_not_copied() -> None:
    """Keys and values stay where they are while tokens come in; the prompt comes in at once."""
    model = model_of()
    cache = preallocated(model, 8)
    if cache is None:
        pytest.skip("caches of this transformers are not made of layers")
    places = []
    with torch.inference_mode():
        for ids in (PROMPT, [7], [8]):
            model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
            places.append([(each.keys.data_ptr(), each.values.data_ptr()) for each in cache.layers])
    assert places[0] == places[1] == places[2]
    assert cache.get_seq_length() == 6
    assert cache.layers[0]._room[0].shape[-2] == 8


def test_more_tokens_than_there_is_room_for() -> None:
    """They are copied, as transformers does it, and nothing is lost."""
    model = model_of()
    cache = preallocated(model, 5)
    if cache is None:
        pytest.skip("caches of this transformers are not made of layers")
    with torch.inference_mode():
        for ids in (PROMPT, [7], [8]):
            logits = model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1]
        whole = model(input_ids=torch.tensor([[*PROMPT, 7, 8]])).logits[0, -1]
    assert cache.get_seq_length() == 6
    assert torch.allclose(logits, whole, atol=1e-6)
