"""What ranks make sure of together before they work on a model: that each could open it, and that it is the same one.

A rank that cannot go on must not leave the others waiting in a collective that it will never enter.  So every step that
may fail on one rank alone ends in :func:`settle`: the ranks exchange what became of it, and all of them go on, or all
of them raise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from uqff.errors import ShardError

if TYPE_CHECKING:
    import torch

    from uqff.container.mapped import ListedFile, MappedFile
    from uqff.parallel.comm import Comm

__all__ = ["digest", "settle"]

_T = TypeVar("_T")

FINE, FAILED = b"+", b"-"

SAMPLE = 4096
"""Bytes of a tensor that the digest takes in, at its beginning and again at its middle: a page."""

PIECE = 1 << 22
"""Bytes that are hashed at a time where all are."""


def settle(comm: Comm, what: str, step: Callable[[], _T], device: torch.device | str = "cpu") -> _T:
    """Do something that may fail on some ranks; return on all of them, or raise on all of them.

    Args:
        comm: the ranks.
        what: the step's name, for the error of the ranks on which it did not fail.
        step: without any collective of the ranks in it.
        device: see :meth:`Comm.all_gather_bytes`.

    Returns:
        What the step returned.

    Raises:
        Exception: what the step raised on this rank.
        ShardError: it failed on another rank, whose message is quoted.
        CommError: a rank did not take part.
    """
    failure: Exception | None = None
    try:
        result = step()
    except Exception as error:  # noqa: BLE001  # raised below, when the others know
        failure = error
    said = FINE if failure is None else FAILED + f"{failure}".encode(errors="replace")
    answers = comm.all_gather_bytes(said, device)
    if failure is not None:
        raise failure
    for rank, answer in enumerate(answers):
        if answer != FINE:
            raise ShardError(
                f"{what} failed on rank {rank}",
                expected="every rank to succeed",
                got=answer[1:].decode(errors="replace"),
            )
    return result


def digest(files: Iterable[MappedFile | ListedFile], *others: bytes, everything: bool = False) -> bytes:
    """What identifies a model: its headers and sizes, other documents, and a sample of every tensor's bytes.

    A page at the beginning and one at the middle of every tensor is taken in: two models of the same layout differ
    there, and hardly more than the headers is read.  A single byte that was changed elsewhere is found only with
    ``everything``.

    Args:
        files: shards and residual.
        others: the bytes of ``config.json`` and the like, options that all ranks must agree on.
        everything: take in every byte of the files.

    Returns:
        32 bytes, a BLAKE2b hash.
    """
    total = hashlib.blake2b(digest_size=32)

    def feed(data: memoryview | bytes) -> None:
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)

    for other in others:
        feed(other)
    for file in files:
        view, header = file.view, file.header
        total.update(len(view).to_bytes(8, "little"))
        feed(view[: header.data_begin])
        if everything:
            for start in range(header.data_begin, len(view), PIECE):
                total.update(view[start : start + PIECE])
            continue
        for entry in header.entries.values():
            for start in (entry.begin, entry.begin + max((entry.end - entry.begin) // 2, SAMPLE)):
                total.update(view[start : min(start + SAMPLE, entry.end)])
    return total.digest()
