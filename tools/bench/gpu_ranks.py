"""``python -m tools.bench.gpu_ranks``: tokens a second of a Llama of 13 or 35 billion weights on one and more GPUs.

Its layers are a few quantised rows, repeated. Each number of ranks runs under torchrun, with NCCL. A tiny model in
float32 must answer with the same tokens on each; so are its log probabilities, up to the order of sums.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

from tools.bench import gpu_model
from tools.bench.__main__ import markdown
from tools.bench.sharding import MEMORY
from tools.tiny.models import TinyModel

__all__ = ["main"]

SIZES = {
    "13 B": {"HIDDEN": 5120, "INNER": 13824, "LAYERS": 40, "VOCABULARY": 32768, "HEADS": 40, "KV_HEADS": 8},
    "35 B": {"HIDDEN": 8192, "INNER": 28672, "LAYERS": 40, "VOCABULARY": 32768, "HEADS": 64, "KV_HEADS": 8},
}
"""The second is half of the layers of a Llama of 70 billion weights."""

TINY = TinyModel(hidden_size=512, intermediate_size=1024, heads=8, kv_heads=4, layers=3, vocab_size=256, std=0.08)

_CHILD = """
import json, sys, time
from pathlib import Path
import torch
from tools.bench import gpu_model
from uqff.parallel import load_model
from uqff.parallel.generate import generate
from uqff.parallel.ranks import device_of, joined

large, tiny, out = (Path(each) for each in sys.argv[1:])
device = device_of("cuda")
torch.cuda.set_device(device)
with joined(device, 120) as comm:
    model = load_model(tiny, comm, device=device, dtype=torch.float32, isq="q4k")
    answer = generate(model, [5, 9, 17, 30], 48, comm=comm)
    said = {"ids": answer.ids, "logprobs": answer.logprobs}
    start = time.perf_counter()
    model = load_model(large, comm, device=device, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    said["load s"] = time.perf_counter() - start
    said["tokens/s"] = gpu_model.rate(model, comm)
    said["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    if comm.rank == 0:
        out.write_text(json.dumps(said))
    comm.barrier()
"""


def answers(folder: Path, large: Path, tiny: Path, world: int) -> dict[str, Any]:
    """What rank 0 of so many says."""
    child, out = folder / "child.py", folder / f"{world}.json"
    child.write_text(_CHILD)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command = [sys.executable, *torchrun, str(child), str(large), str(tiny), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    said: dict[str, Any] = json.loads(out.read_text())
    return said


@click.command()
@click.option("--kind", "kinds", multiple=True, default=["q4k"], help="Only these.")
@click.option("--size", type=click.Choice(list(SIZES)), default="13 B", help="Of the model.")
@click.option("--kept", type=click.Path(path_type=Path), default=Path("/tmp/tiles"), help="Where quantised rows lie.")
def main(kinds: tuple[str, ...], size: str, kept: Path) -> None:
    """Print the table; exit code 1 if tokens differ."""
    vars(gpu_model).update(SIZES[size])
    rows: list[dict[str, object]] = []
    same = True
    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as scratch:
        folder = Path(scratch)
        tiny = folder / "tiny"
        TINY.write(tiny)
        for kind in kinds:
            large = folder / kind
            large.mkdir()
            written = gpu_model.write(large, kind, kept)
            torch.cuda.empty_cache()
            first: dict[str, Any] = {}
            for world in (n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count()):
                said = answers(folder, large, tiny, world)
                first = first or said
                apart = max(abs(a - b) for a, b in zip(said["logprobs"], first["logprobs"], strict=True))
                same = same and said["ids"] == first["ids"]
                rows.append(
                    {
                        "weights": size,
                        "type": kind,
                        "GPUs": world,
                        "file GiB": round(written / 2**30, 2),
                        "tokens/s": round(said["tokens/s"], 1),
                        "× one": round(said["tokens/s"] / first["tokens/s"], 2),
                        "GiB of rank 0": round(said["GiB"], 2),
                        "load s": round(said["load s"], 2),
                        "float32 tokens": "the same" if said["ids"] == first["ids"] else "others",
                        "log probabilities": f"{apart:.0e}",
                    }
                )
                print(rows[-1], flush=True)
    print(markdown(rows))
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
