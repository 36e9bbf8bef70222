"""uqff.parallel.shard: which elements a rank gets, and every way to ask for something that is not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import uqff
from uqff import Layer, ShardError
from uqff.families import FP8
from uqff.parallel.shard import Shard, Slice, world_sizes


@given(st.integers(1, 8), st.integers(1, 50), st.integers(0, 2))
def test_equal_parts_tile_the_dimension(world_size: int, part: int, dim: int) -> None:
    """Ranks hold consecutive ranges of one length, together everything."""
    shape = [3, 3, 3]
    shape[dim] = world_size * part
    slices = [Shard.simple(dim, rank, world_size).resolve(shape) for rank in range(world_size)]
    assert slices == [Slice(dim, rank * part, part) for rank in range(world_size)]
    for rank, slice_ in enumerate(slices):
        assert Shard.offset(dim, rank * part, part).resolve(shape) == slice_


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (Shard.simple(2, 0, 1), "no such dimension: expected 0 to 1 for shape [6, 512], got 2 (layer 7)"),
        (Shard.simple(-1, 0, 1), "no such dimension: expected 0 to 1 for shape [6, 512], got -1 (layer 7)"),
        (Shard.simple(0, 0, 0), "world without ranks: expected a world size of at least 1, got 0 (layer 7)"),
        (Shard.simple(0, 2, 2), "rank outside the world: expected 0 to 1, got 2 (layer 7)"),
        (Shard.simple(0, -1, 2), "rank outside the world: expected 0 to 1, got -1 (layer 7)"),
        (
            Shard.simple(0, 0, 4),
            "dimension is not divisible by the world size: expected dimension 0 of 6 in equal parts: "
            "world sizes that work are 1, 2, 3, 6, got world size 4 (layer 7)",
        ),
        (
            Shard.offset(0, 4, 3),
            "range beyond the dimension: expected at most 6 along dimension 0, got 4 to 7 (layer 7)",
        ),
        (Shard.offset(0, 2**64 - 1, 1), "range overflows: expected an end within 64 bits, got 18446744073709551616"),
        (Shard.offset(0, -1, 2), "not a range: expected an offset of at least 0, a length of at least 1"),
        (Shard.offset(0, 0, 0), "not a range: expected an offset of at least 0, a length of at least 1"),
        (Shard(0), "shard is neither part nor range"),
        (
            Shard.simple(1, 0, 8),
            "slice cannot be cut exactly: expected dimension 1 of 512 in multiples of 128: "
            "world sizes that work are 1, 2, 4, got parts of 64, world size 8 (layer 7)",
        ),
        (Shard.offset(1, 64, 128), "in multiples of 128: world sizes that work are 1, 2, 4, got 64 to 192 (layer 7)"),
    ],
)
def test_errors_name_layer_dimension_size_world_and_what_works(shard: Shard, message: str) -> None:
    """The same whether the shard is resolved by itself or applied to a layer of AFQ with groups of 128."""
    with pytest.raises(ShardError) as raised:
        shard.resolve((6, 512), alignment=128 if shard.dim == 1 else 1, layer="7")
    assert message in str(raised.value)
    weight = uqff.quantize(torch.zeros(6, 512), "afq4", group_size=128)
    with pytest.raises(ShardError) as raised:
        shard.apply_to(weight, layer="7")
    assert message in str(raised.value)


def test_world_sizes() -> None:
    """Divisors of the number of units; one rank can always hold everything."""
    assert world_sizes(12) == [1, 2, 3, 4, 6, 12]
    assert world_sizes(512, 64) == [1, 2, 4, 8]
    assert world_sizes(100, 64) == [1]


def test_uneven_aligned_ranges() -> None:
    """Ranks of different sizes, cut at groups."""
    weight = uqff.quantize(torch.arange(2.0 * 320).view(2, 320), "afq4")
    cuts = [(0, 64), (64, 192), (256, 64)]
    parts = [Shard.offset(1, *cut).apply_to(weight) for cut in cuts]
    assert torch.equal(torch.cat([part.dequantize() for part in parts], 1), weight.dequantize())


def test_plain_tensors_are_cut_as_views() -> None:
    """The same shard serves a weight that is not quantised yet."""
    tensor = torch.arange(12).view(3, 4)
    part = Shard.simple(1, 1, 2).apply_to(tensor)
    assert torch.equal(part, tensor[:, 2:])
    assert part.data_ptr() == tensor[:, 2:].data_ptr()
    assert Shard.whole().apply_to(tensor).shape == tensor.shape


def test_a_file_gives_slices(tmp_path: Path) -> None:
    """``file.layer(key, shard)``: rows are views of the mapped file; errors name file and layer."""
    layer = Layer(uqff.quantize(torch.arange(32.0).view(4, 8), "fp8"), torch.arange(4.0))
    uqff.save({0: layer}, tmp_path / "m.uqff")
    with uqff.open(tmp_path / "m.uqff") as file:
        assert file.layer(0) == layer
        part = file.layer("0", Shard.simple(0, 1, 2))
        whole = file[0].weight
        assert isinstance(whole, FP8)
        assert isinstance(part.weight, FP8)
        assert part == layer.narrow(0, 2, 2)
        assert part.bias is not None
        assert part.bias.tolist() == [2.0, 3.0]
        assert part.weight.weight.data_ptr() == whole.weight[2:].data_ptr()
        inputs = file.layer(0, Shard.simple(1, 0, 2))
        assert inputs.bias is not None
        assert inputs.bias.tolist() == [0.0, 1.0, 2.0, 3.0]
        with pytest.raises(
            ShardError, match=r"world sizes that work are 1, 2, 4, got world size 3 \(file .*, layer 0\)"
        ):
            file.layer("0", Shard.simple(0, 1, 3))
        with pytest.raises(KeyError):
            file.layer(1, Shard.whole())


def test_shards_are_pure_arithmetic() -> None:
    """Knowing a slice needs no torch."""
    code = (
        "import sys; from uqff.parallel.shard import Shard; Shard.simple(0, 0, 2).resolve((4, 4));"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
