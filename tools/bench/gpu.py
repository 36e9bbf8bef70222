"""``python -m tools.bench.gpu``: kernels of :mod:`uqff.gpu`, checked and timed on the GPU at hand.

What is timed is recorded in a CUDA graph that goes through copies of the weight until they are many times the cache;
the graph is replayed, and of its times the median counts.  Weights are a few quantised rows, repeated.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import click
import torch

import uqff
from tools.bench.__main__ import markdown
from tools.bench.bits import same_bits
from tools.bench.machine import facts
from uqff import QuantizedTensor
from uqff.codes import DType
from uqff.families import stack
from uqff.gpu.kernels import WIDEST
from uqff.parallel.product import linear
from uqff.parallel.weight import WeightBuffers
from uqff.quantization.types import planned

KINDS = (
    *("afq4", "q4k", "q4_0", "mxfp4", "q8_0", "fp8", "f8q8", "q6k", "hqq4"),
    *("afq2", "afq3", "afq6", "afq8", "q2k", "q3k", "q5k", "q8k", "q4_1", "q5_0", "q5_1", "q8_1"),
    *("hqq1", "hqq2", "hqq3", "hqq8"),
)
SHAPES = {"A": (14336, 4096), "B": (4096, 4096)}
BATCHES = (1, 8, 16, 32, 64, 128, 256, 1024)
TILE = (72, 4096)
"""Rows that are quantised; not a multiple of the rows that a block of threads makes."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BEYOND_CACHE = 1 << 28
"""Bytes of the copies that are gone through."""
ALLOWED = {torch.bfloat16: 2e-3, torch.float16: 5e-4}
"""Relative errors of products from the codes: rounding the result, mostly."""
OUTPUTS = 1000
"""Over which they are taken, at least."""
ODD_OUTPUTS = (4096 + 40, 8192 + 24)
"""Of further weights, which kernels take for which 72 outputs are too few."""
ODD_BATCHES = (1, 3, 8, 13, 16, 17, 33, 64, 100, 200, 300)
ROUNDED = 1.6
"""How many times that, if the weight is rounded, too."""


def tile(kind: str, kept: Path) -> QuantizedTensor:
    """A few rows, quantised here or by an earlier run."""
    path = kept / f"{kind}.uqff"
    if not path.exists():
        numbers = torch.randn(TILE, generator=torch.Generator().manual_seed(1)) / 50
        kept.mkdir(parents=True, exist_ok=True)
        path.write_bytes(uqff.serialize(uqff.quantize(numbers.bfloat16(), kind)))
    return uqff.deserialize(path.read_bytes()).weight


