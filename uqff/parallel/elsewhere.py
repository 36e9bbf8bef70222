"""Layers on another device than their model: activations go to the weights, and what comes of them comes back.

A rule of a recipe may name a device for the layers that it selects.  Attention itself, norms, routers and the cache of
keys and values stay on the model's device.

Authority: mistral.rs v0.8.0, ``mistralrs-quant/src/utils/isq.rs`` (``apply_immediate_isq``), which puts the
layer there; activations it moves by decoder layers only (``mistralrs-core/src/device_map.rs``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from uqff.errors import UnsupportedError

if TYPE_CHECKING:
    from uqff.parallel.comm import Comm

__all__ = ["Elsewhere", "place_of"]


class Elsewhere(torch.nn.Module):
    """A module that may be on another device than what it is called with.

    Attributes:
        elsewhere: whether it is; what it is called with must be on its device if not.
    """

    elsewhere: bool = False

    def _device(self) -> torch.device:
        """Where the module is."""
        return next(self.buffers()).device

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """What ``forward`` does; on the device of ``x``, wherever the module is, if it is elsewhere."""
        if not self.elsewhere:
            return super().__call__(x, *args, **kwargs)
        there = self._device()
        return super().__call__(x.to(there), *(each.to(there) for each in args), **kwargs).to(x.device)


def place_of(asked: torch.device | None, model: torch.device, comm: Comm, layer: str | None = None) -> torch.device:
    """Where a layer goes.

    Args:
        asked: by a rule; None if it asks for nothing.
        model: where the model is.
        comm: the ranks.
        layer: for errors.

    Raises:
        UnsupportedError: there is no such device here; or another than the model's, on several ranks, which exchange
            what is on the device of each.
    """
    if asked is None or asked in (model, torch.device(model.type)):
        return model
    if comm.world_size > 1:
        problem = "layer on another device than the model, on several ranks"
        raise UnsupportedError(problem, layer=layer, field="device", expected=model, got=asked)
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = counts.get(asked.type, 0)
    if (asked.index or 0) >= count:
        expected = ", ".join(f"{kind} ({each})" if kind != "cpu" else kind for kind, each in counts.items() if each)
        raise UnsupportedError("no such device here", layer=layer, field="device", expected=expected, got=asked)
    return asked
