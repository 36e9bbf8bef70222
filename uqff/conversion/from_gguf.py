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

The rows of Q and K of ``llama`` files go back into the model's order, whole (:mod:`uqff.conversion.names`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from uqff.checkpoints.foreign import ForeignTensor
from uqff.checkpoints.ggml import planned_record, record_of
from uqff.codec.layer import Layer
from uqff.codes import LOADED_DTYPES, DType, Version
from uqff.container.document import write_json
from uqff.container.file import RESIDUAL_NAME, open_uqff
from uqff.container.job import Job, Staging
from uqff.container.plan import SHARD_BYTES, metadata_of, plan_files
from uqff.container.report import REPORT_NAME, build_report, write_report
from uqff.container.shards import PathLike, shard_names
from uqff.container.tensors import TensorWriter
from uqff.container.writer import LayerWriter
from uqff.conversion.config import active_window, check_config, config_of
from uqff.conversion.kept import KEPT_NAME, Made, keep_metadata, made_metadata
from uqff.conversion.names import (
    ROPE_FACTORS,
    architecture_of_config,
    architecture_of_name,
    gguf_name,
    heads_of,
    norm_names,
    shape_of,
)
from uqff.conversion.result import Conversion
from uqff.conversion.tokenizer import tokenizer_files
from uqff.errors import FormatError, ShapeError, UnsupportedError, UqffError, located
from uqff.families import PLAIN_KIND
from uqff.families.base import QuantizedTensor
from uqff.families.loaded import Loaded
from uqff.families.part import Part
from uqff.families.rows import reordered, reordered_bias
from uqff.families.unquant.tensor import Unquant
from uqff.gguf.reader import GgufFile, GgufTensor, open_gguf
from uqff.models.architectures import LayerName, architecture_of, embedding_name, entry_names, layer_names
from uqff.models.assets import CONFIG_NAME, companions_of, copy_companions
from uqff.models.config import config_to_write, read_config, with_method
from uqff.models.engine import limits_of, refuse_limits
from uqff.models.layouts import WeightLayout, half_split_order, without_rope_layout
from uqff.progress import Progress, Steps
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
    with open_gguf(source) as file, located(file=file.paths[0]):
        loaded, beside = LOADED_DTYPES[dtype.upper()], None if assets is None else Path(assets)
        kind = None if requantize is None else kind_name(requantize)
        job = FromGgufJob(file, wanted, loaded, beside, shard_bytes, kind)
        if strict:
            refuse_limits(job.limits)
        return job.run(target, force=force, progress=progress)


