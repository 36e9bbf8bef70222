"""K types with an importance matrix: byte for byte what the engine makes of the same matrix and weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import uqff
from tools.golden.imatrix import GOLDEN, KINDS, LAYER, MODEL
from uqff.families.gguf import cpu_imatrix, reference_imatrix


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


@pytest.mark.parametrize("name", cpu_imatrix.QUANTIZERS)
def test_kernel_equals_reference(name: str) -> None:
    """Of zeros, constant, positive and subnormal weights, of large ones, of such without importance, too."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((48, 256), dtype=np.float32)
    x[0], x[1], x[2], x[3, :32] = 0, 0.5, np.abs(x[2]), -1
    x[4], x[5], x[6, ::9] = x[4] * 1e-40, x[5] * 1e30, x[6, ::9] * 1e4
    importance = rng.exponential(1, x.shape).astype(np.float32)
    importance[7], importance[8, :40] = 0, 0
    made = cpu_imatrix.QUANTIZERS[name](x, importance)
    assert made.tobytes() == reference_imatrix.QUANTIZERS[name](x, importance).tobytes()


@pytest.mark.parametrize("kind", ["q4_0", "q8k", "afq4", "hqq4"])
def test_types_that_the_engine_makes_without(kind: str) -> None:
    weight = np.random.default_rng(3).standard_normal((4, 256), dtype=np.float32)
    assert uqff.quantize(weight, kind, importance=np.arange(256)) == uqff.quantize(weight, kind)
