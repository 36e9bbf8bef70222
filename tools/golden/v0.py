"""Regenerate `tests/golden`: files written by the real client from checkpoints of `tools/tiny/models.py`.

    python -m tools.golden.v0 --client VENV/bin/python            # write everything
    python -m tools.golden.v0 --client VENV/bin/python --check    # write nothing, exit 1 if a byte would differ

Files that the client cannot write on this CPU (`client.BUILT_FOR`) are not compared, which is said; nothing can be
written without them. The client must be the version that `CLIENT_VERSION` names. The order of cases, and of kinds
within one, is the order of the index.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from tools.interop.client import Client, NotOnThisCPU
from tools.tiny.models import TinyModel

CLIENT_VERSION = "0.6.0"
UQFF_VERSION = "0.1.3"
GOLDEN = Path(__file__).resolve().parent.parent.parent / "tests" / "golden"

GGML = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q8_1")
K_QUANTS = ("q2k", "q3k", "q4k", "q5k", "q6k", "q8k")
HQQ = ("hqq4", "hqq8")
AFQ = ("afq2", "afq3", "afq4", "afq6", "afq8")
KINDS = (*GGML, *K_QUANTS, *HQQ, "fp8", *AFQ)


@dataclasses.dataclass(frozen=True)
class Case:
    """One model directory: a checkpoint, the dtype it is loaded in, and the ISQ types it is quantised to.

    `topology` maps a range of decoder layers, written as mistral.rs does, to an ISQ type or None; layers outside of it
    (and lm_head) get the kind.
    """

    name: str
    why: str
    model: TinyModel
    dtype: str
    kinds: tuple[str, ...]
    topology: dict[str, str | None] | None = None


CASES = (
    Case(
        "qwen2-f32",
        "every type; q, k and v have biases; down_proj's in-dim 64 makes K quants fall back",
        TinyModel("qwen2", vocab_size=32, seed=1),
        "F32",
        KINDS,
    ),
    Case(
        "qwen2-bf16",
        "loaded as BF16: dtypes of scales and biases",
        TinyModel("qwen2", weight_dtype="BF16", vocab_size=16, seed=2),
        "BF16",
        ("q4k", "hqq4", "fp8", "afq4"),
    ),
    Case(
        "qwen2-f16",
        "loaded as F16 from an F32 checkpoint: rounding before quantising",
        TinyModel("qwen2", hidden_size=64, intermediate_size=128, heads=2, seed=3),
        "F16",
        ("q4_0", "hqq4", "hqq8", "fp8", "afq4", "afq6"),
    ),
    Case(
        "llama-96-f32",
        "in-dim 96, a multiple of 32 only: every K quant falls back; tied, so layer 0 is the embedding",
        TinyModel("llama", hidden_size=96, intermediate_size=96, heads=3, vocab_size=32, tied=True, seed=4),
        "F32",
        (*K_QUANTS, "hqq4"),
    ),
    Case(
        "llama-edge-64-f32",
        "zero, constant, tiny, huge and spiky rows",
        TinyModel("llama", hidden_size=64, heads=2, vocab_size=32, edge_rows=True, seed=5),
        "F32",
        (*GGML, *HQQ, "fp8", *AFQ),
    ),
    Case(
        "llama-edge-256-f32",
        "zero, constant, tiny, huge and spiky rows, for the K quants",
        TinyModel("llama", hidden_size=256, intermediate_size=32, heads=8, vocab_size=16, edge_rows=True, seed=6),
        "F32",
        K_QUANTS,
    ),
    Case(
        "llama-outliers-f32",
        "1 % of the weights 32 times larger",
        TinyModel("llama", hidden_size=64, intermediate_size=128, heads=2, outliers=0.01, seed=7),
        "F32",
        ("q4_0", "q5_1", "hqq4", "hqq8", "fp8", "afq2", "afq4"),
    ),
    Case(
        "llama-mixed-f32",
        "a complete directory of one file, mixing three families; 15 layers, so keys sort as strings",
        TinyModel("llama", hidden_size=64, intermediate_size=128, heads=2, layers=2, seed=8),
        "F32",
        ("q8_0",),
        {"0": "afq4", "1": None},
    ),
    Case(
        "qwen2-unquant-bf16",
        "a complete directory of one file; unquantised BF16 weights with biases",
        TinyModel("qwen2", hidden_size=64, intermediate_size=64, heads=2, seed=9),
        "BF16",
        ("hqq8",),
        {"0": None},
    ),
    Case(
        "qwen2-unquant-f16",
        "unquantised F16 weights with biases",
        TinyModel("qwen2", hidden_size=64, intermediate_size=64, heads=2, seed=9),
        "F16",
        ("q4_0",),
        {"0": None},
    ),
)

COMPLETE = ("qwen2-f32", "llama-mixed-f32", "qwen2-unquant-bf16")
"""Cases that keep everything the client writes; the others keep `residual.safetensors` and `config.json` of it."""

README = """# Golden files

