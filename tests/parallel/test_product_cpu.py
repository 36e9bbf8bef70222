"""Products by kernels that decode as they multiply: as exact as sums of float32, for every type, shape and batch."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import uqff
from tests.parallel.weights import stacked
from uqff.families import AFQ, FP8, HQQ, QuantizedTensor, Unquant
from uqff.numerics.packing import PLANES
from uqff.parallel import ReplicatedLayer, ReplicatedStack, product, product_cpu
from uqff.parallel.weight import WeightBuffers

pytestmark = pytest.mark.long

GGML = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q8_1", "q2k", "q3k", "q4k", "q5k", "q6k", "q8k")
KINDS = (*GGML, "afq2", "afq3", "afq4", "afq6", "afq8", "f8q8", "fp8", "mxfp4")
OF_STEPS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "afq3", "afq4", "afq6", "afq8", "f8q8", "fp8", "mxfp4")
HQQ_BITS = (1, 2, 3, 4, 8)
ALL = (*KINDS, "float32", "bfloat16", "float16")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_of(kind: str, *shape: int) -> QuantizedTensor:
    dtype = getattr(torch, kind, None)
    values = random(*shape) / 8
    return uqff.quantize(values, kind) if dtype is None else Unquant.of(values.to(dtype))


def by_kernel(record: QuantizedTensor, x: torch.Tensor) -> torch.Tensor:
    """The product, which no kernel has left to others."""
    weight = WeightBuffers(record)
    y = product_cpu.linear(x, weight.bytes(), weight.spec)
    assert y is not None, f"no kernel for {record}"
    return y


def check(y: torch.Tensor, x: torch.Tensor, dense: torch.Tensor, what: Any) -> None:
    """Within 2**-20 of the sum of magnitudes of the exact product, and of the rounding to the dtype of x."""
    terms = x.double().abs() @ dense.double().abs().T
    expected = x.double() @ dense.double().T
    ends = 0 if x.dtype is torch.float32 else torch.finfo(x.dtype).eps / 2
    bound = 2.0**-20 * terms * (1 + ends) + ends * expected.abs() + torch.finfo(x.dtype).tiny * (ends > 0)
    assert y.dtype is x.dtype, what
    assert ((y.double() - expected).abs() <= bound).all(), (what, float(((y.double() - expected).abs() / terms).max()))


@pytest.mark.parametrize("kind", ALL)
def test_products_are_within_the_bound(kind: str) -> None:
    """Odd numbers of rows; batches of both kernels, odd and even; a row within a chunk, and of chunks and a rest."""
    for rows, columns in ((37, 256), (5, 1280)):
        record = weight_of(kind, rows, columns)
        dense = record.dequantize()
        for batch in (1, 2, 3, 8, 9, 64):
            x = random(batch, columns, seed=batch)
            check(by_kernel(record, x), x, dense, (kind, rows, columns, batch))
        x = random(columns, seed=3).bfloat16()
        check(by_kernel(record, x), x, dense, (kind, "one dimension"))


@pytest.mark.parametrize("kind", ["mxfp4", "hqq4"])
def test_few_rows_are_multiplied_one_after_the_other(kind: str) -> None:
    """Of these that is faster, and gives the bits of one row."""
    record, x = weight_of(kind, 64, 256), random(3, 256, seed=5)
    made = torch.cat([by_kernel(record, row[None]) for row in x])
    for rows in (2, 3):
        assert torch.equal(by_kernel(record, x[:rows]), made[:rows])


def activations(columns: int) -> dict[str, torch.Tensor]:
    """One row each, of kinds that sums over groups might fail with."""
    x = random(1, columns, seed=5)
    massive, one = x.clone(), torch.zeros(1, columns)
    massive[0, [7, 100]] = 1000
    one[0, 77] = 0.3
    return {
        "even": x,
        "positive": x.abs(),
        "massive": massive,
        "one": one,
        "none": 0 * x,
        "huge": x * 1e30,
        "tiny": x * 1e-30,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_of_any_activations(kind: str) -> None:
    """The product of a scale's codes comes before the scale, and is as exact, whatever the activations are."""
    record = weight_of(kind, 40, 512)
    dense = record.dequantize()
    for name, x in activations(512).items():
        check(by_kernel(record, x), x, dense, (kind, name))


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_with_weights_of_which_few_count(kind: str) -> None:
    """Nearly all are zero, or a thousandth: none is the difference of large sums."""
    rng = torch.Generator().manual_seed(3)
    few = torch.rand(40, 512, generator=rng) < 0.01
    for name, rest in (("zero", 0.0), ("small", 1e-3)):
        plain = torch.randn(40, 512, generator=rng)
        record = uqff.quantize(torch.where(few, plain, rest * plain), kind)
        for x in (random(1, 512, seed=6), random(1, 512, seed=7).abs()):
            check(by_kernel(record, x), x, record.dequantize(), (kind, name))


