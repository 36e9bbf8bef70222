"""``python -m tools.bench.gpu_peers``: what others multiply with, as times the speed of bfloat16 ``F.linear``.

torch's own products of four-bit integers and of FP8, and those of gemlite and bitsandbytes, where they are installed.
As in :mod:`tools.bench.gpu`, calls are recorded in a CUDA graph and go through copies beyond the cache.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from tools.bench.__main__ import markdown
from tools.bench.gpu import BATCHES, SHAPES, copies, dense_times, seconds

__all__ = ["PEERS", "main"]

GROUP = 64
Product = Callable[[torch.Tensor], torch.Tensor]


def int4pack(rows: int, inputs: int) -> Product:
    """``torch._weight_int4pack_mm``: bfloat16 scales and zeros of groups."""
    codes = torch.randint(0, 256, (rows, inputs // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(inputs // GROUP, rows, 2, device="cuda").bfloat16()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales)


def scaled_mm(rows: int, inputs: int) -> Product:
    """``torch._scaled_mm``: both sides FP8, one scale each; what makes the activations so is not counted."""
    weight = torch.randn(rows, inputs, device="cuda").to(torch.float8_e4m3fn).t()
    one, given = torch.ones((), device="cuda"), {}

    def product(x: torch.Tensor) -> torch.Tensor:
        if x.shape not in given:
            given[x.shape] = x.to(torch.float8_e4m3fn)
        made: torch.Tensor = torch._scaled_mm(given[x.shape], weight, one, one, out_dtype=torch.bfloat16)
        return made

    return product


def nf4(rows: int, inputs: int) -> Product:
    """NF4 of bitsandbytes."""
    library: Any = importlib.import_module("bitsandbytes")
    data, state = library.functional.quantize_4bit(
        torch.randn(rows, inputs, device="cuda").bfloat16(), quant_type="nf4", blocksize=GROUP
    )
    return lambda x: library.matmul_4bit(x, data.t(), state)


def gemlite(rows: int, inputs: int) -> Product:
    """Four-bit integers of gemlite, with scales and zeros of groups."""
    library: Any = importlib.import_module("gemlite.helper")
    codes = torch.randint(0, 16, (rows, inputs), dtype=torch.uint8, device="cuda")
    groups = rows * inputs // GROUP
    scales, zeros = (torch.rand(groups, 1, device="cuda").bfloat16() for _ in range(2))
    made: Any = library.A16W4_HQQ_INT(device="cuda:0", dtype=torch.bfloat16)
    layer: Product = made.from_weights(codes, scales / 100, 8 * zeros)
    return layer


PEERS: dict[str, Callable[[int, int], Product]] = {
    "torch _weight_int4pack_mm": int4pack,
    "torch _scaled_mm, fp8": scaled_mm,
    "bitsandbytes NF4": nf4,
    "gemlite int4": gemlite,
}


FAILURES = (ImportError, RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, AssertionError)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:80].replace("\n", " ")


def main(batches: Sequence[int] = BATCHES) -> None:
    """Print the table; what fails says so in its place."""
    dense, table = dense_times(), []
    for name, make in PEERS.items():
        row: dict[str, object] = {"peer": name}
        for shape_name, shape in SHAPES.items():
            try:
                products = [make(*shape) for _ in copies(shape[0] * shape[1] // 2)]
            except FAILURES as error:
                row[f"{batches[0]} {shape_name}"] = _told(error)
                continue
            for batch in batches:
                x = torch.randn(batch, shape[1], device="cuda").bfloat16()
                try:
                    for product in products:
                        product(x)  # some choose their way when they are first called
                    taken = seconds([partial(product, x) for product in products])
                    row[f"{batch} {shape_name}"] = f"{dense[shape_name, batch] / taken:.2f}"
                except FAILURES as error:
                    row[f"{batch} {shape_name}"] = _told(error)
        table.append(row)
        print(row, flush=True)
    columns = ["peer", *(f"{batch} {name}" for name in SHAPES for batch in batches)]
    print(markdown([{column: row.get(column, "") for column in columns} for row in table]))


if __name__ == "__main__":
    main([int(each) for each in sys.argv[1:]] or BATCHES)
