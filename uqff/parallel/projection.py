"""The projections of experts before they are cut: the wholes as they are given, and what a rank makes of its part.

::

    given                     FusedExperts        PackedExperts
    one weight, stacked       StackedWhole        SeparateWhole, taken apart
    a weight for each expert  JoinedWhole         SeparateWhole
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from uqff.codec.layer import Layer
from uqff.errors import ShapeError, UnsupportedError, located
from uqff.families import QuantizedTensor, stack
from uqff.parallel.accept import Weight, parts_of, record_of
from uqff.parallel.comm import Comm
from uqff.parallel.gather import ColumnParallelStack, ExpertList, ReplicatedStack, RowParallelStack
from uqff.parallel.linear import ColumnParallelLayer, ReplicatedLayer, RowParallelLayer
from uqff.parallel.loading import Run, load
from uqff.parallel.partition import PROJECTIONS, Cut, IntermediateRange, at
from uqff.parallel.shard import Shard, Slice
from uqff.parallel.unloaded import Unloaded, UnloadedExperts

if TYPE_CHECKING:
    from typing_extensions import TypeIs

    from uqff.parallel.layer import QuantizedLinear

__all__ = [
    "PROJECTIONS",
    "Experts",
    "JoinedWhole",
    "Projection",
    "SeparateWhole",
    "StackedWhole",
    "UnloadedWhole",
    "Whole",
    "are_single",
    "at",
    "check_counts",
    "no_bias",
]

Experts: TypeAlias = "Weight | Sequence[Weight]"
"""A projection of all experts: one weight ``[experts, out, in]``, or a weight ``[out, in]`` for each."""

Projection: TypeAlias = ReplicatedStack | ExpertList
"""A projection of all experts, this rank's part."""

_Given: TypeAlias = "tuple[QuantizedTensor | torch.Tensor, torch.Tensor | None]"


@dataclass(frozen=True)
class Whole(ABC):
    """A projection of all experts, whole.

    Attributes:
        key: of the experts, for errors.
        name: of the projection.
        inner: which dimension of one expert's matrix is the intermediate one.
    """

    key: str | None
    name: str
    inner: int

    @property
    def full_key(self) -> str | None:
        """The key of the projection."""
        return at(self.key, self.name)

    @abstractmethod
    def cuts(self) -> list[Cut]:
        """What has to be cut alike: all weights, or one of each sort."""

    @abstractmethod
    def place(self, part: IntermediateRange | None, comm: Comm, version: tuple[int, int, int]) -> Projection:
        """The part of the rank.

        Args:
            part: of the intermediate dimension; None if every rank is to hold everything.
            comm: the ranks.
            version: that blobs are written with.
        """


@dataclass(frozen=True)
class UnloadedWhole:
    """A projection of all experts that has not been loaded: a stack, or single experts, without biases.

    Attributes:
        key: of the experts, for errors.
        name: of the projection.
        inner: which dimension of one expert's matrix is the intermediate one.
        given: the stack, or a layer for each expert.
    """

    key: str | None
    name: str
    inner: int
    given: UnloadedExperts

    @property
    def layers(self) -> list[Unloaded]:
        """The stack alone, or all experts."""
        return [self.given] if isinstance(self.given, Unloaded) else list(self.given)

    def cuts(self) -> list[Cut]:
        """What has to be cut alike."""
        dim = self.inner + isinstance(self.given, Unloaded)
        return [Cut(layer.weight, dim) for layer in self.layers]

    def begin(
        self, part: IntermediateRange | None, comm: Comm, run: Run, device: torch.device | str | None
    ) -> Callable[[], Projection]:
        """Load the part of the rank; takes what :meth:`Whole.place` does, what loads it, and where it goes.

        Returns:
            What waits for it.
        """
        if isinstance(self.given, Unloaded):
            cls: type[ReplicatedStack] = stack_class(part, self.inner)
            shard = Shard.whole() if part is None else part.along(self.inner + 1)
            return run(self.given.key, partial(load, cls, self.given, comm, shard=shard, device=device))
        form = layer_class(part, self.inner)
        shard = Shard.whole() if part is None else part.along(self.inner)
        begun = [run(each.key, partial(load, form, each, comm, shard=shard, device=device)) for each in self.given]
        return lambda: ExpertList([each() for each in begun], at(self.key, self.name))


def stack_class(part: IntermediateRange | None, inner: int) -> type[ReplicatedStack]:
    """What a stack of a projection is on the ranks."""
    return ReplicatedStack if part is None else (ColumnParallelStack, RowParallelStack)[inner]


def layer_class(part: IntermediateRange | None, inner: int) -> type[QuantizedLinear]:
    """What an expert of a projection is on the ranks."""
    return ReplicatedLayer if part is None else (ColumnParallelLayer, RowParallelLayer)[inner]


@dataclass(frozen=True)
class StackedWhole(Whole):
    """One weight of all experts, which stays one."""

    weight: QuantizedTensor | torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, given: Weight, key: str | None, name: str, inner: int) -> StackedWhole:
        """Raises what :func:`~uqff.parallel.accept.parts_of` does; ShapeError if this is no stack."""
        return cls(key, name, inner, *_stacked(given, at(key, name)))

    def cuts(self) -> list[Cut]:
        """The stack."""
        return [Cut(self.weight, self.inner + 1)]

    def place(self, part: IntermediateRange | None, comm: Comm, version: tuple[int, int, int]) -> ReplicatedStack:
        """A slice of the stack."""
        shard = Shard.whole() if part is None else part.along(self.inner + 1)
        return stack_class(part, self.inner)(
            self.weight, self.bias, comm, shard=shard, key=self.full_key, version=version
        )


