"""What llama.cpp says of the tokens that follow some others: a script for its own interpreter.

    python llamacpp_job.py JOB.json OUT.json

It has neither this package nor torch, and no function for perplexity: it is asked for one token after each beginning of
a window, with the log probabilities of the whole vocabulary.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def run_job(job: dict[str, Any]) -> list[list[list[float]]]:
    """Of each window, log probabilities ``[predictions, vocabulary]``."""
    import xllamacpp as llama  # type: ignore[import-not-found]

    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.n_parallel = job["file"], 512, False, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = llama.Server(params)
    size = job["vocabulary"]
    made = []
    for window in job["windows"]:
        rows = []
        for end in range(job["first"] + 1, len(window)):
            asked = {"prompt": window[:end], "max_tokens": 1, "temperature": 0, "n_probs": size, "cache_prompt": True}
            answer = server.handle_completions({**asked, "ignore_eos": False})
            row = [-1e9] * size
            for each in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                row[each["id"]] = each["logprob"]
            rows.append(row)
        made.append(rows)
    return made


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(run_job(json.loads(Path(sys.argv[1]).read_text()))))
