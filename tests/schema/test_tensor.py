"""The tensor record R."""

from __future__ import annotations

import pytest

from tests.support.samples import DTYPE_CODES, record, run, u32
from uqff import DType, FormatError
from uqff.schema.bricks import Placeholder
from uqff.schema.tensor import TENSOR


@pytest.mark.parametrize("dtype", DTYPE_CODES)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (1, 2, 1, 2, 1, 2, 1, 2)])
def test_both_ways(dtype: str, shape: tuple[int, ...]) -> None:
    """Every dtype, ranks 0 to 8."""
    size = DType[dtype].itemsize
    for dim in shape:
        size *= dim
    data = record(dtype, shape, run(size))
    fields = TENSOR.read(data)
    assert (fields["length"], fields["dtype"], fields["ndim"], fields["shape"]) == (
        size,
        DType[dtype],
        len(shape),
        shape,
    )
    assert bytes(fields["data"]) == run(size)
    assert b"".join(map(bytes, TENSOR.chunks(fields))) == data
    assert TENSOR.nbytes({**fields, "data": Placeholder(size)}) == len(data) == 4 + 4 + 4 + 4 * len(shape) + size


@pytest.mark.parametrize(("length", "items"), [(7, 2), (9, 2), (0, 2), (4, 2), (12, 2)])
def test_length_agrees_with_shape_and_dtype(length: int, items: int) -> None:
    """Two F32 are 8 bytes; nothing is read by the length alone."""
    with pytest.raises(FormatError, match="length does not fit shape and dtype") as caught:
        TENSOR.read(u32(length, 6, 1, items) + run(length))
    assert (caught.value.field, caught.value.offset) == ("length", 0)
    assert (caught.value.expected, caught.value.got) == (8, length)


def test_payload_of_the_wrong_size_is_not_built() -> None:
    """Shape and dtype say how many bytes there are."""
    for data in (memoryview(run(7)), Placeholder(9)):
        with pytest.raises(FormatError, match="payload has the wrong size"):
            TENSOR.nbytes({"dtype": DType.F32, "shape": (2,), "data": data})
