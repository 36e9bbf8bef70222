"""One token through a decoder as a few launches: what ``transformers`` does with one row, in fewer operations.

For every token, ``transformers`` makes some forty small operations a layer of norms, rotary embedding, cache, attention
and gates. Here it is five, beside the products, of which queries, keys and values are one, as are gates and ups, if
their weights can lie one behind the other (:mod:`uqff.parallel.joined`). The prompt goes through ``transformers``.

Only decoders whose formulas are known are taken: Llama's, and those that differ from it by biases, norms of heads, or
another feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import torch

from uqff.gpu import kernels, token
from uqff.parallel.joined import Joined
from uqff.parallel.linear import RowParallelLayer

__all__ = ["ANGLES", "DecoderStep", "Operations", "angles", "head_norms", "known_layers"]

KNOWN: Final = ("Llama", "Mistral", "Qwen2", "Qwen3", "Qwen3Moe")
"""Names of the decoders in ``transformers``, ``...DecoderLayer``."""

ANGLES: Final = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angles are those of a position, however many tokens there are."""


class Operations(Protocol):
    """What is done beside products: :mod:`uqff.gpu.token`, or the same for tests."""

    @property
    def add_norm(self) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        """The sum of two rows, and its norm."""

    @property
    def gate(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """``SiLU(gates) · ups``."""

    @property
    def Attention(self) -> Callable[..., Callable[..., torch.Tensor]]:
        """Attention over a cache."""


class DecoderStep:
    """Hidden states of a token to logits, through a model whose cache holds what came before."""

    def __init__(self, model: Any, cache: Any, operations: Operations) -> None:
        """What stays the same from token to token.

        Args:
            model: that :meth:`of` has looked at.
            cache: likewise.
            operations: what is done beside products.
        """
        base = model.model
        self._layers = [_Layer(layer) for layer in base.layers]
        self._norm, self._head, self._operations = base.norm, model.lm_head, operations
        self._cache = [(layer.keys, layer.values) for layer in cache.layers]
        keys = self._cache[0][0]
        attention = self._layers[0].attention
        heads = keys.shape[1] * attention.num_key_value_groups
        cos, sin = angles(base.rotary_emb, keys)
        self._attend = operations.Attention(heads, attention.head_dim, keys, cos, sin)
        # Of transformers' own counters there is one a layer.
        self.position = torch.as_tensor(cache.layers[0].cumulative_length).to(keys.device).view(1).clone()

    @classmethod
    def of(cls, model: Any, cache: Any, operations: Operations = token) -> DecoderStep | None:
        """The step of a model; None if it is another model, or there are no kernels.

        Args:
            model: of :func:`~uqff.parallel.load_model`, or of ``transformers``.
            cache: a ``StaticCache`` with the keys and values of the prompt.
            operations: what is done beside products.
        """
        layers = known_layers(model)
        if not layers:
            return None
        keys, attention = cache.layers[0].keys, layers[0].self_attn
        head, groups = attention.head_dim, attention.num_key_value_groups
        rotary, dtype = model.model.rotary_emb, keys.dtype
        hidden = model.model.norm.weight.shape[0]
        fits = (
            token.fits_norm(hidden)
            and token.fits_attention(keys.shape[1] * groups, keys.shape[1], head)
            and rotary.rope_type in ANGLES
            and all(each.keys.shape == each.values.shape == keys.shape for each in cache.layers)
            and all(parameter.dtype is dtype for parameter in model.model.norm.parameters())
            and (operations is not token or kernels.available(keys.device))
        )
        if not fits or angles(rotary, keys)[0].shape[-1] != head:
            return None
        return cls(model, cache, operations)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[1, 1, hidden]`` of a token to logits ``[1, 1, vocabulary]``; the cache has it then."""
        operations, position = self._operations, self.position
        total, normed = _norm(operations, x.contiguous(), None, self._layers[0].before)
        for i, (layer, cached) in enumerate(zip(self._layers, self._cache, strict=True)):
            q, k, v = layer.queries(normed)
            attention = layer.attention
            attended = self._attend(q, k, v, *cached, position, layer.norms, attention.scaling, layer.eps)
            total, normed = _norm_of(operations, total, attention.o_proj, attended, layer.after)
            following = self._layers[i + 1].before if i + 1 < len(self._layers) else self._norm
            if layer.gates is None:
                total, normed = _norm(operations, total, layer.mlp(normed), following)
            else:
                gated = operations.gate(*layer.gates(normed))
                total, normed = _norm_of(operations, total, layer.mlp.down_proj, gated, following)
        position.add_(1)
        logits: torch.Tensor = self._head(normed)
        return logits


def _norm(
    operations: Operations, x: torch.Tensor, y: torch.Tensor | None, norm: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return operations.add_norm(x, y if y is None else y.contiguous(), norm.weight, norm.variance_epsilon)


def _norm_of(
    operations: Operations, total: torch.Tensor, layer: Any, x: torch.Tensor, norm: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the sum with what a layer makes; while ranks are recorded, theirs are added up by the kernel that does it."""
    if isinstance(layer, RowParallelLayer) and layer.comm.recording and layer.bias is None:
        return layer.comm.sum_add_norm(total, layer.forward_partial(x), norm.weight, norm.variance_epsilon)
    return _norm(operations, total, layer(x), norm)


def known_layers(model: Any) -> Sequence[Any]:
    """The layers of a model's decoder, if a step knows them all; none else."""
    layers: Sequence[Any] = getattr(getattr(model, "model", None), "layers", ())
    names = {f"{name}DecoderLayer" for name in KNOWN}
    return layers if all(type(each).__name__ in names for each in layers) else ()


def head_norms(attention: Any) -> tuple[Any, Any] | None:
    """The norms of queries and of keys; None if there are none."""
    norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return None if norms[0] is None or norms[1] is None else norms


def angles(rotary: Any, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of all positions that a cache has room for, ``[tokens, head]``."""
    positions = torch.arange(keys.shape[2], device=keys.device)[None]
    cos, sin = rotary(keys[:, :1, :1, 0], positions)
    return cos[0].contiguous(), sin[0].contiguous()


class _Layer:
    """A layer of a decoder, as a step needs it."""

    def __init__(self, layer: Any) -> None:
        self.attention, self.mlp = layer.self_attn, layer.mlp
        self.before, self.after = layer.input_layernorm, layer.post_attention_layernorm
        attention: Any = layer.self_attn
        self.queries = Joined.of(attention.q_proj, attention.k_proj, attention.v_proj)
        norms = head_norms(attention)
        self.norms = None if norms is None else (norms[0].weight, norms[1].weight)
        self.eps: float = 0.0 if norms is None else norms[0].variance_epsilon
        gated = hasattr(layer.mlp, "gate_proj") and type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation")
        self.gates = Joined.of(layer.mlp.gate_proj, layer.mlp.up_proj) if gated else None
