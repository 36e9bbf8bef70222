"""Run a function on several ranks: processes joined by gloo through a file, with results and errors brought home."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

Outcome = tuple[int, Any, str]
"""Rank, result, traceback (empty if there was none)."""

IMPORTED = (
    *("pytest", "safetensors.torch", "uqff.parallel", "uqff.parallel.linear", "uqff.parallel.moe"),
    *("uqff.parallel.generate", "uqff.parallel.ranks", "transformers.models.auto"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mixtral", "qwen2", "qwen3", "qwen3_moe")),
)
"""Modules that ranks import sooner or later: five seconds of a core for each that loads a model."""


def run_ranks(world_size: int, work: Callable[..., Any], *args: Any, timeout: float = 20, dead: int = 0) -> list[Any]:
    """Results of ``work(comm, *args)`` of every rank, in order.

    Args:
        world_size: number of processes.
        work: a function of a module, called in each.
        args: passed on.
        timeout: of the group, in seconds.
        dead: how many ranks leave without a result.

    Raises:
        AssertionError: a rank failed, hangs, or more than ``dead`` ended without a result.
    """
    context = multiprocessing.get_context("forkserver")  # what ranks need is imported once, not in every rank
    context.set_forkserver_preload(list(IMPORTED))
    with tempfile.TemporaryDirectory() as directory:
        outcomes: Any = context.SimpleQueue()
        common = (world_size, Path(directory, "store"), timeout, outcomes, work, args)
        ranks = [context.Process(target=_rank, args=(rank, *common), daemon=True) for rank in range(world_size)]
        for process in ranks:
            process.start()
        try:
            received = _received(ranks, outcomes, dead)
        except BaseException:
            for process in ranks:
                process.kill()
            raise
        for process in ranks:
            process.join(30)
            assert not process.is_alive(), "a rank hangs"
    failures = [text for _, _, text in received if text]
    assert not failures, failures[0]
    return [result for _, result, _ in sorted(received, key=lambda outcome: outcome[0])]


def _received(ranks: list[Any], outcomes: Any, dead: int) -> list[Outcome]:
    """What all ranks but ``dead`` send; an error, with their exit codes, if more have ended without a word."""
    received: dict[int, Outcome] = {}
    while len(received) < len(ranks) - dead:
        ended = {rank: process.exitcode for rank, process in enumerate(ranks) if process.exitcode is not None}
        if not outcomes.empty():  # asked after the exit codes: what an ended rank sent is there
            outcome = outcomes.get()
            received[outcome[0]] = outcome
            continue
        silent = {rank: code for rank, code in ended.items() if rank not in received}
        assert len(silent) <= dead, f"ranks ended without a result, by exit code: {silent}"
        time.sleep(0.01)
    return list(received.values())


def _rank(
    rank: int, world_size: int, store: Path, timeout: float, outcomes: Any, work: Callable[..., Any], args: Any
) -> None:
    os.environ["UQFF_KERNELS"] = "reference"  # a rank would spend its life compiling kernels
    import torch
    import torch.distributed as dist

    from uqff.parallel.comm import Comm

    torch.set_num_threads(1)
    try:
        if world_size == 1:
            outcomes.put((rank, work(Comm(), *args), ""))
            return
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(store), world_size),  # type: ignore[attr-defined]
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        group = dist.group.WORLD
        assert group is not None
        outcomes.put((rank, work(Comm(group), *args), ""))
    except BaseException:  # noqa: BLE001  # sent home, whatever it is
        outcomes.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank_of(rank: int, world_size: int) -> Any:
    """A rank of a world whose other ranks are not there: it agrees with itself, and can load its share."""
    from uqff.parallel.comm import Comm

    class Alone(Comm):
        def all_gather_bytes(self, data: bytes, device: Any = "cpu") -> list[bytes]:
            return [data] * world_size

        def check_same(self, digest: bytes, what: str, device: Any = "cpu") -> None:
            """It is the same as this rank's."""

    comm = Alone()
    comm.rank, comm.world_size = rank, world_size
    return comm
