"""Values of options that several commands have."""

from __future__ import annotations

import re
from typing import Any

import click

from uqff.errors import UqffError, printable

__all__ = ["isq_option", "pattern_option", "selected", "size_option"]

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def size_option(ctx: click.Context, parameter: click.Parameter, value: str) -> int:
    """Read a number of bytes."""
    match = re.fullmatch(r"([0-9]{1,12}) *([KMG]i?)?B?", value.strip(), re.IGNORECASE)
    nbytes = 0 if match is None else int(match[1]) * UNITS[(match[2] or "").lower()]
    if not nbytes:
        raise click.BadParameter(f"expected a size such as 500MB or 2GiB, got {printable(value)}", ctx, parameter)
    return nbytes


def pattern_option(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    """Compile the pattern of an option."""
    from uqff.models.patterns import Pattern

    try:
        return None if value is None else Pattern(value)
    except UqffError as error:
        raise click.BadParameter(str(error), ctx, parameter) from None


isq_option = click.option(
    "--isq", metavar="TYPE", help="Of a directory with several models, the one of that type; also as MODEL:TYPE."
)


def selected(path: str, isq: str | None, metavar: str) -> str:
    """The path of an argument, or that of the one model of several that ``DIR:TYPE`` or ``--isq`` choose."""
    from pathlib import Path

    from uqff.container.shards import select

    try:
        chosen = select(path, isq)
    except FileNotFoundError:
        problem = f"Path {click.format_filename(path)!r} does not exist."
    except UqffError as error:
        problem = str(error)
    else:
        return path if chosen == Path(path) else str(chosen)
    raise click.BadParameter(problem, param_hint=f"'{metavar}'")
