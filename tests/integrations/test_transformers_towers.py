"""Models with towers that transformers loads: our layers in all of it, and the logits of what is dequantised."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers
from safetensors.torch import load_file

import uqff
from tests.parallel.checkpoints import Written, written_once
from tests.parallel.ranks import run_ranks
from tools.tiny import multimodal
from tools.tiny.towers import END_TOKEN, IMAGE, IMAGE_TOKEN, PATCH, START_TOKEN
from uqff.errors import UnsupportedError
from uqff.export.dequantize import dequantize_model
from uqff.integrations.transformers import READS_SINCE, UqffConfig
from uqff.models.multimodal import MULTIMODAL
from uqff.parallel.comm import Comm
from uqff.parallel.layer import QuantizedLayer

MAJOR = int(transformers.__version__.partition(".")[0])
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
reads = pytest.mark.skipif(MAJOR < READS_SINCE, reason="transformers before 5 names modules otherwise")

CLOSE: Final = 5e-6
"""Logits are about 1; sums are taken in other orders."""

Picture = tuple[int, Callable[[], dict[str, torch.Tensor]]]
"""How many tokens a picture becomes, and what a model is given of it."""


def _noise(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).mul(0.7).sin().view(shape)


def _plain(tokens: int, *leading: int) -> Picture:
    return tokens, lambda: {"pixel_values": _noise(*leading, 3, IMAGE, IMAGE)}


def _sized(tokens: int, leading: tuple[int, ...], sizes: list[list[int]]) -> Picture:
    return tokens, lambda: {"pixel_values": _noise(*leading, 3, IMAGE, IMAGE), "image_sizes": torch.tensor(sizes)}


QWEN: Final[Picture] = (
    4,
    lambda: {"pixel_values": _noise(16, 3 * 2 * PATCH * PATCH), "image_grid_thw": torch.tensor([[1, 4, 4]])},
)
PICTURES: Final[dict[str, Picture]] = {
    **dict.fromkeys(
        ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "Qwen3-VL-MoE", "Qwen3.5 with vision", "Qwen3.5-MoE", "Qwen4-Exp"), QWEN
    ),
    "Gemma 3": _plain(1, 1),
    "Llama 4": _plain(1, 1),
    "LLaVA": _plain(4, 1),
    "LLaVA-NeXT": _sized(14, (1, 3), [[IMAGE, 2 * IMAGE]]),
    **dict.fromkeys(("Mistral 3", "Ministral 3"), _sized(2, (2,), [[IMAGE, IMAGE]] * 2)),
    "Idefics2": _plain(4, 1, 1),
    "Idefics3": _plain(1, 1, 1),
    "LFM2-VL": (
        4,
        lambda: {
            "pixel_values": _noise(1, 16, 3 * PATCH * PATCH),
            "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
            "spatial_shapes": torch.tensor([[4, 4]]),
        },
    ),
    "Llama 3.2 Vision": (
        1,
        lambda: {
            "pixel_values": _noise(1, 1, 4, 3, IMAGE, IMAGE),
            "aspect_ratio_ids": torch.tensor([[1]]),
            "aspect_ratio_mask": torch.tensor([[[1, 0, 0, 0]]]),
            "cross_attention_mask": torch.tensor([1, 0, 0, 0]).expand(1, 8, 1, 4),
        },
    ),
}
"""One of each architecture of which a processor of transformers is not needed for that."""
WITHOUT = ("Gemma 4", "Gemma 4 MoE", "Muse-Glimmer")
NAMES = [*(each.title for each in MULTIMODAL if each.title in PICTURES), "Ministral 3", *WITHOUT]
"""Those without a picture are asked for text; layers of their towers are compared."""


def _asked(name: str) -> dict[str, torch.Tensor]:
    """What a model is asked: seven tokens or more, and a picture."""
    tokens, picture = PICTURES.get(name, (0, dict))
    ids = torch.tensor([[5, START_TOKEN, *[IMAGE_TOKEN] * tokens, END_TOKEN, 30, 41, 23, 7]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **picture()}
    made: Any = getattr(transformers, multimodal.MULTIMODALS[name].architecture)
    if picture is QWEN[1] and "mm_token_type_ids" in signature(made.forward).parameters:
        given["mm_token_type_ids"] = (ids == IMAGE_TOKEN).int()
    return given


def _skip_unmade(name: str) -> None:
    """Skip what transformers cannot make."""
    if name == "Llama 4" and transformers.__version__.startswith(("5.0.", "5.1.")):
        pytest.skip("Llama4ForConditionalGeneration of transformers 5.0 and 5.1 asks for a pad_token_id that none has")


def _logits(model: Any, asked: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(**{name: each.to(model.device) for name, each in asked.items()}).logits
    return logits.cpu()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Architecture to the directory of its checkpoint in `model` and of UQFF in `uqff`."""
    return written_once(multimodal.has, multimodal.write, tmp_path_factory, "q8_0")


