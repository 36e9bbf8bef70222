"""Documents that are parsed whole: what they may cost before anything is known of them."""

from __future__ import annotations

import json
import os
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from uqff import FormatError
from uqff.bounded_json import check_values
from uqff.container.document import read_at_most, read_json
from uqff.container.report import read_report
from uqff.limits import MAX_CONFIG_BYTES, MAX_DIGITS, MAX_HEADER_VALUES, MAX_REPORT_BYTES
from uqff.quantization.recipe import load_recipe


def peak(call: Callable[[], object]) -> int:
    """Bytes allocated at most."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_no_more_than_the_bound_and_one_byte(tmp_path: Path) -> None:
    """The one byte more tells a longer file from one that just fits."""
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert [read_at_most(path, most) for most in (3, 4, 5, 6)] == [b"1234", b"12345", b"12345", b"12345"]


def test_a_small_document_costs_its_size(tmp_path: Path) -> None:
    """The bounds are 10 and 100 million bytes; a file of a hundred bytes must not take as much."""
    path = tmp_path / "uqff_report.json"
    report = {"schema": 1, "generated_by": {"tool": "t"}, "uqff_version": "1.2.0", "outputs": []}
    path.write_text(json.dumps(report))
    calls: list[Callable[[], object]] = [
        lambda: read_at_most(path, MAX_REPORT_BYTES),
        lambda: read_report(path),
        lambda: read_json(path, MAX_CONFIG_BYTES),
    ]
    for call in calls:
        assert peak(call) < 256 * 1024


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_recipe_may_come_out_of_a_pipe(tmp_path: Path) -> None:
    """A pipe has no length: it is read to its end."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=("0-2:\n  isq: q8_0\n",))
    writer.start()
    (rule,) = load_recipe(path).rules
    writer.join()
    assert (rule.span, rule.kind) == ((0, 2), "q8_0")


def test_values_are_counted_before_they_are_made(tmp_path: Path) -> None:
    """A list of a hundred million small values takes gigabytes as Python objects; one less than too many is parsed."""
    check_values(b"," * MAX_HEADER_VALUES)
    check_values(b"{" * (MAX_HEADER_VALUES // 2))
    for raw in (b"[" * (MAX_HEADER_VALUES + 1), b"{" * (MAX_HEADER_VALUES // 2 + 1)):
        with pytest.raises(FormatError, match="too many values"):
            check_values(raw)
    path = tmp_path / "x.json"
    path.write_bytes(b'{"a":[' + b"0," * (MAX_HEADER_VALUES - 2) + b"0]}")
    for read in (read_report, lambda p: read_json(p, MAX_REPORT_BYTES)):
        with pytest.raises(FormatError, match="too many values") as caught:
            read(path)
        assert caught.value.file == str(path)
        assert caught.value.got == MAX_HEADER_VALUES + 1


def test_integers_that_no_float_holds_are_refused(tmp_path: Path) -> None:
    """Whoever makes a float of one would fail with an OverflowError; digits within a text are no integer."""
    path = tmp_path / "config.json"
    path.write_text(f'{{"a": {"9" * MAX_DIGITS}, "b": "{"9" * 400}"}}')
    assert read_json(path, MAX_CONFIG_BYTES) == {"a": 10**MAX_DIGITS - 1, "b": "9" * 400}
    for digits in ("1" * 400, "-" + "1" * (MAX_DIGITS + 1)):
        path.write_text(f'{{"a": {digits}}}')
        with pytest.raises(FormatError, match=f"not JSON: got an integer of {len(digits)} digits") as caught:
            read_json(path, MAX_CONFIG_BYTES)
        assert caught.value.file == str(path)
