"""How the layers of a model are quantised: the effort, and what is known of the inputs of each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.container.closing import Closing
from uqff.container.shards import PathLike
from uqff.families.encoding import Effort, EffortName
from uqff.importance.hessians import Hessians
from uqff.importance.matrix import Importance
from uqff.quantization.plan import Goal
from uqff.quantization.types import check_effort

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Known", "LayerEfforts"]

F32: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Known(Closing):
    """An effort, and what is known of the inputs of layers.

    Attributes:
        effort: its name.
        imatrix: importance of inputs, if there is any.
        hessians: XᵀX of them, which ``calibrated`` needs.
    """

    effort: EffortName = "engine"
    imatrix: Importance | None = None
    hessians: Hessians | None = None
    _opened: bool = False

    @classmethod
    def open(cls, effort: str, imatrix: Importance | PathLike | None, hessian: Hessians | PathLike | None) -> Self:
        """Read and open what is given as files.

        Raises:
            UnsupportedError: no such effort, or one that needs Hessians without them.
            FormatError: a file breaks a rule.
            OSError: a file cannot be read.
        """
        name = check_effort(effort, hessian)
        if imatrix is not None and not isinstance(imatrix, Importance):
            imatrix = Importance.open(imatrix)
        if hessian is None or isinstance(hessian, Hessians):
            return cls(name, imatrix, hessian)
        return cls(name, imatrix, Hessians(hessian), True)

    def close(self) -> None:
        """Release what was opened."""
        if self._opened and self.hessians is not None:
            self.hessians.close()


class LayerEfforts:
    """The effort for each layer.

    Attributes:
        name: of the effort.
        importance: of the inputs of each layer, float32 ``[experts, in]`` or ``[1, in]``; None where it is not known.
        notes: what the matrix or the Hessians lack, in sentences.
    """

    def __init__(self, known: Known, goals: Sequence[Goal], *, tied: bool) -> None:
        """Look up all layers.

        Args:
            known: the effort, and what it goes by.
            goals: the layers.
            tied: whether the embedding serves as head: then the head's inputs count for it.

        Raises:
            ShapeError: an entry of the matrix, or a Hessian, is of another shape.
        """
        self.name: EffortName = known.effort
        self.importance = [_importance(known.imatrix, goal, tied) for goal in goals]
        hessians = known.hessians if self.name == "calibrated" else None
        self._stamp = None if hessians is None else hessians.stamp
        self._products = [
            None if hessians is None else hessians.layer(goal.module, goal.shape, tied=tied) for goal in goals
        ]
        self.notes: list[str] = []
        for what, found, instead in (
            ("importance matrix", None if known.imatrix is None else self.importance, "without"),
            ("file of Hessians", None if hessians is None else self._products, "without error feedback"),
        ):
            lacking = [goal.module for goal, each in zip(goals, found or (), strict=found is not None) if each is None]
            if lacking:
                more = f" and {len(lacking) - 1} others" if len(lacking) > 1 else ""
                self.notes.append(f"the {what} has nothing of {lacking[0]}{more}, quantised {instead}")

    def of(self, layer: int, expert: int | None = None) -> Effort:
        """The effort for a layer, or for one of its experts, by their numbers; reads its Hessian."""
        importance, products = self.importance[layer], self._products[layer]
        if importance is not None and expert is not None and len(importance) > 1:
            importance = importance[expert : expert + 1]
        return Effort(self.name, importance, None if products is None else products.read(expert))

    def feeds_back(self, layer: int) -> bool:
        """Whether errors of a layer are fed back along its inputs, so that all of it is needed at a time."""
        return self._products[layer] is not None

    def description(self) -> dict[str, Any]:
        """What the files depend on, as JSON values; nothing for the engine's own bytes."""
        if self.name == "engine" and not any(each is not None for each in self.importance):
            return {}
        digest = hashlib.sha256()
        for each in self.importance:
            digest.update(b"-" if each is None else each.tobytes())
        stamp = {} if self._stamp is None else {"hessian": self._stamp}
        return {"effort": [self.name, digest.hexdigest()], **stamp}


def _importance(imatrix: Importance | None, goal: Goal, tied: bool) -> F32 | None:
    found = None if imatrix is None else imatrix.of(goal.module, goal.shape, tied=tied)
    return None if found is None else np.ascontiguousarray(found, np.float32).reshape(-1, goal.shape[-1])
