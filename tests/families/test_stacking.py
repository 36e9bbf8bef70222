"""Stacks of experts: bit-equal to their matrices, taken apart again byte for byte, refused where they are not exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import uqff
from tests.support.strategies import random_bytes, seeds, weights
from uqff import QuantizedTensor, ShapeError, ShardError
from uqff.families import AFQ, F8Q8, FP8, HQQ, Unquant, stack


def same_numbers(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Same shape and bits; NaNs are equal whatever their payload."""
    a, b = a.contiguous(), b.contiguous()
    equal = (a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())
    return a.shape == b.shape and bool(equal.all())


def alike(weight: QuantizedTensor, seed: int) -> QuantizedTensor:
    """Another weight of the same type, shape and parameters, with whatever a stack shares unchanged."""
    shared = {"dequant_w_scale", "dequant_x_scale", "quant_scale"}
    if isinstance(weight, HQQ) and weight.axis == 0:
        shared |= {"scales", "zeros"}
    changed: dict[str, Any] = {}
    for i, (name, part) in enumerate(weight.parts.items()):
        if name not in shared:
            tensor = part.tensor()
            changed[name] = random_bytes(seed + i, (tensor.nbytes,)).view(tensor.dtype).view(tensor.shape)
    return replace(weight, **changed)  # type: ignore[type-var]


def stackable(weight: QuantizedTensor) -> bool:
    """F8Q8 stacks if blocks end with the matrix; everything else that ``alike`` makes does."""
    return not isinstance(weight, F8Q8) or weight.numel % 32 == 0


@given(weights, seeds, st.integers(1, 4))
def test_a_stack_is_its_matrices(weight: QuantizedTensor, seed: int, count: int) -> None:
    """Numbers are those of each matrix, the stack parses again, and comes apart into the same bytes."""
    records = [weight, *(alike(weight, seed + i) for i in range(1, count))]
    if count > 1 and not stackable(weight):
        with pytest.raises(ShardError, match="blocks would run across experts"):
            stack(records)
        return
    made = stack(records)
    assert type(made) is type(weight)
    assert (made.kind, made.shape) == (weight.kind, (count, *weight.shape))
    for i, record in enumerate(records):
        expected = record._dequantize()
        assert same_numbers(made._dequantize()[i], expected)
        assert same_numbers(made.dequantize()[i], expected)
        assert same_numbers(made.dequantize_expert(i), expected)
    if len(made.shape) <= 4:
        assert uqff.deserialize(uqff.serialize(made)).weight == made
    if isinstance(weight, HQQ) and weight.bits == 3:  # what random bytes have in the padding is not kept
        assert all(same_numbers(a._dequantize(), b._dequantize()) for a, b in zip(made.unstack(), records, strict=True))
    else:
        assert made.unstack() == records


@given(weights, st.integers(1, 3))
def test_sizes_are_known_without_payloads(weight: QuantizedTensor, count: int) -> None:
    """On the meta device a stack has the shapes and sizes of the real one."""
    if not stackable(weight):
        return
    made, meta = stack([weight] * count), stack([weight.to("meta")] * count)
    assert (meta.shape, meta.nbytes, repr(meta.device)) == (made.shape, made.nbytes, "device(type='meta')")
    assert {n: (p.dtype, tuple(p.shape)) for n, p in meta.parts.items()} == {
        n: (p.dtype, tuple(p.shape)) for n, p in made.parts.items()
    }


def parts_of_blob(kind: str, seed: int, shift: int) -> QuantizedTensor:
    """A weight whose parts lie at any address."""
    values = random_bytes(seed, (4, 128)).to(torch.float32) / 64 - 2
    blob = uqff.serialize(uqff.quantize(values, kind))
    return uqff.deserialize(memoryview(bytearray(shift) + blob)[shift:]).weight


@pytest.mark.parametrize("kind", ["afq4", "unquant", "q4_0", "mxfp4"])
def test_parts_at_odd_addresses_stack(kind: str) -> None:
    """Whether scales of a blob are aligned does not matter, nor that some are and others are not."""
    records = [parts_of_blob(kind, 7 + shift, shift) for shift in range(4)]
    if kind == "afq4":
        assert {record.parts["scales"].array().ctypes.data % 4 == 0 for record in records} == {True, False}
    made = stack(records)
    assert torch.equal(made.dequantize(), torch.stack([record.dequantize() for record in records]))
    assert made.unstack() == records


def test_experts_of_a_file_come_apart_as_views() -> None:
    """Nothing is copied, also where scales are not aligned."""
    values = random_bytes(1, (3, 4, 128)).to(torch.float32)
    blob = bytearray(uqff.serialize(uqff.quantize(values, "afq4")))
    first = torch.frombuffer(blob, dtype=torch.uint8).data_ptr()
    record = uqff.deserialize(blob).weight
    for expert in record.unstack():
        assert isinstance(expert, AFQ)
        assert expert.shape == (4, 128)
        for part in expert.parts.values():
            address = part.array().ctypes.data
            assert first <= address < first + len(blob)


