"""What ``effort="best"`` attains and takes: relative RMS error of normal weights beside the engine's, and times."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

import uqff
from uqff.families.encoding import EffortName
from uqff.quantization.error import distance
from uqff.quantization.types import kinds

REPEATS = 3
EFFORTS: tuple[EffortName, EffortName] = ("engine", "best")


def seconds(weight: npt.NDArray[np.float32], kind: str, effort: EffortName) -> float:
    """The least of several times."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        uqff.quantize(weight, kind, effort=effort)
        times.append(time.perf_counter() - start)
    return min(times)


def measure(shape: tuple[int, int] = (1024, 4096)) -> list[dict[str, object]]:
    """One row for each type."""
    weight = (np.random.default_rng(0).standard_normal(shape) * 0.02).astype(np.float32)
    rows = []
    for kind in kinds():
        made = {effort: uqff.quantize(weight, kind, effort=effort) for effort in EFFORTS}
        row: dict[str, object] = {"type": kind}
        row |= {effort: f"{distance(weight, record).relative:.5f}" for effort, record in made.items()}
        engine, best = (seconds(weight, kind, effort) for effort in EFFORTS)
        speed = f"{weight.size / best / 1e6:.0f}"
        rows.append({**row, "million weights/s": speed, "times the engine's": f"{best / engine:.1f}"})
    return rows
