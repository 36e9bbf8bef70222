"""How a tensor that is no layer stands in a GGUF file where that is not how a checkpoint has it, both ways.

=================  =============================================  ==========================
form               in GGUF, of a tensor of a checkpoint           back
=================  =============================================  ==========================
:data:`AS_IS`      the same                                       the same
:data:`SQUEEZED`   without its middle dimension, which is 1       the same numbers
:class:`Plus`      a number more: norms of Gemma                  that number less, rounded
:data:`TURNS`      two tensors: its even columns, its odd ones    the same numbers
:class:`Shaped`    the same numbers in another shape              the same numbers
:class:`Rate`      -exp of it, perhaps as a column                log(-), rounded
:class:`Ordered`   another form, its rows in another order        in order
:data:`JOINED`     several tensors, one after the other           the same numbers
:data:`FRAMES`     a tensor for each frame: of a video, two       the same numbers
:data:`PIXELS`     of a patch, its pixels of one colour together  the same numbers
=================  =============================================  ==========================

Numbers are float32, which holds every float16 and bfloat16.  The logarithm of a rate is rounded to float32, and so is
the exponential of that, so that the latter may be another number in its last bits: whoever writes GGUF again looks for
the file's own (:mod:`uqff.conversion.kept`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.errors import FormatError
from uqff.families.rows import Order

__all__ = [
    "AS_IS",
    "COLUMN",
    "FRAMES",
    "JOINED",
    "PIXELS",
    "SQUEEZED",
    "TURNS",
    "Form",
    "Numbers",
    "Ordered",
    "Plus",
    "Rate",
    "Shaped",
]

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


@dataclass(frozen=True)
class Shaped(Form):
    """The same numbers in another shape.

    Attributes:
        shape_of: the shape in GGUF, of that in a checkpoint and the configuration.
    """

    shape_of: Callable[[Shape, Mapping[str, Any]], Shape]

    def shapes(self, shape: Shape, config: Mapping[str, Any]) -> tuple[Shape, ...]:
        """See :meth:`Form.shapes`."""
        return (self.shape_of(shape, config),)


@dataclass(frozen=True)
class Rate(Form):
    """What a state loses in a step, of whose negative a checkpoint has the logarithm, ``A_log``.

    Attributes:
        column: whether GGUF has it as a column.
    """

    column: bool = False

    def shapes(self, shape: Shape, config: Mapping[str, Any]) -> tuple[Shape, ...]:
        """See :meth:`Form.shapes`."""
        return ((*shape, 1) if self.column else shape,)

    def to_model(self, stored: Sequence[Numbers], shape: Shape, config: Mapping[str, Any]) -> Numbers:
        """See :meth:`Form.to_model`.

        Raises:
            FormatError: a number is no rate.
        """
        rates = stored[0].reshape(shape)
        wrong = ~(np.isfinite(rates) & (rates < 0))
        if wrong.any():
            raise FormatError("not a rate", expected="below 0", got=float(rates[wrong].reshape(-1)[0]))
        made: Numbers = np.log(-rates.astype(np.float64)).astype(np.float32)
        return made

    def to_file(self, numbers: Numbers, shapes: Sequence[Shape], config: Mapping[str, Any]) -> tuple[Numbers, ...]:
        """See :meth:`Form.to_file`."""
        with np.errstate(over="ignore"):
            made: Numbers = -np.exp(numbers.astype(np.float64)).astype(np.float32)
        return (made.reshape(shapes[0]),)


@dataclass(frozen=True)
class Ordered(Form):
    """A tensor whose rows are in another order in GGUF.

    Attributes:
        order_of: where each row of the model is there, of the configuration.
        form: how it stands there otherwise.
    """

    order_of: Callable[[Mapping[str, Any]], Order]
    form: Form = field(default_factory=Form)

    def shapes(self, shape: Shape, config: Mapping[str, Any]) -> tuple[Shape, ...]:
        """See :meth:`Form.shapes`."""
        return self.form.shapes(shape, config)

    def to_model(self, stored: Sequence[Numbers], shape: Shape, config: Mapping[str, Any]) -> Numbers:
        """See :meth:`Form.to_model`."""
        made: Numbers = self.form.to_model(stored, shape, config)[self.order_of(config)]
        return made

    def to_file(self, numbers: Numbers, shapes: Sequence[Shape], config: Mapping[str, Any]) -> tuple[Numbers, ...]:
        """See :meth:`Form.to_file`."""
        return self.form.to_file(numbers[np.argsort(self.order_of(config))], shapes, config)


@dataclass(frozen=True)
class _Joined(Form):
    """Tensors of as many numbers, one after the other.

    Attributes:
        count: of them.
    """

    count: int

    def shapes(self, shape: Shape, config: Mapping[str, Any]) -> tuple[Shape, ...]:
        return ((shape[0] // self.count, *shape[1:]),) * self.count

    def to_model(self, stored: Sequence[Numbers], shape: Shape, config: Mapping[str, Any]) -> Numbers:
        return np.concatenate([each.reshape(-1) for each in stored]).reshape(shape)

    def to_file(self, numbers: Numbers, shapes: Sequence[Shape], config: Mapping[str, Any]) -> tuple[Numbers, ...]:
        return tuple(np.split(numbers, self.count))


class _Frames(Form):
    def shapes(self, shape: Shape, config: Mapping[str, Any]) -> tuple[Shape, ...]:
        return ((*shape[:2], *shape[3:]),) * shape[2]

    def to_model(self, stored: Sequence[Numbers], shape: Shape, config: Mapping[str, Any]) -> Numbers:
        frame = (*shape[:2], *shape[3:])
        return np.stack([each.reshape(frame) for each in stored], 2)

    def to_file(self, numbers: Numbers, shapes: Sequence[Shape], config: Mapping[str, Any]) -> tuple[Numbers, ...]:
        return tuple(numbers[:, :, frame] for frame in range(len(shapes)))


class _Pixels(Form):
    def shapes(self, shape: Shape, config: Mapping[str, Any]) -> tuple[Shape, ...]:
        return ((shape[0], config["colours"], config["patch"], config["patch"]),)

    def to_model(self, stored: Sequence[Numbers], shape: Shape, config: Mapping[str, Any]) -> Numbers:
        (there,) = self.shapes(shape, config)
        made: Numbers = stored[0].reshape(there).transpose(0, 2, 3, 1).reshape(shape)
        return made

    def to_file(self, numbers: Numbers, shapes: Sequence[Shape], config: Mapping[str, Any]) -> tuple[Numbers, ...]:
        rows, colours, height, width = shapes[0]
        return (numbers.reshape(rows, height, width, colours).transpose(0, 3, 1, 2),)


AS_IS: Final = Form()
JOINED: Final[Form] = _Joined(3)
FRAMES: Final[Form] = _Frames()
PIXELS: Final[Form] = _Pixels()
COLUMN: Final[Form] = Shaped(lambda shape, config: (*shape, 1))
SQUEEZED: Final[Form] = _Squeezed()
TURNS: Final[Form] = _InTurns()
