"""Kernels give the bits of the reference where features of this CPU are hidden; `make cpus` runs all tests so."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.long

CHILD = """
import os
import numpy as np
import torch
import uqff
from uqff.simd import cpu

KINDS = ("q4_0", "q4_1", "q4k", "hqq4", "fp8", "afq4", "f8q8", "mxfp4")

values = np.random.default_rng(1).standard_normal((16, 512), np.float32)
values[3] *= np.float32(2.0**-20)
weight = torch.from_numpy(values)
for kind in KINDS:
    made = {}
    for kernels in ("", "reference"):
        os.environ["UQFF_KERNELS"] = kernels
        record = uqff.quantize(weight, kind)
        plain = [record.dequantize(dtype).view(torch.uint8).numpy().tobytes() for dtype in
                 (torch.float32, torch.bfloat16, torch.float16)]
        made[kernels] = (uqff.serialize(record), *plain)
    assert made[""] == made["reference"], kind
for kind in ("q8_0", "q4k"):  # the sums of products of signed codes, and of unsigned ones with scales
    record, made = uqff.quantize(weight, kind), []
    for kernels in ("", "reference"):
        os.environ["UQFF_KERNELS"] = kernels
        made.append(record.engine_product()(values[:3]).tobytes())
    assert made[0] == made[1], kind
print(len(KINDS), cpu.HAS_HALF, cpu.HAS_BF16, cpu.HAS_PERMUTE)
"""


@pytest.mark.parametrize("name", ["x86-64-v2"] if platform.machine().lower() in ("x86_64", "amd64") else ["generic"])
def test_every_family_as_on_the_plainest_cpu(name: str) -> None:
    """Types of all families, of those of ggml with each form of scales, quantised and made plain in all dtypes: no
    instruction of another CPU, the bits of the reference.

    All kernels have to be compiled for that CPU, so not all types are tried.
    """
    environment = {**os.environ, "NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": ""}
    environment.pop("UQFF_KERNELS", None)
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "8 False False False\n"
