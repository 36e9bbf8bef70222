"""What a type would take on disk and on each rank: from headers alone, before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uqff.checkpoints.safetensors import TensorFiles
from uqff.codec.layer import Layer
from uqff.codes import DType, Version
from uqff.errors import ShapeError, UnsupportedError
from uqff.models.architectures import text_values
from uqff.models.text import count, given
from uqff.parallel.plan import USUAL
from uqff.quantization.plan import Goal, PlannedLayer, plan_layer
from uqff.quantization.types import Engine

__all__ = ["TypeSize", "rank_bytes", "type_sizes"]


@dataclass(frozen=True)
class TypeSize:
    """The size of a model in one type.

    Attributes:
        kind: the type.
        nbytes: of its layers, head and embedding promoted as the engine does.
        bits_per_weight: of them.
        rank_bytes: of the layers that the largest rank holds.
        problem: why the model cannot be of that type; empty if it can.
    """

    kind: str
    nbytes: int
    bits_per_weight: float
    rank_bytes: int
    problem: str = ""


def type_sizes(
    checkpoint: TensorFiles,
    goals: Sequence[Goal],
    kinds: Sequence[str],
    *,
    ranks: int = 1,
    engine: Engine,
    version: Version,
    dtype: DType,
) -> list[TypeSize]:
    """The sizes of all types.

    Args:
        checkpoint: of which headers are known.
        goals: its layers.
        kinds: the types.
        ranks: how many there are.
        engine: whose rules.
        version: of the file.
        dtype: the load dtype.

    """
    weights, made = sum(goal.weights for goal in goals), []
    for kind in kinds:
        planned: list[PlannedLayer] = []
        try:
            for goal in goals:
                planned.append(plan_layer(checkpoint, goal, kind, None, engine=engine, version=version, dtype=dtype))
        except (ShapeError, UnsupportedError) as error:
            made.append(TypeSize(kind, 0, 0.0, 0, str(error)))
            continue
        nbytes = sum(each.size for each in planned)
        held = sum(
            rank_bytes(goal.module, each.meta, each.size, checkpoint.config, ranks)
            for goal, each in zip(goals, planned, strict=True)
        )
        made.append(TypeSize(kind, nbytes, 8 * nbytes / weights, held))
    return made


def rank_bytes(module: str, layer: Layer, nbytes: int, config: Mapping[str, Any], ranks: int) -> int:
    """Bytes of a layer that a rank holds, see :mod:`uqff.parallel.plan`: all, where blocks or heads allow no part.

    Raises:
        UnsupportedError: there are several ranks, and the architecture is unknown.
        FormatError: the configuration lacks a number of heads or has a senseless one.
    """
    if ranks == 1:
        return nbytes
    shape, role = layer.weight.shape, USUAL.get(module.rpartition(".")[2])
    if role is None:
        return nbytes
    parts = ranks
    if role in ("query", "key-value"):
        config = text_values(config)
        heads = count(config, "num_attention_heads", least=1)
        if heads % ranks:
            return nbytes
        if role == "key-value":
            parts = min(ranks, given(config, "num_key_value_heads", heads, least=1))
    dims = [len(shape) - 1, len(shape) - 2] if role == "row" else [len(shape) - 2]
    for dim in dims:
        length = shape[dim] // parts
        if shape[dim] % parts == 0 and layer.weight.can_narrow(dim, 0, length):
            return -(-nbytes // parts)
    return nbytes
