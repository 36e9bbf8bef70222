"""A GGUF file to a UQFF model directory: every block carried over, nothing quantised again.

===================  ==============================================  =============================================
GGUF                 1.2                                             0.2
===================  ==============================================  =============================================
matrices of blocks   GGUF layers, the same blocks                    the same
F32, F16, BF16       GGUF layers of these types                      Unquant layers, widened if the load dtype is F32
``output`` absent    no ``lm_head``                                  ``lm_head`` is a copy of the embedding's blocks
``token_embd``       the layer ``model.embed_tokens``                dequantised, in the residual
other blocks         what is asked for, else refused; MXFP4 layers   the same
norms                residual, load dtype                            the same
biases               with their layer, float32                       the same
===================  ==============================================  =============================================

mistral.rs 0.9 runs GGUF layers of plain numbers whatever the activations are, but F32 ones with F32 only; Unquant
layers with activations of their dtype only. 0.6 knows the latter only.

The rows of Q and K of ``llama`` files go back into the model's order, whole (:mod:`uqff.checkpoints.gguf.names`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from uqff.checkpoints.foreign import ForeignTensor
from uqff.checkpoints.gguf.blocks import planned_record
from uqff.checkpoints.gguf.files import GgufTensors
from uqff.checkpoints.gguf.metadata import active_window
from uqff.codec.layer import Layer
from uqff.codes import LOADED_DTYPES, DType, Version
from uqff.container.file import RESIDUAL_NAME, open_uqff
from uqff.container.job import Job, Staging
from uqff.container.plan import SHARD_BYTES, metadata_of, plan_files
from uqff.container.report import REPORT_NAME, build_report, write_report
from uqff.container.shards import PathLike, shard_names
from uqff.container.tensors import TensorWriter
from uqff.container.writer import LayerWriter
from uqff.conversion.kept import Made, keep_metadata, made_metadata
from uqff.conversion.result import Conversion
from uqff.errors import UnsupportedError, UqffError, located
from uqff.families import PLAIN_KIND
from uqff.families.base import QuantizedTensor
from uqff.families.loaded import Loaded
from uqff.families.part import Part
from uqff.families.unquant.tensor import Unquant
from uqff.gguf.reader import GgufFile, open_gguf
from uqff.models.architectures import embedding_name
from uqff.models.assets import CONFIG_NAME
from uqff.models.config import config_to_write, read_config, restated, with_method
from uqff.models.engine import limits_of, refuse_limits
from uqff.models.layouts import without_rope_layout
from uqff.progress import Progress, Steps
from uqff.quantization.keep import record_of_goal
from uqff.quantization.plan import Goal, plan_model, residual_names
from uqff.quantization.types import encode, kind_name, planned, resolve
from uqff.schema.entries import FIRST
from uqff.simd.floats import Floats

__all__ = ["WRITTEN", "FromGgufJob", "uqff_of_gguf"]

WRITTEN: Final = ("1.2", "0.2")
"""The versions of :data:`uqff.codes.FORMATS` that can be written."""

TILE: Final = 1 << 22
"""Weights that are dequantised and written together."""


def uqff_of_gguf(
    source: PathLike,
    target: PathLike,
    *,
    version: str | tuple[int, int, int] = "1.2",
    assets: PathLike | None = None,
    mmproj: PathLike | None = None,
    dtype: str = "f32",
    requantize: str | int | None = None,
    strict: bool = False,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a GGUF file to a UQFF model directory.

    Args:
        source: the file, or one of a split set.
        target: the directory to make. Its ``.uqff`` files are named after the type that most weights have.
        version: of UQFF, ``1.2`` or ``0.2``.
        assets: a directory with the model's own ``config.json`` and tokenizer, which are compared with the file and
            copied. Without it, they are made from the file's metadata as far as that goes.
        mmproj: the part of the model that sees, see :func:`uqff.open_checkpoint`.
        dtype: of the residual: ``f32`` (what GGUF files have), ``f16`` or ``bf16``, to which it is rounded.
        requantize: what layers become whose types UQFF does not have, such as IQ4_XS: they are dequantised in float32,
            and quantised anew. None: they are refused. MXFP4 needs none of it.
        strict: refuse what the engine could not load or run, see :mod:`uqff.models.engine`; else it is in the notes.
        force: replace a model that is in ``target`` already.
        shard_bytes: payload after which a new shard begins.
        progress: called after each layer.

    Raises:
        FormatError: the file breaks a rule, lacks a tensor, or is not the model of ``assets``.
        UnsupportedError: an architecture, a type or a rope scaling that cannot be carried over.
        FileExistsError: ``target`` is there and may not be replaced.
        OSError: reading or writing failed; nothing stays behind.
    """
    wanted = Version.of(version)
    if wanted not in map(Version.of, WRITTEN):
        raise UnsupportedError("unknown version", field="version", expected=", ".join(WRITTEN), got=version)
    if dtype.upper() not in LOADED_DTYPES:
        raise UnsupportedError("unknown dtype", field="dtype", expected="f32, f16 or bf16", got=dtype)
    kind = None if requantize is None else kind_name(requantize)
    with open_gguf(source) as file, located(file=file.paths[0]), ExitStack() as stack:
        _check_types(file, kind)
        tensors = stack.enter_context(GgufTensors(file, None if assets is None else Path(assets), mmproj))
        if tensors.vision is not None:
            _check_types(tensors.vision.file, kind)
        across = [name for name in tensors if tensors.is_across(name)]
        if across and kind is None:
            raise UnsupportedError(
                f"the blocks of {len(across)} layers {tensors.why_across(across[0])}",
                field=across[0],
                expected="another type for them (--requantize KIND)",
                got=tensors.type_names(across[0]),
            )
        job = FromGgufJob(tensors, wanted, LOADED_DTYPES[dtype.upper()], shard_bytes, kind)
        if strict:
            refuse_limits(job.limits)
        return job.run(target, force=force, progress=progress)


