"""``uqff run``, also ``python -m uqff.run``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from uqff.cli.options import DtypeChoice, lora_option, model_path, on_ranks, rank_options

if TYPE_CHECKING:
    from uqff.parallel.arithmetic import Arithmetic
    from uqff.parallel.generate import Answer

__all__ = ["run"]


@click.command(short_help="Let a model answer a prompt.")
@click.argument("path", metavar="DIR", type=click.Path())
@click.option("--prompt", required=True, help="What the model answers.")
@click.option("--tokens", default=64, show_default=True, type=click.IntRange(1), help="At most so many new tokens.")
@click.option("--raw", is_flag=True, help="The prompt is plain text: no chat template.")
@click.option("--dtype", type=DtypeChoice(), help="Of activations; by default that of residual.safetensors.")
@rank_options
@lora_option
@click.option(
    "--arithmetic",
    type=click.Choice(["exact", "engine"]),
    default="exact",
    show_default=True,
    help="Of products on CPUs: with weights and activations as they are, or as mistral.rs multiplies.",
)
@click.option("--json", "as_json", is_flag=True, help="Tokens, ids and log probabilities as JSON.")
def run(
    path: str,
    prompt: str,
    tokens: int,
    raw: bool,
    dtype: str | None,
    device: str | None,
    timeout: float,
    check_all: bool,
    isq: str | None,
    workers: int | None,
    lora: list[tuple[str, float]],
    arithmetic: Arithmetic,
    as_json: bool,
) -> None:
    """Let a model answer a prompt: greedy text.

    DIR is a model directory (.uqff files, residual.safetensors, config.json, tokenizer), or a .uqff file in one;
    DIR:TYPE is one model of several. Or it is a GGUF file, or a checkpoint in safetensors files, plain or quantised by
    others, which --isq quantises while it is loaded: to a type, or by the recipe in a file.

    On several ranks, each reading its share only, and rank 0 printing:

        python -m torch.distributed.run --nproc-per-node 2 -m uqff.run DIR --prompt TEXT

    Exits with 1, on every rank, if a rank fails, if files differ between ranks, or if the model does not fit the number
    of ranks.
    """
    path, isq = model_path(path, isq, "DIR")

    from uqff.codes import LOADED_DTYPES
    from uqff.parallel.generate import respond

    with on_ranks(device, timeout) as (comm, place):
        answer = respond(
            path,
            prompt,
            comm,
            tokens=tokens,
            device=place,
            dtype=None if dtype is None else LOADED_DTYPES[dtype.upper()].torch,
            raw=raw,
            isq=isq,
            workers=workers,
            lora=lora,
            arithmetic=arithmetic,
            check="all" if check_all else "sample",
            on_text=_say if comm.rank == 0 and not as_json else None,
        )
    if comm.rank == 0:
        print(json.dumps(_document(answer, comm.world_size)) if as_json else "")


def _say(text: str) -> None:
    print(text, end="", flush=True)


def _document(answer: Answer, world_size: int) -> dict[str, object]:
    made = answer.generation
    return {
        "text": answer.text,
        "tokens": answer.tokens,
        "ids": made.ids,
        "logprobs": made.logprobs,
        "finish_reason": made.finish_reason,
        "prompt_ids": answer.prompt,
        "world_size": world_size,
        "load_seconds": round(answer.load_seconds, 3),
        "tokens_per_second": round(len(made.ids) / answer.seconds, 2) if answer.seconds else 0.0,
    }
