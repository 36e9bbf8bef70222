"""Values of options that several commands have."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from uqff.errors import UqffError, printable

__all__ = ["DtypeChoice", "isq_option", "lora_option", "pattern_option", "selected", "size_option"]

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


if TYPE_CHECKING:
    Choice = click.Choice[str]
else:
    Choice = click.Choice  # which takes no parameter before click 8.2

DTYPES = ("f32", "f16", "bf16")
TORCH_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


class DtypeChoice(Choice):
    """``f32``, ``f16`` or ``bf16``, or a word of the command's own; torch's names mean the same."""

    def __init__(self, *words: str) -> None:
        super().__init__([*words, *DTYPES])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name as commands know it."""
        return super().convert(TORCH_NAMES.get(str(value).removeprefix("torch."), value), param, ctx)


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


def _lora(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, float]]:
    """Directories of adapters, each with its weight."""
    return [_weighted(value) for value in values]


def _weighted(value: str) -> tuple[str, float]:
    from pathlib import Path

    path, colon, weight = value.rpartition(":")
    if (
        colon
        and not Path(value).exists()
        and re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", weight)
    ):
        return path, float(weight)
    return value, 1.0


lora_option = click.option(
    "--lora",
    multiple=True,
    callback=_lora,
    metavar="DIR[:WEIGHT]",
    help="Adapter as PEFT saves it, and what its scale is multiplied by; several are added in order.",
)

isq_option = click.option(
    "--isq", metavar="TYPE", help="Of a directory with several models, the one of that type; also as MODEL:TYPE."
)


def selected(path: str, isq: str | None, metavar: str) -> str:
    """The path of an argument, or that of the one model of several that ``DIR:TYPE`` or ``--isq`` choose; the name of
    a repository, with the type, as it is.
    """
    from pathlib import Path

    from uqff.container.shards import select
    from uqff.hub.names import hub_name

    name = hub_name(path)
    if name is not None:
        return name.of(isq).text
    try:
        chosen = select(path, isq)
    except FileNotFoundError:
        problem = f"Path {click.format_filename(path)!r} does not exist."
    except UqffError as error:
        problem = str(error)
    else:
        return path if chosen == Path(path) else str(chosen)
    raise click.BadParameter(problem, param_hint=f"'{metavar}'")
