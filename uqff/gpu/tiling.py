"""Which kernel makes a product from the codes, and how it shares the work: rules as measured on an H200.

The benchmarks have the times.  Sizes between those that are measured go with the nearest smaller one.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "CLUSTERS",
    "FEW",
    "MANY_OUTPUTS",
    "SOME_OUTPUTS",
    "WARPGROUPS",
    "Tiling",
    "chosen",
    "ring",
    "widest",
    "with_inputs_for_all",
]

CLUSTERS = (9, 0)
"""The first compute capability with clusters of blocks, which ``tile.cu`` needs."""
WARPGROUPS = (9, 0)
"""The only one with the instructions of ``wide.cu``, and where ``ring.cu`` was measured."""
STAGE = 256
"""Inputs that kernels read together; as ``product.cu`` has them."""
MANY_OUTPUTS, SOME_OUTPUTS = 8192, 4096
"""From how many outputs on tiles fill the GPU, alone or if blocks share their inputs."""
RING_OF_FEW_OUTPUTS = ("Q4K", "Q8_0", "Fp8", "F8q8", "Afq<6,", "Q2K", "Q8K", "Q8_1")
"""Decoders of types for which ``ring.cu`` makes up to 8 rows the fastest where outputs are fewer than most."""
PRODUCT_OF_FEW_OUTPUTS = ("Mxfp4", "Fp8")
"""And for which ``product.cu`` makes up to 16: their scales are little work, or none."""
SHORT = 5
"""Bits of a weight up to which blocks have room for twice the inputs."""
FEW = 16
"""Rows of ``x`` that ``product.cu`` has kernels for."""


class Tiling(NamedTuple):
    """How ``tile.cu``, ``wide.cu`` or ``ring.cu`` shares the work.

    Attributes:
        columns: rows of ``x`` of a block: a multiple of 8, or 1 for ``ring.cu``.
        warps: of a block, which makes 16 outputs with each.
        splits: blocks of a cluster, which share the inputs.
        blocks: that a multiprocessor shall have room for.
        wide: whether it is of ``wide.cu``.
        ring: whether it is of ``ring.cu``, of which blocks stay.
        unit: inputs that ``wide.cu`` multiplies together.
        beside: blocks of a cluster whose outputs it writes together; 1 if they share the inputs.
    """

    columns: int
    warps: int
    splits: int
    blocks: int
    wide: bool = False
    ring: bool = False
    unit: int = 64
    beside: int = 1


def widest(capability: tuple[int, int]) -> int:
    """Rows of ``x`` that are multiplied from the codes at most; from there, dequantising first is faster."""
    if capability < CLUSTERS:
        return FEW
    return 256 if capability == WARPGROUPS else 64


def ring(capability: tuple[int, int], outputs: int, inputs: int, columns: int, decoder: str) -> Tiling | None:
    """How ``ring.cu`` makes a product, None if another kernel is as fast; as :func:`chosen`.

    Args:
        capability: see there.
        outputs: likewise.
        inputs: likewise.
        columns: likewise.
        decoder: see :class:`uqff.gpu.source.Stored`.
    """
    if capability != WARPGROUPS or columns > 8:
        return None
    if columns == 1:
        return None if outputs < inputs and decoder == "Mxfp4" else Tiling(1, 16, 1, 1, ring=True)
    # Each block prepares all of x, which pays where it makes outputs enough, or where scales are easily had.
    if outputs < max(inputs, SOME_OUTPUTS) or (outputs < MANY_OUTPUTS and not decoder.startswith(RING_OF_FEW_OUTPUTS)):
        return None
    return Tiling(8, 16, 1, 1, ring=True)


def chosen(
    capability: tuple[int, int], outputs: int, inputs: int, columns: int, decoder: str = "", bits: float = 8
) -> Tiling | None:
    """How a product is made best.

    Args:
        capability: of the GPU.
        outputs: rows of the weight.
        inputs: a multiple of :data:`STAGE`.
        columns: rows of ``x``, at most :func:`widest`.
        decoder: see :class:`uqff.gpu.source.Stored`.
        bits: of a weight, without scales that lie elsewhere.

    Returns:
        If not as :func:`ring` says. None: by ``product.cu``, or for more than :data:`FEW` rows by dequantising first.
    """
    if capability < CLUSTERS or columns == 1 or outputs < SOME_OUTPUTS:
        return None
    many = outputs >= MANY_OUTPUTS
    if columns <= 8:
        found = Tiling(8, 4, 2, 6) if many else None
    elif columns <= FEW:
        found = None if not many and decoder.startswith(PRODUCT_OF_FEW_OUTPUTS) else Tiling(16, 4, 2, 4)
    elif capability == WARPGROUPS:
        found = _wide(many, columns, bits <= SHORT, decoder)
    elif columns <= 32:
        found = Tiling(32, 8, 1 if many else 4, 2)
    else:
        found = Tiling(64, 8, 1, 2) if many and columns <= 64 else None
    return found and with_inputs_for_all(found, inputs)


def with_inputs_for_all(found: Tiling, inputs: int) -> Tiling:
    """With no more blocks than share the inputs in whole stages.

    Args:
        found: what would share them.
        inputs: a multiple of :data:`STAGE`.
    """
    splits = found.splits
    while splits > inputs // STAGE:
        splits //= 2
    return found._replace(splits=splits)


def _wide(many: bool, columns: int, short: bool, decoder: str) -> Tiling | None:
    if columns <= 32:
        if not many:
            return Tiling(32, 4, 4, 4, wide=True, unit=128)
        return Tiling(32, 4, 2, 4, wide=True, unit=128) if short else Tiling(32, 16, 2, 1, wide=True)
    if columns <= 64:
        if not many:
            shared = not short or decoder == "Mxfp4"
            return Tiling(64, 4, 4 if shared else 2, 4 if shared else 2, wide=True, unit=128)
        return Tiling(64, 4, 2, 4, wide=True, unit=128) if short else Tiling(64, 16, 2, 1, wide=True)
    if not many:
        return Tiling(128, 4, 2, 1, wide=True) if columns <= 128 else None
    return Tiling(128 if columns <= 128 else 256, 8, 1, 1, wide=True)
