"""Tensors go to a CUDA device through two pinned buffers: one is filled by all threads while the other is sent.

What is sent from pageable memory, as a mapped file is, the driver first copies into a buffer of its own, by one thread.
Tensors share a buffer, one behind the other, so that nothing is waited for until it is full.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import torch

__all__ = ["Upload", "upload_to"]

PIECE: Final = 32 << 20
"""Bytes of each of the two buffers: to send one takes a millisecond, against which a wait is nothing."""

GRAIN: Final = 256
"""Bytes that what lies in a buffer begins at multiples of."""

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
        with torch.inference_mode(False):  # what is made within that mode cannot be changed outside of it
            buffers = [torch.empty(piece, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._buffers = buffers
        self._sent: list[Any] = [torch.cuda.Event() if pinned else None for _ in range(2)]  # type: ignore[no-untyped-call]
        self._turn = self._filled = 0
        self._stream: Any = None

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor there.

        The current stream of the device has what it needs to wait for; the tensor may be freed or changed at once.
        """
        if tensor.device.type != "cpu" or tensor.nbytes <= SMALL:
            return tensor.to(self.device)
        self._begin()
        given = tensor.detach().contiguous().view(-1).view(torch.uint8)
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        there, start, size = made.view(-1).view(torch.uint8), 0, self._buffers[0].numel()
        while start < given.numel():
            if self._filled == size:
                self._change()
            count = min(size - self._filled, given.numel() - start)
            piece = self._buffers[self._turn][self._filled : self._filled + count]
            piece.copy_(given[start : start + count])
            there[start : start + count].copy_(piece, non_blocking=True)
            start += count
            self._filled = min(size, -(-(self._filled + count) // GRAIN) * GRAIN)
        return made

    def _begin(self) -> None:
        """Go on in the buffer that was filled last, if that is sent on the same stream."""
        if self.device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self.device)
        if self._stream is not None and self._stream != stream:
            self._stream.synchronize()
        self._stream = stream

    def _change(self) -> None:
        """Fill the other buffer, once it is sent."""
        if self._stream is not None:
            self._sent[self._turn].record(self._stream)
        self._turn, self._filled = 1 - self._turn, 0
        if self._stream is not None:
            self._sent[self._turn].synchronize()  # an event that was never recorded is over


@cache
def upload_to(device: torch.device) -> Upload:
    """The one of a device: pinning memory takes longer than sending a layer."""
    return Upload(device)
