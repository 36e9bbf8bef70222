"""What mistral.rs says of the tokens that follow some others: a script for its own interpreter.

    python engine_job.py JOB.json OUT.json

It has neither this package nor torch. The engine is asked for one token after each beginning of a window, given as
text, with the log probabilities of the whole vocabulary.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def run_job(job: dict[str, Any]) -> list[list[float]]:
    """Of each text, log probabilities ``[vocabulary]``."""
    import mistralrs  # type: ignore[import-not-found]

    which = mistralrs.Which.Plain(
        model_id=job["model"], arch=mistralrs.Architecture.Llama, from_uqff=job["files"], dtype=mistralrs.ModelDType.F32
    )
    runner = mistralrs.Runner(which=which, token_source="none", no_paged_attn=True)
    size = job["vocabulary"]
    rows = []
    for text, count in job["texts"]:
        request = mistralrs.ChatCompletionRequest(
            model="default", messages=text, max_tokens=1, temperature=1.0, logprobs=True, top_logprobs=size
        )
        answer = runner.send_chat_completion_request(request)
        if answer.usage.prompt_tokens != count:
            raise SystemExit(f"{count} tokens became {answer.usage.prompt_tokens}")
        row = [float("nan")] * size
        for each in answer.choices[0].logprobs.content[0].top_logprobs:
            row[each.token] = each.logprob
        rows.append(row)
    return rows


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(run_job(json.loads(Path(sys.argv[1]).read_text()))))
