"""``uqff quantize``."""

from __future__ import annotations

import contextlib
import gc
import json
import re
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from uqff.errors import UqffError, printable

if TYPE_CHECKING:
    from uqff.isq import Fallback
    from uqff.pipeline import Progress, Step
    from uqff.report import Result

__all__ = ["pattern_option", "quantize"]

TERMINATED = 128 + 15
"""What a shell reports for a process that ended by SIGTERM."""


UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def _kind(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    from uqff.isq import kind_name

    try:
        return tuple(kind_name(value) for value in values)
    except UqffError as error:
        raise click.BadParameter(str(error), ctx, parameter) from None


def _size(ctx: click.Context, parameter: click.Parameter, value: str) -> int:
    """Compile a number of bytes."""
    match = re.fullmatch(r"([0-9]{1,12}) *([KMG]i?)?B?", value.strip(), re.IGNORECASE)
    nbytes = 0 if match is None else int(match[1]) * UNITS[(match[2] or "").lower()]
    if not nbytes:
        raise click.BadParameter(f"expected a size such as 500MB or 2GiB, got {printable(value)}", ctx, parameter)
    return nbytes


def pattern_option(ctx: click.Context, parameter: click.Parameter, value: str | None) -> Any:
    """Compile the pattern of an option."""
    from uqff.selector import Pattern

    try:
        return None if value is None else Pattern(value)
    except UqffError as error:
        raise click.BadParameter(str(error), ctx, parameter) from None


@click.command(short_help="Quantise a checkpoint.")
@click.argument("source", metavar="SRC")
@click.argument("out", metavar="OUT", type=click.Path())
@click.option("--isq", "kinds", multiple=True, required=True, callback=_kind, help="Type; may be given several times.")
@click.option("--recipe", type=click.Path(exists=True, dir_okay=False), help="Topology YAML: types of some layers.")
@click.option(
    "--layers", callback=pattern_option, metavar="REGEX", help="Which weights are layers, if not the usual ones."
)
@click.option(
    "--format",
    type=click.Choice(["0.1", "0.2", "1.0", "1.1", "1.2"]),
    default="1.2",
    show_default=True,
    help="UQFF generation: current engines read 1.x only, mistral.rs 0.3 to 0.8.3 read 0.x only.",
)
@click.option(
    "--engine",
    type=click.Choice(["0.6", "0.8", "0.9"]),
    default="0.9",
    show_default=True,
    help="mistral.rs generation whose bytes and fallbacks to follow.",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "f32", "f16", "bf16"]),
    default="auto",
    show_default=True,
    help="Load dtype: weights are rounded to it first.",
)
@click.option(
    "--no-promote", is_flag=True, help="Give head and embedding the type of the others; 1.2 makes them better."
)
@click.option(
    "--shard-size",
    "shard_bytes",
    callback=_size,
    metavar="SIZE",
    default="10GiB",
    show_default=True,
    help="Begin a new file after so much: bytes, or a number with KB, MB, GB, KiB, MiB or GiB.",
)
@click.option("--force", is_flag=True, help="Replace the model that is in OUT.")
@click.option("--quiet", is_flag=True, help="Print nothing but warnings and errors.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def quantize(
    source: str,
    out: str,
    kinds: tuple[str, ...],
    recipe: str | None,
    layers: Any,
    format: str,
    engine: Any,
    dtype: str,
    no_promote: bool,
    shard_bytes: int,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Quantise the checkpoint SRC into the new model directory OUT.

    SRC is a directory with config.json and safetensors files, or the id of a repository on the Hugging Face hub. OUT
    appears when all of it is written; it must not exist, or be empty. Types are the engine's ISQ names (q4k, afq4,
    hqq8, fp8, ...), 2, 3, 4, 5, 6 or 8 bits, or unquant.

    With --json, the summary holds every layer: types, sizes, errors.
    """
    _import_libraries()
    from uqff.pipeline import quantize_model
    from uqff.recipe import load_recipe
    from uqff.report import result_document

    fallbacks: list[Fallback] = []
    loaded = load_recipe(recipe) if recipe is not None else None
    with _terminable(), _progress(shown=not quiet) as progress:
        result = quantize_model(
            source,
            out,
            kinds,
            recipe=loaded,
            layers=layers,
            format=format,
            engine=engine,
            dtype=dtype,
            promote=not no_promote,
            force=force,
            shard_bytes=shard_bytes,
            progress=progress,
            on_fallback=fallbacks.append,
        )
    if as_json:
        click.echo(json.dumps(result_document(result), indent=2))
    elif not quiet:
        _show(result)
    _warn(result, fallbacks)


def _import_libraries() -> None:
    """Import torch and numba without the garbage collector: it would go through all they create again and again while
    they are imported, and once more when the program ends. That is a second of four for a model of 250 M weights.
    """
    if "torch" in sys.modules or not gc.isenabled():
        return
    gc.disable()
    try:
        from uqff import kernels

        import_module("torch")
        if kernels.enabled():
            import_module("uqff.kernels.gguf_quantize")
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let a termination clean up like an interrupt, where signals can be caught."""

    def stop(*_: object) -> None:
        sys.exit(TERMINATED)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _progress(*, shown: bool) -> Iterator[Progress | None]:
    """A bar on the terminal that errors go to, with layer, rate and time left; none if it is no terminal."""
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from uqff import kernels

    columns = (
        TextColumn("{task.fields[layer]}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}  {task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        waiting = "" if kernels.compiled_before() or not kernels.enabled() else "compiling kernels, once"
        task = bar.add_task("", total=None, layer=waiting, count="", rate="")

        def step(step: Step) -> None:
            bar.update(
                task,
                total=step.weights,
                completed=step.weights_done,
                layer=printable(step.module),
                count=f"{step.layers_done}/{step.layers}",
                rate=_rate(bar.tasks[0].speed),
            )

        yield step


def _rate(weights_per_second: float | None) -> str:
    return "" if not weights_per_second else f"{weights_per_second / 1e6:.0f} M weights/s"


def _show(result: Result) -> None:
    from uqff.cli.render import echo_heading, echo_pairs, echo_table, size
    from uqff.report import type_rows

    echo_heading(str(result.path))
    pairs = [
        ("version", str(result.version)),
        ("load dtype", result.dtype),
        ("residual", f"{result.residual_tensors} tensors, {size(result.residual_bytes)}"),
    ]
    for output in result.outputs:
        count = len(output.shards)
        pairs.append((output.kind, f"{count} shard{'s' * (count > 1)}, {size(output.nbytes)}"))
    echo_pairs(pairs + _promotions(result))
    print()
    columns = [("isq", "left"), ("stored", "left"), ("layers", "right"), ("bytes", "right"), ("bits/weight", "right")]
    rows = []
    for output in result.outputs:
        for row in type_rows(output.layers):
            worst = ", ".join(f"{layer.module} {layer.distance.relative:.4f}" for layer in row.worst)
            sizes = f"{row.nbytes:,}", f"{row.bits_per_weight:.3f}"
            rows.append((output.kind, row.kind, str(row.layers), *sizes, f"{row.relative:.5f}", worst or "-"))
    echo_table([*columns, ("rel. RMS error", "right"), ("worst layers", "left")], rows)


def _promotions(result: Result) -> list[tuple[str, str]]:
    """A line for each output whose head or embedding has a better type than asked for."""
    lines = []
    for output in result.outputs:
        better = [f"{layer.module} {layer.requested}" for layer in output.layers if layer.promoted]
        if better:
            lines.append((f"{output.kind} promoted", ", ".join(better)))
    return lines


def _warn(result: Result, fallbacks: list[Fallback]) -> None:
    """Fallbacks are never silent."""
    for fallback in fallbacks:
        click.echo(f"uqff: fallback: {printable(str(fallback))}", err=True)
    for rule in result.unmatched:
        click.echo(f"uqff: recipe: {printable(rule.selector)} in line {rule.line} matches no layer", err=True)
