"""Numbers of a file of Hessians that nothing can be made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from uqff.errors import FormatError
from uqff.importance.hessians import COUNTS, FORMAT, VERSION, Hessians, HessianWriter


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -1])
def test_numbers_of_no_inputs_are_refused(tmp_path: Path, wrong: float) -> None:
    """The file is blamed and the layer; not the weight, whose feedback would be NaN, or left out without a word."""
    writer = HessianWriter(tmp_path / "h", {"a.up_proj": (2, 2), "a.down_proj": (2, 2)})
    writer.add("a.up_proj", np.array([[1, 0], [0, wrong]], np.float32), np.ones(1, np.int64))
    writer.add("a.down_proj", np.eye(2, dtype=np.float32), np.ones(1, np.int64))
    writer.finish()
    writer.close()
    with Hessians(tmp_path / "h") as found:
        sound, broken = found.layer("a.down_proj", (1, 2)), found.layer("a.up_proj", (1, 2))
        assert sound is not None
        assert broken is not None
        assert sound.read().tolist() == [[[1, 0], [0, 1]]]
        with pytest.raises(FormatError, match="not XᵀX of any inputs: expected finite numbers") as caught:
            broken.read()
        assert (caught.value.layer, caught.value.field) == ("a.up_proj", "hessian")


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (1, 2, 3), (1, 1, 2, 2)])
def test_shapes_that_are_no_squares_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors: dict[str, np.ndarray[Any, Any]] = {"a": np.ones(shape, np.float32), f"a{COUNTS}": np.ones(1, np.int64)}
    save_file(tensors, tmp_path / "h", {"format": FORMAT, "version": VERSION})
    with pytest.raises(FormatError, match="not XᵀX of a layer") as caught:
        Hessians(tmp_path / "h")
    assert (caught.value.layer, caught.value.file) == ("a", str(tmp_path / "h"))
