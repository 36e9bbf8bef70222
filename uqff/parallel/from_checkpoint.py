"""The engine's constructors of layers: of a checkpoint and a path in it.

::

    what the checkpoint has        gives
    nothing under the path         a dummy
    a weight, plain or quantised   the rank's slice, if it can be cut exactly; else an error with the reason
    a bias                         row-parallel: whole, added after the sum; else that of the rank's outputs

The engine refuses GPTQ, AWQ, bitsandbytes and AFQ on several ranks; here they are cut.

Authority: mistral.rs v0.8.0, ``mistralrs-quant/src/distributed/layers.rs``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from uqff.errors import MissingError, ShapeError, UnsupportedError
from uqff.parallel.checkpoint_layers import layer_of_checkpoint
from uqff.parallel.comm import Comm
from uqff.parallel.dummy import DummyLayer
from uqff.parallel.immediate import ImmediateIsq, PendingLayer, Types
from uqff.parallel.loading import load
from uqff.parallel.shard import Shard, chunk_ranges
from uqff.parallel.unloaded import Unloaded, UnloadedExperts, quantised
from uqff.quantization.recipe import Recipe
from uqff.quantization.types import kind_name

if TYPE_CHECKING:
    import torch

    from uqff.checkpoints import Checkpoint
    from uqff.parallel.layer import QuantizedLinear

__all__ = ["check_plain", "first", "is_absent", "linear", "merged", "prepared", "prepared_experts", "unloaded"]

_Linear = TypeVar("_Linear", bound="QuantizedLinear")

SENSITIVE = ("lm_head", "embed_tokens")
"""Last words of the paths of heads and embeddings."""


def is_absent(checkpoint: Checkpoint, *prefixes: str) -> bool:
    """Whether a checkpoint has no tensor under any of some paths."""
    starts = tuple(f"{prefix}{mark}" for prefix in prefixes for mark in (".", "_"))
    return not any(name in prefixes or name.startswith(starts) for name in checkpoint.tensors)


def unloaded(
    checkpoint: Checkpoint, prefix: str, shape: tuple[int, int], *, bias: bool, must: bool = False
) -> Unloaded | None:
    """A layer of a checkpoint, of a shape; None if there is nothing of it.

    Args:
        checkpoint: holds it.
        prefix: path of the layer.
        shape: outputs and inputs.
        bias: whether its bias is taken.
        must: whether it must have one then.

    Raises:
        MissingError: there are tensors, but no weight; or no bias.
        ShapeError: weight or bias have another shape.
        UqffError: the layer is not valid.
    """
    if is_absent(checkpoint, prefix):
        return None
    source = layer_of_checkpoint(checkpoint, prefix).fit(shape, str(checkpoint.path))
    stored = source.meta.bias_part
    if not bias or stored is None:
        if bias and must:
            raise MissingError("layer has no bias", file=str(checkpoint.path), layer=prefix, expected=f"{prefix}.bias")
        return source if stored is None else source.without_bias()
    if stored.shape != shape[:1]:
        expected = [shape[0]]
        raise ShapeError("bias does not fit weight", layer=prefix, expected=expected, got=list(stored.shape))
    return source


def prepared(source: Unloaded, isq: Types | ImmediateIsq | None) -> Unloaded:
    """A layer in the type that it shall have.

    Args:
        source: the layer.
        isq: a type or a number of bits, for this layer; or rules, of which one may select it, see
            :class:`~uqff.parallel.ImmediateIsq`; None leaves it as it is.
    """
    if isq is None:
        return source
    if isinstance(isq, (Recipe, ImmediateIsq)) or not isinstance(isq, (str, int)):
        rules = isq if isinstance(isq, ImmediateIsq) else ImmediateIsq(isq)
        return rules.applied(source, sensitive=source.path.rpartition(".")[2] in SENSITIVE)
    return quantised(source, kind_name(isq))


def prepared_experts(
    given: UnloadedExperts, count: int, shape: tuple[int, int], isq: Types | ImmediateIsq | None, *, bias: bool
) -> UnloadedExperts:
    """A projection of experts, of a shape, in the type that it shall have."""

    def one(source: Unloaded, shape: tuple[int, ...]) -> Unloaded:
        source = source.fit(shape)
        return prepared(source if bias or source.meta.bias_part is None else source.without_bias(), isq)

    if isinstance(given, Unloaded):
        return one(given, (count, *shape))
    return [one(each, shape) for each in given]


def linear(
    cls: type[_Linear],
    source: Unloaded | None,
    prefix: str,
    comm: Comm | None,
    *,
    shard: Shard | None = None,
    isq: Types | ImmediateIsq | None = None,
    device: torch.device | str | None = None,
) -> _Linear | DummyLayer | PendingLayer:
    """The slice of a layer: made now, or by the threads of ``isq``; a dummy of what is absent."""
    if source is None:
        return DummyLayer(prefix)
    made = prepared(source, isq)
    comm = Comm.of(comm)
    cut = Shard.of(shard or cls._shard(comm), layer=prefix)
    cut.slice_of(made.weight, layer=prefix)  # what cannot be cut is an error now, not in a thread
    work: Callable[[], _Linear] = partial(load, cls, made, comm, shard=cut, device=device)
    if isinstance(isq, ImmediateIsq) and isq.pool is not None and made is not source:
        return PendingLayer(prefix, isq.pool(prefix, work))
    return work()


def merged(source: Unloaded | None, chunks: int | Sequence[int], prefix: str) -> list[Unloaded | None]:
    """The parts of a fused weight, one after another along the outputs.

    Raises:
        ShardError: the chunks do not make up the weight, or it cannot be cut there.
    """
    if source is None:
        return [None] * (chunks if isinstance(chunks, int) else len(chunks))
    return [source.narrow(*each) for each in chunk_ranges(source.weight.shape, chunks, layer=prefix)]


def first(source: Unloaded | None, checkpoint: Checkpoint, dim: int, size: int) -> Unloaded | None:
    """The first outputs or inputs of a larger weight (MatFormer).

    Raises:
        UnsupportedError: the checkpoint is quantised.
    """
    check_plain(checkpoint, source)
    return None if source is None else source.narrow(dim, 0, size)


def check_plain(checkpoint: Checkpoint, source: Unloaded | None) -> None:
    """Refuse to take a part of a MatFormer out of a quantised checkpoint, as the engine does."""
    if checkpoint.method is not None:
        raise UnsupportedError(
            "a matformer layer of a checkpoint that is quantised",
            file=str(checkpoint.path),
            layer=None if source is None else source.key,
            expected="a plain checkpoint",
        )
