"""``config.json`` of transformers 4 and of 5: what one says and the other does not is added; the model is the same."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tools.tiny import architectures as tiny_architectures
from tools.tiny.models import TinyModel
from uqff.codes import Version
from uqff.errors import FormatError, UnsupportedError
from uqff.migration import migrate
from uqff.models.config import METHOD_KEY, config_to_write, numbers_of, read_config, restated
from uqff.quantization.run import quantize_model

V0, V1_1, V1 = Version(0, 2, 0), Version(1, 1, 0), Version(1, 2, 0)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}


def of(architecture: str, **values: Any) -> dict[str, Any]:
    return {"architectures": [f"{architecture}ForCausalLM"], **values}


ROPE = {"rope_theta": 5e5, "rope_type": "default"}

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (of("Llama", rope_parameters=ROPE), {"rope_theta": 5e5}),
    "llama, no type": (of("Llama", rope_parameters={"rope_theta": 5e5}), {"rope_theta": 5e5}),
    "llama3": (of("Llama", rope_parameters={**LLAMA3, "rope_theta": 5e5}), {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "partial": (
        of("Llama", rope_parameters={**ROPE, "partial_rotary_factor": 0.5}),
        {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
    ),
    "linear of transformers 4": (
        of("Llama", rope_theta=1e4, rope_scaling={"type": "linear", "factor": 2.0}),
        {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}},
    ),
    "mistral, yarn": (
        of("Mistral", rope_parameters={**YARN, "rope_theta": 1e6}),
        {
            "rope_theta": 1e6,
            "rope_scaling": YARN,
            "rope_parameters": {**YARN, "rope_theta": 1e6, "beta_fast": 32.0, "beta_slow": 1.0},
        },
    ),
    "mistral, yarn of transformers 4": (
        of("Mistral", rope_theta=1e6, rope_scaling={**YARN, "beta_fast": 16.0}),
        {"rope_parameters": {**YARN, "rope_theta": 1e6, "beta_fast": 16.0, "beta_slow": 1.0}},
    ),
    "lfm2": (of("Lfm2", rope_theta=1e4), {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}),
    "lfm2, newer": (of("Lfm2Moe", rope_parameters=ROPE), {"rope_theta": 5e5}),
    "mixtral": (of("Mixtral", num_local_experts=4, rope_parameters=ROPE), {"rope_theta": 5e5}),
    "qwen3-moe": (
        of("Qwen3Moe", num_local_experts=4, num_hidden_layers=3, use_sliding_window=False, sliding_window=None),
        {"num_experts": 4, "max_window_layers": 3},
    ),
    "qwen3-moe, window": (
        of("Qwen3Moe", num_experts=4, num_hidden_layers=3, use_sliding_window=True, sliding_window=64),
        {"max_window_layers": 0},
    ),
    "phi-3": (
        of("Phi3", rope_parameters={**LONGROPE, "rope_type": "longrope", "rope_theta": 1e4}),
        {"rope_theta": 1e4, "rope_scaling": {"type": "longrope", **LONGROPE}},
    ),
    "phi-3, newer name": (
        of("Phi3", rope_scaling={"rope_type": "longrope", **LONGROPE}),
        {"rope_scaling": {"type": "longrope", **LONGROPE}},
    ),
    "gemma 3": (
        of(
            "Gemma3",
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            },
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        ),
        {
            "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_local_base_freq": 2e4,
            "sliding_window_pattern": 3,
        },
    ),
    "dtype": (of("Gemma", dtype="bfloat16"), {"torch_dtype": "bfloat16"}),
    "Granite 4": (
        of("GraniteMoeHybrid", layer_types=["linear_attention", "full_attention"]),
        {"layer_types": ["mamba", "attention"]},
    ),
    "Granite 4 of transformers 4": (of("GraniteMoeHybrid", layer_types=["mamba", "attention"]), {}),
    "Granite 4 of no list": (of("GraniteMoeHybrid", layer_types=[1]), {}),
    "Phi-3.5-MoE": (of("Phimoe"), {"architectures": ["PhiMoEForCausalLM"]}),
    "another": (of("Other", rope_parameters=1, num_local_experts=2), {}),
    "transformers 4": (of("Llama", rope_theta=1e4, rope_scaling=LLAMA3, torch_dtype="float16"), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_added(name: str) -> None:
    """Nothing else, and nothing more the second time; the argument is left alone."""
    given, added = CASES[name]
    before = copy.deepcopy(given)
    made = restated(given)
    assert made == given | added
    assert given == before
    assert restated(made) == made


def test_numbers_that_json_has_not() -> None:
    """As transformers 5 writes them; what only looks like one stays."""
    assert numbers_of({"a": [0.0, {"__float__": "Infinity"}], "b": {"c": {"__float__": "-Infinity"}}}) == {
        "a": [0.0, math.inf],
        "b": {"c": -math.inf},
    }
    assert math.isnan(numbers_of({"__float__": "NaN"}))
    for other in ({"__float__": "1"}, {"__float__": "Infinity", "a": 1}, {"__float__": ["Infinity"]}, "Infinity"):
        assert numbers_of(other) == other


def test_the_text_part_of_a_larger_model() -> None:
    inner = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}, "dtype": "bfloat16"}
    given = {"architectures": ["Gemma3ForConditionalGeneration"], "dtype": "bfloat16", "text_config": inner}
    text = {**inner, "rope_theta": 1e6, "torch_dtype": "bfloat16"}
    assert restated(given) == {**given, "torch_dtype": "bfloat16", "text_config": text}
    assert restated({**given, "text_config": 1})["text_config"] == 1


QWEN2_VL = {"architectures": ["Qwen2VLForConditionalGeneration"]}


def test_a_language_model_that_is_nested_is_at_the_top_too() -> None:
    """As transformers 5 writes Qwen2-VL, and the engine does not read it: sizes, axes, and a tower it stumbles over."""
    axes = {"mrope_section": [2, 3, 3]}
    rope = {"rope_type": "default", "type": "mrope", "rope_theta": 1e6, **axes}
    text = {"model_type": "qwen2_vl_text", "hidden_size": 64, "sliding_window": None, "eos_token_id": 2}
    vision = {"depth": 2, "in_channels": 3}
    given = QWEN2_VL | {
        "model_type": "qwen2_vl",
        "eos_token_id": 5,
        "text_config": text | {"rope_parameters": rope},
        "vision_config": vision | {"in_chans": 3, "hidden_act": "quick_gelu"},
    }
    scaling = {"type": "mrope", "rope_type": "default", **axes}
    lifted = {"hidden_size": 64, "rope_parameters": rope, "rope_theta": 1e6, "rope_scaling": scaling}
    made = restated(given)
    assert made == given | lifted | {"vision_config": vision}
    assert restated(made) == made
    assert restated(QWEN2_VL | {"vision_config": {"in_chans": 3, "hidden_act": "silu"}})["vision_config"] == {
        "in_chans": 3,
        "hidden_act": "silu",
    }


@pytest.mark.parametrize(
    ("config", "field", "expected", "got"),
    [
        (
            of("Llama", rope_theta=1e4, rope_parameters=ROPE),
            "config.rope_theta",
            "500000.0, as config.rope_parameters.rope_theta",
            1e4,
        ),
        (
            of("Llama", rope_scaling={**LLAMA3, "factor": 2.0}, rope_parameters=LLAMA3),
            "config.rope_scaling.factor",
            "8.0, as config.rope_parameters.factor",
            2.0,
        ),
        (
            of("Qwen3Moe", num_experts=4, num_local_experts=5),
            "config.num_experts",
            "5, as config.num_local_experts",
            4,
        ),
        (of("Llama", rope_parameters=[]), "config.rope_parameters", None, "list"),
        (QWEN2_VL | {"text_config": 1}, "config.text_config", None, "int"),
        (
            QWEN2_VL | {"hidden_size": 5, "text_config": {"hidden_size": 4}},
            "config.hidden_size",
            "4, as config.text_config.hidden_size",
            5,
        ),
        (of("Llama", rope_scaling="linear"), "config.rope_scaling", None, "str"),
        (of("Llama", rope_parameters={"full_attention": {}}), "config.rope_parameters", "one of all layers", None),
        (
            {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"rope_parameters": 1}},
            "config.text_config.rope_parameters",
            None,
            "int",
        ),
    ],
)
def test_contradictions(config: dict[str, Any], field: str, expected: object, got: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError) as caught:
        read_config(tmp_path / "config.json")
    error = caught.value
    assert (error.field, error.expected, error.got) == (field, expected, got)
    assert error.file == str(tmp_path / "config.json")


def test_the_same_said_twice_is_fine() -> None:
    config = of("Llama", rope_theta=500000, rope_parameters={**LLAMA3, "rope_theta": 5e5}, rope_scaling=LLAMA3)
    assert restated(config) == config


def test_windows_that_the_engine_has_no_words_for(tmp_path: Path) -> None:
    """Read, but not written for it: it would take every sixth layer for one of full attention."""
    types = ["full_attention", "full_attention", "sliding_attention"]
    config = of("Gemma3", layer_types=types)
    assert restated(config) == config
    with pytest.raises(UnsupportedError, match="no regular pattern of windows") as caught:
        config_to_write(tmp_path / "config.json", config, V0)
    assert (caught.value.field, caught.value.got) == ("config.layer_types", types)


def test_files_that_say_it_all_are_copied(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(of("Llama", rope_theta=1e4)))
    assert config_to_write(path, read_config(path), V0) is None
    path.write_text(json.dumps(of("Llama", rope_parameters=ROPE)))
    assert config_to_write(path, read_config(path), V0) == of("Llama", rope_parameters=ROPE, rope_theta=5e5)


def write(name: str, folder: Path) -> None:
    """The checkpoint of an architecture, and the same with the configuration of transformers 5."""
    for form in ("older", "newer"):
        if name in tiny_architectures.CONFIGS:
            tiny_architectures.write(name, folder / form)
        else:
            TinyModel(name.lower(), hidden_size=64, heads=2, vocab_size=64).write(folder / form)  # type: ignore[arg-type]
    path = folder / "newer" / "config.json"
    path.write_text(json.dumps(tiny_architectures.newer(json.loads(path.read_text()))))


NAMES = [*tiny_architectures.CONFIGS, "Llama", "Qwen2"]


@pytest.mark.parametrize("name", NAMES)
def test_either_form_makes_the_same_model(name: str, tmp_path: Path) -> None:
    """To the byte, with a configuration that says all the older one does; in 1.2, from there in 0.2, and back."""
    write(name, tmp_path)
    for form in ("older", "newer"):
        quantize_model(tmp_path / form, tmp_path / f"{form}-new", ["q8_0"])
        migrate(tmp_path / f"{form}-new", tmp_path / f"{form}-old", version="0.2")
        migrate(tmp_path / f"{form}-old", tmp_path / f"{form}-back", version="1.2")
    for made in ("new", "old", "back"):
        older, newer = tmp_path / f"older-{made}", tmp_path / f"newer-{made}"
        names = {path.name for path in older.iterdir()}
        assert {path.name for path in newer.iterdir()} == names
        for each in names - {"config.json"}:
            assert (newer / each).read_bytes() == (older / each).read_bytes(), each
        said = json.loads((newer / "config.json").read_text())
        wanted = json.loads((older / "config.json").read_text())
        assert {key: said.get(key) for key in wanted} == wanted


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_the_same(name: str, tmp_path: Path) -> None:
    """The written configuration means to transformers, whichever is installed, what the model's own does."""
    transformers = pytest.importorskip("transformers")
    write(name, tmp_path)
    quantize_model(tmp_path / "newer", tmp_path / "out", ["q8_0"])
    model_type = {"Qwen3Moe": "qwen3_moe"}.get(name, name.lower())
    newer_library = int(transformers.__version__.partition(".")[0]) >= 5
    read = []
    for folder in ("newer" if newer_library else "older", "out"):
        values = json.loads((tmp_path / folder / "config.json").read_text()) | {"model_type": model_type}
        read.append(transformers.AutoConfig.for_model(**values).to_dict())
    # What a library does not know, it keeps and does not use.
    added = {"rope_parameters", "num_local_experts", "max_window_layers", "partial_rotary_factor", "dtype"} | {
        METHOD_KEY
    }
    assert {key: read[1].get(key) for key in read[0]} == read[0]
    assert read[1].keys() - read[0].keys() <= added


