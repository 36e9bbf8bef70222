"""The notebook in ``examples/`` runs, cell by cell, and is committed without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_files import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_cells_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one space of names, in a folder of their own, as a kernel would run them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UQFF_KERNELS", "reference")  # nothing is compiled
    notebook = json.loads(path.read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    space: dict[str, Any] = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            exec(compile("".join(cell["source"]), f"{path.name}, {cell['id']}", "exec"), space)
    assert space["same"]
    assert space["found"].clean
    assert capsys.readouterr().out.endswith("1.x [(3, 'q4_0')] 4.50 bits/weight\nclean\n")


def test_there_is_one() -> None:
    """An empty folder would pass."""
    assert NOTEBOOKS
