"""The language models of architectures with towers: the logits of the whole model of `transformers` for text."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.parallel.checkpoints import Written, written_once
from tests.parallel.ranks import run_ranks
from tools.tiny import multimodal
from uqff.errors import FormatError, UnsupportedError
from uqff.export.dequantize import dequantize_model
from uqff.models.multimodal import MULTIMODAL
from uqff.parallel import Comm, load_model
from uqff.parallel.transformers_model import model_type
from uqff.quantization.run import quantize_model
from uqff.quantization.types import FallbackWarning

KIND = "q8_0"
PROMPT = [[5, 9, 17, 30, 41, 11, 23, 3]]
CLOSE = 5e-6
"""Logits are about 1; sums are taken in other orders."""

BY_HAND = [name for name, each in multimodal.MULTIMODALS.items() if each.tensors is not None]
"""Of which transformers has no model to compare with."""
ABSENT = (*BY_HAND, *multimodal.FIXED)
RUN = [*(each.title for each in MULTIMODAL if each.runs_as and each.title not in ABSENT), *multimodal.VARIANTS]
LEFT = [each.title for each in MULTIMODAL if not each.runs_as]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Architecture to the directory of its checkpoint in `model` and of UQFF in `uqff`."""
    return written_once(multimodal.has, multimodal.write, tmp_path_factory, KIND)


def whole(name: str, folder: Path) -> torch.Tensor:
    """Logits of the whole model of a checkpoint."""
    import transformers

    made: Any = getattr(transformers, multimodal.MULTIMODALS[name].architecture)
    model = made.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor(PROMPT)).logits
    return logits


def text(source: Path) -> torch.Tensor:
    """Logits of the language model alone."""
    with torch.inference_mode():
        logits: torch.Tensor = load_model(source, dtype=torch.float32)(input_ids=torch.tensor(PROMPT)).logits
    return logits


@pytest.mark.parametrize("name", RUN)
def test_logits_are_those_of_the_whole_model(name: str, written: Written, tmp_path: Path) -> None:
    """Of the checkpoint, and of what is dequantised; towers are there, and nobody asks for them."""
    folder = written(name)
    dequantize_model(folder / "uqff", tmp_path / "plain")
    for source, plain in ((folder / "model", folder / "model"), (folder / "uqff", tmp_path / "plain")):
        wanted = whole(name, plain)
        assert wanted.abs().max() > 0.1
        assert (text(source) - wanted).abs().max() <= CLOSE


def test_the_language_model_of_gemma_3n(written: Written, tmp_path: Path) -> None:
    """Of which transformers makes no whole model without timm; keys that no layer of it has are left alone."""
    transformers = pytest.importorskip("transformers", minversion="4.53")
    folder = written("Gemma 3n")
    dequantize_model(folder / "uqff", tmp_path / "plain")
    for source, plain in ((folder / "model", folder / "model"), (folder / "uqff", tmp_path / "plain")):
        own = json.loads((plain / "config.json").read_text())["text_config"]
        model = transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**own)).eval()
        tensors = load_file(plain / "model.safetensors")
        inner = "model.language_model."
        named = {f"model.{name.removeprefix(inner)}": x for name, x in tensors.items() if name.startswith(inner)}
        assert model.load_state_dict(named, strict=False).missing_keys == ["lm_head.weight"]
        model.tie_weights()
        with torch.inference_mode():
            wanted = model(input_ids=torch.tensor(PROMPT)).logits
        assert wanted.abs().max() > 0.1
        assert (text(source) - wanted).abs().max() <= CLOSE


