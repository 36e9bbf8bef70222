"""The experts of a mixture: gate, up and down projections of many, of which each token uses a few.

::

    y = Σ_k weight_k · down_e(act(gate_e(x)) · up_e(x)),  e = index_k          the sum over the experts of a token

Every rank holds a part of every expert: of gate and up some outputs, of down the same numbers as inputs.  So each rank
computes a term of ``y``; the terms are added up over the ranks once per block, in float32, after the sum over experts.

Two forms: :class:`FusedExperts` holds each projection as one weight ``[experts, out, in]``, as 1.x files do;
:class:`PackedExperts` a layer per expert, as pre-1.0 files do.  The latter need not be alike: types may differ, and FP8
and HQQ weights that were quantised one by one have no exact stack.

Where a type's blocks do not allow equal parts, ``on_misaligned`` says what is to happen: ``"error"`` (a
:class:`~uqff.errors.ShardError` that names the world sizes that work), ``"uneven"`` (whole blocks, dealt out as evenly
as they can be; an error if there are fewer of them than ranks) or ``"replicate"`` (every rank holds all and nothing is
added up, which is what the engine does from 1.x on).

Authority: mistral.rs v0.8.0, ``mistralrs-quant/src/distributed/layers.rs`` (``PackedExperts``, ``FusedExperts``) and
``mistralrs-core/src/moe/experts.rs`` (``MoEExperts``).  There a rank of several holds FusedExperts whole, and a fused
``gate_up_proj`` for CUDA is cut through the middle, which gives one rank all gates and the other all ups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch

from uqff.codec import blob as blobs
from uqff.codec.blob import LATEST
from uqff.codec.layer import Layer
from uqff.errors import ShapeError, UnsupportedError, located
from uqff.families import QuantizedTensor, stack
from uqff.parallel.accept import Weight, parts_of, plain_of, record_of
from uqff.parallel.comm import Comm
from uqff.parallel.gather import ColumnParallelStack, ExpertList, ReplicatedStack, RowParallelStack
from uqff.parallel.layer import QuantizedLinear
from uqff.parallel.linear import ColumnParallelLayer, ReplicatedLayer, RowParallelLayer
from uqff.parallel.mixture import Activation, Mixture
from uqff.parallel.partition import Cut, OnMisaligned, part_of, split_fused
from uqff.parallel.shard import Shard, Slice
from uqff.schema.header import HEADER

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FusedExperts", "PackedExperts"]

_Numbers: TypeAlias = "QuantizedTensor | torch.Tensor"

_NAMES = ("gate_proj", "up_proj", "down_proj")
_INNER = (0, 0, 1)
"""The intermediate dimension of one expert's projections; of a stack it is the next."""


