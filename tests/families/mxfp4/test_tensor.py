"""MXFP4: a block by hand, every nibble and scale, and the rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import uqff
from tests.support.samples import mxfp4, record, run
from uqff import FormatError
from uqff.families import MXFP4

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M1 += [-value for value in E2M1]


def test_block_by_hand() -> None:
    """The lower nibble is the even element; scale code 127 is 1, 130 is 8."""
    nibbles = bytes(low | (15 - low) << 4 for low in range(16))
    blob = mxfp4(record("U8", (1, 32), nibbles * 2), record("U8", (1, 2), bytes([127, 130])))
    weight = uqff.deserialize(blob).weight
    pairs = [value for low in range(16) for value in (E2M1[low], E2M1[15 - low])]
    assert weight.dequantize().tolist() == [pairs + [8 * value for value in pairs]]
    assert (weight.kind, weight.shape, weight.nbytes) == ("mxfp4", (1, 64), 32 + 2)


def test_negative_zero_keeps_its_sign() -> None:
    """Nibble 8."""
    weight = uqff.deserialize(mxfp4(record("U8", (1, 16), b"\x88" * 16), record("U8", (1, 1), b"\x7f"))).weight
    assert weight.dequantize().numpy().tobytes() == b"\x00\x00\x00\x80" * 32


def test_every_scale() -> None:
    """The code is the exponent field of a float32: 0 is 0.0 (not 2**-127), 255 infinity."""
    blocks = np.full((256, 16), 0x22, np.uint8)  # 1.0 and 1.0
    weight = MXFP4(torch.from_numpy(blocks), torch.arange(256, dtype=torch.uint8).reshape(256, 1))
    expected = (np.arange(256, dtype=np.uint32) << 23).view(np.float32)
    assert expected[0] == 0
    assert np.isinf(expected[255])
    assert weight.dequantize().numpy().tobytes() == np.repeat(expected, 32).tobytes()


def test_random_blocks_against_the_formula() -> None:
    """Bit-equal: products with powers of two are exact but at the ends."""
    rng = np.random.default_rng(4)
    blocks, scales = rng.integers(0, 256, (2, 5, 48), np.uint8), rng.integers(0, 255, (2, 5, 3), np.uint8)
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(2, 5, 3, 32)
    with np.errstate(over="ignore"):
        expected = np.array(E2M1, np.float32)[codes] * (scales.astype(np.uint32) << 23).view(np.float32)[..., None]
    weight = MXFP4(torch.from_numpy(blocks), torch.from_numpy(scales))
    assert weight.shape == (2, 5, 96)
    assert weight.dequantize().numpy().tobytes() == expected.tobytes()
    assert weight._dequantize().numpy().tobytes() == expected.tobytes()


BLOCKS = record("U8", (2, 16), run(32))
SCALES = record("U8", (2, 1), run(2))


@pytest.mark.parametrize(
    ("blob", "field"),
    [
        (mxfp4(record("I16", (2, 16), run(64)), SCALES), "blocks.dtype"),
        (mxfp4(BLOCKS, record("F8E4M3", (2, 1), run(2))), "scales.dtype"),
        (mxfp4(record("U8", (), run(1)), SCALES), "blocks.ndim"),
        (mxfp4(record("U8", (2, 15), run(30)), SCALES), "blocks.shape"),
        (mxfp4(record("U8", (2, 32), run(64)), SCALES), "scales.shape"),
        (mxfp4(BLOCKS, record("U8", (2,), run(2))), "scales.shape"),
        (mxfp4(BLOCKS, record("U8", (), run(1))), "scales.shape"),
        (mxfp4(BLOCKS, record("U8", (1, 2), run(2))), "scales.shape"),
    ],
)
def test_broken_rules(blob: bytes, field: str) -> None:
    """Each rule, and the field that it blames."""
    with pytest.raises(FormatError) as caught:
        uqff.deserialize(blob)
    assert caught.value.field == field
    assert caught.value.offset is not None


def test_near_misses_parse() -> None:
    """The blobs that the broken ones differ from in one part."""
    assert uqff.deserialize(mxfp4(BLOCKS, SCALES)).weight.shape == (2, 32)
    one = mxfp4(record("U8", (16,), run(16)), record("U8", (1,), run(1)))
    assert uqff.deserialize(one).weight.shape == (32,)


def test_inconsistent_record_is_not_written() -> None:
    """The rules hold in both directions."""
    u8 = torch.uint8
    for wrong in (
        MXFP4(torch.zeros(2, 15, dtype=u8), torch.zeros(2, 1, dtype=u8)),
        MXFP4(torch.zeros(2, 16, dtype=u8), torch.zeros(2, 2, dtype=u8)),
        MXFP4(torch.zeros(2, 16, dtype=u8), torch.zeros(2, 1)),
    ):
        with pytest.raises(FormatError):
            uqff.serialize(wrong)
