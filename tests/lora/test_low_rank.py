"""The arithmetic of a delta: by hand, the kernel against the definition, slices, and PEFT's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.lora_files import exact_numbers
from uqff.codes import DType
from uqff.errors import FormatError, ShapeError
from uqff.lora.low_rank import LowRank, add_reference, merged
from uqff.lora.low_rank_cpu import PIECE, add
from uqff.simd.floats import Floats


def floats(array: object, dtype: torch.dtype = torch.float32) -> Floats:
    return Floats.of_tensor(torch.as_tensor(array, dtype=torch.float32).to(dtype).contiguous())


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def test_by_hand() -> None:
    delta = LowRank(floats([[1, 2], [0, -1], [3, 0]]), floats([[1, 0], [5, 7]]), 0.5)
    assert delta.delta().tolist() == [[5.5, 7], [-2.5, -3.5], [1.5, 0]]
    assert delta.shape == (3, 2)
    assert delta.rank == 2
    weight = floats([[1, 1], [1, 1], [1, 1]], torch.bfloat16)
    total = merged(weight, [delta, delta])
    assert total.dtype is DType.F32
    assert total.bits.view(np.float32).tolist() == [[12, 15], [-4, -6], [4, 1]]
    assert weight.cast(DType.F32).bits.view(np.float32).tolist() == [[1, 1]] * 3, "not modified"
    assert merged(weight, []) is weight


def test_sums_are_rounded_in_the_order_of_the_ranks() -> None:
    """(1 + 2**-24) + 2**-24 is 1 in float32; the other way round it is 1 + 2**-23. Nothing is fused."""
    tiny = 2.0**-24
    b = floats([[1, 1, 1]])
    for a, expected in (([[1], [tiny], [tiny]], 1.0), ([[tiny], [tiny], [1]], 1 + 2 * tiny)):
        assert LowRank(b, floats(a), 1.0).delta().tolist() == [[expected]]
    x = np.float32(1 + 2.0**-12)  # whose square needs 25 bits
    squared = np.float32(x * x)
    assert LowRank(floats([[-squared, x]]), floats([[1], [x]]), 1.0).delta().tolist() == [[0.0]]


@pytest.mark.parametrize("rank", [1, 2, 4, 5, 8, 64])
def test_kernel_is_the_reference(rank: int) -> None:
    for rows, columns in ((1, 1), (9, PIECE + 3), (17, 2 * PIECE)):
        weight, b, a = random(rows, columns), random(rows, rank, seed=1), random(rank, columns, seed=2)
        ours, expected = weight.copy(), weight.copy()
        add_reference(expected, b, a, np.float32(0.3))
        add(ours, b, a, np.float32(0.3), threads=2)
        assert (ours.view(np.uint32) == expected.view(np.uint32)).all()


def test_slices_have_the_bits_of_the_whole() -> None:
    whole = LowRank(floats(random(24, 8)), floats(random(8, 40, seed=1)), 1.7)
    expected = whole.delta()
    for dim, size in ((0, 24), (1, 40)):
        for world in (1, 2, 4, 8):
            length = size // world
            parts = [whole.narrow(dim, rank * length, length).delta() for rank in range(world)]
            assert (np.concatenate(parts, dim).view(np.uint32) == expected.view(np.uint32)).all()
    assert (whole.T.delta().view(np.uint32) == expected.T.view(np.uint32)).all()


def test_narrow_factors_are_widened_exactly() -> None:
    a, b = random(3, 16), random(8, 3, seed=1)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = LowRank(floats(b, dtype), floats(a, dtype), 2.0)
        wide_b, wide_a = (floats(torch.from_numpy(x).to(dtype).float()) for x in (b, a))
        wide = LowRank(wide_b, wide_a, 2.0)
        assert (narrow.delta() == wide.delta()).all()


@pytest.mark.parametrize("rank", [1, 2, 8, 64])
def test_delta_is_that_of_peft(rank: int) -> None:
    """Equal where sums are exact, and of rank 1; else both are within the bound that the module states."""
    peft = pytest.importorskip("peft", reason="the oracle")
    model = torch.nn.Sequential(torch.nn.Linear(48, 40, bias=False))
    model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=3, use_rslora=True, target_modules=["0"]))
    layer = model.base_model.model[0]
    scale = 3 / rank**0.5
    for exact in (True, False):
        a, b = exact_numbers((rank, 48), 1), exact_numbers((40, rank), 2)
        if not exact:
            a, b = torch.from_numpy(random(rank, 48)), torch.from_numpy(random(40, rank, seed=1))
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
        weight = layer.get_base_layer().weight.data
        low_rank = LowRank(floats(b), floats(a), scale)
        delta, theirs = low_rank.delta(), layer.get_delta_weight("default").detach().numpy()
        if exact or rank == 1:
            assert (delta == theirs).all()
            total = merged(floats(weight), [low_rank]).bits.view(np.float32)
            assert (total == (weight + torch.from_numpy(theirs)).numpy()).all()
        unit = 2.0**-24
        gamma = rank * unit / (1 - rank * unit)
        truth = b.double().numpy() @ a.double().numpy()
        size = np.abs(b.double().numpy()) @ np.abs(a.double().numpy())
        bound = scale * (gamma * size * (1 + 2 * unit) + 2.1 * unit * np.abs(truth))  # and of the scale and its product
        assert (np.abs(delta - scale * truth) <= bound).all()
        assert (np.abs(theirs - scale * truth) <= bound).all()


def test_what_does_not_fit_or_overflows_is_named() -> None:
    delta = LowRank(floats([[1.0]]), floats([[3e38]]), 1.0, "adapter.safetensors: A, B")
    with pytest.raises(
        ShapeError, match=r"delta does not fit the weight: expected \[1, 2\], got \[1, 1\] by \[1, 1\]"
    ) as caught:
        merged(floats([[0, 0]]), [delta], layer="q_proj")
    assert (caught.value.layer, caught.value.field) == ("q_proj", "adapter.safetensors: A, B")
    assert merged(floats([[0.0]]), [delta]).is_finite
    with pytest.raises(FormatError, match=r"not finite: expected finite, got inf at \(0, 0\)") as caught2:
        merged(floats([[3e38]]), [delta], layer="q_proj")
    assert caught2.value.layer == "q_proj"
    with pytest.raises(FormatError, match="not finite"):
        merged(floats([[0.0]]), [LowRank(floats([[1.0]]), floats([[1.0]]), 1e39)])
