"""Run the real mistral.rs client (PyPI `mistralrs`) in a process of its own.

The other tools import `Client`; the client's own interpreter runs `client_job` with a job in JSON as its argument, and
needs nothing but mistralrs for it. One process serves one job, because the client panics (across threads) rather
than raises on much bad input. It gets one thread: on tiny models several do nothing but wait for each other. Keys and
values are kept in float32 as the model is; else the 0.9 client would round them to float16.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

from tools.interop import client_job
from tools.interop.client_job import RESULT

ANSI = re.compile(r"\x1b\[[0-9;]*m")
WRITTEN = "Applied in-situ quantization into"
LOADED = "Loaded in-situ quantization artifacts into"
BUILT_FOR = {"0.6.0": ("avx_vnni", "gfni")}
"""What the wheels of a version take for granted, beyond AVX2 and FMA, as `/proc/cpuinfo` calls it.

That of 0.6.0 was built on a machine that has both, for that machine: without GFNI (AMD Zen 3, Intel before Ice Lake)
most ggml types cannot even be quantised, without AVX-VNNI (Zen 4) Q5_1, Q3K and Q5K not be multiplied. 0.9.5 looks.
"""
ENVIRONMENT = {"RAYON_NUM_THREADS": "1", "MISTRALRS_CPU_KV_F32": "1"}
MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 31),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
"""glibc keeps what is given back: HQQ takes and gives back so much that the system had two fifths of the time."""


class ClientError(Exception):
    """The client failed, panicked or ran out of time.

    `reason` says how in one line; `output` is all that it printed. The message has both, less the lines of level INFO.
    """

    def __init__(self, reason: str, output: str) -> None:
        self.reason = reason
        self.output = output
        lines = [line for line in output.splitlines()[-40:] if " INFO " not in line]
        super().__init__("\n".join([reason, *lines]))

    @property
    def loaded(self) -> bool:
        """Whether the client had taken in every layer of a UQFF before it failed."""
        return LOADED in self.output


class NotOnThisCPU(ClientError):
    """The client died of an instruction that this CPU does not have, and is known to take it for granted.

    That says nothing about a file: such a row is not run, neither right nor wrong.
    """


class IllegalInstruction(Exception):
    """A client died of SIGILL on a CPU that has all that it is known to take for granted: always a failure."""


def missing_features(version: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """What the wheel of a version takes for granted and this CPU lacks; nothing where the system does not say."""
    found = features(cpuinfo)
    return [] if found is None else [name for name in BUILT_FOR.get(version, ()) if name not in found]


def features(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str] | None:
    """What this CPU has, as `/proc/cpuinfo` calls it; None where the system does not say."""
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    return next((line.partition(":")[2].split() for line in text.splitlines() if line.startswith("flags")), None)


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a greedy run answered: the tokens' texts, and what the response calls their `logprob`.

    At temperature 0 that of 0.6.0 is the logarithm to base 10 of the raw logit; at 1 (of the one best token) it is that
    of its probability, to base 10 in 0.6.0, to base e in 0.9.5. 0.6.0 answers one token more than asked for.
    `seconds` is the same of the second best token of each place.
    """

    tokens: list[str]
    logits: list[float]
    finish_reason: str
    seconds: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Client:
    """A mistralrs installation, named by the Python interpreter that can import it."""

    python: Path
    timeout: float = 60.0
    environment: dict[str, str] = dataclasses.field(default_factory=lambda: {**ENVIRONMENT, **MEMORY}, hash=False)

    def about(self) -> dict[str, str]:
        """`version` of mistralrs, and the `machine`, `system` and `libc` it runs on. It is asked once."""
        return _about(self)

    def missing(self) -> list[str]:
        """What this client takes for granted and this CPU lacks."""
        return missing_features(self.about()["version"])

    def write(
        self,
        model: Path,
        output: Path,
        *,
        architecture: str | None,
        dtype: str,
        isq: str | None,
        topology: Path | None = None,
        imatrix: Path | None = None,
        kind: str = "Plain",
    ) -> Path:
        """Quantise checkpoint folder `model` to `isq` and write the UQFF; return the written path.

        Without an architecture, the client takes what `config.json` names. `kind` is its loader.

        The client derives the shard's name from `output`: `q4k.uqff` is written as `q4k-0.uqff`. Having written, it
        tries the model in a dummy run, and may fail at that (see `BUILT_FOR`), which does not count against the file.

        Raises NotOnThisCPU if the client cannot get as far as that here.
        """
        which = {"model_id": str(model), "dtype": dtype, "write_uqff": str(output)}
        if architecture is not None:
            which["arch"] = architecture
        if topology is not None:
            which["topology"] = str(topology)
        if imatrix is not None:
            which["imatrix"] = str(imatrix)
        written = output.with_name(f"{output.stem}-0.uqff")
        written.unlink(missing_ok=True)
        try:
            self._run({"do": "load", "kind": kind, "which": which, "isq": isq})
        except ClientError as exc:
            if WRITTEN not in exc.output:
                raise
        if not written.exists():
            raise ClientError(f"the client did not write {written}", "")
        return written

    def generate(
        self,
        model: Path,
        uqff: list[str],
        *,
        architecture: str | None,
        dtype: str,
        tokens: int = 16,
        temperature: float = 0.0,
        kind: str = "Plain",
    ) -> Generation:
        """Load the shards `uqff`, files in the model directory `model`, and generate greedily from a fixed prompt.

        With no shards, the directory is a plain checkpoint.
        """
        which: dict[str, Any] = {"model_id": str(model), "dtype": dtype}
        if architecture is not None:
            which["arch"] = architecture
        if uqff:
            which["from_uqff"] = uqff
        job = {"do": "load", "kind": kind, "which": which, "isq": None, "tokens": tokens, "temperature": temperature}
        return Generation(**self._run(job))

    def load(self, model: Path, uqff: list[str], *, architecture: str | None, dtype: str, kind: str = "Plain") -> None:
        """Load the shards `uqff`, files in the model directory `model`, and generate nothing."""
        which: dict[str, Any] = {"model_id": str(model), "dtype": dtype, "from_uqff": uqff}
        if architecture is not None:
            which["arch"] = architecture
        self._run({"do": "load", "kind": kind, "which": which, "isq": None})

    def answers(
        self, model: Path, uqff: list[str], prompts: list[str], *, architecture: str, dtype: str, tokens: int
    ) -> list[Generation]:
        """What :meth:`generate` gives, of each of several prompts to a model that is loaded once."""
        which: dict[str, Any] = {"model_id": str(model), "arch": architecture, "dtype": dtype, "from_uqff": uqff}
        job = {"do": "load", "which": which, "isq": None, "tokens": tokens, "temperature": 0.0, "prompts": prompts}
        return [Generation(**each) for each in self._run(job)]

    def generate_gguf(self, file: Path, model: Path, *, dtype: str, tokens: int = 16) -> Generation:
        """Load a GGUF file, with the tokenizer and configuration of directory `model`, and generate as `generate`."""
        names = {"quantized_model_id": str(file.parent), "quantized_filename": file.name, "tok_model_id": str(model)}
        which = {**names, "dtype": dtype}
        job = {"do": "load", "kind": "GGUF", "which": which, "isq": None, "tokens": tokens, "temperature": 0.0}
        return Generation(**self._run(job))

    def write_gguf(self, file: Path, model: Path, output: Path, *, dtype: str, isq: str) -> Path:
        """Quantise a GGUF file to `isq`, with tokenizer and configuration of directory `model`, as `write` does."""
        names = {"quantized_model_id": str(file.parent), "quantized_filename": file.name, "tok_model_id": str(model)}
        which = {**names, "dtype": dtype, "write_uqff": str(output)}
        self._run({"do": "load", "kind": "GGUF", "which": which, "isq": isq})
        return output.with_name(f"{output.stem}-0.uqff")

    def _run(self, job: dict[str, Any]) -> Any:
        command = [str(self.python), str(Path(client_job.__file__).resolve()), json.dumps(job)]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout,
                check=False,
                env={**self.environment, **os.environ, "RUST_BACKTRACE": "0"},
            )
        except subprocess.TimeoutExpired as exc:
            raise ClientError(f"no answer within {self.timeout:g} s", _text(exc.stdout) + _text(exc.stderr)) from exc
        # The client's threads may log on the same line, before the result and after it.
        _, found, answer = done.stdout.partition(RESULT)
        if found:
            return json.JSONDecoder().raw_decode(answer)[0]
        output = ANSI.sub("", done.stdout + done.stderr)
        if done.returncode == -signal.SIGILL:
            missing = self.missing() if job["do"] != "about" else []
            if not missing:
                raise IllegalInstruction(f"{self.python} died of SIGILL, on a CPU that should do:\n{output[-2000:]}")
            raise NotOnThisCPU(f"not run on this CPU, which lacks {', '.join(missing)}", output)
        if done.returncode < 0:
            reason = f"killed by {signal.Signals(-done.returncode).name}"
        else:
            reason = next((line for line in reversed(output.splitlines()) if line), "no output")
        raise ClientError(reason, output)


@functools.cache
def _about(client: Client) -> dict[str, str]:
    about: dict[str, str] = client._run({"do": "about"})
    return about


def _text(output: str | bytes | None) -> str:
    if isinstance(output, bytes):
        output = output.decode(errors="replace")
    return ANSI.sub("", output or "")