@pytest.mark.parametrize("kind", OF_STEPS)
def test_rows_that_end_within_a_step(kind: str) -> None:
    """The last step of a row begins before the one before has ended, and no weight counts twice."""
    for columns in (64, 192, 2880):
        record, x = weight_of(kind, 9, columns), random(1, columns, seed=2)
        check(by_kernel(record, x), x, record.dequantize(), (kind, columns))


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_groups_of_afq(bits: int, group: int) -> None:
    """Every group has its scale; rows of more groups than are read together."""
    rng = torch.Generator().manual_seed(bits)
    for rows, columns in ((3, 640), (2, 32768 + 128)):
        codes = torch.randint(0, 256, (rows, columns * bits // 8), generator=rng).byte()
        scale, bias = (torch.randn(rows, columns // group, generator=rng).bfloat16() for _ in range(2))
        record, x = AFQ(codes, scale, bias, bits, group), random(1, columns, seed=2)
        check(by_kernel(record, x), x, record.dequantize(), (bits, group, columns))


def test_one_row_of_fp8_with_nan() -> None:
    """The codes of NaN, of either sign, have bits of a number for the kernel of one row: it looks for them."""
    for code in (0x7F, 0xFF):
        codes = torch.full((3, 128), 0x7E, dtype=torch.uint8)
        codes[1, 100] = code
        record = FP8(codes.view(torch.float8_e4m3fn), *[torch.tensor(0.5)] * 3)
        assert by_kernel(record, torch.zeros(1, 128)).isnan().tolist() == [[False, True, False]]


@pytest.mark.parametrize("kind", ["fp8", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("columns", [33, 41, 545, 1057])
def test_rows_of_any_length(kind: str, columns: int) -> None:
    """Where no blocks ask for more, the last vectors of a row overlap, and no number counts twice."""
    record = weight_of(kind, 7, columns)
    for batch in (1, 2, 5):
        x = random(batch, columns, seed=batch)
        check(by_kernel(record, x), x, record.dequantize(), (kind, columns, batch))


@pytest.mark.parametrize("kind", ["q4_0", "afq4", "fp8"])
def test_threads_share_the_rows(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """More rows than one range has: the numbers are those of one thread."""
    record = weight_of(kind, 1111, 1024)
    for batch in (1, 7):
        x = random(batch, 1024, seed=1)
        made = []
        for threads in ("1", "3"):
            monkeypatch.setenv("UQFF_NUM_THREADS", threads)
            made.append(by_kernel(record, x))
        assert torch.equal(*made)
        check(made[0], x, record.dequantize(), (kind, batch))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", HQQ_BITS)
def test_hqq(bits: int, axis: int) -> None:
    """Rows that share words, with padding behind the last plane of 3 bits; scales and zeros of every dtype; experts."""
    group, dtypes = 64, (torch.float32, torch.float16, torch.bfloat16)
    for rows, columns in ((320, 64), (640, 128)):
        groups = rows * columns // group
        matrix = (group, groups) if axis == 0 else (groups, group)
        height = -(-matrix[0] // PLANES[bits])
        size = 4 if bits == 3 else 1
        words = torch.randint(0, 256, (height, matrix[1] * size), generator=torch.Generator().manual_seed(1)).byte()
        parts = (1, groups) if axis == 0 else (groups, 1)
        for scales, zeros in (dtypes[:2], dtypes[1:], (dtypes[2], dtypes[0])):
            d, zero = random(*parts, seed=2).to(scales), random(*parts, seed=3).to(zeros)
            record = HQQ(words, d, zero, (rows, columns), bits, group, axis)
            for batch in (1, 6):
                x = random(batch, columns, seed=4)
                check(by_kernel(record, x), x, record.dequantize(), (bits, axis, rows, batch))
        weight = WeightBuffers(HQQ(words, d, zero, (5, rows // 5, columns), bits, group, axis))
        x, indices = random(3, 1, columns), torch.tensor([[4, 1], [0, 4], [2, 2]])
        y = product_cpu.gather_linear(x, indices, weight.bytes(), weight.spec)
        assert y is not None
        dense = weight.record.dequantize()
        for t, chosen in enumerate(indices.tolist()):
            for k, expert in enumerate(chosen):
                check(y[t, k : k + 1], x[t], dense[expert], (bits, axis, t, k))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_row_with_hqq(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """Rows that share scales are taken together: wider ones than are read at once, more than a thread's range has."""
    rng = torch.Generator().manual_seed(bits)
    for rows, columns in ((128, 2112), (1024, 512)):
        groups = rows * columns // 64
        words = torch.randint(0, 256, (64 // PLANES[bits], groups), generator=rng).byte()
        scale, zero = torch.rand(1, groups, generator=rng) - 0.5, 3 * torch.rand(1, groups, generator=rng)
        record = HQQ(words, scale, zero, (rows, columns), bits, 64, 0)
        for name, x in activations(columns).items():
            check(by_kernel(record, x), x, record.dequantize(), (bits, rows, name))
    made = []
    for threads in ("1", "3"):
        monkeypatch.setenv("UQFF_NUM_THREADS", threads)
        made.append(by_kernel(record, random(1, columns)))
    assert torch.equal(*made)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_goes_where_it_belongs(number: float) -> None:
    """In an activation: to all outputs of its row; in a weight: to one output of every row; to no others."""
    plain = random(9, 64)
    plain[4, 40] = number
    for record in (Unquant.of(plain), Unquant.of(plain.half()), Unquant.of(plain.bfloat16())):
        for batch in (1, 3):
            y = by_kernel(record, random(batch, 64, seed=1))
            assert not y[:, 4].isfinite().any()
            assert y[:, [0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()
    for kind in KINDS:
        quantised = weight_of(kind, 5, 256)
        x = random(3, 256, seed=1)
        x[1, 77] = number
        for given in (x, x[1:2]):
            y = by_kernel(quantised, given)
            assert not y[len(given) // 2].isfinite().any()
        assert by_kernel(quantised, x)[[0, 2]].isfinite().all()
    scale = torch.tensor(number)
    assert not by_kernel(FP8(torch.ones(3, 32).to(torch.float8_e4m3fn), *[scale] * 3), random(2, 32)).isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
def test_experts(kind: str) -> None:
    """Of each place by itself: one expert twice in a token, one unused; tokens by themselves and for each expert."""
    stack = stacked(kind, (4, 33, 256))
    dense, weight = stack.dequantize(), WeightBuffers(stack)
    indices = torch.tensor([[0, 3], [3, 3], [1, 0], [3, 1], [0, 3]])
    for per_token in (1, 2):
        x = random(5, per_token, 256, seed=2)
        y = product_cpu.gather_linear(x, indices, weight.bytes(), weight.spec)
        assert y is not None
        for t, chosen in enumerate(indices.tolist()):
            for k, expert in enumerate(chosen):
                check(y[t, k : k + 1], x[t, min(k, per_token - 1)][None], dense[expert], (kind, t, k))


def test_layers_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is dequantised: the weight's own method is not called. Gradients are those of the dequantised weight."""
    record, stack = weight_of("q4k", 8, 256), stacked("afq4", (3, 8, 64))
    dense = record.dequantize()

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("dequantised")

    layer, experts = ReplicatedLayer(record), ReplicatedStack(stack)
    x = random(2, 256)
    with monkeypatch.context() as patch:
        for name in ("dequantize", "dequantize_expert", "dequantize_by_kernel"):
            patch.setattr(QuantizedTensor, name, refused)
        check(layer(x), x, dense, "layer")
        assert experts(random(2, 1, 64), torch.tensor([[0, 2], [1, 1]])).shape == (2, 2, 8)
    given = x.clone().requires_grad_()
    layer(given).sum().backward()
    assert given.grad is not None
    assert torch.equal(given.grad, torch.ones(2, 8) @ dense)


def test_what_kernels_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large batches, float64, rows that are no whole blocks, the reference asked for: dequantised, and right."""
    record = weight_of("q8_0", 4, 64)
    weight, x = WeightBuffers(record), random(2, 64)
    most = product_cpu.MOST_ROWS[torch.float32]
    for given in (random(most + 1, 64), x.double(), torch.empty(0, 64)):
        assert product_cpu.linear(given, weight.bytes(), weight.spec) is None
        check(ReplicatedLayer(record)(given).float(), given.float(), record.dequantize(), given.shape)
    odd = weight_of("f8q8", 4, 40)
    assert product_cpu.linear(random(2, 40), WeightBuffers(odd).bytes(), WeightBuffers(odd).spec) is None
    check(ReplicatedLayer(odd)(random(2, 40)), random(2, 40), odd.dequantize(), "f8q8")
    monkeypatch.setenv("UQFF_KERNELS", "reference")
    assert product_cpu.linear(x, weight.bytes(), weight.spec) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: [parts[0][..., :-1].contiguous()],
        lambda parts: [torch.cat([parts[0], parts[0]])[::2]],
        lambda parts: [parts[0].view(torch.int8)],
    ],
)
def test_bytes_that_do_not_fit_are_never_read_beyond_their_end(change: Any) -> None:
    """An operator takes what it is given."""
    weight = WeightBuffers(weight_of("q8_0", 4, 64))
    parts: Sequence[torch.Tensor] = change(weight.bytes())
    assert product_cpu.linear(random(2, 64), parts, weight.spec) is None


def test_weights_are_not_kept_alive_and_change_in_place() -> None:
    """What is remembered of a weight has no part in its life; its numbers are read anew each time."""
    layer = ReplicatedLayer(weight_of("q8_0", 4, 64))
    other = ReplicatedLayer(uqff.quantize(random(4, 64, seed=9), "q8_0"))
    x = random(1, 64)
    y = layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    assert not torch.equal(layer(x), y)
    buffer = next(iter(layer.weight_buffers.buffers()))
    alive = buffer.untyped_storage()._weak_ref()
    del buffer, layer
    gc.collect()
    assert type(alive) is not torch.UntypedStorage
    assert torch.UntypedStorage._expired(alive)


def test_devices() -> None:
    """The CPU is one of them."""
    assert product.DEVICES["cpu"].linear is product_cpu.linear
