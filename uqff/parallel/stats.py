"""What goes into a layer while a model is calibrated: the mean square of each input, for importance matrices.

Authority: mistral.rs v0.8.0, ``mistralrs-quant/src/imatrix.rs`` (``ImatrixLayerStats``).
"""

from __future__ import annotations

import torch

__all__ = ["InputStats"]


class InputStats:
    """Sums of squares of the inputs of one layer."""

    def __init__(self, inputs: int, device: torch.device) -> None:
        self.calls = 0
        self.inputs = inputs
        self.squares = torch.zeros(inputs, dtype=torch.float32, device=device)

    def process(self, x: torch.Tensor) -> None:
        """Take in activations ``[..., inputs]``."""
        rows = x.detach().reshape(-1, self.inputs).to(torch.float32)
        self.squares = self.squares.to(rows.device)  # a layer may have moved since
        self.squares += rows.square().sum(0)
        self.calls += 1

    def imatrix(self) -> torch.Tensor:
        """Importance of each input, float32 ``[inputs]``.

        The engine divides by the length of a row for every call, not by the number of rows, and multiplies with the
        calls again: sum of squares / inputs. A common factor does not matter to a quantiser; the engine's is kept.
        """
        if not self.calls:
            return self.squares.clone()
        return self.squares / (self.calls * self.inputs) * self.calls
