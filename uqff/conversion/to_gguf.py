"""A UQFF model of either generation to a GGUF file: every block carried over, nothing quantised again.

GGUF layers keep their blocks, Unquant layers their numbers; biases and norms become float32, as GGUF has them, which
holds every float16 and bfloat16.  All other families have no type in GGUF and are refused.  The rows of Q and K of
Llama and Mistral are interleaved, whole (:mod:`uqff.checkpoints.gguf.names`), unless they are
already (:mod:`uqff.models.layouts`).

A tied model of 1.2 has its embedding once, and so has the GGUF file.  In 0.x and before 1.2 a tied model has a
quantised ``lm_head`` and a dense embedding; if the latter is just what the blocks of the former stand for, as it is in
files that were made from GGUF, one tensor of blocks remains, else the GGUF file gets both.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from uqff.checkpoints.gguf.blocks import stored_blocks, stored_type
from uqff.checkpoints.gguf.latent import WHOLE, apart, latent_names, latent_shapes
from uqff.checkpoints.gguf.metadata import active_window, metadata_of
from uqff.checkpoints.gguf.names import (
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    PlainTensor,
    architecture_of_config,
    columns_of,
    gguf_names,
    heads_of,
    joined_of,
    order_of,
    plain_tensors,
    shape_of,
)
from uqff.checkpoints.gguf.rope import Factors, llama3_factors, longrope_factors, rope_scaling_of
from uqff.codec.layer import Layer
from uqff.codec.turns import split_gate_up
from uqff.codes import LOADED_DTYPES, DType
from uqff.container.file import UqffFile, open_uqff
from uqff.container.shards import PathLike
from uqff.conversion.kept import kept_architecture, kept_factors, kept_numbers, made_metadata, with_kept
from uqff.conversion.result import Conversion
from uqff.errors import FormatError, ShapeError, UnsupportedError, located
from uqff.families.base import QuantizedTensor
from uqff.families.gguf.blocks import BlockType, block_type_of_kind
from uqff.families.part import Part
from uqff.families.rows import Order, reordered, reordered_bias, reordered_columns
from uqff.families.unquant.tensor import Unquant
from uqff.gguf.schema import VERSION
from uqff.gguf.types import ggml_type
from uqff.gguf.writer import PlannedTensor, write_gguf
from uqff.models.architectures import EntryName, LayerName, embedding_name, entry_names, layer_names
from uqff.models.assets import CONFIG_NAME
from uqff.models.config import read_config
from uqff.models.layouts import WeightLayout, adjacent_order, half_split_order
from uqff.progress import Progress
from uqff.quantization.bias import widened_bias
from uqff.quantization.plan import UNUSED
from uqff.schema.entries import FIRST

__all__ = ["ToGgufJob", "gguf_of_uqff"]

TILE: Final = 1 << 22
"""Numbers that are widened or compared together."""


def gguf_of_uqff(
    source: PathLike,
    target: PathLike,
    *,
    assets: PathLike | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a UQFF model to a GGUF file.

    Args:
        source: whatever :func:`uqff.open` takes; the residual is found beside it.
        target: the file to make.
        assets: directory with ``config.json`` and tokenizer, if not that of the source.
        force: replace a file that is there.
        progress: called after each tensor.

    Raises:
        UnsupportedError: an architecture, a rope scaling or layers that GGUF cannot hold; all of the latter are listed.
        FormatError: the source breaks a rule, or is not the model of its configuration.
        FileExistsError: ``target`` is there.
        OSError: reading or writing failed; nothing stays behind.
    """
    _check_target(Path(target), force=force)
    with open_uqff(source) as file:
        directory = file.paths[0].parent if assets is None else Path(assets)
        config = read_config(directory / CONFIG_NAME)
        with located(file=file.paths[0]):
            job = ToGgufJob(file, config, directory)
        return job.run(target, force=force, progress=progress)


def _check_target(target: Path, *, force: bool) -> None:
    is_file = target.is_file() and not target.is_symlink()
    if target.is_symlink() or (target.exists() and not (force and is_file)):
        raise FileExistsError(
            f"exists: {target}; --force replaces it" if is_file else f"exists and is not a file: {target}"
        )


