"""Cut and dequantise a slice of a blob whose other pages cannot be accessed.

Run by test_narrow; what is printed last is the case that failed.
"""

from __future__ import annotations

import ctypes
import math
import mmap

import torch

import uqff
from uqff.codec.blob import trace
from uqff.families import stack
from uqff.parallel import ColumnParallelLayer, ColumnParallelStack, RowParallelLayer, RowParallelStack
from uqff.parallel.comm import Comm
from uqff.parallel.layer import QuantizedLayer

CASES: tuple[tuple[tuple[int, ...], int, type[QuantizedLayer]], ...] = (
    ((8, 1 << 17), 0, ColumnParallelLayer),
    ((8, 1 << 17), 1, RowParallelLayer),
    ((2, 4, 1 << 17), 1, ColumnParallelStack),
    ((2, 4, 1 << 17), 2, RowParallelStack),
)


def guard(memory: mmap.mmap, begin: int, end: int) -> int:
    """Make the whole pages between two offsets inaccessible; how many they are."""
    first, last = -(-begin // mmap.PAGESIZE), end // mmap.PAGESIZE
    if first >= last:
        return 0
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + first * mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t((last - first) * mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    return last - first


def check(shape: tuple[int, ...], dim: int, layer: type[QuantizedLayer]) -> None:
    """One blob a family; rank 1 of 4, which holds the second quarter of outputs or inputs."""
    comm = Comm()
    comm.rank, comm.world_size = 1, 4
    values = torch.arange(math.prod(shape), dtype=torch.float32).remainder(97).view(shape) / 64
    for kind in ("q4k", "q8_0", "afq4", "fp8", "f8q8", "mxfp4", "unquant"):
        print(shape, dim, kind, flush=True)
        experts = [uqff.quantize(each, kind) for each in values] if len(shape) == 3 else []
        blob = uqff.serialize(stack(experts) if experts else uqff.quantize(values, kind))
        expected = uqff.deserialize(blob).weight.dequantize().chunk(4, dim)[1]
        memory = mmap.mmap(-1, len(blob))
        memory[:] = blob
        guarded = 0
        for field in trace(blob):
            if not field.path.endswith("data") or field.size < mmap.PAGESIZE:
                continue
            rows = math.prod(shape[:dim])
            size = field.size // rows
            for row in range(rows):
                begin = field.offset + row * size
                guarded += guard(memory, begin, begin + size // 4) + guard(memory, begin + size // 2, begin + size)
        assert guarded * mmap.PAGESIZE > len(blob) / 4 * 3 - 64 * mmap.PAGESIZE * rows, kind
        part = layer.deserialize(memory, comm)
        assert torch.equal(part.dequantize_w(), expected), kind


if __name__ == "__main__":
    for case in CASES:
        check(*case)
