"""The loader: a model of vLLM is given what the files of UQFF hold, by the names of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from uqff.codec.layer import Layer
from uqff.errors import FormatError, UnsupportedError
from uqff.integrations.vllm.stored import StoredWeight
from uqff.integrations.vllm.vocabulary import give_head
from uqff.models.layouts import half_split_order, in_order
from uqff.parallel.plan import HEAD
from uqff.parallel.shard import Slice
from uqff.parallel.source import open_source
from uqff.parallel.unloaded import Unloaded
from uqff.parallel.uqff_source import UqffSource
from uqff.parallel.weight import to_spec

__all__ = ["UqffModelLoader", "layers_digest"]

WEIGHT, BIAS = ".weight", ".bias"


class UqffModelLoader(BaseModelLoader):  # type: ignore[misc]
    """Loads directories and repositories of UQFF into models of vLLM."""

    def download_model(self, model_config: Any) -> None:
        """Fetch a repository, unless it is there."""
        _open(model_config).close()

    def load_weights(self, model: Any, model_config: Any) -> None:
        """Give a model its weights.

        Raises:
            UqffError: the files are not valid, or not of the model.
        """
        with _open(model_config) as source:
            Giving(source, model_config.dtype).to(model)


def _open(model_config: Any) -> UqffSource:
    """The source of a model, by what vLLM knows of it."""
    name, revision = str(model_config.model), model_config.revision
    if revision is not None and not Path(name).exists():
        name = f"{name}@{revision}"
    method = getattr(model_config.hf_config, "quantization_config", None) or {}
    source, _ = open_source(name, method.get("isq"))
    if not isinstance(source, UqffSource):
        source.close()
        raise UnsupportedError("the plug-in for vLLM reads UQFF only", file=name, expected="a directory of UQFF")
    return source


def layers_digest(model_config: Any) -> str:
    """What all layers of a model are but for their bytes: compiled programs have that in them.

    Raises:
        UqffError: the files are not valid.
    """
    with _open(model_config) as source:
        specs = [f"{name} {to_spec(source.layer(name).weight)}" for name in source.keys]
    return sha256("\n".join(sorted(specs)).encode()).hexdigest()


class Giving:
    """What files hold, by the names of a checkpoint, and which of it a model has taken."""

    def __init__(self, source: UqffSource, dtype: torch.dtype) -> None:
        """Nothing has been given yet.

        Args:
            source: the files.
            dtype: of activations.
        """
        self._source, self._dtype = source, dtype
        self._left: set[str] = set()

    def to(self, model: Any) -> None:
        """Give all.

        Raises:
            UqffError: a layer is not valid, or does not fit the model.
            FormatError: the model has no place for it.
        """
        model.load_weights(self._tensors())
        head = self._source.paths(HEAD)
        if head in self._left:
            for module in model.modules():
                if isinstance(module, ParallelLMHead) and module.uqff_tied:
                    give_head(module, self._stored(head, self._source.layer(head)))
        left = next(iter(sorted(filter(self._source.paths.is_of_text, self._left - self._source.paths.idle))), None)
        if left is not None and get_pp_group().world_size == 1:
            raise FormatError(
                "layer has no place in the model",
                file=self._source.name,
                layer=left,
                expected=f"a module of {type(model).__name__}",
            )

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights and biases, in the order of the files: vLLM wants what belongs together side by side."""
        source, biases = self._source, set()
        for name in source.keys:
            biases.add(f"{name}{BIAS}")
            yield from self._layer(name)
        for name in source.residual:
            stem = name.removesuffix(WEIGHT)
            if stem != name and source.layout.heads_of(stem) is not None:
                biases.add(f"{stem}{BIAS}")
                yield from self._layer(stem)
            elif name not in biases:
                yield name, source.residual[name]

    def _layer(self, name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """The weight of a layer, of a stack those of its experts, and its bias."""
        layer = self._ordered(name, self._source.layer(name))
        experts = self._source.paths.parts.get(name, [name])
        if len(experts) == 1:
            yield f"{name}{WEIGHT}", self._stored(name, layer)
            if layer.meta.bias_part is not None:
                bias = layer.take(layer.whole()).bias
                assert bias is not None
                yield f"{name}{BIAS}", bias
        else:
            for expert, each in zip(experts, layer.unstack(), strict=True):
                yield f"{expert}{WEIGHT}", self._stored(expert, each)

    def _stored(self, name: str, layer: Unloaded) -> StoredWeight:
        self._left.add(name)
        return StoredWeight.of(layer, self._dtype, lambda: self._left.discard(name))

    def _ordered(self, name: str, source: Unloaded) -> Unloaded:
        """A layer with its rows as in a checkpoint, of whole heads."""
        heads, total = self._source.layout.heads_of(name), source.weight.shape[0]
        if heads is None:
            return source

        def change(layer: Layer, cut: Slice) -> Layer:
            rows = layer.weight.shape[0]
            return in_order(layer, half_split_order(rows, heads * rows // total, layer=source.key))

        return source.changed(change)
