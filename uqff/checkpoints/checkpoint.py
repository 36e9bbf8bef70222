"""A checkpoint as its layers: path of a weight to the layer that belongs there, whoever quantised it, or nobody.

::

    with uqff.open_checkpoint("DIR") as checkpoint:
        checkpoint.kind("model.layers.0.self_attn.q_proj")         # from headers alone
        weight, bias = checkpoint["model.layers.0.self_attn.q_proj"]
        checkpoint.layer("model.layers.0.mlp.down_proj", uqff.Shard.simple(1, rank=0, world_size=2))
        checkpoint["model.layers.0"]["self_attn.q_proj"]           # what lies under a prefix
        checkpoint.tensors["model.norm.weight"]                    # what is stored, as it is

Which tensors make up a layer is for the method that ``quantization_config`` names (:mod:`uqff.checkpoints.methods`);
what it does not claim is plain.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from uqff.checkpoints.companions import Companions
from uqff.checkpoints.gguf.files import is_gguf, open_gguf_tensors
from uqff.checkpoints.gguf.method import GgufBlocks
from uqff.checkpoints.method import Found, Method
from uqff.checkpoints.methods import method_of
from uqff.checkpoints.model import holds_uqff
from uqff.checkpoints.plain import Plain
from uqff.checkpoints.safetensors import TensorFiles, open_tensors
from uqff.codec.layer import Layer, Sharding
from uqff.container.closing import Closing
from uqff.container.shards import PathLike
from uqff.errors import FormatError, MissingError, ShapeError, UnsupportedError, located
from uqff.families.base import QuantizedTensor
from uqff.families.part import Part
from uqff.hub.fetch import fetch, no_models
from uqff.hub.names import hub_name

__all__ = ["Checkpoint", "CheckpointView", "open_checkpoint"]

NEAR: Final = 5
"""Names that the error of a missing one lists."""

COMPARED: Final = 4096
"""Names that a missing one is compared with."""


class CheckpointView(Mapping[str, "Layer | CheckpointView"]):
    """The layers of a checkpoint under a prefix, by what follows it; all of them, if it is empty.

    Attributes:
        prefix: without a dot at its end.
    """

    def __init__(self, checkpoint: Checkpoint, prefix: str) -> None:
        self.checkpoint = checkpoint
        self.prefix = prefix

    def _full(self, path: str) -> str:
        return f"{self.prefix}.{path}" if self.prefix else path

    def __getitem__(self, path: str) -> Layer | CheckpointView:
        """The layer of a path; if there is none, the layers that lie under it.

        Raises:
            MissingError: there is neither; near names are listed.
            UqffError: the layer is not valid.
        """
        full = self._full(path)
        if full in self.checkpoint.paths:
            return self.checkpoint.layer(full)
        if full in self.checkpoint.prefixes:
            return CheckpointView(self.checkpoint, full)
        raise self.checkpoint.missing(full)

    def layer(self, path: str, shard: Sharding | None = None) -> Layer:
        """The layer of a path, or a slice of it: see :meth:`Checkpoint.layer`."""
        return self.checkpoint.layer(self._full(path), shard)

    def meta(self, path: str) -> Layer:
        """The layer of a path without its bytes: see :meth:`Checkpoint.meta`."""
        return self.checkpoint.meta(self._full(path))

    def shape(self, path: str) -> tuple[int, ...]:
        """Logical shape of a weight, by headers alone."""
        return self.meta(path).weight.shape

    def dtype(self, path: str) -> str:
        """Dtype of a weight's codes or numbers as they are stored, as safetensors spells it."""
        return self.checkpoint.stored_dtype(self._full(path))

    def kind(self, path: str) -> str:
        """Type of a weight: ``unquant``, ``afq4``, ``fp8``, ...; or what a foreign record calls itself."""
        return self.meta(path).weight.kind

    def __contains__(self, path: object) -> bool:
        full = self._full(str(path))
        return full in self.checkpoint.paths or full in self.checkpoint.prefixes

    def __iter__(self) -> Iterator[str]:
        start = f"{self.prefix}." if self.prefix else ""
        return (path[len(start) :] for path in self.checkpoint.paths if path.startswith(start))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"<CheckpointView {self.checkpoint.path}, {self.prefix}: {len(self)} layers>"


