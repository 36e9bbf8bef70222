"""Kernels that dequantise, compiled as plain C++: whole blocks of threads run, one after the other."""

from __future__ import annotations

import contextlib
import ctypes

import pytest
import torch

import uqff
from tests.gpu.compiled import Compiled, compiled, known, needs_compiler
from tests.gpu.test_on_the_cpu import MOST
from tools.bench.bits import same_bits
from uqff import QuantizedTensor
from uqff.codes import DType
from uqff.gpu import kernels
from uqff.gpu.source import decoders_source, dequantize_body

pytestmark = needs_compiler

KINDS = (*MOST, "afq8")
DTYPES = (DType.F32, DType.BF16, DType.F16)
SHAPE = (23, 768)
"""Blocks of threads of which the last has less than the others."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[ctypes.CDLL, dict[str, QuantizedTensor]]:
    """Kernels of every type and dtype, and weights with random bytes."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for kind in KINDS:
        weight, parts = uqff.quantize(torch.randn(SHAPE, generator=generator).bfloat16(), kind), {}
        for name, part in weight.parts.items():
            data = torch.randint(0, 256, (part.nbytes,), dtype=torch.uint8, generator=generator)
            parts[name] = data.view(part.dtype.torch).reshape(part.shape)
        weights[kind] = weight.replaced(**parts)
    entries = [decoders_source(sorted({known(weight).family for weight in weights.values()}))]
    takes = "int columns, int rows, int threads, const Weight* at, u8* out"
    for kind, weight in weights.items():
        for dtype in DTYPES:
            body = dequantize_body(known(weight).decoder, dtype, known(weight).runs)
            run = f"launch(columns, rows, threads, [=] {{ const Weight& weight = *at; {body} }});"
            entries.append(f'extern "C" void {kind}_{dtype.name}({takes}) {{ {run} }}\n')
    return compiled(entries, tmp_path_factory.mktemp("dequantize")), weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_have_the_bits_of_the_reference(
    library: tuple[ctypes.CDLL, dict[str, QuantizedTensor]], kind: str, dtype: DType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the bytes stand for, each at its place."""
    functions, weights = library
    weight, out = weights[kind], torch.full(SHAPE, 7.0, dtype=dtype.torch)
    monkeypatch.setattr(kernels, "available", lambda _: True)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(kernels, "_dequantizer", lambda *_: Compiled(functions[f"{kind}_{dtype.name}"]))
    assert kernels.dequantize(known(weight), out)
    assert same_bits(out, weight._dequantize().to(dtype.torch))