@dataclass(frozen=True)
class JoinedWhole(Whole):
    """Single experts that are stacked: exactly, the stored bytes are put together.

    Attributes:
        layers: of each expert.
        whole: their stack, on the meta device.
    """

    layers: list[Layer]
    whole: QuantizedTensor

    @classmethod
    def of(cls, given: Sequence[Weight], key: str | None, name: str, inner: int) -> JoinedWhole:
        """Raises what :func:`~uqff.parallel.accept.parts_of` does; ShardError if they do not stack."""
        layers = [Layer(record_of(weight), bias) for weight, bias in _matrices(given, key, name)]
        with located(layer=at(key, name)):
            whole = stack([layer.weight.meta() for layer in layers])
        return cls(key, name, inner, layers, whole)

    def cuts(self) -> list[Cut]:
        """Experts that stack are all alike: one stands for all."""
        return [Cut(self.layers[0].weight, self.inner)]

    def place(self, part: IntermediateRange | None, comm: Comm, version: tuple[int, int, int]) -> ReplicatedStack:
        """The stack of slices of every expert, with their biases ``[experts, out]`` if they have them."""
        layers = self.layers if part is None else [layer.narrow(self.inner, *part) for layer in self.layers]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        if biases and len(biases) != len(layers):
            expected, got = "a bias for every expert or none", f"{len(biases)} of {len(layers)}"
            raise ShapeError("some experts have no bias", layer=self.full_key, expected=expected, got=got)
        with located(layer=self.full_key):
            joined = Layer(stack([layer.weight for layer in layers]), torch.stack(biases) if biases else None)
        cut = Slice(0, 0, self.whole.shape[0]) if part is None else Slice(self.inner + 1, *part)
        return stack_class(part, self.inner)._holding(joined, self.whole, cut, comm, key=self.full_key, version=version)


@dataclass(frozen=True)
class SeparateWhole(Whole):
    """Single experts that stay so, without biases; types may differ."""

    weights: list[QuantizedTensor | torch.Tensor]

    @classmethod
    def of(cls, given: Experts, key: str | None, name: str, inner: int) -> SeparateWhole:
        """Raises what :func:`~uqff.parallel.accept.parts_of` does; UnsupportedError if there is a bias."""
        single = given if are_single(given) else _unstacked(given, at(key, name))
        weights = []
        for expert, (weight, bias) in enumerate(_matrices(single, key, name)):
            if bias is not None:
                raise no_bias(key, expert, name)
            weights.append(weight)
        return cls(key, name, inner, weights)

    def cuts(self) -> list[Cut]:
        """Every expert."""
        return [Cut(weight, self.inner) for weight in self.weights]

    def place(self, part: IntermediateRange | None, comm: Comm, version: tuple[int, int, int]) -> ExpertList:
        """A slice of every expert; views of a file, where they can be."""
        cls = layer_class(part, self.inner)
        shard = Shard.whole() if part is None else part.along(self.inner)
        keys = [at(self.key, f"{expert}.{self.name}") for expert in range(len(self.weights))]
        layers = [
            cls(weight, None, comm, shard=shard, key=key, version=version)
            for weight, key in zip(self.weights, keys, strict=True)
        ]
        return ExpertList(layers, self.full_key)


def are_single(given: Experts) -> TypeIs[Sequence[Weight]]:
    """Whether this is a weight for each expert, not one for all."""
    return isinstance(given, (Sequence, torch.nn.ModuleList))


def check_counts(given: Sequence[Any], key: str | None) -> None:
    """Make sure that there are as many experts in each projection, at least one, where they are given one by one.

    Raises:
        ShapeError: there are not.
    """
    counts = [len(each) for each in given if are_single(each)]
    if counts and (not counts[0] or len(set(counts)) > 1):
        problem = "projections of different numbers of experts" if any(counts) else "no experts"
        raise ShapeError(problem, layer=key, expected="at least 1", got=", ".join(map(str, counts)))


def no_bias(key: str | None, expert: int, name: str) -> UnsupportedError:
    """The error for an expert with a bias."""
    return UnsupportedError("PackedExperts take no bias", layer=at(key, f"{expert}.{name}"))


def _stacked(given: Weight, key: str | None) -> _Given:
    weight, bias = parts_of(given, layer=key)
    if len(weight.shape) != 3:
        expected = "[experts, out, in]"
        raise ShapeError("weight is not a stack", layer=key, expected=expected, got=list(weight.shape))
    return weight, bias


def _unstacked(given: Weight, key: str | None) -> list[Weight]:
    weight, bias = _stacked(given, key)
    if isinstance(weight, torch.Tensor) and bias is None:  # of any strides
        return list(weight)
    with located(layer=key):
        return list(Layer(record_of(weight), bias).unstack())


def _matrices(layers: Sequence[Weight], key: str | None, name: str) -> list[_Given]:
    """Weight and bias of each expert of a projection."""
    found = []
    for expert, layer in enumerate(layers):
        place = at(key, f"{expert}.{name}")
        weight, bias = parts_of(layer, layer=place)
        if len(weight.shape) != 2:
            raise ShapeError("weight is not a matrix", layer=place, expected="[out, in]", got=list(weight.shape))
        found.append((weight, bias))
    return found