class FusedExperts(Mixture):
    """Experts of which each projection is one stacked weight ``[experts, out, in]``.

    Attributes:
        gate_proj: this rank's outputs of the gates, ``[experts, inter, hidden]``.
        up_proj: likewise.
        down_proj: the same numbers as inputs, ``[experts, hidden, inter]``.
    """

    gate_proj: ReplicatedStack
    up_proj: ReplicatedStack
    down_proj: ReplicatedStack

    @classmethod
    def from_layers(
        cls,
        gate: Weight,
        up: Weight,
        down: Weight,
        comm: Comm | None = None,
        *,
        act: Activation = torch.nn.functional.silu,
        on_misaligned: OnMisaligned = "error",
        device: torch.device | str | None = None,
        key: str | None = None,
        version: tuple[int, int, int] = LATEST,
    ) -> Self:
        """The rank's part of stacked weights: of a file of either generation, or plain.

        Args:
            gate: the whole, ``[experts, inter, hidden]``; only the bytes of the slice are read.
            up: likewise.
            down: ``[experts, hidden, inter]``.
            comm: the ranks; a world of one if None.
            act: the activation function.
            on_misaligned: what to do if blocks do not allow equal parts; see the module.
            device: where the slices go; they stay views of the file if None.
            key: of the experts, for errors: ``model.layers.0.mlp.experts``.
            version: that blobs are written with.

        Raises:
            ShardError: the slices cannot be cut.
            ShapeError: the weights do not fit each other, or are not stacked.
        """
        comm = Comm.of(comm)
        wholes = [parts_of(each, layer=_at(key, name)) for each, name in zip((gate, up, down), _NAMES, strict=True)]
        weights = [weight for weight, _ in wholes]
        for name, weight in zip(_NAMES, weights, strict=True):
            if len(weight.shape) != 3:
                expected = "[experts, out, in]"
                raise ShapeError(
                    "weight is not a stack", layer=_at(key, name), expected=expected, got=list(weight.shape)
                )
        part = part_of([Cut(w, dim + 1) for w, dim in zip(weights, _INNER, strict=True)], comm, on_misaligned, key)
        made = []
        for (weight, bias), name, dim in zip(wholes, _NAMES, _INNER, strict=True):
            cls_ = ReplicatedStack if part is None else (ColumnParallelStack, RowParallelStack)[dim]
            shard = Shard.whole() if part is None else part.along(dim + 1)
            made.append(cls_(weight, bias, comm, shard=shard, key=_at(key, name), version=version))
        return _on(cls(made[0], made[1], made[2], comm, act=act, key=key), device)

    @classmethod
    def from_expert_layers(
        cls,
        gates: Sequence[Weight],
        ups: Sequence[Weight],
        downs: Sequence[Weight],
        comm: Comm | None = None,
        *,
        act: Activation = torch.nn.functional.silu,
        on_misaligned: OnMisaligned = "error",
        device: torch.device | str | None = None,
        key: str | None = None,
        version: tuple[int, int, int] = LATEST,
    ) -> Self:
        """The rank's part of single experts, stacked: exactly, the stored bytes are put together.

        Experts that cannot be stacked can be :class:`PackedExperts`, which do not copy anything either.

        Args:
            gates: of each expert, ``[inter, hidden]``; only the bytes of the slice are read.
            ups: likewise.
            downs: ``[hidden, inter]``.
            comm: the ranks; a world of one if None.
            act: the activation function.
            on_misaligned: what to do if blocks do not allow equal parts; see the module.
            device: where the stacks go.
            key: of the experts, for errors.
            version: that blobs are written with.

        Raises:
            ShardError: the slices cannot be cut; or experts do not stack, and the odd ones are named.
            ShapeError: the weights do not fit each other, or there are none; some experts have biases and others none.
        """
        comm, made = Comm.of(comm), []
        projections = [
            [Layer(record_of(weight), bias) for weight, bias in _matrices(layers, key, name)]
            for layers, name in _projections(gates, ups, downs, key)
        ]
        wholes = [_outline_of_stack(each, _at(key, name)) for each, name in zip(projections, _NAMES, strict=True)]
        # Experts that stack are all alike: one of each projection stands for all.
        cuts = [Cut(layers[0].weight, dim) for layers, dim in zip(projections, _INNER, strict=True)]
        part = part_of(cuts, comm, on_misaligned, key)
        for layers, whole, name, dim in zip(projections, wholes, _NAMES, _INNER, strict=True):
            cls_ = ReplicatedStack if part is None else (ColumnParallelStack, RowParallelStack)[dim]
            slices = layers if part is None else [layer.narrow(dim, *part) for layer in layers]
            joined = _stack(slices, _at(key, name))
            cut = Slice(0, 0, whole.shape[0]) if part is None else Slice(dim + 1, *part)
            made.append(cls_._holding(joined, whole, cut, comm, key=_at(key, name), version=version))
        return _on(cls(made[0], made[1], made[2], comm, act=act, key=key), device)

    @classmethod
    def from_fused(
        cls,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        comm: Comm | None = None,
        *,
        act: Activation = torch.nn.functional.silu,
        on_misaligned: OnMisaligned = "error",
        device: torch.device | str | None = None,
        key: str | None = None,
    ) -> Self:
        """The rank's part of a checkpoint that keeps gate and up in one tensor, in either convention.

        See :func:`~uqff.parallel.partition.split_fused` for the shapes, :meth:`from_layers` for the other arguments.
        """
        gate, up, down = _split_fused(gate_up, down, key)
        return cls.from_layers(gate, up, down, comm, act=act, on_misaligned=on_misaligned, device=device, key=key)

    @classmethod
    def deserialize(
        cls,
        gate: Any,
        up: Any,
        down: Any,
        comm: Comm | None = None,
        *,
        act: Activation = torch.nn.functional.silu,
        on_misaligned: OnMisaligned = "error",
        device: torch.device | str | None = None,
        key: str | None = None,
    ) -> Self:
        """The rank's part of pre-1.0 blobs: one stacked blob for each projection, or a list with one for each expert.

        Raises:
            UqffError: a blob is not valid, or what :meth:`from_layers` and :meth:`from_expert_layers` raise.
        """
        single = not isinstance(gate, (list, tuple))
        given = [
            ([each] if single else each, _at(key, name)) for each, name in zip((gate, up, down), _NAMES, strict=True)
        ]
        g, u, d = (_deserialized(*each) for each in given)
        version = _version_of(given[0][0])
        if not single:
            return cls.from_expert_layers(
                g, u, d, comm, act=act, on_misaligned=on_misaligned, device=device, key=key, version=version
            )
        return cls.from_layers(
            g[0], u[0], d[0], comm, act=act, on_misaligned=on_misaligned, device=device, key=key, version=version
        )


