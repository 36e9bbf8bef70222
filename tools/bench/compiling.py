"""What the first use of kernels costs: compiling them, against reading them from the cache of an earlier run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

__all__ = ["measure"]

_CHILD = """
import sys, time
import torch, uqff
kind = sys.argv[1]
weight = torch.randn(64, 4096)
start = time.perf_counter()
uqff.quantize(weight, kind).dequantize()
first = time.perf_counter() - start
start = time.perf_counter()
uqff.quantize(weight, kind).dequantize()
print(first - (time.perf_counter() - start))
"""


def measure() -> list[dict[str, object]]:
    """One row a type: seconds before the first result, in the first process ever and in the next."""
    rows: list[dict[str, object]] = []
    for kind in ("q4_0", "q4k", "q6k", "afq4", "hqq4", "fp8", "f8q8", "mxfp4"):
        with tempfile.TemporaryDirectory() as cache:
            child = [sys.executable, "-c", _CHILD, kind]
            environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
            first, next_ = (
                float(subprocess.run(child, check=True, capture_output=True, text=True, env=environment).stdout)
                for _ in range(2)
            )
        rows.append({"type": kind, "compiling s": round(first, 2), "cached s": round(next_, 2)})
    return rows
