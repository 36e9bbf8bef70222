"""Hypothesis strategies: valid layers of every family, variant, version, rank and bias, and hostile bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

import uqff
from tests.support.samples import BLOBS
from uqff import DType, Family, Layer, QuantizedTensor, Version
from uqff.codes import VERSIONS
from uqff.families import AFQ, F8Q8, FP8, GGUF, HQQ, MXFP4, Unquant
from uqff.families.gguf.blocks import BLOCK_TYPES, BlockType

STORABLE = [dtype for dtype in DType if dtype.storable]
FLOATS = [DType.F32, DType.F16, DType.BF16]

seeds = st.integers(0, 2**32 - 1)
outer_shapes = st.lists(st.integers(1, 3), min_size=0, max_size=3).map(tuple)
"""All dimensions but the last: ranks 1 to 4."""


def random_bytes(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """uint8 of any bit pattern: NaNs, infinities, subnormals included."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def random_tensor(seed: int, dtype: DType, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of any bits."""
    raw = random_bytes(seed, (int(np.prod(shape)) * dtype.itemsize,))
    return raw.view(dtype.torch).reshape(shape)


@st.composite
def gguf(draw: st.DrawFn, block_type: BlockType | None = None) -> GGUF:
    chosen = block_type or draw(st.sampled_from(BLOCK_TYPES))
    row = draw(st.integers(1, 3)) * chosen.type_size
    return GGUF(random_bytes(draw(seeds), (*draw(outer_shapes), row)), chosen)


@st.composite
def unquant(draw: st.DrawFn) -> Unquant:
    dtype = draw(st.sampled_from(STORABLE))
    return Unquant(random_bytes(draw(seeds), (*draw(outer_shapes), draw(st.integers(1, 5)) * dtype.itemsize)), dtype)


@st.composite
def hqq(draw: st.DrawFn, bits: int | None = None) -> HQQ:
    bits = bits or draw(st.sampled_from([1, 2, 3, 4, 8]))
    per_word = {8: 1, 4: 2, 3: 1, 2: 4, 1: 8}[bits]
    axis = draw(st.sampled_from([0, 1]))
    rows, columns = per_word * draw(st.integers(1, 4)), draw(st.integers(1, 4))
    group_size, groups = (rows, columns) if axis == 0 else (columns, rows)
    shape = draw(st.sampled_from([(rows, columns), (rows * columns,), (1, rows * columns), (columns, rows, 1)]))
    packed = (-(-rows // 10), 4 * columns) if bits == 3 else (rows // per_word, columns)
    dtype = draw(st.sampled_from(FLOATS))
    parts = (1, groups) if axis == 0 else (groups, 1)
    return HQQ(
        random_bytes(draw(seeds), packed),
        random_tensor(draw(seeds), dtype, parts),
        random_tensor(draw(seeds), dtype, parts),
        shape,
        bits,
        group_size,
        axis,
        draw(st.none() | st.integers(1, 2**32 - 1)),
        draw(st.booleans()),
        draw(st.booleans()),
    )


@st.composite
def fp8(draw: st.DrawFn) -> FP8:
    weight = random_tensor(draw(seeds), DType.F8E4M3, (*draw(outer_shapes), draw(st.integers(1, 5))))
    return FP8(weight, *(random_tensor(draw(seeds), DType.F32, ()) for _ in range(3)))


@st.composite
def afq(draw: st.DrawFn, bits: int | None = None) -> AFQ:
    bits = bits or draw(st.sampled_from([2, 3, 4, 6, 8]))
    group_size, groups = draw(st.sampled_from([32, 64, 128])), draw(st.integers(1, 3))
    outer, dtype = draw(outer_shapes), draw(st.sampled_from(FLOATS))
    return AFQ(
        random_bytes(draw(seeds), (*outer, groups * group_size * bits // 8)),
        random_tensor(draw(seeds), dtype, (*outer, groups)),
        random_tensor(draw(seeds), dtype, (*outer, groups)),
        bits,
        group_size,
    )


@st.composite
def f8q8(draw: st.DrawFn) -> F8Q8:
    shape = (*draw(outer_shapes), draw(st.integers(1, 70)))
    return F8Q8(random_bytes(draw(seeds), (-(-int(np.prod(shape)) // 32), 33)), shape)


@st.composite
def mxfp4(draw: st.DrawFn) -> MXFP4:
    outer, blocks = draw(outer_shapes), draw(st.integers(1, 3))
    return MXFP4(random_bytes(draw(seeds), (*outer, 16 * blocks)), random_bytes(draw(seeds), (*outer, blocks)))


WEIGHTS: dict[Family, Callable[[], st.SearchStrategy[Any]]] = {
    Family.GGUF: gguf,
    Family.UNQUANT: unquant,
    Family.HQQ: hqq,
    Family.FP8: fp8,
    Family.AFQ: afq,
    Family.F8Q8: f8q8,
    Family.MXFP4: mxfp4,
}
weights: st.SearchStrategy[QuantizedTensor] = st.one_of([make() for make in WEIGHTS.values()])


def oldest_version(layer: Layer) -> Version:
    """The first version that can express a layer."""
    since = [layer.weight.family.since]
    since += (part.dtype.since for part in layer.weight.parts.values())
    if isinstance(layer.weight, Unquant):
        since.append(layer.weight.dtype.since)
    if layer.bias_part is not None:
        since.append(layer.bias_part.dtype.since)
    return max(since)


@st.composite
def layers(draw: st.DrawFn, weight: st.SearchStrategy[Any] = weights) -> Layer:
    """A weight with no bias, or one for every output or, where there are experts, for their outputs in common."""
    made = draw(weight)
    shapes = [made.shape[at:-1] for at in range(len(made.shape) - 1)]
    if not shapes or not draw(st.booleans()):
        return Layer(made)
    return Layer(made, random_tensor(draw(seeds), draw(st.sampled_from(STORABLE)), draw(st.sampled_from(shapes))))


@st.composite
def versioned_layers(draw: st.DrawFn, weight: st.SearchStrategy[Any] = weights) -> tuple[Layer, Version]:
    """A layer and a version that can express it."""
    layer = draw(layers(weight))
    oldest = oldest_version(layer)
    return layer, draw(st.sampled_from([version for version in VERSIONS if version >= oldest]))


@st.composite
def mutated_blobs(draw: st.DrawFn) -> bytes:
    """A valid blob with a few bytes overwritten, cut out or put in."""
    data = bytearray(draw(st.sampled_from(sorted(BLOBS.values())) | layers().map(uqff.serialize)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        patch = draw(st.binary(max_size=5))
        data[at : at + draw(st.integers(0, 5))] = patch
    return bytes(data)


hostile_bytes: st.SearchStrategy[bytes] = st.one_of(
    st.binary(max_size=200),
    st.builds(
        lambda version, family, rest: bytes([version[2], version[1], version[0], 0, family]) + rest,
        st.sampled_from(list(VERSIONS)),
        st.integers(0, 7),
        st.binary(max_size=120),
    ),
    mutated_blobs(),
)
