"""A plan of a model: which layer gets which type, for a size or a quality; and what types take on disk."""

from __future__ import annotations

import math
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from uqff.checkpoints.checkpoint import open_checkpoint
from uqff.checkpoints.numbers import NumberFiles
from uqff.codes import DType, Version
from uqff.container.atomic import atomic_file
from uqff.container.framing import build_header
from uqff.container.plan import plan_files
from uqff.errors import UnsupportedError
from uqff.importance.matrix import Importance
from uqff.inspection.remote import checkpoint_looked_into
from uqff.models.architectures import is_tied_model
from uqff.planning.assign import Assignment, frontier, within_size
from uqff.planning.candidates import Unit, by_error, default_kinds, find_units, measure_errors
from uqff.planning.quantised import INSTEAD, is_uqff, uqff_sizes
from uqff.planning.sizes import TypeSize, type_sizes
from uqff.planning.topology import topology
from uqff.planning.whole import doubts, within_divergence
from uqff.progress import Progress
from uqff.quantization.plan import Goal, load_dtype, plan_layer, plan_model, residual_names
from uqff.quantization.recipe import parse_recipe
from uqff.quantization.types import EffortName, Engine, check_effort

if TYPE_CHECKING:
    from uqff.evaluation.evaluate import Evaluation
    from uqff.evaluation.measures import Estimate
    from uqff.evaluation.windows import TextWindows

__all__ = ["ModelPlan", "PlanPoint", "plan_types"]

How = Literal["error", "kld"]

SCHEMA = 1
"""Of the document; raised when a member is renamed, removed or changes its meaning."""


@dataclass(frozen=True)
class PlanPoint:
    """A model of one type or of a mix.

    Attributes:
        name: of the type, or ``mix``.
        nbytes: of all layers' payloads.
        bits_per_weight: of them.
        cost: mean divergence, if that was measured; else the sum of relative squared errors, of each layer its share.
    """

    name: str
    nbytes: int
    bits_per_weight: float
    cost: float


