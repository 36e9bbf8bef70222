"""The two arithmetics of products: which layers have another one, how it is chosen, and what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import uqff
from tests.parallel.models import TinyCase, write
from uqff.errors import UnsupportedError
from uqff.families import QuantizedTensor
from uqff.parallel import ReplicatedLayer, ReplicatedStack, load_model, product_cpu, set_arithmetic


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def engine_layer(kind: str, rows: int = 24, columns: int = 256) -> ReplicatedLayer:
    layer = ReplicatedLayer(uqff.quantize(random(rows, columns), kind), random(rows))
    layer.arithmetic = "engine"
    return layer


def as_engine(record: QuantizedTensor, x: torch.Tensor) -> torch.Tensor:
    product = record.engine_product()
    assert product is not None
    made = product(np.ascontiguousarray(x.reshape(-1, x.shape[-1]).float().numpy()))
    return torch.from_numpy(made).view(*x.shape[:-1], -1)


@pytest.mark.parametrize(("kind", "act"), [("q4_0", "q8_0"), ("q4_1", "q8_1"), ("q4k", "q8k")])
def test_a_layer_multiplies_as_the_engine_does(kind: str, act: str) -> None:
    """Of any leading dimensions and dtypes, bias included; ``quantized_act_type`` says so, and autocast works."""
    layer = engine_layer(kind)
    assert (layer.arithmetic, layer.quantized_act_type()) == ("engine", act)
    for x in (random(256), random(3, 256), random(2, 2, 256).bfloat16()):
        bias = layer.bias
        assert bias is not None
        expected = as_engine(layer.weight, x).to(x.dtype) + bias.to(x.dtype)
        assert torch.equal(layer(x), expected)
    x = random(1, 256).half()
    assert torch.equal(layer.forward_autocast(x), layer(x.float()).half())
    assert not torch.equal(layer(random(1, 256)), ReplicatedLayer(layer.weight, layer.bias)(random(1, 256)))


def test_without_kernels_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference serves."""
    layer, x = engine_layer("q4k"), random(3, 256, seed=4)
    made = layer(x)
    monkeypatch.setenv("UQFF_KERNELS", "reference")
    assert torch.equal(layer(x), made)


@pytest.mark.parametrize("kind", ["q8_0", "q5_1", "q4k"])
def test_many_rows_are_those_of_one(kind: str) -> None:
    """The same bits; above a number of rows activations are multiplied as floats: another order of sums, no more."""
    layer = engine_layer(kind)
    x = random(product_cpu.MOST_AS_ENGINE + 5, 256, seed=2)
    dense, rows = layer.weight.dequantize(), torch.cat([layer(row[None]) for row in x])
    assert torch.equal(layer(x[:-5]), rows[:-5])
    bound = 2.0**-18 * (x.abs() @ dense.abs().T)
    assert ((layer(x) - rows).abs() <= bound).all()


@pytest.mark.parametrize("kind", ["afq4", "hqq4", "fp8", "mxfp4", "f8q8", "float32"])
def test_other_families_multiply_with_plain_numbers(kind: str) -> None:
    """As the engine does: the numbers of both arithmetics are the same."""
    values, x = random(64, 128), random(3, 128, seed=1)
    weight: Any = values if kind == "float32" else uqff.quantize(values, kind)
    layer = ReplicatedLayer(weight)
    exact, act = layer(x), layer.quantized_act_type()
    layer.arithmetic = "engine"
    assert torch.equal(layer(x), exact)
    assert layer.quantized_act_type() is act


def test_stacked_experts_are_dense_in_the_engine() -> None:
    """0.9.5 dequantises them."""
    stack = ReplicatedStack(uqff.quantize(random(3, 8, 256), "q4k"))
    x, indices = random(2, 1, 256), torch.tensor([[0, 2], [1, 0]])
    exact = stack(x, indices)
    stack.arithmetic = "engine"
    assert torch.equal(stack(x, indices), exact)
    assert stack.quantized_act_type() is torch.float32


def test_gradients_and_graphs() -> None:
    """The gradient is that of the exact product; a compiled layer is the eager one."""
    layer, x = engine_layer("q4k"), random(2, 256).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(2, 24) @ layer.weight.dequantize())
    with torch.no_grad():
        compiled: Any = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x))


def test_it_stays_when_a_layer_changes_its_type() -> None:
    """``apply_isq`` makes another weight, not another arithmetic."""
    made = engine_layer("q8_0").apply_isq("q4_0")
    assert (made.arithmetic, made.quantized_act_type()) == ("engine", "q8_0")


def test_a_model_in_the_engine_arithmetic(tmp_path: Path) -> None:
    """Every layer has it; logits are others, and near."""
    path = write(TinyCase("llama", "q8_0", (1, 2, 0)), tmp_path)[0]
    ids = torch.tensor([[5, 9, 17]])
    with torch.inference_mode():
        exact = load_model(path, dtype=torch.float32)(ids).logits
        model = load_model(path, dtype=torch.float32, arithmetic="engine")
        made = model(ids).logits
        assert not torch.equal(made, exact)
        assert float((made - exact).abs().max()) < 0.1 * float(exact.abs().max())
        set_arithmetic(model, "exact")
        assert torch.equal(model(ids).logits, exact)


def test_no_other_arithmetic(tmp_path: Path) -> None:
    """Refused before anything is read, and by a layer by name."""
    other: Any = "fast"
    with pytest.raises(UnsupportedError, match="expected exact or engine, got fast"):
        load_model(tmp_path / "missing", arithmetic=other)
    layer = ReplicatedLayer(torch.ones(2, 32), key="head")
    with pytest.raises(UnsupportedError, match=r"no such arithmetic.*head"):
        layer.arithmetic = other
    assert layer.arithmetic == "exact"
