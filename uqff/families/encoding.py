"""What a family knows of its types before there is a weight: their names, which shapes they fit, how they are made.

A type is asked for by its ISQ name, the engine's name of in-situ quantisation.  Engines of several generations differ
in what they do with a shape that does not fit; a family knows it of its own types, :mod:`uqff.quantization.types` has
the table of all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.codes import DType, Version
from uqff.errors import ShapeError, UnsupportedError
from uqff.families import loaded as loading
from uqff.families.loaded import Loaded

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["AS_ENGINE", "EFFORTS", "ENGINES", "GROUP", "Effort", "EffortName", "Encoding", "Engine", "Resolution"]

Engine: TypeAlias = Literal["0.6", "0.8", "0.9"]

ENGINES: Final[tuple[Engine, ...]] = ("0.6", "0.8", "0.9")
"""The engine generations whose rules are known: mistral.rs 0.6.0, 0.8.0 and 0.9.x."""

GROUP: Final = 64
"""Weights per group, of types that have groups, unless another size is asked for; the engine knows no other."""


EffortName: TypeAlias = Literal["engine", "best", "calibrated"]

EFFORTS: Final[tuple[EffortName, ...]] = ("engine", "best", "calibrated")
"""How codes and scales are chosen: as the engine does; so that they are nearest to the weight; so that the answers
of the layer are nearest to its own."""


@dataclass(frozen=True, eq=False)
class Effort:
    """How codes and scales are chosen, in a format that is the same for all.

    Attributes:
        name: ``engine``: the engine's bytes; it uses importance for Q2K to Q6K and no other type. ``best``: a search
            for the least squared error, each weighted with the importance of its input; no block is worse than the
            engine's without importance. ``calibrated``: the same with error feedback along the inputs, see
            :mod:`uqff.families.feedback`; where there is no Hessian, as ``best``.
        importance: mean square of each input, float32 ``[experts, in]``, or ``[1, in]`` for all; None: all alike.
        hessian: XᵀX of the inputs, float32 ``[experts, in, in]``, or ``[1, in, in]`` for all.
    """

    name: EffortName = "engine"
    importance: npt.NDArray[np.float32] | None = None
    hessian: npt.NDArray[np.float32] | None = None


AS_ENGINE: Final = Effort()


class Resolution(NamedTuple):
    """The type a weight is stored as, and the reason if that is not the type asked for (else empty)."""

    kind: str
    reason: str = ""


class Encoding(ABC):
    """The types of a family."""

    KINDS: ClassVar[tuple[str, ...]] = ()
    """Its ISQ names, which engines write."""
    OTHER_KINDS: ClassVar[tuple[str, ...]] = ()
    """Further types that can be asked for, which engines only read."""
    RESULTS: ClassVar[tuple[str, ...]] = ()
    """Types that nobody asks for: what others fall back to, and what comes from elsewhere."""
    AUTOMATIC: ClassVar[Mapping[int, str]] = {}
    """What the engine takes on a CPU for a bare number of bits."""
    PROMOTED: ClassVar[Mapping[str, str]] = {}
    """What a head or an embedding gets in place of a type, since UQFF 1.2; others stay.

    Authority: mistral.rs v0.9.2, ``mistralrs-quant/src/lib.rs`` (``promote_for_sensitive_tensor``).
    """
    SINCE: ClassVar[Engine] = "0.6"
    """The first engine generation that has the types."""
    BY_EXPERT: ClassVar[bool] = False
    """Whether a stack is its experts one after the other; if groups or scales run across them, it is made as one."""

    @classmethod
    def has_kind(cls, kind: str) -> bool:
        """Whether a type is one of the family's."""
        return kind in (*cls.KINDS, *cls.OTHER_KINDS, *cls.RESULTS)

    @classmethod
    def group_size_of(cls, kind: str, group_size: int | None) -> int:
        """The group size of a type: the one asked for, checked, or :data:`GROUP`.

        Raises:
            UnsupportedError: the type has no groups, or none of that size.
        """
        if group_size is None:
            return GROUP
        raise no_group_size(f"none: {kind} has no group size", group_size)

    @classmethod
    def resolve(
        cls, kind: str, shape: tuple[int, ...], engine: Engine, group_size: int, version: Version | None = None
    ) -> Resolution:
        """The type that a weight gets if ``kind`` is asked for, which may be another if its shape does not fit.

        Args:
            kind: one of the family's.
            shape: ``(out, in)`` or ``(experts, out, in)``.
            engine: whose rules.
            group_size: of types that have groups.
            version: of the file, if that is known: releases of one generation may differ.

        Raises:
            ShapeError: the engine fails on that shape.
        """
        return Resolution(kind)

    @classmethod
    @abstractmethod
    def planned(cls, kind: str, shape: Sequence[int], dtype: DType, group_size: int = GROUP) -> Self:
        """The record that :meth:`encode` will make, without its bytes.

        Args:
            kind: one of the family's that fits the shape, as :meth:`resolve` returns it.
            shape: of the weight.
            dtype: the load dtype.
            group_size: of types that have groups.
        """

    @classmethod
    @abstractmethod
    def encode(
        cls, loaded: Loaded, kind: str, *, engine: Engine, group_size: int = GROUP, effort: Effort = AS_ENGINE
    ) -> Self:
        """A weight whose shape fits the type, quantised: by a kernel if there is one, else by the reference.

        Does not import torch.

        Args:
            loaded: the weight.
            kind: one of the family's, as :meth:`resolve` returns it.
            engine: whose bytes, where generations differ.
            group_size: of types that have groups.
            effort: how codes and scales are chosen.

        Raises:
            FormatError: a weight is not finite in its load dtype; its position is named.
        """

    @classmethod
    def widened(cls, weights: int) -> int:
        """How many of a weight's numbers are float32 at one time while :meth:`encode` works: a run, or all of them."""
        return min(weights, loading.TILE)


def wrong_shape(kind: str, expected: str, got: object) -> ShapeError:
    """The error of a shape that a type does not fit and the engine has no other for."""
    return ShapeError(f"the shape cannot be {kind}", field="shape", expected=expected, got=got)


def misaligned_row(kind: str, unit: int, shape: tuple[int, ...]) -> ShapeError:
    """:func:`wrong_shape` of rows that are not whole blocks or groups."""
    return wrong_shape(kind, f"a last dimension in multiples of {unit}", f"{shape[-1]} of {list(shape)}")


def no_group_size(expected: str, got: int) -> UnsupportedError:
    """The error of a group size that a type does not have."""
    return UnsupportedError("group size", field="group_size", expected=expected, got=got)
