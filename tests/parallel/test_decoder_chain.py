"""A token between attentions as one call: the same bits, and whatever is changed meanwhile is noticed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import uqff
from tests.parallel.models import PROMPT, TinyCase, write
from uqff.lora.low_rank import LowRank
from uqff.parallel import adapted, decoder_chain, load_model, set_arithmetic
from uqff.parallel.decoder_chain import DecoderChain
from uqff.parallel.generate import Generation, generate
from uqff.simd.floats import Floats

pytest.importorskip("numba")
TOKENS = 6

known = pytest.mark.skipif(
    not (decoder_chain._lanes(256) and decoder_chain._gates_alike()), reason="torch has other norms or gates here"
)


def test_norms_and_gates_of_torch_are_known_on_the_cpus_that_matter() -> None:
    if torch.backends.cpu.get_cpu_capability() != "AVX2":
        pytest.skip("torch has other vectors here")
    assert [decoder_chain._lanes(n) for n in (32, 48, 100, 896, 2048, 5120, 8192)] == [8] * 7
    assert decoder_chain._gates_alike()


class Calls:
    """How often a chain was called, and how often it did not hold."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done = self.refused = 0
        call, holds = DecoderChain.__call__, DecoderChain.holds

        def counted(chain: DecoderChain, *args: Any) -> torch.Tensor:
            self.done += 1
            return call(chain, *args)

        def asked(chain: DecoderChain, begin: int) -> bool:
            made = holds(chain, begin)
            self.refused += not made
            return made

        monkeypatch.setattr(DecoderChain, "__call__", counted)
        monkeypatch.setattr(DecoderChain, "holds", asked)


def loaded(case: TinyCase, folder: Path) -> Any:
    directory, _ = write(case, folder)
    model: Any = load_model(directory)
    set_arithmetic(model, "engine")
    return model


def unchained(monkeypatch: pytest.MonkeyPatch, model: Any, **more: Any) -> Generation:
    with monkeypatch.context() as patch:
        patch.setattr(DecoderChain, "of", lambda *_: None)
        return generate(model, PROMPT, TOKENS, **more)


@known
@pytest.mark.parametrize("threads", ["1", "3"])
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [("llama", "q4k"), ("llama", "q4_0"), ("mistral", "q6k"), ("qwen2", "q8_0"), ("qwen3", "q8_0")],
)
def test_answers_are_the_same(
    architecture: str, kind: str, threads: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases, norms of heads, shared keys: ids, logits and log probabilities, and it is the chain that runs."""
    monkeypatch.setenv("UQFF_NUM_THREADS", threads)
    model = loaded(TinyCase(architecture, kind, (1, 2, 0)), tmp_path)
    calls = Calls(monkeypatch)
    made = generate(model, PROMPT, TOKENS)
    assert (calls.done, calls.refused) == (TOKENS - 1, 0)
    assert made == unchained(monkeypatch, model)
    assert calls.done == TOKENS - 1


@known
def test_types_may_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in how activations are laid out; a plain head is multiplied by itself, and its layers may be shared."""
    model = loaded(TinyCase("llama", "q4k", (1, 2, 0)), tmp_path)
    attention = model.model.layers[0].self_attn
    for name, kind in (("v_proj", "q6k"), ("q_proj", "q4_0"), ("k_proj", "q8_0")):
        layer = getattr(attention, name)
        layer._store(uqff.quantize(layer.dequantize_w(), kind), layer.bias)
    model.lm_head = torch.nn.Linear(256, 96, bias=False)
    calls = Calls(monkeypatch)
    assert generate(model, PROMPT, TOKENS) == unchained(monkeypatch, model)
    assert (calls.done, calls.refused) == (TOKENS - 1, 0)


def _other_arithmetic(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.arithmetic = "exact"


def _other_weight(model: Any) -> None:
    layer = model.model.layers[1].mlp.up_proj
    layer._store(uqff.quantize(-layer.dequantize_w(), "q4k"), layer.bias)


def _other_buffer(model: Any) -> None:
    weight = model.model.layers[1].self_attn.q_proj.weight_buffers
    weight.data = weight.data.clone()


def _other_layer(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    attention.o_proj = copy.copy(attention.o_proj)


def _other_norm(model: Any) -> None:
    norm = model.model.layers[1].input_layernorm
    norm.weight = torch.nn.Parameter(norm.weight.detach() * 2)


def _adapters(model: Any) -> None:
    attention = model.model.layers[0].self_attn
    layer = attention.v_proj
    outputs, inputs = layer.weight.shape
    delta = LowRank(Floats.of_tensor(torch.ones(outputs, 1)), Floats.of_tensor(torch.ones(1, inputs)), 0.5)
    attention.v_proj = adapted(layer, [delta], merge=False)


def _hook(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda _module, _given, made: made * 2)


def _stats(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.begin_track_stats()


@known
@pytest.mark.parametrize(
    "change",
    [_other_arithmetic, _other_weight, _other_buffer, _other_layer, _other_norm, _adapters, _hook, _stats],
)
def test_what_is_changed_meanwhile_is_noticed(
    change: Callable[[Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After two tokens, from the callback; the token after that knows, as without a chain."""
    model = loaded(TinyCase("llama", "q4k", (1, 2, 0)), tmp_path)
    same = copy.deepcopy(model)
    calls = Calls(monkeypatch)

    def generated(model: Any, how: Callable[..., Generation]) -> Generation:
        seen: list[int] = []

        def after(token: int) -> None:
            seen.append(token)
            if len(seen) == 2:
                change(model)

        return how(model, on_token=after)

    made = generated(model, lambda model, **more: generate(model, PROMPT, TOKENS, **more))
    assert (calls.done, calls.refused) == (1, TOKENS - 2)
    assert made == generated(same, lambda model, **more: unchained(monkeypatch, model, **more))


@known
def test_what_is_unknown_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts, exact arithmetic in one layer, numbers that are not float32, another activation."""
    calls = Calls(monkeypatch)
    experts = loaded(TinyCase("qwen3_moe", "q8_0", (1, 2, 0), expert_inner=256), tmp_path)
    generate(experts, PROMPT, 3)
    model = loaded(TinyCase("llama", "q4k", (1, 2, 0)), tmp_path)
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()
    generate(model, PROMPT, 3)
    model.model.layers[0].mlp.act_fn = torch.nn.SiLU()
    model.model.layers[1].mlp.up_proj.arithmetic = "exact"
    generate(model, PROMPT, 3)
    model.model.layers[1].mlp.up_proj.arithmetic = "engine"
    generate(copy.deepcopy(model).to(torch.bfloat16), PROMPT, 3)
    assert calls.done == 0
    generate(model, PROMPT, 3)
    assert calls.done == 2
