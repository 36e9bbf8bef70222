"""What a rank reads of a file: the bytes of its slices, and the pages that are accessed when they are loaded and used.

Bound: 1 / ranks of the file, plus one percent, of bytes.  A slice of the inputs is on every page if a row is no longer
than one (4 KiB); HQQ's slices of the outputs are above the bound, as every rank needs all scales.

Pages are counted by the processor: Linux clears the marks of accessed pages and counts those that were set again.  The
file lies in ``/dev/shm``, in pages of 4 KiB; other file systems keep files in runs of up to 2 MiB that count as one.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["measure"]

MEMORY = Path("/dev/shm")
LAYERS = 6
OUT, INPUTS = 2048, 4096

_CHILD = """
import json, sys, time
import torch, uqff
from uqff.parallel import Comm, ColumnParallelLayer, RowParallelLayer

def accessed(path):
    size, inside = 0, False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            head = line.split()
            if "-" in head[0] and ":" not in head[0]:
                inside = line.rstrip().endswith(path)
            elif inside and head[0] == "Referenced:":
                size += int(head[1])
    return size * 1024

def use(layers):
    for layer in layers:
        for buffer in layer.buffers():
            buffer.sum()

path, world, split = sys.argv[1], int(sys.argv[2]), sys.argv[3]
comm = Comm()
comm.rank, comm.world_size = world // 2, world
cls = ColumnParallelLayer if split == "outputs" else RowParallelLayer
with uqff.open(path) as file:
    use([cls.from_layer(layer, comm) for layer in file.values()])
    with open("/proc/self/clear_refs", "w") as marks:
        marks.write("1")
    start = time.perf_counter()
    layers = [cls.from_layer(layer, comm) for layer in file.values()]
    seconds = time.perf_counter() - start
    use(layers)
    held = sum(layer.weight.nbytes for layer in layers)
    print(json.dumps({"seconds": seconds, "held": held, "accessed": accessed(path)}))
"""


def _write(path: Path, kind: str) -> int:
    """A file of equal layers of arbitrary bytes; the bytes of all weights."""
    import torch

    import uqff
    from uqff.parallel.weight import WeightBuffers
    from uqff.quantization.types import meta_weight

    empty = meta_weight(kind, (OUT, INPUTS), torch.float32)
    store = WeightBuffers(empty).to_empty(device="cpu")
    for name, buffer in store.named_buffers():
        if name != "signature":
            buffer.random_(0, 256)
    weight = store.record
    uqff.save({index: uqff.Layer(weight) for index in range(LAYERS)}, path)
    return LAYERS * weight.nbytes


def measure() -> list[dict[str, object]]:
    """One row a type, split and world size: share of bytes held, share of the file's pages accessed, warm seconds."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as scratch:
        for kind in ("q4k", "afq4", "fp8", "hqq4"):
            path = Path(scratch, f"{kind}.uqff")
            whole = _write(path, kind)
            for split in ("outputs", "inputs"):
                for world in (1, 2, 4):
                    command = [sys.executable, "-c", _CHILD, str(path), str(world), split]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    seen = json.loads(done.stdout)
                    rows.append(
                        {
                            "type": kind,
                            "split": split,
                            "ranks": world,
                            "bytes held": f"{seen['held'] / whole:.1%}",
                            "pages accessed": f"{seen['accessed'] / whole:.1%}",
                            "load s": f"{seen['seconds']:.3f}",
                        }
                    )
            path.unlink()
    return rows
