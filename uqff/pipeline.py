"""A checkpoint to UQFF: every layer read once, quantised to every type asked for, and written while the next is made.

::

    mapped source --> round, widen --> quantise (kernels, all threads) --> queue --> writer thread --> .uqff shards
                                                            residual tensors -----> residual.safetensors

All sizes follow from shapes, so files are laid out before the first weight is read and layers are written where they
belong, in any order.  The system reads the next layer from the disk in the background; the pages of a layer are given
back when it is done.  The output directory appears when everything in it is on the disk.

The residual holds what the checkpoint holds, in the load dtype.  (mistral.rs 0.6 computes the norms of Gemma models as
(w + 1) - 1 and stores them off by an ulp of 1; later versions do not.)

Authority: mistral.rs v0.6.0, ``mistralrs-core/src/pipeline/isq.rs`` (``quantize``, ``write_uqff``).
"""

from __future__ import annotations

import errno
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from uqff import blob
from uqff.architectures import LayerName, layer_names, selected_layers
from uqff.blob import Layer
from uqff.codes import DType, Version
from uqff.container.file import RESIDUAL_NAME
from uqff.container.save import SHARD_BYTES
from uqff.container.shards import PathLike
from uqff.container.staging import check_target, staged_directory
from uqff.container.streaming import StreamedFile, StreamedLayers
from uqff.container.writer import Writer, copy_durably
from uqff.distance import distance
from uqff.errors import FormatError, ShapeError, UnsupportedError, UqffError
from uqff.isq import Engine, Fallback, FallbackWarning, bias_dtype, cast_bias, kind_name, outline, resolve
from uqff.quantizers import Loaded, encode
from uqff.recipe import Recipe
from uqff.report import LayerReport, Output, Result
from uqff.selector import Pattern
from uqff.sources.safetensors import CONFIG_NAME, Checkpoint, open_checkpoint
from uqff.views import bytes_of

if TYPE_CHECKING:
    import torch

__all__ = ["FORMATS", "Progress", "Step", "quantize_model"]

FORMATS: Final = {"0.1": Version(0, 1, 3), "0.2": Version(0, 2, 0)}
"""Format generations that can be written, and the version that each writes."""

LOADED_DTYPES: Final = {"F32": DType.F32, "F16": DType.F16, "BF16": DType.BF16}
"""What weights come as and are loaded as, by their name in the checkpoint."""

