"""One row of activations, of which all else is in its place: the bits of the product that is begun anew each time."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import uqff
from tests.parallel.weights import stacked
from uqff.parallel import product_cpu
from uqff.parallel.weight import WeightBuffers

pytest.importorskip("numba")

SHAPE = (96, 512)
KINDS = ("q4_0", "q8_0", "q2k", "q4k", "q6k", "afq3", "afq4", "fp8", "f8q8", "mxfp4")


def buffers(kind: str, *shape: int) -> WeightBuffers:
    weight = torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(1)) / 8
    return WeightBuffers(uqff.quantize(weight, kind))


def row(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(shape or (1, SHAPE[1]), generator=torch.Generator().manual_seed(seed))


def anew(x: torch.Tensor, weight: WeightBuffers, arithmetic: str) -> torch.Tensor:
    """The product by the operators' way."""
    way = product_cpu.linear_as_engine if arithmetic == "engine" else product_cpu.linear
    y = way(x, weight.bytes(), weight.spec)
    y = product_cpu.linear(x, weight.bytes(), weight.spec) if y is None else y
    assert y is not None
    return y


def one_of(weight: WeightBuffers, arithmetic: str) -> Any:
    ways: Any = product_cpu._by_module[id(weight)][2]
    return ways.one[arithmetic]


def same(y: torch.Tensor | None, expected: torch.Tensor) -> bool:
    """Shape, and bits: NaN among them."""
    return y is not None and y.shape == expected.shape and y.numpy().tobytes() == expected.numpy().tobytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arithmetic", ["exact", "engine"])
def test_the_bits_are_those_of_the_operator(kind: str, arithmetic: str) -> None:
    """Again and again, with other activations: of any size, zeros, no numbers; of one, two, three dimensions."""
    weight = buffers(kind)
    for turn, factor in enumerate((1.0, 1e30, 1.0, 1e-30, 0.0, float("inf"), 1.0)):
        x = row(seed=turn) * factor
        for given in (x, x[0], x[None]):
            expected = anew(given, weight, arithmetic)
            y = product_cpu.multiply(given, weight, arithmetic)
            assert same(y, expected), (turn, given.shape)
    assert one_of(weight, arithmetic) is not None


@pytest.mark.parametrize("kind", ["hqq4", "hqq3"])
def test_hqq_along_outputs(kind: str) -> None:
    """Whose rows have a kernel of their own; of three bits they have none, and are decoded one by one."""
    weight = buffers(kind, 512, 1024)
    assert same(product_cpu.multiply(row(1, 1024), weight, "exact"), anew(row(1, 1024), weight, "exact"))


@pytest.mark.parametrize("kind", ["q4k", "afq4", "fp8"])
@pytest.mark.parametrize("arithmetic", ["exact", "engine"])
def test_threads_share_it(kind: str, arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are to be at each call."""
    weight = buffers(kind, 2050, 1024)
    for threads in (1, 3, 2, 1):
        monkeypatch.setenv("UQFF_NUM_THREADS", str(threads))
        x = row(1, 1024, seed=threads)
        assert same(product_cpu.multiply(x, weight, arithmetic), anew(x, weight, arithmetic))
        assert one_of(weight, arithmetic)._threads == threads


def test_callers_at_the_same_time() -> None:
    """Those that come while another is at it have theirs made the other way."""
    weight, wrong = buffers("q4k", 512, 2048), list[int]()
    rows = [row(1, 2048, seed=turn) for turn in range(8)]
    expected = [anew(x, weight, "engine") for x in rows]

    def repeat(turn: int) -> None:
        for _ in range(100):
            wrong.extend([turn] * (not same(product_cpu.multiply(rows[turn], weight, "engine"), expected[turn])))

    threads = [threading.Thread(target=repeat, args=(turn,)) for turn in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_nobody_else_is_at_it_until_it_is_known_whether_it_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that comes while a chain is made, or done, has its product made the other way: they share their room."""
    weight = buffers("q4k")
    huge, found = row() * 1e30, list[Any]()
    assert same(product_cpu.multiply(huge, weight, "exact"), anew(huge, weight, "exact"))
    one = one_of(weight, "exact")
    done = type(one._chain).__call__

    def beside(self: Any, *given: Any) -> None:
        done(self, *given)
        found.append(one(row()))

    monkeypatch.setattr(type(one._chain), "__call__", beside)
    assert one(huge) is None
    assert found == [None]
    monkeypatch.undo()
    made = type(one)._made

    def while_made(self: Any, threads: int) -> Any:
        found.append(self(row()))
        return made(self, threads)

    monkeypatch.setattr(type(one), "_made", while_made)
    one._chain = None
    assert same(one(row()), anew(row(), weight, "exact"))
    assert found == [None, None]


def test_rows_that_do_not_lie_there_as_they_are() -> None:
    """Every other number; a view of which the sign is still to be changed."""
    weight, x = buffers("q4k"), row(1, 2 * SHAPE[1])
    half, changed = x[:, ::2], torch._neg_view(row())
    assert changed.is_neg()
    for given, plain in ((half, half.clone()), (changed, changed.clone())):
        y = product_cpu.multiply(given, weight, "exact")
        assert same(y, anew(plain, weight, "exact"))


def test_an_interrupted_product_is_not_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was prepared with may still be written to: the next one is prepared anew."""
    weight = buffers("q4k")
    expected = anew(row(), weight, "exact")
    assert same(product_cpu.multiply(row(), weight, "exact"), expected)
    before = one_of(weight, "exact")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(before._chain), "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        product_cpu.multiply(row(), weight, "exact")
    monkeypatch.undo()
    assert same(product_cpu.multiply(row(), weight, "exact"), expected)
    assert one_of(weight, "exact") is not before
    assert before(row()) is None  # nor is it ever


def test_stacks_are_left_to_others() -> None:
    """They have no row that is all of the activations."""
    weight = WeightBuffers(stacked("q4k", (3, *SHAPE)))
    assert product_cpu.multiply(row(), weight, "exact") is None
