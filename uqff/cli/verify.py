"""``uqff verify``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from uqff.verify import Progress

__all__ = ["verify"]


@click.command(short_help="Check a file against every rule of the format.")
@click.argument("path", type=click.Path(exists=True))
@click.option("--deep", is_flag=True, help="Dequantise every layer too, and look for NaN and infinities.")
@click.pass_context
def verify(ctx: click.Context, path: str, deep: bool) -> None:
    """Check a file against every rule of the format.

    PATH is a .uqff file (the other shards of its set are found), or a model directory. Every violation is a line with
    file, layer, field, offset, what was expected and what was found.

    Exits with 0 if there is none, with 1 if there is one, with 2 if the call is wrong.
    """
    from uqff.verify import verify as violations_of

    state: list[Progress] = []

    def show(progress: Progress) -> None:
        state[:] = [progress]
        if sys.stderr.isatty():
            share = 100 * progress.nbytes // (progress.of_nbytes or 1)
            click.echo(f"\r{share:3d} %  {progress.layers} of {progress.of_layers} layers", err=True, nl=False)

    count = 0
    for violation in violations_of(path, deep=deep, progress=show):
        _clear_progress()
        print(str(violation))
        count += 1
    _clear_progress()
    layers = f" in {_plural(state[0].layers, 'layer')}, {state[0].nbytes:,} bytes of blobs" if state else ""
    if count:
        print(f"{_plural(count, 'violation')}{layers}")
        ctx.exit(1)
    print(f"clean: no violation{layers}")


def _clear_progress() -> None:
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", err=True, nl=False)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