Written by the real client: `mistralrs=={client}` from PyPI (UQFF {uqff}), CPU, {machine}. Do not edit; regenerate with

    python -m venv .venvs/client && .venvs/client/bin/pip install mistralrs=={client}
    python -m tools.golden.v0 --client .venvs/client/bin/python

which gives the same bytes, or compare without writing by `--check`. [`MANIFEST.json`](MANIFEST.json) has the client and
its platform, per directory the checkpoint's parameters and digest, load dtype, topology, names of the layers by index
and command, and per file the ISQ type, size and sha256. The checkpoints themselves are not kept:
`tools/tiny/models.py` makes them from those parameters.

A directory is one model loaded in one dtype. `<kind>-0.uqff` is the model quantised to that ISQ type; the client
appends the shard's number. `residual.safetensors` and `config.json` are the same for all kinds of a directory and kept
once; directories marked *complete* keep everything the client wrote, so one can be opened, or given back to the client,
as a whole.

| directory | model | dtype | kinds | why |
|---|---|---|---|---|
{rows}

Known quirks, kept as they are:

* Q3K (`q3k-0.uqff`): the wheel's bytes differ from what its source says: sub-block 0 is never chosen for the
  super-scale when its scale is negative.
* `q8_1-0.uqff` and `q8k-0.uqff` can be written by the client but not loaded.
* The wheel takes AVX-VNNI and GFNI for granted. With GFNI alone it writes every type, but dies of SIGILL as soon as it
  computes with Q5_1, Q3K or Q5K; `golden.py` takes a file that was written before that. With neither (AMD Zen 3) it
  cannot quantise to Q4_0 to Q5_1 and Q2K to Q6K, and runs nothing: those files cannot be made there, and `--check` says
  which it did not compare.
* A qwen2 model in `fp8` has its q, k and v biases cast to F8E4M3 without a scale.
* K quants of an in-dim that is not a multiple of 256 fall back to Q4_0 (Q2K, Q3K), Q4_1 (Q4K), Q5_0 (Q5K), Q5_1 (Q6K)
  and Q8_1 (Q8K).