COMPANIONS: Final = (
    CONFIG_NAME,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files that are copied beside the model if they are there."""

UNUSED: Final = (".rotary_emb.inv_freq",)
"""Tensors that old checkpoints hold and no loader reads."""

TILE: Final = 1 << 22
"""Weights of the residual that are rounded and written together."""

SLACK: Final = 64 * 2**20
"""Bytes of finished layers that may wait for the writer even if the largest layer is being made."""


class Step(NamedTuple):
    """What has been done: of layers all types asked for count once."""

    module: str
    layers_done: int
    layers: int
    weights_done: int
    weights: int


Progress = Callable[[Step], None]


@dataclass(frozen=True)
class _Planned:
    """A layer of one output before it is made."""

    requested: str
    stored: str
    size: int
    outline: Layer


def quantize_model(
    source: PathLike,
    target: PathLike,
    kinds: Sequence[str | int],
    *,
    recipe: Recipe | None = None,
    layers: Pattern | None = None,
    format: str = "0.2",
    engine: Engine = "0.9",
    dtype: str = "auto",
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    on_fallback: Callable[[Fallback], None] | None = None,
) -> Result:
    """Quantise a checkpoint to a pre-1.0 model directory.

    Peak memory is the largest layer's source, its float32 copy and its output, plus a constant.

    Args:
        source: a checkpoint, see :func:`uqff.sources.open_checkpoint`.
        target: the directory to make.
        kinds: the types; each becomes ``<kind>-N.uqff``, the residual is shared.
        recipe: types of particular layers.
        layers: which weights are layers, in place of the architecture's list: those whose name it is found in, in the
            architecture's order, others after them in natural order.
        format: ``0.1`` or ``0.2``.
        engine: whose rules, see :mod:`uqff.isq`.
        dtype: the load dtype: ``f32``, ``f16``, ``bf16``, or ``auto``, the one that holds all layers exactly.
        force: replace a model that is in ``target`` already.
        shard_bytes: payload after which a new shard begins.
        progress: called after each layer.
        on_fallback: called for every layer that is stored as another type than asked for, before work begins. If None,
            a :class:`uqff.FallbackWarning` is issued for each.

    Raises:
        UqffError: the checkpoint breaks a rule, or a layer cannot be what is asked for; nothing has been written.
        FileExistsError: ``target`` is there and may not be replaced.
        OSError: reading or writing failed (a full disk, say); nothing stays behind.
    """
    check_target(Path(target), force=force)
    with open_checkpoint(source) as checkpoint:
        job = _Job(checkpoint, kinds, recipe, layers, format, engine, dtype)
        for fallback in (fallback for output in job.outputs for fallback in output.fallbacks):
            if on_fallback is None:
                warnings.warn(FallbackWarning(str(fallback)), stacklevel=2)
            else:
                on_fallback(fallback)
        _check_space(Path(target), job.total_bytes)
        with staged_directory(Path(target), force=force) as staging:
            result = job.run(staging, shard_bytes, progress)
    return Result(Path(target), *result)


def _check_space(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"no space for the model: {needed:,} bytes needed, {free:,} free", str(target))


class _Job:
    """A run: planned when it is made, carried out by :meth:`run`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        kinds: Sequence[str | int],
        recipe: Recipe | None,
        layers: Pattern | None,
        format: str,
        engine: Engine,
        dtype: str,
    ) -> None:
        self.checkpoint = checkpoint
        self.engine = engine
        if format not in FORMATS:
            raise UnsupportedError("unknown format", field="format", expected=", ".join(FORMATS), got=format)
        self.version = FORMATS[format]
        self.names = _names(checkpoint, layers)
        self.dtype = _load_dtype(checkpoint, self.names, dtype)
        self.residual = _residual_names(checkpoint, self.names)
        self.unmatched = recipe.unmatched(self.names) if recipe is not None else []
        self.outputs: list[Output] = []
        self.plans: list[list[_Planned]] = []
        for kind in dict.fromkeys(map(kind_name, kinds)):
            output = Output(kind)
            self.outputs.append(output)
            self.plans.append([self._plan(name, output, recipe) for name in self.names])
        if not self.outputs:
            raise UnsupportedError("no type asked for", field="kinds")

    def _plan(self, name: LayerName, output: Output, recipe: Recipe | None) -> _Planned:
        requested = recipe.kind_for(name, output.kind, engine=self.engine) if recipe is not None else output.kind
        shape = self.checkpoint.shape(name.weight)
        try:
            stored, reason = resolve(requested, shape, self.engine)
            layer = Layer(outline(stored, shape, self.dtype.torch), self._bias_outline(name, stored))
            size = blob.blob_size(layer, version=self.version)
        except UqffError as error:
            raise error.within(layer=name.module) from None
        if stored != requested:
            output.fallbacks.append(Fallback(name.module, requested, stored, shape, reason))
        return _Planned(requested, stored, size, layer)

    def _bias_outline(self, name: LayerName, stored: str) -> torch.Tensor | None:
        import torch

        if name.bias not in self.checkpoint:
            return None
        shape = self.checkpoint.shape(name.bias)
        return torch.empty(shape, dtype=bias_dtype(stored, self.dtype.torch), device="meta")

    @property
    def total_bytes(self) -> int:
        """Bytes of everything that will be written, headers aside."""
        residual = sum(self._residual_size(name) for name in self.residual)
        return residual + sum(planned.size for plans in self.plans for planned in plans)

    def _residual_dtype(self, name: str) -> str:
        """Floats of the layers' dtypes are loaded like them; anything else stays as it is."""
        stored = self.checkpoint.dtype(name)
        return self.dtype.safetensors if stored in LOADED_DTYPES else stored

    def _residual_size(self, name: str) -> int:
        size = self.checkpoint.nbytes(name)
        stored = self.checkpoint.dtype(name)
        return size // LOADED_DTYPES[stored].itemsize * self.dtype.itemsize if stored in LOADED_DTYPES else size

    def run(self, directory: Path, shard_bytes: int, progress: Progress | None) -> tuple[Any, ...]:
        """Write everything into a directory; gives the fields of :class:`Result` after the path."""
        residual = [(name, self._residual_dtype(name), self.checkpoint.shape(name)) for name in self.residual]
        with Writer() as writer:
            rest = writer.own(StreamedFile(directory / RESIDUAL_NAME, residual))
            shards = []
            for output, plans in zip(self.outputs, self.plans, strict=True):
                outlines = {str(name.index): planned.outline for name, planned in zip(self.names, plans, strict=True)}
                shards.append(writer.own(StreamedLayers(directory, output.kind, outlines, self.version, shard_bytes)))
            for name in self.residual:
                writer.submit(partial(self._write_residual, rest, name), 0)
            self._run_layers(writer, shards, progress)
            writer.join()
            rest.finish()
            for output, files in zip(self.outputs, shards, strict=True):
                files.finish()
                output.shards = [file.path.name for file in files.files]
                output.nbytes = sum(file.nbytes for file in files.files)
        for companion in COMPANIONS:
            if (self.checkpoint.path / companion).is_file():
                copy_durably(self.checkpoint.path / companion, directory / companion)
        return self.dtype.safetensors, self.version, self.outputs, len(residual), rest.nbytes, self.unmatched

    def _run_layers(self, writer: Writer, shards: list[StreamedLayers], progress: Progress | None) -> None:
        sizes = [math.prod(self.checkpoint.shape(name.weight)) for name in self.names]
        scratch = np.empty(max(sizes), np.float32)
        room = max(self._footprint(at, sizes[at]) for at in range(len(self.names))) + SLACK
        done = 0
        for at, name in enumerate(self.names):
            if at + 1 < len(self.names):
                self.checkpoint.fetch(self.names[at + 1].weight)
            writer.wait_below(room - self._footprint(at, sizes[at]))
            loaded = Loaded(self.checkpoint[name.weight], self.dtype.torch, scratch)
            for output, plans, files in zip(self.outputs, self.plans, shards, strict=True):
                planned = plans[at]
                try:
                    record = encode(loaded, planned.stored, engine=self.engine)
                except UqffError as error:
                    raise error.within(layer=name.module) from None
                layer = Layer(record, self._bias(name, planned.stored))
                writer.submit(partial(files.write, str(name.index), layer), planned.size)
                output.layers.append(
                    LayerReport(
                        name.index,
                        name.module,
                        planned.requested,
                        planned.stored,
                        loaded.shape,
                        planned.size,
                        distance(loaded.values, record),
                    )
                )
                del record, layer
            del loaded
            self.checkpoint.release(name.weight)
            done += sizes[at]
            if progress is not None:
                progress(Step(name.module, at + 1, len(self.names), done, sum(sizes)))

    def _footprint(self, at: int, weights: int) -> int:
        """Memory that making a layer takes: source, float32 copy, the largest of its outputs."""
        source = self.checkpoint.nbytes(self.names[at].weight)
        return source + 4 * weights + max(plans[at].size for plans in self.plans)

    def _bias(self, name: LayerName, stored: str) -> torch.Tensor | None:
        if name.bias not in self.checkpoint:
            return None
        return cast_bias(self.checkpoint[name.bias], stored, self.dtype.torch)

    def _write_residual(self, file: StreamedFile, name: str) -> None:
        file.write(name, self._residual_chunks(name))

    def _residual_chunks(self, name: str) -> Iterator[memoryview]:
        """The bytes of a residual tensor in its stored dtype, a tile at a time."""
        tensor = self.checkpoint[name].reshape(-1)
        stored = self.checkpoint.dtype(name)
        for start in range(0, len(tensor), TILE):
            tile = tensor[start : start + TILE]
            yield bytes_of(tile.to(self.dtype.torch) if stored in LOADED_DTYPES else tile)
            self.checkpoint.release(name, start * tensor.itemsize, (start + len(tile)) * tensor.itemsize)


