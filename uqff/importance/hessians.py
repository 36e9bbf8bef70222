"""Products of the inputs of layers, XᵀX: what error feedback along the inputs needs.

A safetensors file with two tensors of each layer, named by the module's path::

    PATH           F32 [in, in], or of stacked experts [E, in, in]     sum of xᵀx over tokens
    PATH.counts    I64 [1], or [E]                                     how many tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from uqff.container.closing import Closing
from uqff.container.mapped import MappedFile
from uqff.container.shards import PathLike
from uqff.container.tensors import TensorWriter
from uqff.errors import FormatError, ShapeError, located
from uqff.importance.names import HEAD, entry_names, expert_of

__all__ = ["HessianWriter", "Hessians", "LayerHessian"]

FORMAT: Final = "uqff.hessian"
VERSION: Final = "1"
COUNTS: Final = ".counts"


class Hessians(Mapping[str, npt.NDArray[np.float32]], Closing):
    """The products in a file, by the path of a module; views of the mapped file."""

    def __init__(self, path: PathLike) -> None:
        """Open the file; only the header is read.

        Raises:
            FormatError: it is no such file, or breaks a rule.
            OSError: it cannot be read.
        """
        self.path = Path(path)
        self._file = MappedFile(self.path)
        self._names: list[str] = []
        self._entries: dict[str, str] = {}
        try:
            with located(file=path):
                self._check()
        except BaseException:
            self._file.close()
            raise

    def _check(self) -> None:
        header = self._file.header
        told = header.metadata or {}
        if (told.get("format"), told.get("version")) != (FORMAT, VERSION):
            raise FormatError("no file of Hessians", field="__metadata__.format", expected=FORMAT)
        for name, entry in header.entries.items():
            if name.endswith(COUNTS):
                continue
            counts = header.entries.get(f"{name}{COUNTS}")
            shape = entry.shape
            fits = entry.dtype == "F32" and len(shape) in (2, 3) and shape[-1] == shape[-2]
            number = shape[0] or 1 if len(shape) == 3 else 1
            if not fits or counts is None or counts.dtype != "I64" or counts.shape != (number,):
                raise FormatError(
                    "not XᵀX of a layer", layer=name, expected="F32 [in, in] or [E, in, in] with I64 counts"
                )
            self._names.append(name)
            for each in entry_names(name) or (name,):
                self._entries.setdefault(each, name)

    def __getitem__(self, module: str) -> npt.NDArray[np.float32]:
        if module not in self._names:
            raise KeyError(module)
        entry = self._file.header.entries[module]
        array: npt.NDArray[np.float32] = np.frombuffer(self._file.slice(entry), "<f4").reshape(entry.shape)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def stamp(self) -> list[str | int]:
        """What tells the file from others: its path, size and time."""
        stat = self.path.stat()
        return [str(self.path.resolve()), stat.st_size, stat.st_mtime_ns]

    def counts(self, module: str) -> npt.NDArray[np.int64]:
        """How many tokens went into a layer, int64 ``[1]`` or ``[E]``."""
        return np.frombuffer(self._file.slice(self._file.header.entries[f"{module}{COUNTS}"]), "<i8")

    def layer(self, module: str, shape: Sequence[int], *, tied: bool = False) -> LayerHessian | None:
        """XᵀX of a module's inputs, which is not read yet; None if there is none.

        Args:
            module: its path, or that of one expert of a stack.
            shape: of its weight: ``(out, in)`` or ``(experts, out, in)``.
            tied: whether the embedding serves as head, whose inputs then count.

        Raises:
            ShapeError: it is of another shape.
        """
        if tied and module.endswith("embed_tokens") and module not in self:
            module = f"{module.rpartition('model.')[0]}{HEAD}"
        named = (self._entries[each] for each in entry_names(module) or (module,) if each in self._entries)
        name = module if module in self else next(named, None)
        if name is None:
            return None
        found = self._file.header.entries[name].shape
        expert = expert_of(module) if len(found) == 3 and len(shape) == 2 else None
        expected = (*shape[:-2], shape[-1], shape[-1]) if expert is None else (found[0], shape[-1], shape[-1])
        if tuple(found) != expected or (expert is not None and expert >= found[0]):
            raise ShapeError("Hessian does not fit the weight", layer=module, expected=[*expected], got=[*found])
        return LayerHessian(self, name, expert)

    def close(self) -> None:
        """Release the file; arrays already taken out stay valid."""
        self._file.close()


class LayerHessian(NamedTuple):
    """Where XᵀX of a layer is.

    Attributes:
        file: that has it.
        name: in the file.
        expert: which of a stack, if it is of one.
    """

    file: Hessians
    name: str
    expert: int | None = None

    def read(self, expert: int | None = None) -> npt.NDArray[np.float32]:
        """XᵀX, float32 ``[n, in, in]``: of one matrix, of all experts, or of one.

        Of experts that got no token it is the sum of those that did.

        Raises:
            FormatError: a number is not finite, or a sum of squares negative.
        """
        found, counts = self.file[self.name], self.file.counts(self.name)
        if not np.isfinite(found).all() or (np.diagonal(found, axis1=-2, axis2=-1) < 0).any():
            path, expected = str(self.file.path), "finite numbers, on the diagonal none below 0"
            raise FormatError("not XᵀX of any inputs", file=path, layer=self.name, field="hessian", expected=expected)
        if found.ndim == 2:
            return found[None]
        expert = self.expert if expert is None else expert
        dead = counts == 0
        if dead.any() and not dead.all() and (expert is None or dead[expert]):
            rest: npt.NDArray[np.float32] = found.sum(0, dtype=np.float32)
            return rest[None] if expert is not None else np.where(dead[:, None, None], rest, found)
        return found if expert is None else found[expert : expert + 1]


class HessianWriter:
    """Writes such a file, layer after layer in any order."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Create it.

        Args:
            path: under which it is made.
            shapes: of each layer: ``(in, in)``, or ``(E, in, in)``.
        """
        tensors = []
        for module, shape in shapes.items():
            tensors.append((module, "F32", shape))
            tensors.append((f"{module}{COUNTS}", "I64", (shape[0] if len(shape) == 3 else 1,)))
        self._file = TensorWriter(path, tensors, {"format": FORMAT, "version": VERSION})

    def add(self, module: str, products: npt.NDArray[np.float32], counts: npt.NDArray[np.int64]) -> None:
        """Write what was found of a layer."""
        self._file.write(module, [np.ascontiguousarray(products, "<f4").data])
        self._file.write(f"{module}{COUNTS}", [np.ascontiguousarray(counts, "<i8").data])

    def finish(self) -> None:
        """All layers are written."""
        self._file.finish()

    def close(self) -> None:
        """Close the file as it is."""
        self._file.close()
