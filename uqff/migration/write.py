"""Carrying out a migration: layers stream from mapped files into a directory that appears whole or not at all."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uqff.checkpoints.model import ModelDirectory
from uqff.container.atomic import copy_durably
from uqff.container.beside import KEPT_SUFFIX
from uqff.container.file import RESIDUAL_NAME, UqffFile
from uqff.container.job import Job, Staging
from uqff.container.plan import SHARD_BYTES, plan_files
from uqff.container.report import build_report, write_report
from uqff.container.shards import PathLike, shard_names
from uqff.container.staging import check_target
from uqff.container.tensors import TensorWriter
from uqff.container.writer import LayerWriter
from uqff.errors import UqffError
from uqff.migration.embedding import EMBEDDING_SINCE
from uqff.migration.origin import with_dequantized
from uqff.migration.plan import Plan, PlannedModel, plan_migration
from uqff.models.architectures import LayerName
from uqff.models.assets import CONFIG_NAME, companions_of, copy_companions
from uqff.models.config import config_to_write
from uqff.progress import Progress, Steps
from uqff.quantization.types import kind_name
from uqff.schema.entries import FIRST

__all__ = ["MigrateJob", "Migrated", "migrate"]


@dataclass
class Migrated:
    """What a migration made.

    Attributes:
        path: the model directory.
        shards: names of the files, by the stem of each model.
        nbytes: of all of them.
        copied: names of the files that lie beside a model; ``config.json`` is restated where it must be.
        left: names of files of the source that were not.
    """

    path: Path
    shards: dict[str, list[str]] = field(default_factory=dict)
    nbytes: int = 0
    copied: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def migrate(
    source: PathLike,
    target: PathLike,
    version: str | tuple[int, int, int] = "1.2",
    *,
    names: Sequence[LayerName] | None = None,
    fix_biases: str | None = None,
    plain_experts: bool = False,
    untie: bool = False,
    strict: bool = False,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Migrated:
    """Turn a model of one version into a model of another.

    Args:
        source: a model directory, with one quantised model or several, or a ``.uqff`` file in one.
        target: the directory to make.
        version: of UQFF: ``0.1``, ``0.2``, ``1.0``, ``1.1`` or ``1.2``.
        names, fix_biases, plain_experts, untie: see :func:`uqff.migration.plan.plan_migration`.
        strict: refuse what the engine could not load or run, see :mod:`uqff.models.engine`.
        force: replace a model that is in ``target`` already.
        shard_bytes: payload after which a new shard begins.
        progress: called after each layer.

    Raises:
        UqffError: the model breaks a rule, is not the one that its ``config.json`` describes, or cannot be expressed in
            the format; nothing has been written.
        FileExistsError: ``target`` is there and may not be replaced.
        OSError: reading or writing failed (a full disk, say); nothing stays behind.

    >>> made = uqff.migrate("old", "new")
    >>> sorted(made.shards)
    ['q8_0']
    >>> uqff.open("old").generation, uqff.open("new").generation
    ('0.x', '1.x')
    """
    check_target(Path(target), force=force)
    with ModelDirectory(source) as directory:
        plan = plan_migration(
            directory, version, names=names, fix_biases=fix_biases, plain_experts=plain_experts, untie=untie
        )
        if strict:
            plan.check_limits()
        return MigrateJob(plan, shard_bytes).run(target, force=force, progress=progress)


class MigrateJob(Job[Migrated]):
    """The model directory of a plan whose directory is open. Peak memory is the largest layer, plus a constant."""

    def __init__(self, plan: Plan, shard_bytes: int = SHARD_BYTES) -> None:
        """Nothing is written yet.

        Args:
            plan: the plan.
            shard_bytes: payload after which a new shard begins.

        Raises:
            UnsupportedError: something cannot be expressed.
            FormatError: a file beside the model leads elsewhere.
        """
        plan.check()
        companions_of(plan.directory.path)
        self.plan = plan
        self.shard_bytes = shard_bytes

    @property
    def nbytes(self) -> int:
        """Of all layers and of the residual."""
        residual = self.plan.directory.residual
        layers = sum(row.nbytes for planned in self.plan.models for row in planned.rows)
        return layers + (len(residual.view) if residual is not None else 0)

    def write(self, stage: Staging, progress: Progress | None) -> Migrated:
        """Write everything into a directory."""
        plan, staging = self.plan, stage.directory
        made = Migrated(stage.target)
        metas = [each for planned in plan.models for each in planned.mapping.metas.values()]
        weights = sum(layer.weight.numel for layer in metas)
        steps = Steps(progress, "migrate", len(metas), weights, "weights")
        for planned in plan.models:
            made.shards[planned.stem] = _write_layers(staging, plan, planned, self.shard_bytes, steps)
            _write_kept(staging, plan, planned)
        _write_residual(staging, plan)
        source = plan.directory.path
        config = config_to_write(source / CONFIG_NAME, plan.config or plan.directory.config, plan.version)
        made.copied = copy_companions(source, staging, config=config)
        made.left = [name for name in plan.directory.others if not (staging / name).exists()]
        if plan.version >= FIRST:
            _write_report(staging, plan, made)
        made.nbytes = sum((staging / name).stat().st_size for names in made.shards.values() for name in names)
        return made


def _write_layers(staging: Path, plan: Plan, planned: PlannedModel, shard_bytes: int, steps: Steps) -> list[str]:
    mapping = planned.mapping
    files = plan_files(mapping.metas, plan.version, shard_bytes, metadata=planned.metadata, versions=planned.versions)
    with LayerWriter(files, shard_names(staging, planned.stem, len(files.shards))) as writer:
        for move in mapping.moves:
            for key, layer in move.made(move.taken(mapping.bias_dtypes)):
                writer.write(key, layer)
                steps.add(key, layer.weight.numel)
                del layer
            move.release()
        writer.finish()
    return [file.path.name for file in writer.files]


def _write_kept(staging: Path, plan: Plan, planned: PlannedModel) -> None:
    """The layers that have no place in the target, as a 1.x file; what was kept before stays."""
    target = staging / f"{planned.stem}{KEPT_SUFFIX}"
    if not planned.kept:
        present = plan.directory.kept.get(planned.stem)
        if present is not None and plan.version < EMBEDDING_SINCE:
            copy_durably(present.paths[0], target)
        return
    version = planned.file.version
    layers = {key: source.file[source.key] for key, source in planned.kept.items()}
    with LayerWriter(plan_files(layers, version, sys.maxsize), [target]) as writer:
        for key, layer in layers.items():
            writer.write(key, layer)
        writer.finish()


def _write_residual(staging: Path, plan: Plan) -> None:
    residual = plan.directory.residual
    if residual is not None and not plan.dropped and not plan.dense:
        copy_durably(residual.path, staging / RESIDUAL_NAME)
        return
    kept = {} if residual is None else {n: e for n, e in residual.header.entries.items() if n not in plan.dropped}
    tensors = [(name, entry.dtype, entry.shape) for name, entry in kept.items()]
    for name, source in plan.dense.items():
        tensors.append((name, plan.dtype.safetensors, source.file[source.key].weight.shape))
    if not tensors:
        return
    metadata = with_dequantized({} if residual is None else residual.header.metadata, plan.dense)
    with TensorWriter(staging / RESIDUAL_NAME, tensors, metadata) as file:
        for name, entry in kept.items():
            assert residual is not None
            file.write(name, [residual.slice(entry)])
        for name, source in plan.dense.items():
            file.write(name, [source.file[source.key].weight.numbers(plan.dtype).payload])
        file.finish()


def _write_report(staging: Path, plan: Plan, made: Migrated) -> None:
    files: dict[str, UqffFile] = {}
    try:
        for planned in plan.models:
            file = UqffFile([staging / name for name in made.shards[planned.stem]])
            files[_quant(planned, files)] = file
        write_report(build_report(files), staging)
    finally:
        for file in files.values():
            file.close()


def _quant(planned: PlannedModel, taken: Mapping[str, Any]) -> str:
    """Its name in the report: the type that its file is called by, else that of most layers, else the stem."""
    stem = planned.stem
    usual = Counter(layer.weight.kind for layer in planned.mapping.metas.values()).most_common(1)[0][0]
    for name in (stem, stem.rpartition("-")[2], stem.rpartition(".")[2], usual):
        try:
            kind = kind_name(name)
        except UqffError:
            kind = usual if name == usual else ""
        if kind and kind not in taken:
            return kind
    return stem