def _names(checkpoint: Checkpoint, layers: Pattern | None) -> list[LayerName]:
    if layers is not None:
        return selected_layers(checkpoint.config, {name: checkpoint.shape(name) for name in checkpoint}, layers)
    names = layer_names(checkpoint.config)
    for name in names:
        if name.weight not in checkpoint:
            raise FormatError(
                "the checkpoint lacks a weight", file=str(checkpoint.path), layer=name.module, got=name.weight
            )
        if len(checkpoint.shape(name.weight)) not in (2, 3):
            shape = list(checkpoint.shape(name.weight))
            raise ShapeError("weight is no matrix", file=str(checkpoint.path), layer=name.module, got=shape)
    return names


def _load_dtype(checkpoint: Checkpoint, names: Sequence[LayerName], dtype: str) -> DType:
    """The dtype asked for, or the one that holds every layer exactly; the layers' own dtypes are checked."""
    found: Mapping[str, str] = {checkpoint.dtype(name.weight): name.module for name in reversed(names)}
    for stored, module in found.items():
        if stored not in LOADED_DTYPES:
            expected = ", ".join(LOADED_DTYPES)
            raise UnsupportedError(
                "weight cannot be quantised", layer=module, field="dtype", expected=expected, got=stored
            )
    if dtype != "auto":
        if dtype.upper() not in LOADED_DTYPES:
            raise UnsupportedError("unknown dtype", field="dtype", expected="auto, f32, f16 or bf16", got=dtype)
        return LOADED_DTYPES[dtype.upper()]
    return LOADED_DTYPES[next(iter(found))] if len(found) == 1 else DType.F32


def _residual_names(checkpoint: Checkpoint, names: Sequence[LayerName]) -> list[str]:
    """What is not a layer: the embedding too if it is the head's weight, but not a head that is not used."""
    taken = {name.bias for name in names} | {f"{name.module}.weight" for name in names}
    return [name for name in checkpoint if name not in taken and not name.endswith(UNUSED)]
