"""Products of the inputs of layers, XᵀX: what error feedback along the inputs needs.

A safetensors file with two tensors of each layer, named by the module's path::

    PATH           F32 [in, in], or of stacked experts [E, in, in]     sum of xᵀx over tokens
    PATH.counts    I64 [1], or [E]                                     how many tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from uqff.container.closing import Closing
from uqff.container.mapped import MappedFile
from uqff.container.shards import PathLike
from uqff.container.tensors import TensorWriter
from uqff.errors import FormatError, ShapeError, located

__all__ = ["HessianWriter", "Hessians"]

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
        self._file = MappedFile(Path(path))
        self._names: list[str] = []
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
            *stack, rows, columns = (0, 0, *entry.shape)[-3:] if len(entry.shape) == 3 else (0, *entry.shape)[-3:]
            fits = entry.dtype == "F32" and len(entry.shape) in (2, 3) and rows == columns
            if not fits or counts is None or counts.dtype != "I64" or counts.shape != (stack[0] or 1,):
                raise FormatError(
                    "not XᵀX of a layer", layer=name, expected="F32 [in, in] or [E, in, in] with I64 counts"
                )
            self._names.append(name)

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

    def counts(self, module: str) -> npt.NDArray[np.int64]:
        """How many tokens went into a layer, int64 ``[1]`` or ``[E]``."""
        return np.frombuffer(self._file.slice(self._file.header.entries[f"{module}{COUNTS}"]), "<i8")

    def of(self, module: str, shape: Sequence[int]) -> npt.NDArray[np.float32] | None:
        """XᵀX of a module; None if there is none.

        Args:
            module: its path.
            shape: of its weight: ``(out, in)`` or ``(experts, out, in)``.

        Raises:
            ShapeError: it is of another shape.
        """
        if module not in self._names:
            return None
        expected = (*shape[:-2], shape[-1], shape[-1])
        found = self[module]
        if found.shape != expected:
            raise ShapeError("Hessian does not fit the weight", layer=module, expected=expected, got=found.shape)
        return found

    def close(self) -> None:
        """Release the file; arrays already taken out stay valid."""
        self._file.close()


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
