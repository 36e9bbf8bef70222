"""What a model directory holds besides its layers: the residual in its load dtype, copied files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from uqff.checkpoints import open_tensors
from uqff.codes import DType
from uqff.container.queue import WriteQueue
from uqff.models.assets import COMPANIONS, Residual, copy_companions

TENSORS = {
    "norm": torch.tensor([1.0, 2.0**-9 + 1.0]),
    "half": torch.tensor([[1.5], [-2.0]], dtype=torch.float16),
    "steps": torch.tensor([1, -1], dtype=torch.int64),
    "scalar": torch.tensor(0.5),
    "nothing": torch.empty(0, 3),
    "table": torch.tensor([0.5, 1e-8], dtype=torch.float16),
}


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_floats_are_rounded_to_the_load_dtype_and_nothing_else(tmp_path: Path, dtype: DType) -> None:
    """Sizes are told beforehand, the metadata is what is given; other names stay out, and tables as they are."""
    (tmp_path / "source").mkdir()
    save_file(TENSORS | {"layer.weight": torch.ones(2, 2)}, tmp_path / "source" / "model.safetensors")
    with open_tensors(tmp_path / "source") as checkpoint:
        residual = Residual(checkpoint, TENSORS, dtype, "table".__eq__)
        with WriteQueue() as writer:
            file = residual.write(writer, tmp_path, {"who": "me"})
            writer.join()
            file.finish()
    stored = load_file(tmp_path / "residual.safetensors")
    assert list(residual.names) == list(TENSORS)
    assert residual.nbytes == sum(tensor.nbytes for tensor in stored.values())
    expected = {
        name: t.to(dtype.torch) if t.is_floating_point() and name != "table" else t for name, t in TENSORS.items()
    }
    assert stored.keys() == expected.keys()
    for name, tensor in stored.items():
        assert tensor.dtype is expected[name].dtype
        assert torch.equal(tensor, expected[name])
    header = (tmp_path / "residual.safetensors").read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"] == {"who": "me"}


def test_companions(tmp_path: Path) -> None:
    """Known names only, in their order, but for those left; a config that is told otherwise."""
    source, target = tmp_path / "a", tmp_path / "b"
    for folder in (source, target):
        folder.mkdir()
    for name in ("tokenizer.json", "config.json", "merges.txt", "secrets.txt"):
        (source / name).write_text(f'{{"file": "{name}"}}')
    (source / "vocab.json").mkdir()
    told = {"name": "é"}
    assert copy_companions(source, target, leave=["merges.txt"], config=told) == ["config.json", "tokenizer.json"]
    assert {path.name for path in target.iterdir()} == {"config.json", "tokenizer.json"}
    assert json.loads((target / "config.json").read_text("utf-8")) == told
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert copy_companions(tmp_path / "none", target) == []
    assert len(set(COMPANIONS)) == len(COMPANIONS)
