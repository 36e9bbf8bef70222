"""Tables of measurements: pages get what the kept JSON has, and keep theirs where nothing was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.bench.__main__ import MARK as BENCH
from tools.bench.__main__ import PAGES, SECTIONS, SUMMARIES, filled
from tools.bench.multiplying import BATCHES, KINDS, summary
from tools.quality import tables

ROW = {"kld": 0.0123456, "kld_error": 0.0001}
DOCUMENT = {
    "model": "small",
    "context": 256,
    "windows": 16,
    "calibrated": 256,
    "python": "3.12.3",
    "machine": "4 threads of a CPU",
    "perplexity": {"value": 36.818, "error": 1.961},
    "types": {
        "q8_0": {"bits": 8.5, **dict.fromkeys(tables.EFFORTS, ROW)},
        "q4k": {"bits": 4.5, **dict.fromkeys(tables.EFFORTS, ROW)},
    },
    "mixes": {},
}


def test_pages_get_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types by size; a table without measurements stays as it is; settings and machine stand above."""
    page = tmp_path / "page.md"
    kept = "<!-- measured: small mixes -->\nold\n<!-- end -->\n"
    page.write_text(f"a\n<!-- measured: small efforts -->\nold\n<!-- end -->\nb\n{kept}")
    (tmp_path / "small-256-16.json").write_text(json.dumps(DOCUMENT))
    monkeypatch.setattr(tables, "PAGES", (page,))
    cell = " | 12.3 ± 0.10" * 4
    ((path, text),) = tables.wanted(tmp_path)
    assert path == page
    assert text == (
        "a\n<!-- measured: small efforts -->\n"
        "Mean KL divergence, in thousandths, of the small Llama of `make quality` (perplexity 36.82 ± 1.96) on 16 "
        "windows of 256\ntokens of one part of Python 3.12.3's standard library; importance and Hessians of 256 "
        "windows of another; 4 threads of\na CPU.\n\n"
        "| type | bits/weight | plain | best | importance | calibrated |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        f"| q4k | 4.50{cell} |\n"
        f"| q8_0 | 8.50{cell} |\n"
        f"<!-- end -->\nb\n{kept}"
    )


def test_pages_get_what_was_timed() -> None:
    """The section that was measured is replaced, and tells of the machine; another stays."""
    facts = {"processor": "a CPU", "threads": "2", "python": "3.12", "torch": "2.9", "numba": "0.60"}
    kept = "<!-- measured: bench models -->\nold\n<!-- end -->\n"
    page = f"a\n<!-- measured: bench rates -->\nold\n<!-- end -->\nb\n{kept}"
    result = {"machine": {**facts, "load when begun": "0.1"}, "rates": [{"type": "q4k", "engine": 1.5}]}
    assert filled(page, result) == (
        "a\n<!-- measured: bench rates -->\n"
        "a CPU, threads 2, python 3.12, torch 2.9, numba 0.60; load when begun 0.1.\n\n"
        "| type | engine |\n| --- | --- |\n| q4k | 1.5 |\n"
        f"<!-- end -->\nb\n{kept}"
    )


def test_places_for_what_is_timed() -> None:
    """Each section but those that the page tells of in a sentence has its place, and the summary has README's."""
    page, readme = ({match[2] for match in BENCH.finditer(path.read_text("utf-8"))} for path in PAGES)
    assert page <= set(SECTIONS)
    assert {"quantising", "dequantising", "engine", "models", "opening", "multiplying", "rates"} <= page
    assert readme == {"products"}
    assert set(SUMMARIES.values()) <= set(SECTIONS)


def test_the_summary_of_products() -> None:
    """The median beside float32 of each type by rows, and what the engine's arithmetic reaches where it differs."""
    rows: list[dict[str, object]] = [
        {"type": kind, "batch": batch, "× float32": f"{batch}.50 (9.99)", "engine's, × float32": ""}
        for kind in KINDS
        for batch in BATCHES
    ]
    rows[0]["engine's, × float32"] = "4.25 (5.00)"
    table = summary(rows)
    assert [row[""] for row in table] == ["1 row", "1 row, engine's arithmetic", "8 rows", "64 rows"]
    assert [row["q4_0"] for row in table] == ["1.50", "4.25", "8.50", "64.50"]
    assert [row["mxfp4"] for row in table] == ["1.50", "", "8.50", "64.50"]
