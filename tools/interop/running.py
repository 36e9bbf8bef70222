"""The clients' files, run by this package on 1, 2 and 4 ranks and by the clients themselves, for `tools/interop`.

Each client quantises tiny checkpoints of Llama (untied), Qwen2 (biases, tied), Qwen3, Mistral and Qwen3-MoE in F32 and
answers greedily from its own file. `uqff.parallel` loads the same file in 1, 2 and 4 processes; of two files of one
model and type, one of each generation, one in 1 and 2, the other in 1 and 4, by turns. Required:

* the same greedy tokens, and logits within `RANKS`, on all numbers of ranks;
* where the client multiplies with dense float32 weights, its tokens, and its numbers within `DENSE`;
* where it does not, its numbers within a stated noise, and no token of its own that is further behind ours than twice
  that: with ggml types it rounds activations to eight bits (`GGML`), and 0.6.0 multiplies HQQ in
  float16 (`HALF`);
* with ggml types and the arithmetic of the engine, the numbers of 0.9.5 within `DENSE` again, for `ENGINE_SHARE` of the
  tokens that answer each of `ENGINE_PROMPTS`, and within `GGML` for the others. Those are tokens of which an activation
  lies between two codes, or a scale between two float16s, so nearly in the middle that the last bit of a float32
  decides. One such moves the numbers of its token and of all after it, so prompts are short, and many.

The numbers are log probabilities of 0.9.5 and logits of 0.6.0, see `client.Generation`. For the comparison, the model
is given the client's tokens, so that one other choice does not end it.

Files that the client writes and cannot run (Q8_1, biases in FP8, AFQ experts) are run on all numbers of ranks alike; so
are those that it cannot write on this CPU, which this package makes.

All files of a number of ranks are run by one process for each, which is this file:
`python -m tools.interop.running JOBS OUT`, alone or under torchrun.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.table import Table

from tools.interop.client import Client, ClientError, Generation, NotOnThisCPU, features
from tools.interop.client_job import PROMPT
from tools.interop.few import few_of_each
from tools.processes import ALONE, Workers
from tools.tiny import architectures as tiny_architectures
from tools.tiny.models import SPECIAL_TOKENS, TinyModel
from uqff.parallel.text import Text
from uqff.quantization.run import quantize_model

WORLDS = (1, 2, 4)
CLASSES = tuple(
    f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen2", "qwen3", "mistral", "qwen3_moe")
)
"""Modules of the models."""
TOKENS = 16
RANKS = 1e-4
DENSE = 1e-4
GGML = 0.2
HALF = 0.1

ENGINE_PROMPTS = tuple(f"t{5 + 2 * i}" for i in range(24))
"""Of one word each: few activations, which hardly ever lie at such a place."""
ENGINE_TOKENS = 2
ENGINE_SHARE = 0.85
VNNI = ("avx_vnni", "avx512_vnni")

REASON = 60
"""Characters of a client's last words that are shown."""

ROOT = Path(__file__).resolve().parent.parent.parent
WHEEL = "0.6.0"
MODELS: dict[str, TinyModel | str] = {
    "llama": TinyModel("llama", intermediate_size=256, layers=2, kv_heads=2, std=0.08, seed=51),
    "qwen2": TinyModel("qwen2", intermediate_size=256, layers=2, std=0.08, tied=True, seed=52),
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "qwen3moe": "Qwen3Moe",
}
"""Checkpoints by the client's name of their architecture; texts are of `tiny_architectures`."""

GGML_KINDS = ("q4_0", "q8_0", "q4k")
KINDS = {
    "llama": ("afq3", "afq4", "q4_0", "hqq4", "q4k", "hqq8", "mxfp4", "f8q8", "q8_0", "fp8"),
    "qwen2": ("afq4", "hqq8", "fp8", "f8q8", "q4k"),
    "qwen3moe": ("afq4", "hqq4", "fp8", "q8_0"),
}
OTHER_KINDS = ("afq4", "hqq4", "fp8", "q8_0")


