"""What a terminal is told while something takes long."""

from __future__ import annotations

import logging
import sys

import pytest

from uqff.cli import progress
from uqff.progress import Step
from uqff.simd.compiling import LOGGER


def test_compiling_is_told_on_a_line_that_goes_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress.told_of_compiling():
        LOGGER.info("compiling %s", "q4k")
    assert capsys.readouterr().err == f"\r{progress.COMPILING}\x1b[K\r\x1b[K"


def test_compiling_is_told_in_a_bar() -> None:
    told: list[str] = []
    with progress.told_of_compiling(lambda: told.append("told")):
        LOGGER.info("compiling %s", "q4k")
    LOGGER.info("compiling %s", "q6k")
    assert told == ["told"]
    assert LOGGER.level == logging.NOTSET


def test_without_a_terminal_nothing_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.told_of_compiling(), progress.shown_progress():
        LOGGER.info("compiling %s", "q4k")
    assert capsys.readouterr().err == ""


def test_a_bar_makes_way_for_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What a command prints meanwhile goes to its own stream, and the bar is gone before."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with progress.shown_progress() as display:
        assert display is not None
        for done in (1, 2):
            display(Step("verify", "a\x1b[31m", done, 2, 10 * done, 20, "bytes"))
            shown = capsys.readouterr()
            assert (shown.out, f" {done}/2 " in shown.err) == ("", True)
            assert r"a\x1b[31m" in shown.err
            display.hide()
            print("a line")
            hidden = capsys.readouterr()
            assert hidden.out == "a line\n"
            assert hidden.err.endswith("\x1b[1A\x1b[2K")
    assert capsys.readouterr() == ("", "")
