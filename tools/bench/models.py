"""Quantising a whole checkpoint to q4k: ``uqff quantize`` against the engine, each as a process with start-up."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from interop import install_client
from tiny_models import TinyModel

__all__ = ["measure"]

ENGINE_VERSION = "0.9.5"
LAYERS = {"250 M": 5, "1 B": 20}
ROUNDS = 3
CLIENT = Path(__file__).resolve().parents[1] / "client.py"


def _run(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MiB of a process."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"exit code {child.returncode}: {' '.join(command)}")
    return seconds, usage.ru_maxrss / 1024


def _engine(client: Path, model: Path, out: Path) -> list[str]:
    which = {"model_id": str(model), "arch": "llama", "dtype": "BF16", "write_uqff": str(out / "q4k.uqff")}
    job = {"do": "load", "which": which, "isq": "q4k"}
    return [str(client), str(CLIENT), json.dumps(job)]


def _ours(model: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "uqff", "quantize", str(model), str(out), "--isq", "q4k", "--quiet"]


def _make(model: Path, layers: int) -> None:
    TinyModel("llama", 2048, 5632, 16, 16, layers, 512, weight_dtype="BF16").write(model)


def measure() -> list[dict[str, object]]:
    """One row a size: median seconds and peak MiB of either."""
    client = install_client(ENGINE_VERSION)
    rows: list[dict[str, object]] = []
    for size, layers in LAYERS.items():
        with tempfile.TemporaryDirectory() as scratch:
            model, ours, theirs = (Path(scratch) / name for name in ("model", "ours", "theirs"))
            # In a process of its own: a child's peak begins at what its parent has resident when it is started.
            maker = multiprocessing.get_context("spawn").Process(target=_make, args=(model, layers))
            maker.start()
            maker.join()
            found: dict[str, list[tuple[float, float]]] = {"uqff": [], "engine": []}
            for turn in range(ROUNDS + 1):
                for name, out, command in (
                    ("uqff", ours, _ours(model, ours)),
                    ("engine", theirs, _engine(client, model, theirs)),
                ):
                    shutil.rmtree(out, ignore_errors=True)
                    if name == "engine":
                        out.mkdir()
                    result = _run(command)
                    if turn:
                        found[name].append(result)
            seconds = {name: statistics.median(s for s, _ in runs) for name, runs in found.items()}
            peaks = {name: max(p for _, p in runs) for name, runs in found.items()}
            rows.append(
                {
                    "weights": size,
                    "uqff s": round(seconds["uqff"], 2),
                    "engine s": round(seconds["engine"], 2),
                    "uqff / engine": round(seconds["uqff"] / seconds["engine"], 3),
                    "uqff peak MiB": round(peaks["uqff"]),
                    "engine peak MiB": round(peaks["engine"]),
                }
            )
    return rows