@dataclasses.dataclass(frozen=True)
class Case:
    """A file of a client, and what the client makes of it: an answer, or a reason why there is none."""

    version: str
    model: str
    kind: str
    directory: Path
    generation: Generation | None
    reason: str = ""
    not_run: bool = False
    short: tuple[Generation, ...] = ()

    @property
    def numbers(self) -> list[float]:
        """The client's numbers, for as many tokens as were asked for."""
        assert self.generation is not None
        given = self.generation.logits[:TOKENS]
        return [10**value for value in given] if self.version == WHEEL else given

    @property
    def ids(self) -> list[int]:
        """The client's tokens; a word of the tiny tokenizers spells its id."""
        assert self.generation is not None
        return [_id(token) for token in self.generation.tokens[:TOKENS]]

    @property
    def bound(self) -> float:
        """How far the client's numbers may be from ours."""
        if self.kind in GGML_KINDS:
            return GGML
        half = self.version == WHEEL and self.kind.startswith("hqq")
        return HALF if half else DENSE


def _id(token: str) -> int:
    return SPECIAL_TOKENS.index(token) if token in SPECIAL_TOKENS else int(token.removeprefix("t"))


def engine_share(kind: str) -> float:
    """How many of the short answers' numbers must be the client's, see `ENGINE_SHARE`.

    None of q8_0 where the CPU has VNNI: there the engine rounds activations to Q8K for matrices of whole tiles (candle,
    `k_quants.rs`), which our arithmetic does on no CPU.
    """
    return 0.0 if kind == "q8_0" and not {*(features() or ())}.isdisjoint(VNNI) else ENGINE_SHARE


@dataclasses.dataclass(frozen=True)
class Row:
    """One file: what differs, if anything does."""

    case: Case
    same_ranks: bool
    between_ranks: float
    same_tokens: bool = True
    from_client: float = 0.0
    behind: float = 0.0
    engine: tuple[float, ...] = ()
    worlds: tuple[int, ...] = ()

    @property
    def same_as_engine(self) -> int:
        """How many of the numbers of short answers, in the arithmetic of the engine, are the client's."""
        return sum(apart <= DENSE for apart in self.engine)

    @property
    def equal(self) -> bool:
        """Nothing differs that should not."""
        case = self.case
        ranks = self.same_ranks and self.between_ranks <= RANKS
        if case.generation is None:
            return ranks
        tokens = self.same_tokens if case.bound == DENSE else self.behind <= 2 * case.bound
        if self.same_as_engine < engine_share(case.kind) * len(self.engine) or max(self.engine, default=0.0) > GGML:
            return False
        return ranks and tokens and self.from_client <= case.bound

    def row(self) -> list[str]:
        """The cells of the table."""
        case = self.case
        tokens = "equal" if self.same_ranks else "differ"
        ranks = f"{', '.join(map(str, self.worlds))}: {tokens}, {self.between_ranks:.1g}"
        if case.generation is None:
            client = f"[yellow]{'' if case.not_run else 'cannot run it: '}{case.reason[:REASON]}[/yellow]"
        else:
            tokens = "tokens equal" if self.same_tokens else f"another token, {self.behind:.2g} behind"
            client = f"{tokens}, numbers within {self.from_client:.1g} of {case.bound:g}"
            if self.engine:
                client += f"; in its arithmetic {self.same_as_engine} of {len(self.engine)} within {DENSE:g}"
                client += f", all within {max(self.engine):.1g}"
        colour = "green" if self.equal else "red"
        return [case.version, case.model, case.kind, f"[{colour}]{ranks}[/{colour}]", client]


def all_jobs(kinds: Sequence[str] = (), *, few: bool = False) -> list[tuple[str, str]]:
    """Models and kinds, those in `kinds` if there are any there; `few` of them, if so asked."""
    jobs = [(name, kind) for name in MODELS for kind in KINDS.get(name, OTHER_KINDS) if not kinds or kind in kinds]
    return few_of_each(jobs, lambda job: job[0], 4) if few else jobs


