"""What each layer of a checkpoint may become, how large that is, and how far from the layer: from weights alone.

Layers that a recipe cannot tell apart are one unit: gate and up projections of experts in one tensor, whose rules are
found by that tensor's name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from uqff.checkpoints.safetensors import TensorFiles
from uqff.codec.layer import Layer
from uqff.codes import DType, Version
from uqff.errors import ShapeError, UnsupportedError, located
from uqff.families import PLAIN_KIND
from uqff.families.loaded import Loaded
from uqff.importance.matrix import Importance
from uqff.models.engine import limits_of
from uqff.progress import Progress, Steps
from uqff.quantization.effort import Known, LayerEfforts
from uqff.quantization.plan import Goal, PlannedLayer, plan_layer
from uqff.quantization.types import EffortName, Engine, encode, kind_name, kinds
from uqff.simd.floats import Floats

if TYPE_CHECKING:
    from uqff.families.base import QuantizedTensor

__all__ = ["Candidate", "Unit", "by_error", "default_kinds", "find_units", "measure_errors", "relative"]

DEFAULT_LEFT_OUT: Final = ("q8_1", "q8k")
"""ISQ names that the engine writes and does not load."""


@dataclass
class Candidate:
    """A type that a unit may get.

    Attributes:
        kind: what is asked for.
        nbytes: of its layers' payloads.
        error: mean over tokens of the squared error of outputs, in terms of importance: Σ importance · (Δw)².
        cost: what it is taken to add to the divergence, or to the relative errors that are added up instead.
    """

    kind: str
    nbytes: int
    error: float = 0.0
    cost: float = 0.0


@dataclass
class Unit:
    """Layers that get the same type.

    Attributes:
        name: by which a recipe finds them, without ``.weight``.
        goals: the layers.
        candidates: by type.
        signal: what errors are relative to: Σ importance · w².
    """

    name: str
    goals: list[Goal]
    candidates: dict[str, Candidate] = field(default_factory=dict)
    signal: float = 0.0

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(goal.weights for goal in self.goals)


def default_kinds() -> tuple[str, ...]:
    """The types that are tried if nobody says which: those that the engine makes and loads."""
    return tuple(kind for kind in kinds() if kind not in DEFAULT_LEFT_OUT)


def find_units(
    checkpoint: TensorFiles,
    goals: Sequence[Goal],
    allowed: Sequence[str],
    *,
    fixed: Mapping[str, str] | None = None,
    tied: bool = False,
    engine: Engine,
    version: Version,
    dtype: DType,
) -> list[Unit]:
    """The units of a model with what each may become.

    A type that does not fit a layer's shape, or that the engine would not load or run there, is none of its candidates.

    Args:
        checkpoint: what is quantised.
        goals: its layers.
        allowed: the types.
        fixed: what a module becomes in any case, by its path, or by the name of its unit.
        tied: whether the embedding serves as head, which then is another name for it.
        engine: whose rules.
        version: of the file.
        dtype: the load dtype.

    Raises:
        ShapeError: nothing fits a layer.
        UnsupportedError: no such type; or of ``fixed``, no such module, or several types for one unit.
    """
    units: dict[str, Unit] = {}
    for goal in goals:
        units.setdefault(goal.name.module, Unit(goal.name.module, [])).goals.append(goal)
    names = [kind_name(kind) for kind in allowed]
    owns = _fixed_kinds(units, fixed or {}, tied)
    for unit in units.values():
        own = owns.get(unit.name)
        for kind in names if own is None else [own]:
            planned = [_planned(checkpoint, goal, kind, engine, version, dtype) for goal in unit.goals]
            made = [each for each in planned if each is not None]
            if len(made) == len(planned):
                unit.candidates[kind] = Candidate(kind, sum(each.size for each in made))
        if not unit.candidates:
            raise ShapeError(
                "no allowed type fits the layer", layer=unit.name, expected=", ".join(names), got=list(goal.shape)
            )
    return list(units.values())


def _fixed_kinds(units: Mapping[str, Unit], fixed: Mapping[str, str], tied: bool) -> dict[str, str]:
    """What units become in any case, by name."""
    places = {goal.module: name for name, unit in units.items() for goal in unit.goals}
    places |= {name: name for name in units}
    if tied:
        ends = {path: path.rpartition(".")[2] for path in places}
        for path, end in ends.items():
            if end == "embed_tokens":
                places.setdefault(f"{path.rpartition('model.')[0]}lm_head", places[path])
            elif end == "lm_head":
                places.setdefault(f"{path.rpartition('lm_head')[0]}model.embed_tokens", places[path])
    made: dict[str, str] = {}
    for path, kind in fixed.items():
        if path not in places:
            raise UnsupportedError("no such layer", field="fixed", expected="the path of a layer's module", got=path)
        name = kind_name(kind)
        if made.setdefault(places[path], name) != name:
            raise UnsupportedError(
                "layers that get the same type",
                layer=places[path],
                field="fixed",
                expected=made[places[path]],
                got=f"{name} of {path}",
            )
    return made


def _planned(
    checkpoint: TensorFiles, goal: Goal, kind: str, engine: Engine, version: Version, dtype: DType
) -> PlannedLayer | None:
    """The layer as that type; None where it would be another, or one that the engine cannot load or run."""
    try:
        made = plan_layer(checkpoint, goal, kind, None, engine=engine, version=version, dtype=dtype)
    except (ShapeError, UnsupportedError):
        return None
    weight = Layer(made.meta.weight)  # what is to be said of biases is true of every type
    unfit = made.stored != kind or (kind != PLAIN_KIND and limits_of({goal.module: weight}, version))
    return None if unfit else made


def measure_errors(
    checkpoint: TensorFiles,
    units: Sequence[Unit],
    importance: Importance | None = None,
    *,
    tied: bool = False,
    effort: EffortName = "engine",
    used: bool = False,
    engine: Engine,
    dtype: DType,
    progress: Progress | None = None,
) -> None:
    """Find the error of every candidate of every unit, weighted by importance where there is one.

    Args:
        checkpoint: holds the weights.
        units: get the errors.
        importance: of inputs; all alike where it says nothing.
        tied: whether the embedding serves as head.
        effort: how codes and scales are chosen.
        used: whether they are chosen by importance, too.
        engine: whose quantiser.
        dtype: the load dtype.
        progress: is told of each unit.
    """
    total = sum(unit.weights * len(unit.candidates) for unit in units)
    steps = Steps(progress, "plan", len(units), total, "weights")
    for unit in units:
        weighing = LayerEfforts(Known(imatrix=importance), unit.goals, tied=tied)
        efforts = LayerEfforts(Known(effort, importance if used else None), unit.goals, tied=tied)
        for at, goal in enumerate(unit.goals):
            for expert, loaded in _pieces(checkpoint, goal, dtype):
                values, row = loaded.values, weighing.of(at, expert).importance
                weights = np.ones(values.shape[-1]) if row is None else row[0].astype(np.float64)
                unit.signal += _weighted(values, weights)
                for candidate in unit.candidates.values():
                    with located(layer=goal.module):
                        record = encode(loaded, candidate.kind, engine=engine, effort=efforts.of(at, expert))
                    candidate.error += _weighted(_numbers(record) - values, weights)
            for source in goal.sources:
                checkpoint.release(source.tensor, *source.span(checkpoint))
        steps.add(unit.name, unit.weights * len(unit.candidates))


def _pieces(checkpoint: TensorFiles, goal: Goal, dtype: DType) -> Iterator[tuple[int, Loaded]]:
    """The matrix of a layer, or of each expert."""
    for expert, source in enumerate(goal.sources):
        weight: Floats = source.take(checkpoint)
        rounded = source.tensor not in checkpoint.computed
        if len(weight.shape) == 3:
            for at in range(weight.shape[0]):
                yield at, Loaded(weight[at], dtype, rounded=rounded)
        else:
            yield expert, Loaded(weight, dtype, rounded=rounded)


def _numbers(record: QuantizedTensor) -> npt.NDArray[np.float32]:
    plain: Any = record.numbers().array()
    made: npt.NDArray[np.float32] = plain.view(np.float32).reshape(record.shape)
    return made


def _weighted(values: npt.NDArray[np.float32], weights: npt.NDArray[np.float64]) -> float:
    return float((values * values).sum(0, dtype=np.float64) @ weights)


def relative(unit: Unit, candidate: Candidate) -> float:
    """Squared error of a candidate as a share of the signal."""
    return candidate.error / unit.signal if unit.signal else math.inf if candidate.error else 0.0


def by_error(units: Sequence[Unit]) -> None:
    """Costs without a text: relative squared errors.

    Each block of a model adds to the hidden state twice, so that an error within it is one of twice as many as there
    are blocks; what stands outside, head and embedding, counts as much as all of them.
    """
    blocks = {goal.name.block for unit in units for goal in unit.goals} - {None}
    for unit in units:
        inside = any(goal.name.block is not None for goal in unit.goals)
        for candidate in unit.candidates.values():
            candidate.cost = relative(unit, candidate) / (2 * len(blocks) if inside else 1)
