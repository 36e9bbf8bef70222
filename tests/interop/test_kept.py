"""tools/interop/kept.py: what counts as a difference, without a client."""

from __future__ import annotations

from pathlib import Path

from tools.interop import kept
from tools.interop.client import Generation
from tools.interop.running import Case, Row
from tools.tiny.quantised import METHODS


def test_a_client_that_cannot_run_what_was_kept_has_failed() -> None:
    """Elsewhere such rows are idle: the file is the client's own."""
    answer = Generation(["t5"], [-0.25], "stop")
    ran, idle = (Case("0.9.5", "llama", "mlx", Path(), given) for given in (answer, None))
    right, other, none = Row(ran, True, 0.0), Row(ran, True, 0.0, same_tokens=False), Row(idle, True, 0.0)
    assert kept.failed([right, other, none]) == [other, none]
    assert {*kept.METHODS} <= {*METHODS}
