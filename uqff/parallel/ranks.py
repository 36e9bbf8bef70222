"""The process group of a process that ``torch.distributed.run`` (torchrun) has started.

It tells each process its place by environment variables: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist

from uqff.errors import CommError, UnsupportedError
from uqff.parallel.comm import Comm

__all__ = ["device_of", "joined", "rank_of"]

MOST_RANKS: Final = 1_000_000
"""Of any torchrun."""


def rank_of(environ: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Rank and world size of this process; 0 and 1 outside of torchrun.

    Raises:
        CommError: what the environment says is none.
    """
    world_size = _number("WORLD_SIZE", environ, 1, 1, MOST_RANKS)
    return _number("RANK", environ, 0, 0, world_size - 1), world_size


def _number(name: str, environ: Mapping[str, str], default: int, least: int, most: int) -> int:
    text = environ.get(name) or str(default)
    if not text.isdecimal() or len(text) > len(str(most)) or not least <= int(text) <= most:
        raise CommError("not a place among ranks", field=name, expected=f"from {least} to {most}", got=text)
    return int(text)


def device_of(name: str | None, environ: Mapping[str, str] = os.environ) -> torch.device:
    """The device of this process: ``cuda`` is the one of the process's place on its machine.

    Args:
        name: as the user gave it; CUDA if there is one, else the CPU, if None.
        environ: of the process.

    Raises:
        CommError: what the environment says of that place is no number.
        UnsupportedError: no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UnsupportedError("no such device", expected="cpu, cuda, cuda:N", got=name) from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise UnsupportedError("no such device here", expected="cpu", got=device)
    if device.type == "cuda" and device.index is None:
        local = _number("LOCAL_RANK", environ, 0, 0, MOST_RANKS)
        device = torch.device("cuda", local % torch.cuda.device_count())
    return device


@contextmanager
def joined(device: torch.device, timeout: float, environ: Mapping[str, str] = os.environ) -> Iterator[Comm]:
    """All processes of this torchrun, as ranks; a world of one outside of it.

    Args:
        device: of this process: gloo joins CPUs, NCCL joins CUDA devices.
        timeout: seconds that a collective waits for the other ranks.
        environ: of the process.

    Raises:
        CommError: not all ranks came.
    """
    rank, world_size = rank_of(environ)
    if world_size == 1:
        yield Comm()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a rank that fails is an exception, not an abort
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method="env://",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
    except (RuntimeError, ValueError) as error:  # what the stores and backends raise
        raise CommError(
            f"rank {rank} of {world_size} could not join the others",
            expected=f"every rank within {timeout:g} s",
            got=str(error).strip().splitlines()[0],
        ) from error
    try:
        group = dist.group.WORLD
        assert group is not None
        yield Comm(group)
    finally:
        dist.destroy_process_group()
