"""Do one job with mistralrs: a script for the client's own interpreter, which has neither this package nor torch.

It is begun a thousand times in `make interop`, so it imports no more than it needs; see `client.Client` for the jobs.
"""

from __future__ import annotations

import json
import sys

TYPE_CHECKING = False  # typing itself would take a third of the time until mistralrs is there
if TYPE_CHECKING:
    from typing import Any

RESULT = "uqff-client-result:"
PROMPT = "t5 t9 t17 t30 t41 t11 t23"


def run_job(job: dict[str, Any]) -> Any:
    """Do `job` in this process, which must be the client's."""
    import mistralrs  # type: ignore[import-not-found]

    if job["do"] == "about":
        import importlib.metadata
        import platform

        return {
            "version": importlib.metadata.version("mistralrs"),
            "machine": platform.machine(),
            "system": platform.system(),
            "libc": " ".join(platform.libc_ver()),
        }
    which = dict(job["which"])
    if "arch" in which:
        known = getattr(mistralrs, "MultimodalArchitecture" if "Multimodal" in job.get("kind", "") else "Architecture")
        which["arch"] = next(getattr(known, name) for name in dir(known) if name.lower() == which["arch"].lower())
    which["dtype"] = getattr(mistralrs.ModelDType, which["dtype"])
    source = getattr(mistralrs.Which, job.get("kind", "Plain"))(**which)
    runner = mistralrs.Runner(which=source, in_situ_quant=job["isq"], token_source="none", no_paged_attn=True)
    if "tokens" not in job:
        return None
    made = [_answer(mistralrs, runner, job, prompt) for prompt in job.get("prompts", [PROMPT])]
    return made if "prompts" in job else made[0]


def _answer(mistralrs: Any, runner: Any, job: dict[str, Any], prompt: str) -> dict[str, Any]:
    request = mistralrs.ChatCompletionRequest(
        model="default",
        messages=prompt,
        max_tokens=job["tokens"],
        temperature=job["temperature"],
        top_k=1,
        logprobs=True,
        top_logprobs=2 if job["temperature"] else 1,
    )
    choice = runner.send_chat_completion_request(request).choices[0]
    content = choice.logprobs.content
    return {
        "tokens": [entry.token for entry in content],
        "logits": [entry.logprob for entry in content],
        "finish_reason": choice.finish_reason,
        "seconds": [entry.top_logprobs[1].logprob for entry in content] if job["temperature"] else [],
    }


if __name__ == "__main__":
    print(RESULT + json.dumps(run_job(json.loads(sys.argv[1]))) + "\n", end="", flush=True)
