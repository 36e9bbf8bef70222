"""The two arithmetics of products, and which of them a layer has.

``exact``
    Weights as dequantised, activations as they are; sums are float32.
``engine``
    As mistral.rs multiplies on a CPU. Of ggml types, it rounds activations to eight bits, and multiplies codes with
    codes; of other families, and of stacked experts, it multiplies plain numbers, which is the same as ``exact``. So it
    is on other devices than CPUs.

Gradients are those of the exact product in either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from uqff.errors import UnsupportedError

if TYPE_CHECKING:
    from uqff.parallel.weight import WeightBuffers

__all__ = ["Arithmetic", "ChoosesArithmetic", "check_arithmetic", "set_arithmetic"]

Arithmetic: TypeAlias = Literal["exact", "engine"]


def check_arithmetic(arithmetic: str, layer: str | None = None) -> Arithmetic:
    """The arithmetic that a text names.

    Raises:
        UnsupportedError: there is no such one.
    """
    if arithmetic not in ("exact", "engine"):
        raise UnsupportedError("no such arithmetic", layer=layer, expected="exact or engine", got=arithmetic)
    return "engine" if arithmetic == "engine" else "exact"


class ChoosesArithmetic:
    """A layer that multiplies in one arithmetic or another."""

    key: str | None
    weight_buffers: WeightBuffers
    _arithmetic: Arithmetic = "exact"

    @property
    def arithmetic(self) -> Arithmetic:
        """``exact`` or ``engine``; to set it to anything else raises an UnsupportedError."""
        return self._arithmetic

    @arithmetic.setter
    def arithmetic(self, arithmetic: Arithmetic) -> None:
        self._arithmetic = check_arithmetic(arithmetic, self.key)

    def quantized_act_type(self) -> torch.dtype | str | None:
        """What activations become: the dtype that the family asks for; None if it takes any.

        With the arithmetic of the engine, the ISQ name of the ggml type that they are quantised to (``q8_0``, ``q8_1``,
        ``q8k``), where they are.
        """
        quantised = self.weight_buffers._meta.engine_activations if self._arithmetic == "engine" else None
        return self._activation_dtype() if quantised is None else quantised

    def _activation_dtype(self) -> torch.dtype | None:
        """The dtype that ``forward_autocast`` casts activations to."""
        dtype = self.weight_buffers._meta.act_dtype
        return None if dtype is None else dtype.torch


def set_arithmetic(model: torch.nn.Module, arithmetic: Arithmetic) -> None:
    """Choose the arithmetic of every layer of a model.

    Raises:
        UnsupportedError: there is no such one.

    Example:
        >>> import torch
        >>> layer = uqff.parallel.ReplicatedLayer(uqff.quantize(torch.ones(32, 32), "q4_0"))
        >>> uqff.parallel.set_arithmetic(layer, "engine")
        >>> layer.quantized_act_type()
        'q8_0'
    """
    check_arithmetic(arithmetic)
    for module in model.modules():
        if isinstance(module, ChoosesArithmetic):
            module.arithmetic = arithmetic
