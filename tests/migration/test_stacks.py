"""Stacks of experts that 1.1 quantises as one weight, on their way to 0.x."""

from __future__ import annotations

from pathlib import Path

import pytest

import uqff
from tests.support.golden_models import GOLDEN  # noqa: F401 puts tools on the path
from tests.support.roundtrip import same_bytes
from tools.golden.v1 import TinyMixtral
from uqff.checkpoints.model import ModelDirectory
from uqff.errors import UnsupportedError
from uqff.migration import migrate, plan_migration
from uqff.quantization.run import quantize_model


@pytest.mark.parametrize(("experts", "fits"), [(4, True), (3, False)])
def test_hqq_experts_leave_their_stack_exactly_or_not_at_all(tmp_path: Path, experts: int, fits: bool) -> None:
    """As 1.1 has them, quantised as one: where groups are cut alike, and said to grow; else refused."""
    TinyMixtral(experts=experts).write(tmp_path / "source")
    quantize_model(tmp_path / "source", tmp_path / "new", ["hqq8"], version="1.1")
    with ModelDirectory(tmp_path / "new") as directory:
        plan = plan_migration(directory, "0.2")
    if fits:
        assert any("times as large: each expert needs the scales of all" in warning for warning in plan.warnings)
        migrate(tmp_path / "new", tmp_path / "old", version="0.2")
        migrate(tmp_path / "old", tmp_path / "back", version="1.1")
        with uqff.open(tmp_path / "new") as new, uqff.open(tmp_path / "back") as back:
            assert {key: back[key] for key in back} == {key: new[key] for key in new}
        return
    with pytest.raises(UnsupportedError, match=r"3 layers cannot .*--plain-experts.*groups run from one expert"):
        migrate(tmp_path / "new", tmp_path / "old", version="0.2")
    migrate(tmp_path / "new", tmp_path / "old", version="0.2", plain_experts=True)
    with uqff.open(tmp_path / "new") as new, uqff.open(tmp_path / "old") as old:
        stack = new["model.layers.0.block_sparse_moe.experts.gate_proj"].weight.dequantize()
        for expert in range(3):
            assert same_bytes(old[str(6 + 3 * expert)].weight.dequantize(), stack[expert])
