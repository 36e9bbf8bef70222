"""A step that is the same for every token, recorded in a CUDA graph: one launch instead of some hundred."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Replayed"]

Step = Callable[[torch.Tensor], torch.Tensor]


class Replayed:
    """A function of tensors on a CUDA device that is recorded at its second call, and replayed from then on.

    It must do the same for all inputs of one shape, and read and change no memory but that of tensors that stay where
    they are. Its first call is an ordinary one: kernels are compiled then, workspaces made. All are, if it cannot be
    recorded, as what waits for the device cannot: experts that are counted on the host, for one.
    """

    def __init__(self, step: Step) -> None:
        """Nothing is recorded yet.

        Args:
            step: the function.
        """
        self._step = step
        self._graph: torch.cuda.CUDAGraph | None = None
        self._refused = False
        self._stream: Any = None
        self._given = self._made = torch.empty(0)

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        """What the function makes of it; the next call overwrites it.

        Args:
            given: of the same shape, dtype and device every time.
        """
        if self._stream is None:
            self._stream = torch.cuda.Stream(given.device)  # type: ignore[no-untyped-call]
            self._given = given.clone()
            self._stream.wait_stream(torch.cuda.current_stream(given.device))
            with torch.cuda.stream(self._stream):
                made = self._step(self._given)
            torch.cuda.current_stream(given.device).wait_stream(self._stream)
            return made
        if self._graph is None and not self._refused:
            torch.cuda.synchronize(given.device)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, stream=self._stream):
                    self._made = self._step(self._given)
                self._graph = graph
            except RuntimeError:  # nothing of it was done
                self._refused = True
        if self._graph is None:
            return self._step(given)
        self._given.copy_(given)
        self._graph.replay()
        return self._made
