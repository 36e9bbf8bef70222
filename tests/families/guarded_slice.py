"""Cut and dequantise a slice of a blob whose other pages cannot be accessed. Run by test_narrow: argument 0 or 1."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

import uqff
from uqff.blob import trace
from uqff.parallel.shard import Shard

OUT, INPUTS = 8, 1 << 17


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


def main(dim: int) -> None:
    """One blob a family; the second quarter of outputs or inputs."""
    values = torch.arange(OUT * INPUTS, dtype=torch.float32).remainder(97).view(OUT, INPUTS) / 64
    for kind in ("q4k", "q8_0", "afq4", "fp8", "f8q8", "mxfp4", "unquant"):
        blob = uqff.serialize(uqff.quantize(values, kind))
        expected = uqff.deserialize(blob).weight.dequantize().chunk(4, dim)[1]
        memory = mmap.mmap(-1, len(blob))
        memory[:] = blob
        guarded = 0
        for field in trace(blob):
            if not field.path.endswith("data") or field.size < mmap.PAGESIZE:
                continue
            rows = OUT if dim else 1
            size = field.size // rows
            for row in range(rows):
                begin = field.offset + row * size
                guarded += guard(memory, begin, begin + size // 4) + guard(memory, begin + size // 2, begin + size)
        assert guarded * mmap.PAGESIZE > len(blob) / 4 * 3 - 64 * mmap.PAGESIZE * (OUT if dim else 1), kind
        part = Shard.simple(dim, 1, 4).apply_to(uqff.deserialize(memory))
        assert torch.equal(part.weight.dequantize(), expected), kind


if __name__ == "__main__":
    main(int(sys.argv[1]))
