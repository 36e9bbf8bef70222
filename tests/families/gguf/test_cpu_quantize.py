"""The compiled ggml quantisers give the reference's bytes, whatever the input, the count of blocks and of threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from uqff.families.gguf.cpu_quantize import KERNELS, quantize
from uqff.families.gguf.reference_quantize import QUANTIZERS
from uqff.families.gguf.search import round_half_away
from uqff.simd import arithmetic
from uqff.simd import bits as bits_room

pytestmark = pytest.mark.long

F32 = npt.NDArray[np.float32]
Generate = Callable[[np.random.Generator, tuple[int, int]], npt.NDArray[np.generic]]

TYPES = [*((name, -128) for name in KERNELS), ("Q8K", -127)]


def of_scale(exponent: int) -> Generate:
    return lambda rng, shape: np.ldexp(rng.standard_normal(shape), exponent).clip(-3.4e38, 3.4e38)


def any_bits(rng: np.random.Generator, shape: tuple[int, int]) -> F32:
    values = rng.integers(0, 2**32, shape, np.uint32).view(np.float32)
    return np.where(np.isfinite(values), values, np.float32(1))


def scale_of_each_sub_block(rng: np.random.Generator, shape: tuple[int, int]) -> npt.NDArray[np.generic]:
    exponents = rng.integers(-149, 128, (shape[0], shape[1] // 16, 1))
    return np.ldexp(rng.standard_normal((shape[0], shape[1] // 16, 16)), exponents).clip(-3.4e38, 3.4e38).reshape(shape)


def some_zero_sub_blocks(rng: np.random.Generator, shape: tuple[int, int]) -> npt.NDArray[np.generic]:
    keep = rng.random((shape[0], shape[1] // 16, 1)) < 0.5
    return (rng.standard_normal((shape[0], shape[1] // 16, 16)) * keep).reshape(shape)


def ties(top: int) -> Generate:
    """Multiples of one half between values that make the step 1, so that many fall between two codes."""

    def generate(rng: np.random.Generator, shape: tuple[int, int]) -> npt.NDArray[np.generic]:
        values = rng.integers(0, 2 * top + 1, shape) / 2
        values[:, ::16], values[:, 1::16] = top, 0
        return values

    return generate


INPUTS: dict[str, Generate] = {
    "normal": of_scale(-6),
    "heavy tails": lambda rng, shape: rng.standard_cauchy(shape) * 0.01,
    "positive": lambda rng, shape: np.abs(rng.standard_normal(shape)),
    "negative": lambda rng, shape: -np.abs(rng.standard_normal(shape)),
    "far from zero": lambda rng, shape: rng.standard_normal(shape) * 0.01 + 3,
    **{f"2^{e}": of_scale(e) for e in (-149, -147, -140, -130, -126, -100, -76, -64, -24, 15, 40, 63, 100, 124, 127)},
    "1e38": lambda rng, shape: rng.uniform(-1e38, 1e38, shape),
    "any bits": any_bits,
    "a scale for each sub-block": scale_of_each_sub_block,
    "zero": lambda _, shape: np.zeros(shape),
    "negative zero": lambda _, shape: np.full(shape, -0.0),
    "zeros of both signs": lambda rng, shape: rng.choice([0.0, -0.0], shape),
    "constant": lambda rng, shape: np.repeat(rng.standard_normal((shape[0], 1)), shape[1], axis=1),
    "constant sub-blocks": lambda rng, shape: np.repeat(rng.standard_normal((shape[0], shape[1] // 16)), 16, axis=1),
    "zero sub-blocks": some_zero_sub_blocks,
    "sparse": lambda rng, shape: rng.standard_normal(shape) * (rng.random(shape) < 0.1),
    "signs": lambda rng, shape: rng.choice([-1.0, 1.0], shape),
    "small integers": lambda rng, shape: rng.integers(-8, 9, shape),
    "halves": lambda rng, shape: rng.integers(-15, 16, shape) / 2,
    **{f"ties of {top}": ties(top) for top in (3, 7, 15, 31, 127)},
    "bfloat16": lambda rng, shape: (rng.standard_normal(shape).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(
        np.float32
    ),
}


def reference(name: str, x: F32, extreme: int) -> npt.NDArray[np.uint8]:
    return QUANTIZERS[name](x, extreme) if name == "Q8K" else QUANTIZERS[name](x)


def input_blocks(label: str, name: str, count: int) -> F32:
    rng = np.random.default_rng(list(INPUTS).index(label))
    return np.ascontiguousarray(INPUTS[label](rng, (count, KERNELS[name].block_size)), np.float32)


@pytest.mark.parametrize(("name", "extreme"), TYPES)
@pytest.mark.parametrize("label", INPUTS)
def test_a_kernel_gives_the_references_bytes(name: str, extreme: int, label: str) -> None:
    x = input_blocks(label, name, 33)
    np.testing.assert_array_equal(quantize(name, x, extreme=extreme), reference(name, x, extreme))


@pytest.mark.parametrize("name", ["Q3K", "Q6K"])
def test_sub_blocks_of_all_kinds_together(name: str) -> None:
    """Sub-blocks are collected from many blocks to be searched on: more than one collection, all kinds in each."""
    x = np.concatenate([input_blocks(label, name, 9) for label in INPUTS])
    x = np.random.default_rng(0).permutation(x.reshape(-1, 16)).reshape(x.shape)
    x = np.concatenate([x, input_blocks("normal", name, 300)])
    np.testing.assert_array_equal(quantize(name, x, threads=1), reference(name, x, -128))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7, 8, 9])
def test_a_part_of_a_tile_does_not_depend_on_the_rest(name: str, count: int) -> None:
    """Tiles are 4 or 8 blocks: any count gives the first rows of the whole."""
    x = input_blocks("heavy tails", name, 9)
    np.testing.assert_array_equal(quantize(name, x[:count]), quantize(name, x)[:count])


@pytest.mark.parametrize("name", KERNELS)
def test_threads_change_nothing(name: str) -> None:
    """More than one range, the last of them not a whole number of tiles."""
    block_size = KERNELS[name].block_size
    x = input_blocks("normal", name, (3 << 16) // block_size + 5)
    np.testing.assert_array_equal(quantize(name, x, threads=3), quantize(name, x, threads=1))


@pytest.mark.parametrize("name", KERNELS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_finite_float32(name: str, data: st.DataObject) -> None:
    shape = (data.draw(st.integers(1, 3)), KERNELS[name].block_size)
    elements = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
    x = data.draw(st_numpy.arrays(np.float32, shape, elements=elements, fill=elements))
    np.testing.assert_array_equal(quantize(name, x), QUANTIZERS[name](x))


@pytest.mark.parametrize("name", KERNELS)
def test_sizes_are_the_references(name: str) -> None:
    """The kernels' table of sizes against the fields the reference puts together."""
    _, block_size, type_size = KERNELS[name]
    assert QUANTIZERS[name](np.zeros((1, block_size), np.float32)).shape == (1, type_size)
    assert list(KERNELS) == list(QUANTIZERS)


