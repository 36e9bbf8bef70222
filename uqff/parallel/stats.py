"""What goes into a layer while a model is calibrated: squares of each input, for importance matrices, and products.

Authority: mistral.rs v0.8.0, ``mistralrs-quant/src/imatrix.rs`` (``ImatrixLayerStats``).
"""

from __future__ import annotations

from typing import Generic, TypeVar

import torch

from uqff.errors import UnsupportedError

__all__ = ["InputStats", "TracksInputs"]


class InputStats:
    """Sums of squares of the inputs of one layer, and if asked for of products of any two of them.

    Attributes:
        calls: how many forward passes.
        rows: how many tokens.
        inputs: of the layer.
        squares: their sums, float32 ``[inputs]``.
        products: XᵀX, float32 ``[inputs, inputs]``; None if not asked for.
    """

    def __init__(self, inputs: int, device: torch.device, *, products: bool = False) -> None:
        """Nothing has been seen yet."""
        self.calls = self.rows = 0
        self.inputs = inputs
        self.squares = torch.zeros(inputs, dtype=torch.float32, device=device)
        self.products = torch.zeros(inputs, inputs, dtype=torch.float32, device=device) if products else None

    def process(self, x: torch.Tensor) -> None:
        """Take in activations ``[..., inputs]``."""
        rows = x.detach().reshape(-1, self.inputs).to(torch.float32)
        self.squares = self.squares.to(rows.device)  # a layer may have moved since
        self.squares += rows.square().sum(0)
        if self.products is not None:
            self.products = self.products.to(rows.device)
            self.products += rows.T @ rows
        self.calls += 1
        self.rows += len(rows)

    def imatrix(self) -> torch.Tensor:
        """Importance of each input, float32 ``[inputs]``.

        The engine divides by the length of a row for every call, not by the number of rows, and multiplies with the
        calls again: sum of squares / inputs. A common factor does not matter to a quantiser; the engine's is kept.
        """
        if not self.calls:
            return self.squares.clone()
        return self.squares / (self.calls * self.inputs) * self.calls


Seen = TypeVar("Seen", InputStats, list[InputStats])


class TracksInputs(Generic[Seen]):
    """A layer, or one for each expert, whose inputs can be watched, once :meth:`begin_track_stats` was called.

    Attributes:
        key: name of the layer, for errors.
    """

    key: str | None
    _stats: Seen | None

    def take_stats(self) -> Seen:
        """Stop watching; what was seen of the inputs that this rank holds.

        Raises:
            UnsupportedError: :meth:`begin_track_stats` was not called.
        """
        if self._stats is None:
            raise UnsupportedError("layer does not track stats", layer=self.key, expected="begin_track_stats first")
        stats, self._stats = self._stats, None
        return stats
