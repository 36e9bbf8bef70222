"""The one writer of UQFF: layers into the files of a plan, in any order, of either generation.

``uqff.save``, the quantiser, migration and conversion all write through it.  Files have their own names from the start:
what must appear whole or not at all is made in a directory, or under names, that are renamed in the end
(:mod:`uqff.container.staging`, :mod:`uqff.container.atomic`); a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from uqff.codec.layer import Writable
from uqff.container.plan import FilesPlan, Item, Payload, payloads_of
from uqff.container.tensors import TensorWriter
from uqff.errors import FormatError, located

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["LayerWriter"]


class LayerWriter:
    """The files of one model, written layer by layer.

    Attributes:
        plan: what is written.
        files: the shards, in order.
    """

    def __init__(self, plan: FilesPlan, paths: Sequence[Path], *, begun: bool = False) -> None:
        """Create the files, or go on with those that an interrupted run has begun.

        Args:
            plan: of the files.
            paths: of the files, as many as the plan has shards.
            begun: see :class:`TensorWriter`.
        """
        self.plan = plan
        self.files: list[TensorWriter] = []
        self._file_of: dict[str, TensorWriter] = {}
        for shard, path in zip(plan.shards, paths, strict=True):
            tensors = [(item.name, item.dtype, item.shape) for item in shard]
            file = TensorWriter(path, tensors, plan.metadata, begun=begun)
            self.files.append(file)
            self._file_of.update((item.name, file) for item in shard)

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(file.nbytes for file in self.files)

    def write(self, key: str, layer: Writable) -> None:
        """Write a layer; each is written once.

        Raises:
            FormatError: it is another than was planned.
            OSError: writing failed.
        """
        with located(layer=key):
            payloads = payloads_of(layer, self.plan.version_of(key))
            items = {item.suffix: item for item in self.plan.layers[key]}
            for suffix in items | payloads:
                _check_unchanged(suffix, items.get(suffix), payloads.get(suffix))
            for suffix, item in items.items():
                self._file_of[item.name].write(item.name, payloads[suffix].chunks)

    def write_expert(self, key: str, expert: int, layer: Writable) -> None:
        """Write what one expert is of a stacked layer of 1.x; each is written once, in any order.

        Args:
            key: of the stacked layer, whose payloads are those of the experts one after the other; it was planned
                without them.
            expert: its number.
            layer: its weight ``[out, in]``.

        Raises:
            FormatError: it has other sizes than its part of the plan.
            OSError: writing failed.
        """
        with located(layer=key):
            parts, fixed = payloads_of(layer, self.plan.version), self.plan.fixed[key]
            for item in self.plan.layers[key]:
                file = self._file_of[item.name]
                if item.suffix not in fixed:
                    (data,) = parts[item.suffix].chunks
                    file.write_piece(item.name, expert * data.nbytes, data)
                elif expert == 0:
                    file.write(item.name, [fixed[item.suffix].data])

    def skip(self, key: str) -> None:
        """Leave a layer as it was written before."""
        for item in self.plan.layers[key]:
            self._file_of[item.name].skip(item.name)

    def finish(self) -> None:
        """Write what belongs to no layer, and flush all files to the disk.

        Raises:
            FormatError: a layer has not been written.
        """
        for name, entry in self.plan.own.items():
            self._file_of[name].write(name, [entry.data])
        for file in self.files:
            file.finish()

    def close(self) -> None:
        """Close all files as they are."""
        for file in self.files:
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self.close()


def _check_unchanged(suffix: str, item: Item | None, payload: Payload | None) -> None:
    planned, made = (
        "no such entry" if each is None else f"{each.dtype} {list(each.shape)}" for each in (item, payload)
    )
    if planned != made:
        raise FormatError("layer changed while it was written", field=suffix or None, expected=planned, got=made)
