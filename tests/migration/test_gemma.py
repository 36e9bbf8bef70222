"""Gemma and Gemma 2: 0.x needs a head as layer 0, 1.0 and 1.1 have none, 1.2 has the embedding as a layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import uqff
from tests.support.golden_models import GOLDEN  # noqa: F401 puts tools on the path
from tools.tiny.architectures import write
from uqff.families import Unquant
from uqff.migration import migrate
from uqff.quantization.run import quantize_model

EMBEDDING = "model.embed_tokens.weight"


def same_files(a: Path, b: Path) -> None:
    """All but the report, in which a migrated model does not say what was asked for."""
    names = {path.name for path in a.iterdir()}
    assert {path.name for path in b.iterdir()} == names
    for name in names - {"uqff_report.json"}:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.parametrize("name", ["Gemma", "Gemma2"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_there_and_back(name: str, version: str, tmp_path: Path) -> None:
    """Layer 0 is the dense embedding, exactly; on the way up, to any version, it goes again."""
    write(name, tmp_path / "source")
    quantize_model(tmp_path / "source", tmp_path / "new", ["q8_0"], version=version)
    migrate(tmp_path / "new", tmp_path / "old", version="0.2")
    with uqff.open(tmp_path / "new") as new, uqff.open(tmp_path / "old") as old:
        assert "lm_head" not in new
        assert len(old) == len(new) + 1
        assert old["0"].weight == Unquant.of(new.residual[EMBEDDING])
        assert torch.equal(old.residual[EMBEDDING], new.residual[EMBEDDING])
    migrate(tmp_path / "old", tmp_path / "back", version=version)
    with uqff.open(tmp_path / "new") as new, uqff.open(tmp_path / "back") as back:
        assert {key: back[key] for key in back} == {key: new[key] for key in new}
    migrate(tmp_path / "back", tmp_path / "again", version="0.2")
    same_files(tmp_path / "again", tmp_path / "old")
    migrate(tmp_path / "old", tmp_path / "1.2", version="1.2")
    with uqff.open(tmp_path / "1.2") as file:
        assert "lm_head" not in file


def test_a_quantised_head_of_0_x_stays(tmp_path: Path) -> None:
    """As 0.6 writes it: it is no copy of the embedding, and 1.x loaders take it."""
    write("Gemma", tmp_path / "source")
    quantize_model(tmp_path / "source", tmp_path / "old", ["q8_0"], version="0.2")
    migrate(tmp_path / "old", tmp_path / "new", version="1.1")
    with uqff.open(tmp_path / "new") as file:
        assert file["lm_head"].weight.kind == "q8_0"
    migrate(tmp_path / "new", tmp_path / "back", version="0.2")
    same_files(tmp_path / "back", tmp_path / "old")


def test_a_quantised_embedding_is_kept_beside_1_1(tmp_path: Path) -> None:
    write("Gemma", tmp_path / "source")
    quantize_model(tmp_path / "source", tmp_path / "new", ["q8_0"])
    migrate(tmp_path / "new", tmp_path / "1.1", version="1.1")
    with uqff.open(tmp_path / "1.1" / "q8_0-0.uqff") as file:
        assert "lm_head" not in file
    assert (tmp_path / "1.1" / "q8_0.kept.safetensors").is_file()
    migrate(tmp_path / "1.1", tmp_path / "back", version="1.2")
    same_files(tmp_path / "back", tmp_path / "new")
