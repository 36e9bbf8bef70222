"""A product straight from the codes, as layers make it, beside the dense ones that it replaces.

Every type against ``torch.nn.functional.linear`` of the weight as plain float32 and bfloat16, against dequantising
before each product (what layers do where there is no kernel), and against a plain read of the stored bytes on as many
threads.  One row is multiplied in the engine's arithmetic, too, where that is another.  Weights up to some 30 MB may
stay in a processor's last cache, in all columns alike.
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

__all__ = ["measure", "summary"]

SIDE = 4096
ROUNDS = 21
BATCHES = (1, 8, 64)
KINDS = ("Q4_0", "Q8_0", "Q2K", "Q3K", "Q4K", "Q5K", "Q6K", "AFQ4", "HQQ4/0", "FP8", "F8Q8", "MXFP4")
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
        layer, as_engine = ReplicatedLayer(record), ReplicatedLayer(record)
        as_engine.arithmetic = "engine"
        integers = isinstance(as_engine.quantized_act_type(), str)
        for batch in BATCHES:
            x = torch.randn(batch, SIDE, generator=generator)
            tasks: dict[str, Callable[[], object]] = {
                "layer": partial(layer, x),
                "linear": partial(torch.nn.functional.linear, x, plain),
                "half": partial(torch.nn.functional.linear, x.bfloat16(), half),
                "dequantised": partial(_dequantised, record, x),
                "read": _read(record),
            }
            if integers and batch == 1:
                # Behind a read, as the other is: after each of its products torch's threads spin for a while.
                tasks |= {"engine": partial(as_engine, x), "read again": tasks["read"]}
            with torch.inference_mode():
                found = in_turn(tasks, ROUNDS if batch == 1 else 5)
            least = {name: min(taken) for name, taken in found.items()}
            middle = {name: statistics.median(taken) for name, taken in found.items()}
            rows.append(
                {
                    "type": kind,
                    "batch": batch,
                    "product ms": _product(middle, least, "layer"),
                    "× float32": _beside(middle, least, "linear", "layer"),
                    "× bfloat16": _beside(middle, least, "half", "layer"),
                    "× dequantised": _beside(middle, least, "dequantised", "layer"),
                    "of a read": _beside(middle, least, "read", "layer"),
                    "engine's arithmetic, ms": _product(middle, least, "engine"),
                    "engine's, × float32": _beside(middle, least, "linear", "engine"),
                    "engine's, of a read": _beside(middle, least, "read", "engine"),
                    "MB": round(record.nbytes / 1e6, 1),
                }
            )
    return rows


def summary(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """The medians beside float32, a column a type, as README has them."""
    wanted = [(f"{batch} row{'s' * (batch > 1)}", batch, "× float32") for batch in BATCHES]
    wanted.insert(1, ("1 row, engine's arithmetic", 1, "engine's, × float32"))
    found = {(each["type"], each["batch"]): each for each in rows}
    table: list[dict[str, object]] = []
    for title, batch, column in wanted:
        row: dict[str, object] = {"": title}
        row |= {kind.lower(): str(found[kind, batch][column]).partition(" ")[0] for kind in KINDS}
        table.append(row)
    return table


def _product(middle: dict[str, float], least: dict[str, float], task: str) -> str:
    return f"{1e3 * middle[task]:.2f} ({1e3 * least[task]:.2f})" if task in middle else ""


def _beside(middle: dict[str, float], least: dict[str, float], other: str, task: str) -> str:
    if task not in middle:
        return ""
    return f"{middle[other] / middle[task]:.2f} ({least[other] / least[task]:.2f})"


def _dequantised(record: QuantizedTensor, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, record.dequantize())


def _read(record: QuantizedTensor) -> Callable[[], None]:
    """Every stored byte, eight at a time."""
    words = [part.array()[: part.nbytes // 8 * 8].copy().view(np.uint64) for part in record.parts.values()]

    def read() -> None:
        for each in words:
            run_ranges(lambda lo, hi, each=each: each[lo:hi].max(), len(each), grain=1 << 15)  # type: ignore[misc]

    return read