class Checkpoint(CheckpointView, Closing):
    """An open checkpoint: paths of weights to layers. Made by :func:`open_checkpoint`.

    Nothing but headers has been read.  Layers are made when asked for; where their records are views of the files, they
    stay valid after the checkpoint is closed.

    Attributes:
        path: the directory.
        config: of ``config.json``; empty if there is none.
        tensors: what the files hold, by the names of tensors.
        method: how the weights were quantised; None if they were not.
        paths: the method of each layer, by path, in the order of the files.
        prefixes: all paths that layers lie under.
    """

    def __init__(self, tensors: TensorFiles, method: Method | None = None) -> None:
        """The layers of opened files.

        Args:
            tensors: the files.
            method: how they are quantised, if the configuration does not say it.

        Raises:
            UqffError: see :func:`open_checkpoint`.
        """
        super().__init__(self, "")
        self.path = tensors.path
        self.config: dict[str, Any] = tensors.config
        self.tensors = tensors
        with located(file=tensors.config_path):
            self.method = method_of(self.config) if method is None else method
        quantised: Found = {} if self.method is None else self.method.find(tensors)
        taken = {name for roles in quantised.values() for name in roles.values()}
        plain = {path: roles for path, roles in Plain().find(tensors).items() if roles["weight"] not in taken}
        for path in plain.keys() & quantised.keys():
            name = plain[path]["weight"]
            expected, got = "one weight", f"beside {', '.join(quantised[path].values())}"
            file = str(tensors.file_of(name))
            raise FormatError("a weight twice", file=file, layer=path, field=name, expected=expected, got=got)
        self._biases = self._found_biases(tensors, quantised, plain, taken)
        biases = set(self._biases.values())
        self._roles = quantised | {path: roles for path, roles in plain.items() if roles["weight"] not in biases}
        rest = Plain()
        self.paths: dict[str, Method] = {
            path: self.method if self.method is not None and path in quantised else rest
            for path in _in_order(self._roles, tensors)
        }
        self.prefixes = {prefix for path in self.paths for prefix in accumulate(path.split(".")[:-1], "{}.{}".format)}

    @staticmethod
    def _found_biases(tensors: TensorFiles, quantised: Found, plain: Found, taken: set[str]) -> dict[str, str]:
        """The tensor that is a layer's bias, of each layer that has one."""
        biases = {}
        for path, roles in (*quantised.items(), *plain.items()):
            for name in (f"{path}.bias", f"{path}_bias"):
                if name in tensors and name not in taken and name not in roles.values():
                    biases[path] = name
                    break
        return biases

    @property
    def is_quantised(self) -> bool:
        """Whether any layer is."""
        return any(not isinstance(method, Plain) for method in self.paths.values())

    def companions(self, path: str) -> Companions:
        """The tensors of a weight, by their roles.

        Raises:
            MissingError: there is no such layer; near names are listed.
        """
        if path not in self.paths:
            raise self.missing(path)
        return Companions(self.tensors, path, self._roles[path])

    def bias_name(self, path: str) -> str | None:
        """The tensor that is the bias of a layer; None if it has none."""
        return self._biases.get(path)

    def meta(self, path: str) -> Layer:
        """A layer without its bytes, by headers alone: type, shape, dtypes, alignment of slices.

        Raises:
            MissingError: there is no such layer, or it lacks a companion.
            UqffError: companions do not fit each other; file, weight and tensor are named.
        """
        stored = self.companions(path)
        return Layer(self._located(path, lambda: self.paths[path].meta(stored)), self._bias(path, planned=True))

    def layer(self, path: str, shard: Sharding | None = None) -> Layer:
        """A layer, or the slice of it that a :class:`~uqff.parallel.Shard` names.

        Only the bytes of the slice are touched.  The bias of a slice of the inputs is the whole bias, to be added to
        the reduced sum.

        Raises:
            MissingError: there is no such layer, or it lacks a companion.
            ShardError: the slice cannot be cut exactly.
            UqffError: the layer is not valid; file, weight and tensor are named.
        """
        stored, method, bias = self.companions(path), self.paths[path], self._bias(path)
        if shard is None:
            return Layer(self._located(path, lambda: method.record(stored)), bias)
        meta = self._located(path, lambda: method.meta(stored))
        with located(file=self._file(path), layer=path):
            cut = shard.slice_of(meta)
        whole = cut[2] == meta.shape[cut[0]]
        record = self._located(path, lambda: method.record(stored, None if whole else cut))
        return Layer(record, Layer(meta, bias).narrow(*cut).bias_part)

    def _file(self, path: str) -> Path:
        return self.tensors.file_of(next(iter(self._roles[path].values())))

    def _located(self, path: str, make: Any) -> QuantizedTensor:
        with located(file=self._file(path), layer=path):
            made: QuantizedTensor = make()
            return made

    def _bias(self, path: str, *, planned: bool = False) -> Part | None:
        name = self._biases.get(path)
        if name is None:
            return None
        stored = Companions(self.tensors, path, {"bias": name})
        if not stored.shape("bias"):
            raise stored.problem("bias without dimensions", "bias", "[out]", "[]", ShapeError)
        return stored.planned("bias") if planned else stored.part("bias")

    def stored_dtype(self, path: str) -> str:
        """See :meth:`CheckpointView.dtype`."""
        stored = self.companions(path)
        return stored.dtype(next(iter(stored.names)))

    def missing(self, path: str) -> MissingError:
        """The error of a layer that is not there."""
        stored = [name for name in self.tensors if name == path or name.startswith((f"{path}.", f"{path}_"))]
        known = [*self.paths, *sorted(self.prefixes)]
        if len(known) > COMPARED:  # of many experts, say: those beside it, and those of its own last name
            parent, _, last = path.rpartition(".")
            known = [each for each in known if each.startswith(f"{parent}.") or each.endswith(f".{last}")][:COMPARED]
        near = get_close_matches(path, known, NEAR, 0.6)
        expected = f"near names: {', '.join(near)}" if near else f"one of {len(self.paths)} layers"
        if stored:
            expected = f"a plain weight, or a quantization_config that tells what {', '.join(stored[:NEAR])} are"
        return MissingError("no such layer", file=str(self.path), layer=path, expected=expected)

    def close(self) -> None:
        """Release the files. Layers already taken out stay valid."""
        self.tensors.close()

    def __repr__(self) -> str:
        how = "plain" if self.method is None else "/".join(self.method.NAMES)
        return f"<Checkpoint {self.path}: {len(self)} layers, {how}>"


