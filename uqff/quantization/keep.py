"""What a quantised checkpoint's weights become if they are kept: the very records, where UQFF has a form for them.

A layer is kept if all of it is: one weight, a stack, or experts that stack exactly.  What nobody has quantised stays
plain, in the load dtype.  The rest is dequantised and quantised to another type, the fallback.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from uqff.checkpoints.foreign import ForeignTensor
from uqff.checkpoints.numbers import NumberFiles
from uqff.codec.layer import Layer
from uqff.codes import DType, Version
from uqff.container.plan import layer_size
from uqff.errors import UnsupportedError, UqffError
from uqff.families import PLAIN_KIND, stack
from uqff.families.base import QuantizedTensor
from uqff.quantization.plan import Goal, PlannedLayer, plan_layer, planned_bias
from uqff.quantization.types import KEEP, Engine

__all__ = ["check_again", "kept_record", "no_fallback", "plan_kept", "record_of_goal"]


def plan_kept(
    checkpoint: NumberFiles,
    goal: Goal,
    *,
    changed: bool,
    engine: Engine,
    version: Version,
    dtype: DType,
    engine_biases: bool,
) -> PlannedLayer | str:
    """The layer as it will be kept, or why it cannot be; headers are read, and what all experts of a stack must share.

    Args:
        checkpoint: what is quantised.
        goal: the layer.
        changed: whether an adapter changes it.
        engine: whose rules.
        version: of the file.
        dtype: the load dtype: of its bias, and of plain numbers.
        engine_biases: whether biases are stored as the engine does it.
    """
    if changed:
        return "an adapter changes it"
    if not any(source.tensor in checkpoint.computed for source in goal.sources):
        rules: dict[str, Any] = {"version": version, "dtype": dtype, "engine_biases": engine_biases}
        try:
            plain = plan_layer(checkpoint, goal, PLAIN_KIND, None, engine=engine, **rules)
        except UqffError as error:
            return error.problem
        return replace(plain, requested=KEEP, promoted=False, kept=True)
    if any(source.tensor not in checkpoint.computed for source in goal.sources):
        return "some experts are quantised and some are not"
    names = {source.tensor for source in goal.sources}
    metas = {name: checkpoint.checkpoint.meta(checkpoint.paths[name]).weight for name in names}
    for each in metas.values():
        if isinstance(each, ForeignTensor):
            return f"{each.TITLE} has no form in UQFF"
    try:
        weight = record_of_goal(goal, metas)
        if len(names) > 1 and weight.STACKS_BY_VALUE:
            opened = checkpoint.checkpoint
            weight.check_stack([opened.layer(checkpoint.paths[source.tensor]).weight for source in goal.sources])
        layer = Layer(weight, planned_bias(checkpoint, goal, weight.BIAS.dtype(dtype, version, engine=engine_biases)))
        size = layer_size(layer, version)
    except UqffError as error:
        return error.problem
    return PlannedLayer(KEEP, False, weight.kind, "", size, layer, kept=True)


def check_again(checkpoint: NumberFiles, goal: Goal) -> None:
    """Make sure that a layer may be quantised without further request.

    Raises:
        UnsupportedError: it was quantised for good, see :meth:`uqff.checkpoints.method.Method.again_on_request`.
    """
    opened = checkpoint.checkpoint
    for source in goal.sources:
        path = checkpoint.paths.get(source.tensor)
        if path is not None and opened.paths[path].again_on_request(opened.companions(path)):
            raise UnsupportedError(
                "the layer is quantised already",
                file=str(checkpoint.file_of(source.tensor)),
                layer=goal.module,
                field="requantize",
                expected="a request to quantise it again (--requantize), or --isq keep",
                got=opened.meta(path).weight.kind,
            )


def no_fallback(checkpoint: NumberFiles, goal: Goal, reason: str) -> UnsupportedError:
    """The error of a layer that cannot be kept where nothing says what it is to be."""
    return UnsupportedError(
        f"the layer cannot be kept: {reason}",
        file=str(checkpoint.path),
        layer=goal.module,
        field="fallback",
        expected="a type for such layers (--fallback KIND)",
    )


def kept_record(checkpoint: NumberFiles, goal: Goal) -> QuantizedTensor:
    """The record of a layer that :func:`plan_kept` has planned."""
    names = dict.fromkeys(source.tensor for source in goal.sources)
    return record_of_goal(goal, {name: checkpoint.checkpoint.layer(checkpoint.paths[name]).weight for name in names})


def record_of_goal(goal: Goal, records: Mapping[str, QuantizedTensor]) -> QuantizedTensor:
    """The record of a layer, kept as it is, out of those of its tensors.

    Raises:
        UqffError: it cannot be cut or stacked exactly.
    """
    first = goal.sources[0]
    if first.transposed:
        raise UnsupportedError("experts lie transposed")
    made: QuantizedTensor
    if first.expert is None:
        weights = [records[source.tensor] for source in goal.sources]
        made = stack(weights) if goal.stacked else weights[0]
    elif not goal.stacked:
        made = records[first.tensor].narrow(0, first.expert, 1).unstack()[0]
        made = made if first.rows is None else made.narrow(0, first.rows[0], first.rows[1] - first.rows[0])
    else:
        made = records[first.tensor]
        made = made if first.rows is None else made.narrow(1, first.rows[0], first.rows[1] - first.rows[0])
    if made.shape != goal.shape:
        raise UnsupportedError("the checkpoint has other experts than the configuration")
    return made
