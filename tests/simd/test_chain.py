"""uqff.simd.chain: stages in order, tasks of a stage together, on any number of threads, and beside other callers."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
import pytest

chain: Any = pytest.importorskip("uqff.simd.chain", reason="no numba")
crew: Any = pytest.importorskip("uqff.simd.crew", reason="no numba")


def following(before: Any, after: Any, lo: int, hi: int) -> None:
    """A kernel: one more than all of before together, so it needs all of them."""
    total = 0
    for i in range(len(before)):
        total += before[i]
    for i in range(lo, hi):
        after[i] = total % 1000 + 1 + i


following.__qualname__ = "tests.following"
SHARED = crew.Shared(following)


def expected(first: Any, sizes: list[int]) -> Any:
    for size in sizes:
        first = int(first.sum()) % 1000 + 1 + np.arange(size)
    return first


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_stages_are_in_order(threads: int) -> None:
    """Each of many stages, of different sizes, reads what the one before wrote, whoever wrote it; again and again."""
    sizes = [1, 1000, 7, 64, 1, 513, 2000] * 5
    arrays = [np.arange(5, dtype=np.int64), *(np.zeros(size, np.int64) for size in sizes)]
    tasks = [chain.Task(SHARED, (a, b), len(b)) for a, b in itertools.pairwise(arrays)]
    made = chain.Chain([[task] for task in tasks], threads)
    for turn in range(50):
        arrays[0][0] = turn
        made(threads)
        assert (arrays[-1] == expected(arrays[0], sizes)).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("grain", [1, 7, 1000])
def test_tasks_of_a_stage_are_all_done(threads: int, grain: int) -> None:
    """Of different sizes, some of them nothing."""
    given = np.arange(3, dtype=np.int64)
    made = [np.zeros(n, np.int64) for n in (1, 0, 999, 20, 0)]
    stage = [chain.Task(SHARED, (given, each), len(each), grain) for each in made]
    chain.Chain([stage], threads)(threads)
    for each in made:
        assert (each == 4 + np.arange(len(each))).all()


def test_nothing_is_nothing() -> None:
    chain.Chain([], 2)(2)


def test_ranges_do_not_depend_on_who_comes() -> None:
    """Made for three threads, done by one; while other threads do theirs, of whom one has help."""
    wrong: list[int] = []

    def repeat(start: int) -> None:
        a, b, c = np.full(3, start, np.int64), np.zeros(500, np.int64), np.zeros(300, np.int64)
        made = chain.Chain([[chain.Task(SHARED, (a, b), 500)], [chain.Task(SHARED, (b, c), 300)]], 3)
        for turn in range(200):
            a[0] = turn
            made(1 + turn % 3)
            wrong.extend([turn] * bool((c != expected(a, [500, 300])).any()))

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_arguments_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temporary arrays live as long as the chain does: frames have addresses only."""
    made = chain.Chain([[chain.Task(SHARED, (np.arange(4) * 2, np.zeros(40, np.int64)), 40)]], 2)
    rest = [np.full(40, -1, np.int64) for _ in range(100)]
    made(2)
    _, task = made._held[0]
    assert (task.arguments[1] == 13 + np.arange(40)).all()
    assert all((each == -1).all() for each in rest)


def test_what_still_works_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage begins when the one before has ended, also if that takes longer than a thread spins."""
    the_crew = crew._crew()
    monkeypatch.setattr(the_crew, "_turns", 1)
    test_stages_are_in_order(3)
