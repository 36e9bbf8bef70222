"""What is measured of one type: in a module of its own, which processes that are begun anew can import."""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import uqff

__all__ = ["EFFORTS", "row_of"]

EFFORTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "best": {"effort": "best"},
    "importance": {"effort": "best", "imatrix": True},
    "calibrated": {"effort": "calibrated", "hessian": True},
}
"""How each type is made; with what is known of inputs, where it says True."""


def row_of(path: Path, kind: str, options: dict[str, Any], **how: Any) -> dict[str, Any]:
    """What is measured of one type or recipe: quantised to a directory that does not stay."""
    started = time.monotonic()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore", uqff.FallbackWarning)
        uqff.quantize_model(path, Path(folder) / "made", kind, measure=False, **how)
        found = uqff.evaluate(Path(folder) / "made", **options)
    far = found.distances
    assert far is not None
    return {
        "perplexity": found.perplexity.value,
        "kld": far.kld.value,
        "kld_error": far.kld.error or 0.0,
        "kld_99": far.kld_percentiles[99.0].value,
        "same_top": far.same_top.value,
        "seconds": time.monotonic() - started,
    }
