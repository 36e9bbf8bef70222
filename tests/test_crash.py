"""A short run of ``make crash``: writers killed before some of their calls, and on full disks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

from tools.crash.cases import FAILED, Cases
from tools.crash.writers import WRITERS, State, Writer

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler: make crash"
)


ONE_IN, FIRST = 7, 3


def test_old_or_new_after_every_kill() -> None:
    """Nothing between, nothing lost, nothing left behind; the same cases in each run, but for the kills in a row.

    All of them: ``make crash``.
    """
    command = [sys.executable, "-W", "ignore", "-m", "tools.crash", "--only", "save, set over set"]
    command += ["--one-in", str(ONE_IN), "--first", str(FIRST), "--chains", "0.5", "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == 0, done.stdout + done.stderr
    match = re.search(r"^([0-9]+) kills, ([0-9]+) full disks, 0 problems$", done.stdout, re.M)
    calls = re.search(r"^save, set over set +([0-9]+) calls +([0-9]+) kills, ", done.stdout, re.M)
    rows = re.search(r"^in a row +([0-9]+) kills, 0 full disks, 0 problems$", done.stdout, re.M)
    assert match is not None
    assert calls is not None
    assert rows is not None
    assert int(calls[2]) == len(range(FIRST, int(calls[1]), ONE_IN)) > 8
    assert int(match[1]) == int(calls[2]) + int(rows[1]) > int(calls[2])


def test_what_is_to_be_replaced_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a kill over a model would be one over nothing, and prove nothing."""
    cases = object.__new__(Cases)
    cases.sources, cases.place = tmp_path / "sources", tmp_path / "place"
    monkeypatch.setattr(cases, "_fork", lambda *_: (FAILED, 0))
    with pytest.raises(SystemExit, match=r"^save, file over file: what it is to replace cannot be made \(3\)$"):
        cases.scene(next(at for at, each in enumerate(WRITERS) if each.name == "save, file over file"))


def test_what_may_be_there_after_a_kill() -> None:
    """All old or all new; where files are replaced one after the other, each is; nothing, only where that is said."""

    def allows(between: Literal["", "each", "none"], found: State) -> bool:
        writer = Writer("a", lambda *_: None, lambda *_: None, lambda _: {}, between)
        return writer.allows(found, {"a": "1", "b": "1"}, {"a": "2", "b": "2"})

    mixed, half, other = {"a": "1", "b": "2"}, {"a": "1"}, {"a": "1", "b": "3"}
    for state in ({"a": "1", "b": "1"}, {"a": "2", "b": "2"}):
        assert all(allows(between, state) for between in ("", "each", "none"))
    assert [allows("", state) for state in (mixed, half, other, {})] == [False, False, False, False]
    assert [allows("each", state) for state in (mixed, half, other, {})] == [True, False, False, False]
    assert [allows("none", state) for state in (mixed, half, other, {})] == [False, False, False, True]