class PackedExperts(Mixture):
    """Experts that each have layers of their own, without biases.

    Attributes:
        gate_proj: a layer for each expert, with this rank's outputs, ``[inter, hidden]``.
        up_proj: likewise.
        down_proj: the same numbers as inputs, ``[hidden, inter]``.
    """

    gate_proj: ExpertList
    up_proj: ExpertList
    down_proj: ExpertList

    def __init__(
        self,
        gates: ExpertList | Sequence[QuantizedLinear],
        ups: ExpertList | Sequence[QuantizedLinear],
        downs: ExpertList | Sequence[QuantizedLinear],
        comm: Comm | None = None,
        *,
        act: Activation = torch.nn.functional.silu,
        key: str | None = None,
    ) -> None:
        """Experts of layers that are cut already; see the constructors for those that are not.

        Raises:
            UnsupportedError: a layer has a bias.
            ShapeError: the layers do not fit each other.
        """
        lists = []
        for layers, name in zip((gates, ups, downs), _NAMES, strict=True):
            for expert, layer in enumerate(layers):
                if layer.stored_bias is not None:
                    raise _no_bias(key, expert, name)
            lists.append(layers if isinstance(layers, ExpertList) else ExpertList(layers, _at(key, name)))
        super().__init__(lists[0], lists[1], lists[2], comm, act=act, key=key)

    @classmethod
    def from_expert_layers(
        cls,
        gates: Sequence[Weight],
        ups: Sequence[Weight],
        downs: Sequence[Weight],
        comm: Comm | None = None,
        *,
        act: Activation = torch.nn.functional.silu,
        on_misaligned: OnMisaligned = "error",
        device: torch.device | str | None = None,
        key: str | None = None,
        version: tuple[int, int, int] = LATEST,
    ) -> Self:
        """The rank's part of single experts, plain or of a file; slices stay views of it where they can.

        Args:
            gates: of each expert, ``[inter, hidden]``; only the bytes of the slice are read. Types may differ.
            ups: likewise.
            downs: ``[hidden, inter]``.
            comm: the ranks; a world of one if None.
            act: the activation function.
            on_misaligned: what to do if blocks do not allow equal parts; see the module.
            device: where the slices go.
            key: of the experts, for errors.
            version: that blobs are written with.

        Raises:
            ShardError: the slices cannot be cut.
            ShapeError: the weights do not fit each other, or there are none.
            UnsupportedError: a layer has a bias.
        """
        comm, made = Comm.of(comm), []
        projections = [
            [_unbiased(*each, key, i, name) for i, each in enumerate(_matrices(layers, key, name))]
            for layers, name in _projections(gates, ups, downs, key)
        ]
        cuts = [Cut(each, dim) for weights, dim in zip(projections, _INNER, strict=True) for each in weights]
        part = part_of(cuts, comm, on_misaligned, key)
        for weights, name, dim in zip(projections, _NAMES, _INNER, strict=True):
            cls_ = ReplicatedLayer if part is None else (ColumnParallelLayer, RowParallelLayer)[dim]
            shard = Shard.whole() if part is None else part.along(dim)
            layers = []
            for expert, weight in enumerate(weights):
                at = _at(key, f"{expert}.{name}")
                layers.append(cls_(weight, None, comm, shard=shard, key=at, version=version))
            made.append(ExpertList(layers, _at(key, name)))
        return _on(cls(made[0], made[1], made[2], comm, act=act, key=key), device)

    @classmethod
    def from_fused(
        cls,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        comm: Comm | None = None,
        *,
        bias: bool = False,
        act: Activation = torch.nn.functional.silu,
        on_misaligned: OnMisaligned = "error",
        device: torch.device | str | None = None,
        key: str | None = None,
    ) -> Self:
        """The rank's part of a checkpoint that keeps gate and up of all experts in one tensor, in either convention.

        See :func:`~uqff.parallel.partition.split_fused` for the shapes.

        Args:
            gate_up: ``[E, hidden, 2·inter]``, or ``[E, 2·inter, hidden]``.
            down: ``[E, inter, hidden]``, or ``[E, hidden, inter]``.
            comm: the ranks.
            bias: whether the checkpoint has biases, which is refused.
            act: the activation function.
            on_misaligned: what to do if the ranks do not divide the intermediate dimension.
            device: where the slices go.
            key: of the experts, for errors.
        """
        if bias:
            raise UnsupportedError("PackedExperts take no bias", layer=key)
        gates, ups, downs = (list(each) for each in _split_fused(gate_up, down, key))
        return cls.from_expert_layers(
            gates, ups, downs, comm, act=act, on_misaligned=on_misaligned, device=device, key=key
        )

    @classmethod
    def deserialize(
        cls,
        gates: Sequence[Any],
        ups: Sequence[Any],
        downs: Sequence[Any],
        comm: Comm | None = None,
        *,
        act: Activation = torch.nn.functional.silu,
        on_misaligned: OnMisaligned = "error",
        device: torch.device | str | None = None,
        key: str | None = None,
    ) -> Self:
        """The rank's part of pre-1.0 blobs, one for each expert and projection.

        Raises:
            UqffError: a blob is not valid, or what :meth:`from_expert_layers` raises.
        """
        given = zip((gates, ups, downs), _NAMES, strict=True)
        g, u, d = (_deserialized(each, _at(key, name)) for each, name in given)
        version = _version_of(gates)
        return cls.from_expert_layers(
            g, u, d, comm, act=act, on_misaligned=on_misaligned, device=device, key=key, version=version
        )


