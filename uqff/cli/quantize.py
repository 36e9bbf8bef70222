"""``uqff quantize``."""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections import Counter
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

from uqff.cli.options import (
    DtypeChoice,
    complete_kind,
    layers_option,
    lora_option,
    mmproj_option,
    show_bars,
    size_option,
)
from uqff.cli.progress import shown_progress, terminable
from uqff.codes import FORMATS
from uqff.errors import UqffError, printable

if TYPE_CHECKING:
    from uqff.quantization.result import Output, Result
    from uqff.quantization.types import Fallback

__all__ = ["quantize"]


def _kind(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    from uqff.quantization.types import KEEP, kind_name

    try:
        return tuple(KEEP if value.lower() == KEEP else kind_name(value) for value in values)
    except UqffError as error:
        raise click.BadParameter(str(error), ctx, parameter) from None


def _one_kind(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    return None if value is None else _kind(ctx, parameter, (value,))[0]


@click.command(short_help="Quantise a checkpoint.")
@click.argument("source", metavar="SRC", type=click.Path())
@click.argument("out", metavar="OUT", type=click.Path())
@click.option(
    "--isq",
    "kinds",
    multiple=True,
    required=True,
    callback=_kind,
    shell_complete=complete_kind,
    help="Type; may be given several times. Or keep: layers stay as SRC has them, where UQFF has a form for that.",
)
@click.option(
    "--fallback",
    callback=_one_kind,
    shell_complete=complete_kind,
    metavar="KIND",
    help="With --isq keep: type of layers that cannot stay.",
)
@click.option("--requantize", is_flag=True, help="Quantise blocks of a GGUF file again; else they are only kept.")
@click.option(
    "--assets",
    type=click.Path(exists=True, file_okay=False),
    help="Of a GGUF file: directory with the model's own config.json and tokenizer, in place of metadata.",
)
@mmproj_option
@click.option(
    "--recipe",
    type=click.Path(exists=True, dir_okay=False),
    help="Topology YAML: types of some layers, by their names in SRC.",
)
@click.option(
    "--layers",
    callback=layers_option,
    metavar="REGEX|auto",
    help="Which weights are layers, if not the usual ones; auto: those of linear layers of the model in transformers.",
)
@click.option(
    "--uqff-version",
    "--format",
    "version",
    type=click.Choice(list(FORMATS)),
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
    type=DtypeChoice("auto"),
    default="auto",
    show_default=True,
    help="Load dtype: weights are rounded to it first.",
)
@click.option(
    "--effort",
    type=click.Choice(["engine", "best", "calibrated"]),
    default="engine",
    show_default=True,
    help="How codes and scales are chosen, in the same format: to the engine's bytes, for the least squared error, or "
    "so that layers answer as before, which needs --hessian.",
)
@click.option(
    "--imatrix",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Importance matrix (llama.cpp's, GGUF or older, or .cimatrix): errors count as much as the inputs they meet.",
)
@click.option(
    "--hessian",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="What `uqff calibrate --hessian` wrote, for --effort calibrated.",
)
@click.option(
    "--no-promote", is_flag=True, help="Give head and embedding the type of the others; 1.2 makes them better."
)
@click.option(
    "--engine-biases",
    is_flag=True,
    help="Store biases in the engine's dtypes, though it cannot add all of them: FP8's as F8E4M3, MXFP4's as BF16, "
    "GGUF's and F8Q8's as F32. Else in the load dtype.",
)
@click.option("--strict", is_flag=True, help="Refuse what the engine could not load or run however it is started.")
@click.option(
    "--shard-size",
    "shard_bytes",
    callback=size_option,
    metavar="SIZE",
    default="10GiB",
    show_default=True,
    help="Begin a new file after so much: bytes, or a number with KB, MB, GB, KiB, MiB or GiB.",
)
@lora_option
@click.option("--base-model", metavar="NAME", help="For the report of 1.x: what was quantised, if not a hub id.")
@click.option("--repo-id", metavar="NAME", help="For the report of 1.x: where it will be published.")
@click.option("--resume", is_flag=True, help="Keep what is done if interrupted; go on from there if one was.")
@click.option("--force", is_flag=True, help="Replace the model that is in OUT.")
@click.option("--quiet", is_flag=True, help="Print nothing but warnings and errors.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def quantize(
    source: str,
    out: str,
    kinds: tuple[str, ...],
    fallback: str | None,
    requantize: bool,
    assets: str | None,
    mmproj: str | None,
    recipe: str | None,
    layers: Any,
    version: str,
    engine: Any,
    dtype: str,
    effort: Any,
    imatrix: str | None,
    hessian: str | None,
    no_promote: bool,
    engine_biases: bool,
    strict: bool,
    shard_bytes: int,
    lora: list[tuple[str, float]],
    base_model: str | None,
    repo_id: str | None,
    resume: bool,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Quantise the checkpoint SRC into the new model directory OUT.

    SRC is a directory with config.json and safetensors files, a GGUF file, or a repository of the Hugging Face hub
    (owner/name, owner/name@revision, hf://owner/name/folder; owner/name:TYPE or owner/name:FILE of several GGUF files).
    OUT appears when all of it is written; it must not exist, or be empty. Types are the engine's ISQ names (q4k, afq4,
    hqq8, fp8, ...), 2, 3, 4, 5, 6 or 8 bits, or unquant. SRC may be quantised itself (FP8, MLX,
    MXFP4, HQQ, GPTQ, AWQ, auto-round, bitsandbytes, compressed-tensors): its weights are dequantised in float32 and
    quantised anew, or kept. Blocks of a GGUF file are kept, or need --requantize.

    With --json, the summary holds every layer: types, sizes, errors.
    """
    from pathlib import Path

    from uqff.container.staging import ResumeWarning, check_target
    from uqff.hub.names import is_hub_name

    if not Path(source).exists() and not is_hub_name(source):
        raise FileNotFoundError(f"no such directory or GGUF file: {source}")
    check_target(Path(out), force=force)
    show_bars()
    _import_numba()  # takes its time, and is for nothing if there is nothing to be done
    from uqff.quantization.recipe import load_recipe
    from uqff.quantization.result import result_document
    from uqff.quantization.run import quantize_model

    fallbacks: list[Fallback] = []
    loaded = load_recipe(recipe) if recipe is not None else None
    with warnings.catch_warnings(record=True) as told, terminable(), shown_progress(shown=not quiet) as progress:
        warnings.simplefilter("always", ResumeWarning)
        result = quantize_model(
            source,
            out,
            kinds,
            fallback=fallback,
            requantize=requantize,
            assets=assets,
            mmproj=mmproj,
            recipe=loaded,
            layers=layers,
            version=version,
            engine=engine,
            dtype=dtype,
            effort=effort,
            imatrix=imatrix,
            hessian=hessian,
            promote=not no_promote,
            engine_biases=engine_biases,
            strict=strict,
            force=force,
            resume=resume,
            shard_bytes=shard_bytes,
            measure=as_json or not quiet,
            base_model=base_model,
            repo_id=repo_id,
            lora=lora,
            progress=progress,
            on_fallback=fallbacks.append,
        )
    for each in told:
        click.echo(f"uqff: {printable(str(each.message))}", err=True)
    if as_json:
        click.echo(json.dumps(result_document(result), indent=2))
    elif not quiet:
        _show(result)
    _warn(result, fallbacks)


def _import_numba() -> None:
    """Import numba without the garbage collector: it would go through all that it creates again and again while it is
    imported, and once more when the program ends. That is a tenth of a second, of 1.3 for a model of 250 M weights.
    """
    if "numba" in sys.modules or not gc.isenabled():
        return
    gc.disable()
    try:
        from uqff import simd

        if simd.enabled():
            import_module("uqff.families.gguf.cpu_quantize")
    finally:
        gc.freeze()
        gc.enable()


def _show(result: Result) -> None:
    from uqff.cli.render import echo_heading, echo_pairs, echo_table, size
    from uqff.quantization.result import type_rows

    echo_heading(str(result.path))
    pairs = [
        ("version", str(result.version)),
        ("load dtype", result.dtype),
        ("residual", f"{result.residual_tensors} tensors, {size(result.residual_bytes)}"),
    ]
    for each in result.lora:
        weight = "" if each.weight == 1 else f", times {each.weight:g}"
        pairs.append(("adapter", f"{each.path}: {each.matrices} matrices{weight}"))
    for output in result.outputs:
        count = len(output.shards)
        pairs.append((output.kind, f"{count} shard{'s' * (count > 1)}, {size(output.nbytes)}"))
        pairs += [(f"{output.kind} biases", text) for text in _biases(output)]
        pairs += [(label, text) for label, text in _kept(output)]
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


def _biases(output: Output) -> list[str]:
    """How many biases there are and in which dtype; what is lost of them and what follows from it is told apart."""
    counts = Counter(layer.bias.dtype.safetensors for layer in output.layers if layer.bias is not None)
    return [", ".join(f"{count} in {dtype}" for dtype, count in counts.items())] if counts else []


def _kept(output: Output) -> list[tuple[str, str]]:
    """How many layers are as the checkpoint has them, and of which types; the others are among the fallbacks."""
    counts = Counter(layer.stored for layer in output.layers if layer.kept)
    if not counts:
        return []
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    return [(f"{output.kind} as they were", f"{sum(counts.values())} of {len(output.layers)} layers: {kinds}")]


def _promotions(result: Result) -> list[tuple[str, str]]:
    """A line for each output whose head or embedding has a better type than asked for."""
    lines = []
    for output in result.outputs:
        better = [f"{layer.module} {layer.requested}" for layer in output.layers if layer.promoted]
        if better:
            lines.append((f"{output.kind} promoted", ", ".join(better)))
    return lines


def _warn(result: Result, fallbacks: list[Fallback]) -> None:
    """Fallbacks, losses and what the engine will make of it are never silent: a line for each reason."""
    from uqff.lora.applied import missing_text
    from uqff.quantization.result import fallback_lines

    for line in fallback_lines(fallbacks):
        click.echo(f"uqff: fallback: {printable(line)}", err=True)
    for rule in result.unmatched:
        click.echo(f"uqff: recipe: {printable(rule.selector)} in line {rule.line} matches no layer", err=True)
    for adapter in result.lora:
        if adapter.missing:
            click.echo(f"uqff: adapter: {printable(missing_text(adapter.path, adapter.missing))}", err=True)
    for note in result.notes:
        click.echo(f"uqff: note: {printable(note)}", err=True)
    for output in result.outputs:
        for told in (*output.bias_losses, *output.limits):
            click.echo(f"uqff: {output.kind}: {printable(str(told))}", err=True)
