"""What families and layers call: weights on a GPU as plain numbers, and products with them."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import TYPE_CHECKING

from uqff import simd
from uqff.codes import DType
from uqff.gpu import compiling, driver
from uqff.gpu import tiling as rules
from uqff.gpu.source import (
    PRIMITIVES,
    Stored,
    dequantize_source,
    product_source,
    ring_source,
    spread_source,
    tile_source,
    wide_source,
)
from uqff.gpu.tiling import Tiling

if TYPE_CHECKING:
    import torch

__all__ = [
    "WIDEST",
    "WIDTHS",
    "FusedProduct",
    "Spread",
    "Weight",
    "available",
    "dequantize",
    "gather_multiply",
    "loaded",
    "multiply",
    "multiply_wide",
]

THREADS = 256
ALIGNMENT = 16
"""Bytes that a thread reads or writes together."""
OLDEST = (8, 0)
"""The first compute capability with bfloat16 and asynchronous copies."""
STAGE, ROWS = 256, 16
"""Inputs that a warp multiplies with together, and outputs that a block makes; as ``product.cu`` has them."""
WIDTHS = (1, 8, 16)
SPREAD, SPREAD_ROWS = 64, 32
"""Numbers of ``x`` that a block of ``spread.cu`` puts in order, and of how many rows."""
WIDEST = WIDTHS[-1]
"""Rows of ``x`` that ``product.cu`` takes at most."""


class Weight(ctypes.Structure):
    """``Weight`` of ``numbers.cu``."""

    _fields_ = (("part", ctypes.c_void_p * 4), ("number", ctypes.c_int64 * 6))

    @classmethod
    def of(cls, stored: Stored, count: int) -> Weight:
        made = cls()
        for i, part in enumerate(stored.parts):
            made.part[i] = part.data_ptr()
        for i, number in enumerate((count, *stored.numbers)):
            made.number[i] = number
        return made


class FusedProduct(ctypes.Structure):
    """``Product`` of ``product.cu``."""

    _fields_ = (
        ("weight", Weight),
        ("row_bytes", ctypes.c_int64 * 3),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("experts", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("inputs", ctypes.c_int),
        ("columns", ctypes.c_int),
        ("share", ctypes.c_int),
        ("count", ctypes.c_int),
    )


class Spread(ctypes.Structure):
    """``Spread`` of ``spread.cu``."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("image", ctypes.c_void_p),
        ("inputs", ctypes.c_int),
        ("columns", ctypes.c_int),
    )


def available(device: torch.device) -> bool:
    """Whether kernels run there: they are not turned off, it is an NVIDIA GPU of this decade, and NVRTC is there."""
    return device.type == "cuda" and simd.choice() != "reference" and _capable(device.index)


@cache
def _capable(index: int) -> bool:
    import torch

    return compiling.library() is not None and torch.cuda.get_device_capability(index) >= OLDEST


def dequantize(stored: Stored, out: torch.Tensor) -> bool:
    """Write a weight as plain numbers.

    Args:
        stored: what it is.
        out: float32, bfloat16 or float16, contiguous, on the device of the weight.

    Returns:
        Whether it was done. If not, nothing was written: there is no GPU that can, or an address is no multiple of
        what is read or written together.
    """
    import torch

    if (
        not available(out.device)
        or out.data_ptr() % ALIGNMENT
        or not all(_aligned(part, stored.alignment) for part in stored.parts)
    ):
        return False
    if not out.numel():
        return True
    dtype = _known(out.dtype)
    if stored.numbers_into is not None:
        stored.numbers_into(out)
        return True
    with torch.cuda.device(out.device):
        kernel = _dequantizer(stored.family, stored.decoder, dtype, stored.runs, out.device.index)
        weights = THREADS * stored.runs * ALIGNMENT // out.element_size()
        weight, to = Weight.of(stored, out.numel()), ctypes.c_void_p(out.data_ptr())
        kernel.launch_early((math.ceil(out.numel() / weights), 1), THREADS, weight, to)
    return True


