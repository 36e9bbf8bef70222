"""Metadata and configurations: what one says the other says, and Llama 3's rope scaling by a formula of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.samples_gguf import Tensor, array, gguf, pair
from uqff.checkpoints import open_gguf
from uqff.checkpoints.gguf.config import check_config, config_of
from uqff.checkpoints.gguf.metadata import metadata_of
from uqff.checkpoints.gguf.names import architecture_of_config, architecture_of_name
from uqff.checkpoints.gguf.rope import llama3_factors, llama3_scaling
from uqff.errors import FormatError, UnsupportedError
from uqff.models.config import restated

EMBEDDING = Tensor("token_embd.weight", (64, 5), 0, bytes(4 * 64 * 5))
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
THETA, HEAD_DIM = 500000.0, 16


def factors() -> np.ndarray[Any, Any]:
    """Llama 3's rope scaling in float64, by what it means: long waves stretched, short ones kept, others blended."""
    waves = 2 * np.pi * THETA ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    kept = np.clip((8192 / waves - 1) / (4 - 1), 0, 1)
    return np.asarray(1 / (kept + (1 - kept) / 8))


def write(folder: Path, change: dict[str, bytes | None] | None = None, tensors: list[Tensor] | None = None) -> Path:
    """A llama with heads of 16; pairs of `change` replace those of their name, None takes one away."""
    pairs: dict[str, bytes | None] = {
        "general.architecture": pair("general.architecture", "text", "llama"),
        "block_count": pair("llama.block_count", "u32", 3),
        "context_length": pair("llama.context_length", "u32", 131072),
        "embedding_length": pair("llama.embedding_length", "u32", 64),
        "feed_forward_length": pair("llama.feed_forward_length", "u32", 96),
        "head_count": pair("llama.attention.head_count", "u32", 4),
        "head_count_kv": pair("llama.attention.head_count_kv", "u32", 2),
        "epsilon": pair("llama.attention.layer_norm_rms_epsilon", "f32", 1e-5),
        "freq_base": pair("llama.rope.freq_base", "f32", THETA),
    }
    path = folder / "m.gguf"
    kept = [each for each in {**pairs, **(change or {})}.values() if each is not None]
    path.write_bytes(gguf(kept, [EMBEDDING, *(tensors or [])]))
    return path


def config(path: Path) -> dict[str, Any]:
    with open_gguf(path) as file:
        return config_of(file, architecture_of_name(file.get_value("general.architecture")))


BASE = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 131072,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 5,
}


def test_all_fields(tmp_path: Path) -> None:
    """float32 numbers are the decimals that were meant."""
    assert config(write(tmp_path)) == BASE


HEAD = Tensor("output.weight", (64, 5), 0, bytes(4 * 64 * 5))

