"""A forward of one layer against ``torch.nn.functional.linear`` on the weight dequantised beforehand."""

from __future__ import annotations

from functools import partial

import torch

import uqff
from tools.bench.machine import interleaved
from uqff.parallel import ReplicatedLayer

__all__ = ["measure"]

SIZE = 4096
ROUNDS = 5
BATCHES = (1, 64)
KINDS = ("q4_0", "q8_0", "q4k", "q6k", "afq4", "hqq4", "fp8", "f8q8", "mxfp4", "unquant")


def measure() -> list[dict[str, object]]:
    """One row a type and batch: median milliseconds of either."""
    weight = torch.randn(SIZE, SIZE) * 0.02
    rows: list[dict[str, object]] = []
    for kind in KINDS:
        layer = ReplicatedLayer(uqff.quantize(weight, kind))
        plain = layer.dequantize_w(torch.float32)
        for batch in BATCHES:
            x = torch.randn(batch, SIZE)
            with torch.inference_mode():
                seconds = interleaved(
                    {
                        "layer": partial(layer, x),
                        "plain": partial(torch.nn.functional.linear, x, plain),
                    },
                    ROUNDS,
                )
            rows.append(
                {
                    "type": kind,
                    "batch": batch,
                    "layer ms": round(1e3 * seconds["layer"], 2),
                    "linear ms": round(1e3 * seconds["plain"], 2),
                    "layer / linear": round(seconds["layer"] / seconds["plain"], 2),
                    "weight MiB": round(layer.weight.nbytes / 2**20, 1),
                    "dense MiB": round(plain.nbytes / 2**20, 1),
                }
            )
    return rows
