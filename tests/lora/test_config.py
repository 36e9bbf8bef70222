"""``adapter_config.json``: sizes and targets as PEFT reads them, and what is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uqff.errors import FormatError, UnsupportedError, UqffError
from uqff.lora.config import LoraConfig, Size, read_lora_config

PATHS = [
    f"model.layers.{block}.{name}"
    for block in (0, 1, 11)
    for name in (
        "self_attn.q_proj",
        "self_attn.my_q_proj",
        "self_attn.k_proj",
        "mlp.down_proj",
        "mlp.experts.1.down_proj",
        "input_layernorm",
    )
] + ["lm_head", "layers.1.q_proj", "q_proj", "model.vision.blocks.1.q_proj", "model.layers.1"]


def config(**document: Any) -> LoraConfig:
    return LoraConfig({"peft_type": "LORA", "target_modules": ["q_proj"], **document}, Path("adapter_config.json"))


def test_sizes_by_hand() -> None:
    """The first pattern that matches the end of a path counts, from a dot on."""
    made = config(
        r=8,
        lora_alpha=16,
        rank_pattern={"q_proj": 4, r"layers\.1\.self_attn\..*": 2},
        alpha_pattern={"model.layers.1.mlp.down_proj": 5, "down_proj": 3.5},
    )
    assert made.size("model.layers.1.self_attn.q_proj") == Size(4, 16, 4.0)
    assert made.size("model.layers.1.self_attn.my_q_proj") == Size(2, 16, 8.0)
    assert made.size("model.layers.0.self_attn.my_q_proj") == Size(8, 16, 2.0)
    assert made.size("model.layers.1.mlp.down_proj") == Size(8, 5, 0.625)
    assert made.size("model.layers.11.mlp.down_proj", 0.5) == Size(8, 3.5, 0.21875)
    assert config(r=9, lora_alpha=6, use_rslora=True).size("q_proj") == Size(9, 6, 2.0)
    assert config().size("q_proj") == Size(8, 8, 1.0), "PEFT's defaults"


TARGETS: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["q_proj", "mlp.down_proj", "lm_head"]},
    "one": {"target_modules": ["model.layers.1.self_attn.q_proj"]},
    "regex": {"target_modules": r".*\.layers\.(0|1)\.self_attn\.[qk]_proj"},
    "part": {"target_modules": r"q_proj"},
    "class": {"target_modules": r"model.layers.[\d]{1,}.*(?:q|down)_proj"},
    "excluded": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.1.self_attn.k_proj", "q"]},
    "excluded by regex": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*\.1+\..*"},
    "layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 11]},
    "layer": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 1},
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    "patterns": {"target_modules": ["down_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "lay.rs"]},
    "whole path": {"target_modules": ["layers.1.q_proj", "k_proj"], "layers_to_transform": [0]},
}


@pytest.mark.parametrize("case", TARGETS)
def test_targets_are_those_of_peft(case: str) -> None:
    peft = pytest.importorskip("peft", reason="the oracle")
    from peft.tuners.tuners_utils import check_target_module_exists

    theirs = peft.LoraConfig(**TARGETS[case])
    ours = config(**TARGETS[case])
    expected = {path: bool(check_target_module_exists(theirs, path)) for path in PATHS}
    assert {path: ours.targets(path) for path in PATHS} == expected
    assert len(set(expected.values())) == 2, "both occur"


def test_sizes_are_those_of_peft() -> None:
    pytest.importorskip("peft", reason="the oracle")
    from peft.utils.other import get_pattern_key

    patterns = {"self_attn.q_proj": 2, "(k|v)_proj": 3, r"layers\.1\..*": 4, "down_proj": 5, "proj": 6}
    made = config(rank_pattern=patterns)
    for path in PATHS:
        assert made.size(path).rank == patterns.get(get_pattern_key(list(patterns), path), 8), path


def test_all_linear_leaves_out_the_head() -> None:
    made = config(target_modules="All-Linear")
    assert [made.targets(path) for path in ("model.layers.0.self_attn.q_proj", "lm_head")] == [True, False]


def test_a_pattern_that_needs_backtracking() -> None:
    """Of targets it is not known what it matches; a rank must be known."""
    made = config(target_modules=r"^(?!.*vision).*q_proj")
    assert made.targets("model.layers.0.self_attn.q_proj") is None
    with pytest.raises(UnsupportedError, match="pattern needs backtracking") as caught:
        config(rank_pattern={r"(?!x)y": 3})
    assert caught.value.field == r"rank_pattern.(?!x)y"


def test_target_parameters() -> None:
    made = config(
        target_modules=None, target_parameters=["mlp.experts.gate_up_proj", "experts.down_proj", "gate.weight"]
    )
    assert made.parameters_of("model.layers.0.mlp.experts") == ["down_proj", "gate_up_proj"]
    assert made.parameters_of("model.layers.0.mlp.gate") == ["weight"]
    assert made.parameters_of("model.layers.0.other_experts") == []
    assert made.targets("model.layers.0.mlp.gate") is False
    anywhere = config(target_modules=["q_proj"], target_parameters=["gate_up_proj", "gate.weight"])
    assert anywhere.parameters_of("model.layers.0.mlp.experts") == ["gate_up_proj"]
    assert anywhere.parameters_of("model.layers.0.mlp.gate") == ["weight", "gate_up_proj"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "IA3"),
        ("peft_type", "ADALORA"),
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [3]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("monteclora_config", {"num_samples": 2}),
        ("kasa_config", {"beta": 1}),
        ("velora_config", {"scale": 1}),
        ("megatron_config", {"hidden_size": 4}),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
    ],
)
def test_what_is_no_sum_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(UnsupportedError) as caught:
        config(**{key: value})
    assert (caught.value.file, caught.value.field, caught.value.got) == ("adapter_config.json", key, value)


def test_what_is_near_that_is_not_refused() -> None:
    near = {"use_dora": False, "bias": "none", "modules_to_save": [], "megatron_config": None, "peft_type": "lora"}
    for start in ("gaussian", "eva", "orthogonal", True, False, None):
        assert config(**near, init_lora_weights=start, lora_dropout=0.1, task_type="CAUSAL_LM").targets("q_proj")


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("r", 0, "r"),
        ("r", True, "r"),
        ("r", 10**400, "r"),
        ("r", "8", "r"),
        ("lora_alpha", math.inf, "lora_alpha"),
        ("lora_alpha", math.nan, "lora_alpha"),
        ("lora_alpha", None, "lora_alpha"),
        ("use_rslora", "yes", "use_rslora"),
        ("rank_pattern", {"q_proj": -1}, "rank_pattern.q_proj"),
        ("rank_pattern", ["q_proj"], "rank_pattern"),
        ("alpha_pattern", {"(": 3}, "alpha_pattern.("),
        ("target_modules", "(", "target_modules"),
        ("target_modules", [], "target_modules"),
        ("target_modules", [3], "target_modules"),
        ("target_modules", "", "target_modules"),
        ("layers_to_transform", ["1"], "layers_to_transform"),
    ],
)
def test_bad_values_are_named(key: str, value: Any, field: str) -> None:
    with pytest.raises(FormatError) as caught:
        config(**{key: value})
    assert (caught.value.file, caught.value.field) == ("adapter_config.json", field)


def test_layers_are_only_beside_a_list() -> None:
    with pytest.raises(FormatError, match="only beside a list of target_modules") as caught:
        config(target_modules=".*", layers_to_transform=[1])
    assert caught.value.field == "layers_to_transform"


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"target_modules": ["q_proj"], "r": 3}))
    assert read_lora_config(path).size("q_proj").rank == 3
    path.write_text("[]")
    with pytest.raises(FormatError, match="not a JSON object"):
        read_lora_config(path)


KEYS = [
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
    "bias",
    "modules_to_save",
    "use_dora",
]
TEXTS = st.sampled_from(
    [*PATHS, "", ".", "LORA", "none", "all-linear", "(", "a{9}", "(?i)q", r"\d+", "(?=x)", "x" * 600]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=5), st.text(max_size=8))
def test_any_json_is_read_or_refused(document: dict[str, Any], more: str) -> None:
    """Only errors of ours come out, and what is read answers for every path."""
    try:
        made = LoraConfig({"target_modules": ["q_proj"], **document}, Path("adapter_config.json"))
    except UqffError:
        return
    for path in (*PATHS[::5], "", more, f"a.{more}.1.b", "." * 300):
        assert made.targets(path) in (True, False, None)
        assert math.isfinite(made.size(path).scale)
        assert all(isinstance(name, str) for name in made.parameters_of(path))
