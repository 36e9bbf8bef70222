"""Experts that make no single weight, side by side as one ``[experts, out, in]``: the records of each, as they are.

::

    <part>_<expert>    every part of every expert's record, of its own dtype and shape

Of use where records of one shape do not stack exactly: each has a scale, groups of columns or a table of its own, or
some are of another family.  Dequantise: each by itself.  UQFF has no form for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import numpy.typing as npt

from uqff.checkpoints.foreign import ForeignTensor
from uqff.errors import ShardError
from uqff.families.base import QuantizedTensor
from uqff.families.part import Part

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

__all__ = ["SeparateExperts"]

Form = tuple[type[QuantizedTensor], tuple[str, ...], tuple[tuple[str, Any], ...]]
"""An expert's class, the names of its parts, and its other fields with their values."""


class SeparateExperts(ForeignTensor):
    """Records of one shape, one an expert.

    Attributes:
        forms: of each expert all but its parts, which are fields of their own.
    """

    forms: tuple[Form, ...]

    TITLE: ClassVar[str] = "experts that do not stack exactly"

    def __init__(self, forms: Sequence[Form], **parts: Part) -> None:
        """Fields, as :attr:`Record.parts` and :meth:`Record.replaced` have them; see :meth:`of`."""
        self.__dict__.update(forms=tuple(forms), **parts)

    @classmethod
    def of(cls, experts: Sequence[QuantizedTensor]) -> Self:
        """The weight of some experts; shares their memory.

        Raises:
            ShardError: there are none, they are of different shapes, or not matrices.
        """
        shapes = {each.shape for each in experts}
        if len(shapes) != 1 or any(len(shape) != 2 for shape in shapes):
            expected, got = "matrices of one shape", ", ".join(map(str, sorted(map(list, shapes)))) or "none"
            raise ShardError("weights do not stack", expected=expected, got=got)
        parts = {f"{name}_{at}": part for at, each in enumerate(experts) for name, part in each.parts.items()}
        return cls([_form(each) for each in experts], **parts)

    @property
    def experts(self) -> list[QuantizedTensor]:
        """The records of all experts."""
        return [self._expert(at) for at in range(len(self.forms))]

    def _expert(self, at: int) -> QuantizedTensor:
        cls, names, rest = self.forms[at]
        return cls.made_of(**{name: self.__dict__[f"{name}_{at}"] for name in names}, **dict(rest))

    @property
    def kind(self) -> str:
        """Always ``separate-experts``."""
        return "separate-experts"

    @property
    def shape(self) -> tuple[int, ...]:
        """``(experts, out, in)``."""
        return (len(self.forms), *self._expert(0).shape)

    def values(self) -> npt.NDArray[np.float32]:
        """See :meth:`ForeignTensor.values`."""
        made = np.empty(self.shape, np.float32)
        for each, into in zip(self.experts, made, strict=True):
            each.write_numbers(into.reshape(-1).view(np.uint8))
        return made

    def values_there(self) -> torch.Tensor:
        """See :meth:`ForeignTensor.values_there`."""
        import torch

        return torch.stack([each.dequantize() for each in self.experts])

    def tiles(self) -> Iterator[tuple[Callable[[Any], Any], Self]]:
        """See :meth:`QuantizedTensor.tiles`: an expert each."""
        for at in range(len(self.forms)):

            def taken(values: Any, at: int = at) -> Any:
                return values.reshape(self.shape)[at : at + 1]

            yield taken, self._narrow(0, at, 1)

    def alignment(self, dim: int) -> int:
        """1 along the experts; what suits all of them along others."""
        axis = self._dim(dim)
        unit = 1 if axis == 0 else math.lcm(*(each.alignment(axis - 1) for each in self.experts))
        return min(unit, self.shape[axis])

    def can_narrow(self, dim: int, start: int, length: int) -> bool:
        """See :meth:`QuantizedTensor.can_narrow`: whether all experts can."""
        return dim == 0 or all(each.can_narrow(dim - 1, start, length) for each in self.experts)

    def _narrow(self, dim: int, start: int, length: int) -> Self:
        if dim == 0:
            return self.of([self._expert(at) for at in range(start, start + length)])
        return self.of([each.narrow(dim - 1, start, length) for each in self.experts])

    def _join(self, slices: list[tuple[int, Self]], dim: int) -> Self:
        if dim == 0:
            return self.of([each for _, part in slices for each in part.experts])
        return self.of(
            [
                whole.join([(start, part._expert(at)) for start, part in slices], dim - 1)
                for at, whole in enumerate(self.experts)
            ]
        )

    @classmethod
    def _stack(cls, records: list[Self]) -> Self:
        raise ShardError("weights do not stack", expected="matrices", got=list(records[0].shape))

    def _unstack(self) -> Self:
        return cast("Self", self._expert(0))  # the record that it was


def _form(record: QuantizedTensor) -> Form:
    parts = record.parts
    return type(record), tuple(parts), tuple((name, value) for name, value in vars(record).items() if name not in parts)
