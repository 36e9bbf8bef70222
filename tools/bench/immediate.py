"""Quantising a checkpoint while it is loaded, by the number of workers: seconds, and the memory that it takes.

Each in a process of its own, page cache warm; seconds are those of a second time, when kernels are there.
``grew by`` is the peak of the process less what it had
when torch and transformers were imported; the bound is the quantised size and ``workers + 1`` of the largest layer.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.bench.models import make

__all__ = ["measure"]

KIND = "q4k"
WORKERS = (1, 2, 4, 8, 16)
LAYERS = 5
ROUNDS = 3
LARGEST = 2 * 2048 * 5632
"""Bytes of the largest layer."""

_CHILD = """
import json, sys, time
import torch
import transformers.models.llama.modeling_llama  # not part of the time
import uqff

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024

uqff.quantize(torch.ones(256, 2048, dtype=torch.bfloat16), sys.argv[2])
before = peak()
model = uqff.load_model(sys.argv[1], isq=sys.argv[2], workers=int(sys.argv[3]))
grew = peak() - before
held = {part.data_ptr(): part.nbytes for part in (*model.buffers(), *model.parameters())}
del model
start = time.perf_counter()
uqff.load_model(sys.argv[1], isq=sys.argv[2], workers=int(sys.argv[3]))
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "grew": grew, "held": sum(held.values())}))
"""


def measure() -> list[dict[str, object]]:
    """One row a number of workers: median seconds, most memory."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch, "model")
        weights = make(model, LAYERS)
        for workers in WORKERS:
            found = [_run(model, workers) for _ in range(ROUNDS + 1)][1:]
            seconds = statistics.median(each["seconds"] for each in found)
            held, grew = found[0]["held"], max(each["grew"] for each in found)
            rows.append(
                {
                    "workers": workers,
                    "seconds": f"{seconds:.2f}",
                    "million weights/s": f"{weights / 1e6 / seconds:.0f}",
                    "held MiB": f"{held / 2**20:.0f}",
                    "grew by MiB": f"{grew / 2**20:.0f}",
                    "bound MiB": f"{(held + (workers + 1) * LARGEST) / 2**20:.0f}",
                }
            )
    return rows


def _run(model: Path, workers: int) -> dict[str, float]:
    command = [sys.executable, "-c", _CHILD, str(model), KIND, str(workers)]
    made: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return made
