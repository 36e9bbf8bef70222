"""One token through a decoder on a CPU between its attentions: what comes after one and before the next is one call.

Norms, activations laid out, products, angles, gates and sums of a layer lie in a :class:`~uqff.simd.chain.Chain`: what
they take is where it was at the token before, activations that several weights share are laid out once, and products of
the same input are shared among threads together. The numbers are the same, bit for bit: torch's norms and gates are
done as torch does them here, which is tried before.

For layers in the arithmetic of the engine, whose weights have kernels for it, and nothing beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from uqff import simd
from uqff.parallel.alone import torch_alone
from uqff.parallel.decoder_step import head_norms
from uqff.parallel.layer import QuantizedLinear
from uqff.parallel.product import is_eager
from uqff.parallel.product_cpu import engine_task

if TYPE_CHECKING:
    from uqff.simd.chain import Task

__all__ = ["SHORT", "DecoderChain"]

SHORT: Final = 1 << 18
"""Numbers that the keys of a layer have at most for attention not to be worth a second thread: some 100 µs."""

F32 = npt.NDArray[np.float32]
Stages = list[list["Task"]]


class _UnfitError(Exception):
    """Not a public one: what a chain does not know."""


class _Linear(NamedTuple):
    """A layer that multiplies and does nothing else, and where what it takes for that is.

    Attributes:
        holder: the modules of the one that it belongs to.
        name: there.
        layer: itself.
        weight: its weight.
        addresses: of the weight's bytes.
        held: the bytes, which stay as long as this does.
        bias: its bias in float32; of no numbers if it has none.
        bias_buffers: its bias.
    """

    holder: dict[str, Any]
    name: str
    layer: Any
    weight: Any
    addresses: list[int]
    held: list[torch.Tensor]
    bias: F32
    bias_buffers: Any

    @classmethod
    def of(cls, module: Any, name: str) -> _Linear | None:
        """None if it is another layer, or does anything else."""
        layer = module._modules.get(name)
        if not isinstance(layer, QuantizedLinear):
            return None
        weight, bias = layer.weight_buffers, layer._plain_bias(torch.float32)
        if bias is not None and not bias.is_contiguous():
            return None
        numbers = np.empty(0, np.float32) if bias is None else bias.detach().numpy()
        made = cls(
            module._modules, name, layer, weight, weight.addresses(), weight.bytes(), numbers, layer.bias_buffers
        )
        return made if layer.comm.world_size == 1 and made.holds() else None

    def holds(self) -> bool:
        """Whether it still is as it was."""
        layer, here = self.layer, self.holder.get(self.name) is self.layer
        return (
            here
            and layer._arithmetic == "engine"
            and layer.lora is None
            and layer._stats is None
            and not layer.elsewhere
            and not layer._forward_hooks
            and not layer._forward_pre_hooks
            and layer._modules["weight_buffers"] is self.weight
            and layer.bias_buffers is self.bias_buffers
            and self.weight.addresses() == self.addresses
        )


class _Norm(NamedTuple):
    """A norm by the root of the mean square, as :data:`KNOWN` decoders have it."""

    holder: dict[str, Any]
    name: str
    norm: Any
    weight: F32
    eps: np.float32
    address: int
    lanes: int

    @classmethod
    def of(cls, module: Any, name: str) -> _Norm | None:
        """None if it is another norm, or torch does it in a way that is not known."""
        norm: Any = module._modules.get(name)
        if not type(norm).__name__.endswith("RMSNorm") or "forward" in vars(norm):
            return None
        weight, eps = norm.weight.detach(), getattr(norm, "variance_epsilon", None)
        if weight.dtype is not torch.float32 or not weight.is_contiguous() or eps is None:
            return None
        lanes, kept = _lanes(weight.numel()), (weight.numpy(), np.float32(eps), weight.data_ptr())
        return cls(module._modules, name, norm, *kept, lanes) if lanes else None

    def holds(self) -> bool:
        """Whether it still is as it was."""
        norm, here = self.norm, self.holder.get(self.name) is self.norm
        return (
            here
            and norm._parameters["weight"].data_ptr() == self.address
            and not norm._forward_hooks
            and not norm._forward_pre_hooks
        )

    def stage(self, x: F32, out: F32) -> list[Task]:
        """It on rows."""
        from uqff.simd import row
        from uqff.simd.chain import Task

        if x.shape[1] != len(self.weight):
            raise _UnfitError
        return [Task(row.norm, (x, self.weight, self.eps, self.lanes, out), len(x), len(x))]


class _ChainedLayer(NamedTuple):
    """A layer of a decoder."""

    attention: Any
    mlp: Any
    before: _Norm
    after: _Norm
    heads: tuple[_Norm, _Norm] | None
    q: _Linear
    k: _Linear
    v: _Linear
    o: _Linear
    gate: _Linear
    up: _Linear
    down: _Linear

    @classmethod
    def of(cls, layer: Any) -> _ChainedLayer | None:
        """None if it has anything that a chain does not know."""
        attention, mlp = layer.self_attn, layer.mlp
        gated = type(getattr(mlp, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
        if not gated or type(mlp).__name__ != type(layer).__name__.replace("DecoderLayer", "MLP"):
            return None
        norms = [_Norm.of(layer, name) for name in ("input_layernorm", "post_attention_layernorm")]
        if head_norms(attention) is not None:
            norms += [_Norm.of(attention, name) for name in ("q_norm", "k_norm")]
        linear = [_Linear.of(attention, f"{name}_proj") for name in "qkvo"]
        linear += [_Linear.of(mlp, f"{name}_proj") for name in ("gate", "up", "down")]
        if None in norms or None in linear:
            return None
        before, after, *heads = norms
        return cls(attention, mlp, before, after, tuple(heads) or None, *linear)  # type: ignore[arg-type]

    def parts(self) -> Iterator[_Linear | _Norm]:
        """All that may change."""
        yield from (self.before, self.after, *(self.heads or ()))
        yield from (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)


class DecoderChain:
    """Hidden states of a token to logits, or to what the head takes."""

    def __init__(
        self, layers: Sequence[_ChainedLayer], norm: _Norm, head: _Linear | None, cache: Any, angles: Any
    ) -> None:
        """See :meth:`of`.

        Raises:
            _UnfitError: a weight has no kernel for this.
        """
        self._layers, self._cache, self._rooms = layers, cache, [each.room() for each in cache]
        self._parts = [*(part for layer in layers for part in layer.parts()), norm, *([] if head is None else [head])]
        self._watched = [layer.mlp for layer in layers]
        keys = self._rooms[0][0]
        hidden, head_dim, inner = len(norm.weight), keys.shape[-1], layers[0].gate.weight.shape[0]
        q, k, v = (each.weight.shape[0] for each in layers[0][5:8])
        self._position = np.zeros(1, np.int64)
        self._angles = [each.numpy() for each in angles]
        self._total, self._normed, self._made = (_row(hidden) for _ in range(3))
        self._projected = [_row(each) for each in (q, k, v)]
        self._queries, self._attended = _row(q), _row(q)
        self._gates, self._ups, self._gated = (_row(inner) for _ in range(3))
        self.q = self._queries.view(1, 1, -1, head_dim).transpose(1, 2)
        self.logits = None if head is None else _row(head.weight.shape[0])
        self._key = keys.shape[1] * head_dim
        stages: list[Stages] = [[]]
        for layer, room in zip(layers, self._rooms, strict=True):
            stages[-1] += self._before(layer, *(each[0].numpy() for each in room))
            stages.append(self._after(layer))
        stages[-1].append(norm.stage(self._total.numpy(), self._normed.numpy()))
        if head is not None and self.logits is not None:
            stages[-1] += _products(self._normed, [(head, self.logits)])
        from uqff.simd.chain import Chain
        from uqff.simd.threads import num_threads

        self._chains = [Chain(each, num_threads()) for each in stages]

    @classmethod
    def of(cls, model: Any, cache: Any, angles: tuple[torch.Tensor, torch.Tensor]) -> DecoderChain | None:
        """The chains of a model; None if it has anything that they do not know.

        Args:
            model: whose layers are of known decoders, on a CPU.
            cache: the layers of one that has rooms, all of one shape.
            angles: cosines, and sines of which those of first halves have the other sign, ``[tokens, head]``.
        """
        keys, values = cache[0].room()
        if not simd.enabled() or keys.dtype is not torch.float32 or keys.shape != values.shape or len(keys) != 1:
            return None
        made = [_ChainedLayer.of(layer) for layer in model.model.layers]
        norm, head = _Norm.of(model.model, "norm"), _head(model)
        layers = [each for each in made if each is not None]
        if norm is None or len(layers) != len(made) or not _gates_alike():
            return None
        try:
            made_of = cls(layers, norm, head, cache, angles)
        except _UnfitError:
            return None
        if head is not None:
            made_of._watched.append(model.lm_head)
        return made_of

    def fits(self, x: torch.Tensor) -> bool:
        """Whether these are hidden states that nobody watches."""
        return x.dtype is torch.float32 and x.shape == (1, 1, self._total.shape[1]) and is_eager(x)

    def holds(self, begin: int) -> bool:
        """Whether everything is as it was, and so many tokens came before.

        Modules and their attributes are looked at, not numbers: those are read anew for each token, but for biases.
        """
        return (
            simd.enabled()
            and all(part.holds() for part in self._parts)
            and not any(each._forward_hooks or each._forward_pre_hooks for each in self._watched)
            and all(
                each.room() is room
                and each.get_seq_length() == begin
                and each.keys.data_ptr() == room[0].data_ptr()
                and each.values.data_ptr() == room[1].data_ptr()
                for each, room in zip(self._cache, self._rooms, strict=True)
            )
        )

    def __call__(self, x: torch.Tensor, begin: int, attend: Callable[..., Any]) -> torch.Tensor:
        """What the head makes of a token, or what it takes: the next call overwrites it.

        Args:
            x: float32 ``[1, 1, hidden]``.
            begin: how many tokens came before.
            attend: attention of ``transformers``.
        """
        from uqff.simd.threads import num_threads

        threads, end = num_threads(), begin + 1
        self._total.copy_(x.view(1, -1))
        self._position[0] = begin
        with torch_alone() if self._key * end <= SHORT else nullcontext():
            self._chains[0](threads)
            for layer, cached, chain in zip(self._layers, self._cache, self._chains[1:], strict=True):
                keys, values = cached.extended(end)
                attention = layer.attention
                attended = attend(attention, self.q, keys, values, None, dropout=0.0, scaling=attention.scaling)[0]
                self._attended.copy_(attended.reshape(1, -1))
                chain(threads)
        return (self._normed if self.logits is None else self.logits).view(1, 1, -1)

    def _before(self, layer: _ChainedLayer, keys: F32, values: F32) -> Stages:
        """From the sum so far to queries, and keys and values in the cache."""
        from uqff.simd import row
        from uqff.simd.chain import Task

        stages = [layer.before.stage(self._total.numpy(), self._normed.numpy())]
        stages += _products(self._normed, list(zip((layer.q, layer.k, layer.v), self._projected, strict=True)))
        n = keys.shape[-1]
        q, k, v = (each.view(-1, n).numpy() for each in self._projected)
        if layer.heads is not None:
            stages += [norm.stage(each, each) for norm, each in zip(layer.heads, (q, k), strict=True)]
        cos, sin = self._angles
        queries = self._queries.view(-1, 1, n).numpy()
        stages.append([Task(row.rotate, (q, cos, sin, self._position, queries, False), len(q), len(q))])
        stages.append([Task(row.rotate, (k, cos, sin, self._position, keys, True), len(k), len(k))])
        stages.append([Task(row.keep, (v, self._position, values), len(v), len(v))])
        return stages

    def _after(self, layer: _ChainedLayer) -> Stages:
        """From what attention gives to the sum."""
        from uqff.simd import row
        from uqff.simd.chain import Task

        total, made, normed = (each.numpy() for each in (self._total, self._made, self._normed))
        gates, ups, gated = (each[0].numpy() for each in (self._gates, self._ups, self._gated))
        n, blocks = total.shape[1], len(gated) // row.GATED
        if len(gated) % row.GATED:
            raise _UnfitError
        stages = _products(self._attended, [(layer.o, self._made)], biased=False)
        stages.append([Task(row.add, (total[0], made[0], layer.o.bias), n, n)])
        stages.append(layer.after.stage(total, normed))
        stages += _products(self._normed, [(layer.gate, self._gates), (layer.up, self._ups)])
        stages.append([Task(row.gate, (gates, ups, gated), blocks, blocks)])
        stages += _products(self._gated, [(layer.down, self._made)], biased=False)
        stages.append([Task(row.add, (total[0], made[0], layer.down.bias), n, n)])
        return stages


def _row(n: int) -> torch.Tensor:
    """Room for a row; torch's memory begins on a cache line, as that of what it computes by itself."""
    with torch.inference_mode(False):  # to be written to from now on, wherever
        return torch.zeros(1, n)


