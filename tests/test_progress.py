"""How long operations tell what they have done."""

from __future__ import annotations

from uqff.progress import Step, Steps


def test_steps_count_things_and_work() -> None:
    """Parts of a thing are work but no thing; what an earlier run has done counts and is not told."""
    told: list[Step] = []
    steps = Steps(told.append, "quantize", 3, 100, "weights")
    steps.add("a", 40, tell=False)
    steps.add("b", 10, done=0)
    steps.add("b", 20)
    steps.add("c", 30)
    assert told == [
        Step("quantize", "b", 1, 3, 50, 100, "weights"),
        Step("quantize", "b", 2, 3, 70, 100, "weights"),
        Step("quantize", "c", 3, 3, 100, 100, "weights"),
    ]


def test_nobody_to_tell() -> None:
    steps = Steps(None, "save", 1, 1, "bytes")
    steps.add("a", 1)
    assert (steps.done, steps.work_done) == (1, 1)
