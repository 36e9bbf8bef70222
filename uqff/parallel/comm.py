"""The ranks that share a model, and the collectives they use: torch.distributed, gloo on CPUs and NCCL on CUDA.

A world of one needs no process group.  A :class:`Comm` is made from a group that the caller has set up; nothing here
looks for a default group, reads the environment or initialises anything.

Authority: mistral.rs v0.8.0, ``mistralrs-quant/src/distributed/mod.rs`` (``Comm``, ``SumAllReduce``).
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from uqff.errors import CommError, ShardError
from uqff.parallel.collectives import COMMS, copy_ranks, gather_ranks, sum_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Self

    from uqff.gpu.peer import Peers

__all__ = ["Comm", "exchange_device"]

_T = TypeVar("_T")

_HALVES = (torch.float16, torch.bfloat16)

MESSAGE = 1 << 15
"""Bytes of the message that every collective begins with. On loopback, 2 to 4 ranks pass on 32 KiB as fast as 64 bytes;
it holds a row of 8160 float32 activations, or four tokens of a model of width 2048."""

_MODE = torch.inference_mode(False)
"""What collectives write to is made outside inference mode: backends write in threads of their own, where that mode
does not hold, and torch 2.4 refuses to change tensors of it there."""

_COUNT = itertools.count()

HEADER = 128
"""Bytes of it that say what is going to happen: the number of bytes (8), a hash of the text (8), the text."""


class Comm:
    """A rank among others.

    A collective that fails, because a rank died, left, did not come within the group's timeout, or came with another
    shape, dtype or collective, raises :class:`~uqff.errors.CommError` on every rank that is left.  What ranks bring is
    compared in the message that the collective begins with, see :meth:`_exchange`: up to 32 KiB that costs no turn of
    its own, above it one of 32 KiB; with NCCL the CPU waits for the GPU to read it.

    Attributes:
        group: the process group; None for a world of one.
        rank: of this process within the group.
        world_size: number of ranks.

    Example:
        >>> comm = uqff.parallel.Comm()  # Comm(torch.distributed.group.WORLD) once that is set up
        >>> comm
        <Comm rank 0 of 1>
        >>> comm.sum_all_reduce(torch.ones(2))
        tensor([1., 1.])
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        """The ranks of a process group.

        Raises:
            CommError: this is no group, or this process is not a member of it.
        """
        if group is not None and not isinstance(group, dist.ProcessGroup):
            expected = "a process group that this process is a member of, such as torch.distributed.group.WORLD"
            raise CommError("not a process group", expected=expected, got=repr(group))
        self.group = group
        self.rank: int = 0 if group is None else group.rank()
        self.world_size: int = 1 if group is None else group.size()
        if self.rank < 0:
            raise CommError("this process is not a member of the group", expected="a rank", got=self.rank)
        self._name = self._register(group)
        self._peers: Peers | None = None
        self._told: list[str] = []

    @classmethod
    def of(cls, comm: Comm | None) -> Comm:
        """The ranks that a layer is given; a world of one if None.

        Raises:
            CommError: this is something else.
        """
        if comm is None or isinstance(comm, Comm):
            return cls() if comm is None else comm
        expected = "a uqff.parallel.Comm, which is made from a process group, or None"
        raise CommError("not a communicator", expected=expected, got=type(comm).__name__)

    @classmethod
    def from_mesh(cls, mesh: DeviceMesh, dim: str | int | None = None) -> Self:
        """The ranks along one dimension of a device mesh.

        Args:
            mesh: the mesh.
            dim: name or number of the dimension; not needed if there is only one.
        """
        return cls(mesh.get_group(dim))

    def sum_all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's ``x``, on every rank; ``x`` is not modified.

        float16 and bfloat16 are added up in float32 and rounded once.  The gradient in ``x`` is that of the sum: what
        comes after it is the same on every rank.
        """
        if self.world_size == 1:
            return x
        made: torch.Tensor = sum_ranks(x, self._joined("sum_all_reduce", x))
        return made

    def sum_gradients(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` itself, which is the same on every rank, for use in each rank's part of the outputs.

        Its gradient is the sum of those of all ranks; without it, each rank would only have its own part's.
        """
        if self.world_size == 1 or not (torch.is_grad_enabled() and x.requires_grad):
            return x
        made: torch.Tensor = copy_ranks(x, self._joined("sum_gradients", x))
        return made

    def gather_last(self, x: torch.Tensor) -> torch.Tensor:
        """Every rank's ``x`` side by side along the last dimension, on every rank; all have the same dtype and shape.

        The gradient in ``x`` is this rank's part of that of the whole: what comes after is the same on every rank.
        """
        if self.world_size == 1:
            return x
        made: torch.Tensor = gather_ranks(x, self._joined("gather_last", x))
        return made

    @_MODE
    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's ``x``, in the order of ranks, without gradients; all have the same dtype and shape."""
        if self.world_size == 1:
            return [x]
        if self._peers is not None:
            self._told.append(f"all_gather{_described(x)}")
            return list(self._peers.gather(x.detach()))
        x = x.contiguous()
        sent = self._exchange("all_gather", x)
        if None not in sent:
            return [_numbers(data, x) for data in sent if data is not None]
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        self._run("all_gather", x, lambda: dist.all_gather(parts, x, group=self.group))
        return parts

    def all_gather_bytes(self, data: bytes, device: torch.device | str = "cpu") -> list[bytes]:
        """Every rank's bytes, in the order of ranks; lengths may differ.

        Args:
            data: of this rank.
            device: on which the backend can exchange tensors: a CUDA device for NCCL.
        """
        if self.world_size == 1:
            return [data]
        mine = torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)[: len(data)]
        sent = self._exchange("all_gather_bytes", mine.to(device), any_size=True)
        if None not in sent:
            return [each.cpu().numpy().tobytes() for each in sent if each is not None]
        sizes = [int(n) for n in self.all_gather(torch.tensor([len(data)], device=device))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(data)] = mine
        parts = self.all_gather(padded.to(device))
        return [part[:n].cpu().numpy().tobytes() for part, n in zip(parts, sizes, strict=True)]

    def check_same(self, digest: bytes, what: str, device: torch.device | str = "cpu") -> None:
        """Make sure that all ranks work on the same thing.

        Args:
            digest: of the thing, as this rank has it.
            what: its name, for the error.
            device: see :meth:`all_gather_bytes`.

        Raises:
            ShardError: on every rank, if digests differ; the ranks that do not agree with rank 0 are named.
        """
        digests = self.all_gather_bytes(digest, device)
        odd = [rank for rank, other in enumerate(digests) if other != digests[0]]
        if odd:
            raise ShardError(
                f"{what} differs between ranks",
                expected=f"digest {digests[0].hex()}, as on rank 0",
                got=f"another on rank {', '.join(map(str, odd))}",
            )

    def barrier(self) -> None:
        """Return when every rank has come here."""
        if self.world_size > 1:
            self._joined("barrier", None)
            self._run("barrier", None, lambda: dist.barrier(group=self.group))

    @contextmanager
    def through(self, peers: Peers) -> Iterator[list[str]]:
        """Let sums and gathers of tensors be kernels, which a CUDA graph can record.

        Nothing asks whether the ranks agree: what is done here is said in the list, for them to compare.

        Args:
            peers: of these ranks.
        """
        self._peers, self._told = peers, []
        try:
            yield self._told
        finally:
            self._peers = None

    @property
    def recording(self) -> bool:
        """Whether it is :meth:`through` kernels that ranks reach each other."""
        return self._peers is not None

    def sum_add_norm(
        self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """While :attr:`recording`, ``x`` plus the sum of every rank's ``y``, and its RMS norm: one kernel."""
        assert self._peers is not None
        self._told.append(f"sum_add_norm{_described(y)}")
        return self._peers.sum_add_norm(x, y, weight, eps)

    def attach(self, group: ProcessGroup) -> None:
        """Join the ranks again after a pickle: of every layer that has this communicator.

        A process group does not go into a pickle.  A communicator that comes out of one knows its place and its world,
        which is enough to cut, to serialise and to hold weights; collectives raise until it is attached.

        Raises:
            CommError: this process has another place in that group, or it is of another size.
        """
        other = type(self)(group)
        if (other.rank, other.world_size) != (self.rank, self.world_size):
            expected, got = f"rank {self.rank} of {self.world_size}", f"rank {other.rank} of {other.world_size}"
            raise CommError("layers hold the parts of another rank", expected=expected, got=got)
        self.group, self._name = group, self._register(group)

    def _joined(self, name: str, x: torch.Tensor | None) -> str:
        """The name of the group; operators find the ranks by it.

        Raises:
            CommError: there is no group: the communicator comes from a pickle.
        """
        if self.group is None:
            raise CommError(
                f"{name}{_described(x)} on rank {self.rank} of {self.world_size}, which is not joined to the others",
                expected="Comm.attach(group) after a pickle",
            )
        return self._name

    def _register(self, group: ProcessGroup | None) -> str:
        """Make operators find these ranks; returns the name they do it by."""
        name = f"{group.group_name}/{next(_COUNT)}" if group is not None else ""
        if name:
            COMMS[name] = self
        return name

    @_MODE
    def _sum(self, x: torch.Tensor) -> torch.Tensor:
        """:meth:`sum_all_reduce` itself."""
        if self._peers is not None:
            self._told.append(f"sum_all_reduce{_described(x)}")
            return self._peers.sum(x.detach())
        x = x.detach().contiguous()
        wide = torch.float32 if x.dtype in _HALVES else x.dtype
        sent = self._exchange("sum_all_reduce", x)
        if None not in sent:
            numbers = [_numbers(data, x).to(wide) for data in sent if data is not None]
            total = numbers[0].clone()
            for each in numbers[1:]:
                total += each
            return total.to(x.dtype)
        total = x.to(wide, copy=True)
        self._run("sum_all_reduce", x, lambda: dist.all_reduce(total, group=self.group))
        return total.to(x.dtype)

    @_MODE
    def _exchange(self, name: str, x: torch.Tensor, *, any_size: bool = False) -> list[torch.Tensor | None]:
        """Tell the other ranks what is going to happen, and do it at once if it is small.

        Backends do not check that ranks agree: gloo ends the process where sizes differ, NCCL hangs.  So every
        collective begins with a message of the same size on every rank: what it is, of which dtype and shape; and the
        numbers themselves, where there is room for those of every rank.  Only what is larger takes a second turn.

        Args:
            name: of the collective.
            x: contiguous; what this rank brings.
            any_size: whether ranks may bring different numbers of bytes.

        Returns:
            The bytes of each rank, in order; None for those that had no room.

        Raises:
            CommError: on every rank, if ranks do not agree; or one did not take part.
        """
        self._joined(name, x)
        data = x.reshape(-1).view(torch.uint8)
        what = name if any_size else f"{name}{_described(x)}"
        text = what.encode()
        header = len(data).to_bytes(8, "little") + hashlib.blake2b(text, digest_size=8).digest() + text
        header = header[:HEADER].ljust(HEADER, b"\0")
        on_device = dist.get_backend(self.group) == "nccl"
        message = torch.zeros(MESSAGE, dtype=torch.uint8, device=x.device if on_device else "cpu")
        message[:HEADER] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        if len(data) <= MESSAGE - HEADER:
            message[HEADER : HEADER + len(data)] = data
        messages = [torch.empty_like(message) for _ in range(self.world_size)]
        self._run(name, x, lambda: dist.all_gather(messages, message, group=self.group))
        headers = [each[:HEADER].cpu().numpy().tobytes() for each in messages]
        odd = [rank for rank, each in enumerate(headers) if each[8:] != headers[0][8:]]
        if odd:
            texts = [each[16:].rstrip(b"\0").decode(errors="replace") for each in headers]
            raise CommError(
                f"ranks do not agree on a collective, on rank {self.rank} of {self.world_size}",
                expected=f"{texts[0]}, as on rank 0",
                got=", ".join(f"{texts[rank]} on rank {rank}" for rank in odd),
            )
        sizes = [int.from_bytes(each[:8], "little") for each in headers]
        if max(sizes) > MESSAGE - HEADER:
            return [None] * self.world_size
        return [each[HEADER : HEADER + n].to(x.device) for each, n in zip(messages, sizes, strict=True)]

    def _run(self, name: str, x: torch.Tensor | None, collective: Callable[[], _T]) -> _T:
        try:
            return collective()
        except (RuntimeError, ValueError) as error:  # the backends raise nothing more specific
            cause = str(error).strip().splitlines()
            raise CommError(
                f"{name}{_described(x)} failed on rank {self.rank} of {self.world_size}",
                expected="every rank to take part within the timeout of the group",
                got=cause[0] if cause else type(error).__name__,
            ) from error

    def __getstate__(self) -> dict[str, int]:
        """What a pickle holds: no process group, see :meth:`attach`."""
        return {"rank": self.rank, "world_size": self.world_size}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__dict__.update(state, group=None, _name="", _peers=None, _told=[])

    def __deepcopy__(self, memo: object) -> Self:
        """Itself: copies of a layer talk to the same ranks."""
        return self

    def __repr__(self) -> str:
        return f"<Comm rank {self.rank} of {self.world_size}>"


def _described(x: torch.Tensor | None) -> str:
    return "" if x is None else f" of {str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _numbers(data: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Bytes that another rank sent, as what this rank brought."""
    return data.view(like.dtype).view(like.shape)


def exchange_device(device: torch.device) -> torch.device:
    """On which device ranks exchange what is no activation: NCCL exchanges CUDA tensors only, gloo any."""
    return device if device.type == "cuda" else torch.device("cpu")
