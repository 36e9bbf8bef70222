"""Kernels on the GPU: modules loaded and launched by the CUDA driver, called through ctypes.

torch owns contexts, streams and memory; a launch goes to torch's current stream, so that CUDA graphs record it.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING

from uqff.errors import UqffError

if TYPE_CHECKING:
    import torch

__all__ = ["HANDLE", "Kernel", "load", "memory_of_another", "shared_memory"]

DYNAMIC_SHARED_MEMORY = 8
"""``CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES``."""

PROGRAMMATIC_STREAM_SERIALIZATION = 6
"""``CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION``."""

HANDLE = 64
"""``CU_IPC_HANDLE_SIZE``: bytes by which another process finds memory."""

LAZY_ENABLE_PEER_ACCESS = 1
"""``CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS``."""

NO_CONTEXT = (3, 201)
"""``CUDA_ERROR_NOT_INITIALIZED`` and ``CUDA_ERROR_INVALID_CONTEXT``."""


class _Handle(ctypes.Structure):
    """``CUipcMemHandle``."""

    _fields_ = (("bytes", ctypes.c_char * HANDLE),)


class _Attribute(ctypes.Structure):
    """``CUlaunchAttribute`` with a number."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _Launch(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


class Kernel:
    """The function ``entry`` of a module, on one device."""

    def __init__(self, function: ctypes.c_void_p, device: int, shared: int, context: ctypes.c_void_p) -> None:
        self._function, self._device, self._shared, self._context = function, device, shared, context

    def launch(self, grid: tuple[int, int], threads: int, *arguments: ctypes.Structure | ctypes.c_void_p) -> None:
        """Run it on the current stream of its device, which does not wait for it.

        Args:
            grid: of blocks.
            threads: of a block.
            arguments: of the function, by value.
        """
        import torch

        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(each) for each in arguments))
        stream = torch.cuda.current_stream(self._device).cuda_stream
        given = (self._function, *grid, 1, threads, 1, 1, self._shared, stream, pointers, None)
        status = _driver().cuLaunchKernel(*given)
        if status in NO_CONTEXT:  # a thread that has not used the device before
            status = _driver().cuCtxSetCurrent(self._context) or _driver().cuLaunchKernel(*given)
        if status:
            raise _failed("a kernel cannot be launched", status)

    def launch_early(self, grid: tuple[int, int], threads: int, *arguments: ctypes.Structure | ctypes.c_void_p) -> None:
        """As :meth:`launch`, of a kernel that waits for those before it by itself.

        In a graph that is being recorded its blocks begin as soon as there is room for them, so until it has waited the
        kernel may only read what none of these writes. Elsewhere a launch takes longer than a kernel.
        """
        import torch

        if not torch.cuda.is_current_stream_capturing() or not _records_early(self._device):
            self.launch(grid, threads, *arguments)
            return
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(each) for each in arguments))
        stream = torch.cuda.current_stream(self._device).cuda_stream
        attribute = _Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
        how = _Launch((*grid, 1), (threads, 1, 1), self._shared, stream, ctypes.pointer(attribute), 1)
        status = _driver().cuLaunchKernelEx(ctypes.byref(how), self._function, pointers, None)
        if status:
            raise _failed("a kernel cannot be launched", status)


@cache
def _records_early(device: int) -> bool:
    """Whether the GPU can, and the driver can record it (CUDA 12.3)."""
    import torch

    version = ctypes.c_int()
    known = not _driver().cuDriverGetVersion(ctypes.byref(version))
    return known and version.value >= 12030 and torch.cuda.get_device_capability(device) >= (9, 0)


def load(code: bytes, device: torch.device, entry: str = "entry") -> Kernel:
    """The kernel of a module's machine code; the device must be torch's current one.

    If the module has an array ``shared_bytes``, each block gets as many bytes of dynamic shared memory as that has.  (A
    size, not a number, because a number could only be had by a copy, which waits for the device.)

    Args:
        code: that :func:`uqff.gpu.compiling.compiled` made.
        device: with an index.
        entry: name of the function.
    """
    context, status = _context(device)
    module, function, address, size = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t(0)
    status = status or _driver().cuModuleLoadData(ctypes.byref(module), code)
    status = status or _driver().cuModuleGetFunction(ctypes.byref(function), module, entry.encode())
    if not status and _driver().cuModuleGetGlobal_v2(
        ctypes.byref(address), ctypes.byref(size), module, b"shared_bytes"
    ):
        size = ctypes.c_size_t(0)
    if size.value and not status:
        status = _driver().cuFuncSetAttribute(function, DYNAMIC_SHARED_MEMORY, size.value)
    if status:
        raise _failed("a kernel cannot be loaded", status)
    return Kernel(function, device.index, size.value, context)


def shared_memory(size: int, device: torch.device) -> tuple[int, bytes]:
    """Memory that other processes of this machine can see: its address, and what they find it by. It is never freed.

    Args:
        size: bytes, all zero.
        device: with an index; torch's current one.
    """
    address, handle = ctypes.c_uint64(), _Handle()
    _, status = _context(device)
    status = status or _driver().cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size))
    status = status or _driver().cuMemsetD8_v2(address, ctypes.c_ubyte(0), ctypes.c_size_t(size))
    status = status or _driver().cuIpcGetMemHandle(ctypes.byref(handle), address)
    if status:
        raise _failed("memory cannot be shared", status)
    return address.value, bytes(memoryview(handle))


def memory_of_another(handle: bytes, device: torch.device) -> int:
    """The address here of what :func:`shared_memory` has made in another process.

    Args:
        handle: of :data:`HANDLE` bytes.
        device: with an index; torch's current one.
    """
    address = ctypes.c_uint64()
    _, status = _context(device)
    given = _Handle.from_buffer_copy(handle), ctypes.c_uint(LAZY_ENABLE_PEER_ACCESS)
    status = status or _driver().cuIpcOpenMemHandle_v2(ctypes.byref(address), *given)
    if status:
        raise _failed("memory of another process cannot be seen", status)
    return address.value


def _context(device: torch.device) -> tuple[ctypes.c_void_p, int]:
    """Torch's context, made the thread's; and a status."""
    import torch

    torch.empty(1, device=device)  # makes it the thread's, mostly
    context, number = ctypes.c_void_p(), ctypes.c_int()
    status: int = _driver().cuCtxGetCurrent(ctypes.byref(context))
    if not context.value:  # memory that torch had already, to a thread that has not used the device before
        status = status or _driver().cuDeviceGet(ctypes.byref(number), device.index)
        status = status or _driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), number)
        status = status or _driver().cuCtxSetCurrent(context)
    return context, status


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuLaunchKernel.argtypes = (
        [ctypes.c_void_p] + [ctypes.c_uint] * 7 + [ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p]
    )
    return driver


def _failed(problem: str, status: int) -> UqffError:
    name = ctypes.c_char_p()
    _driver().cuGetErrorName(status, ctypes.byref(name))
    return UqffError(problem, expected="CUDA_SUCCESS", got=(name.value or b"").decode() or status)
