"""How ``wide.cu`` makes products with HQQ weights: a rule as measured on an H200."""

from __future__ import annotations

from uqff.gpu.tiling import MANY_OUTPUTS, SOME_OUTPUTS, WARPGROUPS, Tiling, with_inputs_for_all

__all__ = ["chosen"]


def chosen(capability: tuple[int, int], outputs: int, inputs: int, columns: int, bits: int) -> Tiling | None:
    """How ``wide.cu`` makes a product with an HQQ weight along axis 0; as :func:`uqff.gpu.tiling.chosen`.

    Args:
        capability: see there.
        outputs: likewise.
        inputs: likewise.
        columns: likewise; more than HQQ's own kernels take.
        bits: of a code.

    Returns:
        None: by dequantising first.
    """
    if capability != WARPGROUPS or outputs < SOME_OUTPUTS or columns > 256:
        return None
    found = _of(outputs >= MANY_OUTPUTS, columns, bits)
    return found and with_inputs_for_all(found, inputs)


def _of(many: bool, columns: int, bits: int) -> Tiling | None:
    if not many:
        if columns <= 32:
            return Tiling(32, 4, 2, 4, wide=True) if bits == 3 else Tiling(32, 4, 4, 3 if bits == 8 else 4, wide=True)
        return Tiling(64, 4, 4, 3 if bits == 8 else 4, wide=True) if columns <= 64 and bits != 3 else None
    if columns <= 32:
        return Tiling(32, 8, 2, 2, wide=True)
    if columns <= 64:
        return Tiling(64, 8, 2, 2, wide=True) if bits == 3 else Tiling(64, 16, 2, 1, wide=True)
    if columns <= 128:
        return Tiling(128, 8, 1, 1, wide=True, beside=4)
    return None if bits == 3 else Tiling(256, 8, 1, 1, wide=True, beside=4)
