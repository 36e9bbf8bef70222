"""Quantising a whole checkpoint to q4k: ``uqff quantize`` against the engine, each as a process with start-up.

With ``--quiet`` no errors are measured, which the engine does not either; the table has our time with them too.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from tools.bench.processes import Usage, run
from tools.interop.install import install_client

__all__ = ["DIMENSIONS", "ENGINE_VERSION", "engine_command", "make", "measure", "our_command"]

ENGINE_VERSION = "0.9.5"
LAYERS = {"250 M": 5, "1 B": 20}
ROUNDS = 5
CLIENT = Path(__file__).resolve().parents[1] / "interop" / "client.py"
DIMENSIONS = "hidden size 2048, intermediate size 5632, bfloat16"


def engine_command(client: Path, model: Path, out: Path, kind: str) -> list[str]:
    """The engine as a process that quantises a model to one type, on all cores."""
    which = {"model_id": str(model), "arch": "llama", "dtype": "BF16", "write_uqff": str(out / f"{kind}.uqff")}
    return [str(client), str(CLIENT), json.dumps({"do": "load", "which": which, "isq": kind})]


def our_command(model: Path, out: Path, kind: str, *more: str) -> list[str]:
    """The same with uqff."""
    return [sys.executable, "-m", "uqff", "quantize", str(model), str(out), "--isq", kind, *(more or ("--quiet",))]


def make(model: Path, layers: int) -> int:
    """Write a random llama; gives the weights of its layers. In a process of its own: this one stays small."""
    maker = multiprocessing.get_context("spawn").Process(target=_write, args=(model, layers))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise RuntimeError(f"the model was not made: exit code {maker.exitcode}")
    return sum(
        math.prod(shape) for name, shape in _model(layers).shapes().items() if len(shape) == 2 and "embed" not in name
    )


def _write(model: Path, layers: int) -> None:
    _model(layers).write(model)


def _model(layers: int):  # type: ignore[no-untyped-def]
    from tools.tiny.models import TinyModel

    return TinyModel("llama", 2048, 5632, 16, 16, layers, 512, weight_dtype="BF16")


def measure() -> list[dict[str, object]]:
    """One row a size: median seconds and peak MiB of either."""
    client = install_client(ENGINE_VERSION)
    rows: list[dict[str, object]] = []
    for size, layers in LAYERS.items():
        with tempfile.TemporaryDirectory() as scratch:
            model, ours, theirs = (Path(scratch) / name for name in ("model", "ours", "theirs"))
            make(model, layers)
            commands = {
                "uqff": our_command(model, ours, "q4k"),
                "measured": our_command(model, ours, "q4k", "--json"),
                "engine": engine_command(client, model, theirs, "q4k"),
            }
            found: dict[str, list[Usage]] = {name: [] for name in commands}
            for turn in range(ROUNDS + 1):
                for name, command in commands.items():
                    for out in (ours, theirs):
                        shutil.rmtree(out, ignore_errors=True)
                    theirs.mkdir()
                    usage = run(command)
                    if turn:
                        found[name].append(usage)
            seconds = {name: statistics.median(each.seconds for each in usages) for name, usages in found.items()}
            peaks = {name: max(each.peak_mib for each in usages) for name, usages in found.items()}
            rows.append(
                {
                    "weights": size,
                    "uqff s": round(seconds["uqff"], 2),
                    "with errors s": round(seconds["measured"], 2),
                    "engine s": round(seconds["engine"], 2),
                    "uqff / engine": round(seconds["uqff"] / seconds["engine"], 3),
                    "uqff peak MiB": round(peaks["uqff"]),
                    "engine peak MiB": round(peaks["engine"]),
                }
            )
    return rows
