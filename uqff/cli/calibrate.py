"""``uqff calibrate``."""

from __future__ import annotations

import json

import click

from uqff.cli.options import DtypeChoice, device_option, isq_option, model_path
from uqff.cli.progress import shown_progress, terminable

__all__ = ["calibrate"]


@click.command(short_help="Find out how much each input of each layer matters.")
@click.argument("source", metavar="SRC", type=click.Path())
@click.option("--text", required=True, type=click.Path(exists=True, dir_okay=False), help="UTF-8 text to read.")
@click.option(
    "-o",
    "--out",
    required=True,
    type=click.Path(dir_okay=False),
    help="Importance matrix: .gguf as llama.cpp writes it; .imatrix, .dat: its older form; .cimatrix: the engine's.",
)
@click.option("--hessian", type=click.Path(dir_okay=False), help="Also write the products of all inputs, a large file.")
@click.option("--context", default=512, show_default=True, type=int, help="Tokens of a window.")
@click.option("--windows", type=int, help="How many windows at most.")
@click.option("--dtype", type=DtypeChoice(), default="f32", show_default=True, help="Of activations.")
@device_option
@isq_option
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON.")
def calibrate(
    source: str,
    text: str,
    out: str,
    hessian: str | None,
    context: int,
    windows: int | None,
    dtype: str,
    device: str | None,
    isq: str | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Let the model SRC read a text, and write how much each input of each of its layers matters.

    SRC is a checkpoint, or a UQFF directory. It is run block by block: only one block's weights are needed in memory
    at a time. Importance is the mean square of an input; of experts, over the tokens that go to each.
    """
    source, isq = model_path(source, isq, "SRC")

    from uqff.calibration.calibrate import calibrate as calibrated
    from uqff.codes import LOADED_DTYPES
    from uqff.parallel.ranks import device_of

    with terminable(), shown_progress(shown=not quiet) as progress:
        found = calibrated(
            source,
            text=text,
            out=out,
            hessian=hessian,
            context=context,
            windows=windows,
            device=device_of(device),
            dtype=LOADED_DTYPES[dtype.upper()].torch,
            isq=isq,
            progress=progress,
        )
    tokens = max(int(each.counts.max()) for each in found.values())
    dead = {name: int((each.counts == 0).sum()) for name, each in found.items() if (each.counts == 0).any()}
    if as_json:
        told = {"out": out, "hessian": hessian, "layers": len(found), "tokens": tokens, "experts_without_tokens": dead}
        click.echo(json.dumps(told, indent=2))
    elif not quiet:
        click.echo(f"{out}: {len(found)} layers, {tokens:,} tokens")
    for name, count in dead.items():
        click.echo(f"uqff: {name}: {count} experts got no token", err=True)
