"""Every text architecture from a checkpoint of `transformers`: names, order and bytes are the client's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.golden_models import GOLDEN
from tools.interop.architectures import NOT_WRITTEN, RENAMED, as_the_client
from tools.tiny import text
from tools.tiny.architectures import digest
from uqff.models.table import ARCHITECTURES
from uqff.quantization.run import quantize_model

DOCUMENT: dict[str, Any] = json.loads((GOLDEN / "v1" / "TEXT.json").read_text())


def test_every_text_architecture_has_a_checkpoint() -> None:
    """A new entry of the table needs one; Gemma 3 is among those with towers; of gpt-oss the client writes nothing."""
    elsewhere = ("Gemma 3 text", "gpt-oss")
    wanted = [each.title for each in ARCHITECTURES if not each.text_config and each.title not in elsewhere]
    assert sorted(text.TEXTS) == sorted(wanted)
    assert [name for name, digests in DOCUMENT["digests"].items() if digests is None] == list(NOT_WRITTEN)


@pytest.mark.parametrize("name", [name for name in text.TEXTS if name not in NOT_WRITTEN])
def test_files_are_the_clients(name: str, tmp_path: Path) -> None:
    """The file and the residual, less the bias that the client drops and under the names that it gives."""
    if not text.has(name):
        pytest.skip("this transformers has no such architecture")
    text.write(name, tmp_path / "model")
    made = quantize_model(tmp_path / "model", tmp_path / "out", [DOCUMENT["isq"]], dtype="f32")
    file = as_the_client(name, tmp_path / "out" / made.outputs[0].shards[0])
    residual = tmp_path / "out" / "residual.safetensors"
    if name in RENAMED:
        residual = _renamed(residual, *RENAMED[name])
    wanted = DOCUMENT["digests"][name]
    assert {"q8_0-0.uqff": digest(file), "residual.safetensors": digest(residual)} == wanted


def _renamed(path: Path, own: str, other: str) -> Path:
    from safetensors.numpy import load_file, save_file

    made = path.with_name("renamed.safetensors")
    tensors = {name.replace(own, other): values for name, values in load_file(path).items()}
    save_file(tensors, made, {"renamed": own})  # which the digest leaves out
    return made
