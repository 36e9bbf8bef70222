"""GGUF files that are no text model."""

from __future__ import annotations

from pathlib import Path

import pytest

import uqff
from tests.support.samples_gguf import F32, gguf, pair
from uqff.conversion import uqff_of_gguf
from uqff.errors import UnsupportedError

VISION = [pair("general.architecture", "text", "clip"), pair("clip.has_vision_encoder", "bool", True)]


@pytest.mark.parametrize(
    ("pairs", "problem", "field", "got"),
    [
        (VISION, "mmproj file: the part of a model that sees or hears", "general.architecture", "vision"),
        ([*VISION, pair("general.type", "text", "mmproj")], "mmproj file", "general.type", "vision"),
        ([pair("general.architecture", "text", "llama"), pair("general.type", "text", "adapter")], "no model",
         "general.type", "adapter"),
    ],
)  # fmt: skip
def test_files_that_are_no_model(tmp_path: Path, pairs: list[bytes], problem: str, field: str, got: str) -> None:
    """Refused by name, with the reason, whoever opens them."""
    (tmp_path / "mmproj.gguf").write_bytes(gguf(pairs, [F32]))
    for opened in (
        lambda: uqff_of_gguf(tmp_path / "mmproj.gguf", tmp_path / "u"),
        lambda: uqff.open_checkpoint(tmp_path / "mmproj.gguf"),
    ):
        with pytest.raises(UnsupportedError, match=problem) as caught:
            opened()
        assert (caught.value.field, caught.value.got) == (field, got)
        assert caught.value.file == str(tmp_path / "mmproj.gguf")
