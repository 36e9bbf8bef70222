"""The quantiser in a process of its own: to kill it, or to see how far its memory grows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["PEAK", "run_child"]

PEAK = """
def peak():
    # Not ru_maxrss: that begins with what the parent had, from which this process was forked.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM:"))
"""
"""Defines a function that gives the most memory that a process ever had, in MB; Linux only."""

CHILD = f"""
import os, signal, sys
import numba
import uqff.families.gguf.cpu_quantize
from uqff.quantization.run import quantize_model
def step(step):
    if step.done == 3:
        {{action}}
{PEAK}
before = peak() if sys.platform == "linux" else 0
quantize_model(sys.argv[1], sys.argv[2], ["q8_0"], version=sys.argv[3], progress=step)
print(peak() - before, peak())
"""


def run_child(source: Path, out: Path, format: str, action: str) -> subprocess.CompletedProcess[str]:
    """Quantise to q8_0 on two threads; ``action`` is a statement for when three layers are done.

    Prints by how many MB its memory grew, and the most it ever was.
    """
    code = CHILD.format(action=action)
    command = [sys.executable, "-c", code, str(source), str(out), format]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"UQFF_NUM_THREADS": "2"})
