"""Values of options that several commands have."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from uqff.errors import HubError, UqffError, printable
from uqff.hub.names import NO_PROJECTOR

__all__ = [
    "DtypeChoice",
    "complete_kind",
    "device_option",
    "fetched",
    "isq_option",
    "kind_option",
    "layers_option",
    "lora_option",
    "mmproj_option",
    "model_path",
    "named",
    "on_ranks",
    "pattern_option",
    "rank_options",
    "selected",
    "show_bars",
    "size_option",
]

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


if TYPE_CHECKING:
    import torch

    from uqff.parallel.comm import Comm

    Choice = click.Choice[str]
else:
    Choice = click.Choice  # which takes no parameter before click 8.2

_Command = TypeVar("_Command", bound=Callable[..., Any])

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


def kind_option(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """The name of a type, checked."""
    from uqff.quantization.types import kind_name

    try:
        return None if value is None else kind_name(value)
    except UqffError as error:
        raise click.BadParameter(str(error), ctx, parameter) from None


def complete_kind(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """For a shell: the types whose names begin so; of several with commas, the last."""
    from uqff.quantization.types import kinds

    before, comma, begun = incomplete.rpartition(",")
    return [f"{before}{comma}{kind}" for kind in kinds() if kind.startswith(begun.lower())]


def pattern_option(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    """Compile the pattern of an option."""
    from uqff.models.patterns import Pattern

    try:
        return None if value is None else Pattern(value)
    except UqffError as error:
        raise click.BadParameter(str(error), ctx, parameter) from None


def layers_option(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    """Compile the pattern of an option, but for the word that stands for linear layers."""
    return value if value == "auto" else pattern_option(ctx, parameter, value)


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
    help="Adapter as PEFT saves it, here or on the hub (owner/name), and what its scale is multiplied by; several are "
    "added in order.",
)

isq_option = click.option(
    "--isq",
    metavar="TYPE",
    shell_complete=complete_kind,
    help="Of a directory with several models, the one of that type; also as MODEL:TYPE.",
)


mmproj_option = click.option(
    "--mmproj",
    metavar="FILE|none",
    help="Of a GGUF file of a model that sees: the file of the part that does, or its name beside the other; else the "
    "only one that is there. none: the text alone.",
)

device_option = click.option("--device", help="cpu, cuda or cuda:N; CUDA if there is one.")


def rank_options(command: _Command) -> _Command:
    """What commands have that load a model on several ranks."""
    for option in (
        click.option(
            "--workers", type=click.IntRange(1), help="Threads that quantise a checkpoint; by default one a CPU."
        ),
        isq_option,
        click.option(
            "--check-all", is_flag=True, help="Compare every byte of the ranks' files, not headers and samples."
        ),
        click.option("--timeout", default=300.0, show_default=True, help="Seconds that a rank waits for the others."),
        device_option,
    ):
        command = option(command)
    return command


@contextmanager
def on_ranks(device: str | None, timeout: float) -> Iterator[tuple[Comm, torch.device]]:
    """All ranks of this torchrun, and the device of this one; an error says whose it is."""
    from uqff.parallel.ranks import device_of, joined, rank_of

    rank, world_size = rank_of()
    try:
        place = device_of(device)
        with joined(place, timeout) as comm:
            yield comm, place
    except UqffError as error:
        if world_size > 1:
            error.problem = f"rank {rank} of {world_size}: {error.problem}"
        raise


def model_path(path: str, isq: str | None, metavar: str) -> tuple[str, str | None]:
    """Where a model is, fetched if it has to be, and the ``--isq`` that is left: of a checkpoint, what it becomes."""
    from uqff.checkpoints.gguf.files import is_gguf
    from uqff.checkpoints.model import holds_checkpoint
    from uqff.container.shards import resolve

    path = fetched(path, isq)
    if holds_checkpoint(path) or is_gguf(path):
        return path, isq
    path = selected(path, isq, metavar)
    resolve(path)  # before what takes seconds to import
    return path, None


def named(path: str, isq: str | None, metavar: str) -> str:
    """As :func:`selected`, of what is only looked into: the name of a repository stays one, and nothing is fetched."""
    from uqff.hub.names import hub_name

    name = hub_name(path)
    return selected(path, isq, metavar) if name is None else name.of(isq).text


def show_bars() -> None:
    """Let what is fetched from now on be shown on a terminal, but for a command that is to be quiet."""
    import sys

    from uqff.hub.fetch import BARS

    context = click.get_current_context(silent=True)
    quiet = context is not None and context.params.get("quiet", False)
    BARS.set(not quiet and sys.stderr is not None and sys.stderr.isatty())


def fetched(path: str, isq: str | None = None) -> str:
    """A path as it is; of the name of a repository, where it has been fetched to: a checkpoint, or the one model."""
    from os import fspath

    from uqff.container.shards import at_hand

    show_bars()
    return fspath(at_hand(path, isq))


def selected(
    path: str, isq: str | None, metavar: str, *, several: bool = False, mmproj: str | None = NO_PROJECTOR
) -> str:
    """The path of an argument, or that of the one model of several that ``DIR:TYPE`` or ``--isq`` choose.

    What names a repository is fetched; unless all its models may be meant, it must have one or one be named.
    """
    from os import fspath
    from pathlib import Path

    from uqff.container.shards import at_hand, select

    show_bars()
    try:
        found = fspath(at_hand(path, isq, several=several, mmproj=mmproj))
        chosen = select(found, isq if found == path else None)
    except HubError:
        raise
    except FileNotFoundError:
        problem = f"Path {click.format_filename(path)!r} does not exist."
    except UqffError as error:
        problem = str(error)
    else:
        return found if chosen == Path(found) else str(chosen)
    raise click.BadParameter(problem, param_hint=f"'{metavar}'")
