"""How long each token takes in one program: a script for that program's own interpreter, which lacks this package.

    python token_times.py PROGRAM MODEL THREADS

Programs are ``uqff``, ``mistralrs`` and ``xllamacpp``, a model is what that loads. Having loaded it, the script says
so. Then each line of its input, ``HOW TOKENS``, is answered by the seconds from one token to the next of an answer of
that length. The first token, which comes with the prompt, is where they begin.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

RESULT = "token-times:"
PROMPT = "quickbrownfox"

Answer = Callable[[str, int, Callable[[], None]], None]
"""Generates, in a way, so many tokens, and calls something after each of them."""


def uqff(model: str, threads: int) -> Answer:
    """The way is the arithmetic; that of ``uqff run`` but for what it makes of tokens."""
    import torch

    from uqff.parallel import load_model, set_arithmetic
    from uqff.parallel.generate import generate
    from uqff.parallel.text import Text

    torch.set_num_threads(threads)
    loaded = load_model(model, dtype=torch.float32)
    prompt = Text(Path(model)).encode(PROMPT, raw=True)

    def answer(how: str, tokens: int, after: Callable[[], None]) -> None:
        set_arithmetic(loaded, "engine" if how == "engine" else "exact")
        generate(loaded, prompt, tokens, on_token=lambda _: after())

    return answer


def mistralrs(model: str, threads: int) -> Answer:
    """Keys and values are float16, as it has them by itself."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    import mistralrs as engine  # type: ignore[import-not-found]

    names = sorted(file.name for file in Path(model).glob("*.uqff"))
    source = {"model_id": model, "arch": engine.Architecture.Llama, "dtype": engine.ModelDType.F32}
    which = engine.Which.Plain(**source, from_uqff=names)
    runner = engine.Runner(which=which, token_source="none", no_paged_attn=True)

    def answer(_: str, tokens: int, after: Callable[[], None]) -> None:
        asked = {"model": "default", "messages": PROMPT, "max_tokens": tokens, "temperature": 0.0, "top_k": 1}
        for _chunk in runner.send_chat_completion_request(
            engine.ChatCompletionRequest(**asked, stream=True, ignore_eos=True)
        ):
            after()

    return answer


def xllamacpp(model: str, threads: int) -> Answer:
    """As llama.cpp is by itself, but for the threads."""
    import xllamacpp as llama  # type: ignore[import-not-found]

    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.warmup = model, 256, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = llama.Server(params)

    def answer(_: str, tokens: int, after: Callable[[], None]) -> None:
        asked = {"prompt": PROMPT, "temperature": 0, "cache_prompt": False, "ignore_eos": True, "max_tokens": tokens}
        server.handle_completions({**asked, "stream": True}, lambda _chunk: after())

    return answer


def run(program: Callable[[str, int], Answer], model: str, threads: int) -> None:
    """Answer what is asked, until there is no more."""
    answer = program(model, threads)
    print(f"{RESULT} loaded", flush=True)
    for line in sys.stdin:
        how, _, tokens = line.strip().rpartition(" ")
        print(f"{RESULT} {json.dumps(_gaps(answer, how, int(tokens)))}", flush=True)


def _gaps(answer: Answer, how: str, tokens: int) -> list[float]:
    times: list[float] = []
    answer(how, tokens, lambda: times.append(time.perf_counter()))
    times = times[:tokens]  # the end of an answer may be told, too
    return [round(times[i + 1] - times[i], 6) for i in range(len(times) - 1)]


if __name__ == "__main__":
    run({"uqff": uqff, "mistralrs": mistralrs, "xllamacpp": xllamacpp}[sys.argv[1]], sys.argv[2], int(sys.argv[3]))
