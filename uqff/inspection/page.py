"""A model as one page of HTML: types, a map of its bytes, every layer with its fields and a histogram of its weight.

The page has no script and asks for nothing: what it shows is in it.  Names and values come from files, so everything is
escaped, and a policy in the page forbids whatever it does not have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Final

from uqff.container.file import UqffFile
from uqff.errors import printable, shortened
from uqff.inspection.layer import FieldRow, LayerReport, report_layer
from uqff.inspection.statistics import Statistics
from uqff.inspection.summary import FileSummary, LayerRow
from uqff.inspection.values import number_text, value_text
from uqff.progress import Progress, Steps

__all__ = ["MAX_DETAILED", "page"]

MAX_DETAILED: Final = 5000
"""Layers that are shown in full; of a model with more, the page says so."""

SHOWN_RAW: Final = 32
"""Bytes of a field that are shown."""

COLUMNS: Final = (("", "layer"), ("", "type"), ("", "shape"), ("n", "bits/weight"), ("n", "bytes"))
"""What is in the line of a layer, and whether it is a number."""

STYLE: Final = """
:root { color-scheme: light dark; --line: #8884; --faint: #666; --error: #c22; }
@media (prefers-color-scheme: dark) { :root { --faint: #aaa; --error: #f77; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; color: var(--faint); font-weight: 500; }
th, td { padding: .2rem .6rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.k, code, pre { font-family: ui-monospace, monospace; font-size: .87em; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: fit-content(45%) minmax(0, 1fr); gap: .1rem 1rem; align-items: start; }
dt { color: var(--faint); overflow-wrap: anywhere; } dd { margin: 0; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; }
.map { height: 34px; background: var(--line); } .histogram { max-width: 26rem; }
i.t { display: inline-block; width: .8em; height: .8em; border-radius: .15em; margin-right: .4em; }
details { border-bottom: 1px solid var(--line); } summary { cursor: pointer; }
summary, .columns { display: grid; gap: 0 1rem; padding: .25rem 0;
  grid-template-columns: minmax(10rem, 3fr) 7rem 9rem 5rem 8rem; }
summary span.n, .columns span.n { text-align: right; font-variant-numeric: tabular-nums; }
.error { color: var(--error); } .columns { color: var(--faint); border-bottom: 1px solid var(--line); }
summary code::before { content: "\\25b8  "; color: var(--faint); }
details[open] > summary code::before { content: "\\25be  "; }
td:first-child, td:nth-child(-n+4).k { white-space: nowrap; } td:nth-child(5).k { min-width: 16rem; }
details > div { padding: .3rem 0 1rem 1rem; } .faint { color: var(--faint); } .wide { overflow-x: auto; }
@media (max-width: 50rem) {
  summary, .columns { gap: 0 .3rem;
    grid-template-columns: minmax(0, 5fr) minmax(0, 5fr) minmax(0, 6fr) minmax(0, 5fr); }
  th, td { padding-right: .3rem; }
  summary code, .columns span:first-child { grid-column: 1 / -1; } details > div { padding-left: 0; }
  summary span, .columns span { overflow-wrap: anywhere; }
}
"""


def page(
    file: UqffFile, summary: FileSummary, *, statistics: bool = True, progress: Progress | None = None
) -> Iterator[str]:
    """The page, piece by piece.

    Args:
        file: an open model.
        summary: of it, see :func:`uqff.inspection.summary.summarize`, with the names that are to be shown.
        statistics: dequantise each weight and draw its histogram; imports torch. If False, no weight is looked at, and
            the bytes of payloads are not shown.
        progress: called after each layer.
    """
    kinds = [row.kind for row in summary.types]
    colours = {kind: f"hsl({round(360 * at / max(len(kinds), 1))} 60% 52%)" for at, kind in enumerate(kinds)}
    title = escape(printable(summary.files[0].path))
    yield (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
    )
    yield _facts(summary)
    yield _types(summary, colours)
    yield "<h2>Bytes</h2>\n"
    yield from _maps(file, summary, colours)
    yield "<h2>Layers</h2>\n"
    if len(summary.layers) > MAX_DETAILED:
        yield f'<p class="error">The first {MAX_DETAILED:,} of {len(summary.layers):,} layers are shown in full.</p>\n'
    if not statistics:
        yield '<p class="faint">The weights were not read: no histograms.</p>\n'
    yield f'<div class="columns">{_cells(COLUMNS)}</div>\n'
    steps = Steps(progress, "inspect", len(summary.layers), sum(row.nbytes for row in summary.layers), "bytes")
    for at, row in enumerate(summary.layers):
        report = report_layer(file, row.key, statistics=statistics) if at < MAX_DETAILED else None
        yield _layer(row, report, colours, statistics)
        file.release(row.key)
        steps.add(row.key, row.nbytes)
    yield "</body>\n</html>\n"


def _facts(summary: FileSummary) -> str:
    bits = "-" if summary.bits_per_weight is None else f"{summary.bits_per_weight:.4f}"
    rest = summary.residual
    residual = "-" if rest is None else f"{rest.tensors:,} tensors, {rest.nbytes:,} bytes"
    facts = [
        ("generation", summary.generation),
        ("version", ", ".join(map(str, summary.versions)) or "-"),
        ("layers", f"{len(summary.layers):,}" + (f", {len(summary.broken)} broken" if summary.broken else "")),
        ("weights", f"{summary.weights:,}"),
        ("bits/weight", bits),
        ("size", f"{summary.nbytes:,} bytes in {len(summary.files)} file{'s' * (len(summary.files) != 1)}"),
        ("residual", residual if rest is None or rest.error is None else f"broken: {rest.error.problem}"),
        *(("layout", note) for note in summary.layout.notes),
        *((("extra", f"{len(summary.extra):,} entries of no layer"),) if summary.extra else ()),
        *((f"metadata {name}", text) for name, text in summary.metadata.items()),
    ]
    return "<dl>\n" + "".join(f"<dt>{_text(name)}</dt><dd>{_text(text)}</dd>\n" for name, text in facts) + "</dl>\n"


def _types(summary: FileSummary, colours: dict[str, str]) -> str:
    rows = [
        (f"{_dot(colours[row.kind])}{_text(row.kind)}", f"{row.layers:,}", f"{row.weights:,}",
         f"{row.bits_per_weight:.4f}", f"{row.payload_bytes:,}")
        for row in summary.types
    ]  # fmt: skip
    return "<h2>Types</h2>\n" + _table(("type", "layers", "weights", "bits/weight", "payload bytes"), rows)


def _maps(file: UqffFile, summary: FileSummary, colours: dict[str, str]) -> Iterator[str]:
    """Each file as a strip: every blob, or entry, where it lies, in the colour of its type."""
    sizes = {path.name: row.nbytes for path, row in zip(file.paths, summary.files, strict=True)}
    bars: dict[str, list[str]] = {name: [] for name in sizes}
    for row in summary.layers:  # once for all files: a set may have thousands of them
        colour = "#c33" if row.meta is None else colours[row.meta.kind]
        for suffix, place in file.places(row.key).items():
            scale = 1000 / max(sizes[place.path.name], 1)
            label = f"{row.key}{'.' * bool(suffix)}{suffix}: {place.nbytes:,} bytes at {place.offset:,}"
            bars[place.path.name].append(
                f'<rect x="{place.offset * scale:.2f}" width="{max(place.nbytes * scale, 0.3):.2f}" height="34" '
                f'fill="{colour}"><title>{_text(label)}</title></rect>'
            )
    for name, size in sizes.items():
        yield f'<p class="faint">{_text(name)}: {size:,} bytes</p>\n'
        what = _text(f"map of the bytes of {name}")
        yield f'<svg class="map" viewBox="0 0 1000 34" preserveAspectRatio="none" role="img" aria-label="{what}">'
        yield f"{''.join(bars[name])}</svg>\n"


def _layer(row: LayerRow, report: LayerReport | None, colours: dict[str, str], weights: bool) -> str:
    meta, name = row.meta, row.key if row.module is None else f"{row.key} {row.module}"
    if meta is None:
        cells = [("", '<span class="error">broken</span>'), ("", ""), ("n", ""), ("n", f"{row.nbytes:,}")]
    else:
        bits = 8 * meta.payload_bytes / meta.weights
        shape = " x ".join(map(str, meta.shape))
        cells = [("", f"{_dot(colours[meta.kind])}{_text(meta.kind)}"), ("", shape)]
        cells += [("n", f"{bits:.3f}"), ("n", f"{row.nbytes:,}")]
    line = f"<code>{_text(name)}</code>" + _cells(cells)
    if report is None:
        return f"<details><summary>{line}</summary></details>\n"
    parts = []
    if row.error is not None:
        parts.append(f'<p class="error">{_text(str(row.error))}</p>\n')
    if report.statistics is not None:
        parts.append(_histogram(report.statistics))
    fields = [
        (f"{field.offset:,}", f"{field.nbytes:,}", _text(field.type), _text(field.path), _value(field, weights))
        for field in report.fields
    ]
    parts.append(_table(("offset", "bytes", "type", "field", "value"), fields, right=2, code=True))
    return f"<details><summary>{line}</summary><div>\n{''.join(parts)}</div></details>\n"


def _cells(cells: Iterable[tuple[str, str]]) -> str:
    """Cells of a line, of HTML, each with its class."""
    return "".join(f'<span class="{kind}">{text}</span>' for kind, text in cells)


def _value(field: FieldRow, weights: bool) -> str:
    if field.value is not None:
        return _text(value_text(field.value)) + f' <span class="faint">{_text(field.meaning)}</span>'
    if not weights:
        return f'<span class="faint">{_text(field.meaning)}</span>'
    raw = field.raw[:SHOWN_RAW].hex(" ") + (" ..." if field.nbytes > SHOWN_RAW else "")
    return f'{raw} <span class="faint">{_text(field.meaning)}</span>'


def _histogram(found: Statistics) -> str:
    most = max([*found.histogram, 1])
    width, bars = 400 / max(len(found.histogram), 1), []
    for at, count in enumerate(found.histogram):
        height = 80 * count / most
        edges = f"{number_text(found.edges[at])} to {number_text(found.edges[at + 1])}" if found.edges else ""
        bars.append(
            f'<rect x="{at * width:.1f}" y="{80 - height:.2f}" width="{width - 1:.1f}" height="{height:.2f}" '
            f'fill="currentColor" opacity=".6"><title>{_text(f"{edges}: {count:,}")}</title></rect>'
        )
    numbers = [(name, getattr(found, name)) for name in ("min", "max", "mean", "std")]
    text = ", ".join(f"{name} {number_text(value)}" for name, value in numbers if value is not None)
    odd = [f"{count:,} {name}" for name, count in (("NaN", found.nan), ("infinite", found.inf)) if count]
    return (
        f'<svg class="histogram" viewBox="0 0 400 80" role="img" aria-label="histogram">{"".join(bars)}</svg>\n'
        f'<p class="faint">{_text(", ".join([text, f"{found.zeros:,} zeros", *odd]))}</p>\n'
    )


def _table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: int | None = None, code: bool = False
) -> str:
    """A table of cells that are HTML; numbers to the right: the first ``right`` columns, or all but the first."""

    def kind(at: int) -> str:
        return "n" if (at < right if right is not None else at) else "k" * code

    head = "".join(f'<th class="{kind(at)}">{name}</th>' for at, name in enumerate(columns))
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind(at)}">{cell}</td>' for at, cell in enumerate(row)) + "</tr>\n"
        for row in rows
    )
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}</table></div>\n'


def _dot(colour: str) -> str:
    return f'<i class="t" style="background:{colour}"></i>'


def _text(text: str) -> str:
    """A text from a file: as much of it as is shown, of which HTML makes nothing."""
    return escape("".join(c if c.isprintable() else " " for c in shortened(text)))
