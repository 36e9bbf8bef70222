"""Codes of 4 bits that a table of 16 numbers turns into numbers, with a scale for each group: NF4, FP4, NVFP4.

::

    codes    U8   [..., out, in/2]       two a byte, the first in the low bits
    scales   F32  [..., out, in/size]
    table    F32  [16]

Dequantise: ``table[code] * scale`` in float32. UQFF has no form for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from uqff.checkpoints.companions import float32_of
from uqff.checkpoints.foreign import ForeignTensor
from uqff.families.slicing import join_parts, narrow_parts
from uqff.families.stacking import check_shared, stack_parts, unstack_parts

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

__all__ = ["TableCodes"]


@dataclass(frozen=True, eq=False, repr=False)
class TableCodes(ForeignTensor):
    """Codes of 4 bits, their numbers, and a scale for each group of inputs.

    Attributes:
        codes: uint8 ``[..., out, in/2]``.
        scales: float32 ``[..., out, in/size]``.
        table: float32 ``[16]``.
        size: inputs of a group, an even number.
        name: ``nf4``, ``fp4`` or ``nvfp4``.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    table: torch.Tensor
    size: int
    name: str

    TITLE: ClassVar[str] = "a table of 16 numbers"

    @property
    def kind(self) -> str:
        """Its name."""
        return self.name

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)`` or ``(experts, out, in)``."""
        *outer, row = self.parts["codes"].shape
        return (*outer, 2 * row)

    def values(self) -> npt.NDArray[np.float32]:
        """See :meth:`ForeignTensor.values`."""
        table, codes = float32_of(self.parts["table"]), self.parts["codes"].array()
        made = np.empty((len(codes), 2), np.float32)
        np.take(table, codes & np.uint8(15), out=made[:, 0])
        np.take(table, codes >> np.uint8(4), out=made[:, 1])
        groups = made.reshape(math.prod(self.parts["scales"].shape), self.size)
        groups *= float32_of(self.parts["scales"]).reshape(-1, 1)
        return made.reshape(self.shape)

    def values_there(self) -> torch.Tensor:
        """See :meth:`ForeignTensor.values_there`."""
        import torch

        table, codes = self.parts["table"].tensor(), self.parts["codes"].tensor()
        places = torch.stack((codes & 15, codes >> 4), -1).flatten().int()
        groups = table.index_select(0, places).view(-1, self.size)
        return groups.mul_(self.parts["scales"].tensor().reshape(-1, 1)).view(self.shape)

    def tiles(self) -> Iterator[tuple[Callable[[Any], Any], Self]]:
        """See :meth:`QuantizedTensor.tiles`: one piece."""
        yield (lambda values: values.reshape(self.shape)), self

    def alignment(self, dim: int) -> int:
        """A group along the inputs, 1 along others."""
        return self.size if self._dim(dim) == len(self.shape) - 1 else 1

    def _narrow(self, dim: int, start: int, length: int) -> Self:
        return narrow_parts(self, dim, start, length, self.size, codes=self.size // 2, scales=1)

    def _join(self, slices: list[tuple[int, Self]], dim: int) -> Self:
        return join_parts(slices, dim, "codes", "scales")

    STACKS_BY_VALUE: ClassVar[bool] = True

    @classmethod
    def check_stack(cls, records: Sequence[Self]) -> None:
        """See :meth:`QuantizedTensor.check_stack`: there is one table."""
        check_shared(records, "table")

    @classmethod
    def _stack(cls, records: list[Self]) -> Self:
        return stack_parts(records, "codes", "scales")

    def _unstack(self) -> Self:
        return unstack_parts(self, "codes", "scales")
