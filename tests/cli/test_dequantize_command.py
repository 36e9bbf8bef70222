"""`uqff dequantize`: the summary, warnings, exit codes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.support.tiny_files import GOLDEN
from uqff.cli import main

TIED = GOLDEN / "llama-96-f32"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["dequantize", *map(str, arguments)])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tied model of one type."""
    directory = tmp_path / "model"
    directory.mkdir()
    for name in ("config.json", "residual.safetensors", "q4k-0.uqff"):
        shutil.copy(TIED / name, directory)
    return directory


def test_summary(model: Path, tmp_path: Path) -> None:
    """What was made, and that the model is not tied any more."""
    result = run(model, tmp_path / "out", "--dtype", "bf16")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        str(tmp_path / "out"),
        "  dtype    bfloat16",
        "  tensors  12",
        f"  files    1, {size / 1024:.1f} KiB ({size:,} bytes)",
        "  untied   the head is a matrix of its own, as the engine has it",
    ]


def test_tie_quiet_and_json(model: Path, tmp_path: Path) -> None:
    """What is left out is said, unless nothing is to be said."""
    document = json.loads(run(model, tmp_path / "a", "--tie", "embedding", "--json").stdout)
    assert document["dropped"] == ["lm_head.weight"]
    assert document["files"] == ["model.safetensors"]
    assert run(model, tmp_path / "b", "--tie", "embedding", "--quiet").output == ""


def test_shard_size(model: Path, tmp_path: Path) -> None:
    """A size with a unit; one that is none is a wrong call."""
    assert run(model, tmp_path / "out", "--shard-size", "100KB").exit_code == 0
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    result = run(model, tmp_path / "no", "--shard-size", "much")
    assert result.exit_code == 2
    assert "expected a size such as 500MB or 2GiB, got much" in result.stderr


def test_errors(model: Path, tmp_path: Path) -> None:
    """1 for a model that cannot be written, 2 for a place that is taken; nothing is made."""
    assert run(model, model).exit_code == 2
    (model / "residual.safetensors").unlink()
    result = run(model, tmp_path / "out")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "the model lacks a weight" in result.stderr
    assert not (tmp_path / "out").exists()
