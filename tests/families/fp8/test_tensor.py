"""FP8: every code by hand, the three scales, and the rules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import uqff
from tests.support.samples import f32, fp8, header, record, run, u32
from uqff import FormatError
from uqff.families import FP8


def e4m3(code: int) -> float:
    """The value of an e4m3 code, from its definition: s eeee mmm, bias 7, no infinities."""
    sign, exponent, mantissa = (-1) ** (code >> 7), code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


def test_every_code_by_hand() -> None:
    """float32(code) * dequant_w_scale; the other two scales play no part."""
    weight = uqff.deserialize(fp8(record("F8E4M3", (2, 128), bytes(range(256))))).weight
    expected = np.array([e4m3(code) for code in range(256)], np.float32).reshape(2, 128) * np.float32(0.25)
    got = weight.dequantize().numpy()
    number = ~np.isnan(expected)
    assert np.array_equal(np.isnan(got), ~number)
    assert got[number].tobytes() == expected[number].tobytes()
    assert (weight.kind, weight.shape, weight.nbytes) == ("fp8", (2, 128), 256 + 3 * 4)


def test_random_codes_with_an_odd_scale() -> None:
    """One rounding, that of the product."""
    codes = np.random.default_rng(0).integers(0, 256, (33, 65), np.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    blob = (
        header(3)
        + b"\0"
        + record("F8E4M3", codes.shape, codes.tobytes())
        + bytes.fromhex("899d1d3b")
        + f32(9, 9)
        + u32(9)
    )
    expected = np.array([e4m3(code) for code in range(256)], np.float32)[codes] * np.frombuffer(
        bytes.fromhex("899d1d3b"), "<f4"
    )
    assert uqff.deserialize(blob).weight.dequantize().numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("bits", ["0100807f", "0100a07f", "ffffffff", "00000080", "0000c07f"])
def test_scales_keep_their_bits(bits: str) -> None:
    """Signalling NaNs, payloads and negative zero survive: the scales never pass through a Python float."""
    scale = bytes.fromhex(bits)
    blob = header(3) + b"\0" + record("F8E4M3", (1, 2), run(2)) + scale * 3 + u32(9)
    layer = uqff.deserialize(blob)
    assert uqff.serialize(layer) == blob
    assert uqff.serialize(layer.weight.to("cpu")) == blob


SOUND = record("F8E4M3", (1, 2), run(2))


@pytest.mark.parametrize(
    ("blob", "field", "offset"),
    [
        (header(3) + b"\0" + record("U8", (1, 2), run(2)) + f32(1, 1, 1) + u32(9), "weight.dtype", 10),
        (header(3) + b"\0" + record("F8E4M3", (), run(1)) + f32(1, 1, 1) + u32(9), "weight.ndim", 14),
        (header(3) + b"\0" + SOUND + f32(1, 1, 1) + u32(0), "dtype", 40),
        (header(3) + b"\0" + SOUND + f32(1, 1, 1) + u32(6), "dtype", 40),
        (header(3) + b"\0" + SOUND + f32(1, 1), "quant_scale", 36),
        (header(3) + b"\0" + SOUND + f32(1, 1, 1)[:11], "quant_scale", 36),
    ],
)
def test_broken_rules(blob: bytes, field: str, offset: int) -> None:
    """Each rule, and the field that it blames."""
    with pytest.raises(FormatError) as caught:
        uqff.deserialize(blob)
    assert (caught.value.field, caught.value.offset) == (field, offset)
    assert uqff.deserialize(header(3) + b"\0" + SOUND + f32(1, 1, 1) + u32(9)).weight.shape == (1, 2)


def test_inconsistent_record_is_not_written() -> None:
    """The rules hold in both directions."""
    one = torch.tensor(1.0)
    weight = torch.zeros(2, 2)
    for wrong in (
        FP8(weight, one, one, one),
        FP8(weight.to(torch.float8_e4m3fn), one.double(), one, one),
        FP8(weight.to(torch.float8_e4m3fn), one, one, torch.ones(2)),
        FP8(torch.tensor(0.0).to(torch.float8_e4m3fn), one, one, one),
    ):
        with pytest.raises(FormatError):
            uqff.serialize(wrong)
