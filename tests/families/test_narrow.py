"""Slices of records: bit-equal to slices of the whole, views where they can be, refused where they are not exact."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import uqff
from tests.support.strategies import afq, random_bytes, random_tensor, weights
from uqff import DType, Layer, QuantizedTensor, ShardError
from uqff.families import AFQ, F8Q8, GGUF, HQQ, MXFP4, Unquant
from uqff.families.gguf.blocks import block_type_of_kind
from uqff.numerics.packing import PLANES


def same_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same shape and bits; NaNs are equal whatever their payload."""
    a, b = a.contiguous(), b.contiguous()
    equal = (a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())
    return a.shape == b.shape and bool(equal.all())


@st.composite
def ranges(draw: st.DrawFn) -> tuple[QuantizedTensor, int, int, int]:
    """A weight and a range of one of its dimensions, aligned more often than not."""
    weight = draw(weights)
    dim = draw(st.integers(0, len(weight.shape) - 1))
    size = weight.shape[dim]
    unit = draw(st.sampled_from([1, weight.alignment(dim), weight.alignment(dim)]))
    cuts = sorted({0, size, *range(0, size, unit)})
    start, end = sorted(draw(st.lists(st.sampled_from(cuts), min_size=2, max_size=2, unique=True)))
    return weight, dim, start, end - start


