"""The quantiser in a process of its own: to kill it, or to see how far its memory grows."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

__all__ = ["run_child"]

CHILD = """
import os, resource, signal, sys
import numba
import uqff.kernels.gguf_quantize
from uqff.pipeline import quantize_model
def step(step):
    if step.layers_done == 3:
        {action}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quantize_model(sys.argv[1], sys.argv[2], ["q8_0"], format=sys.argv[3], progress=step)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((peak - before) // 1024, peak // 1024)
"""


def run_child(source: Path, out: Path, format: str, action: str) -> subprocess.CompletedProcess[str]:
    """Quantise to q8_0; ``action`` is a statement for when three layers are done. Prints the growth and the peak in MB."""
    code = textwrap.dedent(CHILD.format(action=action))
    return subprocess.run([sys.executable, "-c", code, str(source), str(out), format], capture_output=True, text=True)
