"""A model directory of either generation as one mapping: path of a module to the layer that belongs there.

::

    where a weight is         0.x                        1.0, 1.1                   1.2
    projections               by layer index             by path                    by path
    experts                   one by one, or stacked     stacked                    stacked
    embedding                 residual                   residual                   layer model.embed_tokens
    head                      index 0                    layer lm_head              layer lm_head
    head of a tied model      index 0                    layer lm_head              none: the embedding's layer
    norms, expert routers     residual                   residual                   residual

A weight that is no layer but stands in the residual is a layer that is not quantised.

Authority: mistral.rs v0.6.0, ``mistralrs-core/src/pipeline/isq.rs``; v0.9.2, ``mistralrs-quant/src/uqff/reader.rs``.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import torch

from uqff.codec.layer import Layer
from uqff.container.closing import Closing
from uqff.container.document import is_present
from uqff.container.file import open_uqff
from uqff.errors import FormatError, located
from uqff.families import Unquant
from uqff.models.assets import CONFIG_NAME
from uqff.models.config import read_config
from uqff.models.layouts import WeightLayout
from uqff.models.modules import modules_of
from uqff.models.renaming import ModulePaths
from uqff.parallel.checkpoint_layers import GATE_UP, halves, split_halves, take_turns
from uqff.parallel.consensus import digest
from uqff.parallel.projection import PROJECTIONS
from uqff.parallel.unloaded import Unloaded

if TYPE_CHECKING:
    from uqff.parallel.unloaded import UnloadedExperts


__all__ = ["UqffSource"]


class UqffSource(Closing):
    """An open model directory; see :class:`~uqff.parallel.source.ModelSource` for the verbs.

    Only headers have been read; layers are views of the mapped files.

    Attributes:
        file: the open UQFF.
        name: of its first shard, for errors.
        directory: where its shards, its residual and its configuration are.
        config: the parsed ``config.json``.
        layout: how the rows of Q and K lie in the files.
        paths: what modules are called in the files.
        keys: path of a module to the key of its layer in the file.
    """

    def __init__(self, path: str | os.PathLike[str], isq: str | None = None) -> None:
        self.file = open_uqff(path, isq)
        self.name = str(self.file.paths[0])
        self._taken: set[str] = set()
        try:
            with located(file=self.name):
                self.directory = self.file.paths[0].parent
                path = self.directory / CONFIG_NAME
                if not is_present(path):
                    raise FormatError("no configuration beside the model", file=str(path), got="no such file")
                self.config: dict[str, Any] = read_config(path)
                self.paths = ModulePaths(self.config)
                self.layout = WeightLayout.of(self.config).check(str(path))
                self.keys = self._numbered() if self.file.generation == "0.x" else {key: key for key in self.file}
                self.residual = self.file.residual
        except BaseException:
            self.file.close()
            raise

    def _numbered(self) -> dict[str, str]:
        """The layers of a pre-1.0 file by their paths; experts have layers of their own, or are stacked as in 1.x."""
        places: dict[str, str] = {}
        for module in modules_of(self.file, self.config):
            if len(module.keys) == 1:
                places[module.path] = module.keys[0]
            else:
                places.update((part.module, key) for part, key in zip(module.parts, module.keys, strict=True))
        return places

    def __contains__(self, module: object) -> bool:
        path = self.paths(str(module))
        return path in self.keys or f"{path}.weight" in self.residual

    def left(self) -> str | None:
        """A layer of the file that nobody has asked for, but for those of towers."""
        left = (module for module in self.keys if module not in self._taken | self.paths.idle)
        return next(filter(self.paths.is_of_text, left), None)

    def idle(self) -> tuple[dict[str, Layer], dict[str, torch.Tensor]]:
        """Layers that nothing computes with, and tensors, by their names; views."""
        layers = {path: self.file[self.keys[path]] for path in self.paths.idle if path in self.keys}
        names = {f"{path}.weight" for path in self.paths.idle - set(layers)}
        return layers, {name: self.residual[name] for name in names if name in self.residual}

    def layer(self, module: str) -> Unloaded:
        """The layer of a module as it is stored; touches no payload.

        Raises:
            FormatError: there is none, neither quantised nor in the residual.
            UqffError: the layer is not valid.
        """
        module = self.paths(module)
        bias = self.residual.get(f"{module}.bias", self.residual.get(f"{module}_bias"))
        self._taken.add(module)
        if module not in self.keys:
            layer = Layer(Unquant.of(self.tensor(f"{module}.weight")), bias)
        else:
            layer = self.file[self.keys[module]]
            layer = layer if layer.bias is not None or bias is None else Layer(layer.weight, bias)
        return Unloaded.of(layer, self.key(module))

    def experts(self, path: str, count: int) -> list[UnloadedExperts]:
        """The layers of gate, up and down projections: a stack of each, or of gate and up in turns; or single ones."""
        fused = f"{path}.gate_up_proj"
        if fused in self and take_turns(self.config):
            return [*halves(self.layer(fused), path), self.layer(f"{path}.down_proj")]
        if f"{path}.gate_proj" in self:
            return [self.layer(f"{path}.{name}") for name, _ in PROJECTIONS]
        if f"{path}.{GATE_UP}" in self:
            return list(split_halves(self.layer(f"{path}.{GATE_UP}"), self.layer(f"{path}.down_proj")))
        names = self.paths.experts(path, tuple(name for name, _ in PROJECTIONS), count)
        return [[self.layer(name) for name in each] for each in names]

    def key(self, module: str) -> str:
        """What errors call the layer of a module: its key in the file and, where that is a number, its path."""
        key = self.keys.get(module, module)
        return key if key == module else f"{key} ({module})"

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor of the residual; a view.

        Raises:
            FormatError: there is none.
        """
        name = self.paths(name)
        if name not in self.residual and (pieces := self.paths.pieces(name)):
            return torch.cat([self.tensor(piece) for piece in pieces])
        if name not in self.residual:
            raise FormatError(
                "model lacks a weight",
                file=self.name,
                layer=name.removesuffix(".weight"),
                expected="a layer, or a tensor of the residual",
                got="neither",
            )
        return self.residual[name]

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that the model was loaded in when the file was written: that of its residual."""
        dtypes = {self.residual[name].dtype for name in self.residual if not self.paths.is_table(name)}
        floating = [dtype for dtype in dtypes if dtype.is_floating_point]
        return floating[0] if len(floating) == 1 else None

    def digest(self, *options: object, everything: bool = False) -> bytes:
        """See :func:`~uqff.parallel.consensus.digest`.

        Args:
            options: what else the ranks must agree on.
            everything: take in every byte.
        """
        return digest(self.file.mapped, json.dumps(self.config).encode(), repr(options).encode(), everything=everything)

    def close(self) -> None:
        """Release the files; layers already taken out stay valid."""
        self.file.close()
