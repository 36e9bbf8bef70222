"""F8Q8: a block by hand, blocks that run across rows, and the rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import uqff
from tests.support.samples import f8q8, header, run, u32
from uqff import FormatError
from uqff.families import F8Q8
from uqff.families.f8q8.tensor import BLOCK


def e4m3(code: int) -> float:
    """The value of an e4m3 code that is a number."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


def test_block_size_is_the_field_order_sum() -> None:
    """One byte of scale, 32 codes."""
    assert BLOCK.fixed_size == 1 + 32


def test_block_by_hand() -> None:
    """``qs * (d / 416)``; code 0x7D is 416, so d is 1."""
    codes = list(range(-16, 16))
    weight = uqff.deserialize(f8q8((1, 32), b"\x7d" + np.array(codes, np.int8).tobytes())).weight
    assert weight.dequantize().tolist() == [[float(code) for code in codes]]
    assert (weight.kind, weight.shape, weight.nbytes) == ("f8q8", (1, 32), 33)


def test_blocks_run_across_rows_and_end_in_padding() -> None:
    """Three rows of 20 are 60 weights in two blocks; the last four codes are no weights."""
    first, second = bytes([0x7D]) + bytes(range(32)), bytes([0x75]) + bytes(range(32, 64))
    weight = uqff.deserialize(f8q8((3, 20), first + second)).weight
    flat = [float(n) for n in range(32)] + [float(n) * 208 / 416 for n in range(32, 60)]
    assert weight.dequantize().flatten().tolist() == flat
    assert weight.dequantize().shape == (3, 20)


def test_random_blocks_against_the_formula() -> None:
    """Bit-equal: one rounding in d / 416, one in the product."""
    blocks = np.random.default_rng(3).integers(0, 256, (70, 33), np.uint8)
    blocks[blocks[:, 0] & 0x7F == 0x7F, 0] = 0
    scale = np.array([e4m3(code) for code in blocks[:, 0].tolist()], np.float32) / np.float32(416)
    expected = blocks[:, 1:].view(np.int8).astype(np.float32) * scale[:, None]
    weight = F8Q8(torch.from_numpy(blocks), (7, 10, 32))
    assert weight.dequantize().numpy().tobytes() == expected.tobytes()
    assert weight._dequantize().numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("blob", "field", "offset"),
    [
        (header(5) + b"\0" + u32(2, 2, 1, 32) + run(66), "num_blocks", 6),
        (header(5) + b"\0" + u32(1, 2, 1, 33) + run(33), "num_blocks", 6),
        (header(5) + b"\0" + u32(0, 2, 1, 32), "num_blocks", 6),
        (header(5) + b"\0" + u32(1, 0) + run(33), "ndim", 10),
        (header(5) + b"\0" + u32(1, 2, 0, 32) + run(33), "shape", 14),
        (header(5) + b"\0" + u32(2, 2, 2, 32) + run(65), "data", 22),
        (header(5) + b"\0" + u32(2**32 - 1, 2, 2, 32) + run(66), "data", 22),
    ],
)
def test_broken_rules(blob: bytes, field: str, offset: int) -> None:
    """Each rule, and the field that it blames."""
    with pytest.raises(FormatError) as caught:
        uqff.deserialize(blob)
    assert (caught.value.field, caught.value.offset) == (field, offset)


def test_near_misses_parse() -> None:
    """32 weights take one block, 33 two."""
    assert uqff.deserialize(f8q8((1, 32), run(33))).weight.shape == (1, 32)
    assert uqff.deserialize(f8q8((33, 1), run(66))).weight.shape == (33, 1)
    assert uqff.deserialize(f8q8((1,), run(33))).weight.shape == (1,)


def test_inconsistent_record_is_not_written() -> None:
    """The rules hold in both directions; half a block is never written."""
    for wrong in (
        F8Q8(torch.zeros(1, 33, dtype=torch.uint8), (1, 33)),
        F8Q8(torch.zeros(2, 33, dtype=torch.uint8), (1, 32)),
        F8Q8(torch.zeros(1, 34, dtype=torch.uint8), (1, 32)),
        F8Q8(torch.zeros(1, 33, dtype=torch.uint8), ()),
    ):
        with pytest.raises(FormatError):
            uqff.serialize(wrong)
