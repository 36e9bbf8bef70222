"""What a run of the pipeline made: per layer, per type, as a document."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from uqff.codes import Version
from uqff.models.engine import Limit, limits_document
from uqff.quantization.bias import BiasLoss, StoredBias, bias_losses
from uqff.quantization.error import UNMEASURED, Distance, Measure
from uqff.quantization.recipe import RecipeRule
from uqff.quantization.types import KEEP, Fallback

if TYPE_CHECKING:
    from uqff.quantization.plan import Goal, PlannedLayer

__all__ = [
    "AdapterResult",
    "LayerResult",
    "Output",
    "Result",
    "TypeResult",
    "fallback_lines",
    "result_document",
    "type_rows",
]

LISTED: Final = 3
"""Layers that a line names."""


@dataclass(frozen=True)
class LayerResult:
    """What became of a layer.

    Attributes:
        index: number in a 0.x file, None in 1.x.
        module: path in the model.
        default: the type asked for by default.
        requested: the type asked for this layer, after recipe and promotion.
        promoted: whether it is another because the layer is a head or an embedding.
        stored: the type it has.
        shape: of the weight.
        nbytes: of its blob or entries, bias included.
        distance: of the stored weight from the weight as loaded.
        bias: as it is stored, measured against the checkpoint's; None if there is none.
        kept: whether the weight is as the checkpoint has it, because that was asked for.
    """

    index: int | None
    module: str
    default: str
    requested: str
    promoted: bool
    stored: str
    shape: tuple[int, ...]
    nbytes: int
    distance: Distance
    bias: StoredBias | None = None
    kept: bool = False

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass
class Output:
    """One type of a run.

    Attributes:
        kind: asked for by default.
        shards: names of the files.
        nbytes: of the files.
        layers: in the order of the file.
        fallbacks: layers that are stored as another type than asked for.
        limits: why the engine would not load or not run it.
    """

    kind: str
    shards: list[str] = field(default_factory=list)
    nbytes: int = 0
    layers: list[LayerResult] = field(default_factory=list)
    fallbacks: list[Fallback] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)

    @property
    def bias_losses(self) -> list[BiasLoss]:
        """Biases that are not what the checkpoint has."""
        return list(bias_losses((layer.module, layer.bias) for layer in self.layers))


@dataclass(frozen=True)
class AdapterResult:
    """An adapter that was merged.

    Attributes:
        path: of its directory.
        weight: that it was given.
        matrices: how many it has changed, experts counted singly.
        missing: layers that its configuration names and it has no factors for, which are as they were.
    """

    path: Path
    weight: float
    matrices: int
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """What a run made.

    Attributes:
        path: the model directory.
        dtype: the load dtype, as safetensors spells it.
        version: of the format.
        outputs: one per type.
        residual_tensors: how many tensors were left as they are.
        residual_bytes: of ``residual.safetensors``.
        unmatched: rules of the recipe that select nothing.
        notes: what the engine would have made otherwise, in sentences.
        lora: adapters that were merged, in order.
    """

    path: Path
    dtype: str
    version: Version
    outputs: list[Output]
    residual_tensors: int
    residual_bytes: int
    unmatched: list[RecipeRule]
    notes: list[str] = field(default_factory=list)
    lora: list[AdapterResult] = field(default_factory=list)


@dataclass(frozen=True)
class TypeResult:
    """All layers of one stored type.

    Attributes:
        kind: the type.
        layers: how many.
        weights: in all of them.
        nbytes: of their blobs or entries.
        relative: root mean square error of all their weights over the root mean square of these.
        worst: the layers of the largest relative error, the worst first; at most three.
    """

    kind: str
    layers: int
    weights: int
    nbytes: int
    relative: float
    worst: tuple[LayerResult, ...]

    @property
    def bits_per_weight(self) -> float:
        """Of the blobs or entries, biases included."""
        return 8 * self.nbytes / self.weights


WORST = 3


def type_rows(layers: Iterable[LayerResult]) -> list[TypeResult]:
    """The layers of an output by stored type, in the order in which the types first occur."""
    groups: dict[str, list[LayerResult]] = {}
    for layer in layers:
        groups.setdefault(layer.stored, []).append(layer)
    return [_type_row(kind, group) for kind, group in groups.items()]


def _type_row(kind: str, layers: list[LayerResult]) -> TypeResult:
    error = math.fsum(layer.distance.rms**2 * layer.weights for layer in layers)
    signal = math.fsum(layer.distance.norm**2 * layer.weights for layer in layers)
    worst = sorted((layer for layer in layers if layer.distance.relative > 0), key=lambda r: -r.distance.relative)
    return TypeResult(
        kind,
        len(layers),
        sum(layer.weights for layer in layers),
        sum(layer.nbytes for layer in layers),
        math.sqrt(error / signal) if signal else 0.0,
        tuple(worst[:WORST]),
    )


def result_document(result: Result) -> dict[str, Any]:
    """The result as JSON values: names as in the report that the engine writes beside 1.x files."""
    return {
        "path": str(result.path),
        "uqff_version": str(result.version),
        "dtype": result.dtype,
        "residual": {"tensors": result.residual_tensors, "bytes": result.residual_bytes},
        "unmatched": [{"selector": rule.selector, "line": rule.line} for rule in result.unmatched],
        "notes": result.notes,
        "lora": [
            {"path": str(each.path), "weight": each.weight, "matrices": each.matrices, "missing": each.missing}
            for each in result.lora
        ],
        "outputs": [_output_document(output) for output in result.outputs],
    }


def _output_document(output: Output) -> dict[str, Any]:
    return {
        "quant": output.kind,
        "shards": output.shards,
        "bytes": output.nbytes,
        "layers": len(output.layers),
        "types": [
            {
                "stored": row.kind,
                "layers": row.layers,
                "weights": row.weights,
                "bytes": row.nbytes,
                "bits_per_weight": row.bits_per_weight,
                "relative_rms": row.relative,
                "worst": [layer.module for layer in row.worst],
            }
            for row in type_rows(output.layers)
        ],
        "promoted": [
            {"module": layer.module, "from": layer.default, "to": layer.requested}
            for layer in output.layers
            if layer.promoted
        ],
        "fallbacks": [
            {
                "module": fallback.module,
                "from": fallback.requested,
                "to": fallback.resolved,
                "shape": list(fallback.shape),
                "reason": fallback.reason,
            }
            for fallback in output.fallbacks
        ],
        "limits": limits_document(output.limits),
        "bias_losses": [
            {
                "dtype": loss.dtype.safetensors,
                "layers": list(loss.layers),
                "max_error": loss.largest,
                "relative_rms": loss.relative,
            }
            for loss in output.bias_losses
        ],
        "layer_details": [
            {
                **({} if layer.index is None else {"index": layer.index}),
                "module": layer.module,
                "default_target": layer.default,
                "resolved_target": layer.requested,
                "promoted": layer.promoted,
                **({"kept": layer.kept} if output.kind == KEEP else {}),
                "stored": layer.stored,
                "shape": list(layer.shape),
                "bytes": layer.nbytes,
                "rms": layer.distance.rms,
                "relative_rms": layer.distance.relative,
                "max_error": layer.distance.largest,
                "cosine": layer.distance.cosine,
                "bias": None
                if layer.bias is None
                else {
                    "dtype": layer.bias.dtype.safetensors,
                    "max_error": layer.bias.distance.largest,
                    "relative_rms": layer.bias.distance.relative,
                },
            }
            for layer in output.layers
        ],
    }


def fallback_lines(fallbacks: Iterable[Fallback]) -> list[str]:
    """The layers that are stored as another type than asked for: a line for all of the same two types and reason."""
    groups: dict[tuple[str, str, str], list[Fallback]] = {}
    for each in fallbacks:
        groups.setdefault((each.requested, each.resolved, each.reason), []).append(each)
    return [_fallback_line(group) for group in groups.values()]


def _fallback_line(group: Sequence[Fallback]) -> str:
    first, names = group[0], [each.module or "-" for each in group]
    if len(group) == 1:
        return str(first)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    listed = ", ".join(names[:LISTED])
    return f"{first.requested} -> {first.resolved}, {len(group)} layers: {first.reason}: {listed}{more}"


def layer_result(
    goal: Goal, planned: PlannedLayer, kind: str, measures: list[Measure], bias: StoredBias | None
) -> LayerResult:
    """What became of a layer in an output of that type; ``measures`` are those of its pieces, none if not measured."""
    return LayerResult(
        goal.index,
        goal.module,
        kind,
        planned.requested,
        planned.promoted,
        planned.stored,
        goal.shape,
        planned.size,
        Measure.sum(measures).result() if measures else UNMEASURED,
        bias,
        planned.kept,
    )
