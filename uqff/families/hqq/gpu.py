"""HQQ on the GPU: what :mod:`uqff.gpu` needs to know of a weight, and products, which ``gpu_product.cu`` makes."""

from __future__ import annotations

import ctypes
import math
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Final

from uqff.codes import DType
from uqff.families.hqq import gpu_tiling
from uqff.gpu import kernels
from uqff.gpu.source import Stored, launched_source
from uqff.numerics.packing import packed_rows

if TYPE_CHECKING:
    import torch

    from uqff.families.hqq.tensor import HQQ
    from uqff.gpu import driver

__all__ = ["HqqProduct", "entry", "numbers_entry", "stored", "tiles_for"]

GROUP: Final = 64
"""Of the groups that there is a product for; also the inputs that a warp multiplies with together."""
TILE: Final = 16
"""Outputs that a warp makes together."""
WIDTHS: Final = (1, 8)
"""Rows of ``x`` that there are kernels of HQQ's own for."""
EIGHT: Final = 8
"""Columns of M of a thread that dequantises along axis 0."""
HELD: Final = 528
"""Blocks of threads that dequantise at once, about."""
TOGETHER: Final = 8
"""Packed rows whose codes a thread reads at once."""


class HqqProduct(ctypes.Structure):
    """``HqqProduct`` of ``gpu_product.cu``."""

    _fields_ = (
        ("weight", kernels.Weight),
        ("x", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("rows", ctypes.c_int),
        ("inputs", ctypes.c_int),
        ("columns", ctypes.c_int),
    )


def stored(weight: HQQ) -> Stored | None:
    """Codes, scales and zeros; M is seen as rows of ``columns`` codes."""
    scales, zeros, w_q = weight.parts["scales"], weight.parts["zeros"], weight.parts["w_q"]
    groups = weight.numel // weight.group_size
    columns = groups if weight.axis == 0 else weight.group_size
    rows = weight.numel // columns
    fits = scales.shape == zeros.shape == ((1, groups) if weight.axis == 0 else (groups, 1))
    height = packed_rows(rows, weight.bits)
    if not fits or scales.dtype is not zeros.dtype or w_q.shape != (height, columns * (4 if weight.bits == 3 else 1)):
        return None
    decoder = f"Hqq<{weight.bits}, {weight.axis}, {scales.dtype.name}>"
    parts = (weight.w_q, weight.scales, weight.zeros)
    made = Stored("hqq", decoder, parts, (columns, height), alignment=16)
    return replace(
        made,
        product=partial(_multiply, made, weight.bits, weight.axis) if _has_product(weight) else None,
        numbers_into=partial(_numbers_into, made) if weight.axis == 0 and columns % EIGHT == 0 else None,
    )


def _has_product(weight: HQQ) -> bool:
    """Whether outputs of a block of rows of M are whole rows of the weight."""
    return (
        len(weight.shape) == 2
        and weight.group_size == GROUP
        and all(size > 0 and size % GROUP == 0 for size in weight.shape)
        and (weight.axis == 0 or weight.bits != 3)
    )


def _multiply(stored: Stored, bits: int, axis: int, x: torch.Tensor, rows: int) -> torch.Tensor | None:
    """``x Wᵀ``; None if no kernel does it. See :func:`uqff.gpu.kernels.multiply`."""
    dtype, inputs = DType.of_torch(x.dtype), x.shape[-1]
    columns = x.numel() // max(inputs, 1)
    if dtype not in (DType.BF16, DType.F16) or not columns or not kernels.available(x.device):
        return None
    if not all(part.is_contiguous() and part.data_ptr() % stored.alignment == 0 for part in stored.parts):
        return None
    import torch

    if columns > WIDTHS[-1]:
        if axis or inputs % kernels.STAGE:
            return None
        tiling = gpu_tiling.chosen(torch.cuda.get_device_capability(x.device), rows, inputs, columns, bits)
        return None if tiling is None else kernels.multiply_wide(stored, x, rows, tiling)

    x, y = x.contiguous(), x.new_empty((*x.shape[:-1], rows))
    width = next(each for each in WIDTHS if columns <= each)
    with torch.cuda.device(x.device):
        tiles = tiles_for(rows, torch.cuda.get_device_properties(x.device).multi_processor_count)
        what = f"products of {stored.decoder} with {width} rows of {dtype.name}"
        kernel = _kernel("HqqProduct given", entry(stored.decoder, dtype, width, tiles), what, x.device.index)
        weight = kernels.Weight.of(stored, rows * inputs)
        given = HqqProduct(weight, x.data_ptr(), y.data_ptr(), rows, inputs, columns)
        kernel.launch_early((rows // GROUP, GROUP // TILE // tiles), kernels.THREADS, given)
    return y


def _numbers_into(stored: Stored, out: torch.Tensor) -> None:
    """All numbers of a weight along axis 0. See :func:`uqff.gpu.kernels.dequantize`."""
    import torch

    dtype, (columns, height) = DType.of_torch(out.dtype), stored.numbers
    assert dtype is not None
    blocks = math.ceil(columns / EIGHT / kernels.THREADS)
    # One round of blocks, or two that share the rows.
    shares = max(HELD // blocks, 1 if height <= TOGETHER else 2)
    with torch.cuda.device(out.device):
        body = numbers_entry(stored.decoder, dtype)
        what = f"{stored.decoder} to {dtype.name}"
        kernel = _kernel("Weight weight, u8* out", body, what, out.device.index)
        weight, to = kernels.Weight.of(stored, out.numel()), ctypes.c_void_p(out.data_ptr())
        kernel.launch_early((blocks, min(height, shares)), kernels.THREADS, weight, to)


def tiles_for(rows: int, multiprocessors: int) -> int:
    """Tiles of a block: as many as share their inputs, if there are then blocks for most multiprocessors."""
    blocks = rows // GROUP
    return next((tiles for tiles in (4, 2) if blocks * 4 // tiles >= 0.7 * multiprocessors), 1)


def entry(decoder: str, dtype: DType, columns: int, tiles: int) -> str:
    """What a kernel does, in C++."""
    return f"HqqMultiply<{decoder}, {dtype.name}, {columns}, {tiles}>::run(given);"


def numbers_entry(decoder: str, dtype: DType) -> str:
    """What a kernel that dequantises does, in C++."""
    return f"HqqColumns<{decoder}, Write{dtype.name}>::run(weight, out);"


@cache
def _kernel(given: str, body: str, what: str, index: int) -> driver.Kernel:
    return kernels.loaded(launched_source("hqq", given, body, kernels.THREADS), index, what)
