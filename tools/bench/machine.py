"""Facts of the machine a table was measured on, and how a time is taken."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["facts", "in_turn", "interleaved", "memcpy", "memset"]

PEERS = ("uqff-format", "numpy", "torch", "numba", "safetensors", "gguf", "mlx", "hqq")


def facts() -> dict[str, str]:
    """Processor, cores, system and the versions of everything measured."""
    from uqff.simd.threads import num_threads

    found = {"processor": _processor(), "cores": str(len(os.sched_getaffinity(0))), "threads": str(num_threads())}
    found["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    found["system"] = platform.platform()
    found["load when begun"] = f"{os.getloadavg()[0]:.1f}"
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
    """Median seconds of each task, see :func:`in_turn`."""
    return {name: statistics.median(taken) for name, taken in in_turn(tasks, rounds).items()}


def in_turn(tasks: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every round. One warm-up, then the tasks in turn, so that a drifting machine hits all alike."""
    for task in tasks.values():
        task()
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - start)
    return times


def memset(out: torch.Tensor) -> Callable[[], None]:
    """A task that writes every byte of ``out``, on the kernels' threads."""
    from uqff.simd.threads import run_ranges

    address = out.data_ptr()

    def fill(lo: int, hi: int) -> None:
        ctypes.memset(address + lo, 1, hi - lo)

    return lambda: run_ranges(fill, out.nbytes, grain=1 << 18)


def memcpy(source: torch.Tensor) -> Callable[[], None]:
    """A task that copies every byte of ``source`` into warm memory, on the kernels' threads."""
    from uqff.simd.memory import empty
    from uqff.simd.threads import run_ranges

    target = empty(tuple(source.shape), source.dtype).zero_()

    def copy(lo: int, hi: int) -> None:
        ctypes.memmove(target.data_ptr() + lo, source.data_ptr() + lo, hi - lo)

    return lambda: run_ranges(copy, source.nbytes, grain=1 << 18)