@pytest.mark.parametrize("name", ["Qwen2-VL", "Qwen3-VL"])
def test_configurations_as_transformers_5_writes_them(name: str, written: Written, tmp_path: Path) -> None:
    """The language model nested, axes of positions among its rotary parameters: the same files and logits."""
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:
        pytest.skip("this transformers writes the older form")
    folder, made = written(name), multimodal.MULTIMODALS[name]
    own = json.loads((folder / "model" / "config.json").read_text())
    newer: Any = transformers.CONFIG_MAPPING[made.model_type].from_dict(copy.deepcopy(own))  # which it changes
    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(newer.to_json_string())
    quantize_model(tmp_path / "model", tmp_path / "uqff", [KIND], dtype="f32")
    for each in (f"{KIND}-0.uqff", "residual.safetensors"):
        assert (tmp_path / "uqff" / each).read_bytes() == (folder / "uqff" / each).read_bytes()
    config = json.loads((tmp_path / "uqff" / "config.json").read_text())
    (values, older) = ((each.get("text_config") or each) if name == "Qwen3-VL" else each for each in (config, own))
    assert values["rope_scaling"] == older["rope_scaling"]
    assert values["hidden_size"] == older["hidden_size"]
    for source in (tmp_path / "model", tmp_path / "uqff"):
        assert torch.equal(text(source), text(folder / source.name))


@pytest.mark.parametrize("name", ["Qwen3-VL", "Qwen4-Exp"])
def test_quantised_while_it_is_loaded(name: str, written: Written, tmp_path: Path) -> None:
    """The types are those of the file: what is promoted there is promoted here, wherever the language model is."""
    source = written(name) / "model"
    with pytest.warns(FallbackWarning):
        quantize_model(source, tmp_path / "uqff", ["q4k"], dtype="f32")
    with torch.inference_mode(), pytest.warns(FallbackWarning):
        made = load_model(source, dtype=torch.float32, isq="q4k")(input_ids=torch.tensor(PROMPT)).logits
    assert torch.equal(made, text(tmp_path / "uqff"))


def test_queries_are_scaled_wherever_it_is_said() -> None:
    """Not only where the model is called Ministral 3: the engine gives a text model of GGUF to Mistral's loader."""
    values = multimodal.MULTIMODALS["Ministral 3"].values["text_config"] | {"model_type": "mistral"}
    rope = {key: value for key, value in values["rope_parameters"].items() if key != "llama_4_scaling_beta"}
    text = {"architectures": ["MistralForCausalLM"]}
    whole = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"}
    assert model_type(values | text) == "ministral3"
    assert model_type(values | text | {"rope_parameters": rope}) == "mistral"
    assert model_type(whole | {"text_config": values}) == "ministral3"
    assert model_type(whole | {"text_config": values | {"rope_parameters": rope}}) == "mistral"


@pytest.mark.parametrize("name", LEFT)
def test_others_are_refused_by_name(name: str, written: Written) -> None:
    with pytest.raises(UnsupportedError, match="architecture cannot be run") as caught:
        load_model(written(name) / "uqff")
    assert caught.value.got == name


def on_ranks(comm: Comm, directories: dict[str, str]) -> dict[str, Any]:
    """Logits by architecture."""
    with torch.inference_mode():
        return {
            name: load_model(directory, comm)(input_ids=torch.tensor(PROMPT)).logits.numpy()
            for name, directory in directories.items()
        }


def test_two_ranks_agree_with_one(written: Written) -> None:
    directories = {name: str(written(name) / "uqff") for name in ("Gemma 3", "Qwen3-VL-MoE")}
    first, second = run_ranks(2, on_ranks, directories, timeout=60)
    for name, one in on_ranks(Comm.of(None), directories).items():
        assert abs(first[name] - one).max() <= CLOSE, name
        assert (first[name] == second[name]).all(), name


def test_layers_of_the_language_model_must_have_a_place(written: Written, tmp_path: Path) -> None:
    """A layer that the configuration does not announce is no tower."""
    source, made = written("LLaVA") / "uqff", tmp_path / "uqff"
    made.mkdir()
    for path in source.iterdir():
        (made / path.name).symlink_to(path)
    config = json.loads((made / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1
    (made / "config.json").unlink()
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="layer has no place in the model") as caught:
        load_model(made)
    assert str(caught.value.layer).startswith("language_model.model.layers.1.")