class ToGgufJob:
    """The conversion of an open model, a :class:`~uqff.container.job.Job` of one file; see :func:`gguf_of_uqff`."""

    def __init__(self, file: UqffFile, config: dict[str, Any], directory: Path) -> None:
        self.file = file
        self.config = dict(config)
        if config.get("num_key_value_heads") is None:
            self.config["num_key_value_heads"] = config.get("num_attention_heads")
        self.layout = WeightLayout.of(config).check(str(directory / CONFIG_NAME))
        self.architecture = architecture_of_config(config, kept_architecture(file.paths[0].parent))
        self.notes: list[str] = []
        metadata_of(self.config, self.architecture, str(directory / CONFIG_NAME))  # refused before a layer is read
        self.plain = list(plain_tensors(self.architecture, self.config))
        self.names = self._layer_names()
        self._check_layers()
        self._check_residual()
        self.absorbed = self._is_absorbed()
        self.kept = kept_numbers(file.paths[0].parent)
        self.tensors = list(self._tensors())
        sizes = [(tensor.type, tensor.nbytes) for tensor in self.tensors]
        made = made_metadata(directory, self.config, self.architecture, sizes, absorbed=self.absorbed)
        self.pairs, missing = with_kept(file.paths[0].parent, made)
        self.notes += missing
        window = active_window(self.config)
        if window is not None:
            self.notes.append(window)
        if file.extra:
            self.notes.append(f"{len(file.extra)} entries that belong to no layer are left out")

    def run(self, target: PathLike, *, force: bool = False, progress: Progress | None = None) -> Conversion:
        """Make the file.

        Raises:
            FileExistsError: ``target`` is there.
            OSError: reading or writing failed; nothing stays behind.
        """
        target = Path(target)
        _check_target(target, force=force)
        nbytes = write_gguf(target, self.pairs, self.tensors, progress)
        types = Counter(_type_name(tensor.type) for tensor in self.tensors)
        return Conversion(target, f"GGUF {VERSION}", (target.name,), types, nbytes, (), tuple(self.notes))

    def _layer_names(self) -> dict[str, LayerName]:
        """Key in the source to layer; all must be there, and no others."""
        if self.file.version >= FIRST:
            names = {entry.key: _named(entry) for entry in entry_names(self.config, self.file.version)}
        elif self.architecture.expert_count:
            raise UnsupportedError(
                "experts of files before 1.0 are not converted", expected="version 1.0 or later (uqff migrate)"
            )
        else:
            names = {str(name.index): name for name in layer_names(self.config)}
        missing = [key for key in names if key not in self.file]
        superfluous = [key for key in self.file if key not in names]
        if missing or superfluous:
            raise FormatError(
                "not the layers of the configuration",
                layer=(missing or superfluous)[0],
                expected=f"{len(names)} layers",
                got=f"{len(missing)} missing, {len(superfluous)} superfluous of {len(self.file)}",
            )
        return names

    def _check_layers(self) -> None:
        """All that GGUF cannot hold, at once."""
        refused, across = [], []
        for key, name in self.names.items():
            weight = self.file[key].weight
            self._check_shape(f"{name.module}.weight", weight.shape)
            block_type, runs = _block_type(weight), columns_of(name.module, self.architecture, self.config)
            if block_type is None:
                refused.append(f"{name.module} ({weight.kind})")
            elif runs is not None and not runs.fits(block_type.block_size):
                across.append(f"{name.module} ({weight.kind})")
        for layers, problem in (
            (refused, "of types that GGUF does not have"),
            (across, "whose blocks run across value heads, which GGUF has in another order"),
        ):
            if layers:
                more = f", and {len(layers) - 10} more" if len(layers) > 10 else ""
                raise UnsupportedError(f"{len(layers)} layers {problem}", got=", ".join(layers[:10]) + more)

    def _check_residual(self) -> None:
        names = [
            each.name
            for each in self.plain
            if self._of_layer(each) is None and (not each.optional or each.name in self.file.residual)
        ]
        embedding = f"{embedding_name(self.config)}.weight"
        if self._embedding_is_residual():
            names.append(embedding)
        for name in names:
            if name not in self.file.residual:
                raise FormatError("the residual lacks a tensor", field=name, got="no such tensor")
            self._check_shape(name, self.file.residual.entry(name).shape)
        left = [name for name in self.file.residual if name not in names and not name.endswith(UNUSED)]
        if left:
            raise UnsupportedError(
                "tensors of the residual that GGUF does not have", field=left[0], got=", ".join(left[:20])
            )

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        expected = shape_of(name, self.config)
        if shape != expected:
            raise ShapeError(
                "tensor does not fit the configuration", field=name, expected=list(expected), got=list(shape)
            )

    def _embedding_is_residual(self) -> bool:
        return not any(name.module == embedding_name(self.config) for name in self.names.values())

    def _tensors(self) -> Iterable[PlannedTensor]:
        """In the order of the model: embedding, blocks, norm, head."""
        embedding = embedding_name(self.config)
        by_module = {name.module: (key, name) for key, name in self.names.items()}
        head = by_module.pop("lm_head", None)
        if embedding in by_module:
            yield from self._layer(*by_module.pop(embedding))
        elif head is not None and head[1].weight == f"{embedding}.weight" and self._stands_for_embedding(head[0]):
            yield self._weight(head[0], "token_embd.weight", head[1].module)
            head = None
        else:
            yield _dense("token_embd.weight", self._residual(f"{embedding}.weight"))
        for block in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{block}."
            for module, (key, name) in by_module.items():
                if module.startswith(prefix):
                    yield from self._layer(key, name)
        for each in self.plain:
            bias = self._of_layer(each)
            if bias is not None or each.name in self.file.residual:
                yield from self._plain(each, bias)
        if head is not None:
            yield from self._layer(*head)
        yield from self._scaling()

    def _scaling(self) -> Iterable[PlannedTensor]:
        """What a rope scaling divides frequencies by, where that is tensors."""
        scaling = rope_scaling_of(self.config)
        kind = None if scaling is None else scaling.get("rope_type", scaling.get("type"))
        if scaling is not None and kind == "llama3":
            made = self._rope_factors(scaling)
            yield _dense(ROPE_FACTORS, Part.of_array(kept_factors(self.file.paths[0].parent, made), DType.F32))
        elif scaling is not None and kind == "longrope":
            rotated = dict(metadata_of(self.config, self.architecture, CONFIG_NAME))
            pairs = rotated[f"{self.architecture.name}.rope.dimension_count"].value // 2
            for name, key in ((LONG_FACTORS, "long_factor"), (SHORT_FACTORS, "short_factor")):
                yield _dense(name, Part.of_array(longrope_factors(scaling, key, pairs), DType.F32))

    def _rope_factors(self, scaling: Mapping[str, Any]) -> Factors:
        pairs = {key: value.value for key, value in metadata_of(self.config, self.architecture, CONFIG_NAME)}
        return llama3_factors(scaling, pairs["llama.rope.freq_base"], pairs["llama.rope.dimension_count"])

    def _layer(self, key: str, name: LayerName) -> Iterable[PlannedTensor]:
        path, *others = gguf_names(name.module, self.architecture)
        if self.absorbed and path.endswith(f".{WHOLE}"):
            yield from self._transposed(key, f"{path}.weight")
            return
        if others:
            yield from self._apart(key, name.module, (path, *others))
            return
        yield self._weight(key, f"{path}.weight", name.module)
        bias = self.file[key].bias_part
        if bias is not None and not any(each.name == f"{name.module}_bias" for each in self.plain):
            wide, order = Part.of_array(widened_bias(bias), DType.F32), self._order(name.module, bias.shape[0])
            yield _dense(f"{path}.bias", wide if order is None else reordered_bias(wide, order))

    def _order(self, module: str, rows: int) -> Order | None:
        """The order that makes a module's rows, as they are here, those of a GGUF file; None if they are."""
        order = order_of(module, self.architecture, self.config)
        if order is not None:
            return np.argsort(order)
        here, there = self.layout.heads_of(module), heads_of(self.architecture, self.config, module)
        if here == there:
            return None
        if there is not None:
            return adjacent_order(rows, there)
        assert here is not None
        return half_split_order(rows, here)

    def _weight(self, key: str, name: str, module: str) -> PlannedTensor:
        weight = self.file[key].weight
        block_type = _block_type(weight)
        assert block_type is not None
        order = self._order(module, weight.shape[0])
        runs = columns_of(module, self.architecture, self.config)
        chunks = partial(self._blocks, key, order, None if runs is None else np.argsort(runs.order))
        return PlannedTensor(name, weight.shape, block_type.code, weight.nbytes, chunks)

    def _blocks(self, key: str, order: Order | None, runs: Order | None) -> Iterable[memoryview]:
        weight = self.file[key].weight
        weight = weight if order is None else reordered(weight, order)
        yield stored_blocks(weight if runs is None else reordered_columns(weight, runs)).payload

    def _is_absorbed(self) -> bool:
        """Whether the keys of DeepSeek's attention are transposed, as llama.cpp's converter does it: if none is in
        blocks, which run along rows.
        """
        stored = [_block_type(self.file[key].weight) for key, name in self.names.items() if "kv_b_proj" in name.module]
        return self.architecture.latent and all(each is not None and each.block_size == 1 for each in stored)

    def _transposed(self, key: str, name: str) -> Iterable[PlannedTensor]:
        """Keys and values of DeepSeek's attention, the former transposed."""
        block_type = _block_type(self.file[key].weight)
        assert block_type is not None
        size = block_type.type_size

        def chunks(at: int) -> Iterable[memoryview]:
            yield apart(stored_blocks(self.file[key].weight), size, self.config)[at].payload

        stored = zip(latent_names(name), latent_shapes(self.config), strict=True)
        for at, (each, shape) in enumerate(stored):
            yield PlannedTensor(each, shape, block_type.code, math.prod(shape) * size, partial(chunks, at))

    def _apart(self, key: str, module: str, paths: Sequence[str]) -> Iterable[PlannedTensor]:
        """The matrices that a layer is in GGUF: rows in turns, or one after the other."""
        weight, joined = self.file[key].weight, joined_of(module, self.architecture)
        block_type = _block_type(weight)
        assert block_type is not None
        assert joined is not None
        *outer, rows, columns = weight.shape
        counts = joined.rows_of(rows, self.config)
        starts = [sum(counts[:at]) for at in range(len(counts))]
        order = None if joined.order is None else np.argsort(joined.order(self.config))

        def blocks(at: int) -> Iterable[memoryview]:
            weight = self.file[key].weight
            if joined.turns:
                part = split_gate_up(Layer(weight))[at].weight
            else:
                whole = weight if order is None else reordered(weight, order)
                part = whole.narrow(len(outer), starts[at], counts[at])
            yield stored_blocks(part).payload

        for at, (path, count) in enumerate(zip(paths, counts, strict=True)):
            size = weight.nbytes // rows * count
            yield PlannedTensor(f"{path}.weight", (*outer, count, columns), block_type.code, size, partial(blocks, at))

    def _residual(self, name: str) -> Part:
        """A tensor of the residual."""
        entry = self.file.residual.entry(name)
        dtype = DType.of_safetensors(entry.dtype)
        if dtype is None:
            raise UnsupportedError("dtype that GGUF does not have", field=name, got=entry.dtype)
        return Part(dtype, entry.shape, self.file.residual.raw(name))

    def _of_layer(self, tensor: PlainTensor) -> Part | None:
        """What a layer has of a tensor: the biases of gpt-oss' experts, which older files have in the residual."""
        key = tensor.name.removesuffix("_bias")
        return self.file[key].bias_part if key != tensor.name and key in self.names else None

    def _plain(self, tensor: PlainTensor, bias: Part | None) -> Iterable[PlannedTensor]:
        """A tensor of the residual, or a bias, as GGUF has it, float32."""
        stored = self._residual(tensor.name) if bias is None else bias
        numbers = widened_bias(stored)
        made = tensor.form.to_file(numbers, tensor.form.shapes(numbers.shape, self.config), self.config)
        kept = tuple(self.kept[name] for name in tensor.stored if name in self.kept)
        if [each.shape for each in kept] == [each.shape for each in made]:
            again = Part.of_array(tensor.form.to_model(kept, numbers.shape, self.config), DType.F32)
            made = kept if Unquant.of(again).numbers(stored.dtype).same_as(stored) else made
        for name, each in zip(tensor.stored, made, strict=True):
            yield _dense(name, Part.of_array(np.ascontiguousarray(each), DType.F32))

    def _stands_for_embedding(self, key: str) -> bool:
        """Whether the dense embedding is what the blocks of a layer dequantise to."""
        dense, record = self._residual(f"{embedding_name(self.config)}.weight"), self.file[key].weight
        if dense.shape != record.shape or record.ggml is None or dense.dtype.name not in LOADED_DTYPES:
            return False
        rows = max(1, TILE // record.shape[-1])
        for start in range(0, dense.shape[0], rows):
            count = min(rows, dense.shape[0] - start)
            if not record.narrow(0, start, count).numbers(dense.dtype).same_as(dense.narrow(0, start, count)):
                return False
        return True


def _named(entry: EntryName) -> LayerName:
    """The name of a layer of 1.x; of stacked experts, that of the stack."""
    first = entry.parts[0]
    return replace(first, module=entry.key, weight=f"{entry.key}.weight") if entry.is_stacked else first


def _block_type(weight: QuantizedTensor) -> BlockType | None:
    """The type of a weight in GGUF, None if there is none."""
    return stored_type(weight) if len(weight.shape) in (2, 3) else None


def _type_name(code: int) -> str:
    block_type = ggml_type(code)
    assert block_type is not None
    return block_type.kind


def _dense(name: str, part: Part) -> PlannedTensor:
    """A tensor of plain numbers in its own dtype."""
    block_type = block_type_of_kind(part.dtype.name.lower())
    if block_type is None:
        raise UnsupportedError("dtype that GGUF does not have", field=name, got=part.dtype.name)
    chunks: Callable[[], Iterable[Any]] = lambda: [part.payload]  # noqa: E731
    return PlannedTensor(name, part.shape, block_type.code, part.nbytes, chunks)
