"""Unquant: every storable dtype, views and alignment, and the promise of a new tensor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import uqff
from tests.support.samples import DTYPE_CODES, header, record, run, u32, unquant
from tests.support.strategies import STORABLE, random_tensor
from uqff import DType, FormatError, ShapeError, UnsupportedError
from uqff.families import Unquant

TWO_BY_TWO = {
    "U8": np.array([[0, 1], [128, 255]], np.uint8),
    "U32": np.array([[0, 1], [2**31, 2**24]], "<u4"),
    "I32": np.array([[0, -1], [-(2**31), 2**24]], "<i4"),
    "I64": np.array([[0, -1], [-(2**63), 2**24]], "<i8"),
    "F16": np.array([[0, -1.5], [65504, 2.0**-24]], "<f2"),
    "F32": np.array([[0, -1.5], [3.4e38, 1e-45]], "<f4"),
    "F64": np.array([[0, -1.5], [0.1, 2.0**100]], "<f8"),
    "I16": np.array([[0, -1], [-(2**15), 2**15 - 1]], "<i2"),
}


@pytest.mark.parametrize("dtype", TWO_BY_TWO)
def test_numbers_by_hand(dtype: str) -> None:
    """The stored numbers, cast to float32 to nearest."""
    values = TWO_BY_TWO[dtype]
    weight = uqff.deserialize(unquant(record(dtype, (2, 2), values.tobytes()))).weight
    assert weight.dequantize().numpy().tobytes() == values.astype(np.float32).tobytes()
    assert (weight.kind, weight.shape, weight.nbytes) == ("unquant", (2, 2), values.nbytes)


def test_bf16_and_e4m3_by_hand() -> None:
    """Those numpy has no type for."""
    weight = uqff.deserialize(unquant(record("BF16", (1, 4), bytes.fromhex("803f00c07f7f0100")))).weight
    assert weight.dequantize().tolist() == [[1.0, -2.0, 3.3895313892515355e38, 9.183549615799121e-41]]
    weight = uqff.deserialize(unquant(record("F8E4M3", (1, 4), bytes.fromhex("387efe01")))).weight
    assert weight.dequantize().tolist() == [[1.0, 448.0, -448.0, 2.0**-9]]


@pytest.mark.parametrize("dtype", STORABLE)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 3)])
def test_of_wraps_and_round_trips(dtype: DType, shape: tuple[int, ...]) -> None:
    """``of`` shares memory; ``weight`` gives the tensor back, bit for bit, in its dtype."""
    tensor = random_tensor(7, dtype, shape)
    wrapped = Unquant.of(tensor)
    assert wrapped.data.data_ptr() == tensor.data_ptr()
    assert wrapped.shape == shape
    back = uqff.deserialize(uqff.serialize(wrapped)).weight
    assert isinstance(back, Unquant)
    assert back == wrapped
    assert back.weight.dtype is tensor.dtype
    assert back.weight.view(torch.uint8).numpy().tobytes() == tensor.view(torch.uint8).numpy().tobytes()


def test_of_a_strided_tensor_stores_its_elements_row_major() -> None:
    """Transposed views are copied into order."""
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3).T
    blob = uqff.serialize(Unquant.of(tensor))
    assert blob[26:] == tensor.contiguous().numpy().tobytes()


def test_of_refuses_other_dtypes_and_scalars() -> None:
    """int8 has no code; a number without dimensions is no weight."""
    with pytest.raises(ShapeError, match="weight without dimensions"):
        Unquant.of(torch.tensor(1.0))
    with pytest.raises(UnsupportedError, match="dtype has no code"):
        Unquant.of(torch.zeros(2, 2, dtype=torch.int8))


@pytest.mark.parametrize("size", [(2, 3), (64, 64)])
@pytest.mark.parametrize("shift", [0, 1, 2, 3])
def test_dequantize_of_plain_float32_is_a_new_tensor(size: tuple[int, int], shift: int) -> None:
    """No arithmetic is needed, yet what is returned must not be the file: writing to it changed the record once."""
    data = run(4 * size[0] * size[1])
    for blob in (unquant(record("F32", size, data)), header(0) + u32(len(data)) + b"\0" + u32(0, 2, *size) + data):
        buffer = bytearray(shift) + bytearray(blob)
        weight = uqff.deserialize(memoryview(buffer)[shift:]).weight
        weight.dequantize().zero_()
        assert buffer[shift:] == blob


@pytest.mark.parametrize("code", [10, 11, 12, 13])
def test_reserved_dtypes_cannot_be_read(code: int) -> None:
    """Their names exist; no tensor of them does."""
    blob = unquant(u32(1, code, 2, 1, 1) + b"\0")
    with pytest.raises(FormatError, match="reserved name") as caught:
        uqff.deserialize(blob)
    assert (caught.value.field, caught.value.offset) == ("weight.dtype", 10)


@pytest.mark.parametrize(
    ("weight", "field", "offset"),
    [
        (u32(4, 14, 1, 1) + run(4), "weight.dtype", 10),
        (u32(4, 6, 0) + run(4), "weight.ndim", 14),
        (u32(4, 6, 9) + u32(*[1] * 9) + run(4), "weight.ndim", 14),
        (u32(4, 6, 2, 1, 0) + run(4), "weight.shape", 18),
        (u32(5, 6, 1, 1) + run(5), "weight.length", 6),
        (u32(4, 6, 1, 2) + run(4), "weight.length", 6),
        (u32(8, 6, 1, 2) + run(7), "weight.data", 22),
        (u32(0, 6, 2, 2**31, 2**31), "weight.data", 26),
    ],
)
def test_broken_tensor_records(weight: bytes, field: str, offset: int) -> None:
    """Each rule of the tensor record, and the field it blames."""
    with pytest.raises(FormatError) as caught:
        uqff.deserialize(unquant(weight))
    assert (caught.value.field, caught.value.offset) == (field, offset)


def test_every_dtype_code_parses() -> None:
    """The near misses of the test above."""
    for name, code in DTYPE_CODES.items():
        size = DType[name].itemsize
        weight = uqff.deserialize(unquant(u32(size, code, 1, 1) + run(size))).weight
        assert isinstance(weight, Unquant)
        assert weight.dtype is DType[name]
