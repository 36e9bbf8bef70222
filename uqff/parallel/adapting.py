"""Adapters on the model of ``transformers`` that is being filled: which of its weights they change, and how."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from uqff.codec.layer import Layer
from uqff.codes import DType
from uqff.errors import ShapeError
from uqff.families import Unquant
from uqff.families.part import Part
from uqff.lora.applied import Adapters, Applied, LoraWarning, ModelWeights
from uqff.lora.low_rank import LowRank, merged
from uqff.parallel import transformers_model
from uqff.parallel.consensus import digest
from uqff.parallel.gather import ExpertList, ReplicatedStack
from uqff.parallel.lora import adapted, adapted_stack, summed
from uqff.parallel.projection import PROJECTIONS
from uqff.parallel.unloaded import Unloaded, numbers_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from uqff.models.renaming import ModulePaths
    from uqff.parallel.layer import QuantizedLinear
    from uqff.parallel.mixture import Mixture
    from uqff.parallel.shard import Slice

__all__ = ["Adapting", "adapters_digest"]

WEIGHT = ".weight"

_NAMES = tuple(name for name, _ in PROJECTIONS)

_Linear = TypeVar("_Linear", bound="QuantizedLinear")


def adapters_digest(adapters: Adapters, *, everything: bool = False) -> bytes:
    """What identifies adapters and their weights: see :func:`~uqff.parallel.consensus.digest`."""
    told = [repr((each.config.document, weight)).encode() for each, weight in adapters.each]
    return digest((each.mapped for each, _ in adapters.each), *told, everything=everything)


def _slice_of(delta: LowRank, cut: Slice, dim: int) -> LowRank:
    """The factors of the slice of a matrix."""
    return delta if dim < 0 or cut.length == delta.shape[dim] else delta.narrow(dim, cut.start, cut.length)


class Adapting:
    """Puts adapters on what a model is filled with, piece by piece.

    Attributes:
        merges_before: whether they are added to weights that are quantised while they are loaded before that is done.
    """

    def __init__(
        self,
        adapters: Adapters,
        model: torch.nn.Module,
        dtype: torch.dtype,
        *,
        merge: bool | None = None,
        paths: ModulePaths | None = None,
    ) -> None:
        """Find out what belongs to which weight.

        Args:
            adapters: none, one or several.
            model: on the meta device, before it is filled.
            dtype: of activations: what is merged into a narrower weight keeps it.
            merge: see :func:`~uqff.parallel.lora.adapted`.
            paths: what modules are called in files, as adapters may call them, too.

        Raises:
            UqffError: see :meth:`Adapters.applied`.
        """
        self._dtype, self._merge = dtype, merge
        self.merges_before = merge is not False
        applied = adapters.applied(model_weights(model, paths)) if adapters else Applied()
        self._deltas = applied.deltas
        for each in applied.adapters:
            if each.missing:
                warnings.warn(LoraWarning(each.told), stacklevel=2)

    def before(self, source: Unloaded, paths: Sequence[str]) -> Unloaded:
        """A layer that is quantised while it is loaded, with its adapters added before that, in float32.

        Args:
            source: the layer.
            paths: of its matrix, or of each expert's if it is a stack.
        """
        deltas = {at: self._deltas[path] for at, path in enumerate(paths) if path in self._deltas}
        if not deltas:
            return source
        shape = source.weight.shape[-2:]
        for each in deltas.values():
            for delta in each:
                if tuple(delta.shape) != shape:
                    raise ShapeError(
                        "delta does not fit the weight", layer=source.key, expected=list(shape), got=list(delta.shape)
                    )

        def change(layer: Layer, cut: Slice) -> Layer:
            numbers, stack = numbers_of(layer.weight), len(layer.weight.shape) == 3
            total = np.empty(numbers.shape, np.uint32)
            matrices = [(numbers[at], total[at]) for at in range(len(total))] if stack else [(numbers, total)]
            first = cut.start if stack and cut.dim == 0 else 0
            for at, (matrix, into) in enumerate(matrices, first):
                parts = [_slice_of(delta, cut, cut.dim - stack) for delta in deltas.get(at, ())]
                into[:] = merged(matrix, parts, layer=source.key).cast(DType.F32).bits
            return Layer(Unquant.of(Part.of_array(total, DType.F32)), layer.bias_part)

        return source.changed(change, computed=True)

    def linear(self, path: str, layer: _Linear) -> _Linear:
        """The layer of a module with its adapters."""
        return adapted(layer, self._deltas.get(path, ()), merge=self._merge, dtype=self._dtype)

    def mixture(self, path: str, mixture: Mixture) -> Mixture:
        """Experts with their adapters; changes what it is given."""
        for name, _ in PROJECTIONS:
            projection = getattr(mixture, name)
            paths = [f"{path}.{expert}.{name}" for expert in range(mixture.num_experts)]
            if isinstance(projection, ReplicatedStack):
                deltas = {at: self._deltas[each] for at, each in enumerate(paths) if each in self._deltas}
                made: Any = adapted_stack(projection, deltas, merge=self._merge, dtype=self._dtype)
            else:
                layers = [self.linear(each, projection[at]) for at, each in enumerate(paths)]
                made = ExpertList(layers, projection.key)
            setattr(mixture, name, made)
        return mixture

    def tensors(self, tensor: Callable[[str], torch.Tensor]) -> Callable[[str], torch.Tensor]:
        """What gives a tensor that is no layer, with its adapters: that of a router."""

        def changed(name: str) -> torch.Tensor:
            deltas = self._deltas.get(name.removesuffix(WEIGHT), ())
            return summed(tensor(name), deltas, layer=name, dtype=self._dtype) if deltas else tensor(name)

        return changed


def model_weights(model: torch.nn.Module, names: ModulePaths | None = None) -> ModelWeights:
    """The matrices of a model on the meta device.

    Args:
        model: of ``transformers``.
        names: what modules are called in files; as they are in the model if None.
    """
    whole: Any = model
    config = whole.config
    head = whole.get_output_embeddings() if config.tie_word_embeddings else None
    weights = ModelWeights(tied=head is not None, turns=transformers_model.takes_turns(config))
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            weights.shapes[path] = module.out_features, module.in_features
    weights.layers.extend(transformers_model.linear_roles(model))
    for place in transformers_model.expert_places(model):
        inner, hidden = place.inner, place.hidden
        if place.with_router:
            weights.shapes[f"{place.path}.{transformers_model.router_of(model, place.path)}"] = place.number, hidden
        single = None if names is None else names.experts(place.experts, _NAMES, place.number)
        for at, (name, dim) in enumerate(PROJECTIONS):
            paths = [f"{place.experts}.{expert}.{name}" for expert in range(place.number)]
            weights.stacks[f"{place.experts}.{name}"] = paths
            if single is not None and len(single[at]) == place.number:  # not of stacks
                weights.names.update(zip(single[at], paths, strict=True))
            weights.shapes.update(dict.fromkeys(paths, (hidden, inner) if dim else (inner, hidden)))
    return weights
