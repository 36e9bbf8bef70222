"""The operators that multiply with a weight: shapes, gradients, and how a device takes part."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import uqff
from tests.parallel.weights import plain, stacked
from uqff.parallel import product, product_cpu
from uqff.parallel.product import Device, gather_linear, linear
from uqff.parallel.weight import WeightBuffers


def integers(*shape: int) -> torch.Tensor:
    """Small ones, of which every sum is exact."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(7)).double()


def test_gradients_of_any_order() -> None:
    """In float64, against numerical ones: in x, and in the gradient."""
    weight = WeightBuffers(uqff.quantize(plain(3, 32), "q8_0"))
    x = integers(2, 2, 32).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: linear(x, weight.bytes(), weight.spec, "exact"), x, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: linear(x, weight.bytes(), weight.spec, "exact"), x, fast_mode=True)
    stack, indices = WeightBuffers(stacked("q8_0", (3, 4, 32))), torch.tensor([[2, 0], [1, 1], [2, 1]])
    for each in (1, 2):
        rows = integers(3, each, 32).requires_grad_()

        def gathered(x: torch.Tensor) -> torch.Tensor:
            return gather_linear(x, indices, stack.bytes(), stack.spec, False)

        assert torch.autograd.gradcheck(gathered, rows, fast_mode=True)
        assert torch.autograd.gradgradcheck(gathered, rows, fast_mode=True)


def test_a_device_multiplies_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked first; what it leaves, and gradients, are dequantised."""
    asked: list[tuple[int, ...]] = []

    def three_rows(x: torch.Tensor, parts: Sequence[torch.Tensor], spec: str) -> torch.Tensor | None:
        asked.append(tuple(x.shape))
        return x.new_full((3, 4), 7.0) if len(x) == 3 else None

    def gathered(
        x: torch.Tensor, indices: torch.Tensor, parts: Sequence[torch.Tensor], spec: str
    ) -> torch.Tensor | None:
        return x.new_full((*indices.shape, 4), 8.0)

    monkeypatch.setitem(product.DEVICES, "cpu", Device(three_rows, gathered))
    record = uqff.quantize(integers(4, 32).float(), "q8_0")
    layer, stack = uqff.parallel.ReplicatedLayer(record), uqff.parallel.ReplicatedStack(stacked("q8_0", (3, 4, 32)))
    x = integers(2, 32)
    assert torch.equal(layer(x), x @ record.dequantize(torch.float64).T)
    y = integers(3, 32).requires_grad_()
    made = layer(y)
    assert torch.equal(made, torch.full((3, 4), 7.0, dtype=torch.float64))
    made.sum().backward()
    assert y.grad is not None
    assert torch.equal(y.grad, torch.ones(3, 4, dtype=torch.float64) @ record.dequantize(torch.float64))
    assert asked == [(2, 32), (3, 32)]
    assert torch.equal(stack(y.detach()[:, None], torch.tensor([[0, 2]] * 3)), torch.full((3, 2, 4), 8.0).double())


def test_sizes_of_results_are_known_without_numbers() -> None:
    """On the meta device; what does not fit is refused there, too."""
    weight = WeightBuffers(uqff.quantize(plain(3, 32), "q8_0")).to("meta")
    made = linear(torch.empty(5, 2, 32, dtype=torch.bfloat16, device="meta"), weight.bytes(), weight.spec, "exact")
    assert (made.shape, made.dtype) == ((5, 2, 3), torch.bfloat16)
    with pytest.raises(
        uqff.ShapeError, match=r"activations do not fit the weight: expected \[\.\.\., 32\], got \[2, 31\]"
    ):
        linear(torch.empty(2, 31, device="meta"), weight.bytes(), weight.spec, "exact")


def test_what_is_known_of_a_module_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager products on the CPU remember a module by its identity: not a later one in its place, nor one that is gone.

    Shapes of a single row come out as they go in, and the environment is still asked each time.
    """
    known = product_cpu._by_module
    for at in range(20):  # the memory of a dropped module, and so its identity, is another's at once
        weight = WeightBuffers(uqff.quantize(torch.full((4, 32), 127.0 * at), "q8_0"))
        for shape in ((32,), (1, 32), (1, 1, 32), (1, 1, 1, 32)):
            made = product.multiply(torch.ones(shape), weight)
            assert torch.equal(made, torch.full((*shape[:-1], 4), 32 * 127.0 * at))
        assert known[id(weight)][0]() is weight
        last = id(weight)
        del weight
        assert last not in known
    weight = WeightBuffers(uqff.quantize(torch.ones(4, 32), "q8_0"))
    assert product_cpu.multiply(torch.ones(1, 32), weight, "exact") is not None
    assert product_cpu.multiply(torch.ones(32, 1), weight, "exact") is None
    monkeypatch.setenv("UQFF_KERNELS", "reference")
    assert product_cpu.multiply(torch.ones(1, 32), weight, "exact") is None
    monkeypatch.setenv("UQFF_KERNELS", "another")
    with pytest.raises(ValueError, match="got 'another'"):
        product_cpu.multiply(torch.ones(1, 32), weight, "exact")
