"""Architectures with towers against the client: digests of what 0.9.5 writes for the same tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.golden_models import GOLDEN
from tools.tiny import multimodal
from tools.tiny.digests import digest
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
    quantize_model(tmp_path / "model", tmp_path / "out", [KIND], dtype="f32")
    file, residual = (tmp_path / "out" / each for each in (f"{KIND}-0.uqff", "residual.safetensors"))
    residual = multimodal.forgetful_residual(name, residual, tmp_path / residual.name)
    assert {each.name: digest(each) for each in (file, residual)} == DOCUMENT["digests"][name]
    for each in ("preprocessor_config.json", "processor_config.json"):
        source, copied = tmp_path / "model" / each, tmp_path / "out" / each
        assert copied.exists() is source.exists()
        assert not source.exists() or copied.read_bytes() == source.read_bytes()
