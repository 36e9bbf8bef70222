"""Let llama.cpp run one file: a script for its own interpreter, which has neither this package nor torch."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

RESULT = "uqff-llamacpp-result:"
TOKENS = 16


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of a file, their log probabilities, and what the prompt became; in llama.cpp's own process."""
    import xllamacpp as llama  # type: ignore[import-not-found]

    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.warmup = job["file"], 256, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    asked = {"prompt": job["prompt"], "temperature": 0, "n_probs": 1, "cache_prompt": False, "ignore_eos": True}
    server, seconds = llama.Server(params), []
    for tokens in job.get("lengths", [TOKENS]):
        start = time.perf_counter()
        answer = server.handle_completions({**asked, "max_tokens": tokens})
        seconds.append(time.perf_counter() - start)
    content = answer["choices"][0]["logprobs"]["content"]
    prompt_tokens = answer["usage"]["prompt_tokens"]
    return {
        "ids": [each["id"] for each in content],
        "logprobs": [each["logprob"] for each in content],
        "prompt": prompt_tokens,
        "seconds": seconds,
    }


if __name__ == "__main__":
    print(RESULT + json.dumps(run_job(json.loads(sys.argv[1]))), flush=True)
