"""Facts of the machine a table was measured on, and how a time is taken."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version

__all__ = ["facts", "interleaved"]

PEERS = ("uqff-format", "numpy", "torch", "numba", "safetensors", "gguf", "mlx", "hqq")


def facts() -> dict[str, str]:
    """Processor, cores, system and the versions of everything measured."""
    found = {"processor": _processor(), "cores": str(len(os.sched_getaffinity(0))), "system": platform.platform()}
    found["python"] = platform.python_version()
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def interleaved(tasks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each task. One warm-up, then the tasks in turn, so that a drifting machine hits all alike."""
    for task in tasks.values():
        task()
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}
