"""Whole kernels as functions of a library for the CPU."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from uqff import QuantizedTensor
from uqff.gpu.source import Stored

__all__ = ["COMPILER", "Compiled", "compiled", "known", "launching", "needs_compiler", "row_bytes"]

HERE = Path(__file__).parent
COMPILER = shutil.which("c++")

SHARED = re.compile(r"extern __shared__ .*shared\[\];")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


class Compiled:
    """A kernel that runs on the CPU."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def launch(self, grid: tuple[int, int], threads: int, given: ctypes.Structure, *more: ctypes.c_void_p) -> None:
        """As :meth:`uqff.gpu.driver.Kernel.launch`."""
        self._function(*grid, threads, ctypes.byref(given), *more)

    launch_early = launch


def known(weight: QuantizedTensor) -> Stored:
    """What kernels know of a weight."""
    stored = weight.stored_on_gpu()
    assert stored is not None
    return stored


def row_bytes(weight: QuantizedTensor) -> tuple[int, ...]:
    """The bytes of a row in each part that lies along the rows."""
    stored = known(weight)
    return tuple(part.nbytes // weight.shape[0] for part in stored.parts[: stored.along])


def launching(name: str, given: str, body: str) -> str:
    """A function ``name`` that runs the threads of a kernel, which takes a structure ``given``."""
    run = f"launch(columns, rows, threads, [=] {{ const {given}& given = *at; {body} }});"
    return f'extern "C" void {name}(int columns, int rows, int threads, const {given}* at) {{ {run} }}\n'


def compiled(sources: Sequence[str], folder: Path) -> ctypes.CDLL:
    """A library of some sources: what machine and threads are stands before them."""
    around = [(HERE / name).read_text() for name in ("block.h", "machine.h", "mma.h")]
    # Dynamic shared memory, of a size that a launch says, is as much as a block can have.
    whole = "".join((*around, *(SHARED.sub("alignas(16) static u8 shared[232448];", each) for each in sources)))
    (folder / "all.cpp").write_text(whole)
    options = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-shared", "-fPIC"]
    command = [str(COMPILER), *options, "-o", str(folder / "all.so"), str(folder / "all.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[:4000]
    return ctypes.CDLL(str(folder / "all.so"))
