"""``uqff convert``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from uqff.cli.options import DtypeChoice, complete_kind, isq_option, kind_option, mmproj_option, selected
from uqff.cli.progress import shown_progress, terminable
from uqff.errors import printable

if TYPE_CHECKING:
    from uqff.conversion import Conversion

__all__ = ["convert"]


@click.command(short_help="GGUF to UQFF and back, block by block.")
@click.argument("source", metavar="SRC", type=click.Path())
@click.argument("out", metavar="OUT", type=click.Path())
@click.option("--to", type=click.Choice(["uqff", "gguf"]), help="Direction, if not the one that SRC suggests.")
@click.option(
    "--uqff-version",
    "--format",
    "version",
    type=click.Choice(["1.2", "0.2"]),
    default="1.2",
    show_default=True,
    help="UQFF version to write.",
)
@click.option(
    "--assets",
    type=click.Path(exists=True, file_okay=False),
    help="Directory with the model's own config.json and tokenizer: compared, and taken in place of metadata.",
)
@mmproj_option
@click.option(
    "--dtype",
    type=DtypeChoice(),
    default="f32",
    show_default=True,
    help="What norms are stored in, in UQFF.",
)
@click.option(
    "--requantize",
    callback=kind_option,
    shell_complete=complete_kind,
    metavar="KIND",
    help="Type of layers whose own UQFF does not have (IQ4_XS, TQ1_0, ...): they are quantised again. Else refused.",
)
@click.option("--strict", is_flag=True, help="Refuse UQFF that the engine could not load or run however it is started.")
@click.option("--force", is_flag=True, help="Replace what is in OUT.")
@click.option("--quiet", is_flag=True, help="Print nothing but warnings and errors.")
@isq_option
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def convert(
    source: str,
    out: str,
    to: str | None,
    version: str,
    assets: str | None,
    mmproj: str | None,
    dtype: str,
    requantize: str | None,
    strict: bool,
    force: bool,
    quiet: bool,
    isq: str | None,
    as_json: bool,
) -> None:
    """Convert the GGUF file SRC to the UQFF model directory OUT, or the UQFF model SRC to the GGUF file OUT.
    Of a UQFF directory with several models, SRC:TYPE is one.

    Blocks of ggml's types are carried over as they are; nothing is quantised again unless --requantize says so. A model
    that cannot be converted without loss is refused, with all that stands in the way. Llama, Mistral,
    Mixtral, Qwen2, Qwen3, Qwen3-MoE, SmolLM3, Gemma and Gemma 2.
    """
    from uqff.conversion import conversion_document
    from uqff.conversion import convert as converted

    source = selected(source, isq, "SRC", mmproj=mmproj)
    with terminable(), shown_progress(shown=not quiet) as progress:
        result = converted(
            source,
            out,
            to=to,
            version=version,
            assets=assets,
            mmproj=mmproj,
            dtype=dtype,
            requantize=requantize,
            strict=strict,
            force=force,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(conversion_document(result), indent=2))
    elif not quiet:
        _show(result)
    for note in result.notes:
        click.echo(f"uqff: note: {printable(note)}", err=True)


def _show(result: Conversion) -> None:
    from uqff.cli.render import echo_heading, echo_pairs, size

    echo_heading(str(result.path))
    echo_pairs(
        [
            ("format", result.format),
            ("weights", f"{', '.join(result.files[:3])}{', ...' * (len(result.files) > 3)}, {size(result.nbytes)}"),
            ("types", ", ".join(f"{count} {kind}" for kind, count in result.types.most_common())),
            ("beside", ", ".join(result.written) or "-"),
        ]
    )
