"""The same findings as JSON documents, schema 1, described in ``docs/pages/reference/inspect-json.md``."""

from __future__ import annotations

from typing import Any

from uqff.errors import UqffError
from uqff.inspection.layer import LayerReport
from uqff.inspection.statistics import Statistics
from uqff.inspection.summary import FileSummary, LayerRow, Totals
from uqff.inspection.values import json_value

__all__ = ["SCHEMA", "layer_document", "summary_document", "totals_document", "types_document"]

SCHEMA = 1
"""Raised when a member is renamed, removed or changes its meaning; new members do not raise it."""


def summary_document(summary: FileSummary) -> dict[str, Any]:
    """A model as a JSON object."""
    residual = summary.residual
    return {
        "schema": SCHEMA,
        "generation": summary.generation,
        "versions": [str(version) for version in summary.versions],
        "files": [{"path": f.path, "bytes": f.nbytes, "layers": f.layers} for f in summary.files],
        "metadata": summary.metadata,
        "residual": None
        if residual is None
        else {
            "path": residual.path,
            "bytes": residual.nbytes,
            "tensors": residual.tensors,
            "error": _error(residual.error),
        },
        "totals": {
            "layers": len(summary.layers),
            "broken": len(summary.broken),
            **totals_document(summary),
        },
        "types": types_document(summary, "layers"),
        "layers": [_layer(row) for row in summary.layers],
        "layout": summary.layout.keys,
        "extra": [{"name": row.name, "dtype": row.dtype, "shape": list(row.shape)} for row in summary.extra],
    }


def totals_document(totals: Totals) -> dict[str, Any]:
    """What the weights of a model take together."""
    return {
        "bytes": totals.nbytes,
        "weights": totals.weights,
        "payload_bytes": totals.payload_bytes,
        "bits_per_weight": totals.bits_per_weight,
    }


def types_document(totals: Totals, counted: str) -> list[dict[str, Any]]:
    """The same by types.

    Args:
        totals: of a model.
        counted: what its weights are called.
    """
    return [
        {
            "type": row.kind,
            counted: row.layers,
            "weights": row.weights,
            "payload_bytes": row.payload_bytes,
            "bits_per_weight": row.bits_per_weight,
        }
        for row in totals.types
    ]


def layer_document(report: LayerReport) -> dict[str, Any]:
    """One layer as a JSON object."""
    document = {
        "schema": SCHEMA,
        "layer": _layer(report.row),
        "fields": [
            {
                "path": field.path,
                "offset": field.offset,
                "bytes": field.nbytes,
                "type": field.type,
                "raw": field.raw.hex(),
                "value": json_value(field.value),
                "preview": json_value(field.preview),
                "meaning": field.meaning,
            }
            for field in report.fields
        ],
        "statistics": None if report.statistics is None else _statistics(report.statistics),
    }
    if report.hexdump is not None:
        document["hexdump"] = [
            {
                "offset": line.offset,
                "raw": line.data.hex(),
                "skipped": line.skipped,
                "field": line.field,
                "value": line.value,
                "meaning": line.meaning,
            }
            for line in report.hexdump
        ]
    return document


def _layer(row: LayerRow) -> dict[str, Any]:
    meta = row.meta
    return {
        "key": row.key,
        "index": row.index,
        "module": row.module,
        "file": row.path,
        "offset": row.offset,
        "bytes": row.nbytes,
        "version": None if meta is None else str(meta.version),
        "family": None if meta is None else json_value(meta.family),
        "type": None if meta is None else meta.kind,
        "shape": None if meta is None else list(meta.shape),
        "weights": None if meta is None else meta.weights,
        "payload_bytes": None if meta is None else meta.payload_bytes,
        "bits_per_weight": row.bits_per_weight,
        "bias": None
        if meta is None or meta.bias is None
        else {"dtype": meta.bias[0].name, "shape": list(meta.bias[1])},
        "error": _error(row.error),
    }


def _statistics(found: Statistics) -> dict[str, Any]:
    return {
        "count": found.count,
        "nan": found.nan,
        "inf": found.inf,
        "zeros": found.zeros,
        "min": found.min,
        "max": found.max,
        "mean": found.mean,
        "std": found.std,
        "abs_mean": found.abs_mean,
        "histogram": {"edges": found.edges, "counts": list(found.histogram)},
    }


def _error(error: UqffError | None) -> dict[str, Any] | None:
    if error is None:
        return None
    return {
        "problem": error.problem,
        "file": error.file,
        "layer": error.layer,
        "field": error.field,
        "offset": error.offset,
        "expected": None if error.expected is None else str(error.expected),
        "got": None if error.got is None else str(error.got),
    }
