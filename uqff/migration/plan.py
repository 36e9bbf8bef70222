"""A migration before a byte moves: the moves of every model of a directory, and what stands in their way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from uqff.checkpoints.model import ModelDirectory
from uqff.codec.layer import Layer
from uqff.codes import LOADED_DTYPES, DType, Version
from uqff.container.file import UqffFile
from uqff.container.mapped import MappedFile
from uqff.errors import FormatError, ShapeError, UnsupportedError, UqffError, located
from uqff.families import Unquant
from uqff.families.rows import can_reorder
from uqff.migration.embedding import (
    EMBEDDING_SINCE,
    embedding_of,
    is_always_tied,
    is_tied_head,
    lowered,
    raised,
    untied,
)
from uqff.migration.mapping import LayerSource, MappingRow, ModelMapping, Move, Problem, plan_mapping
from uqff.migration.origin import blob_versions, dequantized, inherited, note_of, were_stacked
from uqff.models.architectures import LayerName, check_numbered, layer_names, stacked_names
from uqff.models.assets import CONFIG_NAME
from uqff.models.engine import Limit, limits_of, refuse_limits
from uqff.models.layouts import LAYOUTS_SINCE, WeightLayout, half_split_order, without_rope_layout
from uqff.models.names import check_residual, check_shapes, known_names, with_stacked_experts
from uqff.schema.entries import FIRST

if TYPE_CHECKING:
    pass

__all__ = ["Plan", "PlannedModel", "plan_migration"]


@dataclass
class PlannedModel:
    """The migration of one quantised model.

    Attributes:
        stem: name of its files, without number.
        file: the model.
        mapping: what becomes what.
        kept: layers that have no place in the target, by key.
        versions: of blobs, by key, where they are not that of the format.
        metadata: of 1.x files to be written.
        limits: why the engine would not load or not run it.
    """

    stem: str
    file: UqffFile
    mapping: ModelMapping
    kept: dict[str, LayerSource] = field(default_factory=dict)
    versions: dict[str, Version] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    limits: list[Limit] = field(default_factory=list)

    @property
    def rows(self) -> list[MappingRow]:
        """The mapping, by index or key."""
        return self.mapping.rows


@dataclass
class Plan:
    """The migration of a model directory.

    Attributes:
        directory: the source.
        version: to be written.
        dtype: the load dtype, as the residual tells it.
        models: one for each quantised model.
        dense: tensors that the residual gets in addition, dequantised, by name.
        dropped: tensors that it had in addition, and no longer needs.
        config: a new ``config.json``, None if it stays.
        warnings: what the engine will make of the result, where that is not what one would think.
    """

    directory: ModelDirectory
    version: Version
    dtype: DType
    models: list[PlannedModel] = field(default_factory=list)
    dense: dict[str, LayerSource] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    config: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[Problem]:
        """What cannot be expressed."""
        return [problem for planned in self.models for problem in planned.mapping.problems]

    def check(self) -> None:
        """Refuse what cannot be expressed.

        Raises:
            UnsupportedError: naming the first; all are in :attr:`problems`.
        """
        if self.problems:
            first, count = self.problems[0], len(self.problems)
            problem = f"{count} {'layer' if count == 1 else 'layers'} cannot be expressed in {self.version}"
            stacks = any(move.how in ("stack", "unstack") for planned in self.models for move in planned.mapping.failed)
            hint = "layers of another version, or experts dequantised (--plain-experts)" if stacks else None
            raise UnsupportedError(problem, layer=first.layer, expected=hint, got=first.reason)

    def check_limits(self) -> None:
        """Refuse what the engine could not load or run.

        Raises:
            UnsupportedError: telling all that it could not.
        """
        refuse_limits(limit for planned in self.models for limit in planned.limits)


def plan_migration(
    directory: ModelDirectory,
    version: str | tuple[int, int, int] = "1.2",
    *,
    names: Sequence[LayerName] | None = None,
    fix_biases: str | None = None,
    plain_experts: bool = False,
    untie: bool = False,
) -> Plan:
    """Look at all layers of a model directory, and find what becomes of them.

    Args:
        directory: with one quantised model or several.
        version: of UQFF, see :data:`uqff.codes.FORMATS`.
        names: of the layers of 0.x, by index, in place of those of the architecture; see :mod:`uqff.models.names`.
        fix_biases: the dtype of activations (``f32``, ``f16``, ``bf16``; ``load`` for the load dtype) for which to
            store biases, where they are in one that the engine cannot add to them; None to leave them.
        plain_experts: store experts that the format cannot hold as a stack dequantised, in the load dtype.
        untie: say in the new ``config.json`` that head and embedding are two.

    Raises:
        UqffError: a layer is broken, or the model is not the one that its ``config.json`` describes.
    """
    return _Planner(directory, Version.of(version), names, fix_biases, plain_experts).run(untie=untie)


class _Planner:
    def __init__(
        self,
        directory: ModelDirectory,
        version: Version,
        names: Sequence[LayerName] | None,
        fix_biases: str | None,
        plain_experts: bool,
    ) -> None:
        self.config = directory.config
        self.names = names
        self.layout = _layout(directory, version)
        self.fix_biases = fix_biases
        self.plain_experts = plain_experts
        self.marks = dequantized(directory.residual)
        self.plan = Plan(directory, version, _load_dtype(directory.residual, self.marks))
        if fix_biases not in (None, "load", *map(str.lower, LOADED_DTYPES)):
            expected = "load, f32, f16 or bf16"
            raise UnsupportedError("unknown dtype", field="fix_biases", expected=expected, got=fix_biases)

    def run(self, *, untie: bool) -> Plan:
        plan = self.plan
        restored = [self.add_model(stem, file) for stem, file in plan.directory.models.items()]
        if self.marks and plan.version >= EMBEDDING_SINCE:
            if all(restored):
                plan.dropped = set(self.marks)
            elif any(restored):
                raise FormatError(
                    "some models of the directory have the codes of their embedding, others do not",
                    file=str(plan.directory.path),
                    expected="all or none: migrate them one by one",
                )
            else:
                plan.warnings.append(f"{', '.join(self.marks)}: was dequantised, and its codes are not there")
        self.plan_head(untie=untie)
        if self.layout.heads:
            plan.config = without_rope_layout(plan.config or self.config)
            plan.warnings.append("rows of Q and K were adjacent and are put in order: older engines know no other")
        return plan

    def add_model(self, stem: str, file: UqffFile) -> bool:
        """Plan a model; gives whether the codes of its embedding are there again."""
        plan, restored = self.plan, False
        problems: list[Problem] = []
        kept: dict[str, LayerSource] = {}
        if file.generation == "0.x" and plan.version >= FIRST:
            moves = self.moves_up(file)
        elif file.generation == "1.x" and plan.version < FIRST:
            moves, kept = self.moves_down(file, problems)
        else:
            moves = [_same(file, key) for key in file]
        embedding = embedding_of(self.config, file)
        if embedding is not None and plan.version < EMBEDDING_SINCE:
            self.need_dense(file, embedding)
            if plan.version >= FIRST:
                moves, kept = lowered(self.config, file, moves, embedding)
        elif plan.version >= EMBEDDING_SINCE:
            moves, restored = raised(self.config, moves, self.marks, plan.directory.kept.get(stem))
        plain_dtype = plan.dtype if self.plain_experts else None
        moves = [self.in_order(move, problems) for move in moves]
        planned = PlannedModel(
            stem, file, plan_mapping(moves, plan.version, self.bias_dtypes(stem, file), plain_dtype), kept
        )
        planned.mapping.problems[:0] = problems
        planned.mapping.rows.sort(key=lambda row: (row.index or 0, row.key, row.expert or 0))
        self.note_origin(planned)
        self.warn(planned)
        plan.models.append(planned)
        return restored

    def moves_up(self, file: UqffFile) -> list[Move]:
        """From blobs to entries."""
        keys = {int(key): key for key in file}
        shapes = {index: _shape(file, key) for index, key in keys.items()}
        residual = self.plan.directory.residual
        tensors = {name: entry.shape for name, entry in residual.header.entries.items()} if residual else {}
        with located(file=file.paths[0]):
            try:
                names = known_names(self.config, shapes) if self.names is None else self.names
                if keys.keys() != {name.index for name in names}:
                    got = f"{len(keys)}, index {min(keys)} to {max(keys)}"
                    raise FormatError("the names are of another file", expected=f"{len(names)} layers", got=got)
                check_residual(names, tensors, shapes)
            except UqffError as error:
                if error.field == "config.architectures":
                    error.expected = f"{error.expected}; or a file of names"
                raise
        moves = []
        for entry in stacked_names(names):
            if self.is_dense_head(file, entry.parts[0], keys):
                continue
            parts = tuple(sorted(entry.parts, key=lambda name: name.expert or 0))
            sources = tuple(LayerSource(file, keys[name.index]) for name in parts)
            moves.append(Move(sources, (entry.key,), parts, "same" if parts[0].expert is None else "stack"))
        return moves

    def is_dense_head(self, file: UqffFile, name: LayerName, keys: Mapping[int, str]) -> bool:
        """Whether a blob is the dense embedding again, as 0.x needs it and 1.x of such a model does not have it."""
        if not is_always_tied(self.config, name.module) or name.weight not in file.residual:
            return False
        record, _ = file.fields(keys[name.index])
        if not record.UNQUANTISED:
            return False
        weight, bias = file[keys[name.index]]
        return bias is None and weight == Unquant.of(file.residual[name.weight])

    def moves_down(self, file: UqffFile, problems: list[Problem]) -> tuple[list[Move], dict[str, LayerSource]]:
        """From entries to blobs, and the layers that have no place there."""
        embedding = embedding_of(self.config, file)
        names = self.names
        if names is None:
            check_numbered(self.config)
            names = layer_names(self.config)
            names = with_stacked_experts(names) if were_stacked(file.metadata) else names
        shapes: dict[int, tuple[int, ...]] = {}
        moves, used = [], set()
        for entry in stacked_names(names):
            key, index = entry.key, entry.parts[0].index
            if key not in file and embedding is not None and is_tied_head(self.config, key):
                key = embedding
            if key not in file and is_always_tied(self.config, key) and entry.parts[0].weight in file.residual:
                moves.append(Move((LayerSource(file, entry.parts[0].weight),), (str(index),), entry.parts, "dense"))
                continue
            if key not in file:
                problems.append(Problem(key, f"no such layer in the file, and 0.x needs one of index {index}"))
                continue
            used.add(key)
            shape = _shape(file, key)
            parts = tuple(sorted(entry.parts, key=lambda name: name.expert or 0))
            unstack = parts[0].expert is not None
            if unstack and (len(shape) < 3 or shape[0] != len(parts)):
                expected = f"a stack of {len(parts)}"
                path = str(file.paths[0])
                raise ShapeError("wrong number of experts", file=path, layer=key, expected=expected, got=list(shape))
            shapes |= {name.index: shape[1:] if unstack else shape for name in parts}
            targets = tuple(str(name.index) for name in parts)
            moves.append(Move((LayerSource(file, key),), targets, parts, "unstack" if unstack else "same"))
        if self.names is None:
            with located(file=file.paths[0]):
                check_shapes(self.config, [name for name in names if name.index in shapes], shapes)
        kept = {} if embedding is None or embedding in used else {embedding: LayerSource(file, embedding)}
        problems += [Problem(key, "0.x has no index for it") for key in file if key not in used and key not in kept]
        return moves, kept

    def in_order(self, move: Move, problems: list[Problem]) -> Move:
        """A move of adjacent rows of Q and K to a version whose readers do not know of such puts them in order."""
        name, source = move.names[0], move.sources[0]
        heads = self.layout.heads_of(name.module)
        if heads is None:
            return move
        weight = Layer.of_fields(*source.file.fields(source.key)).weight
        if not can_reorder(weight):
            reason = f"its rows are adjacent, and those of {weight.kind} cannot be put in order exactly"
            problems.append(Problem(name.module, reason))
            return move
        return replace(move, order=half_split_order(weight.shape[0], heads, layer=name.module))

    def need_dense(self, file: UqffFile, key: str) -> None:
        """Note that the residual needs the embedding, too; of several models, that of the most bytes."""
        name, source = f"{key}.weight", LayerSource(file, key)
        residual = self.plan.directory.residual
        if residual is not None and name in residual.header.entries:
            return
        other = self.plan.dense.get(name)
        if other is None or _nbytes(other) < _nbytes(source):
            self.plan.dense[name] = source

    def bias_dtypes(self, stem: str, file: UqffFile) -> dict[str, DType]:
        """The dtype in which to store the biases that the engine cannot add, by key."""
        activations = LOADED_DTYPES.get((self.fix_biases or "").upper(), self.plan.dtype)
        found: dict[str, DType] = {}
        odd = Counter[str]()
        for key in file:
            record, fields = file.fields(key)
            if fields["bias"] is None:
                continue
            stored, wanted = fields["bias"]["dtype"], record.BIAS.dtype(activations, self.plan.version)
            if stored is not wanted:
                odd[f"biases of {record.family.title} layers in {stored.safetensors}"] += 1
                found[key] = wanted
        for what, count in odd.items():
            added = f"activations in {activations.safetensors}"
            done = f"changed for {added}" if self.fix_biases else f"not for {added}; --fix-biases changes them"
            self.plan.warnings.append(f"{stem}: {count} {what}, {done}")
        return found if self.fix_biases else {}

    def note_origin(self, planned: PlannedModel) -> None:
        """Versions of the blobs: noted in 1.x, restored from there in 0.x."""
        file = planned.file
        if file.generation == "0.x" and self.plan.version >= FIRST:
            stacked = any(name.stacked and name.expert is None for move in planned.mapping.moves for name in move.names)
            planned.metadata = note_of(file, stacked=stacked)
        elif file.generation == "1.x" and self.plan.version >= FIRST:
            planned.metadata = inherited(file.metadata)
        elif file.generation == "1.x":
            planned.versions = blob_versions(file.metadata, planned.mapping.metas, self.plan.version)

    def warn(self, planned: PlannedModel) -> None:
        """Say what is left out, and what no engine loads."""
        warnings, stem = self.plan.warnings, planned.stem
        extra = planned.file.extra
        if len(extra):
            warnings.append(f"{stem}: entries that belong to no layer are left out: {', '.join(extra)}")
        moved = planned.mapping.moves
        plain = [move.targets[0] for move in moved if move.how == "plain"]
        plain += [move.names[0].key for move in moved if move.how == "plain_unstack"]
        if plain:
            dtype = self.plan.dtype.safetensors
            warnings.append(f"{stem}: dequantised, stored as {dtype}, and not to be had back: {', '.join(plain)}")
        planned.limits = limits_of(planned.mapping.metas, self.plan.version)
        warnings += [f"{stem}: {limit}" for limit in planned.limits]
        for move in moved:
            made = [planned.mapping.metas[key] for key in move.targets if key in planned.mapping.metas]
            whole = _nbytes(move.sources[0]) if move.how == "unstack" else 0
            if whole and (size := sum(layer.weight.nbytes for layer in made)) > 1.1 * whole:
                times = f"{size / whole:.1f} times as large"
                warnings.append(f"{stem}: {move.names[0].key}: {times}: each expert needs the scales of all")

    def plan_head(self, *, untie: bool) -> None:
        """Of tied models that become 1.x ones, with their embedding dense."""
        models = self.plan.models
        keys = [row.key for planned in models for row in planned.rows] if self.plan.version >= FIRST else []
        tied = models[0].file.generation == "0.x" and any(is_tied_head(self.config, key) for key in keys)
        if untie:
            if not tied:
                expected = "a 0.x model with a tied head"
                raise UnsupportedError("nothing to untie", field="config.tie_word_embeddings", expected=expected)
            self.plan.config = untied(self.config)
        elif tied and self.config.get("tie_word_embeddings") is not False:
            self.plan.warnings.append(
                "head and embedding are tied: the engine takes one matrix for both, where pre-1.0 ones had a quantised "
                "head beside the dense embedding; --untie keeps both"
            )


def _layout(directory: ModelDirectory, version: Version) -> WeightLayout:
    """How the rows lie, where that must change: an older version gets them as a checkpoint has them.

    Raises:
        UnsupportedError: they cannot be had so.
    """
    path = str(directory.path / CONFIG_NAME)
    with located(file=path):
        layout = WeightLayout.of(directory.config)
    newest = max((file.version for file in directory.models.values()), default=version)
    if not version < LAYOUTS_SINCE <= newest:
        return WeightLayout()
    for name in directory.residual.header.entries if directory.residual is not None else ():
        if layout.heads_of(name.rpartition(".")[0]):
            problem = "a tensor of the residual has adjacent rows"
            raise UnsupportedError(problem, file=str(directory.path), field=name, expected="a layer")
    return layout.check(path)


def _same(file: UqffFile, key: str) -> Move:
    index = int(key) if file.generation == "0.x" else 0
    return Move((LayerSource(file, key),), (key,), (LayerName(index, key, f"{key}.weight", None),))


def _shape(file: UqffFile, key: str) -> tuple[int, ...]:
    record, fields = file.fields(key)
    return record.parse(fields).shape


def _nbytes(source: LayerSource) -> int:
    return sum(place.nbytes for place in source.file.places(source.key).values())


def _load_dtype(residual: MappedFile | None, marks: Sequence[str]) -> DType:
    """The dtype in which the model was loaded: that of most floats of the residual, dequantised ones aside."""
    entries: Mapping[str, Any] = residual.header.entries if residual is not None else {}
    floats = [entry.dtype for name, entry in entries.items() if entry.dtype in LOADED_DTYPES and name not in marks]
    return LOADED_DTYPES[Counter(floats).most_common(1)[0][0]] if floats else DType.F32