def test_load_model_takes_either_form(tmp_path: Path) -> None:
    """A base that is not the default's, which a library that knows the other form only would not find."""
    pytest.importorskip("transformers")
    import torch

    from uqff.parallel import load_model

    logits = []
    for form in ("older", "newer"):
        tiny_architectures.write("Qwen3Moe", tmp_path / form)
        path = tmp_path / form / "config.json"
        config = json.loads(path.read_text()) | {"rope_theta": 123.0}
        quantize_model(tmp_path / form, tmp_path / f"{form}-made", ["q8_0"])
        config = config if form == "older" else tiny_architectures.newer(config)
        (tmp_path / f"{form}-made" / "config.json").write_text(json.dumps(config))
        model = load_model(tmp_path / f"{form}-made")
        with torch.no_grad():
            logits.append(model(torch.arange(3, 11)[None]).logits)
    assert torch.equal(*logits)


def test_the_method_of_quantising_is_named_beside_files_of_1_2_and_later(tmp_path: Path) -> None:
    """In place of the source's own; engines of older files refuse a method that they do not know."""
    path, method = tmp_path / "config.json", {"quant_method": "uqff"}
    for given in ({}, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, {"quantization_config": method}):
        config = of("Llama", rope_theta=1e4) | given
        path.write_text(json.dumps(config))
        named = config | {"quantization_config": method}
        assert config_to_write(path, config, V1) == (None if given.get("quantization_config") == method else named)
    assert config_to_write(path, named, V0) == config_to_write(path, named, V1_1) == of("Llama", rope_theta=1e4)
    assert config_to_write(tmp_path / "none.json", {}, V1) is None


def test_the_method_comes_and_goes_with_the_generation(tmp_path: Path) -> None:
    """What quantize, migrate and migrate back leave in config.json."""
    TinyModel(hidden_size=64, heads=2).write(tmp_path / "source")
    quantize_model(tmp_path / "source", tmp_path / "new", ["q8_0"])
    migrate(tmp_path / "new", tmp_path / "old", "0.2")
    migrate(tmp_path / "old", tmp_path / "again")
    source, new, old, again = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "new", "old", "again")
    )
    assert new == again == source | {"quantization_config": {"quant_method": "uqff"}}
    assert old == source