def _in_order(roles: Found, tensors: TensorFiles) -> list[str]:
    """Paths in the order of their first tensors in the files."""
    places = {name: at for at, name in enumerate(tensors)}
    return sorted(roles, key=lambda path: places[next(iter(roles[path].values()))])


def open_checkpoint(source: PathLike, *, assets: PathLike | None = None, mmproj: PathLike | None = None) -> Checkpoint:
    """Open a checkpoint for reading: plain, or quantised by one of the known methods.

    Args:
        source: a directory; or, if there is none of that name, the id of a repository on the Hugging Face hub
            (``owner/name``), which is downloaded into the hub's cache. The latter needs ``huggingface_hub``. Or a GGUF
            file, here or in a repository (``owner/name:TYPE`` or ``owner/name:FILE`` of several), whose weights have
            the names and the order of rows that they have in a checkpoint.
        assets: of a GGUF file, a directory with the model's own configuration and tokenizer: see
            :func:`uqff.conversion.uqff_of_gguf`.
        mmproj: of a GGUF file of a model that sees, the file of the part which does, or its name beside the other;
            ``none`` for the text alone. None: the only one that is there, if there is one.

    Raises:
        FormatError: a file breaks a rule, or the configuration is not one.
        ShardError: the index and the files do not fit together.
        UnsupportedError: a UQFF model; an unknown method of quantising, or a setting of one that does not exist; a hub
            id without ``huggingface_hub``.
        FileNotFoundError: no such directory, or no weights in it.
        OSError: a file cannot be read.

    >>> with uqff.open_checkpoint("checkpoint") as checkpoint:
    ...     weight, bias = checkpoint["model.layers.0.mlp.up_proj"]
    >>> weight.kind, bias
    ('unquant', None)
    """
    name = hub_name(source)
    if name is not None:
        source = fetch(name, no_models, mmproj=mmproj)
    is_file = is_gguf(source)
    if holds_uqff(source):
        raise UnsupportedError("the model is UQFF, not a checkpoint", file=os.fspath(source))
    if assets is not None and not is_file:
        raise UnsupportedError("only GGUF files take another configuration", field="assets", got=str(source))
    if mmproj is not None and not is_file:
        raise UnsupportedError("only GGUF files have an mmproj file", field="mmproj", got=str(source))
    tensors: TensorFiles = open_gguf_tensors(source, assets, mmproj) if is_file else open_tensors(source)
    try:
        return Checkpoint(tensors, GgufBlocks() if is_file else None)
    except BaseException:
        tensors.close()
        raise
