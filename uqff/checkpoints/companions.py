"""The tensors that together are one weight: its codes, its scales and what else a method of quantising stores of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from uqff.checkpoints.safetensors import TensorFiles
from uqff.codes import DType
from uqff.errors import FormatError, MissingError, ShapeError
from uqff.families.part import Part
from uqff.families.payload import not_finite
from uqff.simd.floats import Floats

__all__ = ["FLOATS", "Companions", "OfExpert", "float32_of"]

FLOATS: Final = ("F32", "F16", "BF16")
"""The dtypes that scales have, as safetensors spells them."""

_AS_BYTES: Final = ("I8", "BOOL", "F8_E8M0", "F8_E5M2")
"""Dtypes of one byte that the format has no code for: a part holds them as U8."""


class Companions:
    """The tensors of one weight by their roles; nothing is read until a part is asked for.

    Attributes:
        tensors: the files.
        path: of the weight in the model.
        names: name of the tensor of each role; only those that are there.
    """

    def __init__(self, tensors: TensorFiles, path: str, names: Mapping[str, str]) -> None:
        self.tensors = tensors
        self.path = path
        self.names = dict(names)

    def __contains__(self, role: object) -> bool:
        return role in self.names

    def name(self, role: str) -> str:
        """The tensor of a role.

        Raises:
            MissingError: there is none.
        """
        if role not in self.names:
            file = self.tensors.file_of(next(iter(self.names.values())))
            raise MissingError(
                "a companion of the weight is missing",
                file=str(file),
                layer=self.path,
                field=role,
                expected=f"a tensor {role} beside {', '.join(self.names.values())}",
            )
        return self.names[role]

    def shape(self, role: str) -> tuple[int, ...]:
        """Shape of the tensor of a role."""
        return self.tensors.shape(self.name(role))

    def dtype(self, role: str) -> str:
        """Dtype of the tensor of a role, as safetensors spells it."""
        return self.tensors.dtype(self.name(role))

    def check(self, role: str, dtypes: Sequence[str] = (), shape: Sequence[int] | None = None) -> None:
        """Make sure of dtype and shape of a tensor, by the header alone.

        Args:
            role: which.
            dtypes: that are allowed, as safetensors spells them; any if empty.
            shape: that it must have; any if None.

        Raises:
            MissingError: there is no such tensor.
            FormatError: another dtype.
            ShapeError: another shape.
        """
        if dtypes and self.dtype(role) not in dtypes:
            raise self.problem("wrong dtype", role, " or ".join(dtypes), self.dtype(role))
        if shape is not None and self.shape(role) != tuple(shape):
            raise self.problem("wrong shape", role, list(shape), list(self.shape(role)), ShapeError)

    def part(self, role: str, dtypes: Sequence[str] = (), shape: Sequence[int] | None = None) -> Part:
        """The tensor of a role as a part, a view of the file; takes and raises what :meth:`check` does.

        Dtypes of one byte that UQFF has no code for (I8, F8_E8M0, ...) come as U8.
        """
        self.check(role, dtypes, shape)
        name = self.name(role)
        stored = self.dtype(role)
        dtype = DType.U8 if stored in _AS_BYTES else DType.of_safetensors(stored)
        if dtype is None:
            raise self.problem("dtype has no code in the format", role, None, stored)
        return Part(dtype, self.shape(role), self.tensors.raw(name))

    def planned(self, role: str, dtypes: Sequence[str] = (), shape: Sequence[int] | None = None) -> Part:
        """What :meth:`part` gives, without its bytes."""
        part = self.part(role, dtypes, shape)
        return Part.planned(part.shape, part.dtype)

    def finite(self, role: str, part: Part) -> Part:
        """Make sure that the numbers of a part, the whole tensor of a role or a slice of it, are finite.

        Raises:
            FormatError: naming the tensor, and the place in the part.
        """
        for found in not_finite(part.fields(), role):
            raise self.problem(found.problem, role, found.expected, found.got)
        return part

    def problem(
        self, problem: str, role: str, expected: object, got: object = None, error: type[Any] = FormatError
    ) -> Any:
        """An error of one of the tensors, which names file, weight and tensor.

        Args:
            problem: what is wrong.
            role: whose tensor.
            expected: what the rule asks for.
            got: what was found.
            error: the class.
        """
        name = self.name(role)
        file = str(self.tensors.file_of(name))
        return error(problem, file=file, layer=self.path, field=name, expected=expected, got=got)


class OfExpert(Companions):
    """The tensors of one expert out of those of a stack, whose first dimension is their number.

    Attributes:
        at: number of the expert.
        whole: of the stack.
    """

    def __init__(self, whole: Companions, at: int) -> None:
        super().__init__(whole.tensors, whole.path, whole.names)
        self.whole = whole
        self.at = at

    def shape(self, role: str) -> tuple[int, ...]:
        """Shape of the expert's tensor."""
        return super().shape(role)[1:]

    def part(self, role: str, dtypes: Sequence[str] = (), shape: Sequence[int] | None = None) -> Part:
        """See :meth:`Companions.part`.

        Raises:
            ShapeError: there is no such expert.
        """
        self.check(role, dtypes, shape)
        part = self.whole.part(role)
        if self.at >= part.shape[0]:
            raise self.problem("too few experts", role, f"at least {self.at + 1}", part.shape[0], ShapeError)
        return part.narrow(0, self.at, 1).view(part.shape[1:])


def float32_of(part: Part) -> npt.NDArray[np.float32]:
    """The numbers of a part of F32, F16 or BF16 as float32, which is exact; a view if they are that."""
    if not math.prod(part.shape):
        return np.empty(part.shape, np.float32)
    floats = Floats.of_bytes(part.array().data, part.dtype, part.shape)
    return floats.cast(DType.F32).bits.view(np.float32)
