"""Kernels on a GPU that compilers for CPUs see in part only: products, what a token goes through."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

import uqff
from tests.gpu import token_reference
from tests.gpu.test_hqq_product import BITS, CASES, record
from uqff import QuantizedTensor
from uqff.families.hqq import gpu_tiling
from uqff.gpu import kernels, tiling, token
from uqff.parallel.product import multiply
from uqff.parallel.weight import WeightBuffers

pytestmark = pytest.mark.cuda

DTYPES = (torch.bfloat16, torch.float16)


def check(weight: QuantizedTensor, most: int = 16) -> None:
    """Products from the codes, of 1 to ``most`` rows, and in a CUDA graph, against float64."""
    exact, stored = weight._dequantize().double().cuda(), weight.to("cuda").stored_on_gpu()
    assert stored is not None
    generator = torch.Generator("cuda").manual_seed(1)
    for dtype, allowed in zip(DTYPES, (2e-3, 5e-4), strict=True):
        for batch in (batch for batch in (1, 2, 5, 8, 13, 16) if batch <= most):
            x = torch.randn(batch, weight.shape[1], device="cuda", generator=generator).to(dtype)
            got, expected = kernels.multiply(stored, x, weight.shape[0]), x.double() @ exact.T
            assert got is not None
            assert float((got.double() - expected).norm() / expected.norm()) <= allowed
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = kernels.multiply(stored, x, weight.shape[0])
        graph.replay()
        assert again is not None
        assert got is not None
        assert torch.equal(again, got)


@pytest.mark.parametrize(("bits", "axis"), CASES)
@pytest.mark.parametrize("shape", [(128, 192), (8192, 4160), (1024, 8192)])
def test_products_with_hqq(bits: int, axis: int, shape: tuple[int, int]) -> None:
    """Blocks of every number of tiles; more inputs than are prepared together."""
    check(record(bits, axis, shape), 8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(4096 + 64, 768), (8192 + 64, 768), (4096, 192)])
def test_products_with_hqq_by_tiles(bits: int, shape: tuple[int, int]) -> None:
    """More rows than HQQ's own kernels take; outputs that no tile ends with; none where inputs are no whole stages."""
    weight = record(bits, 0, shape).to("cuda")
    exact, stored = weight.dequantize(torch.float32).double(), weight.stored_on_gpu()
    assert stored is not None
    generator, capability = torch.Generator("cuda").manual_seed(5), torch.cuda.get_device_capability()
    for dtype, allowed in zip(DTYPES, (2e-3, 5e-4), strict=True):
        for batch in (9, 16, 33, 64, 100, 129, 256):
            x = torch.randn(batch, shape[1], device="cuda", generator=generator).to(dtype)
            got, again = (kernels.multiply(stored, x, shape[0]) for _ in range(2))
            made = shape[1] % 256 == 0 and gpu_tiling.chosen(capability, *shape, batch, bits) is not None
            assert (got is not None) == made
            if got is not None and again is not None:
                expected = x.double() @ exact.T
                assert float((got.double() - expected).norm() / expected.norm()) <= 1.6 * allowed
                assert torch.equal(got, again)


def test_products_with_q8k() -> None:
    """Rows begin at any multiple of four bytes."""
    check(uqff.quantize(torch.randn(72, 1280, generator=torch.Generator().manual_seed(2)), "q8k"))


