"""Architectures with towers against the client: digests of what 0.9.5 writes for the same tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.golden_models import GOLDEN
from tools.tiny import multimodal
from tools.tiny.digests import digest
from uqff.checkpoints.safetensors import open_tensors
from uqff.export.dequantize import dequantize_model
from uqff.models.multimodal import MULTIMODAL
from uqff.quantization.run import quantize_model

DOCUMENT: dict[str, Any] = json.loads((GOLDEN / "v1" / "MULTIMODAL.json").read_text())
KIND = DOCUMENT["isq"]


def test_every_architecture_with_towers_has_a_checkpoint() -> None:
    """A new entry of the table needs one; the client has Gemma 3 without a tower among them."""
    wanted = {*(each.title for each in MULTIMODAL), *multimodal.VARIANTS} - {*multimodal.FIXED}
    assert sorted(multimodal.MULTIMODALS) == sorted(wanted)
    assert list(DOCUMENT["digests"]) == list(multimodal.MULTIMODALS)


@pytest.mark.parametrize("name", multimodal.MULTIMODALS)
def test_files_are_the_clients(name: str, tmp_path: Path) -> None:
    """Which layers of which tower, names, biases and the residual, and what stands beside them."""
    if not multimodal.has(name):
        pytest.skip("this transformers has no such architecture")
    multimodal.write(name, tmp_path / "model")
    own = multimodal.MULTIMODALS[name].files
    quantize_model(tmp_path / "model", tmp_path / "out", [KIND], dtype="f32")
    file, residual = (tmp_path / "out" / each for each in (f"{KIND}-0.uqff", "residual.safetensors"))
    residual = multimodal.forgetful_residual(name, residual, tmp_path / residual.name)
    assert {each.name: digest(each) for each in (file, residual)} == DOCUMENT["digests"][name]
    assert not own or json.loads((tmp_path / "out/config.json").read_text()) == {
        **json.loads((tmp_path / "model" / own["config.json"]).read_text()),
        "quantization_config": {"quant_method": "uqff"},
    }
    for each in ("preprocessor_config.json", "processor_config.json"):
        source, copied = tmp_path / "model" / each, tmp_path / "out" / each
        assert copied.exists() is source.exists()
        assert not source.exists() or copied.read_bytes() == source.read_bytes()


def test_voxtral_beside_the_names_of_transformers(tmp_path: Path) -> None:
    """Its repositories have both layouts; the engine's is taken, and what is made of it is a checkpoint again."""
    made, quantised = tmp_path / "model", tmp_path / "out" / f"{KIND}-0.uqff"
    multimodal.write("Voxtral", made)
    named = {"architectures": ["VoxtralRealtimeForConditionalGeneration"], "model_type": "voxtral_realtime"}
    (made / "config.json").write_text(json.dumps(named))
    save_file({"model.norm.weight": np.zeros(1, np.float32)}, made / "model.safetensors")
    (made / "tekken.json").write_text("{}")
    quantize_model(made, tmp_path / "out", [KIND], dtype="f32")
    assert digest(quantised) == DOCUMENT["digests"]["Voxtral"][quantised.name]
    assert (tmp_path / "out" / "tekken.json").read_text() == "{}"
    dequantize_model(tmp_path / "out", tmp_path / "plain")
    quantize_model(tmp_path / "plain", tmp_path / "again", [KIND], dtype="f32")
    assert (tmp_path / "again" / quantised.name).read_bytes() == quantised.read_bytes()


def test_the_layout_of_other_models_is_theirs(tmp_path: Path) -> None:
    """Where a model has a configuration of another architecture, `params.json` is not looked at."""
    made = tmp_path / "model"
    multimodal.write("Voxtral", made)
    (made / "config.json").write_text('{"architectures": ["MistralForCausalLM"]}')
    with open_tensors(made) as tensors:
        assert tensors.config == {"architectures": ["MistralForCausalLM"]}
        assert tensors.config_path == made / "config.json"
    (made / "config.json").unlink()
    with open_tensors(made) as tensors:
        assert tensors.config_path == made / "params.json"
    (made / "params.json").write_text('{"dim": 64}')
    with open_tensors(made) as tensors:
        assert tensors.config == {}
