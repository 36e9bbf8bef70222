"""One token through a decoder on a CPU: the operations of ``transformers``, and nothing around them.

What ``transformers`` does for every token beside them (masks, positions, modules in modules, a rotary embedding that is
the same as that of the token before but for one row) takes several times as long as they do, with one row.  The numbers
are the same, bit for bit; those of attention with one thread of torch, where it is short and products are ours
(:mod:`uqff.parallel.alone`).  The prompt goes through ``transformers``.

Where all layers multiply in the arithmetic of the engine, what lies between attentions is one call:
:mod:`uqff.parallel.decoder_chain`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from uqff import simd
from uqff.parallel.alone import torch_alone
from uqff.parallel.decoder_chain import SHORT, DecoderChain
from uqff.parallel.decoder_step import ANGLES, angles, head_norms, known_layers

__all__ = ["DecoderStepCpu"]


class DecoderStepCpu:
    """Hidden states of a token to logits, through a model whose cache holds what came before, and then this one too."""

    def __init__(self, model: Any, cache: Any, attend: Any) -> None:
        """What stays the same from token to token.

        Args:
            model: that :meth:`of` has looked at.
            cache: likewise.
            attend: its attention, as ``transformers`` has it.
        """
        base = model.model
        self._layers = [_Weights.of(layer) for layer in base.layers]
        self._norm, self._head, self._attend, self._cache = base.norm, model.lm_head, attend, cache.layers
        keys, _ = self._cache[0].room()
        cos, sin = angles(base.rotary_emb, keys)
        half = cos.shape[-1] // 2
        # Of a rotated half the sign is changed: that of its sine instead.
        self._cos, self._sin = cos, torch.cat([-sin[:, :half], sin[:, half:]], -1)
        self._half = half
        self._chain = DecoderChain.of(model, self._cache, (self._cos, self._sin))

    @classmethod
    def of(cls, model: Any, cache: Any) -> DecoderStepCpu | None:
        """The step of a model; None if it is another model or cache, or somebody watches what goes through its modules.

        Args:
            model: of :func:`~uqff.parallel.load_model`, on a CPU.
            cache: of :func:`~uqff.parallel.kv_cache.preallocated`, with the keys and values of the prompt.
        """
        layers = known_layers(model)
        if not layers:
            return None
        rooms: list[Any] = [getattr(each, "room", lambda: None)() for each in getattr(cache, "layers", ())]
        if len(rooms) != len(layers) or any(room is None or room[0].shape != rooms[0][0].shape for room in rooms):
            return None
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attend = dict(ALL_ATTENTION_FUNCTIONS.items()).get(getattr(model.config, "_attn_implementation", None))
        keys, rotary, attention = rooms[0][0], model.model.rotary_emb, layers[0].self_attn
        fits = (
            attend is not None
            and not model.training
            and keys.device.type == "cpu"
            and rotary.rope_type in ANGLES
            and all(parameter.dtype is keys.dtype for parameter in model.model.norm.parameters())
            and not any(_is_watched(module) for module in model.modules())
        )
        if not fits or angles(rotary, keys)[0].shape[-1] != attention.head_dim:
            return None
        return cls(model, cache, attend)

    def __call__(self, x: torch.Tensor) -> torch.Tensor | None:
        """Hidden states ``[1, 1, hidden]`` of a token to logits ``[1, 1, vocabulary]``; None if the cache is full."""
        begin = self._cache[0].get_seq_length()
        if begin >= len(self._cos):
            return None
        chain = self._chain
        if chain is not None and chain.fits(x) and chain.holds(begin):
            made = chain(x, begin, self._attend)
            return made if chain.logits is not None else self._head(made)
        cos, sin, half, total = self._cos[begin], self._sin[begin], self._half, x
        for layer, cached in zip(self._layers, self._cache, strict=True):
            attention, normed = layer.attention, layer.before(total)
            shape = (1, 1, -1, attention.head_dim)
            q, k = attention.q_proj(normed).view(shape), attention.k_proj(normed).view(shape)
            v = attention.v_proj(normed).view(shape).transpose(1, 2)
            if layer.norms is not None:
                q, k = layer.norms[0](q), layer.norms[1](k)
            q = (q * cos + q.roll(half, -1) * sin).transpose(1, 2)
            k = (k * cos + k.roll(half, -1) * sin).transpose(1, 2)
            keys, values = cached.update(k, v)
            with torch_alone() if layer.ours and keys.numel() <= SHORT else nullcontext():
                attended = self._attend(attention, q, keys, values, None, dropout=0.0, scaling=attention.scaling)[0]
            total = total + attention.o_proj(attended.reshape(1, 1, -1))
            made = layer.mlp(layer.after(total))
            total = total + (made[0] if isinstance(made, tuple) else made)  # older mixtures give the router's, too
        logits: torch.Tensor = self._head(self._norm(total))
        return logits


class _Weights(NamedTuple):
    """A layer of a decoder, as a step needs it."""

    attention: Any
    mlp: Any
    before: Any
    after: Any
    norms: tuple[Any, Any] | None
    ours: bool
    """Whether threads of our kernels multiply, and not torch's."""

    @classmethod
    def of(cls, layer: Any) -> _Weights:
        attention = layer.self_attn
        norms = layer.input_layernorm, layer.post_attention_layernorm
        weight = getattr(attention.q_proj, "weight_buffers", None)
        ours = weight is not None and weight.numbers is None and simd.enabled()
        return cls(attention, layer.mlp, *norms, head_norms(attention), ours)


def _is_watched(module: torch.nn.Module) -> bool:
    """Whether a module has hooks, or is on another device."""
    return bool(module._forward_hooks or module._forward_pre_hooks or getattr(module, "elsewhere", False))
