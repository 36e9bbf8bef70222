"""A model as a plain checkpoint: every layer dequantised, in the layout that Hugging Face's libraries load.

::

    model.safetensors                 or   model-00001-of-00002.safetensors, ... and model.safetensors.index.json
    config.json                       its dtype changed, without ``quantization_config``
    tokenizer.json, ...               copied

Names are those of the checkpoint: experts are apart again, or in the stacks in which the architecture has them
(:attr:`uqff.models.text.Architecture.stacks`), and the layers of 0.x have paths.  A weight has the bits of
:meth:`~uqff.families.base.QuantizedTensor.dequantize`, everything else is cast.  The directory appears when all is
written; a layer, an expert or a stack is in memory at a time, and what waits for the disk.

The head of a tied model is quantised in 0.x, 1.0 and 1.1, but the embedding beside it is not: the engines that wrote
such files compute with two matrices.  A checkpoint that is tied has one.  So the head is written as ``lm_head.weight``
and the model untied in ``config.json``: nothing is lost, and it computes the same.  ``tie`` keeps it tied, with one of
the two: mistral.rs 0.9 takes the head for both where it finds one in a 1.x file.  Where 1.2 has one layer for both, the
model stays tied.

Rows of Q and K that lie as in a GGUF file (:mod:`uqff.models.layouts`) are put in order, and the key goes.

Authority: mistral.rs v0.9.2, ``mistralrs-core/src/layers.rs`` (``embedding_with_legacy_tied_uqff``); transformers,
``modeling_utils.py`` (``save_pretrained``, ``_load_pretrained_model``); huggingface_hub,
``serialization/_base.py`` (``split_state_dict_into_shards_factory``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from uqff.checkpoints.safetensors import CONFIG_NAME, SINGLE_NAME
from uqff.codes import LOADED_DTYPES, DType
from uqff.container import UqffFile, open_uqff
from uqff.container.beside import INDEX_NAME
from uqff.container.document import write_json
from uqff.container.job import Job, Staging
from uqff.container.queue import WriteQueue
from uqff.container.shards import PathLike
from uqff.container.staging import check_target
from uqff.container.tensors import TensorWriter
from uqff.errors import ShapeError, ShardError, UnsupportedError, located
from uqff.families.base import QuantizedTensor
from uqff.models.architectures import architecture_of, embedding_name, layer_names
from uqff.models.assets import companions_of, copy_companions
from uqff.models.layouts import layout_beside, without_rope_layout
from uqff.models.modules import Module, check_complete, config_beside, modules_of
from uqff.progress import Progress, Steps
from uqff.schema.buffers import bytes_of

if TYPE_CHECKING:
    import torch

__all__ = ["SHARD_BYTES", "DequantizeJob", "Dequantized", "Tie", "dequantize_model"]

SHARD_BYTES: Final = 5 * 10**9
"""Bytes of tensors in a file of a checkpoint."""

SLACK: Final = 64 * 2**20
"""Bytes of finished tensors that may wait for the disk while the next is made."""

TILE: Final = 1 << 22
"""Elements of a plain tensor that are cast together."""

Tie = Literal["embedding", "head"]

DTYPES: Final = {"f32": DType.F32, "bf16": DType.BF16, "f16": DType.F16}


@dataclass(frozen=True)
class _PlannedPart:
    """A tensor of the checkpoint: where it comes from, and what it will be.

    Attributes:
        source: key of a layer, or name of a plain tensor.
        what: ``weight`` or ``bias`` of a layer; ``rows``, all experts; ``columns``, inputs before outputs; ``plain``.
        expert: number of the expert in a stack, None if there is none.
        dtype: as safetensors spells it.
        shape: in elements.
        under: key of a second layer, whose rows follow those of the first in each expert.
    """

    source: str
    what: str
    expert: int | None
    dtype: str
    shape: tuple[int, ...]
    under: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        itemsize = DType.of_safetensors(self.dtype)
        assert itemsize is not None
        return math.prod(self.shape) * itemsize.itemsize


@dataclass
class Dequantized:
    """What was made.

    Attributes:
        path: the directory.
        dtype: of its weights.
        files: names of the files with tensors.
        tensors: their number.
        nbytes: of the files with tensors.
        untied: whether the model was tied and is not any more.
        dropped: names of tensors that were left out: one of the two matrices of a tied model.
        overflows: how many numbers of a tensor are infinite because the dtype does not reach so far, by name.
    """

    path: Path
    dtype: str
    files: list[str] = field(default_factory=list)
    tensors: int = 0
    nbytes: int = 0
    untied: bool = False
    dropped: list[str] = field(default_factory=list)
    overflows: dict[str, int] = field(default_factory=dict)


def dequantize_model(
    source: PathLike,
    target: PathLike,
    *,
    dtype: str = "f32",
    shard_bytes: int = SHARD_BYTES,
    tie: Tie | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Dequantized:
    """Write a model as a plain checkpoint.

    Args:
        source: what :func:`uqff.open` takes: of either generation, with ``config.json`` beside it. A 1.x model without
            one is written too, as long as it has no stacked experts.
        target: the directory to make.
        dtype: ``f32``, ``bf16`` or ``f16``: of all floats.
        shard_bytes: bytes of tensors after which a new file begins.
        tie: which matrix a tied model keeps if it has two, see above; both if None.
        force: replace a checkpoint that is in ``target`` already.
        progress: called after each layer.

    Raises:
        UqffError: the model breaks a rule or lacks something; nothing has been written.
        FileExistsError: ``target`` is there and may not be replaced.
        OSError: reading or writing failed; nothing stays behind.

    >>> plain = uqff.dequantize_model("model", "plain", dtype="bf16")
    >>> plain.dtype, plain.files
    ('bfloat16', ['model.safetensors'])
    """
    if dtype not in DTYPES:
        raise UnsupportedError("unknown dtype", field="dtype", expected=", ".join(DTYPES), got=dtype)
    check_target(Path(target), force=force, what="checkpoint")
    with open_uqff(source) as file:
        return DequantizeJob(file, DTYPES[dtype], tie, shard_bytes).run(target, force=force, progress=progress)


class DequantizeJob(Job[Dequantized]):
    """The plain checkpoint of an open model; see :func:`dequantize_model`."""

    MAKES = "checkpoint"

    def __init__(self, file: UqffFile, dtype: DType, tie: Tie | None, shard_bytes: int = SHARD_BYTES) -> None:
        companions_of(file.paths[0].parent, leave=[CONFIG_NAME])
        self.shard_bytes = shard_bytes
        self.file = file
        self.dtype = dtype
        self.config = config_beside(file)
        self.layout = layout_beside(file).check(str(file.paths[0].parent / CONFIG_NAME))
        self.result = Dequantized(Path(), dtype.torch_name)
        self.parts: dict[str, _PlannedPart] = {}
        self.weights: dict[str, int] = {}
        self._tied: bool | None = None
        known = self._is_known()
        self._turns = known and architecture_of(self.config or {}).takes_turns
        self._stacks = architecture_of(self.config or {}).stacks if known else ""
        modules = modules_of(file, self.config if known else None)
        if known:
            assert self.config is not None
            modules = self._settle_head(modules, self.config, tie)
            check_complete(file, self.config, modules)
        for module in modules:
            self._plan_module(module)
        for name in file.residual:
            if name not in self.result.dropped:
                self._plan_plain(name)

    def _is_known(self) -> bool:
        """Whether the architecture is; 0.x layers have no names otherwise."""
        with located(file=self.file.paths[0].parent / CONFIG_NAME):
            try:
                architecture_of(self.config or {})
            except UnsupportedError:
                if self.file.generation == "0.x":
                    raise
                return False
        return True

    def _settle_head(self, modules: list[Module], config: Mapping[str, Any], tie: Tie | None) -> list[Module]:
        """A tied model with a head of its own is untied, or loses one of the two matrices."""
        head, embedding = layer_names(config)[0], embedding_name(config)
        if head.weight != f"{embedding}.weight" or not any(module.path == head.module for module in modules):
            return modules
        self._tied = tie is not None
        self.result.untied = tie is None
        if tie is None:
            return modules
        dropped = embedding if tie == "head" else head.module
        self.result.dropped.append(f"{dropped}.weight")
        kept = [module for module in modules if module.path != dropped]
        if tie == "embedding":
            return kept
        part = replace(head, module=embedding)
        return [Module(embedding, m.keys, (part,)) if m.path == head.module else m for m in kept]

    def _plan_module(self, module: Module) -> None:
        for at, key in enumerate(module.keys):
            record, fields = self.file.fields(key)
            shape, bias = record.parse(fields).shape, fields["bias"]
            self.weights[key] = math.prod(shape)
            joined = not self._turns and [part.expert for part in module.parts] == [None]  # in checkpoints, too
            if len(shape) < 3 or joined:
                name = module.parts[at].module if module.parts else module.path
                self._plan(key, f"{name}.weight", "weight", None, shape)
                if bias is not None:
                    self._plan(key, f"{name}.bias", "bias", None, tuple(bias["shape"]))
                continue
            if self._turns:  # gpt-oss': plain checkpoints have them so, without ``.weight``
                self._plan(key, module.path, "columns", None, (shape[0], *shape[:0:-1]))
                if bias is not None:
                    self._plan(key, f"{module.path}_bias", "bias", None, tuple(bias["shape"]))
                continue
            if len(module.keys) > 1 or len(module.parts) != shape[0]:
                names = f"{len(module.parts)} experts" if module.parts else "a matrix: the experts have no known names"
                raise ShapeError("stack does not fit", layer=key, expected=names, got=list(shape))
            if self._stacks:
                self._plan_stack(key, shape, biased=bias is not None)
                continue
            for expert, part in enumerate(module.parts):
                self._plan(key, f"{part.module}.weight", "weight", expert, shape[1:])
                if bias is not None:
                    self._plan(key, f"{part.module}.bias", "bias", expert, shape[1:-1])

    def _plan_stack(self, key: str, shape: tuple[int, ...], *, biased: bool) -> None:
        """Experts as the architecture has them: gates and ups make one tensor."""
        if biased:
            raise UnsupportedError("checkpoints have no biases of these experts", layer=key, field="bias")
        path, _, projection = key.rpartition(".")
        if projection == "up_proj":
            return  # planned with the gates
        experts, rows, columns = shape
        under = None
        if projection == "gate_proj":
            under = f"{path}.up_proj"
            record, fields = self.file.fields(under)
            if record.parse(fields).shape != shape:
                raise ShapeError("gates and ups differ", layer=under, expected=shape, got=record.parse(fields).shape)
            rows, projection = 2 * rows, "gate_up_proj"
        stacked = (experts, rows, columns) if self._stacks == "rows" else (experts, columns, rows)
        self._plan(key, f"{path}.{projection}", self._stacks, None, stacked, under)

    def _plan(
        self, key: str, name: str, what: str, expert: int | None, shape: tuple[int, ...], under: str | None = None
    ) -> None:
        if name in self.parts or (name in self.file.residual and name not in self.result.dropped):
            where = str(self.file.paths[0])
            raise ShardError("tensor is a layer and in the residual", file=where, layer=key, got=name)
        self.parts[name] = _PlannedPart(key, what, expert, self.dtype.safetensors, shape, under)

    def _plan_plain(self, name: str) -> None:
        entry = self.file.residual.entry(name)
        if DType.of_safetensors(entry.dtype) is None:
            raise UnsupportedError("dtype cannot be copied", file="residual.safetensors", field=name, got=entry.dtype)
        stored = self.dtype.safetensors if entry.dtype in LOADED_DTYPES else entry.dtype
        self.parts[name] = _PlannedPart(name, "plain", None, stored, entry.shape)

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(part.nbytes for part in self.parts.values())

    def write(self, stage: Staging, progress: Progress | None) -> Dequantized:
        """Write everything into a directory."""
        directory = stage.directory
        shards = _shards({name: part.nbytes for name, part in self.parts.items()}, self.shard_bytes)
        with WriteQueue() as queue:
            files: dict[str, TensorWriter] = {}
            for file_name, names in shards.items():
                planned = [(name, self.parts[name].dtype, self.parts[name].shape) for name in names]
                file = queue.own(TensorWriter(directory / file_name, planned, {"format": "pt"}))
                files.update(dict.fromkeys(names, file))
                self.result.nbytes += file.nbytes
            self._write_all(queue, files, progress)
            queue.join()
            for file in dict.fromkeys(files.values()):
                file.finish()
        if len(shards) > 1:
            write_json(directory / INDEX_NAME, self._index(shards))
        if self.config is not None:
            write_json(directory / CONFIG_NAME, _plain_config(self.config, self.dtype, self._tied))
        copy_companions(self.file.paths[0].parent, directory, leave=[CONFIG_NAME])
        self.result.path, self.result.files, self.result.tensors = stage.target, list(shards), len(self.parts)
        return self.result

    def _write_all(self, queue: WriteQueue, files: Mapping[str, TensorWriter], progress: Progress | None) -> None:
        by_key: dict[str, list[str]] = {}
        for name, part in self.parts.items():
            if part.what == "plain":
                queue.submit(partial(files[name].write, name, self._plain(name)), 0)
            else:
                by_key.setdefault(part.source, []).append(name)
        under = {part.source: part.under for part in self.parts.values() if part.under is not None}
        for key, other in under.items():
            self.weights[key] += self.weights.pop(other)
        weights = sum(self.weights[key] for key in by_key)
        steps = Steps(progress, "dequantize", len(by_key), weights, "weights")
        for key, names in by_key.items():
            for name in names:
                queue.wait_below(SLACK)
                tensor = self._made(name, self.parts[name])
                queue.submit(partial(files[name].write, name, [bytes_of(tensor)]), tensor.nbytes)
                del tensor
            self.file.release(key)
            if key in under:
                self.file.release(under[key])
            steps.add(names[0].removesuffix(".weight").removesuffix(".bias"), self.weights[key])

    def _made(self, name: str, part: _PlannedPart) -> torch.Tensor:
        layer = self.file[part.source]
        if part.what in ("rows", "columns"):
            stack = layer.weight.dequantize()
            if part.under is not None:
                experts, rows, columns = stack.shape
                joined = stack.new_empty(experts, 2 * rows, columns)
                joined[:, :rows], joined[:, rows:] = stack, self.file[part.under].weight.dequantize()
                stack = joined
            return self._cast(name, stack.transpose(1, 2) if part.what == "columns" else stack).contiguous()
        tensor = _dequantized(layer.weight, part.expert, self.dtype) if part.what == "weight" else layer.bias
        assert tensor is not None
        tensor = self._in_order(name, tensor)
        if part.what == "bias":
            own = part.expert is not None and tensor.ndim == len(layer.weight.shape) - 1
            tensor = self._cast(name, tensor[part.expert] if own and part.expert is not None else tensor)
        elif self.dtype is DType.F16:
            self._count_overflow(
                name, tensor, lambda: self._in_order(name, _dequantized(layer.weight, part.expert, DType.F32))
            )
        return tensor

    def _in_order(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of a weight, or of a bias, as a checkpoint has them."""
        order = self.layout.order_of(name.rpartition(".")[0], tensor.shape[0])
        return tensor if order is None else tensor[order]

    def _plain(self, name: str) -> Iterator[memoryview]:
        tensor = self.file.residual[name]
        if tensor.ndim:
            tensor = self._in_order(name, tensor)
        tensor = tensor.reshape(-1)
        for start in range(0, len(tensor), TILE):
            tile = tensor[start : start + TILE]
            yield bytes_of(self._cast(name, tile) if self.parts[name].dtype == self.dtype.safetensors else tile)
            self.file.residual.release(name)

    def _cast(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        made = tensor.to(self.dtype.torch)
        if self.dtype is DType.F16:
            self._count_overflow(name, made, lambda: tensor)
        return made

    def _count_overflow(self, name: str, made: torch.Tensor, true: Any) -> None:
        infinite = made.isinf()
        if infinite.any():
            count = int((infinite & true().isfinite()).sum())
            if count:
                self.result.overflows[name] = self.result.overflows.get(name, 0) + count

    def _index(self, shards: Mapping[str, list[str]]) -> dict[str, Any]:
        weight_map = {name: file for file, names in shards.items() for name in names}
        return {
            "metadata": {"total_size": sum(part.nbytes for part in self.parts.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }


def _dequantized(weight: QuantizedTensor, expert: int | None, dtype: DType) -> torch.Tensor:
    if expert is None:
        return weight.dequantize(dtype.torch)
    return weight.dequantize_expert(expert, dtype.torch)


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> dict[str, list[str]]:
    """File names, and the tensors of each, in the order given."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    return {f"model-{at:05d}-of-{len(groups):05d}.safetensors": names for at, names in enumerate(groups, 1)}


def _plain_config(config: Mapping[str, Any], dtype: DType, tied: bool | None) -> dict[str, Any]:
    """The configuration of the plain model; that of the text part of a larger one is changed alike.

    Args:
        config: of the model.
        dtype: of the weights.
        tied: whether head and embedding are one matrix; None to leave it as it is.
    """
    changed = {key: value for key, value in without_rope_layout(config).items() if key != "quantization_config"}
    nested = [name for name, value in changed.items() if name == "text_config" and isinstance(value, dict)]
    for name in nested:
        changed[name] = _plain_config(changed[name], dtype, tied)
    stated = [key for key in ("dtype", "torch_dtype") if key in changed]
    for key in stated or ["torch_dtype"]:
        changed[key] = dtype.torch_name
    if tied is not None:
        changed["tie_word_embeddings"] = tied
    return changed
