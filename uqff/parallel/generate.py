"""Greedy text from a model on one rank or several: prompt to ids, ids to tokens, and the numbers beside them.

with ranks.joined(device, timeout=60) as comm:
    answer = respond("DIR", "Once upon a time", comm, tokens=32)
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from uqff.errors import FormatError
from uqff.lora.applied import Lora
from uqff.parallel.arithmetic import Arithmetic
from uqff.parallel.comm import Comm, exchange_device
from uqff.parallel.consensus import settle
from uqff.parallel.decoding import NextToken
from uqff.parallel.model import Check, load_model
from uqff.parallel.source import directory_of
from uqff.parallel.text import Text

__all__ = ["Answer", "Generation", "generate", "respond"]


@dataclass(frozen=True)
class Generation:
    """What a model answered.

    Attributes:
        ids: of the new tokens; the one that ended the text is the last of them, as with the engine.
        logits: of each, as the model gave them, float32.
        logprobs: of each, ``log softmax`` of all logits, float32.
        finish_reason: ``stop`` at a token that ends a text, ``length`` at the bound.
    """

    ids: list[int]
    logits: list[float]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


@torch.inference_mode()
def generate(
    model: torch.nn.Module,
    prompt: Sequence[int],
    tokens: int,
    *,
    stop: Collection[int] = (),
    comm: Comm | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Generation:
    """Always take the most probable token; of equals the one of the lowest id.

    All ranks call this with the same arguments. Rank 0's choice counts: ranks of unlike machines may differ in the last
    bit of a logit.

    Args:
        model: of :func:`~uqff.parallel.load_model`.
        prompt: token ids, at least one.
        tokens: at most so many new ones.
        stop: ids that end the text.
        comm: the ranks that share the model; a world of one if None.
        on_token: called with every new id, as it comes, but for the one that ends the text.

    Raises:
        CommError: a rank did not take part.
    """
    comm = Comm.of(comm)
    if not prompt:
        raise FormatError("prompt is empty", expected="at least one token")
    device = next(model.parameters()).device
    ids = torch.tensor([list(prompt)], device=device)
    made = Generation([], [], [], "length")
    following = NextToken(model, comm, len(prompt) + tokens)
    for _ in range(tokens):
        chosen = following.choose(ids)
        ids = chosen[:1].long().view(1, 1)
        number, logit, logprob = chosen.tolist()  # one wait for the device, not three
        token = int(number)
        made.ids.append(token)
        made.logits.append(logit)
        made.logprobs.append(logprob)
        if token in stop:
            return replace(made, finish_reason="stop")
        if on_token is not None:
            on_token(token)
    return made


@dataclass(frozen=True)
class Answer:
    """What came of a prompt.

    Attributes:
        text: the answer, without the token that ended it.
        tokens: the text of each token by itself.
        prompt: ids of the prompt's tokens, chat template included.
        generation: ids and numbers.
        load_seconds: until the model was there.
        seconds: for all tokens.
    """

    text: str
    tokens: list[str]
    prompt: list[int]
    generation: Generation
    load_seconds: float
    seconds: float


def respond(
    path: str | os.PathLike[str],
    prompt: str,
    comm: Comm | None = None,
    *,
    tokens: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    raw: bool = False,
    check: Check = "sample",
    isq: str | None = None,
    workers: int | None = None,
    lora: Sequence[tuple[Lora, float]] = (),
    arithmetic: Arithmetic = "exact",
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Load a model and let it answer a prompt; the same on every rank.

    Args:
        path: see :func:`~uqff.parallel.load_model`, also for ``comm``, ``device``, ``dtype``, ``check`` and ``isq``.
        prompt: see :meth:`Text.encode`, also for ``raw``.
        comm: the ranks.
        tokens: at most so many new ones.
        device: where the model goes.
        dtype: of activations.
        raw: no chat template.
        check: how the ranks' files are compared.
        isq: which model of several; of a checkpoint, what it is quantised to.
        workers: threads that quantise.
        lora: adapters with their weights.
        arithmetic: see :func:`~uqff.parallel.load_model`.
        on_text: called with each piece of the answer, as it comes.

    Raises:
        UqffError: see :func:`~uqff.parallel.load_model`; also where ranks read the prompt as different tokens.
    """
    comm, device = Comm.of(comm), torch.device(device)
    exchange = exchange_device(device)
    start = time.perf_counter()
    how: dict[str, Any] = {"dtype": dtype, "check": check, "isq": isq, "workers": workers, "arithmetic": arithmetic}
    model = load_model(path, comm, device=device, lora=list(lora), **how)

    def read() -> tuple[Text, list[int]]:
        with directory_of(path, isq) as directory:
            text = Text(directory)
        config: Any = model.config
        ids, count = text.encode(prompt, raw=raw), config.get_text_config().vocab_size
        if ids and max(ids) >= count:  # torch would look beyond the embedding
            raise FormatError(
                "token outside of the vocabulary", file=os.fspath(path), expected=f"below {count}", got=max(ids)
            )
        return text, ids

    text, ids = settle(comm, "reading the prompt", read, exchange)
    comm.check_same(
        hashlib.blake2b(repr((ids, sorted(text.stop))).encode(), digest_size=16).digest(), "prompt", exchange
    )
    loaded = time.perf_counter()
    made: list[int] = []
    said = ""

    def say(token: int) -> None:
        nonlocal said
        made.append(token)
        so_far = text.decode(made)
        if on_text is not None and not so_far.endswith("\ufffd"):  # a character may take several tokens
            on_text(so_far[len(said) :])
            said = so_far

    generation = generate(model, ids, tokens, stop=text.stop, comm=comm, on_token=say)
    done = time.perf_counter()
    whole = text.decode(made)
    if on_text is not None and len(whole) > len(said):
        on_text(whole[len(said) :])
    return Answer(whole, text.tokens(generation.ids), ids, generation, loaded - start, done - loaded)
