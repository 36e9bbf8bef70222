"""The `config.json` that the package writes against those who read it, for `tools/interop`.

A checkpoint of each architecture is quantised twice, with the configuration as transformers 4 writes it and as
transformers 5 does (the latter made by transformers 5 itself, where it is what is installed here). The client must load
both and say the same, with UQFF named as the method of quantisation, which it does not know. A transformers of each
generation must take the written configuration for what it takes the checkpoint's own for, in the form that it writes
itself.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

import uqff
from tools.interop.client import Client, ClientError
from tools.interop.install import TRANSFORMERS
from tools.tiny import architectures as tiny_architectures
from tools.tiny.models import TinyModel
from uqff.models.config import METHOD_KEY, QUANT_METHOD
from uqff.quantization.run import quantize_model

CLIENT_VERSION = "0.9.5"

MODEL_TYPES = {"Qwen3Moe": "qwen3_moe"}
"""What transformers calls an architecture, if not by the client's name in lower case."""

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in (*tiny_architectures.CONFIGS, "Llama", "Qwen2")},
    "Llama, another base": ("Llama", {"rope_theta": 500.0}),
    "Llama, llama3": ("Llama", {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "Llama, linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "Phi3, longrope": (
        "Phi3",
        {"rope_scaling": {"type": "longrope", **LONGROPE}, "original_max_position_embeddings": 128},
    ),
    "Mistral, yarn": (
        "Mistral",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    ),
}
"""Case to architecture and what its configuration has besides."""

UNUSED = {"rope_parameters", "num_local_experts", "max_window_layers", "partial_rotary_factor", "dtype", "type"}
"""What a generation keeps of the other's words and does not use."""

READ = """
import json, os, sys
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
from transformers import AutoConfig
for line in sys.stdin:
    print("config:" + json.dumps(AutoConfig.for_model(**json.loads(line)).to_dict()))
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the table: what was compared, the first tokens, and what differs."""

    case: str
    compared: str
    tokens: str = ""
    problem: str | None = None


def write(case: str, folder: Path) -> None:
    """The checkpoint of a case in `older` and `newer`."""
    name, values = CASES[case]
    for form in ("older", "newer"):
        if name in tiny_architectures.CONFIGS:
            tiny_architectures.write(name, folder / form)
        else:
            TinyModel(name.lower(), hidden_size=64, heads=2, vocab_size=64).write(folder / form)  # type: ignore[arg-type]
        path = folder / form / "config.json"
        config = json.loads(path.read_text()) | values
        path.write_text(json.dumps(config if form == "older" else newer(name, config)))


def newer(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as transformers 5 writes it."""
    import transformers

    if int(transformers.__version__.partition(".")[0]) < 5:
        return tiny_architectures.newer(config)
    made = transformers.AutoConfig.for_model(**config | {"model_type": model_type(name)})
    written: dict[str, Any] = json.loads(made.to_json_string(use_diff=True))
    return written


def model_type(name: str) -> str:
    """What transformers calls an architecture."""
    return MODEL_TYPES.get(name, name.lower())


def check_client(client: Client, case: str, folder: Path) -> Row:
    """Quantise both forms, and let the client run both."""
    name, _ = CASES[case]
    said = []
    for form in ("older", "newer"):
        try:
            made = quantize_model(folder / form, folder / f"{form}-made", ["q8_0"])
            files = made.outputs[0].shards
            said.append(client.generate(folder / f"{form}-made", files, architecture=name, dtype="F32"))
        except (ClientError, uqff.UqffError) as error:
            return Row(case, f"mistralrs {client.about()['version']}", problem=f"{form}: {error}")
    tokens = " ".join(said[0].tokens[:4])
    config = json.loads((folder / "older-made" / "config.json").read_text())
    if config.get(METHOD_KEY) != {"quant_method": QUANT_METHOD}:
        return Row(case, f"mistralrs {client.about()['version']}", problem=f"names {config.get(METHOD_KEY)} as method")
    problem = None if said[0] == said[1] else f"older form: {said[0]}, newer form: {said[1]}"
    return Row(case, f"mistralrs {client.about()['version']}", tokens, problem)


def check_reader(generation: str, python: Path, folder: Path) -> Iterator[Row]:
    """Let a transformers read the checkpoints' own configurations and those that were written."""
    own = "older" if generation == "4" else "newer"
    lines = []
    for number, case in enumerate(CASES):
        for form in (own, "older-made", "newer-made"):
            config = json.loads((folder / str(number) / form / "config.json").read_text())
            lines.append(json.dumps(config | {"model_type": model_type(CASES[case][0])}))
    done = subprocess.run(
        [str(python), "-c", READ], input="\n".join(lines), capture_output=True, text=True, check=False
    )
    read = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("config:")]
    what = f"transformers {TRANSFORMERS[generation]}"
    if len(read) != len(lines):
        yield Row(list(CASES)[len(read) // 3], what, problem=done.stderr.strip().splitlines()[-1])
        return
    for number, case in enumerate(CASES):
        wanted, *written = (_meaning(each) for each in read[3 * number : 3 * number + 3])
        differing = sorted(
            {key for each in written for key in wanted.keys() | each.keys() if wanted.get(key) != each.get(key)}
            - UNUSED
        )
        yield Row(case, what, problem=f"{', '.join(differing)} differ" if differing else None)


def _meaning(config: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says of rotary positions on one level, whatever the form."""
    made = {key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling")}
    newer_form, older_form = config.get("rope_parameters"), config.get("rope_scaling")
    rope = newer_form if "rope_theta" not in config and newer_form else older_form
    made.pop(METHOD_KEY, None)  # which transformers does not know, and the checkpoint's own does not name
    return made | {f"rope.{key}": value for key, value in (rope or {}).items() if key != "type"}


def check_all(client: Client, readers: dict[str, Path], folder: Path) -> Iterator[Row]:
    """The rows of every case: the client's, then those of each transformers, by generation."""
    for number, case in enumerate(CASES):
        write(case, folder / str(number))
        yield check_client(client, case, folder / str(number))
    for generation, python in readers.items():
        yield from check_reader(generation, python, folder)


def table_of(rows: list[Row]) -> Table:
    """All rows."""
    table = Table(title="Configurations: both forms of config.json, quantised by this package, read by others")
    for column in ("model", "read by", "says"):
        table.add_column(column, no_wrap=True)
    table.add_column("same")
    for row in rows:
        table.add_row(row.case, row.compared, row.tokens, "yes" if row.problem is None else f"[red]{row.problem}[/red]")
    return table
