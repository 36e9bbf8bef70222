"""The ranks that share a model, and the collectives they use: torch.distributed, gloo on CPUs and NCCL on CUDA.

A world of one needs no process group.  A :class:`Comm` is made from a group that the caller has set up; nothing here
looks for a default group, reads the environment or initialises anything.

Authority: mistral.rs v0.8.0, ``mistralrs-quant/src/distributed/mod.rs`` (``Comm``, ``SumAllReduce``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from uqff.errors import CommError, ShardError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import Self

__all__ = ["Comm"]

_T = TypeVar("_T")

_HALVES = (torch.float16, torch.bfloat16)


class Comm:
    """A rank among others.

    A collective that fails, because a rank died, left or did not come within the group's timeout, raises
    :class:`~uqff.errors.CommError` on every rank that is left.

    Attributes:
        group: the process group; None for a world of one.
        rank: of this process within the group.
        world_size: number of ranks.
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

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def sum_all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's ``x``, on every rank; ``x`` is not modified.

        float16 and bfloat16 are added up in float32 and rounded once.
        """
        if self.world_size == 1:
            return x
        total = x.to(torch.float32) if x.dtype in _HALVES else x.clone(memory_format=torch.contiguous_format)
        self._run("sum_all_reduce", x, lambda: dist.all_reduce(total, group=self.group))
        return total.to(x.dtype)

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's ``x``, in the order of ranks; all have the same dtype and shape."""
        if self.world_size == 1:
            return [x]
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        self._run("all_gather", x, lambda: dist.all_gather(parts, x, group=self.group))
        return parts

    def all_gather_bytes(self, data: bytes, device: torch.device | str = "cpu") -> list[bytes]:
        """Every rank's bytes, in the order of ranks; lengths may differ.

        Args:
            data: of this rank.
            device: on which the backend can exchange tensors: a CUDA device for NCCL.
        """
        mine = torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)
        sizes = [int(n) for n in self.all_gather(torch.tensor([len(data)], device=device))]
        padded = torch.zeros(max(*sizes, 1), dtype=torch.uint8)
        padded[: len(data)] = mine[: len(data)]
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
            self._run("barrier", None, lambda: dist.barrier(group=self.group))

    def _run(self, name: str, x: torch.Tensor | None, collective: Callable[[], _T]) -> _T:
        try:
            return collective()
        except (RuntimeError, ValueError) as error:  # the backends raise nothing more specific
            of = "" if x is None else f" of {str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
            cause = str(error).strip().splitlines()
            raise CommError(
                f"{name}{of} failed on rank {self.rank} of {self.world_size}",
                expected="every rank to take part within the timeout of the group",
                got=cause[0] if cause else type(error).__name__,
            ) from error

    def __deepcopy__(self, memo: object) -> Self:
        """Itself: copies of a layer talk to the same ranks."""
        return self

    def __repr__(self) -> str:
        return f"<Comm rank {self.rank} of {self.world_size}>"