def make_cases(clients: dict[str, Client], jobs: Sequence[tuple[str, str]], folder: Path) -> Iterator[Case]:
    """Let the clients write and run their files; files that a client refuses to write are left out."""
    for name in dict.fromkeys(name for name, _ in jobs):
        model = MODELS[name]
        checkpoint = folder / name
        if isinstance(model, str):
            tiny_architectures.write(model, checkpoint)
        else:
            model.write(checkpoint)
        for version, client in clients.items():
            for kind in (kind for each, kind in jobs if each == name):
                directory = folder / f"{name}-{version}-{kind}"
                directory.mkdir()
                try:
                    written = client.write(
                        checkpoint, directory / f"{kind}.uqff", architecture=name, dtype="F32", isq=kind
                    )
                except NotOnThisCPU as exc:
                    shutil.rmtree(directory)
                    quantize_model(
                        checkpoint, directory, [kind], version="0.2", engine="0.6", dtype="f32", engine_biases=True
                    )
                    yield Case(version, name, kind, directory, None, exc.reason, not_run=True)
                    continue
                except ClientError:
                    continue
                try:
                    made = client.generate(directory, [written.name], architecture=name, dtype="F32", tokens=TOKENS)
                    short: list[Generation] = []
                    if version != WHEEL and kind in GGML_KINDS:
                        given, how = list(ENGINE_PROMPTS), {"architecture": name, "dtype": "F32"}
                        short = client.answers(directory, [written.name], given, tokens=ENGINE_TOKENS, **how)
                    yield Case(version, name, kind, directory, made, short=tuple(short))
                except ClientError as exc:
                    yield Case(version, name, kind, directory, None, exc.reason, isinstance(exc, NotOnThisCPU))


def by_turns(cases: list[Case]) -> list[tuple[int, ...]]:
    """The numbers of ranks for each file: where both generations have it, one goes without 2, the other without 4."""
    versions: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        versions.setdefault((case.model, case.kind), []).append(case.version)
    shared = [name for name, both in versions.items() if len(both) > 1]
    found: list[tuple[int, ...]] = []
    for case in cases:
        name = (case.model, case.kind)
        if name not in shared:
            found.append(WORLDS)
            continue
        left_out = (2, 4)[(shared.index(name) + versions[name].index(case.version)) % 2]
        found.append(tuple(world for world in WORLDS if world != left_out))
    return found


def run_ranks(cases: list[Case], worlds: list[tuple[int, ...]], folder: Path) -> list[dict[int, dict[str, Any]]]:
    """What our model makes of each file, by the number of ranks: greedy ids, logits, and the client's choices."""
    jobs, out = folder / "jobs.json", folder / "out.json"
    prompts: dict[str, dict[str, list[int]]] = {}
    asked = []
    for case, numbers in zip(cases, worlds, strict=True):
        if case.model not in prompts:  # a template is rendered in a process of its own: once for all ranks and files
            text = Text(case.directory)
            words = text.encode(" ".join(ENGINE_PROMPTS))
            prompts[case.model] = {"prompt": text.encode(PROMPT), "stop": sorted(text.stop), "words": words}
        forced = case.ids if case.generation else []
        short = [[_id(token) for token in each.tokens] for each in case.short]
        files = {"path": str(case.directory), "worlds": numbers, "forced": forced, "short": short}
        asked.append(files | prompts[case.model])
    jobs.write_text(json.dumps(asked))
    command = [sys.executable, "-m", "tools.interop.running", str(jobs), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **ALONE}, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"ranks failed:\n{done.stderr[-4000:]}")
    answers: list[dict[str, dict[str, Any]]] = json.loads(out.read_text())
    return [{int(world): each for world, each in of.items()} for of in answers]


def compare(case: Case, answers: dict[int, dict[str, Any]]) -> Row:
    """The row of a file."""
    one = answers[1]
    same = all(each["ids"] == one["ids"] for each in answers.values())
    apart = max(_distance(each["logits"], one["logits"]) for each in answers.values()) if same else float("nan")
    worlds = tuple(answers)
    if case.generation is None:
        return Row(case, same, apart, worlds=worlds)
    ours = one["forced_logits"] if case.version == WHEEL else one["forced_logprobs"]
    theirs = [number for each in case.short for number in each.logits]
    engine = tuple(abs(a - b) for a, b in zip(one.get("engine", ()), theirs, strict=True))
    numbers = _distance(ours, case.numbers)
    return Row(case, same, apart, one["ids"] == case.ids, numbers, max(one["behind"]), engine, worlds)


