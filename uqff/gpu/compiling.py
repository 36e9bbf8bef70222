"""CUDA C++ to machine code by NVRTC, called through ctypes.

The library is the one that torch's CUDA wheels bring (``nvidia-cuda-nvrtc``), or the system's.  No header is included.
Float operations are neither fused nor reordered, subnormals count: what is written as two roundings is two.
"""

from __future__ import annotations

import ctypes
import logging
import sysconfig
from functools import cache
from pathlib import Path

from uqff.errors import UqffError

__all__ = ["LOGGER", "compiled", "library"]

LOGGER = logging.getLogger("uqff.compiling")

OPTIONS = ("--fmad=false", "--std=c++17")


@cache
def library() -> ctypes.CDLL | None:
    """NVRTC of the major version that torch was built for, None if there is none."""
    import torch

    if torch.version.cuda is None:
        return None
    major = torch.version.cuda.split(".")[0]
    name = f"libnvrtc.so.{major}"
    places = [name, *(str(path) for path in Path(sysconfig.get_path("purelib")).glob(f"nvidia/*/lib/{name}"))]
    for place in places:
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    return None


def compiled(source: str, capability: tuple[int, int], found: ctypes.CDLL | None = None) -> bytes:
    """Machine code of a source.

    Args:
        source: all of it.
        capability: of the GPU.
        found: NVRTC; :func:`library` if None.

    Raises:
        UqffError: it does not compile; the message holds the compiler's.
    """
    nvrtc = found or library()
    assert nvrtc is not None
    program = ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"uqff.cu", 0, None, None))
    try:
        own = "a" if capability == (9, 0) else ""  # with what no later GPU has
        options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}{own}", *OPTIONS]
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), given):
            size = ctypes.c_size_t()
            _check(nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size)))
            log = ctypes.create_string_buffer(size.value)
            _check(nvrtc.nvrtcGetProgramLog(program, log))
            raise UqffError(f"a kernel does not compile: {log.value.decode(errors='replace')}")
        size = ctypes.c_size_t()
        _check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        code = ctypes.create_string_buffer(size.value)
        _check(nvrtc.nvrtcGetCUBIN(program, code))
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _check(status: int) -> None:
    if status:
        raise UqffError("NVRTC failed", expected="status 0", got=status)
