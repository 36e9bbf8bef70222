"""Adapters on the model of ``transformers`` that is being filled: which of its weights they change, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch

from uqff.lora.applied import Adapters, ModelWeights
from uqff.parallel import transformers_model
from uqff.parallel.consensus import digest
from uqff.parallel.gather import ExpertList, ReplicatedStack
from uqff.parallel.lora import adapted, adapted_stack, summed
from uqff.parallel.plan import ROLES
from uqff.parallel.projection import PROJECTIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from uqff.parallel.layer import QuantizedLinear
    from uqff.parallel.mixture import Mixture

__all__ = ["Adapting", "adapters_digest"]

WEIGHT = ".weight"

_Linear = TypeVar("_Linear", bound="QuantizedLinear")


def adapters_digest(adapters: Adapters, *, everything: bool = False) -> bytes:
    """What identifies adapters and their weights: see :func:`~uqff.parallel.consensus.digest`."""
    told = [repr((each.config.document, weight)).encode() for each, weight in adapters.each]
    return digest((each.mapped for each, _ in adapters.each), *told, everything=everything)


class Adapting:
    """Puts adapters on what a model is filled with, piece by piece."""

    def __init__(
        self, adapters: Adapters, model: torch.nn.Module, dtype: torch.dtype, *, merge: bool | None = None
    ) -> None:
        """Find out what belongs to which weight.

        Args:
            adapters: none, one or several.
            model: on the meta device, before it is filled.
            dtype: of activations: what is merged into a narrower weight keeps it.
            merge: see :func:`~uqff.parallel.lora.adapted`.

        Raises:
            UqffError: see :meth:`Adapters.applied`.
        """
        self._dtype, self._merge = dtype, merge
        self._deltas = adapters.applied(model_weights(model)).deltas if adapters else {}

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


def model_weights(model: torch.nn.Module) -> ModelWeights:
    """The matrices of a model on the meta device."""
    whole: Any = model
    config = whole.config
    head = whole.get_output_embeddings() if config.tie_word_embeddings else None
    weights = ModelWeights(tied=head is not None)
    blocks = transformers_model.sparse_blocks(model)
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            weights.shapes[path] = module.out_features, module.in_features
            if path.rpartition(".")[2] in ROLES and not any(path.startswith(f"{block}.") for block in blocks):
                weights.layers.append(path)
    for block in blocks:
        inner, hidden = config.moe_intermediate_size, config.hidden_size
        weights.shapes[f"{block}.gate"] = config.num_experts, hidden
        for name, dim in PROJECTIONS:
            paths = [f"{block}.experts.{expert}.{name}" for expert in range(config.num_experts)]
            weights.stacks[f"{block}.experts.{name}"] = paths
            weights.shapes.update(dict.fromkeys(paths, (hidden, inner) if dim else (inner, hidden)))
    return weights
