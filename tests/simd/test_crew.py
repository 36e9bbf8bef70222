"""uqff.simd.crew: every item once, several callers, what was interrupted, forks, sleep, and the end of a program."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

crew: Any = pytest.importorskip("uqff.simd.crew", reason="no numba")

NUMBERS = 10_000


def add(parts: Any, y: Any, lo: int, hi: int) -> None:
    """A kernel: counts, by as much as it is told, and remembers where its ranges begin."""
    for i in range(lo, hi):
        y[0, i] += parts[0][0]
    y[1, lo] = parts[1]


add.__qualname__ = "tests.add"
SHARED = crew.Shared(add)


def added(calls: int = 1, *, n: int = NUMBERS, grain: int = 1) -> np.ndarray[Any, Any]:
    y = np.zeros((2, n), np.float32)
    for _ in range(calls):
        SHARED(((np.ones(1, np.float32), 7), y), n, grain=grain)
    return y


@pytest.fixture(autouse=True)
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    """More threads than most machines of tests have CPUs."""
    monkeypatch.setenv("UQFF_NUM_THREADS", "3")


@pytest.mark.parametrize("threads", ["1", "2", "3"])
@pytest.mark.parametrize(("n", "grain"), [(1, 1), (7, 2), (1000, 1), (1000, 7), (1000, 999), (1000, 1000)])
def test_every_item_once_in_ranges_that_start_on_a_grain(
    n: int, grain: int, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UQFF_NUM_THREADS", threads)
    counts, begins = added(3, n=n, grain=grain)
    assert (counts == 3).all()
    assert begins[0] == 7
    assert not begins[np.arange(n) % grain != 0].any()
    assert np.count_nonzero(begins) == 1 or threads != "1"


def test_nothing_is_nothing() -> None:
    assert added(n=0).shape == (2, 0)


def test_several_callers_at_a_time() -> None:
    """One of them has help, the others do it alone."""
    made: list[bool] = []
    callers = [threading.Thread(target=lambda: made.append(bool((added(200)[0] == 200).all()))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert made == [True] * 4


def test_threads_take_part_and_then_sleep() -> None:
    """Under a bound of time: a thread that looks for work for ever would keep a CPU."""
    seen = crew._crew()
    end = time.monotonic() + 30
    ranges = 0
    while ranges < 2 and time.monotonic() < end:
        ranges = int(np.count_nonzero(added()[1]))
    assert ranges >= 2
    while len(seen._asleep) < len(seen._threads) and time.monotonic() < end:
        time.sleep(0.01)
    assert len(seen._asleep) == len(seen._threads) >= 2
    assert (added()[0] == 1).all()


def test_a_caller_waits_for_what_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a thread still works: the memory is not taken for another product before that is done."""
    made = crew._crew()
    added()
    made._memory[crew.STATE] = 1
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            made._memory[crew.STATE] = 0

    monkeypatch.setattr(crew.time, "sleep", sleep)
    assert (added()[0] == 1).all()
    assert waits[:3] == [0, 0, 0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    parent = crew._crew()
    added()
    child = os.fork()
    if child == 0:
        os._exit(0 if (added(20)[0] == 20).all() and crew._crew() is not parent else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert crew._crew() is parent


def test_a_program_ends_with_its_threads() -> None:
    """By an exception right after a product, while they look for work."""
    code = "from tests.simd.test_crew import added; added(50); raise SystemExit(3)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")
