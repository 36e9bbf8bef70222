"""Floats by their bits: what torch makes of them, whatever their strides, kernels or not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.strategies import FLOATS, random_bytes, seeds
from uqff import DType
from uqff.simd.floats import Floats

EDGES = [0.0, -0.0, 1.0, 2.0**-126, 2.0**-149, -(2.0**-133), 65504.0, 65519.9, 65520.0, 3.0e38, 3.4e38, 1 + 2.0**-8]


@pytest.fixture(params=["numba", "reference"], autouse=True)
def paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything once with kernels and once without."""
    monkeypatch.setenv("UQFF_KERNELS", request.param)


def same(floats: Floats, tensor: torch.Tensor) -> bool:
    """Whether both are the same numbers, NaNs being alike."""
    ours = torch.from_numpy(floats.bits.view(f"i{floats.bits.itemsize}").copy()).view(floats.dtype.torch)
    numbers = torch.equal(ours.isnan(), tensor.isnan())
    signed = torch.int16 if tensor.itemsize == 2 else torch.int32
    held = ours.contiguous().masked_fill(ours.isnan(), 0), tensor.contiguous().masked_fill(tensor.isnan(), 0)
    return ours.dtype is tensor.dtype and numbers and torch.equal(held[0].view(signed), held[1].view(signed))


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", FLOATS)
def test_casts_round_to_nearest_even(source: DType, target: DType) -> None:
    """Every bit pattern of 16 bits, 100,000 random ones of 32, and numbers near the edges, as torch casts them."""
    if source is DType.F32:
        some = random_bytes(1, (400_000,)).view(torch.float32)
        tensor = torch.cat([some, torch.tensor(EDGES), -torch.tensor(EDGES)])
    else:
        tensor = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(source.torch)
    for each in (tensor, tensor[tensor.isfinite()], tensor[:7]):  # with NaNs; as kernels take them; too few for them
        for payloads in (True, False):
            assert same(Floats.of_tensor(each).cast(target, payloads=payloads), each.to(target.torch))


@given(seed=seeds, source=st.sampled_from(FLOATS), target=st.sampled_from(FLOATS), data=st.data())
def test_any_strides(seed: int, source: DType, target: DType, data: st.DataObject) -> None:
    """Transposed, stepped, reversed and cut: what a cast gives is contiguous and in the right order."""
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 70))
    plain = random_bytes(seed, (rows * columns * source.itemsize,)).view(source.torch).view(rows, columns)
    floats = Floats.of_tensor(plain)
    step = data.draw(st.sampled_from([1, 2, 3]))
    for view, expected in ((floats[::step], plain[::step]), (floats.T[1:], plain.T[1:]), (floats[0], plain[0])):
        made = view.cast(target)
        assert made.shape == tuple(expected.shape)
        assert made.bits.flags.c_contiguous
        assert same(made, expected.to(target.torch))
        assert same(view.flat, expected.reshape(-1))


@pytest.mark.parametrize("dtype", FLOATS)
def test_bytes_at_any_address(dtype: DType) -> None:
    """Aligned bytes are shared, others copied; read-only ones serve too."""
    raw = bytes(random_bytes(3, (dtype.itemsize * 40,)).tolist())
    for shift in range(4):
        room = bytearray(shift) + raw
        floats = Floats.of_bytes(memoryview(room)[shift:], dtype, (4, 10))
        assert floats.bits.tobytes() == raw
        assert floats.bits.flags.aligned
    assert Floats.of_bytes(raw, dtype, (40,)).bits.tobytes() == raw
    assert Floats.of_bytes(b"", dtype, (0, 3)).shape == (0, 3)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_first_that_is_not_finite(dtype: DType, bad: float) -> None:
    """Found wherever it is; the largest numbers are not taken for it."""
    tensor = torch.full((3, 1000), torch.finfo(dtype.torch).max, dtype=dtype.torch)
    assert Floats.of_tensor(tensor).is_finite
    for place in (0, 1, 999, 1000, 2999):
        spoiled = tensor.clone()
        spoiled.view(-1)[place:] = bad
        floats = Floats.of_tensor(spoiled)
        assert not floats.is_finite
        assert floats.first_not_finite() == place


def test_a_nan_keeps_sign_and_payload() -> None:
    """Where there is room for them; a kernel would drop them."""
    bits: Any = np.array([0x7FC12345, 0xFFC12345, 0x7F800001] * 32, np.uint32)
    assert Floats(bits, DType.F32).cast(DType.BF16).bits[:3].tolist() == [0x7FC1, 0xFFC1, 0x7FC0]
    narrow: Any = np.array([0x7FC1, 0xFFFF] * 32, np.uint16)
    assert Floats(narrow, DType.BF16).cast(DType.F32).bits[:2].tolist() == [0x7FC10000, 0xFFFF0000]
