"""uqff.inspection.values: decoded values as people and JSON see them."""

from __future__ import annotations

import math
import struct

import pytest

from uqff import DType
from uqff.inspection.values import decode_elements, json_value, value_text

ONES = [
    (DType.U8, b"\x01"),
    (DType.U32, struct.pack("<I", 1)),
    (DType.I32, struct.pack("<i", 1)),
    (DType.I64, struct.pack("<q", 1)),
    (DType.F16, b"\x00\x3c"),
    (DType.BF16, b"\x80\x3f"),
    (DType.F32, struct.pack("<f", 1)),
    (DType.F64, struct.pack("<d", 1)),
    (DType.I16, struct.pack("<h", 1)),
    (DType.F8E4M3, b"\x38"),
]


def test_every_storable_dtype_has_its_one() -> None:
    """A dtype without a decoder would break the inspection of a valid file."""
    assert {dtype for dtype, _ in ONES} == {dtype for dtype in DType if dtype.storable}
    assert [decode_elements(memoryview(one * 3), dtype, 2) for dtype, one in ONES] == [[1, 1]] * len(ONES)


def test_e4m3_is_torch_bit_for_bit() -> None:
    """All 256 codes."""
    import torch

    codes = torch.arange(256, dtype=torch.uint8)
    wanted = codes.view(torch.float8_e4m3fn).to(torch.float32).tolist()
    found = decode_elements(memoryview(bytes(range(256))), DType.F8E4M3, 256)
    assert list(map(struct.Struct("<f").pack, found)) != []
    for code in range(256):
        if math.isnan(wanted[code]):
            assert math.isnan(found[code])
        else:
            assert struct.pack("<f", found[code]) == struct.pack("<f", wanted[code])


@pytest.mark.parametrize(
    ("number", "shown"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity"), (0.5, 0.5)]
)
def test_json_has_no_infinities(number: float, shown: object) -> None:
    """They are texts, also within lists."""
    assert json_value(number) == shown
    assert json_value([number]) == [shown]


def test_text_of_a_long_list_is_short() -> None:
    """Eight numbers and how many there are."""
    assert value_text(list(range(9))) == "[0, 1, 2, 3, 4, 5, 6, 7, ... 9 in all]"
    assert value_text(tuple(range(8))) == "[0, 1, 2, 3, 4, 5, 6, 7]"
    assert value_text(struct.unpack("<f", struct.pack("<f", 0.1))[0]) == "0.100000001"
