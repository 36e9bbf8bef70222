"""Sums and gathers of small tensors over ranks whose GPUs see each other's memory, as one kernel each.

A CUDA graph can record them, and nobody waits for the host; ``peer.cu`` says how they work. Sums are those of
:meth:`uqff.parallel.comm.Comm.sum_all_reduce`: in float32, in the order of ranks, rounded once.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Final

from uqff.codes import DType
from uqff.errors import CommError, UqffError
from uqff.gpu import driver
from uqff.gpu.source import peer_source
from uqff.gpu.token import NORM_THREADS, Norm, fits_norm, kernel_of
from uqff.system import start_of_machine

if TYPE_CHECKING:
    import torch

__all__ = ["MOST_BYTES", "Peer", "Peers"]

RANKS, BOARDS, BOARD, WIDE = 8, 64, 8192, 65536
"""As ``peer.cu`` has them: ``PEERS`` and the rest."""
THREADS: Final = 256
MOST_BYTES: Final = BOARDS * BOARD
"""Of what a rank brings."""
SHARE: Final = 2048
"""Bytes that a block is given, before there are too many blocks."""
TRIAL: Final = 5.0
"""Seconds that ranks wait for each other in the trial, which begins when all are there."""


class Peer(ctypes.Structure):
    """``Peer`` of ``peer.cu``."""

    _fields_ = (
        *((name, ctypes.c_void_p * RANKS) for name in ("boards", "turns")),
        *((name, ctypes.c_void_p) for name in ("count", "failed", "x", "out")),
        ("patience", ctypes.c_uint64),
        *((name, ctypes.c_int) for name in ("bytes", "each", "rank", "ranks")),
    )


class PeerNorm(ctypes.Structure):
    """``PeerNorm`` of ``peer.cu``."""

    _fields_ = (("peer", Peer), ("norm", Norm))


class Peers:
    """What this rank shows to the others, and they to it."""

    def __init__(self, rank: int, places: Sequence[int], device: torch.device, patience: float) -> None:
        """Memory of which all parts are there.

        Args:
            rank: of this process.
            places: where this process sees the memory of each rank: zeros.
            device: of this rank.
            patience: seconds that a kernel waits for the others, before it gives up.
        """
        import torch

        self.patience = patience
        self._rank, self._places, self._device = rank, tuple(places), device
        self._count = torch.zeros(BOARDS + 2, dtype=torch.int32, device=device)
        self._failed = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")

    @classmethod
    def of(
        cls, rank: int, ranks: int, device: torch.device, patience: float, exchange: Callable[[bytes], list[bytes]]
    ) -> Peers | None:
        """Let every rank see the memory of all; None, on all, if it cannot be, as on several machines.

        The memory is never freed: nobody knows when the last of the others has read it.

        Args:
            rank: of this process.
            ranks: how many there are; all call this.
            device: of this rank, with an index.
            patience: see :class:`Peers`.
            exchange: gives every rank's bytes to all.
        """
        mine: tuple[int, bytes] | None = None
        if ranks <= RANKS and (machine := start_of_machine()):
            try:
                mine = driver.shared_memory(_bytes(), device)
            except (UqffError, OSError):
                mine = None
        told = exchange(mine[1] + machine if mine else b"")
        places: list[int] = []
        if mine and all(told) and len({each[driver.HANDLE :] for each in told}) == 1:
            try:
                for other, each in enumerate(told):
                    handle = each[: driver.HANDLE]
                    places.append(mine[0] if other == rank else driver.memory_of_another(handle, device))
            except UqffError:
                places.clear()
        if not all(exchange(b"1" if places else b"")):
            return None
        made = cls(rank, places, device, TRIAL)
        if not all(exchange(b"1" if made._compiled() else b"")) or not all(exchange(b"1" if made._right() else b"")):
            return None
        made.patience = patience
        return made

    def _compiled(self) -> bool:
        """Whether there are kernels; those of a trial are in memory then."""
        import torch

        try:
            for x in self._trials():
                self._sum_kernel(x)
                self._sum_kernel(x, "sum_add_norm")
                self._gather_kernel(x)
                self._gather_kernel(x[:1])  # of bytes that are no multiple of 16, as an id's are
        except UqffError:
            return False
        torch.cuda.synchronize(self._device)
        return True

    def _right(self) -> bool:
        """Whether sums and gathers of all ranks are."""
        ranks = len(self._places)
        expected = [[rank + 1.0] * 8 for rank in range(ranks)]
        sums = [self.sum(x).tolist() == [ranks * (ranks + 1) / 2] * 8 for x in self._trials()]
        gathers = [self.gather(x).tolist() == expected for x in self._trials()]
        sums += [self.sum_add_norm(0 * x, x, x, 0.0)[0].tolist() == self.sum(x).tolist() for x in self._trials()]
        return all(sums + gathers) and not self.failed

    def _trials(self) -> list[torch.Tensor]:
        import torch

        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        return [torch.full([8], self._rank + 1, dtype=dtype, device=self._device) for dtype in dtypes]

    @property
    def failed(self) -> bool:
        """Whether this rank has waited in vain; what its kernels have made since is worth nothing."""
        return bool(self._failed)

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """Of every rank's ``x``, on every rank.

        Args:
            x: float32, bfloat16 or float16; its bytes are a multiple of 16, at most :data:`MOST_BYTES`.

        Raises:
            CommError: it is something else.
        """
        import torch

        x = x.contiguous()
        self._check(x, MOST_BYTES, 16)
        out = torch.empty_like(x)
        self._launch(self._sum_kernel(x), x, out)
        return out

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's ``x``, ``[ranks, ...]``; its bytes are a multiple of 4, at most :data:`MOST_BYTES`.

        Raises:
            CommError: it is something else.
        """
        x = x.contiguous()
        self._check(x, MOST_BYTES, 4)
        out = x.new_empty(len(self._places), *x.shape)
        self._launch(self._gather_kernel(x), x, out)
        return out

    def sum_add_norm(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:func:`uqff.gpu.token.add_norm` with the sum of every rank's ``y``, to the bit.

        Raises:
            CommError: of other dtypes, or not a row.
        """
        y = y.contiguous()
        self._check(y, WIDE, 16)
        if not fits_norm(y.shape[-1]) or y.shape[-1] != y.numel():
            raise _cannot(y)
        total, out = x.new_empty(x.shape), x.new_empty(x.shape)
        norm = Norm(
            *(x.data_ptr(), None, weight.data_ptr(), total.data_ptr(), out.data_ptr()),
            *(x.shape[-1], eps),
        )
        self._sum_kernel(y, "sum_add_norm").launch((1, 1), NORM_THREADS, PeerNorm(self._given(y, y.nbytes), norm))
        return total, out

    def _sum_kernel(self, x: torch.Tensor, name: str = "sum_ranks") -> driver.Kernel:
        dtype = DType.of_torch(x.dtype)
        if dtype not in (DType.F32, DType.BF16, DType.F16):
            raise _cannot(x)
        return _kernel(name, dtype, (), x.device.index)

    def _gather_kernel(self, x: torch.Tensor) -> driver.Kernel:
        return _kernel("gather_ranks", DType.F32, (16 if x.nbytes % 16 == 0 else 4,), x.device.index)

    def _launch(self, kernel: driver.Kernel, x: torch.Tensor, out: torch.Tensor) -> None:
        blocks = min(BOARDS, math.ceil(x.nbytes / SHARE))
        given = self._given(x, math.ceil(x.nbytes / blocks / 16) * 16)
        given.out = out.data_ptr()
        kernel.launch((math.ceil(x.nbytes / given.each), 1), THREADS, given)

    def _given(self, x: torch.Tensor, each: int) -> Peer:
        given = Peer()
        for rank, place in enumerate(self._places):
            given.boards[rank], given.turns[rank] = place, place + 2 * (MOST_BYTES + WIDE)
        given.count, given.failed = self._count.data_ptr(), self._failed.data_ptr()
        given.x, given.patience = x.data_ptr(), int(self.patience * 1e9)
        given.bytes, given.each, given.rank, given.ranks = x.nbytes, each, self._rank, len(self._places)
        return given

    def _check(self, x: torch.Tensor, most: int, unit: int) -> None:
        if x.nbytes % unit or not 0 < x.nbytes <= most or x.data_ptr() % 16:
            raise _cannot(x)


def _bytes() -> int:
    """Of the memory that a rank shows: boards, and how often each rank has used them."""
    return 2 * (MOST_BYTES + WIDE) + 4 * (BOARDS + 1) * RANKS


def _cannot(x: torch.Tensor) -> CommError:
    expected = f"up to {MOST_BYTES} bytes, a multiple of 16, of float32, bfloat16 or float16"
    return CommError("ranks cannot show this to each other", expected=expected, got=f"{x.nbytes} bytes of {x.dtype}")


@cache
def _kernel(name: str, dtype: DType, how: tuple[int, ...], index: int) -> driver.Kernel:
    threads, given = (NORM_THREADS, "PeerNorm") if name == "sum_add_norm" else (THREADS, "Peer")
    return kernel_of(peer_source(name, given, threads, dtype, how), name, dtype, index)
