"""Tensors go to a CUDA device through two pinned buffers: one is filled by all threads while the other is sent.

What is sent from pageable memory, as a mapped file is, the driver first copies into a buffer of its own, by one thread.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import torch

__all__ = ["Upload", "upload_to"]

PIECE: Final = 32 << 20
"""Bytes of each of the two buffers: a piece takes a millisecond, against which a wait is nothing."""

SMALL: Final = 1 << 16
"""Bytes up to which a tensor is sent as it is."""


class Upload:
    """Sends tensors to a device; one thread at a time.

    Attributes:
        device: where they go.
    """

    def __init__(self, device: torch.device, piece: int = PIECE) -> None:
        """Two buffers.

        Args:
            device: where tensors go.
            piece: bytes of a buffer.
        """
        self.device = device
        pinned = device.type == "cuda"
        self._buffers = [torch.empty(piece, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._sent: list[Any] = [torch.cuda.Event() if pinned else None for _ in range(2)]  # type: ignore[no-untyped-call]

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor there.

        The current stream of the device has what it needs to wait for; the tensor may be freed or changed at once.
        """
        if tensor.device.type != "cpu" or tensor.nbytes <= SMALL:
            return tensor.to(self.device)
        given = tensor.detach().contiguous().view(-1).view(torch.uint8)
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        there = made.view(-1).view(torch.uint8)
        size = self._buffers[0].numel()
        for i, start in enumerate(range(0, given.numel(), size)):
            buffer, sent = self._buffers[i % 2], self._sent[i % 2]
            if sent is not None:
                sent.synchronize()  # an event that was never recorded is over
            piece = buffer[: min(size, given.numel() - start)]
            piece.copy_(given[start : start + size])
            there[start : start + size].copy_(piece, non_blocking=True)
            if sent is not None:
                sent.record(torch.cuda.current_stream(self.device))
        return made


@cache
def upload_to(device: torch.device) -> Upload:
    """The one of a device: pinning memory takes longer than sending a layer."""
    return Upload(device)
