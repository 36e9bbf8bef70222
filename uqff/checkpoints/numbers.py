"""The tensors of a checkpoint as if nobody had quantised it: what reads plain checkpoints reads others through this.

A weight that is quantised is a tensor ``<path>.weight`` of float32 (or ``<path>``, where its codes are named so), made
of its codes when it is asked for, one expert of a stack at a time if so wanted; the tensors that it is stored in are
not there.  All others are as they are stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uqff.checkpoints.checkpoint import Checkpoint
from uqff.checkpoints.methods import KEYS
from uqff.checkpoints.plain import Plain
from uqff.checkpoints.safetensors import TensorFiles
from uqff.codes import DType
from uqff.families.base import QuantizedTensor
from uqff.simd.floats import Floats

if TYPE_CHECKING:
    import torch

    from uqff.container.mapped import ListedFile, MappedFile

__all__ = ["NumberFiles"]


class NumberFiles(TensorFiles):
    """A checkpoint's tensors as plain numbers. It closes with the checkpoint.

    Attributes:
        checkpoint: whose.
        paths: of each weight that is quantised, by the name that it has here.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        tensors = checkpoint.tensors
        config = {key: value for key, value in checkpoint.config.items() if key not in KEYS}
        text = config.get("text_config")
        if isinstance(text, dict) and any(key in text for key in KEYS):
            config["text_config"] = {key: value for key, value in text.items() if key not in KEYS}
        self.path = tensors.path
        self.config = config
        self.tensors = tensors
        self.checkpoint = checkpoint
        self.paths: dict[str, str] = {}
        self._stored: dict[str, list[str]] = {}
        hidden: dict[str, str] = {}
        for path, method in checkpoint.paths.items():
            if not isinstance(method, Plain):
                names = list(checkpoint.companions(path).names.values())
                name = path if path in names else f"{path}.weight"
                self.paths[name], self._stored[name] = path, names
                hidden |= dict.fromkeys(names, name)
        self._names = dict.fromkeys(hidden.get(name, name) for name in tensors)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._last: tuple[str, QuantizedTensor] | None = None

    @property
    def computed(self) -> frozenset[str]:
        """See :attr:`TensorFiles.computed`."""
        return frozenset(self.paths)

    def record(self, name: str) -> QuantizedTensor:
        """The record of a weight that is quantised."""
        if self._last is None or self._last[0] != name:
            self._last = name, self.checkpoint.layer(self.paths[name]).weight
        return self._last[1]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.record(name).dequantize() if name in self.paths else self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)

    @property
    def files(self) -> tuple[MappedFile, ...]:
        """The files themselves."""
        return self.tensors.files

    @property
    def listed(self) -> tuple[MappedFile | ListedFile, ...]:
        """The files and what lies in each."""
        return self.tensors.listed

    @property
    def config_path(self) -> Path:
        """Where the configuration stands, if it does."""
        return self.tensors.config_path

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor, the first of those that it is made of; the directory, if none does."""
        return self.tensors.file_of(self._stored.get(name, [name])[0])

    def stamps(self) -> list[list[str | int]]:
        """See :meth:`TensorFiles.stamps`."""
        return self.tensors.stamps()

    def check_companions(self) -> None:
        """See :meth:`TensorFiles.check_companions`."""
        self.tensors.check_companions()

    def write_companions(
        self, directory: Path, config: Mapping[str, Any] | None, dtype: DType
    ) -> tuple[list[str], list[str]]:
        """See :meth:`TensorFiles.write_companions`."""
        return self.tensors.write_companions(directory, config, dtype)

    def close(self) -> None:
        """Nothing: it closes with the checkpoint."""

    def raw(self, name: str) -> memoryview:
        """The bytes of a tensor."""
        return self.floats(name).data if name in self.paths else self.tensors.raw(name)

    def floats(self, name: str, expert: int | None = None) -> Floats:
        """See :meth:`TensorFiles.floats`; of what is quantised new memory."""
        if name not in self.paths:
            return self.tensors.floats(name, expert)
        record = self.record(name)
        part = record.numbers() if expert is None else record.expert_numbers(expert)
        if expert is None:
            self._last = None
        return Floats.of_bytes(part.data, DType.F32, part.shape)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without making it."""
        if name not in self.paths:
            return self.tensors.shape(name)
        if name not in self._shapes:
            self._shapes[name] = self.checkpoint.shape(self.paths[name])
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """Dtype of a tensor as safetensors spells it."""
        return DType.F32.safetensors if name in self.paths else self.tensors.dtype(name)

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor."""
        return 4 * math.prod(self.shape(name)) if name in self.paths else self.tensors.nbytes(name)

    def stored_nbytes(self, name: str) -> int:
        """Bytes that a tensor takes in the files."""
        return sum(map(self.tensors.nbytes, self._stored.get(name, [name])))

    def _advise(self, name: str, advice: str, start: int = 0, stop: int | None = None) -> None:
        """Of what is quantised, the like share of each of its tensors."""
        if name not in self.paths:
            self.tensors._advise(name, advice, start, stop)
            return
        whole = max(self.nbytes(name), 1)
        for each in self._stored[name]:
            size = self.tensors.nbytes(each)
            end = size if stop is None else -(-stop * size // whole)
            self.tensors._advise(each, advice, start * size // whole, end)
