"""Tables of measurements: pages get what the kept JSON has, and keep theirs where nothing was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
