"""Repositories that transformers loads: it fetches configuration and residual, the package the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import uqff
from tests.support.golden_models import TinyModel
from tests.support.hub_server import Hub
from tests.support.small_models import files_of
from uqff.integrations.transformers import READS_SINCE, UqffConfig

NAME = "owner/name"
MAJOR = int(transformers.__version__.partition(".")[0])

pytestmark = pytest.mark.skipif(MAJOR < READS_SINCE, reason="transformers before 5 reads no directory of UQFF")


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UQFF_KERNELS", "reference")


def same_logits(model: Any, other: Any) -> bool:
    ids = torch.tensor([[1, 5, 9, 30]])
    with torch.inference_mode():
        return torch.equal(model(ids).logits, other(ids).logits)


def test_a_repository_of_uqff(hub: Hub, tmp_path: Path) -> None:
    """By its name, and at a revision; what is on the main branch since then is not taken."""
    for name, seed in (("old", 0), ("new", 1)):
        TinyModel(hidden_size=64, intermediate_size=64, heads=2, layers=2, seed=seed).write(tmp_path / name)
        uqff.quantize_model(tmp_path / name, tmp_path / f"{name}-q8_0", "q8_0", measure=False)
    commit = hub.put(NAME, files_of(tmp_path / "old-q8_0"))
    old = transformers.AutoModelForCausalLM.from_pretrained(NAME)
    assert same_logits(old, uqff.load_model(tmp_path / "old-q8_0"))
    hub.put(NAME, files_of(tmp_path / "new-q8_0"))
    new = transformers.AutoModelForCausalLM.from_pretrained(NAME)
    assert same_logits(new, uqff.load_model(tmp_path / "new-q8_0"))
    assert not same_logits(new, old)
    assert same_logits(transformers.AutoModelForCausalLM.from_pretrained(NAME, revision=commit), old)


def test_a_repository_of_a_checkpoint(hub: Hub, tmp_path: Path) -> None:
    """It is quantised while it is loaded."""
    TinyModel(hidden_size=64, intermediate_size=64, heads=2, layers=1).write(tmp_path / "source")
    hub.put("owner/plain", files_of(tmp_path / "source"))
    model = transformers.AutoModelForCausalLM.from_pretrained("owner/plain", quantization_config=UqffConfig("q8_0"))
    assert same_logits(model, uqff.load_model(tmp_path / "source", isq="q8_0"))
