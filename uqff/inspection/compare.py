"""Two models layer by layer: two UQFF, or a UQFF and the checkpoint it was made from."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uqff.checkpoints.checkpoint import open_checkpoint
from uqff.checkpoints.numbers import NumberFiles
from uqff.checkpoints.safetensors import CONFIG_NAME, TensorFiles
from uqff.codec.layer import Layer
from uqff.codes import ENTRY_VERSIONS, LOADED_DTYPES, DType, Version
from uqff.container import UqffFile, open_uqff
from uqff.container.shards import SUFFIX, PathLike, at_hand, select
from uqff.errors import ShapeError, ShardError, UnsupportedError, UqffError, located
from uqff.families.loaded import Loaded
from uqff.families.part import Part
from uqff.models.architectures import EMBEDDING_SINCE, LayerName, embedding_name
from uqff.models.layouts import WeightLayout, layout_beside
from uqff.models.matching import pairs_of
from uqff.models.names import read_names
from uqff.models.patterns import Pattern
from uqff.progress import Progress, Steps
from uqff.quantization.bias import bias_distance
from uqff.quantization.error import Distance, distance
from uqff.quantization.plan import Goal, plan_model
from uqff.simd.floats import Floats

__all__ = ["LayerDifference", "Side", "compare", "comparison_document", "diff"]


@dataclass(frozen=True)
class Side:
    """A layer on one side.

    Attributes:
        kind: its type; in a checkpoint its dtype.
        nbytes: of the blob or the entries; of an expert in a stack, of its payload; in a checkpoint, of the weight.
        key: in the file; empty in a checkpoint.
    """

    kind: str
    nbytes: int
    key: str = ""


@dataclass(frozen=True)
class LayerDifference:
    """A layer on both sides, or on one.

    Attributes:
        key: the layer's key; of two generations, its path, with the number of the expert if experts are stacked in one
            of them only.
        module: its path in the model, if a checkpoint tells.
        shape: of the weight.
        a: the first side; None if it lacks the layer.
        b: the second side; likewise.
        identical: whether weight and bias have the same bytes; the version word does not count, nor the generation.
            Never, if one side is a checkpoint.
        distance: of b's weight from a's; of the UQFF's from the checkpoint's, if there is one. Biases are not counted.
            None if one side lacks the layer.
        bias: the distance of the biases, likewise; None if one side lacks it.
        bias_dtypes: of the bias of each side, as safetensors spells it; None if there is none.
    """

    key: str
    module: str | None
    shape: tuple[int, ...]
    a: Side | None
    b: Side | None
    identical: bool
    distance: Distance | None
    bias: Distance | None = None
    bias_dtypes: tuple[str | None, str | None] = (None, None)


def compare(
    a: PathLike, b: PathLike, *, layers: Pattern | None = None, names: Sequence[LayerName] | None = None
) -> Iterator[LayerDifference]:
    """Compare two models, of whatever generations.

    Args:
        a: a UQFF (anything :func:`uqff.open` takes) or a checkpoint directory. Between generations, ``config.json``
            beside one of the files tells the paths of 0.x layers.
        b: likewise; at most one of them may be a checkpoint.
        layers: which weights of the checkpoint are layers, if its architecture does not say; as for quantising.
        names: of 0.x layers in the order of their index, if no ``config.json`` tells them; between generations only.

    Yields:
        The layers in the order of the first model, each compared when it is asked for; then those that only the second
        has.

    Raises:
        ShardError: checkpoint and UQFF do not have the same layers.
        UnsupportedError: nothing tells the paths of 0.x layers.
        ShapeError: a layer has different shapes.
        UqffError: a file breaks a rule.
        OSError: a file cannot be read.
    """
    checkpoints = is_checkpoint(a), is_checkpoint(b)
    if all(checkpoints):
        raise UnsupportedError("two checkpoints: one side must be a UQFF", file=str(a), got=str(b))
    if any(checkpoints):
        source, model = (a, b) if checkpoints[0] else (b, a)
        yield from _compare_with_source(source, model, layers, source_first=checkpoints[0])
    else:
        yield from _compare_models(a, b, names)


def diff(
    a: PathLike,
    b: PathLike,
    *,
    layers: Pattern | str | None = None,
    names: PathLike | Sequence[LayerName] | None = None,
    isq: str | None = None,
    progress: Progress | None = None,
) -> tuple[LayerDifference, ...]:
    """Compare two models, or a model and the checkpoint it was made from; ``uqff diff`` shows it.

    Args:
        a: a UQFF (anything :func:`uqff.open` takes) or a checkpoint directory, which is taken as true.
        b: likewise; at most one of them may be a checkpoint.
        layers: a regular expression: which weights of the checkpoint are layers, if its architecture does not say.
        names: of 0.x layers by index, or a file of them; if no ``config.json`` tells them.
        isq: of directories with several models, the type of the ones that are meant.
        progress: called after each layer.

    Returns:
        The layers of the first model in its order, then those that only the second has: types, sizes, whether their
        bytes are the same, errors of weight and bias.

    Raises:
        UqffError: see :func:`compare`.
        OSError: a file cannot be read.

    >>> layers = uqff.diff("checkpoint", "model")
    >>> layers[0].b.kind, layers[0].identical, 0 < layers[0].distance.relative < 0.1
    ('q6k', False, True)
    """
    pattern = Pattern(layers) if isinstance(layers, str) else layers
    known = read_names(names) if isinstance(names, (str, os.PathLike)) else names
    found = []
    a, b = at_hand(a, isq), at_hand(b, isq)
    first, second = (path if is_checkpoint(path) else select(path, isq) for path in (a, b))
    steps = None
    for each in compare(first, second, layers=pattern, names=known):
        found.append(each)
        if progress is not None and steps is None:
            with open_uqff(second if is_checkpoint(first) else first) as file:
                steps = Steps(progress, "diff", len(file), len(file), "layers")
        if steps is not None:
            steps.add(each.key, 1)
    return tuple(found)


def is_checkpoint(path: PathLike) -> bool:
    """Whether a path is a directory without UQFF files but with weights."""
    if not os.path.isdir(path):
        return False
    names = os.listdir(path)
    return not any(name.endswith(SUFFIX) for name in names) and any(name.endswith(".safetensors") for name in names)


def _compare_models(a: PathLike, b: PathLike, names: Sequence[LayerName] | None) -> Iterator[LayerDifference]:
    with open_uqff(a) as first, open_uqff(b) as second:
        for name, ours, theirs in pairs_of(first, second, names):
            left, right = (None if each is None else Side(each.kind, each.nbytes, each.key) for each in (ours, theirs))
            if ours is None or theirs is None:
                (alone,) = filter(None, (ours, theirs))
                yield LayerDifference(name, None, alone.layer.weight.shape, left, right, False, None)
                continue
            layer, opposite = ours.layer.weight, theirs.layer.weight
            _check_shape(str(b), theirs.key, layer.shape, opposite.shape)
            identical = ours.layer == theirs.layer
            biases = [each.layer.bias_part for each in (ours, theirs)]
            yield LayerDifference(
                name, None, layer.shape, left, right, identical, distance(layer, opposite), *_biases(*biases)
            )


def _compare_with_source(
    source: PathLike, model: PathLike, layers: Pattern | None, *, source_first: bool
) -> Iterator[LayerDifference]:
    with open_checkpoint(source) as opened, open_uqff(model) as file:
        checkpoint = NumberFiles(opened)
        goals = plan_model(checkpoint, _naming(checkpoint, file), layers, promote=False)
        layout, own = _layouts(file, checkpoint)
        ours = {goal.index if goal.index is not None else goal.key: goal.key for goal in goals}
        theirs = _indices(file)
        _check_same_keys(source, ours, model, theirs)
        for goal, key in zip(goals, (theirs[name] for name in ours), strict=True):
            whole = Layer.of_fields(*file.fields(key))
            layer, bias = whole.weight, whole.bias_part
            stored = {checkpoint.dtype(each.tensor) for each in goal.sources}
            if not stored <= LOADED_DTYPES.keys():
                expected, got = ", ".join(LOADED_DTYPES), ", ".join(sorted(stored))
                raise UnsupportedError("weight cannot be compared", layer=goal.module, expected=expected, got=got)
            _check_shape(str(model), key, goal.shape, layer.shape)
            true = Side(_source_kinds(checkpoint, goal), _source_bytes(checkpoint, goal))
            made = Side(layer.kind, _nbytes(file, key), key)
            sides = (true, made) if source_first else (made, true)
            values = _values(checkpoint, goal)
            order = layout.order_from(own, goal.module, goal.shape[0])
            far = distance(values if order is None else values[order], layer)
            of_bias, dtypes = _biases(_source_bias(checkpoint, goal, order), bias)
            dtypes = dtypes if source_first else (dtypes[1], dtypes[0])
            yield LayerDifference(key, goal.module, layer.shape, sides[0], sides[1], False, far, of_bias, dtypes)
            for each in goal.sources:
                checkpoint.release(each.tensor, *each.span(checkpoint))


def _layouts(file: UqffFile, checkpoint: TensorFiles) -> tuple[WeightLayout, WeightLayout]:
    """How the rows of either lie; whatever else is said of the weights must be said of both.

    Raises:
        UnsupportedError: it is not.
    """
    path = str(checkpoint.path / CONFIG_NAME)
    with located(file=path):
        stored, own = layout_beside(file), WeightLayout.of(checkpoint.config)
    if stored.foreign_values != own.foreign_values:
        stored.check(str(file.paths[0].parent / CONFIG_NAME))
        own.check(path)
    return stored, own


def _source_bias(checkpoint: TensorFiles, goal: Goal, order: Any) -> Part | None:
    """The bias as the checkpoint has it, in the order of the UQFF's rows if that is another."""
    if goal.bias is None:
        return None
    stored = DType.of_safetensors(checkpoint.dtype(goal.bias))
    if stored is None:
        got = checkpoint.dtype(goal.bias)
        raise UnsupportedError("bias cannot be compared", layer=goal.module, field="bias.dtype", got=got)
    numbers = np.frombuffer(checkpoint.raw(goal.bias), f"V{stored.itemsize}").reshape(checkpoint.shape(goal.bias))
    return Part.of_array(numbers if order is None else numbers[order], stored)