def multiply(stored: Stored, x: torch.Tensor, rows: int) -> torch.Tensor | None:
    """``x Wᵀ``, from the codes.

    Args:
        stored: the weight, ``[rows, in]``.
        x: bfloat16 or float16 ``[..., in]``, of at most :func:`widest` rows, on the device of the weight.
        rows: outputs.

    In a graph that is being recorded the weight is read before kernels before have ended: none of them may write it.

    Returns:
        ``[..., rows]`` in the dtype of ``x``; None if no kernel does it.
    """
    if stored.product is not None:
        return stored.product(x, rows)
    columns = x.numel() // max(x.shape[-1], 1)
    if not 0 < columns <= widest(x.device) or not _fits(stored, x, rows):
        return None
    whole = all(part.nbytes // rows % ALIGNMENT == 0 for part in stored.parts[: stored.along])
    bits = 8 * stored.parts[0].nbytes / (rows * x.shape[-1])
    tiling = _tiling(x.device, rows, x.shape[-1], columns, stored.decoder, bits, whole)
    if tiling is None and columns > WIDEST:
        return None
    y = x.new_empty((*x.shape[:-1], rows))
    _launch(stored, x.contiguous(), y, None, rows, columns, 1, 1, tiling)
    return y


def multiply_wide(stored: Stored, x: torch.Tensor, rows: int, tiling: Tiling) -> torch.Tensor:
    """As :func:`multiply`, by ``wide.cu``, of a weight whose family has its own ``WideRows``.

    Args:
        stored: the weight, whose addresses are multiples of 16.
        x: see there; a multiple of :data:`STAGE` inputs.
        rows: likewise.
        tiling: how.
    """
    y, columns = x.new_empty((*x.shape[:-1], rows)), x.numel() // x.shape[-1]
    _launch(stored, x.contiguous(), y, None, rows, columns, 1, 1, tiling)
    return y


def gather_multiply(
    stored: Stored, x: torch.Tensor, indices: torch.Tensor, experts: int, rows: int
) -> torch.Tensor | None:
    """The product of each token with each of its experts, from the codes, in one launch.

    Args:
        stored: the weights, ``[experts, rows, in]``.
        x: bfloat16 or float16 ``[tokens, 1 or experts_per_token, in]``.
        indices: int64 ``[tokens, experts_per_token]``; of one that is no expert, the product is zero.
        experts: number of weights.
        rows: outputs of each.

    Returns:
        ``[tokens, experts_per_token, rows]``; None if no kernel does it.
    """
    if not 0 < indices.numel() < 1 << 16 or not _fits(stored, x, experts * rows):
        return None
    y = x.new_empty((*indices.shape, rows))
    share = indices.shape[1] if x.shape[1] == 1 else 1
    _launch(stored, x.contiguous(), y, indices.contiguous(), rows, 1, share, experts)
    return y


def _fits(stored: Stored, x: torch.Tensor, rows: int) -> bool:
    """Whether there is a kernel for the weight, and rows and addresses are those that it can read."""
    dtype = DType.of_torch(x.dtype)
    return (
        stored.along > 0
        and rows > 0
        and dtype in (DType.BF16, DType.F16)
        and x.shape[-1] % STAGE == 0
        and x.shape[-1] > 0
        and all(_aligned(part, ALIGNMENT) for part in stored.parts[: stored.along])
        and all(_aligned(part, 4) for part in stored.parts)
        and available(x.device)
    )


def _launch(
    stored: Stored,
    x: torch.Tensor,
    y: torch.Tensor,
    indices: torch.Tensor | None,
    rows: int,
    columns: int,
    share: int,
    experts: int,
    tiling: Tiling | None = None,
) -> None:
    import torch

    if x.data_ptr() % ALIGNMENT:
        x = x.clone()
    slots = 1 if indices is None else indices.numel()
    product = FusedProduct(
        weight=Weight.of(stored, experts * rows * x.shape[-1]),
        row_bytes=tuple(part.nbytes // (experts * rows) for part in stored.parts[: stored.along]),
        x=x.data_ptr(),
        y=y.data_ptr(),
        experts=None if indices is None else indices.data_ptr(),
        rows=rows,
        inputs=x.shape[-1],
        columns=columns,
        share=share,
        count=experts,
    )
    with torch.cuda.device(x.device):
        if tiling is None:
            kernel = _multiplier(stored.family, stored.decoder, _known(x.dtype), _width(columns), x.device.index)
            kernel.launch_early((math.ceil(rows / ROWS), slots), THREADS, product)
            return
        if tiling.ring:
            held = tiling.blocks * torch.cuda.get_device_properties(x.device).multi_processor_count
            kernel = _tiler(stored.family, stored.decoder, _known(x.dtype), tiling, x.device.index)
            kernel.launch_early((min(math.ceil(rows / ROWS), held), 1), 32 * tiling.warps + 32, product)
            return
        across = math.ceil(columns / tiling.columns)
        if tiling.wide:
            image = x.new_empty(across * tiling.columns * x.shape[-1])
            given = Spread(x.data_ptr(), image.data_ptr(), x.shape[-1], columns)
            kernel = _spreader(stored.family, stored.decoder, _known(x.dtype), tiling.columns, x.device.index)
            kernel.launch_early((x.shape[-1] // SPREAD, across * tiling.columns // SPREAD_ROWS), THREADS, given)
            product.x = image.data_ptr()
        kernel = _tiler(stored.family, stored.decoder, _known(x.dtype), tiling, x.device.index)
        tiles = math.ceil(rows / (ROWS * tiling.warps))
        grid = math.ceil(tiles / tiling.beside) * tiling.beside * tiling.splits, across
        kernel.launch_early(grid, 32 * tiling.warps, product)


@cache
def widest(device: torch.device) -> int:
    """Rows of ``x`` that a product takes at most."""
    import torch

    return rules.widest(torch.cuda.get_device_capability(device))


@cache
def _tiling(
    device: torch.device, outputs: int, inputs: int, columns: int, decoder: str, bits: float, whole: bool
) -> Tiling | None:
    import torch

    capability = torch.cuda.get_device_capability(device)
    found = rules.ring(capability, outputs, inputs, columns, decoder) if whole else None
    return found or rules.chosen(capability, outputs, inputs, columns, decoder, bits)


def _width(columns: int) -> int:
    """Of the kernel: the smallest that has room."""
    return next(width for width in WIDTHS if columns <= width)


def _aligned(part: torch.Tensor, to: int) -> bool:
    return part.is_contiguous() and part.data_ptr() % to == 0


def _known(dtype: torch.dtype) -> DType:
    found = DType.of_torch(dtype)
    assert found is not None
    return found


@cache
def _dequantizer(family: str, decoder: str, dtype: DType, runs: int, index: int) -> driver.Kernel:
    compiling.LOGGER.info("compiling %s to %s for the GPU", decoder, dtype.name)
    return _loaded(dequantize_source(family, decoder, dtype, runs), index)


@cache
def _multiplier(family: str, decoder: str, dtype: DType, columns: int, index: int) -> driver.Kernel:
    compiling.LOGGER.info("compiling products of %s with %d rows of %s for the GPU", decoder, columns, dtype.name)
    return _loaded(product_source(family, decoder, dtype, columns), index)


@cache
def _spreader(family: str, decoder: str, dtype: DType, width: int, index: int) -> driver.Kernel:
    return _loaded(spread_source(family, decoder, dtype, width), index)


@cache
def _tiler(family: str, decoder: str, dtype: DType, tiling: Tiling, index: int) -> driver.Kernel:
    compiling.LOGGER.info(
        "compiling products of %s with %d rows of %s for the GPU", decoder, tiling.columns, dtype.name
    )
    source = ring_source if tiling.ring else wide_source if tiling.wide else tile_source
    return _loaded(source(family, decoder, dtype, tiling), index)


def loaded(source: str, index: int, what: str) -> driver.Kernel:
    """A kernel of a source, on a device.

    Args:
        source: without the primitives.
        index: of the device, which must be torch's current one.
        what: the kernel is, for the log.
    """
    compiling.LOGGER.info("compiling %s for the GPU", what)
    return _loaded(source, index)


def _loaded(source: str, index: int) -> driver.Kernel:
    import torch

    code = compiling.compiled(PRIMITIVES.read_text() + source, torch.cuda.get_device_capability(index))
    return driver.load(code, torch.device("cuda", index))
