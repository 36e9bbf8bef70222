"""Pipes and devices where a model directory has files: refused by name, and neither waited for nor passed over."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import uqff
from uqff.container.document import is_present
from uqff.inspection.checksum import files_of

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX")


def _model(folder: Path) -> Path:
    folder.mkdir()
    weight = uqff.quantize(np.eye(32, dtype=np.float32), "q8_0")
    uqff.save({0: weight, 1: weight}, folder / "m-0.uqff", shard_bytes=1)
    return folder


def _refused(path: Path) -> Any:
    return pytest.raises(uqff.FormatError, match=rf"^not a regular file .*{re.escape(str(path))}")


def test_a_shard(tmp_path: Path) -> None:
    """In the place of the last one, it would make a whole set of fewer layers."""
    folder = _model(tmp_path / "a")
    last = folder / "m-1.uqff"
    last.unlink()
    with uqff.open(folder) as file:
        assert list(file) == ["0"]  # before 1.0, nothing tells how many there were
    os.mkfifo(last)
    for path in (folder, folder / "m-0.uqff"):
        with _refused(last):
            uqff.open(path)


def test_a_file_of_another_model_is_not_in_the_way(tmp_path: Path) -> None:
    """Of a set that is named, nothing else matters; of a directory, all models do."""
    folder = _model(tmp_path / "a")
    os.mkfifo(folder / "other.uqff")
    with uqff.open(folder / "m-0.uqff") as file:
        assert list(file) == ["0", "1"]
    with _refused(folder / "other.uqff"):
        uqff.open(folder)


def test_the_residual_and_the_configuration(tmp_path: Path) -> None:
    """A model without them is another: tensors would be missing, layers without names."""
    folder = _model(tmp_path / "a")
    os.mkfifo(folder / "residual.safetensors")
    os.mkfifo(folder / "config.json")
    with uqff.open(folder) as file, _refused(folder / "residual.safetensors"):
        _ = file.residual
    with _refused(folder / "config.json"):
        uqff.dequantize_model(folder, tmp_path / "out")
    with _refused(folder / "residual.safetensors"):
        uqff.migrate(folder, tmp_path / "out")
    assert not uqff.verify(folder).clean
    assert not (tmp_path / "out").exists()


def test_lists_of_checksums(tmp_path: Path) -> None:
    """A list without what stands there would say that all is as it was; so would one without a link to nowhere."""
    folder = _model(tmp_path / "a")
    makers: list[Callable[[Path], None]] = [os.mkfifo, lambda path: path.symlink_to(tmp_path / "none")]
    for make in makers:
        make(folder / "config.json")
        with _refused(folder / "config.json"):
            files_of(folder)
        (folder / "config.json").unlink()
    assert files_of(folder) == (folder, ["m-0.uqff", "m-1.uqff"])


def test_is_present(tmp_path: Path) -> None:
    """Files are, directories and what is not there are not, the rest is refused."""
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    assert is_present(tmp_path / "file")
    assert not is_present(tmp_path)
    assert not is_present(tmp_path / "none")
    assert not is_present(tmp_path / "file" / "below")
    with _refused(tmp_path / "pipe"):
        is_present(tmp_path / "pipe")
