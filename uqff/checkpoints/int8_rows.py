"""Integers of 8 bits with the largest magnitude of each row: LLM.int8 of bitsandbytes. UQFF has no form for it.

::

    weight   I8   [..., out, in]
    scales   F32  [..., out, 1]

Dequantise, in this order, in float32: ``weight * scale * (1/127)``.

Authority: bitsandbytes 0.50, ``_ops.py`` (``int8_vectorwise_dequant``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from uqff.checkpoints.companions import float32_of
from uqff.checkpoints.foreign import ForeignTensor
from uqff.families.slicing import join_parts
from uqff.families.stacking import stack_parts, unstack_parts

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

__all__ = ["Int8Rows"]

RECIPROCAL = np.float32(7.874015718698502e-3)


@dataclass(frozen=True, eq=False, repr=False)
class Int8Rows(ForeignTensor):
    """Signed bytes with a scale for each row.

    Attributes:
        weight: the bytes, as uint8 ``[..., out, in]``.
        scales: float32 ``[..., out, 1]``.
    """

    weight: torch.Tensor
    scales: torch.Tensor

    TITLE: ClassVar[str] = "int8 of bitsandbytes"

    @property
    def kind(self) -> str:
        """Always ``int8-rows``."""
        return "int8-rows"

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)`` or ``(experts, out, in)``."""
        return self.parts["weight"].shape

    def values(self) -> npt.NDArray[np.float32]:
        """See :meth:`ForeignTensor.values`."""
        made = self.parts["weight"].array().view(np.int8).reshape(self.shape).astype(np.float32)
        made *= float32_of(self.parts["scales"])
        made *= RECIPROCAL
        return made

    def values_there(self) -> torch.Tensor:
        """See :meth:`ForeignTensor.values_there`."""
        import torch

        made = self.parts["weight"].tensor().view(torch.int8).view(self.shape).float()
        return made.mul_(self.parts["scales"].tensor().float()).mul_(float(RECIPROCAL))

    def alignment(self, dim: int) -> int:
        """1 along every dimension."""
        self._dim(dim)
        return 1

    def _along(self, dim: int) -> tuple[str, ...]:
        return ("weight",) if dim == len(self.shape) - 1 else ("weight", "scales")

    def _narrow(self, dim: int, start: int, length: int) -> Self:
        return self.replaced(**{name: self.parts[name].narrow(dim, start, length) for name in self._along(dim)})

    def _join(self, slices: list[tuple[int, Self]], dim: int) -> Self:
        return join_parts(slices, dim, *self._along(dim))

    @classmethod
    def _stack(cls, records: list[Self]) -> Self:
        return stack_parts(records, "weight", "scales")

    def _unstack(self) -> Self:
        return unstack_parts(self, "weight", "scales")