def _at(key: str | None, name: str) -> str | None:
    """The key of a projection of experts."""
    return None if key is None else f"{key}.{name}"


_Made = TypeVar("_Made", bound=torch.nn.Module)


def _on(made: _Made, device: torch.device | str | None) -> _Made:
    return made if device is None else made.to(device)


def _version_of(given: Sequence[Any]) -> tuple[int, int, int]:
    version: tuple[int, int, int] = HEADER.read(given[0], exact=False)["version"] if given else LATEST
    return version


def _deserialized(given: Sequence[Any], key: str | None) -> list[Layer]:
    layers = []
    for expert, blob in enumerate(given):
        with located(layer=f"{key or 'expert'}.{expert}" if len(given) > 1 else key):
            layers.append(blobs.deserialize(blob))
    return layers


def _outline_of_stack(layers: Sequence[Layer], key: str | None) -> QuantizedTensor:
    with located(layer=key):
        return stack([layer.weight.meta() for layer in layers])


def _stack(layers: Sequence[Layer], key: str | None) -> Layer:
    """The stack of single experts, with their biases ``[experts, out]`` if they have them."""
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if biases and len(biases) != len(layers):
        got = f"{len(biases)} of {len(layers)}"
        raise ShapeError("some experts have no bias", layer=key, expected="a bias for every expert or none", got=got)
    with located(layer=key):
        return Layer(stack([layer.weight for layer in layers]), torch.stack(biases) if biases else None)


def _unbiased(weight: _Numbers, bias: torch.Tensor | None, key: str | None, expert: int, name: str) -> _Numbers:
    if bias is not None:
        raise _no_bias(key, expert, name)
    return weight


def _matrices(layers: Sequence[Weight], key: str | None, name: str) -> Iterator[tuple[_Numbers, torch.Tensor | None]]:
    """Weight and bias of each expert of a projection."""
    for expert, layer in enumerate(layers):
        at = _at(key, f"{expert}.{name}")
        weight, bias = parts_of(layer, layer=at)
        if len(weight.shape) != 2:
            raise ShapeError("weight is not a matrix", layer=at, expected="[out, in]", got=list(weight.shape))
        yield weight, bias


def _projections(
    gates: Sequence[Weight], ups: Sequence[Weight], downs: Sequence[Weight], key: str | None
) -> list[tuple[Sequence[Weight], str]]:
    """The experts of each projection, with its name: as many of each, at least one."""
    counts = [len(each) for each in (gates, ups, downs)]
    if not counts[0] or len(set(counts)) > 1:
        problem = "projections of different numbers of experts" if any(counts) else "no experts"
        raise ShapeError(problem, layer=key, expected="at least 1", got=", ".join(map(str, counts)))
    return list(zip((gates, ups, downs), _NAMES, strict=True))


def _split_fused(
    gate_up: torch.Tensor, down: torch.Tensor, key: str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gate_up, down = plain_of("gate_up", gate_up, layer=key), plain_of("down", down, layer=key)
    return split_fused(gate_up, down, layer=key)


def _no_bias(key: str | None, expert: int, name: str) -> UnsupportedError:
    return UnsupportedError("PackedExperts take no bias", layer=_at(key, f"{expert}.{name}"))
