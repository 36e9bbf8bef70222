"""Products on the CPU: by the kernels of :mod:`uqff.simd.decoding`, which decode a weight as they multiply with it.

Weights are as dequantised to float32, sums are float32, whatever the dtype of the activations; only the result is
rounded to it.  So a product is as exact as one of float32 numbers, but its bits depend on the CPU's vectors and on the
number of rows, as those of any BLAS do.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import ReferenceType, ref

import numpy as np
import numpy.typing as npt
import torch

from uqff import simd
from uqff.families.part import Part
from uqff.parallel.weight import WeightBuffers, of_spec
from uqff.simd.threads import num_threads

if TYPE_CHECKING:
    from uqff.families import QuantizedTensor
    from uqff.families.multiplying import EngineProduct
    from uqff.simd.chain import Chain, Task
    from uqff.simd.decoding import Decoding

__all__ = ["engine_task", "gather_linear", "linear", "linear_as_engine", "multiply"]

MOST_ROWS: Final = {torch.float32: 128, torch.bfloat16: 32, torch.float16: 32}
"""Rows of activations above which a weight is dequantised as a whole, and BLAS multiplies.

Measured with q4_0 and q4k of 4096 x 4096, two cores (Zen 3): kernels take 0.1 to 0.9 of the time up to 64 float32 rows,
and as much from 256 on.  Of 16-bit numbers BLAS has faster products on other CPUs (AVX-512 BF16, AMX) than kernels of
float32 can have.
"""

MOST_AS_ENGINE: Final = 128
"""Rows of activations above which those of the engine's arithmetic are rounded first and then multiplied as floats.

Measured with q4k, q3k and q8_0 of 512 x 2048, one core (Zen 3): products of codes take .57 to .93 of the time up to
this many, and .75 to 1.1 of it at twice as many.
"""

_KEPT: Final = 1 << 14
"""Weights that are remembered: more than a model has."""


class _Ways(NamedTuple):
    """How a weight is multiplied: views of memory that they do not keep alive.

    Attributes:
        shape: of the weight.
        record: the weight.
        decoding: how kernels decode it; None if they cannot multiply with it.
        engine: its product in the engine's arithmetic; None if that is the exact one.
        columns: of a matrix; None of a stack.
        one: the product of one row, prepared, by the arithmetic; None if it cannot be.
    """

    shape: tuple[int, ...]
    record: QuantizedTensor
    decoding: Decoding | None
    engine: EngineProduct | None
    columns: int | None
    one: dict[str, _OneRow | None]


class _OneRow:
    """The product of one row, of which all but the row is in its place: to begin is what a small product costs.

    What stages leave for each other has its place, too, so that it is made by one thread at a time.
    """

    def __init__(
        self,
        stages: list[list[Task]],
        arrays: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]],
        fits: npt.NDArray[np.int64],
    ) -> None:
        """Nothing is compiled yet.

        Args:
            stages: of a chain.
            arrays: where they have activations and product; nothing is read or written there.
            fits: where they say whether they are exact for the activations.
        """
        self._stages, self._arrays, self._fits, self._outputs = stages, arrays, fits, arrays[1].shape[1]
        self._shared = any(task.n > task.grain for tasks in stages for task in tasks)
        self._one = threading.Lock()
        self._threads = 0
        self._chain: Chain | None = None
        self._places: list[list[tuple[Any, int]]] = []

    @classmethod
    def of(cls, ways: _Ways, arithmetic: str) -> _OneRow | None:
        """That of a weight; None if there is no kernel that is all of it."""
        x, y = np.empty((1, ways.shape[1]), np.float32), np.empty((1, ways.shape[0]), np.float32)
        laid: dict[Hashable, Task] = {}
        stages: list[list[Task]] = []
        fits = np.ones(1, np.int64)
        if ways.engine is not None and arithmetic == "engine":
            task = ways.record.engine_task(x, y, laid)
            stages = [] if task is None else [list(laid.values()), [task]]
        elif ways.decoding is not None:
            stages = ways.decoding.stages(x, y, fits)
        return cls(stages, (x, y), fits) if stages else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor | None:
        """``[..., out]``; None if it has to be made in another way, as while another thread is at it.

        Interrupted, it is never made again: threads may still be at it.
        """
        place = x.data_ptr()
        if not place or not x.is_contiguous() or x.is_neg() or not self._one.acquire(blocking=False):
            return None
        threads = num_threads() if self._shared else 1
        chain = self._chain if threads == self._threads else None
        if chain is None:
            chain = self._made(threads)
        shape = (1, self._outputs) if x.ndim == 2 else (*x.shape[:-1], self._outputs)
        y = torch.from_numpy(np.empty(shape, np.float32))  # half the time of torch.empty
        for places, address in zip(self._places, (place, y.data_ptr()), strict=True):
            for frame, at in places:
                frame[at] = address
        chain(threads, (x, y))
        fits = self._fits[0]
        self._one.release()
        return y if fits else None

    def _made(self, threads: int) -> Chain:
        from uqff.simd.chain import Chain

        self._threads, self._chain = threads, Chain(self._stages, threads)
        self._places = [self._chain.places(each) for each in self._arrays]
        return self._chain


_by_address: dict[tuple[object, ...], _Ways | None] = {}
"""By specification, addresses and whether kernels serve.  Whoever asks brings tensors that keep the memory alive."""

_by_module: dict[int, tuple[ReferenceType[WeightBuffers], list[int], _Ways | None]] = {}
"""By the identity of a module, and with it: its ways, and the addresses that they hold for.