def make_hqq(bits: int, shape: tuple[int, ...], group_size: int, axis: int = 0, seed: int = 0) -> HQQ:
    groups = math.prod(shape) // group_size
    rows, columns = (group_size, groups) if axis == 0 else (groups, group_size)
    per_word = PLANES[bits]
    width = 4 * columns if bits == 3 else columns
    parts = (1, groups) if axis == 0 else (groups, 1)
    scales = torch.arange(1, groups + 1, dtype=torch.float32).view(parts)
    return HQQ(random_bytes(seed, (-(-rows // per_word), width)), scales, -scales, shape, bits, group_size, axis)


@given(ranges())
@example((F8Q8(random_bytes(1, (5, 33)), (8, 20)), 0, 0, 8))
@example((make_hqq(4, (8, 16), 4), 0, 4, 4))
def test_a_slice_has_the_bits_of_the_slice_of_the_whole(case: tuple[QuantizedTensor, int, int, int]) -> None:
    """Aligned slices are always cut; any slice that is cut is exact, valid, and parses again."""
    weight, dim, start, length = case
    unit, end, size = weight.alignment(dim), start + length, weight.shape[dim]
    aligned = start % unit == 0 and (end % unit == 0 or end == size)
    if length != size and not weight.can_narrow(dim, start, length):
        assert not aligned
        with pytest.raises(ShardError, match=f"multiples of {unit} along dimension {dim} of {size}"):
            weight.narrow(dim, start, length)
        return
    part = weight.narrow(dim, start, length)
    assert type(part) is type(weight)
    assert part.shape == (*weight.shape[:dim], length, *weight.shape[dim + 1 :])
    assert same_numbers(part._dequantize(), weight._dequantize().narrow(dim, start, length))
    assert same_numbers(part.dequantize(), part._dequantize())
    assert uqff.deserialize(uqff.serialize(part)).weight == part
    assert part == weight.narrow(dim - len(weight.shape), start, length)


@given(ranges())
def test_slices_join_to_the_whole(case: tuple[QuantizedTensor, int, int, int]) -> None:
    """``join`` undoes ``narrow`` byte for byte, in whatever order, with a slice given twice, from the sizes alone."""
    weight, dim, start, length = case
    size = weight.shape[dim]
    cuts = [(a, b - a) for a, b in ((0, start), (start, start + length), (start + length, size)) if a < b]
    if len(cuts) == 1 or not all(weight.can_narrow(dim, *cut) for cut in cuts):
        return
    slices = [(cut[0], weight.narrow(dim, *cut)) for cut in cuts]
    joined = weight.to("meta").join([*slices[::-1], slices[0]], dim)
    if isinstance(weight, HQQ) and weight.bits == 3:  # what random bytes have in the padding is not kept
        assert same_numbers(joined._dequantize(), weight._dequantize())
    else:
        assert joined == weight
    with pytest.raises(ShardError, match="slices do not make up the weight"):
        weight.join(slices[1:], dim)
    with pytest.raises(ShardError, match="slices do not make up the weight"):
        weight.join(slices[:-1], dim)


def exact_hqq(weight: HQQ, dim: int, start: int, length: int) -> bool:
    """Whether there is a matrix in which each group has one scale, and whose rows pack, by trying them all."""
    numbers = torch.arange(weight.numel)
    groups = weight.numel // weight.group_size
    group = (numbers % groups if weight.axis == 0 else numbers // weight.group_size).view(weight.shape)
    flat = group.narrow(dim, start, length).reshape(-1)
    per_word = 1 if weight.bits == 3 else PLANES[weight.bits]
    for size in (n for n in range(1, len(flat) + 1) if len(flat) % n == 0):
        rows = size if weight.axis == 0 else len(flat) // size
        matrix = flat.view(size, -1) if weight.axis == 0 else flat.view(-1, size).T
        if rows % per_word == 0 and bool((matrix == matrix[0]).all()):
            return True
    return False


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("bits", "shape", "group_size"),
    [
        (4, (8, 6), 4),
        (4, (6, 8), 16),
        (4, (3, 8), 4),
        (8, (6, 4), 8),
        (3, (4, 10), 20),
        (2, (8, 8), 8),
        (1, (8, 12), 24),
        (4, (2, 4, 6), 8),
        (2, (3, 4, 4), 4),
    ],
)
def test_hqq_cuts_everything_that_is_exact(bits: int, shape: tuple[int, ...], group_size: int, axis: int) -> None:
    """The rule for HQQ refuses a slice if and only if no HQQ tensor of its bits holds it: by brute force."""
    groups = math.prod(shape) // group_size
    if bits != 3 and (group_size if axis == 0 else groups) % PLANES[bits]:
        return  # such a tensor does not pack
    weight = make_hqq(bits, shape, group_size, axis)
    for dim, size in enumerate(shape):
        for start in range(size):
            for length in range(1, size - start + 1):
                if length == size:
                    continue
                assert weight.can_narrow(dim, start, length) == exact_hqq(weight, dim, start, length), (dim, start)
                if weight.can_narrow(dim, start, length):
                    part = weight.narrow(dim, start, length)
                    assert same_numbers(part._dequantize(), weight._dequantize().narrow(dim, start, length))


def test_an_output_slice_of_hqq_is_a_smaller_group_with_the_same_scales() -> None:
    """64 x 256 in groups of 64: half the outputs are the same 256 columns with 32 rows; half the inputs 128 columns."""
    weight = make_hqq(4, (64, 256), 64)
    half = weight.narrow(0, 32, 32)
    assert (half.group_size, tuple(half.scales.shape), tuple(half.w_q.shape)) == (32, (1, 256), (16, 256))
    assert torch.equal(half.scales, weight.scales)
    assert half.scales.data_ptr() == weight.scales.data_ptr()
    inputs = weight.narrow(1, 128, 128)
    assert (inputs.group_size, tuple(inputs.scales.shape)) == (64, (1, 128))
    assert torch.equal(inputs.scales, weight.scales[:, 128:])
    assert (weight.alignment(0), weight.alignment(1)) == (2, 1)


KINDS = ["q4_0", "q4k", "q8k", "f32", "f16", "afq3", "mxfp4", "fp8", "f8q8", "unquant"]
ALIGNMENT = {"q4_0": 32, "q4k": 256, "q8k": 256, "afq3": 64, "mxfp4": 32, "f8q8": 32}


def make(kind: str, out: int, inputs: int) -> QuantizedTensor:
    """A weight of a kind with arbitrary finite contents."""
    values = random_bytes(out, (out, inputs)).to(torch.float32) / 64 - 2
    block_type = block_type_of_kind(kind)
    if block_type is not None and block_type.block_size == 1:
        return GGUF(values.to(torch.float32 if kind == "f32" else torch.float16).view(torch.uint8), block_type)
    return uqff.quantize(values, kind) if kind != "mxfp4" else MXFP4(*_mxfp4(out, inputs))


def _mxfp4(out: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    return random_bytes(0, (out, inputs // 2)), torch.full((out, inputs // 32), 127, dtype=torch.uint8)


def pointers(weight: QuantizedTensor) -> dict[str, tuple[int, int]]:
    """First and last byte of each stored part."""
    places = {}
    for name, part in weight.parts.items():
        start = part.array().ctypes.data
        places[name] = (start, start + part.nbytes)
    return places


@pytest.mark.parametrize("kind", KINDS)
def test_alignment_and_memory(kind: str) -> None:
    """Inputs are cut at blocks, outputs anywhere; a slice of outputs is a view, one of inputs owns its bytes."""
    weight = make(kind, 4, 512)
    assert (weight.alignment(0), weight.alignment(1)) == (1, ALIGNMENT.get(kind, 1))
    rows, columns, whole = weight.narrow(0, 1, 2), weight.narrow(1, 256, 256), pointers(weight)
    for name, (first, last) in pointers(rows).items():
        assert whole[name][0] <= first < last <= whole[name][1], name
        part = rows.parts[name].tensor()
        assert part.untyped_storage().nbytes() == part.nbytes, name
    for name, (first, last) in pointers(columns).items():
        if last - first == 4:  # the scales of FP8 belong to all
            continue
        assert last <= whole[name][0] or first >= whole[name][1], name
        assert 2 * (last - first) == whole[name][1] - whole[name][0], name


def test_f8q8_where_blocks_run_across_rows() -> None:
    """Rows of 20: block edges meet row edges every 8 rows; inputs are not cut. A stack of them is cut by experts."""
    weight = uqff.quantize(random_bytes(3, (24, 20)).to(torch.float32), "f8q8")
    assert (weight.alignment(0), weight.alignment(1)) == (8, 20)
    assert isinstance(weight, F8Q8)
    part = weight.narrow(0, 8, 16)
    assert torch.equal(part.blocks, weight.blocks[5:])
    with pytest.raises(ShardError, match="f8q8 in multiples of 8 along dimension 0 of 24, got 4 to 8"):
        weight.narrow(0, 4, 4)
    with pytest.raises(ShardError, match="f8q8 in multiples of 20 along dimension 1 of 20"):
        weight.narrow(1, 0, 10)
    stack = F8Q8(random_bytes(4, (2 * 24 * 20 // 32, 33)), (2, 24, 20))
    assert [stack.alignment(dim) for dim in range(3)] == [1, 8, 20]


@pytest.mark.parametrize(
    ("dim", "start", "length", "message"),
    [
        (2, 0, 1, "no such dimension: expected 0 to 1 for shape [4, 512], got 2"),
        (-3, 0, 1, "no such dimension"),
        (0, -1, 2, "slice beyond the dimension"),
        (0, 0, 0, "slice beyond the dimension"),
        (0, 3, 2, "slice beyond the dimension: expected a range within the 4 of dimension 0, got 3 to 5"),
        (1, 0, 128, "expected q4k in multiples of 256 along dimension 1 of 512, got 0 to 128"),
        (1, 128, 256, "expected q4k in multiples of 256 along dimension 1 of 512, got 128 to 384"),
    ],
)
def test_refusals(dim: int, start: int, length: int, message: str) -> None:
    """Each says what would have been right."""
    with pytest.raises(ShardError) as raised:
        make("q4k", 4, 512).narrow(dim, start, length)
    assert message in str(raised.value)


def test_the_whole_is_the_record_itself() -> None:
    """Nothing is copied where nothing is cut, whatever the alignment."""
    weight = make_hqq(4, (6, 2), 6)
    assert weight.narrow(1, 0, 2) is weight


def test_parts_of_one_fp8_weight_share_its_scale() -> None:
    """Slices quantised by themselves have scales of their own, and are no slices of one weight."""
    whole = uqff.quantize(torch.tensor([[100.0], [1000.0]]), "fp8")
    low, high = (uqff.quantize(torch.tensor([[x]]), "fp8") for x in (100.0, 1000.0))
    with pytest.raises(ShardError, match="slices were not cut from one weight"):
        whole.join([(0, low), (1, high)], 0)


@given(afq(), st.data())
def test_the_bias_follows_the_outputs(weight: AFQ, data: st.DataObject) -> None:
    """Outputs and experts take their part of the bias; a slice of the inputs keeps all of it."""
    if len(weight.shape) < 2:
        return
    bias_shape = weight.shape[data.draw(st.integers(0, len(weight.shape) - 2)) : -1]
    layer = Layer(weight, random_tensor(0, DType.F32, bias_shape))
    dim = data.draw(st.integers(0, len(weight.shape) - 1))
    start = weight.alignment(dim) if weight.shape[dim] > weight.alignment(dim) else 0
    part = layer.narrow(dim, start, weight.alignment(dim))
    assert part.weight == weight.narrow(dim, start, weight.alignment(dim))
    assert part.bias is not None
    assert layer.bias is not None
    axis = dim - (len(weight.shape) - 1 - len(bias_shape))
    expected = layer.bias.narrow(axis, start, 1) if 0 <= axis < len(bias_shape) else layer.bias
    assert part == Layer(part.weight, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages with mprotect")
def test_only_the_pages_of_the_slice_are_touched() -> None:
    """All pages of the payload but those of the slice are made inaccessible: touching one would kill the process."""
    script = Path(__file__).with_name("guarded_slice.py")
    done = subprocess.run([sys.executable, "-X", "faulthandler", script], capture_output=True, text=True, check=False)
    assert not done.returncode, f"{done.stdout}{done.stderr}"


def test_unquant_slices_of_every_alignment_in_a_blob() -> None:
    """A float32 weight at an odd address stays a view, and its slice too."""
    blob = uqff.serialize(Unquant.of(torch.arange(12.0).view(4, 3)))
    for shift in range(4):
        layer: Any = uqff.deserialize(memoryview(bytearray(shift) + blob)[shift:])
        assert torch.equal(layer.weight.narrow(0, 1, 2).dequantize(), torch.arange(3.0, 9.0).view(2, 3))
        assert torch.equal(layer.weight.narrow(1, 1, 1).dequantize(), torch.arange(1.0, 12.0, 3.0).view(4, 1))
