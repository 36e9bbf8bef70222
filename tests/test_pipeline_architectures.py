"""Every architecture's layer order against the client: the digests of what it writes for the same tiny checkpoint."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from golden_models import GOLDEN  # puts tools on the path
from tiny_architectures import CONFIGS, KIND, shapes, tensor, write

import uqff
from uqff.pipeline import quantize_model

DOCUMENT = json.loads((GOLDEN / "ARCHITECTURES.json").read_text())


def test_every_architecture_is_there() -> None:
    """With Llama and Qwen2, which have whole golden directories; Gemma 3 is not in the client's plain loader."""
    assert set(DOCUMENT["digests"]) == set(CONFIGS)
    assert DOCUMENT["isq"] == KIND


@pytest.mark.parametrize("name", CONFIGS)
def test_the_files_are_the_clients(name: str, tmp_path: Path) -> None:
    """The whole file of layers; and the residual, but for the norms that Gemma's loader rounds on the way."""
    write(name, tmp_path / "model")
    quantize_model(tmp_path / "model", tmp_path / "out", [KIND], format="0.1", engine="0.6")
    ours = {
        file: hashlib.sha256((tmp_path / "out" / file).read_bytes()).hexdigest()
        for file in (f"{KIND}-0.uqff", "residual.safetensors")
    }
    if not name.startswith("Gemma"):
        assert ours == DOCUMENT["digests"][name]
        return
    assert ours[f"{KIND}-0.uqff"] == DOCUMENT["digests"][name][f"{KIND}-0.uqff"]
    residual = uqff.open(tmp_path / "out").residual
    expected = {each: tensor(each, shape) for each, shape in shapes(name).items() if "norm" in each or "embed" in each}
    assert {each: values.numpy().tobytes() for each, values in residual.items()} == {
        each: values.tobytes() for each, values in expected.items()
    }
