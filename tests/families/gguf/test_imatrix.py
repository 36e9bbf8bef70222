"""K types with an importance matrix: byte for byte what the engine makes of the same matrix and weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import uqff
from tools.golden.imatrix import GOLDEN, KINDS, LAYER, MODEL


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernels", ["numba", "reference"])
def test_golden(kind: str, kernels: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UQFF_KERNELS", kernels)
    MODEL.write(tmp_path / "model")
    weight = load_file(tmp_path / "model" / "model.safetensors")[f"{LAYER}.weight"]
    importance = uqff.Importance.open(GOLDEN / "importance.imatrix").of(LAYER, weight.shape)
    made = uqff.quantize(weight, kind, importance=importance)
    assert bytes(made.parts["data"].array()) == (GOLDEN / f"{kind}.bin").read_bytes()
    assert made != uqff.quantize(weight, kind)


@pytest.mark.parametrize("kind", ["q4_0", "q8k", "afq4", "hqq4"])
def test_types_that_the_engine_makes_without(kind: str) -> None:
    weight = np.random.default_rng(3).standard_normal((4, 256), dtype=np.float32)
    assert uqff.quantize(weight, kind, importance=np.arange(256)) == uqff.quantize(weight, kind)