def _biases(a: Part | None, b: Part | None) -> tuple[Distance | None, tuple[str | None, str | None]]:
    """The distance of two biases, and their dtypes."""
    dtypes = [None if bias is None else str(bias.dtype.safetensors) for bias in (a, b)]
    far = None if a is None or b is None else bias_distance(a, b)
    return far, (dtypes[0], dtypes[1])


def _naming(checkpoint: TensorFiles, file: UqffFile) -> Version:
    """The version that names the layers as the file does: whether the embedding is one is not told by its own."""
    if file.version < EMBEDDING_SINCE:
        return file.version
    try:
        embedding = embedding_name(checkpoint.config)
    except UqffError:
        return file.version
    return file.version if embedding in file else max(v for v in ENTRY_VERSIONS if v < EMBEDDING_SINCE)


def _source_kinds(checkpoint: NumberFiles, goal: Goal) -> str:
    """The dtypes of what is plain, the types of what is quantised."""
    kinds = {
        checkpoint.checkpoint.kind(checkpoint.paths[each.tensor])
        if each.tensor in checkpoint.paths
        else checkpoint.dtype(each.tensor).lower()
        for each in goal.sources
    }
    return ", ".join(sorted(kinds))


def _source_bytes(checkpoint: NumberFiles, goal: Goal) -> int:
    """Bytes in the files; of a part of a tensor that is quantised, as large a part of its tensors."""
    total = 0
    for each in goal.sources:
        start, stop = each.span(checkpoint)
        total += (stop - start) * checkpoint.stored_nbytes(each.tensor) // max(checkpoint.nbytes(each.tensor), 1)
    return total