VARIANTS: dict[str, tuple[dict[str, bytes | None], list[Tensor], dict[str, Any]]] = {
    "untied": ({}, [HEAD], {"tie_word_embeddings": False}),
    "no-kv": ({"head_count_kv": None}, [], {"num_key_value_heads": 4}),
    "no-base": ({"freq_base": None}, [], {"rope_theta": 10000.0}),
    "kv-array": ({"head_count_kv": array("llama.attention.head_count_kv", "i32", [2, 2, 2])}, [], {}),
    "sizes": ({"x": pair("llama.rope.dimension_count", "u64", 16), "y": pair("llama.vocab_size", "u32", 5)}, [], {}),
    "tokens": ({"x": pair("tokenizer.ggml.bos_token_id", "u32", 1)}, [], {"bos_token_id": 1}),
    "linear": (
        {"x": pair("llama.rope.scaling.type", "text", "linear"), "y": pair("llama.rope.scaling.factor", "f32", 4)},
        [],
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
    "linear-before": (
        {"x": pair("llama.rope.scale_linear", "f32", 2)},
        [],
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "no-scaling": ({"x": pair("llama.rope.scaling.type", "text", "none")}, [], {}),
    "llama3": (
        {},
        [Tensor("rope_freqs.weight", (8,), 0, factors().astype("<f4").tobytes())],
        {"rope_scaling": SCALING},
    ),
    "window": (
        {"x": pair("llama.attention.sliding_window", "u32", 4096)},
        [],
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 4096},
    ),
    "head-size": (
        {"x": pair("llama.attention.key_length", "u32", 32)},
        [],
        {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None, "head_dim": 32},
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(tmp_path: Path, name: str) -> None:
    """Each differs from the plain model in what it says, and in nothing else."""
    change, tensors, expected = VARIANTS[name]
    assert config(write(tmp_path, change, tensors)) == {**BASE, **expected}


REFUSED: dict[str, tuple[dict[str, bytes | None], type[Exception], str]] = {
    "layers-differ": (
        {"head_count_kv": array("llama.attention.head_count_kv", "i32", [2, 4, 2])},
        FormatError,
        "llama.attention.head_count_kv",
    ),
    "no-epsilon": ({"epsilon": None}, FormatError, "llama.attention.layer_norm_rms_epsilon"),
    "epsilon-0": (
        {"epsilon": pair("llama.attention.layer_norm_rms_epsilon", "f32", 0)},
        FormatError,
        "llama.attention.layer_norm_rms_epsilon",
    ),
    "no-blocks": ({"block_count": None}, FormatError, "llama.block_count"),
    "blocks-text": ({"block_count": pair("llama.block_count", "text", "3")}, FormatError, "llama.block_count"),
    "blocks-0": ({"block_count": pair("llama.block_count", "u32", 0)}, FormatError, "llama.block_count"),
    "blocks-huge": ({"block_count": pair("llama.block_count", "u64", 2**63)}, FormatError, "llama.block_count"),
    "blocks-many": ({"block_count": pair("llama.block_count", "u32", 2**31 - 1)}, FormatError, "llama.block_count"),
    "vocabulary": ({"x": pair("llama.vocab_size", "u32", 6)}, FormatError, "llama.vocab_size"),
    "partial": ({"x": pair("llama.rope.dimension_count", "u32", 8)}, FormatError, "llama.rope.dimension_count"),
    "experts": ({"x": pair("llama.expert_count", "u32", 8)}, UnsupportedError, "llama.expert_count"),
    "yarn": ({"x": pair("llama.rope.scaling.type", "text", "yarn")}, UnsupportedError, "llama.rope.scaling.type"),
    "unknown": ({"x": pair("llama.attention.scale", "f32", 2)}, UnsupportedError, "llama.attention.scale"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_configuration_cannot_say_is_refused(tmp_path: Path, name: str) -> None:
    """The key is named, and the file."""
    change, error, field = REFUSED[name]
    path = write(tmp_path, change)
    with pytest.raises(error) as caught:
        config(path)
    assert (caught.value.field, caught.value.file) == (field, str(path))  # type: ignore[attr-defined]


def test_a_count_that_is_too_large_is_told_the_bound(tmp_path: Path) -> None:
    """4294967295 is not refused for being less than 1."""
    with pytest.raises(FormatError, match="not a count") as caught:
        config(write(tmp_path, {"block_count": pair("llama.block_count", "u32", 2**32 - 1)}))
    assert (caught.value.expected, caught.value.got) == ("a number from 1 to 2147483647", 2**32 - 1)


def test_factors_of_llama_3() -> None:
    """Ours in float32 against the formula in float64; and back to the numbers that they came from."""
    ours = llama3_factors(SCALING, THETA, HEAD_DIM)
    assert np.allclose(ours, factors(), rtol=1e-6, atol=0)
    assert ours[0] == 1
    assert ours[-1] == 8
    assert llama3_scaling(ours, THETA, HEAD_DIM) == SCALING
    with pytest.raises(UnsupportedError, match="not of Llama 3"):
        llama3_scaling(ours * np.array([1, 1, 1, 1.001, 1, 1, 1, 1], np.float32), THETA, HEAD_DIM)
    with pytest.raises(UnsupportedError, match="not of Llama 3"):
        llama3_scaling(ours[:-1], THETA, HEAD_DIM)
    for change in ({"factor": 0}, {"factor": None}, {"low_freq_factor": 4.5}, {"high_freq_factor": "4"}):
        with pytest.raises(FormatError, match="rope_scaling"):
            llama3_factors({**SCALING, **change}, THETA, HEAD_DIM)


def test_factors_of_llama_4() -> None:
    """Whose bounds are one: a frequency is stretched, or it is not."""
    scaling = {**SCALING, "factor": 16.0, "high_freq_factor": 1.0}
    ours = llama3_factors(scaling, THETA, HEAD_DIM)
    wavelengths = 2 * np.pi * THETA ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    assert ours.tolist() == np.where(wavelengths > 8192, 16, 1).tolist()
    assert set(ours.tolist()) == {1, 16}
    assert llama3_scaling(ours, THETA, HEAD_DIM) == scaling


def test_a_given_configuration_is_compared(tmp_path: Path) -> None:
    """Its rope scaling too; what the file does not say is said."""
    baked = [Tensor("rope_freqs.weight", (8,), 0, factors().astype("<f4").tobytes())]
    architecture = architecture_of_name("llama")

    def compare(path: Path, given: dict[str, Any]) -> list[str]:
        with open_gguf(path) as file:
            return check_config(given, file, architecture, "config.json")

    nested = {"rope_parameters": {"rope_theta": THETA, **SCALING}, "rope_theta": None}
    assert compare(write(tmp_path, {}, baked), {**BASE, "rope_scaling": SCALING}) == []
    assert compare(write(tmp_path, {}, baked), restated({**BASE, **nested})) == []
    for wrong in (None, {**SCALING, "factor": 32.0}):
        with pytest.raises(FormatError, match="not the file's rope scaling"):
            compare(write(tmp_path, {}, baked), {**BASE, "rope_scaling": wrong})
    said = ["the rope scaling of config.json (yarn) is not in the GGUF file"]
    assert compare(write(tmp_path), {**BASE, "rope_scaling": {"type": "yarn"}}) == said
    yarn: dict[str, bytes | None] = {
        "x": pair("llama.rope.scaling.type", "text", "yarn"),
        "y": pair("llama.strange", "u32", 1),
    }
    given = {**BASE, "rope_scaling": {"type": "yarn"}}
    assert compare(write(tmp_path, yarn), given) == ["config.json has the last word on llama.strange"]
    with pytest.raises(FormatError, match="not the file's rope scaling"):
        compare(write(tmp_path, yarn), {**BASE, "rope_scaling": {"type": "linear", "factor": 2.0}})


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in ("tokens", "untied", "no-base")])
def test_back_to_metadata(tmp_path: Path, name: str) -> None:
    """What is written says the same when it is read again."""
    change, tensors, _ = VARIANTS[name]
    before = config(write(tmp_path, change, tensors))
    architecture = architecture_of_config(before)
    kinds = {"u32": "u32", "f32": "f32", "text": "text"}
    pairs = [
        pair(key, kinds[value.type.name.lower()], value.value)
        for key, value in metadata_of(before, architecture, "config.json")
    ]
    (tmp_path / "b.gguf").write_bytes(gguf(pairs, [EMBEDDING, *tensors]))
    assert config(tmp_path / "b.gguf") == before
    json.dumps(before)


@pytest.mark.parametrize("value", [1e300, 1e-300, float("inf"), float("nan")])
def test_numbers_are_finite_in_float32(value: float, tmp_path: Path) -> None:
    """A float64 of the metadata that float32 makes infinite would stand as Infinity, which is no JSON."""
    change: dict[str, bytes | None] = {"epsilon": pair("llama.attention.layer_norm_rms_epsilon", "f64", value)}
    with pytest.raises(FormatError, match="not a number") as caught:
        config(write(tmp_path, change))
    assert caught.value.field == "llama.attention.layer_norm_rms_epsilon"


@pytest.mark.parametrize("value", [1e39, float("inf"), 10**300])
def test_numbers_of_a_configuration_are_finite_in_float32(value: float, tmp_path: Path) -> None:
    """None becomes infinite metadata, and none equals what the file says."""
    own = {**BASE, "rms_norm_eps": value}
    with pytest.raises(FormatError, match="not a number"):
        metadata_of(own, architecture_of_config(BASE), "config.json")
    with open_gguf(write(tmp_path)) as file, pytest.raises(FormatError, match="not the file's model"):
        check_config(own, file, architecture_of_name("llama"), "config.json")
