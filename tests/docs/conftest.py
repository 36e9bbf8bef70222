"""A tiny model in every form that pages and examples begin with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import uqff
from tests.support.lora_files import factors, write_adapter
from tools.tiny.models import TinyModel

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="package")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: ``checkpoint``, ``adapter``, ``recipe.yaml``, ``text.txt``, ``model``, ``old`` and ``model.gguf``."""
    folder = tmp_path_factory.mktemp("given")
    TinyModel(layers=4, intermediate_size=256, tied=True).write(folder / "checkpoint")
    write_adapter(folder / "adapter", factors("model.layers.0.mlp.up_proj", 256, 256))
    page = (ROOT / "docs/pages/tasks/recipes.md").read_text("utf-8")
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (folder / "recipe.yaml").write_text(recipe)
    (folder / "text.txt").write_text(" ".join(f"t{3 + at * at % 61}" for at in range(300)))
    uqff.quantize_model(folder / "checkpoint", folder / "model", ["q4k"])
    uqff.quantize_model(folder / "checkpoint", folder / "old", ["q8_0"], version="0.2")
    plain = tmp_path_factory.mktemp("plain") / "plain"
    uqff.quantize_model(folder / "checkpoint", plain, ["q8_0"])
    uqff.convert(plain, folder / "model.gguf")
    return folder
