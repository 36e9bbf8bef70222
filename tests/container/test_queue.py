"""The thread that writes while others compute."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from uqff.container.queue import WriteQueue


def test_jobs_run_in_order_and_all_of_them() -> None:
    done: list[int] = []
    with WriteQueue() as writer:
        for number in range(50):
            writer.submit(lambda number=number: done.append(number), 1)  # type: ignore[misc]
        writer.join()
        assert done == list(range(50))
        writer.submit(lambda: done.append(50), 1)
    assert done == list(range(51))


def test_the_bound_on_what_waits() -> None:
    """`wait_below` returns once little enough waits; what is being written still counts."""
    gates = [threading.Event(), threading.Event()]
    finished: list[str] = []

    def wait() -> None:
        writer.wait_below(5)
        finished.append("below")

    with WriteQueue() as writer:
        for gate in gates:
            writer.submit(lambda gate=gate: gate.wait(10), 5)  # type: ignore[misc]
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.05)
        assert finished == []
        gates[0].set()
        waiting.join(10)
        assert finished == ["below"]
        gates[1].set()
        writer.wait_below(-1)


def test_the_first_failure_is_raised_and_ends_the_work() -> None:
    done: list[str] = []

    def fail() -> None:
        raise OSError(28, "No space left on device")

    def run() -> None:
        with WriteQueue() as writer:
            writer.submit(fail, 0)
            with pytest.raises(OSError, match="No space left"):
                writer.join()
            writer.submit(lambda: done.append("never"), 0)

    with pytest.raises(OSError, match="No space left"):
        run()
    assert done == []


def test_files_are_closed_either_way(tmp_path: Path) -> None:
    with WriteQueue() as writer:
        file = writer.own(open(tmp_path / "a", "wb"))  # noqa: SIM115
    assert file.closed
    try:
        with WriteQueue() as writer:
            file = writer.own(open(tmp_path / "b", "wb"))  # noqa: SIM115
            raise RuntimeError
    except RuntimeError:
        assert file.closed
