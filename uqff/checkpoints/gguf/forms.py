"""How a tensor that is no layer stands in a GGUF file where that is not how a checkpoint has it, both ways.

=================  =============================================  ==========================
form               in GGUF, of a tensor of a checkpoint           back
=================  =============================================  ==========================
:data:`AS_IS`      the same                                       the same
:data:`SQUEEZED`   without its middle dimension, which is 1       the same numbers
:class:`Plus`      a number more: norms of Gemma                  that number less, rounded
:data:`TURNS`      two tensors: its even columns, its odd ones    the same numbers
=================  =============================================  ==========================

Numbers are float32, which holds every float16 and bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["AS_IS", "SQUEEZED", "TURNS", "Form", "Numbers", "Plus"]

Numbers: TypeAlias = npt.NDArray[np.float32]
Shape: TypeAlias = tuple[int, ...]


class Form:
    """The same in both; what others have otherwise, they override."""

    def shapes(self, shape: Shape, config: Mapping[str, Any]) -> tuple[Shape, ...]:
        """The shapes in GGUF of a tensor of some shape: of one tensor, or of several that it is made of."""
        return (shape,)

    def to_model(self, stored: Sequence[Numbers], shape: Shape, config: Mapping[str, Any]) -> Numbers:
        """What a checkpoint has of what GGUF has, float32 of ``shape``."""
        return stored[0].reshape(shape)

    def to_file(self, numbers: Numbers, shapes: Sequence[Shape], config: Mapping[str, Any]) -> tuple[Numbers, ...]:
        """What GGUF has of what a checkpoint has, float32 of :meth:`shapes`."""
        return (numbers.reshape(shapes[0]),)


class _Squeezed(Form):
    def shapes(self, shape: Shape, config: Mapping[str, Any]) -> tuple[Shape, ...]:
        return ((shape[0], *shape[2:]),)


@dataclass(frozen=True)
class Plus(Form):
    """A number is added in GGUF; taken off again, a sum below 1/2 is rounded to float32.

    Attributes:
        number: what is added.
    """

    number: float

    def to_model(self, stored: Sequence[Numbers], shape: Shape, config: Mapping[str, Any]) -> Numbers:
        """See :meth:`Form.to_model`."""
        made: Numbers = stored[0].reshape(shape) - np.float32(self.number)
        return made

    def to_file(self, numbers: Numbers, shapes: Sequence[Shape], config: Mapping[str, Any]) -> tuple[Numbers, ...]:
        """See :meth:`Form.to_file`."""
        return (numbers.reshape(shapes[0]) + np.float32(self.number),)


class _InTurns(Form):
    def shapes(self, shape: Shape, config: Mapping[str, Any]) -> tuple[Shape, ...]:
        return ((*shape[:-1], shape[-1] // 2),) * 2

    def to_model(self, stored: Sequence[Numbers], shape: Shape, config: Mapping[str, Any]) -> Numbers:
        return np.stack(stored, -1).reshape(shape)

    def to_file(self, numbers: Numbers, shapes: Sequence[Shape], config: Mapping[str, Any]) -> tuple[Numbers, ...]:
        return numbers[..., 0::2], numbers[..., 1::2]


AS_IS: Final = Form()
SQUEEZED: Final[Form] = _Squeezed()
TURNS: Final[Form] = _InTurns()