def repeated(rows: QuantizedTensor, shape: tuple[int, ...]) -> QuantizedTensor:
    """A weight of that shape on the GPU, whose parts are those of a tile, again and again."""
    whole, parts = planned(rows.kind, shape, DType.BF16), {}
    for name, part in whole.parts.items():
        given = rows.parts[name].as_bytes().tensor().reshape(-1).cuda()
        times = -(-part.nbytes // given.numel())
        parts[name] = given.repeat(times)[: part.nbytes].view(part.dtype.torch).reshape(part.shape)
    return whole.replaced(**parts)


def seconds(calls: Sequence[Callable[[], Any]], replays: int = 15) -> float:
    """Of one call: the median over replays of a graph of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        for _ in range(3):
            graph.replay()
        marks[0].record()
        for mark in marks[1:]:
            graph.replay()
            mark.record()
        torch.cuda.synchronize()
    times = [before.elapsed_time(after) for before, after in pairwise(marks)]
    return statistics.median(times) / 1000 / len(calls)


def copies(nbytes: int) -> range:
    """Of something of that size, as many as go beyond the cache."""
    return range(max(2, -(-BEYOND_CACHE // nbytes)))


def rates() -> dict[str, float]:
    """Bytes a second of a copy, counting those read and those written, and of reading alone."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    # A kernel: what a graph makes of copy_ is slower.
    copy = 2 * source.nbytes / seconds([lambda: torch.add(source, 1.0, out=target)])
    return {"copy": copy, "read": max(copy, source.nbytes / seconds([lambda: torch.sum(source)]))}


def wild(rows: QuantizedTensor) -> QuantizedTensor:
    """The weight with random bytes in all parts."""
    generator = torch.Generator().manual_seed(2)
    parts = {}
    for name, part in rows.parts.items():
        data = torch.randint(0, 256, (part.nbytes,), dtype=torch.uint8, generator=generator)
        parts[name] = data.view(part.dtype.torch).reshape(part.shape)
    return rows.replaced(**parts)


def problems(rows: QuantizedTensor) -> Iterator[str]:
    """What is wrong with dequantising and multiplying."""
    weights = {"rows": rows, "random bytes": wild(rows)}
    if rows.kind.startswith("hqq"):  # rows of M are not those of the weight, and none of a power of two
        weights["odd"] = repeated(rows, (24, 328)).to("cpu")
        weights["whole groups"] = repeated(rows, (128, 4096)).to("cpu")  # which products need
    else:
        weights["few inputs"] = rows.narrow(1, 0, 768)
        weights["stack"] = stack([rows.narrow(0, 24 * i, 24) for i in range(3)])
    for name, weight in weights.items():
        reference, there = weight._dequantize(), weight.to("cuda")
        for dtype in DTYPES:
            if there.dequantize_by_kernel(dtype) is None:
                yield f"no kernel for {name}"
            elif not same_bits(there.dequantize(dtype).cpu(), reference.to(dtype)):
                yield f"{name} to {dtype}: other bits"
    seeded = torch.Generator("cuda").manual_seed(3)
    few = weights.get("few inputs", weights.get("whole groups", rows))
    whole = 64 if rows.kind.startswith("hqq") else 1
    several = [repeated(rows, (-(-count // whole) * whole, TILE[1])) for count in ODD_OUTPUTS]
    for weight in (own := rows.to("cuda"), few.to("cuda"), *several):
        exact, buffers = weight.dequantize(torch.float32).double(), WeightBuffers(weight)
        for dtype, allowed in ALLOWED.items():
            for batch in ODD_BATCHES:
                wrong, exactly = 0.0, 0.0
                for _ in range(-(-OUTPUTS // (batch * min(weight.shape[0], TILE[0])))):
                    x = torch.randn(batch, weight.shape[1], device="cuda", generator=seeded).to(dtype)
                    expected = x.double() @ exact.T
                    got = linear(x, buffers.bytes(), buffers.spec, "exact").double()
                    wrong += float((got - expected).square().sum())
                    exactly += float(expected.square().sum())
                error = (wrong / exactly) ** 0.5
                hqq = rows.kind.startswith("hqq")
                fused = batch <= (8 if hqq else WIDEST) and (not hqq or weight is not own)
                if not error <= allowed * (1 if fused else ROUNDED):
                    yield f"{list(weight.shape)}, {batch} rows of {dtype}: error {error:.1e}"
    if "stack" in weights:
        yield from _gather_problems(weights["stack"])


def _gather_problems(weight: QuantizedTensor) -> Iterator[str]:
    from uqff.parallel.product import gather_linear

    exact, buffers = weight._dequantize().double().cuda(), WeightBuffers(weight.to("cuda"))
    indices = torch.tensor([[0, 2], [1, 1], [2, 0]] * 8, device="cuda")
    for shared in (1, 2):
        x = torch.randn(len(indices), shared, weight.shape[2], device="cuda").bfloat16()
        got = gather_linear(x, indices, buffers.bytes(), buffers.spec, False).double()
        expected = torch.einsum("tki,tkoi->tko", x.double().expand(-1, 2, -1), exact[indices])
        error = float((got - expected).norm() / expected.norm())
        if not error <= ALLOWED[torch.bfloat16]:
            yield f"experts, x {list(x.shape)}: error {error:.1e}"


def dense_times() -> dict[tuple[str, int], float]:
    """Of bf16 ``F.linear``, by shape and rows."""
    found = {}
    for name, shape in SHAPES.items():
        weights = [torch.randn(shape, device="cuda").bfloat16() for _ in copies(shape[0] * shape[1] * 2)]
        for batch in BATCHES:
            x = torch.randn(batch, shape[1], device="cuda").bfloat16()
            calls = [lambda w=w, x=x: torch.nn.functional.linear(x, w) for w in weights]
            found[name, batch] = seconds(calls)
    return found


def row(rows: QuantizedTensor, dense: dict[tuple[str, int], float], rate: dict[str, float]) -> dict[str, object]:
    """Times of one type."""
    made: dict[str, object] = {"type": rows.kind}
    raw: dict[str, float] = {}
    for name, shape in SHAPES.items():
        first = repeated(rows, shape)
        nbytes = sum(part.nbytes for part in first.parts.values())
        weights = [first, *(repeated(rows, shape) for _ in copies(nbytes)[1:])]
        outs = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
        writing = [partial(w.dequantize, out=outs[i % 4]) for i, w in enumerate(weights)]
        taken = raw[f"dequantise {name}"] = seconds(writing)
        made[f"dequantise {name}, of copy"] = f"{(nbytes + outs[0].nbytes) / rate['copy'] / taken:.2f}"
        buffers = [WeightBuffers(weight) for weight in weights]
        for batch in BATCHES:
            x = torch.randn(batch, shape[1], device="cuda").bfloat16()
            calls = [lambda b=b, x=x: linear(x, b.bytes(), b.spec, "exact") for b in buffers]
            taken = raw[f"{batch} {name}"] = seconds(calls)
            if batch == 1:
                made[f"1 {name}, of read"] = f"{nbytes / rate['read'] / taken:.2f}"
            made[f"{batch} {name}, × bf16"] = f"{dense[name, batch] / taken:.2f}"
    made["µs"] = {key: round(value * 1e6, 1) for key, value in raw.items()}
    return made


def compile_all(tiles: dict[str, QuantizedTensor]) -> None:
    """Every kernel that is needed, on all cores."""

    def compiled(rows: QuantizedTensor, dtype: torch.dtype) -> None:
        rows.to("cuda").dequantize(dtype)
        shapes = (TILE, *SHAPES.values()) if dtype in ALLOWED else ()
        for shape in shapes:
            buffers = WeightBuffers(repeated(rows, shape))
            for batch in BATCHES:
                x = torch.zeros(batch, shape[1], dtype=dtype, device="cuda")
                linear(x, buffers.bytes(), buffers.spec, "exact")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda each: compiled(*each), product(tiles.values(), DTYPES)))


@click.command()
@click.option("--only", multiple=True, type=click.Choice(KINDS), help="This type only; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/bench-gpu"), show_default=True)
@click.option("--weights", type=click.Path(path_type=Path), default=Path("build/gpu-weights"), show_default=True)
def main(only: tuple[str, ...], out: Path, weights: Path) -> None:
    """Check, time, print, and write OUT/gpu.md and OUT/gpu.json."""
    logging.basicConfig(level=logging.WARNING)
    begun = time.perf_counter()
    device = torch.cuda.get_device_properties(0)
    machine = {**facts(), "GPU": device.name, "multiprocessors": str(device.multi_processor_count)}
    machine |= {"CUDA": str(torch.version.cuda)}
    tiles = {kind: tile(kind, weights) for kind in only or KINDS}
    compile_all(tiles)
    result: dict[str, Any] = {"machine": machine, "compiled after, s": round(time.perf_counter() - begun, 1)}
    wrong = {kind: found for kind, rows in tiles.items() if (found := list(problems(rows)))}
    result["wrong"] = wrong
    print(json.dumps(result, indent=1), flush=True)
    rate, dense = rates(), dense_times()
    result["rates, TB/s"] = {name: round(value / 1e12, 3) for name, value in rate.items()}
    result["bf16, µs"] = {f"{name} {batch}": round(value * 1e6, 1) for (name, batch), value in dense.items()}
    result["types"] = []
    out.mkdir(parents=True, exist_ok=True)
    for rows in tiles.values():
        result["types"].append(row(rows, dense, rate))
        torch.cuda.empty_cache()
        (out / "gpu.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    table = [{name: value for name, value in each.items() if name != "µs"} for each in result["types"]]
    facts_text = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    text = f"{facts_text}\n- TB/s: {result['rates, TB/s']}\n- bf16, µs: {result['bf16, µs']}\n\n{markdown(table)}"
    (out / "gpu.md").write_text(text, "utf-8")
    print(text)
    print(f"{time.perf_counter() - begun:.0f} s; wrong: {wrong or 'nothing'}")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
