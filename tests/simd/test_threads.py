"""uqff.simd.threads: every item once, aligned ranges, exceptions, nesting, fork, and where the count comes from."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from uqff.simd.threads import num_threads, run_ranges


def collect(n: int, grain: int, threads: int) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    lock = threading.Lock()

    def take(lo: int, hi: int) -> None:
        with lock:
            ranges.append((lo, hi))

    run_ranges(take, n, grain=grain, threads=threads)
    return sorted(ranges)


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 64, 1000])
@pytest.mark.parametrize("grain", [1, 8, 100])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_ranges_cover_every_item_once_and_start_on_a_grain(n: int, grain: int, threads: int) -> None:
    ranges = collect(n, grain, threads)
    assert [item for lo, hi in ranges for item in range(lo, hi)] == list(range(n))
    assert all(lo % grain == 0 for lo, _ in ranges)
    assert all(hi % grain == 0 for _, hi in ranges[:-1])


def test_one_thread_gets_one_range_in_the_calling_thread() -> None:
    seen: list[tuple[int, int, str]] = []
    run_ranges(lambda lo, hi: seen.append((lo, hi, threading.current_thread().name)), 100, threads=1)
    assert seen == [(0, 100, threading.current_thread().name)]


def test_an_exception_reaches_the_caller_and_stops_the_rest() -> None:
    calls: list[int] = []

    def fail(lo: int, _hi: int) -> None:
        calls.append(lo)
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        run_ranges(fail, 1000, threads=2)
    assert len(calls) <= 2


def test_a_nested_call_does_not_wait_for_itself() -> None:
    done: list[int] = []

    def outer(lo: int, hi: int) -> None:
        for _ in range(lo, hi):
            run_ranges(lambda a, b: done.extend(range(a, b)), 8, threads=2)

    run_ranges(outer, 16, threads=2)
    assert sorted(done) == sorted(list(range(8)) * 16)


@pytest.mark.parametrize(("n", "grain", "threads"), [(-1, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_impossible_arguments_are_refused(n: int, grain: int, threads: int) -> None:
    with pytest.raises(ValueError, match="expected n >= 0"):
        run_ranges(lambda _lo, _hi: None, n, grain=grain, threads=threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_forked_child_makes_a_pool_of_its_own() -> None:
    assert len(collect(64, 1, 2)) > 1
    child = os.fork()
    if child == 0:
        os._exit(0 if [item for lo, hi in collect(64, 1, 2) for item in range(lo, hi)] == list(range(64)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_the_environment_variable_sets_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UQFF_NUM_THREADS", "3")
    assert num_threads() == 3


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5"])
def test_a_count_that_is_no_positive_integer_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("UQFF_NUM_THREADS", text)
    with pytest.raises(ValueError, match="UQFF_NUM_THREADS: expected a positive integer"):
        num_threads()


def test_without_the_variable_a_loaded_torch_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    class Torch:
        @staticmethod
        def get_num_threads() -> int:
            return 5

    monkeypatch.delenv("UQFF_NUM_THREADS", raising=False)
    monkeypatch.setitem(sys.modules, "torch", Torch)
    assert num_threads() == 5


@pytest.mark.parametrize(("text", "count"), [("3", 3), (" 7 ", 7), ("5,2,1", 5)])
def test_without_torch_what_it_would_go_by_decides(monkeypatch: pytest.MonkeyPatch, text: str, count: int) -> None:
    """OpenMP's variable, which may have one number a level; what is no positive number there is not ours to refuse."""
    monkeypatch.delenv("UQFF_NUM_THREADS", raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert num_threads() == count
    for nothing in ("", "0", "-1", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", nothing)
        assert num_threads() == processors()


def test_without_torch_the_process_affinity_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UQFF_NUM_THREADS", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert num_threads() == processors()


def processors() -> int | None:
    """Those that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
