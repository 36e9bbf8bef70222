"""Which layer is which module: by number, by path, experts apart or stacked, and configurations that say nonsense."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import uqff
from tests.support.moe_models import CONFIG, save_moe
from uqff.errors import ShardError, UqffError
from uqff.families import stack
from uqff.models.architectures import layer_names
from uqff.models.modules import Module, check_complete, config_beside, modules_of

WEIGHT = uqff.quantize(torch.ones(2, 32), "q8_0")


def test_paths_of_both_generations_agree(tmp_path: Path) -> None:
    """0.x in the order of its indices, 1.x in that of its keys: the same paths, made of the same parts."""
    with (
        uqff.open(save_moe(tmp_path / "old", stacked=False)) as old,
        uqff.open(save_moe(tmp_path / "new", stacked=True)) as new,
    ):
        config = config_beside(old)
        first, second = modules_of(old, config), modules_of(new, config)
    assert {module.path: module.parts for module in first} == {module.path: module.parts for module in second}
    assert [module.keys for module in first][:6] == [("0",), ("1",), ("2",), ("3",), ("4",), ("5", "8")]
    assert [module.keys for module in second] == [(module.path,) for module in second]


def test_experts_stacked_before_1(tmp_path: Path) -> None:
    """Files written on a GPU have one layer for the experts of a projection, in the place of the first."""
    names = [name for name in layer_names(CONFIG) if name.expert in (None, 0)]
    layers = {index: stack([WEIGHT, WEIGHT]) if name.expert == 0 else WEIGHT for index, name in enumerate(names)}
    uqff.save(layers, tmp_path / "m.uqff")
    with uqff.open(tmp_path / "m.uqff") as file:
        modules = modules_of(file, CONFIG)
    assert len(modules) == len(names) == 15
    assert (modules[5].path, modules[5].keys) == ("model.layers.0.mlp.experts.gate_proj", ("5",))
    assert [part.module for part in modules[5].parts] == [f"model.layers.0.mlp.experts.{e}.gate_proj" for e in (0, 1)]
    assert (modules[8].path, modules[8].keys) == ("model.layers.1.self_attn.q_proj", ("8",))


def test_without_a_configuration(tmp_path: Path) -> None:
    """Numbers stay numbers, paths are paths; nothing is known of parts."""
    uqff.save({0: WEIGHT}, tmp_path / "old.uqff")
    uqff.save({"a.b": WEIGHT}, tmp_path / "new.uqff", version=(1, 2, 0))
    with uqff.open(tmp_path / "old.uqff") as old, uqff.open(tmp_path / "new.uqff") as new:
        assert config_beside(old) is None
        assert modules_of(old, None) == [Module("0", ("0",))]
        assert modules_of(new, None) == modules_of(new, CONFIG) == [Module("a.b", ("a.b",))]


def test_a_model_is_complete_with_its_residual(tmp_path: Path) -> None:
    """What is no layer is looked for there, experts by the path of their stack."""
    with uqff.open(save_moe(tmp_path / "m", stacked=False)) as file:
        modules = modules_of(file, CONFIG)
        check_complete(file, CONFIG, modules)
        with pytest.raises(ShardError, match=r"got none for lm_head, model\.layers\.0\.mlp\.experts\.gate_proj \("):
            check_complete(file, CONFIG, [m for m in modules if m.path != "lm_head" and m.keys != ("5", "8")])
    with (
        uqff.open(save_moe(tmp_path / "n", stacked=True, residual=False)) as file,
        pytest.raises(ShardError, match=r"got none for model\.embed_tokens \("),
    ):
        check_complete(file, CONFIG, modules_of(file, CONFIG))


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)
configs = st.dictionaries(st.sampled_from([*CONFIG, "tie_word_embeddings", "text_config"]), values, max_size=3)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("models")
    with (
        uqff.open(save_moe(folder / "old", stacked=False)) as old,
        uqff.open(save_moe(folder / "new", stacked=True)) as new,
    ):
        yield old, new


@given(
    changes=configs,
    name=st.sampled_from(["Qwen3MoeForCausalLM", "MixtralForCausalLM", "Gemma3ForConditionalGeneration"]),
)
def test_configurations_that_say_nonsense(files: Any, changes: dict[str, Any], name: str) -> None:
    """Only this package's errors come out of any JSON object."""
    config = json.loads(json.dumps({**CONFIG, "architectures": [name], **changes}))
    for file in files:
        with contextlib.suppress(UqffError):
            check_complete(file, config, modules_of(file, config))
