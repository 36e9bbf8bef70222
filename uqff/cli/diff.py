"""``uqff diff``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from uqff.cli.options import fetched, isq_option, pattern_option, selected

if TYPE_CHECKING:
    from uqff.inspection.compare import LayerDifference

__all__ = ["diff"]


@click.command(short_help="Compare two models, layer by layer.")
@click.argument("a", type=click.Path())
@click.argument("b", type=click.Path())
@click.option("--layers", callback=pattern_option, metavar="REGEX", help="Which weights of a checkpoint are layers.")
@click.option(
    "--names", type=click.Path(exists=True, dir_okay=False), help="Index to path of 0.x layers, as for migrate."
)
@isq_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def diff(ctx: click.Context, a: str, b: str, layers: Any, names: str | None, isq: str | None, as_json: bool) -> None:
    """Compare A and B: two UQFF files or directories, or a UQFF and its checkpoint.

    Of a directory with several models, DIR:TYPE is one: uqff diff MODEL:q4k MODEL:hqq8.

    For each layer: types, sizes, whether the bytes are the same, root mean square and largest error, cosine; then the
    biases that differ. The checkpoint is taken as true; of two UQFF, A is.

    A may be of 0.x and B of 1.x, or the reverse: layers are then matched by path, which config.json beside one of them
    (or --names) tells, and experts one by one.

    Exits with 0 if the two have the same layers, however they differ, with 1 if a layer is in one of them only.
    """
    from uqff.cli.progress import told_of_compiling
    from uqff.inspection.compare import comparison_document, is_checkpoint
    from uqff.inspection.compare import diff as compared

    a, b = fetched(a, isq), fetched(b, isq)
    a, b = (selected(path, None if is_checkpoint(path) else isq, name) for path, name in ((a, "A"), (b, "B")))
    with told_of_compiling():
        differences = list(compared(a, b, layers=layers, names=names))
    if as_json:
        click.echo(json.dumps(comparison_document(differences, a, b), indent=2))
    else:
        _show(differences)
    if any(each.distance is None for each in differences):
        ctx.exit(1)


def _show(differences: list[LayerDifference]) -> None:
    from uqff.cli.render import echo_table

    columns = [
        ("layer", "left"),
        ("shape", "left"),
        ("A", "left"),
        ("B", "left"),
        ("A bytes", "right"),
        ("B bytes", "right"),
        ("bytes", "left"),
        ("RMS error", "right"),
        ("relative", "right"),
        ("max error", "right"),
        ("cosine", "right"),
    ]
    optional = ("RMS error", "cosine", "A bytes", "B bytes", "max error")
    echo_table(columns, map(_cells, differences), optional=optional)
    same = sum(each.identical for each in differences)
    alone = [sum(each.b is None for each in differences), sum(each.a is None for each in differences)]
    print()
    print(f"{same} of {len(differences)} layers have the same bytes")
    for line in _bias_lines(differences):
        print(line)
    for side, count in zip("AB", alone, strict=True):
        if count:
            print(f"{count} only in {side}")


def _bias_lines(differences: list[LayerDifference]) -> Iterator[str]:
    """Biases that differ, a line for each pair of dtypes."""
    from uqff.cli.render import number
    from uqff.quantization.bias import largest_of

    groups: dict[tuple[str, str], list[LayerDifference]] = {}
    for each in differences:
        if each.bias_dtypes != (None, None) and (each.bias is None or each.bias.largest != 0):
            groups.setdefault((each.bias_dtypes[0] or "none", each.bias_dtypes[1] or "none"), []).append(each)
    for (a, b), layers in groups.items():
        far = [each.bias for each in layers if each.bias is not None]
        text = f"biases of {len(layers)} layers differ: {a} in A, {b} in B"
        if far:
            largest, relative = (largest_of(getattr(each, of) for each in far) for of in ("largest", "relative"))
            text += f", max error {number(largest)}, relative {number(relative)}"
        yield text


def _cells(each: LayerDifference) -> list[str]:
    from uqff.cli.render import number

    kinds = [("-", "-") if side is None else (side.kind, f"{side.nbytes:,}") for side in (each.a, each.b)]
    far = each.distance
    if far is None:
        verdict, numbers = f"only in {'B' if each.a is None else 'A'}", ["-"] * 4
    else:
        verdict = "same" if each.identical else "differ"
        numbers = [number(far.rms), number(far.relative), number(far.largest), number(far.cosine)]
    return [
        each.key if each.module in (None, each.key) else f"{each.key} {each.module}",
        " x ".join(map(str, each.shape)),
        kinds[0][0],
        kinds[1][0],
        kinds[0][1],
        kinds[1][1],
        verdict,
        *numbers,
    ]