class FromGgufJob(Job[Conversion]):
    """The conversion of a GGUF file; see :func:`uqff_of_gguf`."""

    def __init__(
        self,
        tensors: GgufTensors,
        version: Version,
        dtype: DType,
        shard_bytes: int = SHARD_BYTES,
        requantize: str | None = None,
    ) -> None:
        self.tensors = tensors
        self.version = version
        self.dtype = dtype
        self.requantize = requantize
        self.notes: list[str] = list(tensors.notes)
        self.goals = plan_model(tensors, version, None, promote=False)
        self.residual = residual_names(tensors, self.goals)
        self._last: dict[str, QuantizedTensor] = {}
        self.metas = {goal.key: self._meta(goal) for goal in self.goals}
        self.plan = plan_files(self.metas, version, shard_bytes)
        self.limits = limits_of(self.metas, version)

    def _record(self, goal: Goal, *, planned: bool = False) -> QuantizedTensor:
        """The weight as the file has it, its rows in the model's order."""
        names = dict.fromkeys(source.tensor for source in goal.sources)
        if planned:
            return record_of_goal(goal, {name: self.tensors.meta(name) for name in names})
        if self._last.keys() != names.keys():  # experts of one tensor follow each other
            self._last = {name: self.tensors.record(name) for name in names}
        return record_of_goal(goal, self._last)

    def _is_remade(self, goal: Goal, meta: QuantizedTensor) -> bool:
        """Whether only the numbers of a weight can be had."""
        return isinstance(meta, ForeignTensor) or any(self.tensors.is_across(each.tensor) for each in goal.sources)

    def _as(self, goal: Goal, meta: QuantizedTensor) -> str | None:
        """The type that a weight's numbers are stored as; None if what is stored is what the file has."""
        if self._is_remade(goal, meta):
            assert self.requantize is not None
            return resolve(self.requantize, meta.shape, version=self.version).kind
        return None if self.version >= FIRST or meta.plain is None else PLAIN_KIND

    def _plain_dtype(self, meta: QuantizedTensor) -> DType:
        """That of the plain numbers of a layer: 0.x has Unquant layers in place of a matrix of plain numbers."""
        return self.dtype if meta.plain is None or self.dtype is DType.F32 else meta.plain.dtype

    def _bias_dtype(self, goal: Goal, meta: QuantizedTensor) -> DType:
        """F32, as in the file, beside blocks that both have; else the load dtype."""
        return DType.F32 if self._as(goal, meta) is None and meta.ggml is not None else self.dtype

    def _layer(self, goal: Goal) -> Layer:
        """A layer as the model has it: rows of Q and K in the model's order."""
        record = self._record(goal)
        kind = self._as(goal, record)
        bias = None if goal.bias is None else self.tensors.numbers(goal.bias, self._bias_dtype(goal, record))
        if kind == PLAIN_KIND:
            return Layer(Unquant.of(record.numbers(self._plain_dtype(record))), bias)
        if kind is not None:
            numbers = Floats.of_bytes(record.numbers().data, DType.F32, record.shape)
            record = encode(Loaded(numbers, self.dtype, rounded=False), kind, engine="0.9")
        return Layer(record, bias)

    def _meta(self, goal: Goal) -> Layer:
        """The same without its bytes: no row is moved and no number computed for it."""
        with located(layer=goal.module):
            meta = self._record(goal, planned=True)
            kind, shape = self._as(goal, meta), None if goal.bias is None else self.tensors.shape(goal.bias)
            bias = None if shape is None else Part.planned(shape, self._bias_dtype(goal, meta))
            return Layer(meta if kind is None else planned(kind, meta.shape, self._plain_dtype(meta)), bias)

    @property
    def nbytes(self) -> int:
        """Of all layers."""
        return self.plan.nbytes

    def write(self, stage: Staging, progress: Progress | None) -> Conversion:
        """Write everything into a directory."""
        directory, metas, plan = stage.directory, self.metas, self.plan
        types = Counter(layer.weight.kind for layer in metas.values())
        stem = _main_type(metas)
        weights = sum(math.prod(layer.weight.shape) for layer in metas.values())
        steps = Steps(progress, "convert", len(metas), weights, "weights")
        with LayerWriter(plan, shard_names(directory, stem, len(plan.shards))) as shards:
            for goal in self.goals:
                shards.write(goal.key, self._layer(goal))
                for source in goal.sources:
                    self.tensors.release(source.tensor)
                steps.add(goal.module, goal.weights)
            shards.finish()
        self._write_residual(directory)
        written = self._write_companions(directory)
        if self.tensors.vision is None:
            written.append(self._keep_metadata(directory))
        if self.version >= FIRST:
            self._write_report(directory, stem, metas)
            written.append(REPORT_NAME)
        self._note()
        names = tuple(file.path.name for file in shards.files)
        return Conversion(
            stage.target,
            f"UQFF {self.version}",
            names,
            types,
            shards.nbytes,
            (RESIDUAL_NAME, *written),
            tuple(self.notes),
            tuple(self.limits),
        )

    def _write_residual(self, directory: Path) -> None:
        tensors = [(name, self.dtype.safetensors, self.tensors.shape(name)) for name in self.residual]
        metadata = None if self.version < FIRST else metadata_of(self.version)
        with TensorWriter(directory / RESIDUAL_NAME, tensors, metadata) as rest:
            for name in self.residual:
                rest.write(name, _dequantized(self.tensors.record(name), self.dtype))
            rest.finish()

    def _write_companions(self, directory: Path) -> list[str]:
        config: dict[str, Any] | None = with_method(restated(self.tensors.config), self.version)
        if self.tensors.assets is not None:
            path = self.tensors.config_path
            config = config_to_write(path, without_rope_layout(read_config(path)), self.version)
        written, missing = self.tensors.write_companions(directory, config, self.dtype)
        self.notes += missing
        return written

    def _keep_metadata(self, directory: Path) -> str:
        """What a configuration has no place for; of a directory that could not be converted back, all of it."""
        file = self.tensors.file
        sizes = [(tensor.type_code, tensor.nbytes) for tensor in file.values()]
        config = read_config(directory / CONFIG_NAME)
        config = {"num_key_value_heads": config.get("num_attention_heads"), **config}
        try:
            made = made_metadata(directory, config, self.tensors.architecture, sizes, absorbed=self.tensors.is_absorbed)
        except UqffError:
            made = Made((), (), (), [])
        return keep_metadata(file, made, directory, self.tensors.not_coming_back())

    def _write_report(self, directory: Path, stem: str, metas: Mapping[str, Layer]) -> None:
        targets = {key: layer.weight.kind for key, layer in metas.items()}
        with open_uqff(directory) as file:
            report = build_report({stem: file}, targets={stem: targets})
        write_report(report, directory)

    def _note(self) -> None:
        self.notes += map(str, self.limits)
        config = self.tensors.text
        metas = [(goal, self._record(goal, planned=True)) for goal in self.goals]
        again = Counter(
            meta.kind.upper() if isinstance(meta, ForeignTensor) else "in another order"
            for goal, meta in metas
            if self._is_remade(goal, meta)
        )
        if again:
            listed = ", ".join(f"{count} {name}" for name, count in again.items())
            self.notes.append(f"quantised anew, from types that UQFF does not have: {listed}")
        name = f"{embedding_name(self.tensors.config)}.weight"
        if name in self.residual and self.tensors.meta(name).plain is None:
            stored = self.tensors.gguf(name).type_name
            self.notes.append(f"the embedding is dequantised: 0.x has no quantised one (it was {stored})")
        window = active_window(config)
        if window is not None:
            self.notes.append(window)
        if self.dtype is not DType.F32:
            self.notes.append(f"the residual is rounded to {self.dtype.safetensors}")
        if self.tensors.assets is None and self.tensors.architecture.name == "llama" and self.tensors.vision is None:
            self.notes.append(f"a GGUF file does not tell Llama from Mistral: taken as {config['architectures'][0]}")