def test_a_read_only_source_and_a_given_target() -> None:
    x = input_blocks("normal", "Q4_0", 3)
    x.flags.writeable = False
    out = np.zeros((3, 18), np.uint8)
    assert quantize("Q4_0", x, out=out) is out
    np.testing.assert_array_equal(out, QUANTIZERS["Q4_0"](x))


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((1, 32)),
        np.zeros((1, 31), np.float32),
        np.zeros(32, np.float32),
        np.zeros((32, 1), np.float32).T.repeat(2, axis=0)[:, ::-1],
    ],
    ids=["float64", "31 elements", "flat", "reversed"],
)
def test_a_wrong_source_is_refused(x: F32) -> None:
    with pytest.raises(ValueError, match=r"Q4_0: expected float32 \[n_blocks, 32\] in C order"):
        quantize("Q4_0", x)


@pytest.mark.parametrize("out", [np.zeros((2, 18), np.uint8), np.zeros((1, 18), np.int8), np.zeros((1, 36), np.uint8)])
def test_a_target_that_does_not_fit_is_refused(out: npt.NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match=r"Q4_0: expected writeable uint8 \[1, 18\] in C order"):
        quantize("Q4_0", np.zeros((1, 32), np.float32), out=out)


def test_another_extreme_is_refused() -> None:
    with pytest.raises(ValueError, match="expected -128 or -127, got -126"):
        quantize("Q8K", np.zeros((1, 256), np.float32), extreme=-126)


def floats_around_every_exponent() -> F32:
    """For every sign and exponent the mantissas near its ends, near halves, and near what a float16 rounds away."""
    low = np.arange(-3, 4)
    places = [0, 1 << 12, 1 << 13, 3 << 12, 1 << 22, (1 << 22) + (1 << 12), 1 << 23]
    mantissas = np.unique([place + low for place in places] + [(1 << k) + low for k in range(23)]) & 0x7FFFFF
    exponents = np.arange(512, dtype=np.int64) << 23
    return (exponents[:, None] | mantissas).astype(np.uint32).view(np.float32).ravel()


def from_python(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What only kernels can call."""
    return numba.njit(error_model="numpy")(lambda x: function(x))


def test_f16_bits_are_the_nearest() -> None:
    """Against numpy's conversion: all ranges of float16, ties, subnormals, overflow, NaN's sign."""
    v = floats_around_every_exponent()
    with np.errstate(all="ignore"):
        expected = v.astype(np.float16).view(np.uint16)
    f16_bits = from_python(bits_room.f16_bits)
    actual = np.array([f16_bits(one) for one in v], np.uint16)
    number = ~np.isnan(v)
    np.testing.assert_array_equal(actual[number], expected[number])
    assert (actual[~number] & 0x7E00 == 0x7E00).all()


def test_f16_value_of_all_float16() -> None:
    bits = np.arange(1 << 16)
    with np.errstate(invalid="ignore"):  # AArch64 tells of signalling NaN
        expected = bits.astype(np.uint16).view(np.float16).astype(np.float32)
    f16_value = from_python(bits_room.f16_value)
    actual = np.array([f16_value(int(one)) for one in bits], np.float32)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(actual[number].view(np.uint32), expected[number].view(np.uint32))
    assert np.isnan(actual[~number]).all()


def test_round_is_exact_where_it_is_used() -> None:
    """trunc(v +- 0.49999997) against truncation and a comparison of the exact rest."""
    v = floats_around_every_exponent()
    v = v[np.abs(v) < 2**31]
    nearest_int = from_python(arithmetic.nearest_int)
    actual = np.array([nearest_int(one) for one in v])
    np.testing.assert_array_equal(actual, round_half_away(v).astype(np.int64))
