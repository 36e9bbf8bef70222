"""A checkpoint as a mapping from the path of a module to the layer that belongs there.

::

    where a weight is    in the checkpoint
    projections          by path
    experts              by path, experts.3.up_proj; or all in one, experts.gate_up_proj and experts.down_proj
    embedding            model.embed_tokens
    head                 lm_head; of a tied model the embedding, whatever else is there

Layers are plain or quantised, see :mod:`uqff.checkpoints`.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any, Final

import torch

from uqff.checkpoints.checkpoint import Checkpoint, open_checkpoint
from uqff.checkpoints.gguf.files import is_gguf
from uqff.codes import LOADED_DTYPES
from uqff.container.closing import Closing
from uqff.container.document import is_present
from uqff.errors import FormatError, UqffError
from uqff.hub.names import NO_PROJECTOR
from uqff.models.architectures import layer_names
from uqff.models.assets import CONFIG_NAME
from uqff.models.layouts import WeightLayout
from uqff.models.renaming import ModulePaths
from uqff.parallel.checkpoint_layers import GATE_UP, experts_of, layer_of_checkpoint, names_of_experts
from uqff.parallel.consensus import digest
from uqff.parallel.projection import PROJECTIONS
from uqff.quantization.plan import UNUSED

if TYPE_CHECKING:
    from uqff.parallel.unloaded import Unloaded, UnloadedExperts

__all__ = ["CheckpointSource"]

DTYPE_KEYS: Final = ("dtype", "torch_dtype")
"""What ``transformers`` calls the dtype of a model, from 5 on and before."""


def _opened(path: str | os.PathLike[str]) -> Checkpoint:
    """A checkpoint; of a GGUF file whose part that sees cannot be had, the text alone: only that is computed."""
    if is_gguf(path):
        with contextlib.suppress(UqffError):
            return open_checkpoint(path)
        return open_checkpoint(path, mmproj=NO_PROJECTOR)
    return open_checkpoint(path)


class CheckpointSource(Closing):
    """An open checkpoint; see :class:`~uqff.parallel.source.ModelSource` for the verbs.

    Attributes:
        checkpoint: its layers.
        name: the directory, for errors.
        directory: where its files are.
        config: the parsed ``config.json``.
        layout: how the rows of Q and K lie in the files.
        paths: what modules are called in the files.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.checkpoint = _opened(path)
        try:
            place = self.checkpoint.path
            self.directory = place if place.is_dir() else place.parent
            self.name = str(place)
            config = self.directory / CONFIG_NAME
            if place.is_dir() and not is_present(config):
                raise FormatError("no configuration beside the model", file=str(config), got="no such file")
            self.config: dict[str, Any] = self.checkpoint.config
            self.paths = ModulePaths(self.config)
            self.layout = WeightLayout.of(self.config).check(str(config))
            head = layer_names(self.config)[0]
            self._unused = set() if head.weight == f"{head.module}.weight" else {head.module}
            self._taken: set[str] = set()
        except BaseException:
            self.checkpoint.close()
            raise

    def __contains__(self, module: object) -> bool:
        path = self.paths(str(module))
        return path in self.checkpoint.paths and path not in self._unused

    def layer(self, module: str) -> Unloaded:
        """The layer of a module.

        Raises:
            MissingError: there is none.
            UqffError: it is not valid.
        """
        module = self.paths(module)
        self._taken.add(module)
        return layer_of_checkpoint(self.checkpoint, module)

    def experts(self, path: str, count: int) -> list[UnloadedExperts]:
        """A layer for each expert, or stacks: see :mod:`uqff.parallel.checkpoint_layers`."""
        single = self.paths.experts(path, tuple(name for name, _ in PROJECTIONS), count)
        joined = self.paths(f"{path}.{GATE_UP}"), self.paths(f"{path}.down_proj")
        path = self.paths(path)
        names = names_of_experts(self.checkpoint, path, count, single, joined)
        self._taken.update(name for each in names for name in each)
        return experts_of(self.checkpoint, path, count, single, joined)

    def key(self, module: str) -> str:
        """What errors call the layer of a module: its path."""
        return module

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor that is no layer, as plain numbers; a view, where it is stored as such.

        Raises:
            MissingError: there is none.
        """
        name = self.paths(name)
        path = name.removesuffix(".weight")
        if path not in self.checkpoint.paths and (pieces := self.paths.pieces(name)):
            return torch.cat([self.tensor(piece) for piece in pieces])
        owner = name.removesuffix(".bias")
        if owner in self.checkpoint.paths and self.checkpoint.bias_name(owner) == name:
            bias = self.checkpoint.layer(owner).bias
            assert bias is not None
            return bias
        self._taken.add(path)
        if path not in self.checkpoint.paths and name in self.checkpoint.tensors:
            return self.checkpoint.tensors[name]  # a bias of what is no layer
        record = self.checkpoint.layer(path).weight
        return record.dequantize() if record.plain is None else record.plain.tensor()

    def left(self) -> str | None:
        """The path of a weight that nobody has asked for, but for those of towers."""
        known = self._taken | self._unused | self.paths.idle
        left = (path for path in self.checkpoint.paths if path not in known and not path.endswith(UNUSED))
        return next(filter(self.paths.is_of_text, left), None)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that the configuration states; else that of all tensors of plain numbers, if they have one."""
        known = {dtype.torch_name: dtype for dtype in LOADED_DTYPES.values()}
        for key in DTYPE_KEYS:
            if self.config.get(key) in known:
                return known[self.config[key]].torch
        tensors = self.checkpoint.tensors
        found = {LOADED_DTYPES.get(tensors.dtype(name)) for name in tensors} - {None}
        dtype = found.pop() if len(found) == 1 else None
        return None if dtype is None else dtype.torch

    def digest(self, *options: object, everything: bool = False) -> bytes:
        """See :func:`~uqff.parallel.consensus.digest`.

        Args:
            options: what else the ranks must agree on.
            everything: take in every byte.
        """
        files = self.checkpoint.tensors.listed
        return digest(files, json.dumps(self.config).encode(), repr(options).encode(), everything=everything)

    def close(self) -> None:
        """Release the files; layers already taken out stay valid."""
        self.checkpoint.close()
