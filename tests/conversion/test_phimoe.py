"""Phi-3.5-MoE, whose files do not say what its rope scaling multiplies by, unless they were made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from tools.tiny.gguf import checkpoint_of, write_checkpoint
from uqff.checkpoints import open_gguf
from uqff.container.document import write_json
from uqff.conversion import gguf_of_uqff, uqff_of_gguf
from uqff.errors import FormatError, UnsupportedError

SCALING = {
    "type": "longrope",
    "short_factor": [1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75],
    "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
    "short_mscale": 1.25,
    "long_mscale": 1.25,
    "original_max_position_embeddings": 128,
}
ATTENTION = "phimoe.rope.scaling.attn_factor"


def write(folder: Path, **changed: Any) -> Path:
    """A file as llama.cpp's converter makes it, and the model's own configuration, with something changed."""
    config, tensors = checkpoint_of("Phi-3.5-MoE")
    config |= {"original_max_position_embeddings": 128, "rope_scaling": SCALING | changed}
    write_checkpoint(config, tensors, folder / "a.gguf", "q8_0", vocabulary=True)
    (folder / "checkpoint").mkdir()
    write_json(folder / "checkpoint/config.json", config)
    save_file(tensors, folder / "checkpoint/model.safetensors")
    return folder / "checkpoint"


def stated(path: Path) -> float:
    with open_gguf(path) as file:
        return float(file.pairs[ATTENTION].value)


def test_scales_are_the_configurations(tmp_path: Path) -> None:
    """What the converter writes follows from the lengths, whatever the model has: its own configuration must say."""
    assets = write(tmp_path)
    with pytest.raises(UnsupportedError, match=r"what longrope multiplies by is not in the file.*--assets") as caught:
        uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    assert caught.value.field == ATTENTION
    result = uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u", assets=assets)
    assert "config.json has the last word on short_mscale and long_mscale" in result.notes
    gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf")  # which is the file again
    assert stated(tmp_path / "b.gguf") == stated(tmp_path / "a.gguf") == pytest.approx(1.19523, abs=1e-5)


def test_scales_of_a_file_that_was_made_here(tmp_path: Path) -> None:
    """llama.cpp multiplies by what a file says: of one that says the model's number, a configuration is made."""
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u", assets=write(tmp_path))
    (tmp_path / "u/metadata.gguf").unlink()
    gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf")
    assert stated(tmp_path / "b.gguf") == 1.25
    uqff_of_gguf(tmp_path / "b.gguf", tmp_path / "v")
    config = json.loads((tmp_path / "v/config.json").read_text())
    scaling = {key: value for key, value in SCALING.items() if key != "original_max_position_embeddings"}
    assert {key: config["rope_scaling"][key] for key in scaling} == scaling
    assert config["original_max_position_embeddings"] == 128
    gguf_of_uqff(tmp_path / "v", tmp_path / "c.gguf")
    assert (tmp_path / "c.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize(
    ("changed", "error", "field"),
    [
        ({"long_mscale": 1.5}, UnsupportedError, "rope_scaling.long_mscale"),
        ({"short_mscale": None, "long_mscale": None}, FormatError, "rope_scaling.short_mscale"),
        ({"short_mscale": True, "long_mscale": True}, FormatError, "rope_scaling.short_mscale"),
    ],
)
def test_scales_that_no_file_can_say(
    tmp_path: Path, changed: dict[str, Any], error: type[Exception], field: str
) -> None:
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u", assets=write(tmp_path))
    path = tmp_path / "u/config.json"
    config = json.loads(path.read_text())
    path.unlink()
    write_json(path, {**config, "rope_scaling": {**config["rope_scaling"], **changed}})
    with pytest.raises(error) as caught:
        gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf")
    assert getattr(caught.value, "field", None) == field
