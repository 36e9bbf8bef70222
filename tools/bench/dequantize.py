"""How fast weights become plain numbers: every type against memset, the reference and gguf-py.

    python tools/bench/dequantize.py [--rows 4096] [--columns 4096] [--repeat 7] [TYPE ...]

Each figure is the best of several short runs into memory that is warm, "new" into new memory.
``memset`` writes as many bytes, on as many threads.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from uqff import kernels
from uqff.families import AFQ, F8Q8, FP8, GGUF, HQQ, MXFP4, QuantizedTensor, Unquant
from uqff.families.gguf.blocks import BLOCK_TYPES, BlockType
from uqff.families.hqq import CODES_PER_WORD
from uqff.kernels.memory import empty
from uqff.kernels.threads import num_threads, run_ranges


def best(run: Callable[[], object], repeat: int) -> float:
    """Seconds of the fastest run."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


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
            height = -(-(64, n // 64)[axis] // CODES_PER_WORD[bits])
            words = codes(height, (n // 64, 64)[axis] * (4 if bits == 3 else 1))
            scale = torch.rand(((1, n // 64), (n // 64, 1))[axis])
            yield f"HQQ{bits}/{axis}", HQQ(words, scale, scale, (rows, columns), bits, 64, axis)
    one = torch.tensor(0.5)
    yield "FP8", FP8(codes(rows, columns).view(torch.float8_e4m3fn), one, one, one)
    yield "F8Q8", F8Q8(codes(n // 32, 33), (rows, columns))
    yield "MXFP4", MXFP4(codes(rows, columns // 2), codes(rows, columns // 32))
    yield "Unquant", Unquant.of(torch.rand(rows, columns, dtype=torch.bfloat16))


def gguf_py(record: QuantizedTensor) -> Callable[[], Any] | None:
    """gguf-py's dequantiser of the same blocks, if it is installed and has the type."""
    if not isinstance(record, GGUF) or importlib.util.find_spec("gguf") is None:
        return None
    import gguf

    name = record.block_type.name
    theirs = getattr(gguf.GGMLQuantizationType, name.replace("K", "_K"), None)
    data = record.data.numpy()
    try:
        gguf.quants.dequantize(data[:1], theirs)
    except (NotImplementedError, KeyError, AttributeError):
        return None
    return lambda: gguf.quants.dequantize(data, theirs)


def memset(out: torch.Tensor) -> Callable[[], None]:
    """Writes every byte of ``out``, on the kernels' threads."""
    address = out.data_ptr()

    def fill(lo: int, hi: int) -> None:
        ctypes.memset(address + lo, 1, hi - lo)

    return lambda: run_ranges(fill, out.nbytes, grain=1 << 18)


def main() -> None:
    """Print one line a type."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=7)
    arguments = parser.parse_args()
    shape = (arguments.rows, arguments.columns)
    outs = {dtype: empty(shape, dtype).zero_() for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    print(f"{shape[0]} x {shape[1]}, {num_threads()} threads; GB/s of float32 written; bf16, f16: against float32")
    print("type      memset  float32         bf16    f16    new  reference  gguf-py")
    for name, record in records(*shape):
        if not arguments.types or name in arguments.types:
            print(f"{name:8} {measure(record, outs, arguments.repeat)}", flush=True)


def measure(record: QuantizedTensor, outs: dict[torch.dtype, torch.Tensor], repeat: int) -> str:
    """The line of one type."""
    out = outs[torch.float32]
    floor = best(memset(out), repeat)
    seconds = {}
    for dtype, buffer in outs.items():
        run = partial(kernels.dequantize, record, dtype, buffer)
        assert run() is buffer
        seconds[dtype] = best(run, repeat)
    own = seconds[torch.float32]
    floor = min(floor, best(memset(out), repeat))
    fresh = best(partial(kernels.dequantize, record, torch.float32), 3)
    reference, theirs = best(record._dequantize, 1), gguf_py(record)
    compared = f"{best(theirs, 1) / own:7.0f}x" if theirs else ""
    return (
        f"{out.nbytes / floor / 1e9:7.1f} {out.nbytes / own / 1e9:8.1f} {floor / own:5.0%}"
        f" {own / seconds[torch.bfloat16]:5.2f}x {own / seconds[torch.float16]:5.2f}x"
        f" {out.nbytes / fresh / 1e9:6.1f} {reference / own:9.0f}x {compared:>8}"
    )


if __name__ == "__main__":
    main()
