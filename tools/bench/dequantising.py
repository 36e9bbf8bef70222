"""How fast weights become plain numbers in warm memory: every type against memset and the tools of :mod:`peers`.

``memset`` writes as many bytes, on as many threads, in turn with the kernels.  Of F32, F16, BF16 and Unquant as many or
half as many are to be read as well, so they cannot come near it: memcpy is their bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from tools.bench.machine import interleaved, memset
from tools.bench.peers import dequantisers
from uqff.families import AFQ, F8Q8, FP8, GGUF, HQQ, MXFP4, QuantizedTensor, Unquant
from uqff.families.gguf.blocks import BLOCK_TYPES, BlockType
from uqff.numerics.packing import PLANES
from uqff.simd.memory import empty

__all__ = ["measure"]

SIDE = 4096
ROUNDS = 9


def blocks_of(block_type: BlockType, count: int, rng: np.random.Generator) -> torch.Tensor:
    """Random codes under scales of an ordinary size, a few thousand blocks repeated."""
    some = rng.integers(0, 256, (4096, block_type.type_size), np.uint8)
    fields = some.view(block_type.numpy)
    for name in block_type.numpy.names or ():
        if fields[name].dtype.kind == "f":
            fields[name] = rng.standard_normal(fields[name].shape) * 0.01
    if block_type.name == "BF16":
        some[:] = torch.randn(4096, 1).bfloat16().view(torch.uint8).numpy()
    return torch.from_numpy(np.resize(some, (count, block_type.type_size)))


def records(rows: int, columns: int) -> Iterator[tuple[str, QuantizedTensor]]:
    """One weight of every type."""
    rng, n = np.random.default_rng(0), rows * columns

    def codes(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(0, 127, shape, np.uint8))

    for block_type in BLOCK_TYPES:
        data = blocks_of(block_type, n // block_type.block_size, rng)
        yield block_type.name, GGUF(data.reshape(rows, -1), block_type)
    for bits in (2, 3, 4, 6, 8):
        scale = torch.rand(rows, columns // 64).bfloat16()
        yield f"AFQ{bits}", AFQ(codes(rows, columns * bits // 8), scale, scale, bits, 64)
    for axis in (0, 1):
        for bits in (1, 2, 3, 4, 8):
            height = -(-(64, n // 64)[axis] // PLANES[bits])
            words = codes(height, (n // 64, 64)[axis] * (4 if bits == 3 else 1))
            scale = torch.rand(((1, n // 64), (n // 64, 1))[axis])
            yield f"HQQ{bits}/{axis}", HQQ(words, scale, scale, (rows, columns), bits, 64, axis)
    one = torch.tensor(0.5)
    yield "FP8", FP8(codes(rows, columns).view(torch.float8_e4m3fn), one, one, one)
    yield "F8Q8", F8Q8(codes(n // 32, 33), (rows, columns))
    # Of an ordinary size, too: with numbers below 2**-126 some CPUs take a hundred times as long.
    exponents = torch.from_numpy(rng.integers(112, 128, (rows, columns // 32), np.uint8))
    yield "MXFP4", MXFP4(codes(rows, columns // 2), exponents)
    yield "Unquant", Unquant.of(torch.rand(rows, columns, dtype=torch.bfloat16))


def measure() -> list[dict[str, object]]:
    """One row a type: rates of writing float32, against memset and gguf-py; the narrower floats against float32."""
    shape = (SIDE, SIDE)
    outs = {dtype: empty(shape, dtype).zero_() for dtype in (torch.float32, torch.bfloat16)}
    rows: list[dict[str, object]] = []
    for name, record in records(*shape):
        wide, narrow = outs.values()
        tasks: dict[str, Callable[[], object]] = {
            # Each finds its memory as warm as the others do: what is called warm does not count.
            "warm": memset(wide),
            "memset": memset(wide),
            "float32": partial(record.dequantize, out=wide),
            "warm too": memset(narrow),
            "bfloat16": partial(record.dequantize, out=narrow),
        }
        seconds = interleaved(tasks, ROUNDS)
        own = seconds["float32"]
        # One round: some take seconds.
        peers = interleaved(dequantisers(record), 1)
        peer = min(peers, key=lambda name: peers[name], default="")
        rows.append(
            {
                "type": name,
                "memset GB/s": round(wide.nbytes / seconds["memset"] / 1e9, 1),
                "float32 GB/s": round(wide.nbytes / own / 1e9, 1),
                "of memset": f"{seconds['memset'] / own:.0%}",
                "bfloat16 / float32 rate": round(own / seconds["bfloat16"], 2),
                "float32 Mw/s": round(record.numel / own / 1e6),
                "peer": peer,
                "peer Mw/s": round(record.numel / peers[peer] / 1e6) if peer else "",
                "× peer": round(peers[peer] / own, 1) if peer else "",
            }
        )
    return rows
