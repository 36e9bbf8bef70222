"""``uqff verify``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from uqff.cli.options import isq_option, selected
from uqff.errors import UqffError, printable

if TYPE_CHECKING:
    from uqff.cli.progress import Display
    from uqff.inspection.verify import Violation
    from uqff.progress import Step

__all__ = ["verify"]


@click.command(short_help="Check a file against every rule of the format.")
@click.argument("path")
@click.option("--deep", is_flag=True, help="Dequantise every layer too, and look for NaN and infinities.")
@click.option(
    "--strict", is_flag=True, help="In 1.x, want a report, a named producer, and no layer stored plain for lack of fit."
)
@isq_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def verify(ctx: click.Context, path: str, deep: bool, strict: bool, isq: str | None, as_json: bool) -> None:
    """Check a file against every rule of the format.

    PATH is a .uqff file (the other shards of its set are found), or a model directory; of a directory with several
    types, each, and PATH:TYPE one of them. Every violation is a line with file, layer, field, offset, what was expected
    and what was found. If config.json stands beside the files, the weights that it announces must be there; if it says
    that they do not lie as in a checkpoint, that is noted.

    What breaks no rule but is worth knowing follows as notes: what the engine cannot load or run, and biases that were
    rounded when they were stored.

    Exits with 0 if there is none, with 1 if there is one, with 2 if the call is wrong.
    """
    from uqff.cli.progress import shown_progress
    from uqff.container.shards import models_in
    from uqff.inspection.verify import Note, notes_of
    from uqff.inspection.verify import verify as violations_of

    path = selected(path, isq, "PATH")
    last: Step | None = None
    notes = [Note("layout", text, ()) for text in _notes(path)]
    violations: list[Violation] = []
    layers = nbytes = 0
    models = models_in(path) if Path(path).is_dir() else {}
    for model in models.values() if len(models) > 1 else [path]:
        last = None
        with shown_progress() as display:

            def show(step: Step, display: Display | None = display) -> None:
                nonlocal last
                last = step
                if display is not None:
                    display(step)

            for violation in violations_of(model, deep=deep, strict=strict, progress=show):
                violations.append(violation)
                if not as_json:
                    if display is not None:
                        display.hide()
                    print(str(violation))
        notes += notes_of(model)
        if last is not None:
            layers, nbytes = layers + last.done, nbytes + last.work_done
    if as_json:
        found = [dataclasses.asdict(violation) for violation in violations]
        told = [dataclasses.asdict(note) for note in notes]
        document = {"schema": 1, "layers": layers, "bytes": nbytes, "violations": found, "notes": told}
        click.echo(json.dumps(document, indent=2))
    else:
        where = f" in {_plural(layers, 'layer')}, {nbytes:,} bytes of layers" if layers else ""
        for note in notes:
            print(printable(f"note: {note.text}"))
        print(f"{_plural(len(violations), 'violation')}{where}" if violations else f"clean: no violation{where}")
    if violations:
        ctx.exit(1)


def _notes(path: str) -> list[str]:
    """What ``config.json`` says of how the weights lie; nothing, if it breaks a rule, which is a violation."""
    from uqff.container.directory import CONFIG_NAME
    from uqff.models.config import read_config
    from uqff.models.layouts import Layout

    config = (Path(path) if Path(path).is_dir() else Path(path).parent) / CONFIG_NAME
    try:
        return Layout.of(read_config(config)).notes if config.is_file() else []
    except UqffError:
        return []


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")
