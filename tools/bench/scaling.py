"""Products by number of threads: of one weight, one and 64 rows, beside those of plain float32.

As many threads as there are CPUs at most, each number twice the one before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from tools.bench.dequantising import records
from tools.bench.machine import in_turn
from uqff.parallel import ReplicatedLayer
from uqff.system import usable_cpus

__all__ = ["measure"]

SIDE = 4096
ROUNDS = {1: 41, 64: 5}
KINDS = ("Q4_0", "Q4K", "Q6K", "Q8_0", "AFQ4", "HQQ4/0", "MXFP4", "FP8")


def measure() -> list[dict[str, object]]:
    """One row a type and product; a column a number of threads: the least milliseconds, × those of one thread."""
    rows: list[dict[str, object]] = []
    counts = [1 << i for i in range(usable_cpus().bit_length())]
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    plain = torch.randn(SIDE, SIDE, generator=generator)
    for kind, record in records(SIDE, SIDE):
        if kind not in KINDS:
            continue
        layer, as_engine = ReplicatedLayer(record), ReplicatedLayer(record)
        as_engine.arithmetic = "engine"
        for batch, rounds in ROUNDS.items():
            x = torch.randn(batch, SIDE, generator=generator)
            ways: dict[str, Callable[[], object]] = {"exact": partial(layer, x)}
            if isinstance(as_engine.quantized_act_type(), str):
                ways["engine's"] = partial(as_engine, x)
            ways["float32"] = partial(torch.nn.functional.linear, x, plain)
            found: dict[tuple[str, int], float] = {}
            for threads in counts:
                torch.set_num_threads(threads)
                for way, task in ways.items():  # not in turn: torch's threads spin for a while after a product
                    with torch.inference_mode():
                        found[way, threads] = min(in_turn({way: task}, rounds)[way])
            for way in ways:
                row: dict[str, object] = {"type": kind, "rows": batch, "what": way}
                row |= {f"{n} threads": f"{1e3 * found[way, n]:.3f}" for n in counts}
                rows.append(row | {"× one thread": round(found[way, 1] / found[way, counts[-1]], 2)})
    torch.set_num_threads(before)
    return rows