def made(kind: str, out: int = 4, inputs: int = 64, **kwargs: Any) -> QuantizedTensor:
    return uqff.quantize(torch.linspace(-1, 1, out * inputs).view(out, inputs), kind, **kwargs)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (list, "no weights to stack: expected at least 1, got 0"),
        (
            lambda: [made("q8_0"), made("q8_0"), made("q4_0"), made("q8_0")],
            "weights do not stack: expected q8_0 [4, 64] (data uint8) for all 4, "
            "got q4_0 [4, 64] (data uint8) for number 2",
        ),
        (
            lambda: [made("q8_0", 2), made("q8_0"), made("q8_0")],
            "expected q8_0 [4, 64] (data uint8) for all 3, got q8_0 [2, 64] (data uint8) for number 0",
        ),
        (
            lambda: [
                made("afq4", group_size=32),
                made("afq4"),
                made("afq4"),
                made("afq4", group_size=32),
                made("afq4"),
            ],
            "expected afq4 [4, 64] (bits=4, group_size=64, w_q uint8, scales float32, biases float32) for all 5, "
            "got afq4 [4, 64] (bits=4, group_size=32, w_q uint8, scales float32, biases float32) "
            "for numbers 0, 3",
        ),
        (
            lambda: [made("unquant"), Unquant.of(torch.zeros(4, 64, dtype=torch.bfloat16))],
            "got unquant [4, 64] (dtype=BF16, data uint8) for number 1",
        ),
        (
            lambda: [made("q8_0"), made("q8_0").to("meta")],
            "weights do not stack: expected cpu for all 2, got meta for number 1",
        ),
        (
            lambda: [made("fp8"), uqff.quantize(torch.full((4, 64), 1000.0), "fp8"), made("fp8")],
            "weights do not stack: fp8 has one dequant_w_scale for all: expected the same in all 3, "
            "got another in number 1 (field dequant_w_scale)",
        ),
        (
            lambda: [made("hqq4"), uqff.quantize(torch.full((4, 64), 0.5), "hqq4")],
            "weights do not stack: hqq4 has one scales for all: expected the same in all 2, "
            "got another in number 1 (field scales)",
        ),
        (
            lambda: [made("f8q8", 3, 20), made("f8q8", 3, 20)],
            "weights do not stack: f8q8 blocks would run across experts: "
            "expected elements in multiples of 32, got [3, 20], 60 elements",
        ),
    ],
)
def test_what_does_not_stack(records: Callable[[], list[QuantizedTensor]], message: str) -> None:
    """Each error names the odd ones and what they are; the majority decides who is odd."""
    with pytest.raises(ShardError) as raised:
        stack(records())
    assert message in str(raised.value)


def test_a_vector_is_no_stack() -> None:
    """There is no dimension of experts to take apart, and no expert beyond the last."""
    with pytest.raises(ShardError, match=r"weight is not a stack: expected \[experts, ...\], got \[4\]"):
        Unquant.of(torch.zeros(4)).unstack()
    for expert in (-1, 4):
        with pytest.raises(ShardError, match=f"no such expert: expected 0 to 3, got {expert}"):
            made("fp8").dequantize_expert(expert)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("hqq4", (128, 4, 32)), ("hqq4", (64, 4, 16)), ("f8q8", (5, 3, 20)), ("hqq8", (8, 4, 32))],
)
def test_single_experts_of_stacks_that_do_not_come_apart(kind: str, shape: tuple[int, ...]) -> None:
    """A stack quantised as one has HQQ groups and F8Q8 blocks across experts; each is read all the same."""
    record = uqff.quantize(random_bytes(5, shape).to(torch.float32), kind)
    whole = record.dequantize()
    for expert in range(shape[0]):
        assert torch.equal(record.dequantize_expert(expert), whole[expert])
        assert torch.equal(record.dequantize_expert(expert, torch.bfloat16), whole[expert].bfloat16())
        out = torch.empty(shape[1:], dtype=torch.float16)
        assert record.dequantize_expert(expert, out=out).data_ptr() == out.data_ptr()
        assert torch.equal(out, whole[expert].half())
    with pytest.raises(ShapeError, match="wrong shape"):
        record.dequantize_expert(0, out=torch.empty(1, 1))
    if record.can_narrow(0, 0, 1):
        assert stack(record.unstack()) == record
    else:
        with pytest.raises(ShardError, match="slice cannot be cut exactly"):
            record.unstack()


def test_fp8_of_magnitudes_up_to_one_stacks() -> None:
    """Their scale is 416, whatever the weights: what the engine wrote per expert becomes one tensor."""
    records = [uqff.quantize(torch.linspace(-1 / n, 1 / n, 64).view(2, 32), "fp8") for n in (1, 2, 3)]
    joined = stack(records)
    assert isinstance(joined, FP8)
    assert joined.unstack() == records
