"""What a terminal is told while something takes long."""

from __future__ import annotations

import logging
import sys

import pytest

from uqff.cli import progress
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
