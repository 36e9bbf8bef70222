"""``uqff run``, also ``python -m uqff.run``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from uqff.cli.options import DtypeChoice, fetched, isq_option, lora_option, selected
from uqff.errors import UqffError

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
@click.option("--device", help="cpu, cuda or cuda:N; CUDA if there is one.")
@click.option("--timeout", default=300.0, show_default=True, help="Seconds that a rank waits for the others.")
@click.option("--check-all", is_flag=True, help="Compare every byte of the ranks' files, not headers and samples.")
@isq_option
@click.option("--workers", type=click.IntRange(1), help="Threads that quantise a checkpoint; by default one a CPU.")
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
    DIR:TYPE is one model of several. Or it is a checkpoint in safetensors files, plain or quantised by others, which
    --isq quantises while it is loaded: to a type, or by the recipe in a file.

    On several ranks, each reading its share only, and rank 0 printing:

        python -m torch.distributed.run --nproc-per-node 2 -m uqff.run DIR --prompt TEXT

    Exits with 1, on every rank, if a rank fails, if files differ between ranks, or if the model does not fit the number
    of ranks.
    """
    from uqff.checkpoints.model import holds_checkpoint
    from uqff.container.shards import resolve

    path = fetched(path, isq)
    if not holds_checkpoint(path):
        path, isq = selected(path, isq, "DIR"), None
        resolve(path)  # before what takes seconds to import

    from uqff.codes import LOADED_DTYPES
    from uqff.parallel.generate import respond
    from uqff.parallel.ranks import device_of, joined, rank_of

    rank, world_size = rank_of()
    speaks = rank == 0
    try:
        place = device_of(device)
        with joined(place, timeout) as comm:
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
                on_text=_say if speaks and not as_json else None,
            )
    except UqffError as error:
        if world_size > 1:
            error.problem = f"rank {rank} of {world_size}: {error.problem}"
        raise
    if speaks:
        print(json.dumps(_document(answer, world_size)) if as_json else "")


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