def _check_types(file: GgufFile, requantize: str | None) -> None:
    """All that cannot be carried over, at once."""
    refused = []
    for tensor in file.values():
        unread = tensor.ggml_type is None
        if unread or (
            requantize is None and len(tensor.shape) > 1 and isinstance(planned_record(tensor), ForeignTensor)
        ):
            refused.append(f"{tensor.name} ({tensor.type_name})")
    if refused:
        more = f", and {len(refused) - 10} more" if len(refused) > 10 else ""
        raise UnsupportedError(
            f"{len(refused)} tensors of types that UQFF does not have",
            expected="a type for them (--requantize KIND)" if requantize is None else None,
            got=", ".join(refused[:10]) + more,
        )


def _main_type(metas: Mapping[str, Layer]) -> str:
    """The type that most weights have."""
    weights: Counter[str] = Counter()
    for layer in metas.values():
        weights[layer.weight.kind] += math.prod(layer.weight.shape)
    return max(sorted(weights), key=weights.__getitem__)


def _dequantized(record: QuantizedTensor, dtype: DType) -> Iterator[memoryview]:
    """The bytes of a tensor in another dtype, some rows at a time."""
    if len(record.shape) == 1:
        yield record.numbers(dtype).payload
        return
    rows = max(1, TILE // record.shape[-1])
    for start in range(0, record.shape[0], rows):
        yield record.narrow(0, start, min(rows, record.shape[0] - start)).numbers(dtype).payload
