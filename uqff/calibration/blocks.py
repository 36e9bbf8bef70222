"""A model of ``transformers`` run block by block: all windows of a text through one block, then through the next.

So each block's weights, which are views of mapped files, are read once, and only those of one block are needed at a
time: a model may be larger than memory.  What is kept between blocks are the hidden states of all tokens.

What a block is called with besides hidden states (mask, positions) is the same for all windows, as they are of the same
length; it is taken down in one pass of the whole model over the first of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

__all__ = ["Blocks"]


class _ReachedError(Exception):
    """The first block was reached."""


class Blocks:
    """The blocks of a model, and the hidden states of windows before the block that is next.

    Attributes:
        count: how many blocks.
    """

    def __init__(self, model: Any) -> None:
        """Of a model of :func:`uqff.load_model`."""
        self._model = model
        self._layers = list(self._model.model.layers)
        self.count = len(self._layers)
        self._calls: list[dict[str, Any]] = []
        self._hidden: list[torch.Tensor] = []
        self._behind: list[torch.nn.Module] = []

    @torch.inference_mode()
    def begin(self, windows: Sequence[Sequence[int]]) -> None:
        """Take the hidden states in front of the first block.

        Args:
            windows: token ids, all of the same number.
        """
        device = next(self._model.parameters()).device
        ids = [torch.tensor([list(window)], device=device) for window in windows]
        handles = [layer.register_forward_pre_hook(self._record, with_kwargs=True) for layer in self._layers]
        handles += [each.register_forward_pre_hook(self._pass) for each in self._model.model.children()]
        try:
            self._model.model(input_ids=ids[0], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        handle = self._layers[0].register_forward_pre_hook(self._reach, with_kwargs=True)
        try:
            for each in ids:
                try:
                    self._model.model(input_ids=each, use_cache=False)
                except _ReachedError:
                    continue
        finally:
            handle.remove()

    def _record(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.append({name: value for name, value in kwargs.items() if name != "hidden_states"})

    def _pass(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """What is called behind the last block, the norm in front of the head, has another name in each model."""
        if len(self._calls) == self.count:
            self._behind.append(module)

    def _reach(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._hidden.append(args[0] if args else kwargs["hidden_states"])
        raise _ReachedError

    @torch.inference_mode()
    def run(self, block: int) -> Iterator[int]:
        """Put all windows through a block, in order of blocks; gives the number of each window when it is through."""
        layer, call = self._layers[block], self._calls[block]
        for at, hidden in enumerate(self._hidden):
            made = layer(hidden, **call)
            self._hidden[at] = made[0] if isinstance(made, tuple) else made
            yield at

    @torch.inference_mode()
    def heads(self) -> Iterator[torch.Tensor]:
        """What goes into the head, of each window: hidden states behind the last block, normed."""
        for hidden in self._hidden:
            for module in self._behind:
                hidden = module(hidden)
            yield hidden
