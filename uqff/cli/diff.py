"""``uqff diff``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from uqff.cli.quantize import pattern_option

if TYPE_CHECKING:
    from uqff.compare import LayerDifference

__all__ = ["diff"]


@click.command(short_help="Compare two models, layer by layer.")
@click.argument("a", type=click.Path(exists=True))
@click.argument("b", type=click.Path(exists=True))
@click.option("--layers", callback=pattern_option, metavar="REGEX", help="Which weights of a checkpoint are layers.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def diff(a: str, b: str, layers: Any, as_json: bool) -> None:
    """Compare A and B: two UQFF files or directories, or a UQFF and its checkpoint.

    For each layer: types, sizes, whether the bytes are the same, root mean square and largest error, cosine. The
    checkpoint is taken as true; of two UQFF, A is.

    Exits with 0 if the two could be compared, with 1 if they have not the same layers.
    """
    from uqff.compare import compare, comparison_document

    differences = list(compare(a, b, layers=layers))
    if as_json:
        click.echo(json.dumps(comparison_document(differences, a, b), indent=2))
    else:
        _show(differences)


def _show(differences: list[LayerDifference]) -> None:
    from uqff.cli.render import echo_table, number

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
    rows = [
        (
            each.key if each.module in (None, each.key) else f"{each.key} {each.module}",
            " x ".join(map(str, each.shape)),
            each.a.kind,
            each.b.kind,
            f"{each.a.nbytes:,}",
            f"{each.b.nbytes:,}",
            "same" if each.identical else "differ",
            number(each.distance.rms),
            number(each.distance.relative),
            number(each.distance.largest),
            number(each.distance.cosine),
        )
        for each in differences
    ]
    echo_table(columns, rows)
    same = sum(each.identical for each in differences)
    print()
    print(f"{same} of {len(differences)} layers have the same bytes")
