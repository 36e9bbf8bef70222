"""Which kernel makes a product from the codes, and how it shares the work: rules as measured on an H200.

The benchmarks have the times.  Sizes between those that are measured go with the nearest smaller one.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CLUSTERS", "FEW", "WARPGROUPS", "Tiling", "chosen", "widest"]

CLUSTERS = (9, 0)
"""The first compute capability with clusters of blocks, which ``tile.cu`` needs."""
WARPGROUPS = (9, 0)
"""The only one with the instructions of ``wide.cu``."""
STAGE = 256
"""Inputs that kernels read together; as ``product.cu`` has them."""
MANY_OUTPUTS, SOME_OUTPUTS = 8192, 4096
"""From how many outputs on tiles fill the GPU, alone or if blocks share their inputs."""
FEW = 16
"""Rows of ``x`` that ``product.cu`` has kernels for."""


class Tiling(NamedTuple):
    """How ``tile.cu`` or ``wide.cu`` shares the work.

    Attributes:
        columns: rows of ``x`` of a block: 1, or a multiple of 8.
        warps: of a block, which makes 16 outputs with each.
        splits: blocks of a cluster, which share the inputs.
        blocks: that a multiprocessor shall have room for.
        wide: whether it is of ``wide.cu``.
    """

    columns: int
    warps: int
    splits: int
    blocks: int
    wide: bool = False


def widest(capability: tuple[int, int]) -> int:
    """Rows of ``x`` that are multiplied from the codes at most; from there, dequantising first is faster."""
    if capability < CLUSTERS:
        return FEW
    return 256 if capability == WARPGROUPS else 64


def chosen(capability: tuple[int, int], outputs: int, inputs: int, columns: int) -> Tiling | None:
    """How a product is made best.

    Args:
        capability: of the GPU.
        outputs: rows of the weight.
        inputs: a multiple of :data:`STAGE`.
        columns: rows of ``x``, at most :func:`widest`.

    Returns:
        None: by ``product.cu``, or for more than :data:`FEW` rows by dequantising first.
    """
    if capability < CLUSTERS or columns == 1 or outputs < SOME_OUTPUTS:
        return None
    many = outputs >= MANY_OUTPUTS
    if columns <= 8:
        found = Tiling(8, 4, 2, 6) if many else None
    elif columns <= FEW:
        found = Tiling(16, 4, 2, 4)
    elif capability == WARPGROUPS:
        found = _wide(many, columns)
    elif columns <= 32:
        found = Tiling(32, 8, 1 if many else 4, 2)
    else:
        found = Tiling(64, 8, 1, 2) if many and columns <= 64 else None
    if found is None:
        return None
    splits = found.splits
    while splits > inputs // STAGE:
        splits //= 2
    return found._replace(splits=splits)


def _wide(many: bool, columns: int) -> Tiling | None:
    if columns <= 32:
        return Tiling(32, 16, 2, 1, wide=True) if many else Tiling(32, 8, 8, 2, wide=True)
    if columns <= 64:
        return Tiling(64, 16, 2 if many else 4, 1, wide=True)
    if not many:
        return Tiling(64, 8, 2, 2, wide=True) if columns <= 128 else None
    return Tiling(128 if columns <= 128 else 256, 8, 1, 1, wide=True)
