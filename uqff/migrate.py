"""A model of one generation as one of the other: every code, scale and bias as it is, under other names.

::

    SRC/<stem>-N.uqff --> mapped layers --> stacked or taken apart where experts are --> OUT/<stem>-N.uqff
    SRC/residual.safetensors ------------------------------------------------------> OUT/residual.safetensors
    SRC/config.json, tokenizer.json, ... ------------------------------------------> OUT/...

Nothing is dequantised and nothing is requantised, with one exception, which adds and takes nothing away: versions
before 1.2 need the embedding dense.  A 1.2 model whose embedding is quantised gets it dequantised into its residual;
the codes become layer 0 if the head is tied to them, and else stay in ``<stem>.kept.safetensors``, a file that loaders
of those versions do not look at.  On the way back they are taken from there, and the dense copy goes.

What a model was before is noted where the format has room for it: in the metadata of 1.x files
(``uqff.migrated_from``), or of the residual (``uqff.dequantized``).

Authority: mistral.rs v0.6.0 and v0.9.2, ``mistralrs-core/src/pipeline/isq.rs``, ``mistralrs-core/src/layers.rs``
(``use_legacy_tied_uqff_head``) and ``mistralrs-core/src/moe/experts/backends.rs`` (``from_weight_source``).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from uqff.architectures import (
    EMBEDDING_SINCE,
    LayerName,
    architecture_of,
    embedding_name,
    is_tied,
    layer_names,
    stacked_layer_names,
    stacked_names,
)
from uqff.blob import Layer
from uqff.codes import DType, Family, Version
from uqff.container.directory import CONFIG_NAME, LOADED_DTYPES, Progress, Step, check_space, copy_companions
from uqff.container.file import RESIDUAL_NAME, UqffFile
from uqff.container.mapped import MappedFile
from uqff.container.report import REPORT_NAME, build_report, report_document
from uqff.container.save import SHARD_BYTES
from uqff.container.save_v1 import entry_items, metadata_of, version_entries
from uqff.container.shards import PathLike
from uqff.container.staging import check_target, staged_directory
from uqff.container.streaming import StreamedFile, StreamedLayers, flush_to_disk
from uqff.container.writer import copy_durably
from uqff.entries import to_entries
from uqff.errors import FormatError, ShapeError, UnsupportedError, UqffError
from uqff.isq import kind_name
from uqff.moves import Move, Moves, Problem, Row, Source, plan_moves
from uqff.naming import check_residual, check_shapes, known_names
from uqff.schema.entries import FIRST
from uqff.schema.header import HEADER
from uqff.sources.model import KEPT_SUFFIX, ModelDirectory
from uqff.views import bytes_of

if TYPE_CHECKING:
    from types import TracebackType

    import torch
    from typing_extensions import Self

__all__ = ["DEQUANTIZED", "FORMATS", "MIGRATED_FROM", "Migrated", "Migration", "Planned", "migrate_model"]

FORMATS: Final = {
    "0.1": Version(0, 1, 3),
    "0.2": Version(0, 2, 0),
    "1.0": Version(1, 0, 0),
    "1.1": Version(1, 1, 0),
    "1.2": Version(1, 2, 0),
}
"""Formats that can be written, and the version that each writes."""

MIGRATED_FROM: Final = "uqff.migrated_from"
"""Metadata of 1.x files: version of the blobs that they were made of."""
MIGRATED_LAYERS: Final = "uqff.migrated_from.layers"
"""The blobs of another version: a JSON object, index to version."""
MIGRATED_EXPERTS: Final = "uqff.migrated_from.experts"
"""``stacked`` if the experts were stacked before, too."""
DEQUANTIZED: Final = "uqff.dequantized"
"""Metadata of the residual: a JSON list of the tensors that were dequantised from layers of a 1.2 file."""


@dataclass
class Planned:
    """A migration of one quantised model.

    Attributes:
        stem: name of its files, without number.
        file: the model.
        moves: what becomes what.
        versions: of blobs, by key, where they are not that of the format.
        metadata: of 1.x files to be written.
        kept: layers that have no place in the target, by key.
    """

    stem: str
    file: UqffFile
    moves: Moves
    versions: dict[str, Version] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    kept: dict[str, Source] = field(default_factory=dict)

    @property
    def rows(self) -> list[Row]:
        """The mapping, by index or key."""
        return self.moves.rows


@dataclass
class Migrated:
    """What a migration made.

    Attributes:
        path: the model directory.
        shards: names of the files, by the stem of each model.
        nbytes: of all ``.uqff`` files.
        copied: names of the files that were copied.
        left: names of files of the source that were not.
    """

    path: Path
    shards: dict[str, list[str]] = field(default_factory=dict)
    nbytes: int = 0
    copied: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


class Migration:
    """A migration that is planned when it is made, and carried out by :meth:`write`.

    Attributes:
        source: the model directory.
        version: of the format to be written.
        models: the quantised models of the directory.
        problems: what cannot be expressed; there must be none to write.
        warnings: what the engine will not do with the result.
    """

    def __init__(
        self,
        source: PathLike,
        to: str = "1.2",
        *,
        names: Sequence[LayerName] | None = None,
        fix_biases: bool = False,
        untie: bool = False,
    ) -> None:
        """Open a model and look at all its layers.

        Args:
            source: a model directory, with one quantised model or several, or a ``.uqff`` file in one.
            to: the format, see :data:`FORMATS`.
            names: of the layers of 0.x, by index, where the architecture is not known; see :mod:`uqff.naming`.
            fix_biases: store the biases that the engine cannot add in the load dtype.
            untie: say in the new ``config.json`` that head and embedding are two.

        Raises:
            UqffError: the model breaks a rule, or it is not the one that its ``config.json`` describes.
            OSError: a file cannot be read.
        """
        if to not in FORMATS:
            raise UnsupportedError("unknown format", field="to", expected=", ".join(FORMATS), got=to)
        self.version = FORMATS[to]
        self.source = ModelDirectory(source)
        try:
            self._names = names
            self._plan(fix_biases=fix_biases, untie=untie)
        except BaseException:
            self.close()
            raise

    def _plan(self, *, fix_biases: bool, untie: bool) -> None:
        self.config = dict(self.source.config)
        self.dtype = _load_dtype(self.source.residual)
        self.warnings: list[str] = []
        self.models: list[Planned] = []
        self._fix_biases = fix_biases
        self._untied = _untied(self.config) if untie else None
        self._restored = 0
        self._dense: dict[str, Source] = {}
        marks = _dequantized(self.source.residual)
        for stem, file in self.source.models.items():
            planned = self._plan_model(stem, file, marks)
            self.models.append(planned)
        if 0 < self._restored < len(self.models):
            raise FormatError(
                "some models of the directory have the codes of their embedding, others do not",
                file=str(self.source.path),
                expected="all or none: migrate them one by one",
            )
        self._warn_tied()
        if marks and not self._restored and self.version >= EMBEDDING_SINCE:
            self.warnings.append(f"the dense {', '.join(marks)} was dequantised, and its codes are not there")

    @property
    def problems(self) -> list[Problem]:
        """What cannot be expressed."""
        return [problem for planned in self.models for problem in planned.moves.problems]

    def check(self) -> None:
        """Raise an error if something cannot be expressed.

        Raises:
            UnsupportedError: naming the first; all are in :attr:`problems`.
        """
        if self.problems:
            first, count = self.problems[0], len(self.problems)
            what = "layer" if count == 1 else "layers"
            raise UnsupportedError(
                f"{count} {what} cannot be expressed in {self.version}", layer=first.layer, got=first.reason
            )

    # The moves of one model.

    def _plan_model(self, stem: str, file: UqffFile, marks: Sequence[str]) -> Planned:
        problems: list[Problem] = []
        kept: dict[str, Source] = {}
        if file.generation == "0.x" and self.version >= FIRST:
            moves = self._moves_up(file)
        elif file.generation == "1.x" and self.version < FIRST:
            moves, kept = self._moves_down(file, problems)
        else:
            names = [LayerName(int(key) if file.generation == "0.x" else 0, key, f"{key}.weight", None) for key in file]
            moves = [Move((Source(file, name.key),), (name.key,), (name,)) for name in names]
        key = self._embedding(file)
        if file.generation == "1.x" and key is not None and self.version < EMBEDDING_SINCE:
            self._keep_dense(file, key)
            if self.version >= FIRST:
                moves, kept = self._lowered(file, moves, key)
        if self.version >= EMBEDDING_SINCE:
            moves = self._with_embedding(stem, moves, marks)
        planned = Planned(stem, file, plan_moves(moves, self.version, self._biases(stem, file)), kept=kept)
        planned.moves.problems[:0] = problems
        planned.moves.rows.sort(key=lambda row: (row.index if row.index is not None else 0, row.key))
        self._note_origin(planned)
        self._warn(planned)
        return planned

    def _moves_up(self, file: UqffFile) -> list[Move]:
        """From blobs to entries."""
        keys = {int(key): key for key in file}
        shapes = {index: _shape(file, key) for index, key in keys.items()}
        names = self._names
        if names is None:
            try:
                names = known_names(self.config, shapes)
            except UqffError as error:
                raise error.within(file=str(file.paths[0])) from None
        elif len(names) != len(keys) or keys.keys() != {name.index for name in names}:
            got = f"{len(keys)} layers, index 0 to {max(keys)}"
            raise FormatError("the names are of another file", file=str(file.paths[0]), expected=len(names), got=got)
        residual = self.source.residual
        tensors = {name: entry.shape for name, entry in residual.header.entries.items()} if residual else {}
        try:
            check_residual(names, tensors, shapes)
        except UqffError as error:
            raise error.within(file=str(file.paths[0])) from None
        moves = []
        for entry in stacked_names(names):
            parts = sorted(entry.parts, key=lambda name: name.expert or 0)
            stack = parts[0].expert is not None
            sources = tuple(Source(file, keys[name.index]) for name in parts)
            moves.append(Move(sources, (entry.key,), tuple(parts), "stack" if stack else "same"))
        return moves

    def _moves_down(self, file: UqffFile, problems: list[Problem]) -> tuple[list[Move], dict[str, Source]]:
        """From entries to blobs."""
        if self._names is not None:
            names = list(self._names)
        else:
            stacked = file.metadata.get(MIGRATED_EXPERTS) == "stacked"
            names = stacked_layer_names(self.config) if stacked else layer_names(self.config)
        embedding = self._embedding(file)
        shapes: dict[int, tuple[int, ...]] = {}
        moves, used = [], set()
        for entry in stacked_names(names):
            key = entry.key
            if key not in file and embedding is not None and self._is_tied_head(key):
                key = embedding
            if key not in file:
                index = entry.parts[0].index
                problems.append(Problem(entry.key, f"no such layer in the file, and 0.x needs one of index {index}"))
                continue
            used.add(key)
            unstack = entry.parts[0].expert is not None
            shape = _shape(file, key)
            if unstack and shape[0] != len(entry.parts):
                raise ShapeError(
                    "wrong number of experts",
                    file=str(file.paths[0]),
                    layer=key,
                    expected=len(entry.parts),
                    got=list(shape),
                )
            parts = sorted(entry.parts, key=lambda name: name.expert or 0)
            shapes |= {name.index: shape[1:] if unstack else shape for name in parts}
            targets = tuple(str(name.index) for name in parts)
            moves.append(Move((Source(file, key),), targets, tuple(parts), "unstack" if unstack else "same"))
        if self._names is None:
            check_shapes(self.config, [name for name in names if name.index in shapes], shapes)
        kept = {} if embedding is None or embedding in used else {embedding: Source(file, embedding)}
        for key in file:
            if key not in used and key not in kept:
                problems.append(Problem(key, "0.x has no index for it"))
        return moves, kept

    # The embedding.

    def _embedding(self, file: UqffFile) -> str | None:
        """The layer of a 1.x model that is its embedding, if one is."""
        if file.generation != "1.x":
            return None
        try:
            key = embedding_name(self.config)
        except UnsupportedError:
            found = [key for key in file if key.rpartition(".")[2] == "embed_tokens"]
            key = found[0] if len(found) == 1 else ""
        return key if key in file else None

    def _is_tied_head(self, key: str) -> bool:
        """Whether a layer is a head that is the embedding."""
        if key.rpartition(".")[2] != "lm_head":
            return False
        try:
            architecture = architecture_of(self.config)
        except UnsupportedError:
            return self.config.get("tie_word_embeddings") is True
        return is_tied(architecture, self.config.get(architecture.text_config, self.config))

    def _keep_dense(self, file: UqffFile, key: str) -> None:
        """Note that the embedding goes to the residual, too; of several models, the largest, which is the best."""
        name = f"{key}.weight"
        other = self._dense.get(name)
        if other is None or _nbytes(other) < _nbytes(Source(file, key)):
            self._dense[name] = Source(file, key)

    def _lowered(self, file: UqffFile, moves: list[Move], key: str) -> tuple[list[Move], dict[str, Source]]:
        """The moves to a version whose embedding is no layer."""
        others = [move for move in moves if move.targets != (key,)]
        head = f"{key.removesuffix('model.embed_tokens')}lm_head"
        if head in file or not self._is_tied_head(head):
            return others, {key: Source(file, key)}
        name = LayerName(0, head, f"{key}.weight", None)
        return [*others, Move((Source(file, key),), (head,), (name,))], {}

    def _with_embedding(self, stem: str, moves: list[Move], marks: Sequence[str]) -> list[Move]:
        """The moves to a version whose embedding is a layer, if its codes are still there."""
        kept = self.source.kept.get(stem)
        for mark in marks:
            key = mark.removesuffix(".weight")
            name = LayerName(0, key, mark, None)
            if kept is not None and key in kept:
                self._restored += 1
                return [*moves, Move((Source(kept, key),), (key,), (name,))]
            for at, move in enumerate(moves):
                if len(move.targets) == 1 and self._is_tied_head(move.targets[0]):
                    self._restored += 1
                    return [*moves[:at], Move(move.sources, (key,), (name,)), *moves[at + 1 :]]
        return moves

    # Biases, versions, warnings.

    def _biases(self, stem: str, file: UqffFile) -> dict[str, torch.dtype]:
        """The dtype in which to store the biases that the engine cannot add, by key."""
        odd: Counter[str] = Counter()
        found: dict[str, torch.dtype] = {}
        for key in file:
            record, fields = file.fields(key)
            bias = fields["bias"]
            if record.family in (Family.FP8, Family.MXFP4) and bias is not None and bias["dtype"] is not self.dtype:
                odd[f"{record.family.title} layers in {bias['dtype'].safetensors}"] += 1
                found[key] = self.dtype.torch
        for what, count in odd.items():
            load = self.dtype.safetensors
            if self._fix_biases:
                self.warnings.append(f"{stem}: {count} biases of {what} are stored in {load} from now on")
            else:
                self.warnings.append(
                    f"{stem}: {count} biases of {what}, which the engine cannot add to activations in {load}: "
                    "the model will load and then fail; --fix-biases stores them in the load dtype"
                )
        return found if self._fix_biases else {}

    def _note_origin(self, planned: Planned) -> None:
        """Versions of the blobs: noted in 1.x, restored from there in 0.x."""
        file, metadata = planned.file, planned.file.metadata
        if file.generation == "0.x" and self.version >= FIRST:
            versions = {int(key): _blob_version(file, key) for key in file}
            usual = Counter(versions.values()).most_common(1)[0][0]
            others = {str(index): str(version) for index, version in sorted(versions.items()) if version != usual}
            planned.metadata[MIGRATED_FROM] = str(usual)
            if others:
                planned.metadata[MIGRATED_LAYERS] = json.dumps(others)
            if any(row.expert is None and len(row.shape) == 3 for row in planned.rows):
                planned.metadata[MIGRATED_EXPERTS] = "stacked"
        elif file.generation == "1.x" and self.version >= FIRST:
            names = (MIGRATED_FROM, MIGRATED_LAYERS, MIGRATED_EXPERTS)
            planned.metadata |= {name: metadata[name] for name in names if name in metadata}
        elif file.generation == "1.x" and MIGRATED_FROM in metadata:
            usual = min(_version(metadata, MIGRATED_FROM, metadata[MIGRATED_FROM]), self.version)
            others = _json(metadata, MIGRATED_LAYERS, dict)
            for key in planned.moves.outlines:
                recorded = _version(metadata, MIGRATED_LAYERS, others[key]) if key in others else usual
                planned.versions[key] = min(recorded, self.version)

    def _warn(self, planned: Planned) -> None:
        extra = planned.file.extra
        if len(extra):
            self.warnings.append(f"{planned.stem}: entries that belong to no layer are left out: {', '.join(extra)}")

    def _warn_tied(self) -> None:
        """Of tied models that stay tied."""
        heads = [row.key for row in self.models[0].rows if row.key.rpartition(".")[2] == "lm_head"]
        up = self.models[0].file.generation == "0.x" and self.version >= FIRST
        if up and heads and self._is_tied_head(heads[0]):
            if self._untied is None:
                self.warnings.append(
                    "head and embedding are tied: the engine takes one matrix for both, where pre-1.0 ones had a "
                    "quantised head beside the dense embedding; --untie keeps both"
                )
        elif self._untied is not None:
            raise UnsupportedError(
                "nothing to untie", field="config.tie_word_embeddings", expected="a 0.x model with a tied head"
            )

    # Writing.

    def write(
        self,
        target: PathLike,
        *,
        force: bool = False,
        shard_bytes: int = SHARD_BYTES,
        progress: Progress | None = None,
    ) -> Migrated:
        """Make the model directory.

        Peak memory is the largest layer of the target, plus a constant.

        Args:
            target: the directory to make.
            force: replace a model that is in ``target`` already.
            shard_bytes: payload after which a new shard begins.
            progress: called after each layer.

        Raises:
            UnsupportedError: something cannot be expressed; nothing has been written.
            FileExistsError: ``target`` is there and may not be replaced.
            OSError: reading or writing failed (a full disk, say); nothing stays behind.
        """
        self.check()
        check_target(Path(target), force=force)
        check_space(Path(target), self._needed())
        made = Migrated(Path(target))
        with staged_directory(Path(target), force=force) as staging:
            steps = _Steps(self.models, progress)
            for planned in self.models:
                made.shards[planned.stem] = self._write_layers(staging, planned, shard_bytes, steps)
                self._write_kept(staging, planned)
            self._write_residual(staging)
            self._copy(staging, made)
            self._write_report(staging, made)
            made.nbytes = sum((staging / name).stat().st_size for names in made.shards.values() for name in names)
        return made

    def _needed(self) -> int:
        sizes = sum(row.nbytes for planned in self.models for row in planned.rows)
        residual = self.source.residual
        return sizes + (len(residual.view) if residual is not None else 0)

    def _write_layers(self, staging: Path, planned: Planned, shard_bytes: int, steps: _Steps) -> list[str]:
        moves = planned.moves
        files = StreamedLayers(
            staging,
            planned.stem,
            moves.outlines,
            self.version,
            shard_bytes,
            metadata=planned.metadata,
            versions=planned.versions,
        )
        try:
            for move in moves.moves:
                for key, layer in move.made(move.taken(moves.bias_dtypes)):
                    files.write(key, layer)
                    steps.done(key, layer)
                    del layer
                move.release()
            files.finish()
        finally:
            files.close()
        return [file.path.name for file in files.files]

    def _write_kept(self, staging: Path, planned: Planned) -> None:
        """The layers that have no place in the target, as a 1.x file of their own."""
        target = staging / f"{planned.stem}{KEPT_SUFFIX}"
        present = self.source.kept.get(planned.stem)
        if present is not None and self.version < EMBEDDING_SINCE and not planned.kept:
            copy_durably(present.paths[0], target)
        if not planned.kept:
            return
        version = planned.file.version
        layers = {key: source.file[source.key] for key, source in planned.kept.items()}
        items = entry_items(layers, version)
        with StreamedFile(
            target, [(item.name, item.dtype, item.shape) for item in items], metadata_of(version)
        ) as file:
            for name, entry in version_entries(version).items():
                file.write(name, [entry.data])
            for key, layer in layers.items():
                for suffix, entry in to_entries(layer, version).items():
                    file.write(f"{key}.{suffix}", [entry.data])
            file.finish()

    def _write_residual(self, staging: Path) -> None:
        residual = self.source.residual
        marks = _dequantized(residual)
        drop = set(marks) if self._restored else set()
        if residual is not None and not drop and not self._dense:
            copy_durably(residual.path, staging / RESIDUAL_NAME)
            return
        if residual is None and not self._dense:
            return
        entries = dict(residual.header.entries) if residual is not None else {}
        metadata = dict(residual.header.metadata) if residual is not None else {}
        metadata.pop(DEQUANTIZED, None)
        if self._dense:
            metadata[DEQUANTIZED] = json.dumps(sorted(self._dense))
        tensors = [(name, entry.dtype, entry.shape) for name, entry in entries.items() if name not in drop]
        tensors += [(name, *self._dense_outline(source)) for name, source in self._dense.items()]
        with StreamedFile(staging / RESIDUAL_NAME, tensors, metadata or None) as file:
            for name, entry in entries.items():
                if name not in drop and residual is not None:
                    file.write(name, [residual.slice(entry)])
            for name, (model, key) in self._dense.items():
                file.write(name, [bytes_of(model[key].weight.dequantize(self.dtype.torch))])
            file.finish()

    def _dense_outline(self, source: Source) -> tuple[str, tuple[int, ...]]:
        return self.dtype.safetensors, _shape(source.file, source.key)

    def _copy(self, staging: Path, made: Migrated) -> None:
        leave = (CONFIG_NAME,) if self._untied is not None else ()
        made.copied = copy_companions(self.source.path, staging, leave=leave)
        if self._untied is not None:
            _write_json(staging / CONFIG_NAME, self._untied)
        made.left = [name for name in self.source.others if not (staging / name).exists()]

    def _write_report(self, staging: Path, made: Migrated) -> None:
        if self.version < FIRST:
            return
        files: dict[str, UqffFile] = {}
        try:
            for planned in self.models:
                paths = [staging / name for name in made.shards[planned.stem]]
                file = UqffFile(paths)
                files[_quant(planned, files)] = file
            _write_json(staging / REPORT_NAME, report_document(build_report(files)))
        finally:
            for file in files.values():
                file.close()

    def close(self) -> None:
        """Release the files."""
        self.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def migrate_model(
    source: PathLike,
    target: PathLike,
    to: str = "1.2",
    *,
    names: Sequence[LayerName] | None = None,
    fix_biases: bool = False,
    untie: bool = False,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Migrated:
    """Turn a model directory of one generation into one of the other; see :class:`Migration` and its ``write``."""
    check_target(Path(target), force=force)
    with Migration(source, to, names=names, fix_biases=fix_biases, untie=untie) as migration:
        return migration.write(target, force=force, shard_bytes=shard_bytes, progress=progress)


class _Steps:
    """Counts what has been written."""

    def __init__(self, models: Sequence[Planned], progress: Progress | None) -> None:
        outlines = [layer for planned in models for layer in planned.moves.outlines.values()]
        self._layers = len(outlines)
        self._weights = sum(layer.weight.numel for layer in outlines)
        self._layers_done = self._weights_done = 0
        self._progress = progress

    def done(self, key: str, layer: Layer) -> None:
        self._layers_done += 1
        self._weights_done += layer.weight.numel
        if self._progress is not None:
            self._progress(Step(key, self._layers_done, self._layers, self._weights_done, self._weights))


def _shape(file: UqffFile, key: str) -> tuple[int, ...]:
    record, fields = file.fields(key)
    return record.shape_of(fields)


def _nbytes(source: Source) -> int:
    return sum(place.nbytes for place in source.file.places(source.key).values())


def _blob_version(file: UqffFile, key: str) -> Version:
    version: Version = HEADER.read(file.blob(key)[: HEADER.fixed_size], exact=False)["version"]
    return version


def _load_dtype(residual: MappedFile | None) -> DType:
    """The dtype in which the model was loaded: that of most floats of the residual, dequantised ones aside."""
    marks = _dequantized(residual)
    entries = residual.header.entries if residual is not None else {}
    found = Counter(
        entry.dtype for name, entry in entries.items() if entry.dtype in LOADED_DTYPES and name not in marks
    )
    return LOADED_DTYPES[found.most_common(1)[0][0]] if found else DType.F32


def _dequantized(residual: MappedFile | None) -> list[str]:
    """The tensors of a residual that were dequantised from layers."""
    if residual is None:
        return []
    marks = _json(residual.header.metadata, DEQUANTIZED, list)
    return [str(mark) for mark in marks if mark in residual.header.entries]


def _json(metadata: Mapping[str, str], name: str, kind: type) -> Any:
    """A JSON value of the metadata; empty if there is none."""
    try:
        value = json.loads(metadata[name]) if name in metadata else kind()
    except (ValueError, RecursionError) as exc:
        raise FormatError("metadata is not JSON", field=name, got=str(exc)) from exc
    if not isinstance(value, (dict, list)) or not isinstance(value, kind) or not all(map(_is_text, value)):
        raise FormatError("unexpected metadata", field=name, got=metadata[name])
    return value


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _version(metadata: Mapping[str, str], name: str, text: Any) -> Version:
    parts = str(text).split(".")
    if len(parts) != 3 or not all(part.isascii() and part.isdecimal() and len(part) < 4 for part in parts):
        raise FormatError("not a version", field=name, expected="0.1.0, ...", got=text)
    return Version(*map(int, parts))


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration whose head and embedding are two."""
    text_config = architecture_of(config).text_config
    if not text_config:
        return {**config, "tie_word_embeddings": False}
    return {**config, "tie_word_embeddings": False, text_config: {**config[text_config], "tie_word_embeddings": False}}


def _quant(planned: Planned, taken: Mapping[str, UqffFile]) -> str:
    """The name of a model in the report: the type that its file is named by, else the type of most layers."""
    last = planned.stem.replace("_", "-").rpartition("-")[2]
    usual = Counter(layer.weight.kind for layer in planned.moves.outlines.values()).most_common(1)[0][0]
    for name in (planned.stem, last, usual):
        try:
            kind = kind_name(name)
        except UqffError:
            kind = name if name == usual else ""
        if kind and kind not in taken:
            return kind
    return planned.stem


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    with open(path, "xb") as file:
        file.write(json.dumps(document, indent=2, ensure_ascii=False).encode("utf-8") + b"\n")
        flush_to_disk(file)
