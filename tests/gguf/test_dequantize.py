"""Types that UQFF has no code for: sizes and numbers as the gguf package has them, codebooks, blocks by hand."""

from __future__ import annotations

import pickle
from typing import Any

import gguf as package
import numpy as np
import pytest
from gguf import quants

from uqff.gguf import grids
from uqff.gguf.dequantize import TILE, dequantized
from uqff.gguf.types import FOREIGN_TYPES, UNREAD_TYPES, ForeignType, ggml_type, type_name

BLOCKS = [each for each in FOREIGN_TYPES if each.block_size > 1]
PLAIN = [each for each in FOREIGN_TYPES if each.block_size == 1]


@pytest.mark.parametrize("block_type", FOREIGN_TYPES, ids=lambda t: t.name)
def test_names_codes_and_sizes(block_type: ForeignType) -> None:
    theirs = package.GGMLQuantizationType(block_type.code)
    assert theirs.name == block_type.name
    assert package.GGML_QUANT_SIZES[theirs] == (block_type.block_size, block_type.type_size)
    assert ggml_type(block_type.code) is block_type
    assert pickle.loads(pickle.dumps(block_type)) is block_type


def test_every_type_of_the_package_is_known_or_named() -> None:
    for each in package.GGMLQuantizationType:
        assert (ggml_type(each) is None) == (each in UNREAD_TYPES)
        assert type_name(each).replace("_", "") == each.name.replace("_", "")


@pytest.mark.parametrize("block_type", BLOCKS, ids=lambda t: t.name)
def test_random_blocks_as_the_package_dequantises_them(block_type: ForeignType) -> None:
    """All codes, scales infinite and not a number among them; in more than one tile."""
    count = TILE // block_type.block_size + 3
    data = np.random.default_rng(block_type.code).integers(0, 256, (count, block_type.type_size), np.uint8)
    with np.errstate(all="ignore"):
        theirs = quants.dequantize(data, package.GGMLQuantizationType(block_type.code)).reshape(-1)
    ours = dequantized(block_type, data)
    assert {str(theirs.dtype), str(ours.dtype)} == {"float32"}
    unknown = np.isnan(theirs)
    assert np.array_equal(np.isnan(ours), unknown)
    assert np.array_equal(ours.view(np.uint32)[~unknown], theirs.view(np.uint32)[~unknown])


@pytest.mark.parametrize("block_type", PLAIN, ids=lambda t: t.name)
def test_plain_numbers_are_rounded_to_the_nearest(block_type: ForeignType) -> None:
    dtype = block_type.numpy["x"]
    numbers = np.array([0, 1, 127, -3], dtype)
    if dtype.itemsize == 8:
        numbers = np.append(numbers, np.array([2**24 + 1, -(2**40) - 2**16 - 1], dtype))
    made = dequantized(block_type, numbers.view(np.uint8))
    assert made.tolist() == [float(np.float32(x)) for x in numbers]


def test_codebooks_are_the_packages() -> None:
    for name in grids.__all__:
        if name != "Grid":
            theirs: Any = getattr(quants, name)
            theirs.init_grid()
            assert np.array_equal(getattr(grids, name).values, theirs.grid.reshape(theirs.grid_shape)), name


def test_a_block_of_iq2_xxs_by_hand() -> None:
    """Word 0x0005 of the codebook, number 2, is 25 25 8 8 ...; sign code 1 has bit 0, and bit 7 for an even number."""
    index, rest = bytes([2, 0, 0, 0]), (1 | 3 << 28).to_bytes(4, "little")
    block = np.float16(2).tobytes() + index + rest + bytes(7 * 8)
    made = dequantized(ggml_type(16), np.frombuffer(block, np.uint8))  # type: ignore[arg-type]
    scale = 2 * (0.5 + 3) * 0.25
    assert made[:8].tolist() == [scale * each for each in (-25, 25, 8, 8, 8, 8, 8, -8)]
    assert made[8:32].tolist() == [scale * 8] * 24
    assert made[32:].tolist() == [2 * 0.5 * 0.25 * 8] * 224


def test_a_block_of_tq1_0_by_hand() -> None:
    """Five digits of base 3 a byte: 0.21021 of base 3 is 1 0 -1 1 0."""
    digits = [2, 1, 0, 2, 1]
    number = sum(digit * 3 ** (4 - at) for at, digit in enumerate(digits))
    byte = -(-number * 256 // 243)
    block = bytes([byte] * 48) + bytes([byte] * 4) + np.float16(0.5).tobytes()
    made = dequantized(ggml_type(34), np.frombuffer(block, np.uint8))  # type: ignore[arg-type]
    wanted = [0.5 * (digit - 1) for digit in digits]
    assert made.tolist() == [w for w in wanted for _ in range(32)] + [w for w in wanted for _ in range(16)] + [
        w for w in wanted[:4] for _ in range(4)
    ]
