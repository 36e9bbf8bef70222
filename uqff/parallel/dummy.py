"""A layer without a weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from uqff.errors import FormatError

if TYPE_CHECKING:
    from uqff.parallel.stats import InputStats
    from uqff.quantization.types import EffortName, Engine, Fallback

__all__ = ["DummyLayer"]


class DummyLayer(torch.nn.Module):
    """Stands for a weight that is absent while a model is built; to be replaced before the first forward.

    Example:
        >>> layer = uqff.parallel.ReplicatedLayer.new(None, key="model.layers.0.mlp.up_proj")
        >>> layer.name
        'dummy'
        >>> layer.serialize()
        Traceback (most recent call last):
        uqff.errors.FormatError: layer has no weight: no file that was loaded had one (layer model.layers.0.mlp.up_proj)
    """

    name = "dummy"

    def __init__(self, key: str | None = None) -> None:
        super().__init__()
        self.key = key

    def _absent(self) -> FormatError:
        return FormatError("layer has no weight: no file that was loaded had one", layer=self.key)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """An error, always.

        Raises:
            FormatError: naming the layer.
        """
        raise self._absent()

    forward_autocast = forward

    def dequantize_w(self) -> torch.Tensor:
        """An error, always."""
        raise self._absent()

    def add_delta_w(self, delta: torch.Tensor) -> DummyLayer:
        """An error, always."""
        raise self._absent()

    def begin_track_stats(self, *, products: bool = False) -> None:
        """An error, always."""
        raise self._absent()

    def take_stats(self) -> InputStats:
        """An error, always."""
        raise self._absent()

    def end_track_stats(self) -> torch.Tensor:
        """An error, always."""
        raise self._absent()

    def serialize(self) -> bytes:
        """An error, always."""
        raise self._absent()

    def apply_isq(
        self,
        kind: str | int | None,
        device: torch.device | str | None = None,
        *,
        imatrix_weight: Sequence[float] | torch.Tensor | None = None,
        effort: EffortName = "engine",
        engine: Engine = "0.8",
        engine_biases: bool = False,
        on_fallback: Callable[[Fallback], None] | None = None,
    ) -> DummyLayer:
        """Itself: there is nothing to quantise yet."""
        return self

    def unquant_weight_bias(self) -> None:
        """None: there is no weight."""
        return

    def dtype_and_device(self) -> tuple[torch.dtype, torch.device]:
        """float32 on the CPU, as the engine has it."""
        return torch.float32, torch.device("cpu")

    def quantized_act_type(self) -> None:
        """None: any activations."""
        return

    def is_distributed(self) -> None:
        """None: it is nowhere."""
        return

    def isq_serde_supported(self) -> bool:
        """Whether it can be written: no."""
        return False