@pytest.mark.parametrize("kind", ["fp8", "afq4", "q4k"])
def test_products_that_begin_before_others_have_ended(kind: str) -> None:
    """In a graph they read weights early, but x only when it is there, and write where nobody reads any more."""
    generator = torch.Generator().manual_seed(6)
    numbers = torch.randn(4096, 4096, generator=generator) / 64
    weight = uqff.quantize(numbers, kind).to("cuda")
    stored = weight.stored_on_gpu()
    assert stored is not None
    start = torch.randn(1, 4096, generator=generator).bfloat16()
    held, x = start.cuda(), torch.empty(1, 4096, dtype=torch.bfloat16, device="cuda")

    def chain() -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for step in range(12):
            x.copy_(held if step % 4 == 0 else found[-1][:1])  # a copy, and then a kernel
            y = kernels.multiply(stored, x if step % 3 else torch.cat([x, x, -x]), 4096)
            assert y is not None
            found.append(y)
        return found

    expected = [each.clone() for each in chain()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain()
    for _ in range(20):
        for each in got:
            each.zero_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("rows", [1, 8, 16, 64, 300])
@pytest.mark.parametrize("kind", ["afq4", "q6k"])
def test_cublas_before_and_after_products(kind: str, rows: int) -> None:
    """In a graph, kernels of both kinds have what the one before wrote, though ours begin before that has ended."""
    generator = torch.Generator("cuda").manual_seed(7)
    dense = (torch.randn(4096, 4096, device="cuda", generator=generator) / 64).bfloat16()
    weight = uqff.quantize(dense.cpu(), kind).to("cuda")
    exact, buffers = weight.dequantize(torch.float32).double(), WeightBuffers(weight)
    start = torch.randn(rows, 4096, device="cuda", generator=generator).bfloat16()

    def chain() -> list[torch.Tensor]:
        found = [start + 0]
        for _ in range(6):
            found.append(multiply(found[-1], buffers))
            found.append(torch.nn.functional.linear(found[-1], dense))
        return found

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain()
    for _ in range(10):
        for each in got:
            each.fill_(torch.nan)
        graph.replay()
        assert torch.equal(got[0], start)
        for step, (x, y) in enumerate(pairwise(got)):
            expected = x.double() @ (dense.double() if step % 2 else exact).T
            assert float((y.double() - expected).norm() / expected.norm()) <= 3.2e-3


@pytest.mark.parametrize("outputs", [4096 + 40, 8192 + 24])
@pytest.mark.parametrize(
    "kind", ["q4_0", "q8_0", "q8k", "q4k", "q6k", "q3k", "q5_0", "fp8", "f8q8", "mxfp4", "afq3", "afq4"]
)
def test_products_by_tiles(kind: str, outputs: int) -> None:
    """Outputs and rows that no tile ends with; up to 16 rows the weight is not rounded."""
    numbers = torch.randn(outputs, 768, generator=torch.Generator().manual_seed(4))
    weight = uqff.quantize(numbers, kind).to("cuda")
    exact, stored = weight.dequantize(torch.float32).double(), weight.stored_on_gpu()
    assert stored is not None
    capability = torch.cuda.get_device_capability()
    generator = torch.Generator("cuda").manual_seed(5)
    for dtype, allowed in zip(DTYPES, (2e-3, 5e-4), strict=True):
        for batch in (1, 7, 8, 9, 16, 17, 33, 64, 65, 100, 129, 256):
            x = torch.randn(batch, 768, device="cuda", generator=generator).to(dtype)
            got, again = (kernels.multiply(stored, x, outputs) for _ in range(2))
            made = batch <= tiling.FEW or (
                batch <= tiling.widest(capability) and tiling.chosen(capability, outputs, 768, batch) is not None
            )
            assert (got is not None) == made
            if got is not None and again is not None:
                error = float((got.double() - x.double() @ exact.T).norm() / (x.double() @ exact.T).norm())
                assert error <= allowed * (1 if batch <= tiling.FEW else 1.6)
                assert torch.equal(got, again)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES])
@pytest.mark.parametrize(
    ("head", "heads", "kv_heads"), [(64, 8, 8), (128, 24, 8), (128, 16, 1), (256, 8, 2), (96, 6, 2)]
)
def test_a_token(dtype: torch.dtype, head: int, heads: int, kv_heads: int) -> None:
    """Norms, gates and attention are those of the reference, twice, and the cache is."""
    generator = torch.Generator("cuda").manual_seed(head)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    eps: Any = torch.finfo(dtype).eps
    x, y, weight = numbers(1, 1, 4096), numbers(1, 1, 4096), numbers(4096)
    total, normed = token.add_norm(x, y, weight, 1e-5)
    expected = token_reference.add_norm(x, y, weight, 1e-5)
    assert torch.equal(total, expected[0])
    assert float((normed.double() - expected[1].double()).abs().max()) <= 8 * eps
    assert float((token.gate(x, y).double() - token_reference.gate(x, y).double()).abs().max()) <= 8 * eps
    tokens = 700
    keys, values = numbers(1, kv_heads, tokens, head), numbers(1, kv_heads, tokens, head)
    angles = torch.rand(tokens, head // 2, generator=generator, device="cuda").repeat(1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    attend = token.Attention(heads, head, keys, cos, sin)
    reference = token_reference.Attention(heads, head, keys, cos, sin)
    norms = numbers(head), numbers(head)
    for at in (0, 63, 64, 500, 699):
        given = numbers(1, 1, heads * head), numbers(1, 1, kv_heads * head), numbers(1, 1, kv_heads * head)
        theirs, position = (keys.clone(), values.clone()), torch.tensor([at], device="cuda")
        for _ in range(2):
            mine = keys.clone(), values.clone()
            got = attend(*given, *mine, position, norms, head**-0.5, 1e-6)
            wanted = reference(*given, *theirs, position, norms, head**-0.5, 1e-6)
            assert float((got.double() - wanted.double()).abs().max()) <= 16 * eps
            assert torch.equal(mine[1], theirs[1])
            assert float((mine[0].double() - theirs[0].double()).abs().max()) <= 8 * eps