def _distance(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def check_all(clients: dict[str, Client], jobs: Sequence[tuple[str, str]], folder: Path) -> list[Row]:
    """The rows of the jobs, of all clients. `folder` is for checkpoints and files."""
    cases = list(make_cases(clients, jobs, folder))
    return compare_all(cases, by_turns(cases), folder)


def compare_all(cases: list[Case], worlds: list[tuple[int, ...]], folder: Path) -> list[Row]:
    """The rows of files, each run in worlds of so many ranks."""
    answers = run_ranks(cases, worlds, folder) if cases else []
    return [compare(case, each) for case, each in zip(cases, answers, strict=True)]


def table_of(rows: list[Row]) -> Table:
    """All rows."""
    table = Table(title=f"Running: the clients' files on {', '.join(map(str, WORLDS))} ranks")
    for column in ("client", "model", "kind", "ranks"):
        table.add_column(column, no_wrap=True)
    table.add_column("the client itself")
    for row in rows:
        table.add_row(*row.row())
    return table


def _forced(model: Any, prompt: list[int], forced: list[int]) -> tuple[Any, Any]:
    """Logits, float32, where the next tokens of a text are these, whatever the model would choose; and their own."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *forced]])).logits[0, len(prompt) - 1 :]
    logits = logits[: len(forced)].float()
    return logits, logits.gather(1, torch.tensor(forced, dtype=torch.int64).view(-1, 1)).flatten()


def answers_of(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run the files of the jobs as one rank of those that the environment names, or alone."""
    import torch

    from uqff.parallel import load_model, set_arithmetic
    from uqff.parallel.generate import generate
    from uqff.parallel.ranks import joined

    torch.set_num_threads(1)
    answers = []
    with joined(torch.device("cpu"), timeout=120) as comm:
        for job in jobs:
            model = load_model(job["path"], comm, dtype=torch.float32)
            prompt, forced = job["prompt"], job["forced"]
            made = generate(model, prompt, TOKENS, stop=job["stop"], comm=comm)
            logits, chosen = _forced(model, prompt, forced)
            set_arithmetic(model, "engine")
            engine: list[float] = []
            # The numbers of ranks are compared in the exact arithmetic.
            for word, ids in zip(job["words"], job["short"] if comm.world_size == 1 else [], strict=False):
                some, each = _forced(model, [word], ids)
                engine += (each - some.logsumexp(-1)).tolist()
            answers.append(
                {
                    "ids": made.ids,
                    "logits": made.logits,
                    "forced_logits": chosen.tolist(),
                    "forced_logprobs": (chosen - logits.logsumexp(-1)).tolist(),
                    "engine": engine,
                    "behind": (logits.max(-1).values - chosen).tolist() if forced else [0.0],
                }
            )
    return answers


def serve(jobs: Path, out: Path) -> None:
    """Run the files of `jobs`, each in its worlds, whose ranks are forks of this process: all is imported once."""
    for name in (
        "uqff.parallel",
        "uqff.parallel.generate",
        "uqff.parallel.ranks",
        "transformers.models.auto",
        *CLASSES,
    ):
        import_module(name)
    asked = json.loads(jobs.read_text())
    answers: list[dict[int, Any]] = [{} for _ in asked]
    for world in sorted({world for job in asked for world in job["worlds"]}):
        these = [index for index, job in enumerate(asked) if world in job["worlds"]]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(world)}

        def rank(number: int, place: dict[str, str] = place, these: list[int] = these) -> list[dict[str, Any]]:
            os.environ.update(place | {"RANK": str(number), "LOCAL_RANK": str(number)})
            return answers_of([asked[index] for index in these])

        workers = Workers(rank)
        ended = workers.all(world)
        if any(each.death for each in ended) or ended[0].made is None:
            raise SystemExit(f"{world} ranks: {', '.join(each.death or 'done' for each in ended)}")
        for index, made in zip(these, ended[0].made, strict=True):
            answers[index][world] = made
    out.write_text(json.dumps(answers))


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
