"""The places that a model has for layers, filled with the layers of a source: each with its part, type and adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch

from uqff.errors import FormatError, ShardError, UnsupportedError
from uqff.families import PLAIN_KIND
from uqff.models.layouts import half_split_order
from uqff.parallel import fallback, transformers_model
from uqff.parallel.elsewhere import place_of
from uqff.parallel.experts import FusedExperts, PackedExperts
from uqff.parallel.heads import compute_kv_shard
from uqff.parallel.linear import ReplicatedLayer
from uqff.parallel.loading import Run, load, moved
from uqff.parallel.plan import EMBEDDING, HEAD, Role
from uqff.parallel.projection import PROJECTIONS
from uqff.parallel.vocabulary import Embedding, Head, vocabulary
from uqff.progress import Steps

if TYPE_CHECKING:
    from uqff.parallel.adapting import Adapting
    from uqff.parallel.comm import Comm
    from uqff.parallel.immediate import ImmediateIsq
    from uqff.parallel.layer import QuantizedLinear
    from uqff.parallel.mixture import Mixture
    from uqff.parallel.source import ModelSource
    from uqff.parallel.transformers_model import ExpertsPlace
    from uqff.parallel.unloaded import Unloaded, UnloadedExperts
    from uqff.progress import Progress

__all__ = ["STORED_KEY", "Filling", "ReplicatedWarning"]

STORED_KEY: Final = "_uqff_stored"
"""Where a module that computes with plain numbers keeps the layer that they were made of."""

UNPLANNED: Final = "transformers has no tensor-parallel plan for it that is known here"
UNEVEN: Final = "heads or widths do not divide by {ranks}"


class ReplicatedWarning(UserWarning):
    """Layers that every rank holds whole, because nothing says how to split them, or they do not divide."""


class Filling:
    """Puts the layers of a source into the places that a model has for them."""

    def __init__(
        self,
        source: ModelSource,
        comm: Comm,
        device: torch.device,
        dtype: torch.dtype,
        model: torch.nn.Module,
        adapting: Adapting,
        isq: ImmediateIsq | None,
        run: Run,
    ) -> None:
        """What is needed for it.

        Args:
            source: of the layers.
            comm: the ranks.
            device: where layers go.
            dtype: of hidden states.
            model: on the meta device; is changed.
            adapting: the adapters.
            isq: what layers become while they are loaded; None if they stay as they are.
            run: loads them.
        """
        self.source, self.comm, self.device, self.dtype, self.model = source, comm, device, dtype, model
        self.adapting, self.isq, self.run = adapting, isq, run
        self._begun: list[tuple[str, Callable[[], torch.nn.Module]]] = []

    def fill(self, progress: Progress | None = None) -> None:
        """Fill all.

        Args:
            progress: is told of each layer, once it is in its place.

        Raises:
            UqffError: a layer is missing or not valid, or does not fit configuration or ranks.
        """
        for place in transformers_model.expert_places(self.model):
            self._sparse(place)
        roles = transformers_model.linear_roles(self.model, self.comm.world_size)
        for path, role in roles.items():
            module: Any = self.model.get_submodule(path)
            self._linear(role, path, module)
        for path in transformers_model.routers(self.model):
            self._router(path)
        self._tell(roles)
        self._vocabulary()
        steps = Steps(progress, "load", len(self._begun), len(self._begun), "layers")
        for path, loaded in self._begun:
            parent, _, name = path.rpartition(".")
            setattr(self.model.get_submodule(parent), name, loaded())
            steps.add(path, 1)

    def _prepared(self, source: Unloaded, paths: Sequence[str]) -> tuple[Unloaded, bool, torch.device]:
        """A layer in the type that it shall have, whether its adapters are in it, and where it goes."""
        if self.isq is None:
            return source, False, self.device
        sensitive = source.path in self.source.paths.sensitive
        kind = self.isq.kind_of(source.path, sensitive=sensitive)
        if kind is None:
            return source, False, self.device
        place = place_of(self.isq.device_of(source.path), self.device, self.comm, source.key)
        if kind == PLAIN_KIND:
            return source, False, place
        before = self.adapting.merges_before
        if before:
            source = self.adapting.before(source, paths)
        return self.isq.applied(source, sensitive=sensitive), before, place

    def _begin(
        self, path: str, source: Unloaded, loading: Callable[[], QuantizedLinear], place: torch.device, *, adapted: bool
    ) -> Callable[[], QuantizedLinear]:
        def work() -> QuantizedLinear:
            made = loading()
            made = moved(made if adapted else self.adapting.linear(path, made), place)
            made.elsewhere = place != self.device
            return made

        return self.run(source.key, work)

    def _tell(self, roles: Mapping[str, Role]) -> None:
        """Warn of layers that ranks could share and do not."""
        if self.comm.world_size == 1:
            return
        planned = transformers_model.linear_roles(self.model)
        for told, found in (
            (UNPLANNED, [path for path in roles if planned[path] == "whole" and self.source.paths.declares(path)]),
            (UNEVEN, [path for path, role in roles.items() if role != planned[path]]),
        ):
            if found:
                more = f" and {len(found) - 1} more" if found[1:] else ""
                told = told.format(ranks=self.comm.world_size)
                warnings.warn(ReplicatedWarning(f"{found[0]}{more}: whole on every rank, because {told}"), stacklevel=2)

    def _router(self, path: str) -> None:
        """A layer of the file where the model has plain numbers: it is dequantised, but for further embeddings."""
        if not self.source.paths.declares(path):
            return
        module: Any = self.model.get_submodule(path)
        source, adapted, place = self._prepared(self._layer(path, tuple(module.weight.shape)), [path])
        if isinstance(module, torch.nn.Embedding):
            scale, norm = transformers_model.after_embedding(module)
            rows = self._begin(path, source, vocabulary(source, self.comm), place, adapted=adapted)
            self._begun.append((path, lambda: Embedding(rows(), self.dtype, scale, norm)))
            return
        loading = self._begin(path, source, partial(load, ReplicatedLayer, source, self.comm), place, adapted=adapted)

        def work() -> torch.nn.Module:
            stored = loading().weight
            weight = stored.dequantize(self.dtype).to(self.device)
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
            setattr(module, STORED_KEY, stored)
            return module  # type: ignore[no-any-return]

        self._begun.append((path, work))

    def _linear(self, role: Role, path: str, module: torch.nn.Linear) -> None:
        if not module.weight.is_meta:
            return  # of a tower, and filled by transformers
        source = self._layer(path, tuple(module.weight.shape))
        if role == "whole" and source.weight.plain is not None and not self.source.paths.declares(path):
            return  # as in transformers
        if module.bias is not None and source.meta.bias_part is None:
            raise FormatError("layer lacks a bias", layer=source.key, expected=f"bias [{module.weight.shape[0]}]")
        source, adapted, place = self._prepared(source, [path])
        loading = self._split(role, path, module, source)
        self._begun.append((path, self._begin(path, source, loading, place, adapted=adapted)))

    def _split(self, role: Role, path: str, module: torch.nn.Linear, source: Unloaded) -> Callable[[], QuantizedLinear]:
        if role == "whole":
            return partial(load, ReplicatedLayer, source, self.comm)
        if role == "row":
            return fallback.row(source, self.comm)
        shard = None
        if role == "key-value" and self.comm.world_size > 1:
            config: Any = self.model.config
            kv_heads = config.num_key_value_heads
            shard = compute_kv_shard(kv_heads, module.weight.shape[0] // kv_heads, self.comm)
        loading = fallback.column(source, self.comm, shard)
        heads = self.source.layout.heads_of(path)
        if heads is None:
            return loading

        def in_order() -> QuantizedLinear:
            made = loading()
            rows = made.weight.shape[0]  # of heads, of which every rank holds whole ones
            made.reorder(half_split_order(rows, heads * rows // source.weight.shape[0], layer=source.key))
            return made

        return in_order

    def _sparse(self, place: ExpertsPlace) -> None:
        """A part of every expert: whole blocks, if equal parts cut through them; or all, if there are not enough."""
        key, count, inner, hidden = place.experts, place.number, place.inner, place.hidden
        given: list[UnloadedExperts] = []
        adapted = False
        found: set[torch.device] = set()
        shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
        for projection, (name, _), shape in zip(self.source.experts(key, count), PROJECTIONS, shapes, strict=True):
            paths = [f"{key}.{expert}.{name}" for expert in range(count)]
            if isinstance(projection, Sequence):
                fitting = [each.fit(shape, self.source.name) for each in projection]
                prepared = [self._prepared(each, [at]) for each, at in zip(fitting, paths, strict=True)]
                given.append([each for each, _, _ in prepared])
                adapted = prepared[0][1]
                found |= {each for _, _, each in prepared}
            else:
                one, adapted, of_stack = self._prepared(projection.fit((count, *shape), self.source.name), paths)
                given.append(one)
                found.add(of_stack)
        if len(found) > 1:
            expected, got = "one for gate, up and down", ", ".join(sorted(map(str, found)))
            raise UnsupportedError("experts on several devices", layer=key, field="device", expected=expected, got=got)
        (device,) = found
        together = self._experts(given, place, device)

        def block() -> torch.nn.Module:
            made = together()
            if not adapted:
                made = moved(self.adapting.mixture(key, made), device)
            made.elsewhere = device != self.device
            return transformers_model.sparse_block(self.model.config, made) if place.with_router else made

        self._begun.append((place.path, block))

    def _experts(
        self, given: Sequence[UnloadedExperts], place: ExpertsPlace, device: torch.device
    ) -> Callable[[], Mixture]:
        form: type[Mixture] = PackedExperts if any(isinstance(each, Sequence) for each in given) else FusedExperts
        gate, up, down = given
        options: Any = {"act": place.act, "device": device, "key": place.experts, "run": self.run}
        try:
            return form.load(gate, up, down, self.comm, on_misaligned="uneven", **options)
        except ShardError:
            return form.load(gate, up, down, self.comm, on_misaligned="replicate", **options)

    def _vocabulary(self) -> None:
        """Embedding and head; what a tied model has only one of serves as both."""
        config: Any = self.model.config
        held: Any = self.model.get_submodule(EMBEDDING)
        scale, norm = transformers_model.after_embedding(held)
        shape = tuple(held.weight.shape)
        rows, _, place = self._prepared(self._layer(EMBEDDING, shape), ())
        embedding = head = self._begin(EMBEDDING, rows, vocabulary(rows, self.comm), place, adapted=True)
        of_head: Any = self.model.get_submodule(HEAD)
        bias = getattr(of_head, "bias", None)  # a tied head may have one, too: the rows are the embedding's
        if HEAD in self.source or not config.tie_word_embeddings:
            bias = None
            rows, adapted, place = self._prepared(self._layer(HEAD, tuple(of_head.weight.shape)), [HEAD])
            head = self._begin(HEAD, rows, vocabulary(rows, self.comm), place, adapted=adapted)
        self._begun.append((EMBEDDING, lambda: Embedding(embedding(), self.dtype, scale, norm)))
        self._begun.append((HEAD, lambda: Head(head(), bias)))

    def _layer(self, path: str, shape: tuple[int, ...]) -> Unloaded:
        return self.source.layer(path).fit(shape, self.source.name)