"""


def generate_case(client: Client, case: Case, output: Path, not_run: list[str]) -> list[str]:
    """Let `client` write every kind of `case` into `output`; return the names to keep, sorted.

    A file that the client cannot write on this CPU is named in `not_run`, and taken from `tests/golden`.

    Raises RuntimeError if the files that kinds share are not equal.
    """
    shared: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        case.model.write(model)
        topology = None
        if case.topology is not None:
            topology = Path(scratch) / "topology.yml"
            topology.write_text(json.dumps({key: {"isq": isq} for key, isq in case.topology.items()}))
        for kind in case.kinds:
            output.mkdir(parents=True, exist_ok=True)
            try:
                written = client.write(
                    model,
                    Path(scratch) / kind / f"{kind}.uqff",
                    architecture=case.model.architecture,
                    dtype=case.dtype,
                    isq=kind,
                    topology=topology,
                )
            except NotOnThisCPU:
                not_run.append(f"v0/{case.name}/{kind}-0.uqff")
                shutil.copy(GOLDEN / not_run[-1], output)
                continue
            for path in sorted(written.parent.iterdir()):
                if path == written:
                    shutil.copyfile(path, output / path.name)
                    continue
                if shared.setdefault(path.name, path.read_bytes()) != path.read_bytes():
                    raise RuntimeError(f"{case.name}: {path.name} of {kind} differs from that of {case.kinds[0]}")
    kept = shared if case.name in COMPLETE else {k: shared[k] for k in ("residual.safetensors", "config.json")}
    for name, data in kept.items():
        (output / name).write_bytes(data)
    return sorted([*kept, *(f"{kind}-0.uqff" for kind in case.kinds)])


def manifest_entry(case: Case, folder: Path, names: list[str]) -> dict[str, Any]:
    """The manifest's entry of one case, whose files `names` lie in `folder`."""
    files: dict[str, Any] = {}
    for name in names:
        data = (folder / name).read_bytes()
        isq = {"isq": name.removesuffix("-0.uqff")} if name.endswith(".uqff") else {}
        files[name] = {**isq, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return {
        "why": case.why,
        "model": dataclasses.asdict(case.model),
        "model_sha256": case.model.sha256(),
        "dtype": case.dtype,
        "topology": case.topology,
        "layers": case.model.layer_names(),
        "command": f"python -m tools.golden.v0 --client PYTHON --case {case.name}",
        "files": files,
    }


def readme(about: dict[str, str]) -> str:
    """The text of the index."""
    rows = []
    for case in CASES:
        model = case.model
        size = f"{model.architecture}, {model.hidden_size} x {model.intermediate_size}, layers: {model.layers}"
        kinds = "all 20" if case.kinds == KINDS else " ".join(case.kinds)
        if case.topology is not None:
            kinds += "; " + ", ".join(f"layer {layer} {isq or 'unquantised'}" for layer, isq in case.topology.items())
        mark = " *(complete)*" if case.name in COMPLETE else ""
        rows.append(f"| `v0/{case.name}`{mark} | {size} | {case.dtype} | {kinds} | {case.why} |")
    machine = f"{about['system']} {about['machine']}"
    return README.format(client=CLIENT_VERSION, uqff=UQFF_VERSION, machine=machine, rows="\n".join(rows))


def differences(fresh: Path, kept: Path, whole: Path) -> list[str]:
    """Files of `fresh` that `kept` lacks or has with other bytes, and those that only `kept` has in folder `whole`."""
    names = {str(path.relative_to(fresh)) for path in fresh.rglob("*") if path.is_file()}
    names |= {str(path.relative_to(kept)) for path in (kept / whole).rglob("*") if path.is_file()}
    different = []
    for name in sorted(names):
        one, other = fresh / name, kept / name
        if not one.exists() or not other.exists() or one.read_bytes() != other.read_bytes():
            different.append(name)
    return different


@click.command()
@click.option("--client", "python", required=True, type=click.Path(path_type=Path), help="Interpreter with mistralrs.")
@click.option("--check", is_flag=True, help="Compare with tests/golden instead of writing; exit 1 on a difference.")
@click.option(
    "--case",
    "only",
    type=click.Choice([case.name for case in CASES]),
    help="Only this directory; leaves the index as it is.",
)
def main(python: Path, check: bool, only: str | None) -> None:
    """Let the client write tests/golden again."""
    console = Console()
    client = Client(python)
    about = client.about()
    if about["version"] != CLIENT_VERSION:
        raise click.ClickException(f"expected mistralrs {CLIENT_VERSION}, got {about['version']}")
    manifest: dict[str, Any] = {
        "client": f"mistralrs {about['version']}",
        "uqff_version": UQFF_VERSION,
        "platform": f"{about['system']} {about['machine']}, {about['libc']}, CPU",
        "directories": {},
    }
    table = Table("directory", "files", "bytes")
    not_run: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        for case in CASES:
            if only not in (None, case.name):
                continue
            folder = fresh / "v0" / case.name
            entry = manifest_entry(case, folder, generate_case(client, case, folder, not_run))
            manifest["directories"][f"v0/{case.name}"] = entry
            table.add_row(
                case.name, str(len(entry["files"])), str(sum(file["bytes"] for file in entry["files"].values()))
            )
        console.print(table)
        if only is None:
            (fresh / "MANIFEST.json").write_text(json.dumps(manifest, indent=1) + "\n")
            (fresh / "README.md").write_text(readme(about))
        target = GOLDEN / "v0" if only is None else GOLDEN / "v0" / only
        if check:
            for name in not_run:
                console.print(f"[yellow]not compared:[/yellow] {name}")
            if not_run:
                lacking = ", ".join(client.missing())
                console.print(f"{len(not_run)} files that the client cannot write on this CPU, which lacks {lacking}")
            names = differences(fresh, GOLDEN, target.relative_to(GOLDEN))
            report_differences(names, console)
            return
        if not_run:
            lacking = ", ".join(client.missing())
            raise click.ClickException(f"the client cannot write {len(not_run)} files on this CPU, lacking {lacking}")
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(fresh, GOLDEN, dirs_exist_ok=True)


def report_differences(names: list[str], console: Console) -> None:
    """Name every differing file and exit 1, or say that there is none."""
    for name in names:
        console.print(f"[red]differs:[/red] {name}")
    if names:
        sys.exit(1)
    console.print("no differences")


if __name__ == "__main__":
    main()
