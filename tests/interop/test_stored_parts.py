"""Comparison of stored bytes: one bit counts, the sign of a zero only in the five exempt fields does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import uqff
from tools.interop.stored_parts import Difference, Part, Zeros, blob_part, compare, entries, free_zeros


def part(data: bytes, *, zeros: list[int] | None = None) -> Part:
    """Bytes, with 2-byte floats of free zero sign at the offsets `zeros`."""
    free = Zeros(np.array(zeros or [], np.int64), 2)
    return Part("U8", (len(data),), data, free)


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        (part(b"abcd"), part(b"abcd"), Difference(4, 0, 0, None)),
        (part(b"abcd"), part(b"abce"), Difference(4, 1, 0, 3)),
        (part(b"abcd"), None, Difference(4, 4, 0, 0)),
        (None, part(b"abcd"), Difference(0, 4, 0, 0)),
        (part(b"abcd"), part(b"abcd")._replace(dtype="I8"), Difference(4, 4, 0, 0)),
        (part(b"abcd"), part(b"abcd")._replace(shape=(2, 2)), Difference(4, 4, 0, 0)),
        (part(b"abcd"), part(b"abcd")._replace(data=b"abc"), Difference(4, 1, 0, 3)),
        (part(b"a\0\x80b"), part(b"a\0\0b", zeros=[1]), Difference(4, 0, 1, None)),
        (part(b"a\0\0b"), part(b"a\0\x80b", zeros=[1]), Difference(4, 0, 1, None)),
        (part(b"a\0\x80b"), part(b"a\0\0b"), Difference(4, 1, 0, 2)),
        (part(b"a\0\x80b"), part(b"a\0\0b", zeros=[2]), Difference(4, 1, 0, 2)),
        (part(b"a\x01\x80b"), part(b"a\x01\0b", zeros=[1]), Difference(4, 1, 0, 2)),
        (part(b"a\0\x80b"), part(b"a\x01\0b", zeros=[1]), Difference(4, 2, 0, 1)),
        (part(b"a\0\x80b"), part(b"c\0\0b", zeros=[1]), Difference(4, 1, 1, 0)),
    ],
)
def test_comparison_counts_bytes_and_exempt_zeros(theirs: Part | None, ours: Part | None, expected: Difference) -> None:
    """Every byte counts, as do a wrong dtype, shape or length; of zeros in an exempt field the sign does not."""
    assert compare(theirs, ours) == expected


@pytest.mark.parametrize(
    ("kind", "start", "step", "count", "width"),
    [
        ("q4_1", 2, 20, 16, 2),
        ("q5_1", 2, 24, 16, 2),
        ("q4k", 2, 144, 2, 2),
        ("q5k", 2, 176, 2, 2),
        ("afq4", 0, 4, 8, 4),
        *((kind, 0, 1, 0, 2) for kind in ("q4_0", "q5_0", "q8_0", "q2k", "q3k", "q6k", "hqq4", "fp8", "f8q8", "mxfp4")),
    ],
)
def test_exempt_fields_are_these(kind: str, start: int, step: int, count: int, width: int) -> None:
    """Field m of Q4_1 and Q5_1, dmin of Q4K and Q5K, AFQ's biases; no d, no other type."""
    zeros = free_zeros(uqff.quantize(torch.ones(2, 256), kind))
    assert zeros.offsets.tolist() == [start + step * i for i in range(count)]
    assert zeros.width == width or not count


@pytest.mark.parametrize("kind", ["q4_1", "q5k", "afq3"])
def test_exempt_fields_are_found_in_blobs(kind: str) -> None:
    """The offsets in a blob are those in the blocks, shifted: at each lies the float itself."""
    weight = uqff.quantize(torch.linspace(-1, 1, 512).reshape(2, 256), kind)
    blob, own = blob_part(uqff.Layer(weight)), free_zeros(weight)
    data = (weight.biases if kind == "afq3" else weight.data).numpy().tobytes()  # type: ignore[attr-defined]
    assert len(blob.zeros.offsets) == len(own.offsets) > 0
    for there, here in zip(blob.zeros.offsets, own.offsets, strict=True):
        assert blob.data[there : there + own.width] == data[here : here + own.width]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("q4k", {"": ("U8", (288,)), "dtype": ("U32", ()), "shape": ("U32", (2,))}),
        ("unquant", {"": ("BF16", (2, 256))}),
        (
            "hqq4",
            {
                "": ("U8", (32, 8)),
                **dict.fromkeys(("scales", "zeros"), ("F32", (1, 8))),
                **dict.fromkeys(("bits", "axis", "round_zeros", "channel_wise"), ("U8", ())),
                **dict.fromkeys(("group_size", "optimization_steps"), ("U32", ())),
                "shape": ("U32", (2,)),
            },
        ),
        (
            "fp8",
            {
                "": ("F8_E4M3", (2, 256)),
                **dict.fromkeys(("dequant_w_scale", "dequant_x_scale", "quant_scale"), ("F32", ())),
                "dtype": ("U32", ()),
            },
        ),
        (
            "afq3",
            {
                "": ("U32", (2, 24)),
                **dict.fromkeys(("scales", "biases"), ("BF16", (2, 4))),
                **dict.fromkeys(("bits", "group_size"), ("U8", ())),
            },
        ),
        ("f8q8", {"": ("U8", (528,)), "num_blocks": ("U32", ()), "shape": ("U32", (2,))}),
        ("mxfp4", {"": ("U8", (2, 128)), "scales": ("U8", (2, 8))}),
    ],
)
def test_entries_of_every_family(kind: str, expected: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Names, dtypes and shapes of UQFF 1.2; the format byte is the family's code; the bias lies beside the weight."""
    weight = uqff.quantize(torch.ones(2, 256, dtype=torch.bfloat16), kind)
    made = entries("a.b", uqff.Layer(weight, torch.zeros(2)))
    assert made.pop("a.b.bias") == Part("F32", (2,), bytes(8))
    assert made.pop("a.b.weight.format").data == bytes([weight.family])
    assert {name: (entry.dtype, entry.shape) for name, entry in made.items()} == {
        f"a.b.weight.{name}".rstrip("."): value for name, value in expected.items()
    }
