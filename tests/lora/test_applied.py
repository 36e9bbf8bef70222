"""Adapters on a model: whose factors they are, several with weights, experts, and refusals."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.lora_files import exact_numbers, factors, make_exact, write_adapter
from uqff.errors import FormatError, ShapeError, UnsupportedError, UqffError
from uqff.lora import Adapters, Applied, ModelWeights, open_adapter
from uqff.simd.floats import Floats

Q = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.0.mlp.experts"


def apply(weights: ModelWeights, *given: Any) -> Applied:
    with Adapters.open(list(given)) as adapters:
        return adapters.applied(weights)


def merged(applied: Applied, path: str, weight: torch.Tensor) -> torch.Tensor:
    total = applied.merged(path, Floats.of_tensor(weight))
    return torch.from_numpy(total.bits.view(np.float32))


def test_several_in_order_with_weights(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", factors(Q, 6, 8), lora_alpha=2)
    two = write_adapter(tmp_path / "two", factors(Q, 6, 8, rank=3, seed=1), r=3, lora_alpha=6)
    first, second = (open_adapter(path)[Q].delta() for path in (one, two))
    weight = exact_numbers((6, 8), 9)
    for given, expected in (
        ([one], first),
        ([one, two], first + second),
        ([(str(one), 0.5), open_adapter(two)], 0.5 * first + second),
        ([(open_adapter(one), -2), two, one], -first + second),
    ):
        applied = apply(ModelWeights({Q: (6, 8)}), *given)
        assert (merged(applied, Q, weight) == weight + torch.from_numpy(expected)).all()
        weights = [each[1] if isinstance(each, tuple) else 1 for each in given]
        assert [(each.weight, each.matrices) for each in applied.adapters] == [(weight, 1) for weight in weights]
    assert Q in apply(ModelWeights({Q: (6, 8)}), one)
    assert not Adapters.open(None)
    assert [weight for _, weight in Adapters.open((one, 3)).each] == [3.0]


@pytest.mark.parametrize("given", [3, [3], [("DIR", 1, 2)], [("DIR", float("nan"))], [("DIR", True)], [("DIR", "2")]])
def test_what_is_no_adapter(given: Any, tmp_path: Path) -> None:
    with pytest.raises(UqffError) as caught:
        Adapters.open(given)
    assert caught.value.field == "lora"


def test_factors_without_a_weight(tmp_path: Path) -> None:
    path = write_adapter(tmp_path, factors("model.layers.0.self_attn.q_prj", 6, 8))
    with pytest.raises(
        FormatError, match=r"factors for no weight of the model: expected a weight, such as .*q_proj"
    ) as e:
        apply(ModelWeights({Q: (6, 8)}), path)
    assert e.value.file == str(tmp_path / "adapter_model.safetensors")
    assert e.value.layer == "model.layers.0.self_attn.q_prj"
    assert e.value.field == "base_model.model.model.layers.0.self_attn.q_prj.lora_A.weight"


def test_factors_of_another_shape(tmp_path: Path) -> None:
    path = write_adapter(tmp_path, factors(Q, 8, 6))
    with pytest.raises(ShapeError, match=r"factors do not fit the weight: expected \[6, 8\], got \[8, 6\]") as caught:
        apply(ModelWeights({Q: (6, 8)}), path)
    assert caught.value.field == f"base_model.model.{Q}.lora_B.weight"


def test_modules_that_lack_their_factors_are_told(tmp_path: Path) -> None:
    """Those that the configuration names; not experts, which newer models have as stacks."""
    k = Q.replace("q_proj", "k_proj")
    weights = ModelWeights({Q: (6, 8), k: (6, 8), f"{EXPERTS}.0.k_proj": (6, 8)}, layers=[Q, k])
    for targets, missing in ((["q_proj"], []), (["q_proj", "k_proj"], [k]), (r".*(?!x)_proj", [])):
        path = write_adapter(tmp_path, factors(Q, 6, 8), target_modules=targets)
        (applied,) = apply(weights, path).adapters
        assert (applied.matrices, applied.missing) == (1, missing)


def test_the_head_of_a_tied_model(tmp_path: Path) -> None:
    """PEFT adds the delta to the embedding, too."""
    path = write_adapter(tmp_path, factors("lm_head", 6, 8))
    with pytest.raises(UnsupportedError, match="adapter changes a head that is the embedding"):
        apply(ModelWeights({Q: (6, 8), "model.embed_tokens": (6, 8)}, tied=True), path)


def test_other_names_of_modules(tmp_path: Path) -> None:
    weights = ModelWeights(
        {"language_model.model.layers.0.q_proj": (6, 8), "model.layers.0.block_sparse_moe.gate": (6, 8)}
    )
    tensors = factors("model.language_model.layers.0.q_proj", 6, 8) | factors("model.layers.0.mlp.gate", 6, 8)
    assert apply(weights, write_adapter(tmp_path, tensors)).deltas.keys() == weights.shapes.keys()


@pytest.mark.parametrize("out", [6, 8])
def test_weights_that_lie_as_inputs_by_outputs(out: int, tmp_path: Path) -> None:
    """Conv1D of GPT-2. Where all is known to be outputs by inputs, the configuration's word counts as little as in
    PEFT, which takes it back for a linear layer.
    """
    path = write_adapter(tmp_path, factors(Q, out, 8), fan_in_fan_out=True)
    delta = torch.from_numpy(open_adapter(path)[Q].delta())
    turned = apply(ModelWeights({Q: (8, out)}, linear=False), path)
    assert (merged(turned, Q, torch.zeros(8, out)) == delta.T).all()
    straight = apply(ModelWeights({Q: (out, 8)}), path)
    assert (merged(straight, Q, torch.zeros(out, 8)) == delta).all()
    if out != 8:
        with pytest.raises(ShapeError, match="factors do not fit the weight"):
            apply(ModelWeights({Q: (out, 8)}, linear=False), path)


class Stack(torch.nn.Module):
    """Experts as transformers 5 has them."""

    def __init__(self, experts: int, inner: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(exact_numbers((experts, 2 * inner, hidden), 1))
        self.down_proj = torch.nn.Parameter(exact_numbers((experts, hidden, inner), 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def expert_weights(experts: int, inner: int, hidden: int) -> ModelWeights:
    weights = ModelWeights()
    for name, shape in (("gate_proj", (inner, hidden)), ("up_proj", (inner, hidden)), ("down_proj", (hidden, inner))):
        paths = [f"{EXPERTS}.{expert}.{name}" for expert in range(experts)]
        weights.stacks[f"{EXPERTS}.{name}"] = paths
        weights.shapes |= dict.fromkeys(paths, shape)
    return weights


@pytest.mark.parametrize(
    "targets", [["experts.gate_up_proj", "experts.down_proj"], ["mlp.experts.down_proj"], ["experts.gate_up_proj"]]
)
def test_stacks_of_experts_are_those_of_peft(targets: list[str], tmp_path: Path) -> None:
    """The factors of each expert, of either tensor or both: what PEFT has merged, expert by expert."""
    peft = pytest.importorskip("peft", reason="the oracle")
    experts, inner, hidden = 3, 4, 10
    model = torch.nn.Module()
    place: Any = model
    for name in ("model", "layers", "0", "mlp"):
        place.add_module(name, torch.nn.Module())
        place = place.get_submodule(name)
    place.add_module("experts", Stack(experts, inner, hidden))
    before = {name: p.detach().clone() for name, p in place.experts.named_parameters()}
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=[], target_parameters=targets, rank_pattern={"down_proj": 3}
    )
    with warnings.catch_warnings():  # PEFT looks for rank_pattern among modules only, and warns that there is none
        warnings.simplefilter("ignore", RuntimeWarning)
        wrapped = peft.get_peft_model(model, config)
    make_exact(wrapped)
    wrapped.save_pretrained(tmp_path)
    after = dict(wrapped.merge_and_unload().get_submodule(EXPERTS).named_parameters())
    applied = apply(expert_weights(experts, inner, hidden), tmp_path)
    for expert in range(experts):
        gate, up = (
            merged(applied, f"{EXPERTS}.{expert}.{name}_proj", part)
            for name, part in zip(("gate", "up"), before["gate_up_proj"][expert].split(inner), strict=True)
        )
        assert (torch.cat([gate, up]) == after["gate_up_proj"][expert]).all()
        down = merged(applied, f"{EXPERTS}.{expert}.down_proj", before["down_proj"][expert])
        assert (down == after["down_proj"][expert]).all()
    assert applied.adapters[0].matrices == experts * sum(2 if "gate_up" in target else 1 for target in targets)
    assert any((after[name] != before[name]).any() for name in before)


def test_stacks_as_older_releases_of_peft_wrote_them(tmp_path: Path) -> None:
    """They took [experts, out, in] for [experts, in, out]: delta[e, i, o] = sum over r of A[e, r, i] B[o, r, e]."""
    experts, inner, hidden, rank = 3, 4, 10, 2
    a, b = exact_numbers((experts * rank, hidden), 1), exact_numbers((inner, rank * experts), 2)
    tensors = {f"{EXPERTS}.lora_A.weight": a, f"{EXPERTS}.lora_B.weight": b}
    write_adapter(tmp_path, tensors, target_modules=None, target_parameters=["experts.down_proj"], r=2, lora_alpha=2)
    applied = apply(expert_weights(experts, inner, hidden), tmp_path)
    delta = torch.einsum("ore,eri->eio", b.reshape(inner, rank, experts), a.reshape(experts, rank, hidden))
    for expert in range(experts):
        down = merged(applied, f"{EXPERTS}.{expert}.down_proj", torch.zeros(hidden, inner))
        assert (down == delta[expert]).all()


def test_a_stack_that_fits_no_experts(tmp_path: Path) -> None:
    tensors = {f"{EXPERTS}.lora_A.weight": torch.ones(8, 10), f"{EXPERTS}.lora_B.weight": torch.ones(8, 8)}
    write_adapter(tmp_path, tensors, target_modules=None, target_parameters=["experts.gate_up_proj"], r=2)
    weights = expert_weights(3, 4, 10)
    expected = r"expected gate_up_proj \[3, 8, 10\] of rank 2, got \[\[8, 8\], \[8, 10\]\]"
    with pytest.raises(ShapeError, match=expected):
        apply(weights, tmp_path)
    with pytest.raises(FormatError, match="factors for no weight"):
        apply(ModelWeights({Q: (6, 8)}), tmp_path)
