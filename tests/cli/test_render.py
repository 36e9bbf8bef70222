"""Tables for people: what a narrow terminal gets, and what a pipe does."""

from __future__ import annotations

import sys

import pytest

from uqff.cli.render import echo_pairs, echo_table

COLUMNS = [("layer", "left"), ("bytes", "right"), ("note", "left")]
ROWS = [("model.layers.0", "1,234", "seven"), ("lm_head", "5", "")]


@pytest.mark.parametrize(
    ("columns", "header", "left_out"),
    [
        (28, "layer           bytes  note", None),
        (27, "layer           note", "(too narrow for: bytes)"),
        (20, "layer", "(too narrow for: bytes, note)"),
        (5, "layer", "(too narrow for: bytes, note)"),
    ],
)
def test_columns_that_a_terminal_has_no_room_for(
    columns: int,
    header: str,
    left_out: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Optional columns go one after another, and are named; what is left stays whole."""
    with monkeypatch.context() as until:  # pytest asks for the width as well, before the test has ended
        until.setattr(sys.stdout, "isatty", lambda: True)
        until.setenv("COLUMNS", str(columns))
        until.setenv("NO_COLOR", "1")
        until.setenv("TERM", "dumb")
        echo_table(COLUMNS, ROWS, optional=("bytes", "note"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == header
    assert lines[1].startswith("model.layers.0")
    assert lines[3:] == ([] if left_out is None else [left_out])


def test_a_pipe_gets_all_columns(capsys: pytest.CaptureFixture[str]) -> None:
    """A table in a file has no width."""
    echo_table(COLUMNS, ROWS, optional=("bytes", "note"))
    assert capsys.readouterr().out.splitlines() == [
        "layer           bytes  note",
        "model.layers.0  1,234  seven",
        "lm_head             5",
    ]


def test_one_long_cell_does_not_widen_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    """A name of a hundred thousand letters stands out of its column; twenty thousand rows must not grow with it."""
    long = "a" * 100_000
    echo_table([("layer", "left"), ("bytes", "right")], [(long, "5"), ("b", "6")])
    head, first, second = capsys.readouterr().out.splitlines()
    assert first == f"{long}      5"
    assert len(head) == len(second) == 400 + 2 + len("bytes")
    echo_pairs([(long, "x"), ("b", "y")])
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"  {long}  x"
    assert second == "  b".ljust(400) + "  y"
