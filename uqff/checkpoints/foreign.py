"""Records of weights that UQFF has no form for: :class:`ForeignTensor`.

They are records in every other respect: they dequantise, are cut, joined, stacked and moved, and are the weights of
parallel layers.  What can be written is another type, made of their numbers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, cast

import numpy as np
import numpy.typing as npt

from uqff.codes import DType
from uqff.errors import UnsupportedError
from uqff.families.base import QuantizedTensor
from uqff.families.encoding import AS_ENGINE, GROUP, Effort, Engine
from uqff.families.loaded import Loaded
from uqff.families.payload import PayloadProblem
from uqff.schema.bricks import Scope
from uqff.simd.floats import Floats

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

__all__ = ["ForeignTensor"]


class _NoForm:
    """A field of the class that says where a family stands in UQFF: whoever asks is told that this is none."""

    def __get__(self, record: ForeignTensor | None, owner: type[ForeignTensor]) -> NoReturn:
        raise owner.no_form(None if record is None else record.kind)


class ForeignTensor(QuantizedTensor):
    """A weight as somebody else's format stores it.

    Subclasses are frozen dataclasses as those of families are (``@dataclass(frozen=True, eq=False, repr=False)``); they
    have :attr:`TITLE`, ``kind``, ``shape``, :meth:`values`, ``alignment``, ``_narrow``, ``_join``, ``_stack`` and
    ``_unstack``.  Their fields are parts, numbers, texts, booleans, tuples of numbers, or :class:`~uqff.DType`: what
    :mod:`uqff.parallel.weight` can write down, by the name of the class, which
    :data:`uqff.checkpoints.methods.FOREIGN` lists.
    """

    TITLE: ClassVar[str]
    """What it is, in words, for errors: ``FP8 by blocks``."""

    LAYER_NAME: ClassVar[str] = "foreign"
    TAKES_DELTA: ClassVar[bool] = False

    family: ClassVar[Any] = cast("Any", _NoForm())
    LAYOUT: ClassVar[Any] = cast("Any", _NoForm())
    ENTRIES: ClassVar[Any] = cast("Any", _NoForm())
    BIAS: ClassVar[Any] = cast("Any", _NoForm())

    @classmethod
    def no_form(cls, kind: str | None = None) -> UnsupportedError:
        """The error of whoever wants to write such a weight."""
        return UnsupportedError(
            f"{cls.TITLE} has no form in UQFF",
            expected="a weight quantised to one of its types (--isq KIND, or --isq keep --fallback KIND)",
            got=kind or cls.__name__,
        )

    @abstractmethod
    def values(self) -> npt.NDArray[np.float32]:
        """The weight's numbers, new memory, C-contiguous, of :attr:`shape`: the method's own formula in float32.

        Without torch.  Parts on another device come as copies: ``part.array()``.
        """

    def write_numbers(self, out: npt.NDArray[np.uint8], dtype: DType = DType.F32) -> None:
        """See :meth:`QuantizedTensor.write_numbers`; never imports torch."""
        word = np.uint32 if dtype is DType.F32 else np.uint16
        made = Floats(out.view(word).reshape(self.shape), dtype)
        Floats(self.values().view(np.uint32), DType.F32).cast_into(made)

    def values_there(self) -> torch.Tensor | None:
        """The bits of :meth:`values` by torch operations on the device of the record; None if there is no such way."""
        return None

    def _dequantize(self) -> torch.Tensor:
        import torch

        there = None if self.place == "cpu" else self.values_there()
        return torch.from_numpy(self.values()).to(self.device) if there is None else there

    @property
    def has_whole_rows(self) -> bool:
        """Not known: of some, several rows share a scale."""
        return False

    @property
    def nominal_dtype(self) -> DType:
        """F32: that of its numbers."""
        return DType.F32

    @classmethod
    def planned(cls, kind: str, shape: Sequence[int], dtype: DType, group_size: int = GROUP) -> Self:
        """Nothing is quantised to such a type.

        Raises:
            UnsupportedError: always.
        """
        raise cls.no_form(kind)

    @classmethod
    def encode(
        cls, loaded: Loaded, kind: str, *, engine: Engine, group_size: int = GROUP, effort: Effort = AS_ENGINE
    ) -> Self:
        """Nothing is quantised to such a type.

        Raises:
            UnsupportedError: always.
        """
        raise cls.no_form(kind)

    @classmethod
    def parse(cls, blob: Scope) -> Self:
        """There is no such blob.

        Raises:
            UnsupportedError: always.
        """
        raise cls.no_form()

    def build(self) -> dict[str, Any]:
        """There is no such blob.

        Raises:
            UnsupportedError: always.
        """
        raise self.no_form(self.kind)

    @staticmethod
    def validate(blob: Scope) -> None:
        """Methods check what they make records of."""

    @staticmethod
    def check_payload(blob: Scope) -> Iterator[PayloadProblem]:
        """Methods check what they make records of."""
        yield from ()

    def resized(self, outputs: int) -> Self:
        """Not possible.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(f"{self.TITLE}: hidden layers are not put together anew", got=self.kind)
