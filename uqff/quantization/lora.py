"""Adapters merged while a checkpoint is quantised: into its layers, and into matrices that stay in the residual.

A layer that an adapter changes is added up in float32 from the checkpoint's own numbers and quantised as it is, not
rounded to the load dtype first: a delta may be smaller than bfloat16 can tell.  What is stored unquantised is rounded
to the load dtype, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from uqff.errors import UqffError
from uqff.lora.applied import Applied, ModelWeights
from uqff.models.architectures import architecture_of, is_tied_model

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from uqff.models.assets import TensorSource
    from uqff.quantization.plan import Goal
    from uqff.simd.floats import Floats

__all__ = ["MergedTensors", "model_weights"]

WEIGHT = ".weight"


def model_weights(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], goals: Sequence[Goal], residual: Sequence[str]
) -> ModelWeights:
    """The matrices of a checkpoint that an adapter may change.

    Args:
        config: the parsed ``config.json``.
        shapes: of the checkpoint's tensors.
        goals: its layers.
        residual: names of the tensors that are none.
    """
    weights = ModelWeights(linear=_is_known(config))
    for goal in goals:
        paths = goal.paths
        out, last = goal.shape[-2:]
        if goal.stacked:
            weights.stacks[goal.key] = paths
        elif goal.name.stacked is not None:  # of 0.x, which has its experts one by one
            weights.stacks.setdefault(goal.name.stacked, []).append(goal.module)
        elif goal.sources[0].tensor != f"{goal.module}{WEIGHT}":
            continue  # the head of a tied model is no weight of its own
        elif goal.name.block is not None:
            weights.layers.append(goal.module)
        weights.shapes.update(dict.fromkeys(paths, (out, last)))
    for name in residual:
        if name.endswith(WEIGHT) and len(shapes[name]) == 2:
            out, last = shapes[name]
            weights.shapes[name.removesuffix(WEIGHT)] = out, last
    weights.tied = is_tied_model(config)
    return weights


def _is_known(config: Mapping[str, Any]) -> bool:
    try:
        architecture_of(config)
    except UqffError:
        return False
    return True


class MergedTensors:
    """The tensors of a checkpoint with adapters merged: those that they change are float32."""

    def __init__(self, source: TensorSource, applied: Applied, floats: Any) -> None:
        """Nothing is read yet.

        Args:
            source: the checkpoint.
            applied: the adapters.
            floats: gives a tensor of the checkpoint by its name.
        """
        self._source = source
        self._applied = applied
        self._floats = floats

    def _is_changed(self, name: str) -> bool:
        return name.removesuffix(WEIGHT) in self._applied

    def _merged(self, name: str) -> Floats:
        return self._applied.merged(name.removesuffix(WEIGHT), self._floats(name))

    def raw(self, name: str) -> memoryview:
        """The bytes of a tensor."""
        return self._merged(name).data if self._is_changed(name) else self._source.raw(name)

    def dtype(self, name: str) -> str:
        """Dtype as safetensors spells it."""
        return "F32" if self._is_changed(name) else self._source.dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._source.shape(name)

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor."""
        if not self._is_changed(name):
            return self._source.nbytes(name)
        rows, columns = self._source.shape(name)
        return 4 * rows * columns

    def release(self, name: str, start: int = 0, stop: int | None = None) -> None:
        """Give back the memory of a tensor's bytes."""
        if not self._is_changed(name):
            self._source.release(name, start, stop)
