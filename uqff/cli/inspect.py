"""``uqff inspect``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from uqff.cli.options import isq_option, named
from uqff.container import open_uqff
from uqff.container.shards import models_in
from uqff.errors import UqffError, printable
from uqff.inspection.gguf import gguf_meant
from uqff.inspection.remote import looked_into

if TYPE_CHECKING:
    from uqff.inspection import FieldRow, FileSummary, LayerReport, LayerRow, Statistics
    from uqff.inspection.gguf import GgufSummary
    from uqff.inspection.remote import Looked

__all__ = ["inspect"]

_SHOWN_RAW = 8
"""Bytes of a field that fit into the table of fields."""


@click.command(short_help="Show what is in a file, or one layer in full.")
@click.argument("path", type=click.Path())
@click.argument("key", required=False)
@click.option("--hex", "dump", is_flag=True, help="With KEY: dump the layer's bytes, each field annotated.")
@click.option(
    "--hex-bytes",
    "limit",
    type=click.IntRange(min=0),
    default=64,
    show_default=True,
    help="Bytes of each field in the dump; 0 for all.",
)
@click.option(
    "--stats/--no-stats", default=True, show_default=True, help="With KEY or --html: dequantise and measure weights."
)
@click.option(
    "--html",
    "html",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write one page that shows all of the model: types, bytes, layers, fields, histograms.",
)
@isq_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON (described in docs/pages/reference/inspect-json.md).")
@click.pass_context
def inspect(
    ctx: click.Context,
    path: str,
    key: str | None,
    dump: bool,
    limit: int,
    stats: bool,
    html: str | None,
    isq: str | None,
    as_json: bool,
) -> None:
    """Show what is in a file.

    PATH is a .uqff file (the other shards of its set are found), or a model directory. KEY is a layer: its path (0.x
    files have some if config.json stands beside them) or its index, counted from 0 in the order of the table. Then all
    its fields are shown with offset, size, type, bytes and value, and the dequantised weight is measured. Of a
    directory with several models, a line for each is shown; PATH:TYPE is one of them.

    PATH may also be a GGUF file: its metadata and its tensors are listed.

    PATH may name a repository of the Hugging Face hub (owner/name, owner/name@revision, hf://owner/name/file): headers
    and small fields of it are read, and the bytes of the layer KEY.

    Exits with 1 if a layer is broken; the others are shown all the same.
    """
    if dump and key is None:
        raise click.UsageError("--hex needs a KEY")
    if html is not None and (key is not None or as_json):
        raise click.UsageError("--html shows a whole model: it goes with neither KEY nor --json")
    path = named(path, isq, "PATH")
    summary = gguf_meant(path)
    if summary is not None:
        if key is not None or html is not None:
            raise click.UsageError("of a GGUF file, tensors are listed: KEY and --html are for UQFF")
        _show_gguf(summary, as_json)
        return
    with looked_into(path) as looked:
        if html is not None:
            problem = _write_page(looked, html, stats)
            if problem is not None:
                click.echo(f"uqff: {problem}", err=True)
                ctx.exit(1)
            return
        models = models_in(looked.path) if key is None and Path(looked.path).is_dir() else {}
        if len(models) > 1:
            if _inspect_models(looked, models, as_json):
                ctx.exit(1)
            return
        if key is None:
            error = _inspect_file(looked, as_json)
        else:
            error = _inspect_layer(looked, key, dump, limit, stats, as_json)
    if error is not None:
        click.echo(f"uqff: {error}", err=True)
        ctx.exit(1)


def _inspect_file(looked: Looked, as_json: bool) -> str | None:
    from uqff.inspection.document import summary_document
    from uqff.inspection.summary import summarize

    with open_uqff(looked.path) as file:
        summary = looked.shown(summarize(file))
    if as_json:
        _echo_json(summary_document(summary))
    else:
        _show_summary(summary)
    return _problems_of(summary)


def _write_page(looked: Looked, target: str, stats: bool) -> str | None:
    from uqff.cli.progress import shown_progress
    from uqff.container.atomic import atomic_file
    from uqff.container.beside import not_of
    from uqff.inspection.page import page
    from uqff.inspection.summary import summarize

    place = Path(target)
    model = Path(looked.path) if Path(looked.path).is_dir() else Path(looked.path).parent
    if place.parent.resolve() == model.resolve() and not not_of("UQFF model", [place.name]):
        raise click.BadParameter(f"a file of the model has that name: {target!r}", param_hint="'--html'")
    with open_uqff(looked.path) as file, atomic_file(place) as out, shown_progress() as progress:
        summary = looked.shown(summarize(file))
        for part in page(file, summary, statistics=stats and not looked.remote, progress=progress):
            out.write(looked.shown(part).encode("utf-8", "replace"))
    return _problems_of(summary)


def _problems_of(summary: FileSummary) -> str | None:
    problems = [f"{len(summary.broken)} of {len(summary.layers)} layers broken"] if summary.broken else []
    if summary.residual is not None and summary.residual.error is not None:
        problems.append(str(summary.residual.error))
    return "; ".join(problems) or None


def _inspect_models(looked: Looked, models: Mapping[str, Path], as_json: bool) -> bool:
    """Show the models of a directory; tells whether there is something wrong with one."""
    from uqff.cli.render import echo_table, size
    from uqff.inspection.document import SCHEMA, summary_document
    from uqff.inspection.summary import summarize

    rows, documents, wrong = [], [], False
    for name, path in models.items():
        try:
            with open_uqff(path) as file:
                summary = looked.shown(summarize(file))
        except UqffError as error:
            click.echo(f"uqff: {looked.shown(error)}", err=True)
            wrong = True
            continue
        problem = _problems_of(summary)
        if problem is not None:
            click.echo(f"uqff: {printable(name)}: {problem}", err=True)
            wrong = True
        documents.append(summary_document(summary))
        versions = ", ".join(map(str, summary.versions)) or "-"
        kinds = ", ".join(f"{row.layers} {row.kind}" for row in summary.types) or "-"
        bits = "-" if summary.bits_per_weight is None else f"{summary.bits_per_weight:.4f}"
        counts = f"{len(summary.files)}", f"{len(summary.layers)}"
        rows.append([name, versions, *counts, bits, size(summary.nbytes), kinds])
    if as_json:
        _echo_json({"schema": SCHEMA, "models": documents})
    else:
        columns = [("model", "left"), ("version", "left"), ("shards", "right"), ("layers", "right")]
        columns += [("bits/weight", "right"), ("size", "left"), ("types", "left")]
        echo_table(columns, rows, optional=("shards", "types", "size"))
    return wrong


def _inspect_layer(looked: Looked, key: str, dump: bool, limit: int, stats: bool, as_json: bool) -> str | None:
    from uqff.inspection.document import layer_document
    from uqff.inspection.inspect import NoSuchLayer, inspect_layer

    try:
        report = looked.shown(inspect_layer(looked, key, statistics=stats, dump=dump, limit=limit))
    except NoSuchLayer as error:
        raise click.BadParameter(error.problem, param_hint="'KEY'") from None
    if as_json:
        _echo_json(layer_document(report))
    else:
        _show_layer(report)
    return None if report.row.error is None else str(report.row.error)


def _echo_json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2, allow_nan=False))


def _show_summary(summary: FileSummary) -> None:
    from uqff.cli.render import echo_heading, echo_pairs, echo_table, size

    bits = "-" if summary.bits_per_weight is None else f"{summary.bits_per_weight:.4f}"
    pairs = [
        ("generation", summary.generation),
        ("version", ", ".join(map(str, summary.versions)) or "-"),
        ("shards", str(len(summary.files))),
        ("layers", str(len(summary.layers)) + (f", {len(summary.broken)} broken" if summary.broken else "")),
        ("types", ", ".join(f"{row.layers} {row.kind}" for row in summary.types) or "-"),
        ("weights", f"{summary.weights:,}"),
        ("payload", size(summary.payload_bytes)),
        ("bits/weight", bits),
        ("size", size(summary.nbytes)),
        ("residual", _residual_text(summary)),
        *(("layout", note) for note in summary.layout.notes),
        *((("extra", f"{len(summary.extra)} entries of no layer"),) if summary.extra else ()),
        *((f"metadata {name}", text) for name, text in summary.metadata.items()),
    ]
    echo_heading(summary.files[0].path)
    echo_pairs([(printable(name), text) for name, text in pairs])
    if len(summary.files) > 1:
        print()
        columns = [("shard", "left"), ("layers", "right"), ("size", "left")]
        echo_table(columns, ([f.path, str(f.layers), size(f.nbytes)] for f in summary.files))
    if len(summary.types) > 1:
        print()
        columns = [
            (name, "right" if name in ("layers", "weights", "bits/weight") else "left") for name in _TYPE_COLUMNS
        ]
        echo_table(
            columns,
            (
                [t.kind, str(t.layers), f"{t.weights:,}", f"{t.bits_per_weight:.4f}", size(t.payload_bytes)]
                for t in summary.types
            ),
        )
    print()
    _show_layers(summary)


def _show_gguf(summary: GgufSummary, as_json: bool) -> None:
    from uqff.cli.render import echo_heading, echo_pairs, echo_table, size
    from uqff.inspection.gguf import gguf_document

    if as_json:
        _echo_json(gguf_document(summary))
        return
    bits = "-" if summary.bits_per_weight is None else f"{summary.bits_per_weight:.4f}"
    echo_heading(summary.files[0].path)
    pairs = [
        ("format", f"GGUF {summary.version}"),
        ("files", str(len(summary.files))),
        ("tensors", str(len(summary.tensors))),
        ("types", ", ".join(f"{row.layers} {row.kind}" for row in summary.types) or "-"),
        ("weights", f"{summary.weights:,}"),
        ("payload", size(summary.payload_bytes)),
        ("bits/weight", bits),
        ("size", size(summary.nbytes)),
        *((f"metadata {name}", _metadata_text(value)) for name, value in summary.metadata.items()),
    ]
    echo_pairs([(printable(name), text) for name, text in pairs])
    print()
    columns = [("tensor", "left"), ("type", "left"), ("shape", "left")]
    columns += [(name, "right") for name in ("weights", "bytes", "offset")]
    columns += [("file", "left")] if len(summary.files) > 1 else []
    rows = (
        [row.name, row.type, _shape_text(row.shape), f"{row.weights:,}"]
        + ["-" if row.nbytes is None else f"{row.nbytes:,}", f"{row.offset:,}"]
        + ([row.path] if len(summary.files) > 1 else [])
        for row in summary.tensors
    )
    echo_table(columns, rows, optional=("offset", "weights", "file"))


def _metadata_text(value: Any) -> str:
    """A value of metadata in one line, long texts cut."""
    from uqff.inspection.gguf import ListedArray
    from uqff.inspection.values import number_text

    if isinstance(value, ListedArray):
        more = ", ..." if value.count > len(value.first) else ""
        return f"{value.count:,} {value.type}: [{', '.join(map(_metadata_text, value.first))}{more}]"
    text = number_text(value) if isinstance(value, float) else str(value)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}... ({len(text):,} characters)"


_LONGEST_TEXT = 80
"""Characters of a text of metadata that are shown."""

_TYPE_COLUMNS = ("type", "layers", "weights", "bits/weight", "payload")


def _residual_text(summary: FileSummary) -> str:
    from uqff.cli.render import size

    residual = summary.residual
    if residual is None:
        return "-"
    if residual.error is not None:
        return f"broken: {residual.error.problem}"
    return f"{residual.tensors} tensors, {size(residual.nbytes)}"


def _show_layers(summary: FileSummary) -> None:
    from uqff.cli.render import echo_table

    named = any(row.module is not None for row in summary.layers)
    columns = [
        ("layer", "right" if summary.generation == "0.x" else "left"),
        *((("weight", "left"),) if named else ()),
        ("type", "left"),
        ("family", "left"),
        ("shape", "left"),
        ("weights", "right"),
        ("bits/weight", "right"),
        ("payload", "right"),
        ("bias", "left"),
        ("offset", "right"),
        ("size", "right"),
    ]
    if len(summary.files) > 1:
        columns.append(("file", "left"))
    broken = bool(summary.broken)
    if broken:
        columns.append(("error", "left"))
    rows = []
    for row in summary.layers:
        names = [row.key, row.module or "-"] if named else [row.key]
        cells = [*names, *_meta_cells(row), f"{row.offset:,}", f"{row.nbytes:,}"]
        if len(summary.files) > 1:
            cells.append(row.path)
        if broken:
            cells.append("" if row.error is None else _error_text(row.error))
        rows.append(cells)
    echo_table(columns, rows, optional=_OPTIONAL)


_OPTIONAL = ("offset", "family", "weights", "size", "payload", "bias", "bits/weight", "file")
"""Columns of layers that a narrow terminal does without, the first one first."""


def _error_text(error: UqffError) -> str:
    """Without file and layer, which the row shows."""
    short = UqffError(error.problem, field=error.field, offset=error.offset, expected=error.expected, got=error.got)
    return str(short)


def _meta_cells(row: LayerRow) -> list[str]:
    meta = row.meta
    if meta is None:
        return ["broken", "-", "-", "-", "-", "-", "-"]
    return [
        meta.kind,
        meta.family.title,
        _shape_text(meta.shape),
        f"{meta.weights:,}",
        f"{row.bits_per_weight:.4f}",
        f"{meta.payload_bytes:,}",
        "-" if meta.bias is None else f"{meta.bias[0].name} {_shape_text(meta.bias[1])}",
    ]


def _shape_text(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _show_layer(report: LayerReport) -> None:
    from uqff.cli.render import echo_heading, echo_pairs, echo_table, size

    row, meta = report.row, report.row.meta
    echo_heading(f"{row.path}: layer {row.key}")
    stored = "entries" if row.index is None else "blob"
    pairs = [("weight", row.module)] if row.module is not None else []
    pairs.append((stored, f"{size(row.nbytes)} at {row.offset:,}" if row.index is not None else size(row.nbytes)))
    if meta is not None:
        pairs += [
            ("version", str(meta.version)),
            ("type", f"{meta.kind} ({meta.family.title})"),
            ("shape", f"{_shape_text(meta.shape)}, {meta.weights:,} weights"),
            ("payload", size(meta.payload_bytes)),
            ("bits/weight", f"{row.bits_per_weight:.4f}"),
            ("bias", _meta_cells(row)[-1]),
        ]
    if row.error is not None:
        pairs.append(("broken", _error_text(row.error)))
    echo_pairs(pairs)
    print()
    columns = [(name, "right" if name in ("offset", "size") else "left") for name in _FIELD_COLUMNS]
    echo_table(columns, map(_field_cells, report.fields), optional=("bytes", "type"))
    if report.hexdump is not None:
        print()
        for line in report.hexdump:
            print(printable(str(line)))
    if report.statistics is not None:
        print()
        _show_statistics(report.statistics)


_FIELD_COLUMNS = ("offset", "size", "type", "field", "bytes", "value")


def _field_cells(field: FieldRow) -> list[str]:
    from uqff.inspection.values import number_text, value_text

    raw = field.raw[:_SHOWN_RAW].hex(" ") + (" ..." if field.nbytes > _SHOWN_RAW else "")
    value = value_text(field.value)
    if field.preview is not None:
        more = ["..."] if field.preview_is_partial else []
        value = ", ".join([*map(number_text, field.preview), *more])
    return [f"{field.offset:,}", f"{field.nbytes:,}", field.type, field.path, raw, value]


def _show_statistics(found: Statistics) -> None:
    from uqff.cli.render import bar, echo_heading, echo_pairs, echo_table, number

    echo_heading("dequantised weight")
    echo_pairs(
        [
            ("min", number(found.min)),
            ("max", number(found.max)),
            ("mean", number(found.mean)),
            ("std", number(found.std)),
            ("abs mean", number(found.abs_mean)),
            ("zeros", f"{found.zeros:,} ({found.zeros_percent:.2f} %)"),
            ("NaN", f"{found.nan:,}"),
            ("Inf", f"{found.inf:,}"),
        ]
    )
    print()
    most = max(found.histogram)
    edges = found.edges
    echo_table(
        [("from", "right"), ("to", "right"), ("weights", "right"), ("", "left")],
        (
            [number(edges[at]), number(edges[at + 1]), f"{count:,}", bar(count, most)]
            for at, count in enumerate(found.histogram if edges else ())
        ),
    )
