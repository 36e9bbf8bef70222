"""How the layers of a model are quantised: the effort, and what an importance matrix has of the inputs of each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.families.encoding import Effort, EffortName
from uqff.importance.matrix import Importance
from uqff.quantization.plan import Goal
from uqff.quantization.types import check_effort

__all__ = ["LayerEfforts"]

F32: TypeAlias = npt.NDArray[np.float32]


class LayerEfforts:
    """The effort for each layer.

    Attributes:
        name: of the effort.
        importance: of the inputs of each layer, float32 ``[experts, in]`` or ``[1, in]``; None where it is not known.
        notes: what the matrix lacks, in sentences.
    """

    def __init__(self, name: str, imatrix: Importance | None, goals: Sequence[Goal], *, tied: bool) -> None:
        """Look up all layers.

        Args:
            name: of the effort.
            imatrix: importance of inputs, if there is any.
            goals: the layers.
            tied: whether the embedding serves as head: then the head's inputs count for it.

        Raises:
            UnsupportedError: no such effort.
            ShapeError: an entry of the matrix is of another shape.
        """
        self.name: EffortName = check_effort(name)
        self.importance = [None if imatrix is None else _importance(imatrix, goal, tied) for goal in goals]
        self.notes: list[str] = []
        lacking = [goal.module for goal, each in zip(goals, self.importance, strict=True) if each is None]
        if imatrix is not None and lacking:
            more = f" and {len(lacking) - 1} others" if len(lacking) > 1 else ""
            self.notes.append(f"the importance matrix has nothing of {lacking[0]}{more}, quantised without")

    def of(self, layer: int, expert: int | None = None) -> Effort:
        """The effort for a layer, or for one of its experts, by their numbers."""
        importance = self.importance[layer]
        if importance is not None and expert is not None and len(importance) > 1:
            importance = importance[expert : expert + 1]
        return Effort(self.name, importance)

    def description(self) -> dict[str, Any]:
        """What the files depend on, as JSON values; nothing for the engine's own bytes."""
        if self.name == "engine" and not any(each is not None for each in self.importance):
            return {}
        digest = hashlib.sha256()
        for each in self.importance:
            digest.update(b"-" if each is None else each.tobytes())
        return {"effort": [self.name, digest.hexdigest()]}


def _importance(imatrix: Importance, goal: Goal, tied: bool) -> F32 | None:
    found = imatrix.of(goal.module, goal.shape, tied=tied)
    return None if found is None else np.ascontiguousarray(found, np.float32).reshape(-1, goal.shape[-1])