def _loaded(directory: Path, **options: Any) -> Any:
    auto = transformers.AutoModelForImageTextToText
    model, told = auto.from_pretrained(directory, dtype=torch.float32, output_loading_info=True, **options)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


@reads
@pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated")  # transformers 5.17 calls its own Mllama so
@pytest.mark.parametrize("name", NAMES)
def test_a_whole_model_of_uqff(name: str, written: Written, tmp_path: Path) -> None:
    """A layer for each of the file; logits of a picture are those of what is dequantised; saved as it was read."""
    _skip_unmade(name)
    source = written(name) / "uqff"
    dequantize_model(source, tmp_path / "plain")
    made: Any = getattr(transformers, multimodal.MULTIMODALS[name].architecture)
    plain = made.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    model, asked = _loaded(source), _asked(name)
    expected, logits = _logits(plain, asked), _logits(model, asked)
    assert (logits - expected).abs().max() <= CLOSE
    if name in PICTURES:
        assert (_logits(plain, {"input_ids": asked["input_ids"]}) - expected).abs().max() > 100 * CLOSE
    if name in ("Qwen2-VL", "Gemma 3", "Llama 3.2 Vision"):
        text = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(**asked, **text), plain.generate(**asked, **text))
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    assert uqff.verify(saved).clean
    with uqff.open(source) as before, uqff.open(saved) as after:
        assert set(after) == set(before)
        routers = {key for key in after if key.endswith(".router")}  # transformers multiplies plain numbers
        assert sum(isinstance(each, QuantizedLayer) for each in model.modules()) == len(after) - len(routers)
        for key in after:
            assert after[key].weight == before[key].weight, key
    residual, again = (load_file(each / "residual.safetensors") for each in (source, saved))
    assert set(again) == set(residual)
    assert all(torch.equal(again[key], residual[key]) for key in residual)


@reads
@pytest.mark.parametrize("name", ["Gemma 3", "Llama 4", "Qwen3-VL-MoE"])
def test_quantised_while_it_is_loaded(name: str, written: Written, tmp_path: Path) -> None:
    """Towers too, where the engine quantises them: the same layers as in the directory, also once they are saved."""
    _skip_unmade(name)
    folder, asked = written(name), _asked(name)
    model = _loaded(folder / "model", quantization_config=UqffConfig("q8_0"))
    logits, expected = _logits(model, asked), _logits(_loaded(folder / "uqff"), asked)
    assert (logits - expected).abs().max() <= CLOSE
    model.save_pretrained(tmp_path / "saved")
    with uqff.open(folder / "uqff") as file, uqff.open(tmp_path / "saved") as saved:
        assert set(file) == set(saved)
        assert all(saved[key].weight == file[key].weight for key in saved)
    assert (_logits(_loaded(tmp_path / "saved"), asked) - expected).abs().max() <= CLOSE