def _values(checkpoint: TensorFiles, goal: Goal) -> Floats:
    """The weight as the checkpoint has it; experts of several dtypes as float32."""
    weights = [source.take(checkpoint) for source in goal.sources]
    plain = [Loaded(weight, weight.dtype).plain for weight in weights]
    if not goal.stacked:
        return plain[0]
    dtype = plain[0].dtype if len({each.dtype for each in plain}) == 1 else DType.F32
    return Floats(np.stack([each.cast(dtype).bits for each in plain]), dtype)


def _indices(file: UqffFile) -> dict[Any, str]:
    """What makes a layer the same in two files, its index or its path, to its key."""
    return {int(key) if file.generation == "0.x" else key: key for key in file}


def _nbytes(file: UqffFile, key: str) -> int:
    return sum(place.nbytes for place in file.places(key).values())


def _check_same_keys(a: PathLike, ours: Mapping[Any, str], b: PathLike, theirs: Mapping[Any, str]) -> None:
    for path, here, there in ((b, ours, theirs), (a, theirs, ours)):
        missing = sorted(set(here) - set(there))
        if missing:
            raise ShardError(
                "the two do not have the same layers",
                file=str(path),
                expected=f"{len(here)} layers",
                got=f"{len(there)}, without {', '.join(map(str, missing[:5]))}{', ...' if missing[5:] else ''}",
            )


def _check_shape(path: str, key: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> None:
    if ours != theirs:
        raise ShapeError("weights differ in shape", file=path, layer=key, expected=list(ours), got=list(theirs))


def comparison_document(differences: list[LayerDifference], a: PathLike, b: PathLike) -> dict[str, Any]:
    """A comparison as JSON values; numbers that are not finite become null."""
    return {
        "a": str(Path(a)),
        "b": str(Path(b)),
        "identical": all(each.identical for each in differences),
        "layers": [
            {
                "key": each.key,
                "module": each.module,
                "shape": list(each.shape),
                "a": _side(each.a),
                "b": _side(each.b),
                "identical": each.identical,
                **_distance(each.distance),
                "bias": _bias_document(each),
            }
            for each in differences
        ],
    }


def _bias_document(each: LayerDifference) -> dict[str, Any] | None:
    a, b = each.bias_dtypes
    return None if a is None and b is None else {"a": a, "b": b, **_distance(each.bias)}


def _side(side: Side | None) -> dict[str, Any] | None:
    return None if side is None else {"type": side.kind, "bytes": side.nbytes, "key": side.key or None}


def _distance(measured: Distance | None) -> dict[str, float | None]:
    if measured is None:
        return dict.fromkeys(("rms", "relative_rms", "max_error", "cosine"))
    return {
        "rms": _number(measured.rms),
        "relative_rms": _number(measured.relative),
        "max_error": _number(measured.largest),
        "cosine": _number(measured.cosine),
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
