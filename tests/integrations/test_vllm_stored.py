"""uqff.integrations.vllm without vLLM: what stands for layers while it loads is cut as tensors are, no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import uqff
from uqff.errors import ShardError, UnsupportedError
from uqff.families import Unquant
from uqff.integrations.vllm.part import ExpertsPart, LinearPart
from uqff.integrations.vllm.stored import StoredWeight, unloaded_of
from uqff.parallel.shard import Slice
from uqff.parallel.unloaded import Unloaded


def of(weight: uqff.QuantizedTensor, taken: Any = lambda: None) -> StoredWeight:
    """What the loader gives."""
    return StoredWeight.of(Unloaded.of(uqff.Layer(weight), "up_proj"), torch.bfloat16, taken)


def numbers(weight: Any) -> torch.Tensor:
    """What a weight stands for."""
    layer = unloaded_of(weight, "up_proj")
    return layer.take(layer.whole()).weight.dequantize(torch.float32)


def test_it_is_cut_as_a_tensor_is() -> None:
    """The codes are cut, and the shape is that of a tensor that was cut like that."""
    dense = torch.randn(4, 64, 32)
    stack = uqff.quantize(dense, "q8_0")
    values = stack.dequantize(torch.float32)
    weight = of(stack)
    assert (weight.shape, weight.dim(), weight.dtype) == (torch.Size([4, 64, 32]), 3, torch.bfloat16)
    for cut, wanted in (
        (weight.narrow(1, 16, 32), values.narrow(1, 16, 32)),
        (weight.detach(), values),
        (weight.chunk(2, dim=1)[1].unbind()[3], values[3, 32:]),
        (weight.unbind()[2].unsqueeze(0).unbind()[0], values[2]),
        (torch.narrow(weight, 0, 1, 2), values[1:3]),
        (weight[3], values[3]),
        (weight[1:3, :, :], values[1:3]),
        (weight[2].chunk(2)[1][8:], values[2, 40:]),
    ):
        assert cut.shape == wanted.shape
        assert torch.equal(numbers(cut), wanted)
    assert weight.unbind()[0].unsqueeze(0).shape == (1, 64, 32)


def test_a_place_of_plain_numbers_is_filled() -> None:
    """In the dtype of the place, and of a part that was cut out before."""
    taken: list[int] = []
    weight = of(uqff.quantize(torch.randn(64, 32), "q8_0"), lambda: taken.append(1))
    place = torch.empty(32, 32, dtype=torch.float16)
    place.copy_(weight.narrow(0, 32, 32))
    assert torch.equal(place, numbers(weight)[32:].half())
    assert taken


def test_what_needs_numbers_is_an_error() -> None:
    """It says of which layer; a cut that the type does not permit is one, too."""
    weight = of(uqff.quantize(torch.ones(64, 256), "q4k"))
    for change in (torch.Tensor.t, lambda each: each + 1, lambda each: each.to(torch.float32)):
        with pytest.raises(UnsupportedError, match=r"a model of vLLM changes a weight that is quantised.*up_proj"):
            change(weight)
    with pytest.raises(UnsupportedError, match="picks out of"):
        weight[::2]
    with pytest.raises(UnsupportedError, match="turns"):
        weight.unsqueeze(1)
    with pytest.raises(UnsupportedError, match="no stack"):
        weight.unbind()
    with pytest.raises(UnsupportedError, match="has made a stack of"):
        weight.unsqueeze(0).narrow(1, 0, 32)
    with pytest.raises(ShardError):
        weight.narrow(1, 0, 128)


def test_a_place_that_takes_it_is_noticed() -> None:
    """Also one that takes a part of it; a plain tensor is a layer that is not quantised."""
    taken: list[int] = []
    weight = of(uqff.quantize(torch.ones(64, 32), "q8_0"), lambda: taken.append(1))
    weight.narrow(0, 0, 32)
    assert not taken
    unloaded_of(weight.narrow(0, 0, 32), "up_proj")
    assert taken == [1]
    assert isinstance(unloaded_of(torch.ones(2, 2), "up_proj").take(Slice(0, 0, 2)).weight, Unquant)


@pytest.mark.parametrize("kind", ["q4k", "q8_0", "hqq4"])
@pytest.mark.parametrize("dim", [0, 1])
def test_shares_make_the_whole(kind: str, dim: int) -> None:
    """Where a family can cut there, and where it cannot and a rank holds all; of experts, too."""
    torch.manual_seed(3)
    stack = uqff.quantize(torch.randn(2, 128, 256), kind)
    values, like = stack.dequantize(torch.float32), torch.empty(0)
    x, ids = torch.randn(3, 256), torch.tensor([[0], [1], [1]])
    wanted = torch.stack([x[token] @ values[expert].T for token, (expert,) in enumerate(ids.tolist())])
    size = stack.shape[1 + dim] // 4
    shares, of_one = [], []
    for rank in range(4):
        given = x.chunk(4, -1)[rank].contiguous() if dim else x
        part = ExpertsPart(Unloaded.of(uqff.Layer(stack), "up"), stack.shape, Slice(1 + dim, rank * size, size), like)
        shares.append(part(given.unsqueeze(1), ids)[:, 0])
        (single, _) = uqff.Layer(stack).unstack()
        linear = LinearPart(Unloaded.of(single, "up"), (128, 256), Slice(dim, rank * size, size), like)
        of_one.append(linear(given))
    for got, whole in ((shares, wanted), (of_one, x @ values[0].T)):
        made = sum(got) if dim else torch.cat(got, -1)
        torch.testing.assert_close(made, whole, rtol=1e-4, atol=1e-4)


def test_numbers_that_are_not_quantised_have_the_dtype_of_activations() -> None:
    """Else they would be cast with every product."""
    layer = Unloaded.of(uqff.Layer(Unquant.of(torch.ones(8, 4, dtype=torch.float16))), "gate")
    part = LinearPart(layer, (8, 4), layer.whole(), torch.empty(0, dtype=torch.float32))
    assert part.codes.numbers is not None
    assert part.codes.numbers.dtype == torch.float32


def test_vllm_finds_the_plug_in_and_nobody_else_imports_vllm() -> None:
    """The function that vLLM calls is there without it."""
    declared = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    assert '[project.entry-points."vllm.general_plugins"]\nuqff = "uqff.integrations.vllm:register"\n' in declared
    code = (
        "import sys, uqff.integrations.vllm as plug_in; assert callable(plug_in.register); print('vllm' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
