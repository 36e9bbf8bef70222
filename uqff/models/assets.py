"""What lies beside the layers in a model directory: the residual, and files that are copied.

::

    <type>-N.uqff           the layers (:mod:`uqff.container.writer`)
    residual.safetensors    every other tensor, in the load dtype
    uqff_report.json        1.x only (:mod:`uqff.container.report`)
    config.json, ...        copied

Authority: mistral.rs v0.6.0 and v0.9.2, ``mistralrs-core/src/pipeline/isq.rs`` (``write_uqff``,
``write_uqff_metadata``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from uqff.codes import LOADED_DTYPES, DType
from uqff.container.atomic import copy_durably
from uqff.container.beside import COMPANIONS, CONFIG_NAME
from uqff.container.document import write_json
from uqff.container.file import RESIDUAL_NAME
from uqff.container.queue import WriteQueue
from uqff.container.shards import check_inside
from uqff.container.tensors import TensorWriter
from uqff.errors import FormatError
from uqff.models.config import text_of
from uqff.simd.floats import Floats

__all__ = [
    "COMPANIONS",
    "CONFIG_NAME",
    "Residual",
    "TensorSource",
    "companions_of",
    "copy_companions",
]

TILE: Final = 1 << 23
"""Bytes of the residual that are rounded and written together."""


class TensorSource(Protocol):
    """Tensors by name, such as a checkpoint's, whose headers are known before they are read."""

    def raw(self, name: str) -> memoryview:
        """The bytes of a tensor."""

    def dtype(self, name: str) -> str:
        """Dtype as safetensors spells it."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape, without making the tensor."""

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor."""

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Give back the memory of a tensor's bytes."""


class Residual:
    """The tensors that are no layers, as a loader sees them: floats in the load dtype, anything else as it is.

    Tables that a loader does not load but looks up in the file stay as they are, too.

    Attributes:
        names: of the tensors.
    """

    def __init__(
        self, source: TensorSource, names: Iterable[str], dtype: DType, as_stored: Callable[[str], bool]
    ) -> None:
        """Nothing is read yet.

        Args:
            source: holds the tensors.
            names: which of them.
            dtype: the load dtype.
            as_stored: which stay as they are, by name: see :func:`uqff.models.architectures.is_table`.
        """
        self.names = list(names)
        self._source = source
        self._dtype = dtype
        self._as_stored = as_stored

    @property
    def planned(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of each as they are stored."""
        return [(name, self._stored(name), self._source.shape(name)) for name in self.names]

    @property
    def nbytes(self) -> int:
        """Bytes of all payloads."""
        total = 0
        for name in self.names:
            size, loaded = self._source.nbytes(name), self._loaded(name)
            total += size if loaded is None else size // loaded.itemsize * self._dtype.itemsize
        return total

    def write(
        self, queue: WriteQueue, directory: Path, metadata: Mapping[str, str] | None = None, *, begun: bool = False
    ) -> TensorWriter:
        """Create ``residual.safetensors`` and let the queue fill it; the caller finishes it after the queue.

        Args:
            queue: does it.
            directory: where.
            metadata: texts that stand in the file.
            begun: whether an interrupted run has filled it.
        """
        file = queue.own(TensorWriter(directory / RESIDUAL_NAME, self.planned, metadata, begun=begun))
        for name in self.names:
            if begun:
                file.skip(name)
            else:
                queue.submit(partial(self._write, file, name), 0)
        return file

    def _loaded(self, name: str) -> DType | None:
        """What a tensor has been stored in, if it is to be in the load dtype."""
        return None if self._as_stored(name) else LOADED_DTYPES.get(self._source.dtype(name))

    def _stored(self, name: str) -> str:
        return self._source.dtype(name) if self._loaded(name) is None else self._dtype.safetensors

    def _write(self, file: TensorWriter, name: str) -> None:
        file.write(name, self._chunks(name))

    def _chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor in its stored dtype, a tile at a time."""
        data, stored = self._source.raw(name), self._loaded(name) or self._dtype
        for start in range(0, len(data), TILE):
            tile = data[start : start + TILE]
            if stored is self._dtype:
                yield tile
            else:
                floats = Floats.of_bytes(tile, stored, (len(tile) // stored.itemsize,))
                yield floats.cast(self._dtype).data
            self._source.release(name, start, start + len(tile))


def companions_of(source: Path, *, leave: Iterable[str] = ()) -> list[str]:
    """The files beside a model that are copied; asked for before any work, because what is refused here stays so.

    Args:
        source: the directory that may hold them.
        leave: names that are not copied.

    Raises:
        FormatError: one is a link out of the directory, whose target would be published; a pipe or a device.
    """
    names = [name for name in COMPANIONS if name not in leave and (source / name).exists()]
    names = [name for name in names if not (source / name).is_dir()]
    for name in names:
        path = source / name
        if not path.is_file():
            raise FormatError("not a regular file", file=str(path))
        check_inside(path)
    return names


def copy_companions(
    source: Path, directory: Path, *, leave: Iterable[str] = (), config: Mapping[str, Any] | None = None
) -> list[str]:
    """Copy the files that stand beside a model.

    Args:
        source: the directory that may hold them.
        directory: where; none of them may be there.
        leave: names that are not copied.
        config: what ``config.json`` is to say; None for what it says.

    Returns:
        The names of those that were there.

    Raises:
        FormatError: see :func:`companions_of`.
        OSError: a file cannot be read or written.
    """
    names = companions_of(source, leave=leave)
    for name in names:
        if name == CONFIG_NAME and config is not None:
            write_json(directory / name, config, text=text_of(source / name, config))
        else:
            copy_durably(source / name, directory / name)
    return names