@reads
def test_a_class_that_transformers_does_not_have(written: Written, tmp_path: Path) -> None:
    """One error names the class to take, of a directory of UQFF and of what is to be quantised; others stay as is."""
    folder, auto = written("Qwen3-VL"), transformers.AutoModelForCausalLM
    for source, options in ((folder / "uqff", {}), (folder / "model", {"quantization_config": UqffConfig("q8_0")})):
        with pytest.raises(UnsupportedError) as caught:
            auto.from_pretrained(source, **options)
        assert caught.value.expected == "AutoModelForImageTextToText or Qwen3VLForConditionalGeneration"
        assert (caught.value.got, caught.value.file) == ("AutoModelForCausalLM", str(source))
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        auto.from_pretrained(folder / "model")
    with pytest.raises(OSError, match="nowhere"):
        auto.from_pretrained(tmp_path / "nowhere")


@reads
def test_the_language_model_of_a_larger_one(written: Written, tmp_path: Path) -> None:
    """Where transformers gives one, of which no tower is asked for: the logits of load_model; it is not saved."""
    source, ids = written("Qwen3.5-MoE") / "uqff", {"input_ids": torch.tensor([[5, 9, 17, 30]])}
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert type(model).__name__ == "Qwen3_5MoeForCausalLM"
    assert (_logits(model, ids) - _logits(uqff.load_model(source), ids)).abs().max() <= CLOSE
    with pytest.raises(UnsupportedError, match="out of a larger one cannot be saved by itself"):
        model.save_pretrained(tmp_path / "saved")


def _on_ranks(comm: Comm, directory: Path) -> tuple[list[int], Any]:
    """Of a rank: its share of a layer of the language model, and the logits."""
    os.environ.update(RANK=str(comm.rank), LOCAL_RANK=str(comm.rank), WORLD_SIZE=str(comm.world_size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer releases call the option by another name, and towers are whole
        model = _loaded(directory, tp_plan="auto")
    shape = model.model.language_model.layers[0].mlp.up_proj.weight.shape
    return list(shape), _logits(model, _asked("Gemma 3")).numpy()


@reads
def test_ranks_share_the_language_model(written: Written) -> None:
    """Towers are whole on each; the logits of a picture are those of one rank."""
    source = written("Gemma 3") / "uqff"
    whole = _loaded(source)
    expected = _logits(whole, _asked("Gemma 3"))
    out, columns = whole.model.language_model.layers[0].mlp.up_proj.weight.shape
    for shape, logits in run_ranks(2, _on_ranks, source, timeout=60):
        assert shape == [out // 2, columns]
        assert abs(logits - expected.numpy()).max() <= CLOSE


@reads
def test_a_layer_without_a_place_is_refused(written: Written, tmp_path: Path) -> None:
    """One of a tower that the configuration does not announce."""
    made = tmp_path / "uqff"
    shutil.copytree(written("Gemma 3") / "uqff", made)
    config = json.loads((made / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 1
    (made / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="layer has no place in the model") as caught:
        _loaded(made)
    assert str(caught.value.layer).startswith("vision_tower.vision_model.encoder.layers.1.")


@reads
def test_two_decoders_are_refused(written: Written) -> None:
    with pytest.raises(UnsupportedError, match="no UQFF of a model of this form") as caught:
        _loaded(written("DiffusionGemma") / "uqff")
    assert caught.value.got == "DiffusionGemmaForBlockDiffusion, with 2 decoders"


@pytest.mark.skipif(MAJOR >= READS_SINCE, reason="transformers from 5 on loads models with towers")
def test_a_transformers_that_names_modules_otherwise_says_so(written: Written) -> None:
    with pytest.raises(UnsupportedError, match=rf"expected transformers {READS_SINCE} or later"):
        _loaded(written("Qwen2-VL") / "model", quantization_config=UqffConfig("q8_0"))
