"""``uqff verify``."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import click

from uqff.cli.options import isq_option, named
from uqff.errors import printable

if TYPE_CHECKING:
    from uqff.inspection.verify import RuleViolation

__all__ = ["verify"]


@click.command(short_help="Check a file against every rule of the format.")
@click.argument("path", type=click.Path())
@click.option("--deep", is_flag=True, help="Dequantise every layer too, and look for NaN and infinities.")
@click.option(
    "--strict", is_flag=True, help="In 1.x, want a report, a named producer, and no layer stored plain for lack of fit."
)
@click.option("--structure", is_flag=True, help="Leave out what needs the weights themselves, which are not read.")
@isq_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def verify(
    ctx: click.Context, path: str, deep: bool, strict: bool, structure: bool, isq: str | None, as_json: bool
) -> None:
    """Check a file against every rule of the format.

    PATH is a .uqff file (the other shards of its set are found), or a model directory; of a directory with several
    types, each, and PATH:TYPE one of them. Every violation is a line with file, layer, field, offset, what was expected
    and what was found. If config.json stands beside the files, the weights that it announces must be there; if it says
    that they do not lie as in a checkpoint, that is noted.

    PATH may name a repository of the Hugging Face hub. Then the structure is checked, of which headers and small fields
    are read and no weights; with --deep, the model is fetched.

    What breaks no rule but is worth knowing follows as notes: what the engine cannot load or run, and biases that were
    rounded when they were stored.

    Exits with 0 if there is none, with 1 if there is one, with 2 if the call is wrong.
    """
    from uqff.cli.progress import shown_progress
    from uqff.inspection.verify import verify as verified

    if deep and structure:
        raise click.UsageError("--deep and --structure exclude each other")
    path = named(path, isq, "PATH")
    with shown_progress() as display:

        def tell(violation: RuleViolation) -> None:
            if display is not None:
                display.hide()
            if not as_json:
                print(str(violation))

        found = verified(path, deep=deep, strict=strict, structure=structure, progress=display, on_violation=tell)
    if as_json:
        violations = [dataclasses.asdict(violation) for violation in found.violations]
        notes = [dataclasses.asdict(note) for note in found.notes]
        document = {
            "schema": 1,
            "layers": found.layers,
            "bytes": found.nbytes,
            "violations": violations,
            "notes": notes,
        }
        click.echo(json.dumps(document, indent=2))
    else:
        where = f" in {_plural(found.layers, 'layer')}, {found.nbytes:,} bytes of layers" if found.layers else ""
        for note in found.notes:
            print(printable(f"note: {note.text}"))
        print("clean: no violation" + where if found.clean else _plural(len(found), "violation") + where)
    if not found.clean:
        ctx.exit(1)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
