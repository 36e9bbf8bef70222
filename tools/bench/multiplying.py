"""A product straight from the codes, as layers make it, beside the dense ones that it replaces.

Every type against ``torch.nn.functional.linear`` of the weight as plain float32 and bfloat16, against dequantising
before each product (what layers do where there is no kernel), and against a plain read of the stored bytes on as many
threads.  Weights up to some 30 MB may stay in a processor's last cache, in all columns alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from tools.bench.dequantising import records
from tools.bench.machine import in_turn
from uqff.families import QuantizedTensor
from uqff.parallel import ReplicatedLayer
from uqff.simd.threads import run_ranges

__all__ = ["measure"]

SIDE = 4096
ROUNDS = 21
BATCHES = (1, 8, 64)
KINDS = ("Q4_0", "Q8_0", "Q2K", "Q4K", "Q6K", "AFQ4", "HQQ4/0", "FP8", "F8Q8", "MXFP4")
"""As :mod:`tools.bench.dequantising` names them; the others are much like one of these."""


def measure() -> list[dict[str, object]]:
    """One row a type and batch; milliseconds are medians of :data:`ROUNDS` in turn, the least of them in brackets."""
    rows: list[dict[str, object]] = []
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(SIDE, SIDE, generator=generator) * 0.02
    half = plain.bfloat16()
    for kind, record in records(SIDE, SIDE):
        if kind not in KINDS:
            continue
        layer = ReplicatedLayer(record)
        for batch in BATCHES:
            x = torch.randn(batch, SIDE, generator=generator)
            with torch.inference_mode():
                found = in_turn(
                    {
                        "layer": partial(layer, x),
                        "linear": partial(torch.nn.functional.linear, x, plain),
                        "half": partial(torch.nn.functional.linear, x.bfloat16(), half),
                        "dequantised": partial(_dequantised, record, x),
                        "read": _read(record),
                    },
                    ROUNDS if batch == 1 else 5,
                )
            least = {name: min(taken) for name, taken in found.items()}
            middle = {name: statistics.median(taken) for name, taken in found.items()}
            rows.append(
                {
                    "type": kind,
                    "batch": batch,
                    "product ms": f"{1e3 * middle['layer']:.2f} ({1e3 * least['layer']:.2f})",
                    "× float32": _ratios(middle["linear"], middle["layer"], least["linear"], least["layer"]),
                    "× bfloat16": _ratios(middle["half"], middle["layer"], least["half"], least["layer"]),
                    "× dequantised": _ratios(
                        middle["dequantised"], middle["layer"], least["dequantised"], least["layer"]
                    ),
                    "of a read": _ratios(middle["read"], middle["layer"], least["read"], least["layer"]),
                    "MB": round(record.nbytes / 1e6, 1),
                }
            )
    return rows


def _ratios(a: float, b: float, least_a: float, least_b: float) -> str:
    return f"{a / b:.2f} ({least_a / least_b:.2f})"


def _dequantised(record: QuantizedTensor, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, record.dequantize())


def _read(record: QuantizedTensor) -> Callable[[], None]:
    """Every stored byte, eight at a time."""
    words = [part.array()[: part.nbytes // 8 * 8].copy().view(np.uint64) for part in record.parts.values()]

    def read() -> None:
        for each in words:
            run_ranges(lambda lo, hi, each=each: each[lo:hi].max(), len(each), grain=1 << 15)  # type: ignore[misc]

    return read
