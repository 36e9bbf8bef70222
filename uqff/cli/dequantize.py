"""``uqff dequantize``."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import click

from uqff.cli.options import DtypeChoice, isq_option, selected, size_option
from uqff.cli.progress import shown_progress, terminable
from uqff.errors import printable

if TYPE_CHECKING:
    from uqff.export.dequantize import Dequantized

__all__ = ["dequantize"]


@click.command(short_help="Write a model as a plain checkpoint.")
@click.argument("source", metavar="SRC", type=click.Path())
@click.argument("out", metavar="OUT", type=click.Path())
@click.option("--dtype", type=DtypeChoice(), default="f32", show_default=True, help="Of all floats.")
@click.option(
    "--shard-size",
    callback=size_option,
    default="5GB",
    show_default=True,
    metavar="SIZE",
    help="Begin a new file after so much: bytes, or a number with KB, MB, GB, KiB, MiB or GiB.",
)
@click.option(
    "--tie",
    type=click.Choice(["embedding", "head"]),
    help="Keep a tied model tied, with this one of its two matrices.",
)
@click.option("--force", is_flag=True, help="Replace the checkpoint that is in OUT.")
@click.option("--quiet", is_flag=True, help="Print nothing but warnings and errors.")
@isq_option
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def dequantize(
    source: str,
    out: str,
    dtype: str,
    shard_size: int,
    tie: Any,
    force: bool,
    quiet: bool,
    isq: str | None,
    as_json: bool,
) -> None:
    """Write the model SRC as a plain checkpoint into the new directory OUT.

    SRC is a .uqff file or a model directory, of either generation; SRC:TYPE is one model of several. OUT has the layout
    of Hugging Face: safetensors files, an index if there are several, config.json with the new dtype, and the
    tokenizer's files. It appears when all of it is written; it must not exist, or be empty.

    Every weight has the value that its codes stand for. In f32 nothing is rounded.

    A tied model of 0.x, 1.0 or 1.1 has a quantised head beside a plain embedding. Both are written and the model is
    untied in config.json, so that it computes the same. With --tie, it keeps one of them for both: the plain embedding,
    or the head, as mistral.rs 0.9 does with 1.x files.
    """
    source = selected(source, isq, "SRC")
    from uqff.export.dequantize import dequantize_model

    with terminable(), shown_progress(shown=not quiet) as progress:
        result = dequantize_model(
            source, out, dtype=dtype, shard_bytes=shard_size, tie=tie, force=force, progress=progress
        )
    if as_json:
        document = dataclasses.asdict(result)
        click.echo(json.dumps({"schema": 1, **document, "path": str(result.path)}, indent=2))
    elif not quiet:
        _show(result)
    for name, count in result.overflows.items():
        click.echo(f"uqff: {printable(name)}: {count:,} numbers are too large for {result.dtype}", err=True)


def _show(result: Dequantized) -> None:
    from uqff.cli.render import echo_heading, echo_pairs, size

    echo_heading(str(result.path))
    pairs = [
        ("dtype", result.dtype),
        ("tensors", f"{result.tensors:,}"),
        ("files", f"{len(result.files)}, {size(result.nbytes)}"),
    ]
    if result.untied:
        pairs.append(("untied", "the head is a matrix of its own, as the engine has it"))
    if result.dropped:
        pairs.append(("left out", ", ".join(result.dropped)))
    echo_pairs(pairs)
