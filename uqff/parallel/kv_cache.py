"""Keys and values of earlier tokens in memory that is taken once: transformers' own cache copies all for every token.

The models are given views of what is filled, so nothing else changes: neither masks nor numbers.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch

__all__ = ["preallocated"]


def preallocated(model: torch.nn.Module, tokens: int) -> Any:
    """A cache for so many tokens, prompt included.

    Layers that see a window of tokens only keep what transformers has for them.

    Args:
        model: of ``transformers``.
        tokens: that it has room for; more come in, too, but are copied as ever.

    Returns:
        A ``DynamicCache``; None where ``transformers`` has none that is made of layers (before 4.56): the model then
        makes its own.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        return None
    from transformers import cache_utils

    plain: Any = getattr(cache_utils, "DynamicLayer", None)
    if plain is None or "config" not in inspect.signature(cache_utils.DynamicCache.__init__).parameters:
        return None
    made = cache_utils.DynamicCache(config=config)
    layers = getattr(made, "layers", None)
    if not layers:
        return None
    layer = _preallocated_layer(plain)
    made.layers = [layer(tokens) if type(each) is plain else each for each in layers]
    return made


@cache
def _preallocated_layer(plain: Any) -> Any:
    """The layer of a cache that ``transformers`` has, but for where it keeps tokens."""

    class Preallocated(plain):  # type: ignore[misc]
        def __init__(self, tokens: int) -> None:
            super().__init__()
            self.keys: Any
            self.values: Any
            self._tokens = tokens
            self._room: tuple[torch.Tensor, torch.Tensor] | None = None

        def room(self) -> tuple[torch.Tensor, torch.Tensor] | None:
            """Where keys and values of all tokens have their places, if they still have."""
            return self._room

        def extended(self, end: int) -> tuple[torch.Tensor, torch.Tensor]:
            """:meth:`update` by what has been written to the places of tokens before ``end``."""
            assert self._room is not None
            keys, values = self._room
            self.keys, self.values = keys[..., :end, :], values[..., :end, :]
            return self.keys, self.values

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            begin = self.get_seq_length()
            end = begin + key_states.shape[-2]
            if begin and self._room is not None and self.keys.data_ptr() != self._room[0].data_ptr():
                self._room = None  # somebody has put other tensors there
            if begin == 0:
                size = max(self._tokens, end)
                self._room = _room_for(key_states, size), _room_for(value_states, size)
                if not getattr(self, "is_initialized", True):
                    _initialised(self, key_states, value_states)
            if self._room is None or end > self._room[0].shape[-2]:
                self._room = None
                made: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
                return made
            keys, values = self._room
            keys[..., begin:end, :] = key_states
            values[..., begin:end, :] = value_states
            return self.extended(end)

    return Preallocated


def _room_for(states: torch.Tensor, tokens: int) -> torch.Tensor:
    return states.new_empty((*states.shape[:-2], tokens, states.shape[-1]))


def _initialised(layer: Any, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
    """As transformers does when the first tokens come: its releases differ in what they ask for."""
    wanted = len(inspect.signature(layer.lazy_initialization).parameters)
    layer.lazy_initialization(*(key_states, value_states)[:wanted])
