"""The engine's products with ggml types: the reference by hand, and the kernels bit-equal to it."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import pytest
import torch

import uqff
from uqff.families.gguf import cpu_activations, cpu_product, reference_product
from uqff.families.gguf.blocks import BLOCK_TYPES, BlockType
from uqff.families.gguf.reference_dequantize import DEQUANTIZERS
from uqff.families.gguf.tensor import GGUF
from uqff.simd.chain import Chain, Task

pytestmark = pytest.mark.long

TYPES = {each.kind: each for each in BLOCK_TYPES if each.block_size > 1}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def weight_of(kind: str, *shape: int) -> GGUF:
    record = uqff.quantize(torch.from_numpy(normal(*shape, seed=1)), kind)
    assert isinstance(record, GGUF)
    return record


def test_a_block_of_q8_0_by_hand() -> None:
    """Weights 1, 2, ..., 32 in steps of 1; activations 127, 0, ..., 0, -1 are their own codes."""
    blocks = np.zeros((1, 34), np.uint8)
    blocks[0, :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    blocks[0, 2:] = np.arange(1, 33)
    x = np.zeros((1, 32), np.float32)
    x[0, 0], x[0, -1] = 127, -1
    assert reference_product.multiply(x, torch.from_numpy(blocks), TYPES["q8_0"]).tolist() == [[127 - 32]]


def test_activations_are_rounded_to_eight_bits() -> None:
    """0.4 of a step is none, half a step is one: what the exact product keeps is gone."""
    blocks = np.zeros((1, 34), np.uint8)
    blocks[0, :2] = np.frombuffer(np.float16(1).tobytes(), np.uint8)
    blocks[0, 2:] = 1
    x = np.zeros((1, 32), np.float32)
    x[0, :3] = 127, 0.4, 0.5
    assert reference_product.multiply(x, torch.from_numpy(blocks), TYPES["q8_0"]).tolist() == [[128]]


@pytest.mark.parametrize("kind", TYPES)
def test_it_is_the_exact_product_with_rounded_activations(kind: str) -> None:
    """Of every type, within the rounding of float32 sums; Q8_1 keeps sums of activations in float16 besides."""
    record, x = weight_of(kind, 9, 512), normal(3, 512)
    beside = reference_product.ACTIVATIONS[record.block_type.name]
    given = reference_product.activations(x, record.block_type)
    codes = torch.from_numpy(given.view(np.uint8).reshape(-1, beside.type_size))
    rounded = DEQUANTIZERS[beside.name](codes).reshape(3, 512).double()
    dense = record.dequantize().double()
    terms = rounded.abs() @ dense.abs().T
    y = torch.from_numpy(reference_product.multiply(x, record.blocks, record.block_type)).double()
    bound = 2.0**-18 * terms + (2.0**-9 * terms if kind in ("q4_1", "q5_1") else 0)
    assert ((y - rounded @ dense.T).abs() <= bound).all()


@pytest.mark.parametrize("kind", TYPES)
def test_kernels_are_equal_to_the_reference(kind: str) -> None:
    """Any number of rows; zeros, large and tiny activations, and such that are no numbers."""
    record, x = weight_of(kind, 11, 768), normal(5, 768)
    x[1, :300] = 0
    x[2] *= np.float32(2.0**60)
    x[3] *= np.float32(2.0**-140)
    x[4, 5], x[4, 700] = np.nan, np.inf
    expected = reference_product.multiply(x, record.blocks, record.block_type)
    for rows in (1, 2, 3, 5):
        made = cpu_product.product(record)(x[:rows])
        assert np.array_equal(made.view(np.uint32), expected[:rows].view(np.uint32)), rows


def test_tasks_of_a_chain_give_the_same_bits() -> None:
    """Of every type; types that take the same activations share what lays them out, and all are shared by threads."""
    x, laid = np.empty((1, 768), np.float32), dict[Hashable, Task]()
    records = {kind: weight_of(kind, 70, 768) for kind in TYPES}
    made = {kind: np.empty((1, 70), np.float32) for kind in TYPES}
    tasks = [records[kind].engine_task(x, made[kind], laid) for kind in TYPES]
    assert len(laid) == len({(each.name, cpu_activations.SHIFTS.get(kind)) for kind, each in laid_as().items()})
    chain = Chain([[*laid.values()], [task._replace(grain=16) for task in tasks if task is not None]], 3)
    for seed, factor in ((1, 1), (2, np.inf), (3, 0)):
        with np.errstate(invalid="ignore"):
            x[:] = normal(1, 768, seed=seed)
            x[0, :300] *= np.float32(factor)
        chain(3)
        for kind, record in records.items():
            expected = reference_product.multiply(x, record.blocks, record.block_type)
            assert np.array_equal(made[kind].view(np.uint32), expected.view(np.uint32)), kind


def laid_as() -> dict[str, BlockType]:
    """What activations become, by the name of a type."""
    return {each.name: reference_product.ACTIVATIONS[each.name] for each in TYPES.values()}


@pytest.mark.parametrize("kind", ["q8_0", "q8_1", "q8k"])
def test_activations_are_laid_out_as_the_reference_has_them(kind: str) -> None:
    """The codes, scales and sums of the blocks that quantisers write."""
    x = normal(4, 512, seed=3)
    x[1] = 0
    made = cpu_activations.lay_out(x, TYPES[kind])
    given = reference_product.activations(x, TYPES[kind])
    assert np.array_equal(made.codes.view(np.int8), given["qs"].reshape(4, 512))
    assert np.array_equal(made.scales, given["d"].astype(np.float32))
    if kind == "q8_0":
        sums = given["qs"].astype(np.int32).reshape(-1, 4).sum(1)
        assert np.array_equal(made.beside.view(np.int32).reshape(-1), sums)
    elif kind == "q8_1":
        assert np.array_equal(made.beside.view(np.float32), given["s"].astype(np.float32))
    else:
        assert np.array_equal(made.beside.view(np.int16).reshape(-1), given["bsums"].reshape(-1))


def test_extreme_codes_do_not_overflow() -> None:
    """The largest codes of both sides in every place: no sum of products leaves its register."""
    x = np.full((1, 256), 1, np.float32)
    x[0, ::2] = -1
    for kind, block_type in TYPES.items():
        for byte in (0x00, 0x7F, 0x80, 0xFF):
            blocks = np.full((2, 256 // block_type.block_size * block_type.type_size), byte, np.uint8)
            fields = blocks.reshape(-1, block_type.type_size).view(block_type.numpy)
            for name in ("d", "m", "dmin"):
                if name in (block_type.numpy.names or ()):
                    fields[name] = 1
            record = weight_of(kind, 2, 256).replaced(data=torch.from_numpy(blocks))
            expected = reference_product.multiply(x, record.blocks, block_type)
            assert np.array_equal(cpu_product.product(record)(x), expected), (kind, byte)


@pytest.mark.parametrize("kind", TYPES)
def test_kernels_are_equal_to_the_reference_for_any_bytes(kind: str) -> None:
    """Random blocks: scales that are subnormal, infinite, or NaN with a payload, and every code and small scale."""
    block_type, rng = TYPES[kind], np.random.default_rng(7)
    blocks = rng.integers(0, 256, (24, 512 // block_type.block_size, block_type.type_size), np.uint8)
    fields = blocks.view(block_type.numpy)
    for name in {"d", "dmin", "m"} & set(fields.dtype.names or ()):
        numbers = fields[name]
        numbers[:12] = rng.standard_normal(numbers[:12].shape).astype(numbers.dtype)
        numbers[12] = 2.0**-24
        bits = np.uint16 if numbers.dtype.itemsize == 2 else np.uint32
        numbers[13] = np.array(0x7E31 if bits is np.uint16 else 0xFFC12345, bits).view(numbers.dtype)
    record = weight_of(kind, 24, 512).replaced(data=torch.from_numpy(blocks.reshape(24, -1)))
    x = normal(2, 512, seed=5)
    x[1, ::3] = 0
    expected = reference_product.multiply(x, record.blocks, block_type)
    assert np.isnan(expected[:, 13]).all()
    assert np.array_equal(cpu_product.product(record)(x).view(np.uint32), expected.view(np.uint32))