@dataclass
class ModelPlan:
    """What :func:`plan_types` found.

    Attributes:
        source: the checkpoint, or the model that is UQFF already.
        weights: of all layers.
        residual_bytes: of the tensors that are no layers.
        sizes: what each type takes, without a mix; of a UQFF model, each of the types that it is there in.
        measure: how costs were found; None if no mix was asked for.
        types: of each layer's weight, by the name that a recipe finds it by; empty without a mix.
        mix: the mix that was asked for.
        frontier: all mixes of least cost, by size.
        uniform: all layers of one type, promoted by nobody.
        measured: mean divergence of the mix as a whole on the text that it was planned with; None without one.
        file_bytes: of the ``.uqff`` files that ``uqff quantize`` makes of it.
        check: the mix measured on another text; None if that was not asked for.
        units: what may become what, at which cost: for :mod:`uqff.planning.assign`.
    """

    source: str
    weights: int
    residual_bytes: int
    sizes: list[TypeSize]
    measure: How | None = None
    types: dict[str, str] = field(default_factory=dict)
    mix: PlanPoint | None = None
    frontier: list[PlanPoint] = field(default_factory=list)
    uniform: list[PlanPoint] = field(default_factory=list)
    measured: Estimate | None = None
    file_bytes: int = 0
    check: Evaluation | None = None
    units: list[Unit] = field(default_factory=list, repr=False)

    @property
    def kind(self) -> str:
        """The type that most layers of the mix have: what ``uqff quantize --isq`` may be given beside the recipe."""
        return Counter(self.types.values()).most_common(1)[0][0]

    @property
    def doubts(self) -> list[str]:
        """Why the divergence that is predicted may be another, in sentences."""
        if self.mix is None or self.measured is None:
            return []
        check = None if self.check is None or self.check.distances is None else self.check.distances.kld
        return doubts(self.mix.cost, self.measured, check)

    @property
    def topology(self) -> str:
        """The mix as the engine's topology YAML."""
        return topology(self.types)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the topology to a file, which is replaced if it is there."""
        with atomic_file(Path(path)) as file:
            file.write(self.topology.encode())

    @property
    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "schema": SCHEMA,
            "source": self.source,
            "weights": self.weights,
            "residual_bytes": self.residual_bytes,
            "sizes": [vars(each) for each in self.sizes],
            "measure": self.measure,
            "types": self.types,
            "mix": None if self.mix is None else vars(self.mix),
            "measured": None if self.measured is None else self.measured.document,
            "doubts": self.doubts,
            "file_bytes": self.file_bytes,
            "frontier": [vars(each) for each in self.frontier],
            "uniform": [vars(each) for each in self.uniform],
            "check": None if self.check is None else self.check.document,
        }


def plan_types(
    source: str | os.PathLike[str],
    *,
    bits: float | None = None,
    nbytes: int | None = None,
    kld: float | None = None,
    measure: How | None = None,
    text: str | os.PathLike[str] | None = None,
    check: str | os.PathLike[str] | None = None,
    imatrix: Importance | str | os.PathLike[str] | None = None,
    effort: EffortName = "engine",
    kinds: Sequence[str] | None = None,
    fixed: Mapping[str, str] | None = None,
    ranks: int = 1,
    context: int = 512,
    windows: int = 8,
    version: str | tuple[int, int, int] = "1.2",
    engine: Engine = "0.9",
    dtype: str = "auto",
    mmproj: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> ModelPlan:
    """Find the best mix of types for a size, or the smallest one for a quality; or what each type alone takes.

    The error of every type in every layer is found once: squared, weighted by the importance of inputs. With
    ``measure="kld"``, each layer is also quantised by itself, one at a time, and the divergence of the model's
    predictions of the text says what an error in that layer costs; costs of layers are added up. Without a text,
    each layer of a block counts by its relative error, and what stands outside, as the head does, as much as all of
    them. Then :mod:`uqff.planning.assign` finds the mix. With ``measure="kld"`` it is measured as a whole, which is
    what ``kld`` bounds; where that is not what was predicted, ``doubts`` of the plan says so.

    Args:
        source: the checkpoint; or a UQFF model, which takes what it takes: ``sizes`` are those of its own types.
        bits: per weight of all layers, at most.
        nbytes: of the ``.uqff`` files' layers, at most.
        kld: mean divergence on the text, at most; needs ``measure="kld"``.
        measure: how costs are found; ``kld`` if there is a text, else ``error``, if None.
        text: a file of UTF-8 text, for importance and divergence.
        check: another text, on which the mix is measured in the end.
        imatrix: importance of inputs, or the file of it, by which errors are weighted and weights are quantised. If
            None, errors are weighted by what is found with the text, and weights are quantised without.
        effort: how codes and scales are chosen. :func:`uqff.quantize_model` must be given the same, and the same
            ``imatrix``.
        kinds: the types that may be used; all that the engine makes and loads if None.
        fixed: the type of a module in any case, by its path: ``{"lm_head": "q6k"}``.
        ranks: for which ``sizes`` are worked out.
        context: tokens of a window of a text.
        windows: how many of them are used, at most.
        version: of UQFF.
        engine: whose quantiser and rules.
        dtype: the load dtype, as for :func:`uqff.quantize_model`.
        mmproj: of a GGUF file, see :func:`uqff.open_checkpoint`; not with a text.
        progress: is told of each layer.

    Raises:
        UnsupportedError: more than one target; types to choose for a model that is UQFF; no mix is that small or that
            good; a target that needs a text.
        UqffError: the checkpoint breaks a rule, or no type fits a layer.
        OSError: a file cannot be read.

    >>> plan = uqff.plan_types("checkpoint", bits=4.5)
    >>> plan.mix.bits_per_weight <= 4.5, sorted(plan.types)[:2]
    (True, ['model.embed_tokens', 'model.layers.0.mlp.down_proj'])
    """
    targets = [name for name, value in (("bits", bits), ("nbytes", nbytes), ("kld", kld)) if value is not None]
    if len(targets) > 1:
        raise UnsupportedError("one target at a time", expected="bits, nbytes or kld", got=" and ".join(targets))
    for name, value in (("bits", bits), ("nbytes", nbytes), ("kld", kld)):
        if value is not None and not (0 < value < math.inf):
            raise UnsupportedError("not a target", field=name, expected="a number above 0", got=value)
    measure = measure or ("kld" if text is not None else "error")
    if text is None and (measure == "kld" or kld is not None):
        raise UnsupportedError("divergence needs a text to be measured on", field="text", expected="a file")
    if kld is not None and measure != "kld":
        raise UnsupportedError("divergence is not measured", field="measure", expected="kld", got=measure)
    if mmproj is not None and text is not None:
        raise UnsupportedError("a text is measured with what is beside the model", field="mmproj", got=str(mmproj))
    check_effort(effort)
    if is_uqff(source):
        if targets or kinds is not None or fixed:
            raise UnsupportedError("the model is UQFF already", file=os.fspath(source), expected=INSTEAD)
        return ModelPlan(os.fspath(source), *uqff_sizes(source, ranks=ranks))
    version_ = Version.of(version)
    looked_into = checkpoint_looked_into(source, weights=bool(targets), mmproj=mmproj)
    with looked_into as looked, open_checkpoint(looked.path, mmproj=mmproj) as opened:
        checkpoint = NumberFiles(opened)
        goals = plan_model(checkpoint, version_, None, promote=True)
        load = load_dtype(checkpoint, goals, dtype)
        rules: Any = {"engine": engine, "version": version_, "dtype": load}
        allowed = list(kinds) if kinds is not None else list(default_kinds())
        made = ModelPlan(
            os.fspath(source),
            sum(goal.weights for goal in goals),
            sum(checkpoint.nbytes(name) for name in residual_names(checkpoint, goals)),
            type_sizes(checkpoint, goals, allowed, ranks=ranks, **rules),
        )
        if not targets:
            return made
        unpromoted = plan_model(checkpoint, version_, None, promote=False)  # what a recipe names is not promoted
        tied = is_tied_model(checkpoint.config)
        units = find_units(checkpoint, unpromoted, allowed, fixed=fixed, tied=tied, **rules)
        most = nbytes if nbytes is not None else int((bits or 0) * made.weights / 8)
        if kld is None:
            within_size(units, most)  # what cannot be as small is known before the work
        for each in (text, check):  # what cannot be read, or is too short, is found before the work
            if each is not None:
                _windows(source, each, context, windows)
        importance = _importance(source, imatrix, text, context, windows, progress)
        options: Any = {"effort": effort, "engine": engine}
        used = None if imatrix is None else importance
        measure_errors(
            checkpoint, units, importance, tied=tied, used=used is not None, dtype=load, progress=progress, **options
        )
        if measure == "kld" and text is not None:
            cut = _windows(source, text, context, windows)
            chosen, made.measured = _measured(source, units, cut, used, load, options, progress, most, kld)
        else:
            by_error(units)
            chosen = within_size(units, most)
        made.measure, made.units = measure, units
        made.types = {unit.name: each.kind for unit, each in zip(units, chosen.chosen, strict=True)}
        made.mix = _point("mix", chosen, made.weights)
        made.frontier = [_point("mix", each, made.weights) for each in frontier(units)]
        made.uniform = _uniform(units, allowed, made.weights)
        made.file_bytes = _file_bytes(checkpoint, goals, made, rules)
    if check is not None:
        options = {"version": version, "engine": engine, "dtype": dtype}
        sizes = {"context": context, "windows": windows, "progress": progress}
        made.check = _checked(source, made, check, used, effort, options, sizes)
    return made


def _importance(
    source: str | os.PathLike[str],
    given: Importance | str | os.PathLike[str] | None,
    text: str | os.PathLike[str] | None,
    context: int,
    windows: int,
    progress: Progress | None,
) -> Importance | None:
    if given is not None:
        return given if isinstance(given, Importance) else Importance.open(given)
    if text is None:
        return None
    from uqff.calibration.calibrate import calibrate

    return calibrate(source, text=text, context=context, windows=windows, progress=progress)


def _windows(source: str | os.PathLike[str], text: str | os.PathLike[str], context: int, windows: int) -> TextWindows:
    from uqff.evaluation.evaluate import text_windows

    return text_windows(source, None, text, context=context, most=windows)


def _measured(
    source: str | os.PathLike[str],
    units: Sequence[Unit],
    windows: TextWindows,
    importance: Importance | None,
    dtype: DType,
    options: Any,
    progress: Progress | None,
    nbytes: int,
    kld: float | None,
) -> tuple[Assignment, Estimate]:
    """What the units cost; the mix, and how far it is as a whole."""
    import torch

    from uqff.parallel.model import load_model
    from uqff.planning.swapping import Swapper

    model = load_model(source, dtype=torch.float32)
    swapper = Swapper(model, windows, importance, dtype=dtype.torch, **options)
    swapper.measure(units, progress)

    def of(mix: Assignment) -> Estimate:
        return swapper.divergence_of(units, [each.kind for each in mix.chosen])

    if kld is not None:
        return within_divergence(units, kld, of)
    chosen = within_size(units, nbytes)
    return chosen, of(chosen)


def _point(name: str, assignment: Assignment, weights: int) -> PlanPoint:
    return PlanPoint(name, assignment.nbytes, 8 * assignment.nbytes / weights, assignment.cost)


def _uniform(units: Sequence[Unit], allowed: Sequence[str], weights: int) -> list[PlanPoint]:
    made = []
    for kind in allowed:
        if all(kind in unit.candidates for unit in units):
            made.append(_point(kind, Assignment(tuple(unit.candidates[kind] for unit in units)), weights))
    return sorted(made, key=lambda point: point.nbytes)


def _file_bytes(checkpoint: NumberFiles, goals: Sequence[Goal], made: ModelPlan, rules: dict[str, Any]) -> int:
    recipe = parse_recipe(made.topology)
    layers = {goal.key: plan_layer(checkpoint, goal, made.kind, recipe, **rules).meta for goal in goals}
    plan = plan_files(layers, rules["version"])
    total = 0
    for shard in plan.shards:
        header, _ = build_header([(item.name, item.dtype, item.shape) for item in shard], plan.metadata)
        total += len(header) + sum(item.nbytes for item in shard)
    return total


def _checked(
    source: str | os.PathLike[str],
    made: ModelPlan,
    text: str | os.PathLike[str],
    importance: Importance | None,
    effort: EffortName,
    rules: dict[str, Any],
    windows: dict[str, Any],
) -> Evaluation:
    """The mix, quantised into a directory that does not stay, beside its source."""
    from uqff.evaluation.evaluate import evaluate
    from uqff.quantization.run import quantize_model

    with tempfile.TemporaryDirectory(prefix="uqff-plan-") as folder:
        target = Path(folder) / "mix"
        recipe = parse_recipe(made.topology)
        quantize_model(
            source,
            target,
            made.kind,
            recipe=recipe,
            effort=effort,
            imatrix=importance,
            measure=False,
            force=False,
            **rules,
        )
        return replace(evaluate(target, reference=source, text=text, **windows), model="mix")
