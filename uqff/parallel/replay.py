"""A step that is the same for every token, recorded in a CUDA graph: one launch instead of some hundred."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from uqff.errors import CommError, UqffError
from uqff.gpu import kernels
from uqff.gpu.peer import Peers

if TYPE_CHECKING:
    from uqff.parallel.comm import Comm

__all__ = ["Replayed", "peers_of"]

Step = Callable[[torch.Tensor], torch.Tensor]

_PEERS: WeakKeyDictionary[Comm, Peers | None] = WeakKeyDictionary()


class Replayed:
    """A function of tensors on a CUDA device that is recorded at its second call, and replayed from then on.

    It must do the same for all inputs of one shape, and read and change no memory but that of tensors that stay where
    they are. Its first call is an ordinary one: kernels are compiled then, workspaces made. All are, if it cannot be
    recorded, as what waits for the device cannot: experts that no kernel gathers, which are counted on the host.

    Ranks replay their graphs together, and record them together or not at all.
    """

    def __init__(self, step: Step, comm: Comm, peers: Peers | None) -> None:
        """Nothing is recorded yet.

        Args:
            step: the function.
            comm: the ranks that do it.
            peers: :func:`peers_of` several.
        """
        self._step, self._comm, self._peers = step, comm, peers
        self._graph: torch.cuda.CUDAGraph | None = None
        self._refused = False
        self._stream: Any = None
        self._given = self._made = torch.empty(0)

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        """What the function makes of it; the next call overwrites it.

        Args:
            given: of the same shape, dtype and device every time.

        Raises:
            CommError: another rank did not come.
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
            self._record(given.device)
        if self._graph is None:
            return self._step(given)
        self._given.copy_(given)
        self._graph.replay()
        if self._peers is not None:
            torch.cuda.current_stream(given.device).synchronize()
            if self._peers.failed:
                raise CommError(
                    f"a token on rank {self._comm.rank} of {self._comm.world_size}",
                    expected=f"every rank to take part within {self._peers.patience:g} s",
                    got="a rank that did not",
                )
        return self._made

    def _record(self, device: torch.device) -> None:
        torch.cuda.synchronize(device)
        graph, recorded, told = torch.cuda.CUDAGraph(), True, list[str]()
        with ExitStack() as until:
            if self._peers is not None:
                told = until.enter_context(self._comm.through(self._peers))
            try:
                with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                    self._made = self._step(self._given)
            except (RuntimeError, UqffError):  # nothing of it was done
                recorded = False
        if self._peers is not None:
            digest = hashlib.blake2b("\n".join(told).encode(), digest_size=16).digest()
            digests = self._comm.all_gather_bytes(digest if recorded else b"", device)
            recorded = recorded and len(set(digests)) == 1  # none replays what another waits for
        self._graph, self._refused = graph if recorded else None, not recorded


def peers_of(comm: Comm, device: torch.device) -> Peers | None:
    """How ranks of one machine reach each other from kernels; None, on all, if they cannot.

    Args:
        comm: the ranks; all call this.
        device: of this rank.
    """
    if comm not in _PEERS:
        cuda = device.type == "cuda" and kernels.available(device)
        if not all(comm.all_gather_bytes(b"1" if cuda else b"", device)):
            _PEERS[comm] = None
        else:
            place = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
            with torch.cuda.device(place):
                exchange = lambda data: comm.all_gather_bytes(data, place)  # noqa: E731
                _PEERS[comm] = Peers.of(comm.rank, comm.world_size, place, _timeout(comm, place), exchange)
    return _PEERS[comm]


def _timeout(comm: Comm, device: torch.device) -> float:
    """Seconds that a collective of these ranks waits."""
    assert comm.group is not None
    options: Any = getattr(comm.group._get_backend(device), "options", None)
    timeout = getattr(options, "_timeout", dist.default_pg_timeout)
    return float(timeout.total_seconds())