What is kept on a module would be copied and pickled with it, and to find it in a weak dictionary takes a microsecond.
"""


def multiply(x: torch.Tensor, weight: WeightBuffers, arithmetic: str) -> torch.Tensor | None:
    """:func:`linear`, or :func:`linear_as_engine`, of a module that nobody watches; None where kernels do not serve."""
    if not simd.enabled():
        return None
    known = _by_module.get(id(weight))
    if known is None or known[0]() is not weight or known[1] != weight.addresses():
        known = _remember(weight)
    ways = known[2]
    if ways is None:
        return None
    if x.numel() == ways.columns and x.dtype is torch.float32 and x.shape[-1] == ways.columns:
        y = _one_row(x, ways, arithmetic)
        if y is not None:
            return y
    y = _as_engine(x, ways) if arithmetic == "engine" else None
    return _exactly(x, ways) if y is None else y


def _one_row(x: torch.Tensor, ways: _Ways, arithmetic: str) -> torch.Tensor | None:
    """What a token takes, all else being known."""
    known = ways.one
    if arithmetic not in known:
        known[arithmetic] = _OneRow.of(ways, arithmetic)
    one = known[arithmetic]
    try:
        return None if one is None else one(x)
    except BaseException:
        known.pop(arithmetic, None)
        raise


def engine_task(
    weight: WeightBuffers, x: npt.NDArray[np.float32], y: npt.NDArray[np.float32], laid: dict[Hashable, Task]
) -> Task | None:
    """:meth:`Multiplying.engine_task` of a module, which the caller keeps as it is; None if they do not fit."""
    ways = _remember(weight)[2] if simd.enabled() and weight.numbers is None else None
    if ways is None or (1, ways.columns) != x.shape or (1, ways.shape[0]) != y.shape:
        return None
    return ways.record.engine_task(x, y, laid)


def _remember(weight: WeightBuffers) -> tuple[ReferenceType[WeightBuffers], list[int], _Ways | None]:
    number = id(weight)

    def forget(gone: ReferenceType[WeightBuffers]) -> None:
        known = _by_module.get(number)
        if known is not None and known[0] is gone:  # the identity may be another module's by now
            del _by_module[number]

    known = _by_module[number] = ref(weight, forget), weight.addresses(), _ways(weight.bytes(), weight.spec)
    return known


def linear(x: torch.Tensor, parts: Sequence[torch.Tensor], spec: str) -> torch.Tensor | None:
    """See :class:`uqff.parallel.product.Device`."""
    ways = _ways(parts, spec) if x.dtype in MOST_ROWS else None
    return None if ways is None else _exactly(x, ways)


def linear_as_engine(x: torch.Tensor, parts: Sequence[torch.Tensor], spec: str) -> torch.Tensor | None:
    """See :class:`uqff.parallel.product.Device`."""
    ways = _ways(parts, spec) if x.dtype in MOST_ROWS else None
    return None if ways is None else _as_engine(x, ways)


def _fits(x: torch.Tensor, ways: _Ways, most: int) -> bool:
    """Whether the weight is a matrix for activations of that shape, of which there are some, but not too many."""
    shape = ways.shape
    return len(shape) == 2 and x.shape[-1] == shape[1] and 0 < x.numel() <= most * shape[1]


def _exactly(x: torch.Tensor, ways: _Ways) -> torch.Tensor | None:
    decoding = ways.decoding
    if decoding is None or not _fits(x, ways, MOST_ROWS.get(x.dtype, 0)):
        return None
    given = _floats(x)
    y = np.empty((len(given), ways.shape[0]), np.float32)
    decoding.multiply(given, y)
    return _tensor(y, x, *x.shape[:-1])


def _as_engine(x: torch.Tensor, ways: _Ways) -> torch.Tensor | None:
    if ways.engine is None or x.dtype not in MOST_ROWS or not _fits(x, ways, x.numel()):
        return None
    given = _floats(x)
    if len(given) > MOST_AS_ENGINE:
        rounded = ways.record.rounded_as_engine(given)
        if rounded is not None:
            rows = torch.from_numpy(rounded)
            y = _exactly(rows, ways)
            y = torch.nn.functional.linear(rows, ways.record.dequantize()) if y is None else y
            return y.view(*x.shape[:-1], y.shape[1]).to(x.dtype)
    return _tensor(ways.engine(given), x, *x.shape[:-1])


def gather_linear(
    x: torch.Tensor, indices: torch.Tensor, parts: Sequence[torch.Tensor], spec: str
) -> torch.Tensor | None:
    """See :class:`uqff.parallel.product.Device`."""
    ways = _ways(parts, spec) if x.dtype in MOST_ROWS else None
    if ways is None or ways.decoding is None or len(ways.shape) != 3 or ways.shape[2] != x.shape[-1]:
        return None
    decoding = ways.decoding
    (tokens, per_token), (experts, outputs, _) = indices.shape, ways.shape
    given, chosen = _floats(x), indices.numpy().reshape(-1)
    counts = np.bincount(chosen, minlength=experts)
    if len(counts) > experts or counts.max() > MOST_ROWS[x.dtype]:
        return None
    y = np.empty((tokens * per_token, outputs), np.float32)
    places, at = np.argsort(chosen, kind="stable"), 0
    for expert in np.flatnonzero(counts).tolist():
        where = places[at : at + counts[expert]]
        at += len(where)
        made = np.empty((len(where), outputs), np.float32)
        rows = given[where if x.shape[1] == per_token else where // per_token]
        decoding.multiply(rows, made, expert * outputs, whole=False)
        y[where] = made
    return _tensor(y, x, tokens, per_token)


def _tensor(y: npt.NDArray[np.float32], x: torch.Tensor, *outer: int) -> torch.Tensor:
    """Results ``[..., out]`` in the dtype of the activations."""
    made = torch.from_numpy(y if len(outer) == 1 else y.reshape(*outer, y.shape[-1]))
    return made if x.dtype is torch.float32 else made.to(x.dtype)


def _floats(x: torch.Tensor) -> npt.NDArray[np.float32]:
    """Activations as float32 ``[rows, in]``."""
    if x.requires_grad:
        x = x.detach()
    if x.dtype is not torch.float32 or not x.is_contiguous():
        x = x.to(torch.float32).contiguous()
    if x.is_neg():  # a view of which the sign is still to be changed
        x = x.resolve_neg()
    rows: npt.NDArray[np.float32] = x.numpy()
    if rows.ndim == 3 and len(rows) == 1:
        rows = rows[0]  # which takes half as long as to reshape
    return rows if rows.ndim == 2 else rows.reshape(-1, x.shape[-1])


def _ways(parts: Sequence[torch.Tensor], spec: str) -> _Ways | None:
    """How the weight is multiplied whose bytes these are; None if they are not."""
    enabled = simd.enabled()
    key = (enabled, spec, *((part.data_ptr(), part.numel(), part.is_contiguous(), part.dtype) for part in parts))
    if key not in _by_address:
        if len(_by_address) >= _KEPT:
            _by_address.clear()
        _by_address[key] = _found(parts, of_spec(spec))
    return _by_address[key]


def _found(parts: Sequence[torch.Tensor], meta: QuantizedTensor) -> _Ways | None:
    if not all(part.is_contiguous() and part.dtype is torch.uint8 and part.is_cpu for part in parts):
        return None
    sizes = [part.nbytes for part in meta.parts.values()]
    if sizes != [part.numel() for part in parts]:
        return None
    views = {
        name: Part(part.dtype, part.shape, memoryview((ctypes.c_ubyte * size).from_address(data.data_ptr())))
        for (name, part), size, data in zip(meta.parts.items(), sizes, parts, strict=True)
    }
    record = meta.replaced(**views)
    decoding = record.decoding()
    if decoding is not None and not (
        decoding.fits(record.shape[-1]) and decoding.items * decoding.size == math.prod(record.shape)
    ):
        decoding = None
    columns = record.shape[1] if len(record.shape) == 2 else None
    return _Ways(record.shape, record, decoding, record.engine_product(), columns, {})
