"""Every architecture's layers against the clients: digests of what they write for the same tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import uqff
from tests.support.golden_models import GOLDEN
from tools.tiny.architectures import CONFIGS, shapes, tensor, write
from tools.tiny.digests import KIND, digest
from uqff.quantization.run import quantize_model

DOCUMENT = json.loads((GOLDEN / "ARCHITECTURES.json").read_text())
DOCUMENT_V1 = json.loads((GOLDEN / "v1" / "ARCHITECTURES.json").read_text())
DOCUMENTS_V1 = {
    version: json.loads((GOLDEN / "v1" / f"{version}.0" / "ARCHITECTURES.json").read_text())
    for version in ("1.0", "1.1")
}


def test_every_architecture_is_there() -> None:
    """With Llama and Qwen2, which have whole golden directories; Gemma 3 is not in the client's plain loader."""
    for document in (DOCUMENT, DOCUMENT_V1, *DOCUMENTS_V1.values()):
        assert set(document["digests"]) == set(CONFIGS)
        assert document["isq"] == KIND


@pytest.mark.parametrize("name", CONFIGS)
def test_the_files_are_the_clients(name: str, tmp_path: Path) -> None:
    """The whole file of layers; and the residual, but for the norms that Gemma's loader rounds on the way."""
    write(name, tmp_path / "model")
    quantize_model(tmp_path / "model", tmp_path / "out", [KIND], version="0.1", engine="0.6")
    ours = {file: digest(tmp_path / "out" / file) for file in (f"{KIND}-0.uqff", "residual.safetensors")}
    if not name.startswith("Gemma"):
        assert ours == DOCUMENT["digests"][name]
        return
    assert ours[f"{KIND}-0.uqff"] == DOCUMENT["digests"][name][f"{KIND}-0.uqff"]
    residual = uqff.open(tmp_path / "out").residual
    expected = {each: tensor(each, shape) for each, shape in shapes(name).items() if "norm" in each or "embed" in each}
    assert {each: values.numpy().tobytes() for each, values in residual.items()} == {
        each: values.tobytes() for each, values in expected.items()
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_the_files_of_1_2_are_the_clients(name: str, tmp_path: Path) -> None:
    """Names, stacks, embedding and head, and what is left for the residual: both files whole, but for the writer."""
    write(name, tmp_path / "model")
    quantize_model(tmp_path / "model", tmp_path / "out", [KIND])
    assert {
        file: digest(tmp_path / "out" / file) for file in (f"{KIND}-0.uqff", "residual.safetensors")
    } == DOCUMENT_V1["digests"][name]


@pytest.mark.parametrize("version", DOCUMENTS_V1)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_files_of_1_0_and_1_1_are_the_clients(name: str, version: str, tmp_path: Path) -> None:
    """The head is a layer there, also of tied models, but of Gemma and Gemma 2."""
    write(name, tmp_path / "model")
    quantize_model(tmp_path / "model", tmp_path / "out", [KIND], version=version, engine="0.8")
    assert {
        file: digest(tmp_path / "out" / file) for file in (f"{KIND}-0.uqff", "residual.safetensors")
    } == DOCUMENTS_V1[version]["digests"][name]
