"""Opening a file and making every layer, without touching a payload, against ``safetensors.torch.load_file``.

Bound: at most 3 times as long, resident memory grows by less than 32 MiB.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["measure"]

LAYERS = 128
ROUNDS = 9

_CHILD = """
import json, sys, time
import safetensors.torch, torch, uqff

def resident():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmRSS")).split()[1])

path, rounds = sys.argv[1], int(sys.argv[2])
ours, theirs, grown = [], [], []
for _ in range(rounds):
    start = time.perf_counter()
    tensors = safetensors.torch.load_file(path)
    theirs.append(time.perf_counter() - start)
    del tensors
    before, start = resident(), time.perf_counter()
    with uqff.open(path) as file:
        layers = [layer for _, layer in file.items()]
        ours.append(time.perf_counter() - start)
        grown.append(resident() - before)
    del layers
print(json.dumps({"ours": ours, "theirs": theirs, "grown": grown}))
"""


def _write(path: Path, kind: str) -> None:
    """A file of 1 GiB: 128 layers of 8 MiB, the same bytes in each."""
    import torch

    import uqff
    from uqff.families import AFQ, GGUF
    from uqff.families.gguf.blocks import block_type_of_kind

    rows, inputs = 2048, 4096
    if kind == "afq4":
        rows = 2**23 // (inputs // 2 + inputs // 64 * 8)
        codes = torch.randint(0, 256, (rows, inputs // 2), dtype=torch.uint8)
        weight: uqff.QuantizedTensor = AFQ(codes, torch.rand(rows, inputs // 64), torch.rand(rows, inputs // 64), 4, 64)
    else:
        block_type = block_type_of_kind(kind)
        assert block_type is not None
        row = inputs // block_type.block_size * block_type.type_size
        weight = GGUF(torch.randint(0, 256, (2**23 // row, row), dtype=torch.uint8), block_type)
    uqff.save({index: uqff.Layer(weight) for index in range(LAYERS)}, path)


def measure() -> list[dict[str, object]]:
    """One row a type: median milliseconds of either, their ratio, growth of resident memory in MiB."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind in ("q8_0", "q4k", "afq4"):
            path = Path(scratch) / f"{kind}.uqff"
            _write(path, kind)
            child = [sys.executable, "-c", _CHILD, str(path), str(ROUNDS)]
            result = json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout)
            ours, theirs = (1e3 * statistics.median(result[key]) for key in ("ours", "theirs"))
            rows.append(
                {
                    "type": kind,
                    "uqff ms": round(ours, 2),
                    "load_file ms": round(theirs, 2),
                    "ratio": round(ours / theirs, 2),
                    "resident MiB": round(max(result["grown"]) / 1024, 1),
                }
            )
            path.unlink()
    return rows
