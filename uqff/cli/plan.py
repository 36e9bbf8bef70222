"""``uqff plan``."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from uqff.cli.options import DtypeChoice, complete_kind, mmproj_option, size_option
from uqff.cli.progress import shown_progress
from uqff.errors import UqffError, printable

if TYPE_CHECKING:
    from uqff.planning.plan import ModelPlan

__all__ = ["plan"]


def _kinds(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[str] | None:
    from uqff.quantization.types import kind_name

    try:
        return [kind_name(each) for value in values for each in value.split(",") if each] or None
    except UqffError as error:
        raise click.BadParameter(str(error), ctx, parameter) from None


def _size(ctx: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    return None if value is None else size_option(ctx, parameter, value)


def _fixed(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    made = {}
    for value in values:
        module, _, kind = value.partition("=")
        names = _kinds(ctx, parameter, (kind,))
        if not names:
            raise click.BadParameter(f"expected MODULE=TYPE, got {printable(value)}", ctx, parameter)
        made[module] = names[0]
    return made


@click.command(short_help="Choose types: the best mix for a size, or what each type takes.")
@click.argument("source", metavar="SRC", type=click.Path())
@click.option("--bits", type=click.FloatRange(0, min_open=True), help="Bits per weight of all layers, at most.")
@click.option("--size", "nbytes", callback=_size, metavar="SIZE", help="Of all layers, at most: such as 3GiB.")
@click.option("--kld", type=click.FloatRange(0, min_open=True), help="Mean divergence, at most; needs --text.")
@click.option("-o", "--out", type=click.Path(dir_okay=False), help="Where the topology YAML is written.")
@click.option("--text", type=click.Path(exists=True, dir_okay=False), help="Text for importance and divergence.")
@click.option(
    "--measure",
    type=click.Choice(["error", "kld"]),
    help="What a layer's errors cost: alike, relative to the layer; or the divergence of the model with that layer "
    "alone quantised. The latter if there is a text.",
)
@click.option("--check", type=click.Path(exists=True, dir_okay=False), help="Text on which the mix is measured.")
@click.option(
    "--imatrix",
    type=click.Path(exists=True, dir_okay=False),
    help="Importance, for errors and for quantising; quantize must be given the same.",
)
@click.option(
    "--effort",
    type=click.Choice(["engine", "best"]),
    default="engine",
    show_default=True,
    help="As for quantize, which must be given the same. Not calibrated, which takes too long to try on every type of "
    "every layer: plan with best, and quantize the mix with calibrated.",
)
@click.option(
    "--types",
    "kinds",
    multiple=True,
    callback=_kinds,
    shell_complete=complete_kind,
    metavar="TYPE,...",
    help="Types that may be used.",
)
@click.option("--fix", "fixed", multiple=True, callback=_fixed, metavar="MODULE=TYPE", help="As --fix lm_head=q6k.")
@click.option("--ranks", default=1, show_default=True, type=click.IntRange(1), help="Also say what each rank holds.")
@click.option("--context", default=512, show_default=True, type=int, help="Tokens of a window of a text.")
@click.option("--windows", default=8, show_default=True, type=click.IntRange(1), help="How many are used, at most.")
@click.option(
    "--dtype", type=DtypeChoice("auto"), default="auto", show_default=True, help="Load dtype, as for quantize."
)
@mmproj_option
@click.option("--picture", type=click.Path(dir_okay=False), help="Draw size against quality: an SVG file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    source: str,
    bits: float | None,
    nbytes: int | None,
    kld: float | None,
    out: str | None,
    text: str | None,
    measure: Any,
    check: str | None,
    imatrix: str | None,
    effort: Any,
    kinds: list[str] | None,
    fixed: dict[str, str],
    ranks: int,
    context: int,
    windows: int,
    dtype: str,
    mmproj: str | None,
    picture: str | None,
    as_json: bool,
) -> None:
    """Choose a type for each layer of the checkpoint SRC: the best mix for --bits or --size, the smallest for --kld.

    Without one of these, says what each type would take on disk and on each of --ranks, which only headers tell.

    The mix is written as the topology YAML that uqff quantize --recipe and the engine read. With --text, each layer is
    quantised by itself to find what its errors cost, which runs the model once for each layer.
    """
    from uqff.container.atomic import check_outputs
    from uqff.planning.plan import plan_types

    if [bits, nbytes, kld].count(None) < 2:
        raise click.UsageError("--bits, --size and --kld: one at a time")
    if [bits, nbytes, kld] == [None] * 3:
        for option, given in (("--out", out), ("--picture", picture), ("--check", check)):
            if given is not None:
                raise click.UsageError(f"{option} is about a mix, which --bits, --size or --kld choose")
    check_outputs(out, picture)
    with shown_progress(shown=not as_json) as progress:
        made = plan_types(
            source,
            bits=bits,
            nbytes=nbytes,
            kld=kld,
            measure=measure,
            text=text,
            check=check,
            imatrix=imatrix,
            effort=effort,
            kinds=kinds,
            fixed=fixed,
            ranks=ranks,
            context=context,
            windows=windows,
            dtype=dtype,
            mmproj=mmproj,
            progress=progress,
        )
    if out is not None:
        made.save(out)
    if picture is not None:
        from uqff.planning.picture import write_frontier

        write_frontier(made, picture)
    if as_json:
        click.echo(json.dumps(made.document, indent=2))
    elif made.mix is None:
        _show_sizes(made, ranks)
    else:
        _show_mix(made, out, effort, imatrix, mmproj)
    for each in made.doubts:
        click.echo(f"uqff: note: {printable(each)}", err=True)


def _show_sizes(made: ModelPlan, ranks: int) -> None:
    from uqff.cli.render import echo_heading, echo_pairs, echo_table, size

    echo_heading(made.source)
    echo_pairs([("weights", f"{made.weights:,}"), ("beside the layers", size(made.residual_bytes))])
    print()
    columns = [("type", "left"), ("layers, bytes", "right"), ("bits/weight", "right"), ("with residual", "right")]
    columns += [(f"rank of {ranks}", "right")] if ranks > 1 else []
    rows = []
    for each in made.sizes:
        if each.problem:
            rows.append([each.kind, "-", "-", each.problem, *(["-"] if ranks > 1 else [])])
            continue
        total = f"{each.nbytes + made.residual_bytes:,}"
        rows.append([each.kind, f"{each.nbytes:,}", f"{each.bits_per_weight:.3f}", total])
        rows[-1] += [f"{each.rank_bytes + made.residual_bytes:,}"] if ranks > 1 else []
    echo_table(columns, rows)


def _show_mix(made: ModelPlan, out: str | None, effort: str, imatrix: str | None, mmproj: str | None) -> None:
    from uqff.cli.render import echo_heading, echo_pairs, echo_table, number, size

    mix = made.mix
    assert mix is not None
    what = "mean KLD, predicted" if made.measure == "kld" else "sum of relative squared errors"
    echo_heading(made.source)
    counts = Counter(made.types.values())
    pairs = [
        ("layers", f"{size(mix.nbytes)}, {mix.bits_per_weight:.3f} bits per weight"),
        (".uqff files", size(made.file_bytes)),
        ("beside the layers", size(made.residual_bytes)),
        (what, number(mix.cost)),
        ("types", ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))),
    ]
    if made.measured is not None:
        pairs.append(("as a whole, same text", f"{made.measured.value:.6g} ± {made.measured.error or 0:.2g}"))
    if made.check is not None and made.check.distances is not None:
        kld = made.check.distances.kld
        pairs.append(("mean KLD, measured", f"{kld.value:.6g} ± {kld.error or 0:.2g}"))
    echo_pairs(pairs)
    print()
    rows = [(each.name, f"{each.nbytes:,}", f"{each.bits_per_weight:.3f}", number(each.cost)) for each in made.uniform]
    rows.append(("this mix", f"{mix.nbytes:,}", f"{mix.bits_per_weight:.3f}", number(mix.cost)))
    rows.sort(key=lambda row: float(row[2]))
    echo_table([("all layers", "left"), ("bytes", "right"), ("bits/weight", "right"), (what, "right")], rows)
    if out is not None:
        print()
        words = ["uqff", "quantize", made.source, "OUT", "--isq", made.kind, "--recipe", out]
        words += ["--effort", effort] if effort != "engine" else []
        words += ["--imatrix", imatrix] if imatrix is not None else []
        words += ["--mmproj", mmproj] if mmproj is not None else []
        print(printable(shlex.join(words)))