class FromGgufJob(Job[Conversion]):
    """The conversion of a GGUF file; see :func:`uqff_of_gguf`."""

    def __init__(
        self,
        file: GgufFile,
        version: Version,
        dtype: DType,
        assets: Path | None,
        shard_bytes: int = SHARD_BYTES,
        requantize: str | None = None,
    ) -> None:
        self.file = file
        self.requantize = requantize
        self.version = version
        self.dtype = dtype
        if assets is not None:
            companions_of(assets, leave=[KEPT_NAME])
        self.assets = assets
        self.notes: list[str] = []
        self.architecture = architecture_of_name(file.get_value("general.architecture"))
        self._check_types()
        self.config = self._config()
        self.layers = self._layers()
        self.residual = self._residual()
        self._check_all_taken()
        self.metas = {key: self._meta(name) for key, name in self.layers.items()}
        self.plan = plan_files(self.metas, version, shard_bytes)
        self.limits = limits_of(self.metas, version)

    def _config(self) -> dict[str, Any]:
        if self.assets is None:
            return config_of(self.file, self.architecture)
        path = self.assets / CONFIG_NAME
        config = read_config(path)
        with located(file=path):
            if architecture_of_config(config) is not self.architecture:
                raise FormatError(
                    "not the file's architecture",
                    field="architectures",
                    expected=" or ".join(self.architecture.classes),
                    got=architecture_of(config).classes[0],
                )
            WeightLayout.of(config).check()
            self.notes += check_config(config, self.file, self.architecture, str(path))
        return {"num_key_value_heads": config["num_attention_heads"], **config}

    def _layers(self) -> dict[str, LayerName]:
        """Key in the file to layer."""
        if self.version < FIRST:
            return {str(name.index): name for name in layer_names(self.config)}
        return {entry.key: entry.parts[0] for entry in entry_names(self.config, self.version)}

    def _residual(self) -> dict[str, GgufTensor]:
        """Name in ``residual.safetensors`` to tensor."""
        blocks = self.config["num_hidden_layers"]
        names = norm_names(self.architecture, blocks)
        found = {f"{name}.weight": self._tensor(f"{name}.weight", ndim=1) for name in names}
        if self.version < FIRST:
            name = f"{embedding_name(self.config)}.weight"
            found[name] = self._tensor(name, ndim=2)
        return found

    def _tensor(self, name: str, *, ndim: int) -> GgufTensor:
        """The tensor of a weight or bias of the model."""
        path, _, kind = name.rpartition(".")
        gguf = f"{gguf_name(path)}.{kind}"
        tensor = self.file.get(gguf)
        if tensor is None:
            raise FormatError("the file lacks a tensor", layer=path, field=gguf, got="no such tensor")
        expected = shape_of(name, self.config)
        if tensor.shape != expected or len(tensor.shape) != ndim:
            raise ShapeError(
                "tensor does not fit the configuration",
                layer=path,
                field=gguf,
                expected=list(expected),
                got=list(tensor.shape),
            )
        return tensor

    def _bias(self, name: LayerName) -> GgufTensor | None:
        """The tensor of a layer's bias; one that must or must not be there is checked."""
        suffix = ".".join(name.module.split(".")[3:])
        gguf = f"{gguf_name(name.module)}.bias"
        if suffix in self.architecture.biases or (suffix in self.architecture.optional_biases and gguf in self.file):
            return self._tensor(name.bias, ndim=1)
        return None

    def _check_all_taken(self) -> None:
        """No tensor is left behind unseen."""
        taken = {tensor.name for tensor in self.residual.values()} | {ROPE_FACTORS}
        for name in self.layers.values():
            taken.add(self._tensor(name.weight, ndim=2).name)
            bias = self._bias(name)
            if bias is not None:
                taken.add(bias.name)
        if left := [name for name in self.file if name not in taken]:
            raise UnsupportedError(
                "tensors that the architecture does not have", field=left[0], got=", ".join(left[:20])
            )

    def _check_types(self) -> None:
        """All that cannot be carried over, at once."""
        refused = []
        for tensor in self.file.values():
            foreign = tensor.ggml_type is None or (len(tensor.shape) > 1 and _is_foreign(tensor))
            if foreign and (tensor.ggml_type is None or self.requantize is None):
                refused.append(f"{tensor.name} ({tensor.type_name})")
        if refused:
            more = f", and {len(refused) - 10} more" if len(refused) > 10 else ""
            raise UnsupportedError(
                f"{len(refused)} tensors of types that UQFF does not have",
                expected="a type for them (--requantize KIND)" if self.requantize is None else None,
                got=", ".join(refused[:10]) + more,
            )

    def _as(self, tensor: GgufTensor) -> str | None:
        """The type that a tensor's numbers are stored as; None if what is stored is what the file has."""
        if _is_foreign(tensor):
            assert self.requantize is not None
            return resolve(self.requantize, tensor.shape, version=self.version).kind
        return None if self.version >= FIRST or planned_record(tensor).plain is None else PLAIN_KIND

    def _stored_dtype(self, tensor: GgufTensor) -> DType:
        """That of the plain numbers of a layer: 0.x has Unquant layers in place of a matrix of plain numbers."""
        plain = planned_record(tensor).plain
        return self.dtype if plain is None or self.dtype is DType.F32 else plain.dtype

    def _bias_dtype(self, tensor: GgufTensor) -> DType:
        """F32, as in the file, beside blocks; else the load dtype."""
        return DType.F32 if self._as(tensor) is None and tensor.block_type is not None else self.dtype

    def _layer(self, name: LayerName) -> Layer:
        """A layer as the model has it: rows of Q and K in the model's order."""
        tensor, bias = self._tensor(name.weight, ndim=2), self._bias(name)
        record, kind = record_of(tensor), self._as(tensor)
        heads = heads_of(self.architecture, self.config, name.module)
        values = None if bias is None else _numbers(bias, self._bias_dtype(tensor))
        if heads is not None:
            order = half_split_order(record.shape[0], heads)
            record = reordered(record, order)
            values = None if values is None else reordered_bias(values, order)
        if kind == PLAIN_KIND:
            return Layer(Unquant.of(record.numbers(self._stored_dtype(tensor))), values)
        if kind is not None:
            numbers = Floats.of_bytes(record.numbers().data, DType.F32, record.shape)
            record = encode(Loaded(numbers, self.dtype, rounded=False), kind, engine="0.9")
        return Layer(record, values)

    def _meta(self, name: LayerName) -> Layer:
        """The same without its bytes: no row is moved and no number computed for it."""
        tensor, bias = self._tensor(name.weight, ndim=2), self._bias(name)
        with located(layer=name.module):
            kind = self._as(tensor)
            values = None if bias is None else Part.planned(bias.shape, self._bias_dtype(tensor))
            if kind is None:
                return Layer(planned_record(tensor), values)
            return Layer(planned(kind, tensor.shape, self._stored_dtype(tensor)), values)

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
            for key, name in self.layers.items():
                shards.write(key, self._layer(name))
                self._tensor(name.weight, ndim=2).release()
                steps.add(name.module, math.prod(metas[key].weight.shape))
            shards.finish()
        self._write_residual(directory)
        written = self._write_companions(directory)
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
        tensors = [(name, self.dtype.safetensors, tensor.shape) for name, tensor in self.residual.items()]
        metadata = None if self.version < FIRST else metadata_of(self.version)
        with TensorWriter(directory / RESIDUAL_NAME, tensors, metadata) as rest:
            for name, tensor in self.residual.items():
                rest.write(name, _dequantized(record_of(tensor), self.dtype))
            rest.finish()

    def _write_companions(self, directory: Path) -> list[str]:
        if self.assets is not None:
            path = self.assets / CONFIG_NAME
            own = without_rope_layout(read_config(path))
            return copy_companions(
                self.assets, directory, config=config_to_write(path, own, self.version), leave=[KEPT_NAME]
            )
        torch_dtype = self.dtype.torch_name
        documents, missing = tokenizer_files(self.file, self.config)
        self.notes += missing
        config = with_method({**self.config, "torch_dtype": torch_dtype}, self.version)
        documents = {CONFIG_NAME: config, **documents}
        for name, document in documents.items():
            write_json(directory / name, document)
        return list(documents)

    def _keep_metadata(self, directory: Path) -> str:
        """What a configuration has no place for; of a directory that could not be converted back, all of it."""
        sizes = [(tensor.type_code, tensor.nbytes) for tensor in self.file.values()]
        config = read_config(directory / CONFIG_NAME)
        config = {"num_key_value_heads": config.get("num_attention_heads"), **config}
        try:
            made = made_metadata(directory, config, self.architecture, sizes)
        except UqffError:
            made = Made((), (), (), [])
        return keep_metadata(self.file, made, directory)

    def _write_report(self, directory: Path, stem: str, metas: Mapping[str, Layer]) -> None:
        targets = {key: layer.weight.kind for key, layer in metas.items()}
        with open_uqff(directory) as file:
            report = build_report({stem: file}, targets={stem: targets})
        write_report(report, directory)

    def _note(self) -> None:
        self.notes += map(str, self.limits)
        foreign = Counter(
            tensor.type_name
            for tensor in (self._tensor(name.weight, ndim=2) for name in self.layers.values())
            if _is_foreign(tensor)
        )
        if foreign:
            listed = ", ".join(f"{count} {name}" for name, count in foreign.items())
            self.notes.append(f"quantised anew, from types that UQFF does not have: {listed}")
        embedding = self.residual.get(f"{embedding_name(self.config)}.weight")
        if embedding is not None and embedding.block_type is not None and embedding.block_type.block_size > 1:
            self.notes.append(f"the embedding is dequantised: 0.x has no quantised one (it was {embedding.type_name})")
        window = active_window(self.config)
        if window is not None:
            self.notes.append(window)
        if self.dtype is not DType.F32:
            self.notes.append(f"the residual is rounded to {self.dtype.safetensors}")
        if self.assets is None and self.architecture.name == "llama":
            self.notes.append(
                f"a GGUF file does not tell Llama from Mistral: taken as {self.config['architectures'][0]}"
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


def _numbers(tensor: GgufTensor, dtype: DType) -> Part:
    return record_of(tensor).numbers(dtype)


def _is_foreign(tensor: GgufTensor) -> bool:
    return isinstance(planned_record(tensor), ForeignTensor)
