"""Threads for the kernels: one function over a range, split among the threads of one process-wide pool.

The kernels release the GIL (``nogil=True``) and write disjoint slices of a preallocated output, so a split changes
nothing but the time: what a kernel writes for one block does not depend on the range the block came in.
"""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from uqff.system import after_fork, usable_cpus

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

ENVIRONMENT_VARIABLE = "UQFF_NUM_THREADS"

_RANGES_PER_THREAD = 8
"""More ranges than threads, so that a thread the system took away for a while does not hold up the others."""

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_pool_size = 0


def num_threads() -> int:
    """The number of threads a kernel may use, at least 1.

    ``UQFF_NUM_THREADS`` if set; else ``torch.get_num_threads()`` if torch is loaded already (it is not imported for
    this); else what torch would take from ``OMP_NUM_THREADS``; else the number of CPUs this process may run on.

    Raises:
        ValueError: ``UQFF_NUM_THREADS`` is not a positive integer.
    """
    text = os.environ.get(ENVIRONMENT_VARIABLE)
    if text:
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected a positive integer, got {text!r}")
        return int(text)
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return int(torch.get_num_threads())
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # one number a level of nesting
    if text.isdecimal() and int(text):
        return int(text)
    return usable_cpus()


def run_ranges(fn: Callable[[int, int], None], n: int, *, grain: int = 1, threads: int | None = None) -> None:
    """Calls ``fn(lo, hi)`` on ranges that together cover ``[0, n)`` once each, on several threads.

    Every ``lo`` is a multiple of ``grain``, and every ``hi`` but the last, which is ``n``. The calling thread works
    too; with one thread or one range nothing is handed to the pool. ``fn`` may itself call ``run_ranges``.

    Args:
        fn: does the work of one range; should release the GIL for most of its time.
        n: number of work items; 0 calls nothing.
        grain: the smallest range worth a call, or the alignment ``fn`` needs.
        threads: at most so many; ``num_threads()`` if None.

    Raises:
        ValueError: ``n`` is negative, or ``grain`` or ``threads`` below 1.
        Exception: the first exception of ``fn``, once no call of ``fn`` runs any more; ranges not begun are dropped.
    """
    if threads is None:
        threads = 1 if 0 < n <= grain else num_threads()
    if n < 0 or grain < 1 or threads < 1:
        raise ValueError(f"expected n >= 0, grain >= 1, threads >= 1; got n={n}, grain={grain}, threads={threads}")
    grains = -(-n // grain)
    threads = min(threads, grains)
    if threads <= 1:
        if n:
            fn(0, n)
        return
    step = -(-grains // (threads * _RANGES_PER_THREAD)) * grain
    starts = iter(range(0, n, step))
    taking = threading.Lock()
    failures: list[BaseException] = []

    def drain() -> None:
        while not failures:
            with taking:
                lo = next(starts, None)
            if lo is None:
                return
            try:
                fn(lo, min(lo + step, n))
            except BaseException as failure:  # noqa: BLE001  (raised again below, in the calling thread)
                failures.append(failure)

    helpers = _submit(drain, threads - 1)
    drain()
    for helper in helpers:
        # A helper that never got a thread has nothing left to do. Cancelling it, not waiting for it, is what keeps
        # a nested call from waiting for the very pool thread it runs on.
        if not helper.cancel():
            helper.result()
    if failures:
        raise failures[0]


def _submit(fn: Callable[[], None], copies: int) -> list[Future[None]]:
    """Submits ``fn`` ``copies`` times to the shared pool; a pool with fewer threads is replaced first.

    The replaced pool finishes what it was given. Submitting under the lock keeps another caller from replacing the
    pool in between.
    """
    global _pool, _pool_size
    with _lock:
        if _pool is None or _pool_size < copies:
            if _pool is not None:
                _pool.shutdown(wait=False)
            _pool = ThreadPoolExecutor(copies, thread_name_prefix="uqff")
            _pool_size = copies
        return [_pool.submit(fn) for _ in range(copies)]


def _forget_pool() -> None:
    """A forked child has none of its parent's threads, and perhaps a lock that was held."""
    global _lock, _pool, _pool_size
    _lock = threading.Lock()
    _pool = None
    _pool_size = 0


after_fork(_forget_pool)