def _products(x: torch.Tensor, layers: Sequence[tuple[_Linear, torch.Tensor]], *, biased: bool = True) -> Stages:
    """The products of a row with some layers: it is laid out once, and threads take all of them."""
    from uqff.simd import row
    from uqff.simd.chain import Task

    laid: dict[Hashable, Task] = {}
    tasks = [engine_task(layer.weight, x.numpy(), y.numpy(), laid) for layer, y in layers]
    stages = [[each] for each in laid.values()]
    stages.append([each for each in tasks if each is not None])
    if len(stages[-1]) != len(layers):
        raise _UnfitError
    for layer, y in layers:
        if biased and len(layer.bias):
            n = len(layer.bias)
            stages.append([Task(row.biased, (y[0].numpy(), layer.bias), n, n)])
    return stages


def _head(model: Any) -> _Linear | None:
    """The head, if it is a layer by itself, or one of rows."""
    head = model._modules.get("lm_head")
    if isinstance(head, torch.nn.Module) and type(head).__name__ == "Head":
        return _Linear.of(head, "rows")
    return _Linear.of(model, "lm_head")


@cache
def _lanes(n: int) -> int:
    """How many lanes the vectors have that torch adds up a row of so many numbers with; 0 if it is not known."""
    from uqff.simd import row

    generator = torch.Generator().manual_seed(n)
    x = torch.randn(1, 1, 64, n, generator=generator) * torch.logspace(-3, 3, 64)[:, None]
    weight = torch.randn(n, generator=generator)
    expected = weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
    for lanes in row.VECTORS:
        made = torch.empty(64, n)
        row.norm((x.view(64, n).numpy(), weight.numpy(), np.float32(1e-6), lanes, made.numpy()), 64, grain=64)
        if torch.equal(made.view(torch.int32), expected.view(64, n).view(torch.int32)):
            return lanes
    return 0


@cache
def _gates_alike() -> bool:
    """Whether torch's gate is that of :mod:`uqff.simd.row` in every bit."""
    from uqff.simd import row

    generator, n = torch.Generator().manual_seed(0), 1 << 14
    for x in (torch.linspace(-130, 130, n), torch.randn(n, generator=generator) * 4):
        ups, made = torch.randn(n, generator=generator), torch.empty(n)
        blocks = n // row.GATED
        row.gate((x.numpy(), ups.numpy(), made.numpy()), blocks, grain=blocks)
        if not torch.equal(made.view(torch.int32), (torch.nn.functional.silu(x) * ups).view(torch.int32)):
            return False
    return True
