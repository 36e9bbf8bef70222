"""Kernels of one token, compiled as plain C++: whole blocks of threads run on the CPU, one thread after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gpu import token_reference
from tests.gpu.compiled import Compiled, compiled, launching, needs_compiler
from uqff.codes import DType
from uqff.gpu import token
from uqff.gpu.source import token_source

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ATTENTION = {torch.float32: (128, 3), torch.bfloat16: (96, 8), torch.float16: (32, 2)}
"""Numbers of a head and heads of a block that are compiled."""

pytestmark = needs_compiler


def _entry(name: str, given: str, dtype: torch.dtype, how: tuple[int, ...]) -> str:
    known = DType.of_torch(dtype)
    assert known is not None
    body = f"{name}<{', '.join((known.name, *map(str, how)))}>(given);"
    assert body in token_source(name, given, 0, known, how)
    return launching(f"{name}_{known.name}", given, body)


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels of :mod:`uqff.gpu.token` are those of a library for the CPU."""
    entries = [
        _entry(name, given, dtype, ATTENTION[dtype] if name == "attend" else ())
        for dtype in DTYPES
        for name, given in (("add_norm", "Norm"), ("silu_gate", "Gated"), ("attend", "Attend"))
    ]
    common = token_source("add_norm", "Norm", 0, DType.F32).partition('extern "C"')[0]
    library = compiled([common, *entries], tmp_path_factory.mktemp("token"))

    def kernel(name: str, given: str, threads: int, dtype: DType, how: tuple[int, ...], index: int) -> Compiled:
        assert how in ((), *ATTENTION.values())
        return Compiled(library[f"{name}_{dtype.name}"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token, "_kernel", kernel)
        yield


def _close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to the order of sums, and a last bit where that turns a rounding."""
    assert got.dtype is expected.dtype
    eps = torch.finfo(got.dtype).eps
    assert bool(((got.double() - expected.double()).abs() <= 2 * eps * expected.double().abs() + 4e-6).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [4, 3072, token.WIDEST_NORM])
def test_norms(dtype: torch.dtype, width: int) -> None:
    """The sum has the same bits; the norm is that of the rounded sum; the inputs stay as they are."""
    generator = torch.Generator().manual_seed(width)
    x, y, weight = (torch.randn(1, 1, width, generator=generator).to(dtype) for _ in range(3))
    kept = x.clone(), y.clone()
    for added in (y, None):
        total, normed = token.add_norm(x, added, weight.view(-1), 1e-5)
        expected = token_reference.add_norm(x, added, weight.view(-1), 1e-5)
        assert torch.equal(total, expected[0])
        _close(normed, expected[1])
    assert torch.equal(x, kept[0])
    assert torch.equal(y, kept[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates(dtype: torch.dtype) -> None:
    """More than a block, and not a whole number of them."""
    generator = torch.Generator().manual_seed(1)
    gates, ups = (3 * torch.randn(1, 1, 2052, generator=generator).to(dtype) for _ in range(2))
    _close(token.gate(gates, ups), token_reference.gate(gates, ups))


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "positions"), [(5, (0, 1, 4)), (200, (63, 64, 150)), (40, (33,))])
def test_attention(dtype: torch.dtype, tokens: int, positions: tuple[int, ...], normed: bool) -> None:
    """One chunk and several, the first and the last position; what is not yet in the cache is not read."""
    head, group = ATTENTION[dtype]
    generator = torch.Generator().manual_seed(tokens)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    kv_heads = 2
    heads = kv_heads * group * (2 if group == 8 else 1)  # of which a block has eight
    keys, values = numbers(1, kv_heads, tokens, head), numbers(1, kv_heads, tokens, head)
    angles = torch.rand(tokens, head // 2, generator=generator).repeat(1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    norms = (numbers(head), numbers(head)) if normed else None
    attend = token.Attention(heads, head, keys, cos, sin)
    reference = token_reference.Attention(heads, head, keys, cos, sin)
    for at in positions:
        q, k, v = numbers(1, 1, heads * head), numbers(1, 1, kv_heads * head), numbers(1, 1, kv_heads * head)
        mine, theirs = (keys.clone(), values.clone()), (keys.clone(), values.clone())
        for each in (*mine, *theirs):
            each[:, :, at:] = torch.nan
        position = torch.tensor([at])
        got = attend(q, k, v, *mine, position, norms, head**-0.5, 1e-6)
        expected = reference(q, k, v, *theirs, position, norms, head**-0.5, 1e-6)
        # Rounded scores would differ by more: a few of the last bits of keys turn.
        eps = torch.finfo(dtype).eps
        assert float((got.double() - expected.double()).abs().max()) <= 8 * eps
        assert torch.equal(mine[1].isnan(), theirs[1].isnan())
        assert torch.equal(mine[1].nan_to_num(), theirs[1].nan_to_num())
        _close(mine[0].nan_to_num(), theirs[0].nan_to_num())


def test_heads_of_a_block() -> None:
    """As many as registers have room for; whole blocks share a head of keys."""
    found = [token.heads_of_a_block(group, head) for group, head in ((3, 128), (8, 128), (16, 128), (7, 256), (5, 256))]
    assert found == [3, 8, 8, 1, 1]
