"""The arithmetic of LoRA: a weight plus the product of two thin matrices, to the last bit.

::

    W' = W + (B · A) · scale        W [out, in]    B [out, r]    A [r, in]

All is float32.  An element of the product is ``b0·a0``, to which ``b1·a1``, ``b2·a2``, ... are added in the order of
the ranks; each product and each sum is rounded, none is fused.  The result is multiplied by the scale, rounded to
float32, then added to the weight.  So a slice of rows or columns has the bits of that slice of the whole, on every CPU.

``peft`` does the same in float32 but leaves the order of the sums to BLAS: what it gives is equal where the sums are
exact, and of rank 1; else either is off the exact product by at most ``r · 2**-24 / (1 - r · 2**-24)`` times
``|B| · |A|``, before it is scaled and added.

Authority: peft 0.21, ``tuners/lora/layer.py`` (``Linear.get_delta_weight``, ``Linear.merge``).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff import simd
from uqff.codes import DType
from uqff.errors import FormatError, ShapeError
from uqff.simd.floats import Floats

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["LowRank", "merged"]

F32: TypeAlias = npt.NDArray[np.float32]

TILE: Final = 1 << 20
"""Elements that the reference adds up together."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """A delta as two factors and a scale.

    Attributes:
        b: F32, F16 or BF16 ``[out, r]``, of any strides.
        a: likewise ``[r, in]``.
        scale: what their product is multiplied by; rounded to float32 for that.
        origin: adapter and tensors that it is of, for errors.
    """

    b: Floats
    a: Floats
    scale: float
    origin: str = ""

    @property
    def rank(self) -> int:
        """Of the delta, at most."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the delta: ``(out, in)``."""
        return self.b.shape[0], self.a.shape[1]

    @cached_property
    def factors(self) -> tuple[F32, F32]:
        """B and A in float32, C-contiguous, which is exact."""
        b, a = (each.cast(DType.F32).bits.view(np.float32) for each in (self.b, self.a))
        return b, a

    def narrow(self, dim: int, start: int, length: int) -> LowRank:
        """The factors of a slice of the delta: rows of B, or columns of A.

        Args:
            dim: 0 for outputs, 1 for inputs.
            start: first of the slice.
            length: of the slice.
        """
        part = slice(start, start + length)
        if dim == 0:
            return LowRank(self.b[part], self.a, self.scale, self.origin)
        return LowRank(self.b, self.a[:, part], self.scale, self.origin)

    @property
    def T(self) -> LowRank:
        """The factors of the transposed delta; of more than one rank, its bits are the same."""
        return LowRank(self.a.T, self.b.T, self.scale, self.origin)

    def check(self, shape: tuple[int, ...], *, layer: str | None = None) -> None:
        """Make sure that the delta is for a weight of a shape.

        Raises:
            ShapeError: it is not, or B and A do not fit each other.
        """
        if self.shape != shape or self.b.shape[1] != self.rank:
            got = f"{list(self.b.shape)} by {list(self.a.shape)}"
            raise ShapeError(
                "delta does not fit the weight", layer=layer, field=self.origin or None, expected=list(shape), got=got
            )

    def delta(self) -> F32:
        """``(B · A) · scale``, float32 ``[out, in]``."""
        made = np.zeros(self.shape, np.float32)
        self.add_to(made)
        return made

    def add_to(self, weight: F32) -> None:
        """Add the delta to a float32 weight ``[out, in]``, C-contiguous."""
        b, a = self.factors
        with np.errstate(over="ignore"):  # what is not finite is found in the sum
            scale = np.float32(self.scale)
        if simd.enabled():
            from uqff.lora.low_rank_cpu import add

            add(weight, b, a, scale)
        else:
            add_reference(weight, b, a, scale)


def add_reference(weight: F32, b: F32, a: F32, scale: np.float32) -> None:
    """The definition, in numpy: ``weight += (b · a) · scale``."""
    step = max(1, TILE // max(1, weight.shape[1]))
    with np.errstate(all="ignore"):
        for at in range(0, len(weight), step):
            rows = b[at : at + step]
            part = rows[:, :1] * a[0]
            for rank in range(1, len(a)):
                part += rows[:, rank : rank + 1] * a[rank]
            part *= scale
            weight[at : at + step] += part


def merged(weight: Floats, deltas: Iterable[LowRank], *, layer: str | None = None) -> Floats:
    """A weight with deltas added in their order, in float32; the weight is not modified.

    Args:
        weight: F32, F16 or BF16 ``[out, in]``, of any strides.
        deltas: of its shape.
        layer: the weight's path, for errors.

    Returns:
        F32, C-contiguous; the weight itself if there are no deltas.

    Raises:
        ShapeError: a delta has another shape.
        FormatError: the sum is not finite.

    >>> with uqff.open_checkpoint("checkpoint") as checkpoint, uqff.lora.open_adapter("adapter") as adapter:
    ...     path = "model.layers.0.mlp.up_proj"
    ...     weight = checkpoint.tensors.floats(f"{path}.weight")
    ...     uqff.lora.merged(weight, [adapter[path]]).shape
    (256, 256)
    """
    deltas = list(deltas)
    if not deltas:
        return weight
    made = np.empty(weight.shape, np.float32)
    weight.cast(DType.F32).cast_into(Floats(made.view(np.uint32), DType.F32))
    for delta in deltas:
        delta.check(weight.shape, layer=layer)
        delta.add_to(made)
    total = Floats(made.view(np.uint32), DType.F32)
    if not total.is_finite:
        at = np.unravel_index(total.first_not_finite(), weight.shape)
        got = f"{made[at]} at {tuple(map(int, at))}"
        origin = ", ".join(each.origin for each in deltas if each.origin)
        raise FormatError(
            "weight with its adapters is not finite", layer=layer, field=origin or None, expected="finite", got=got
        )
    return total
