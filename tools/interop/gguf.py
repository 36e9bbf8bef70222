"""Check `uqff convert` against the 0.9.5 client, which loads GGUF files and UQFF: all ways must say the same.

There: a tiny GGUF file as llama.cpp would have written it is run by the client itself, converted to UQFF 1.2 (with the
`config.json` that its metadata gives) and run, and compared with a UQFF whose layers were quantised from the model's
own weights, in its own order of rows, and run.
Back: the client quantises the model to a UQFF of its own, which is run, converted to a GGUF file and run.
Made: the client quantises the GGUF file to a UQFF, whose rows of Q and K stay as they are there. It is run by the
client and by this package (AFQ, with which the client multiplies dense matrices), and converted to a GGUF file and run.

Whole: of architectures that the client does not run from GGUF files on a CPU, or writes no UQFF of from checkpoints, it
quantises the GGUF file to Q8_0: all layers must be those that the package makes of the file. What it runs of the
package's UQFF, it must run as the package does; gpt-oss, as its GGUF file.

Tokens and logprobs must be equal to the last bit, but where the client multiplies plain matrices: from a GGUF file it
takes another routine for them than from a UQFF, and adds up in another order (`CLOSE`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from safetensors.torch import save_file

import uqff
from tools.interop.client import Client, ClientError, Generation
from tools.interop.client_job import PROMPT
from tools.tiny import text
from tools.tiny.gguf import (
    MINISTRAL3,
    MINISTRAL3_SCALING,
    NAMED,
    OWN,
    TEXTS,
    checkpoint_of,
    with_even_heads,
    write_checkpoint,
)
from tools.tiny.models import TinyModel
from uqff import Layer
from uqff.codec.turns import split_gate_up
from uqff.conversion import gguf_of_uqff, uqff_of_gguf
from uqff.models.config import restated
from uqff.models.layouts import in_order, layout_beside
from uqff.parallel.generate import respond

CLOSE = 1e-5
"""Largest difference of two logprobs where the client loads a GGUF file once and a UQFF file once: it computes in
another order. Two UQFF files must say the same to the last bit."""
DENSE = 1e-4
"""Largest difference between the client and this package, which both multiply with dense float32 matrices."""
ONE_AT_A_TIME = threading.Lock()
"""transformers loads its modules when they are first used, which two threads cannot do at once."""
DENSE_ISQ, BLOCK_ISQ = "afq4", "q8_0"
PLAIN = ("f32", "f16", "bf16")
CLIENT_VERSION = "0.9.5"
LOUDER = {"Phi-2": 6}
"""By how much weights are multiplied, if not by 5: with these, more than one token follows the prompt."""
MISTRAL3 = "Mistral 3"
"""The text model of it, which is Mistral by another name."""
MINISTRAL = "Ministral 3"
"""The same with YaRN, and queries scaled by their places."""
NOT_RUN = ("Granite", "Granite-MoE")
"""What it runs neither of a GGUF file nor of a UQFF: 'hybrid cache has no recurrent state pool'. Of a GGUF file it does
not run DeepSeek either: 'shape mismatch on dim 3'."""
APART = ("kv_b_proj", ".k_b_proj", ".v_b_proj", ".in_proj_qkvz", ".in_proj_qkv", ".in_proj_z", ".in_proj_ba")
"""Ends of layers that are others in the client's UQFF of a GGUF file than in a checkpoint."""
TILED = (".in_proj_b", ".in_proj_a", ".linear_attn.out_proj")
"""The same of Qwen3.5, whose value heads the client leaves in the file's order."""
NOT_READ = ("Phi-3",)
"""What the client does not load from a GGUF file: 'LongRoPE attention factor is required'."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and the types of its GGUF file; those in `kinds` are for a part of a name.

    `own` is the type that the client quantises to for the way back, where it is tried; `extra`, tensors that only the
    GGUF file has.
    """

    name: str
    architecture: str
    config: dict[str, Any]
    tensors: Mapping[str, Any]
    kind: str
    kinds: Mapping[str, str] = dataclasses.field(default_factory=dict)
    own: str | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: what was compared, how far apart, and what is wrong."""

    case: str
    kinds: str
    compared: str
    difference: float | None
    problem: str | None


def tiny(name: str, kind: str, kinds: Mapping[str, str] | None = None, own: str | None = None, **options: Any) -> Case:
    """A case of a `TinyModel`, large enough for K types, with weights that make tokens differ."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "heads": 8, "kv_heads": 2, "layers": 2, "std": 0.1}
    model = TinyModel(**{**sizes, **options})
    return Case(name, model.architecture, model.config(), model.tensors(), kind, kinds or {}, own)


def other(name: str, kind: str, own: str | None = None) -> Case:
    """A case of `tiny_architectures.py`, whose matrices are 64 wide."""
    config, tensors = checkpoint_of(name)
    wide = {each: values * LOUDER.get(name, 5) if values.ndim == 2 else values for each, values in tensors.items()}
    return Case(name.lower(), name, config, wide, kind, own=own)


def llama3() -> Case:
    """Llama 3.1's rope scaling: numbers in a configuration, factors worked out in a GGUF file."""
    case = tiny("llama 3.1", "q8_0", own="q4_1", seed=9)
    low, high, context, factor, theta, size = 1.0, 4.0, 8192, 8.0, 500000.0, 32
    scaling = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": context}
    waves = 2 * np.pi * theta ** (np.arange(0, size, 2) / size)
    smooth = np.clip((context / waves - low) / (high - low), 0, 1)
    factors = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    config = {**case.config, "rope_theta": theta}
    config["rope_scaling"] = {"rope_type": "llama3", "factor": factor, **scaling}
    return dataclasses.replace(case, config=config, extra={"rope_freqs.weight": factors})


def cases() -> list[Case]:
    """Each architecture, tied and untied, with biases, each kind of block."""
    return [
        tiny("llama", "q4k", {"lm_head": "q6k", "embed": "q8_0", "down_proj": "q5k"}, own="q4k", seed=3),
        tiny("llama, tied", "q3k", {"embed": "q2k", "v_proj": "q4_0"}, tied=True, seed=5),
        tiny("llama, f16", "f16", {"embed": "bf16"}, seed=6),
        tiny("qwen2", "q5_1", {"embed": "q4_1", "o_proj": "q5_0"}, own="q8_0", architecture="qwen2", seed=7),
        tiny("qwen2, tied", "q8_0", {"embed": "f16"}, architecture="qwen2", tied=True, seed=8),
        llama3(),
        other("Mistral", "q8_0", own="q5_0"),
        other("Qwen3", "q5_0"),
    ]


def check_all(client: Client, folder: Path) -> Iterator[Row]:
    """Try every case, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        for rows in pool.map(lambda case: list(check(client, case, folder / case.name)), cases()):
            yield from rows
        yield from pool.map(lambda name: check_text(client, name, folder / name), [*TEXTS])
        for rows in pool.map(lambda name: list(check_whole(client, name, folder / name)), [*OWN, MISTRAL3, MINISTRAL]):
            yield from rows


def check_text(client: Client, name: str, folder: Path) -> Row:
    """An architecture without more: the client runs the GGUF file, where it can, and what is made of it."""
    case = other(name, "f32")
    write_source(case, folder / "source")
    write_checkpoint(case.config, case.tensors, folder / "theirs.gguf", case.kind, vocabulary=True)
    with ONE_AT_A_TIME:
        uqff_of_gguf(folder / "theirs.gguf", folder / "converted")
    for companion in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "source" / companion, folder / "converted" / companion)
    files = sorted(path.name for path in (folder / "converted").glob("*.uqff"))
    try:
        made = client.generate(folder / "converted", files, architecture=text.TEXTS[name].client, dtype="F32")
        if name in NOT_READ:
            return compared(case, case.kind, "converted, run", made, made)
        theirs = client.generate_gguf(folder / "theirs.gguf", folder / "source", dtype="F32")
        return compared(case, case.kind, "GGUF, converted", theirs, made)
    except ClientError as exc:
        return Row(case.name, case.kind, "-", None, str(exc))


def check_whole(client: Client, name: str, folder: Path) -> Iterator[Row]:
    """The client's UQFF of a GGUF file beside ours; and a run of ours, where it can."""
    case = other("Mistral" if name in (MISTRAL3, MINISTRAL) else name, "f32")
    stretched = name == MINISTRAL
    if stretched:
        rope = {"rope_theta": case.config["rope_theta"], **MINISTRAL3_SCALING}
        case = dataclasses.replace(
            case, name=name, config=case.config | {"rope_scaling": MINISTRAL3_SCALING, "rope_parameters": rope}
        )
    if "kv_lora_rank" in case.config:
        with ONE_AT_A_TIME:
            config, tensors = with_even_heads(name)
        case = dataclasses.replace(case, config=config, tensors=tensors)
    write_source(case, folder / "source")
    theirs = folder / "theirs.gguf"
    named = "mistral3" if name in (MISTRAL3, MINISTRAL) else NAMED.get(name)
    said = {f"mistral3.{key}": value for key, value in MINISTRAL3.items()} if stretched else None
    write_checkpoint(case.config, case.tensors, theirs, case.kind, vocabulary=True, architecture=named, metadata=said)
    try:
        client.write_gguf(theirs, folder / "source", folder / "its" / "q8_0.uqff", dtype="F32", isq=BLOCK_ISQ)
        with ONE_AT_A_TIME:
            uqff.quantize_model(theirs, folder / "ours", BLOCK_ISQ, measure=False, assets=folder / "source")
        wrong = different_layers(folder / "its", folder / "ours")
        problem = None if not wrong else f"other layers: {', '.join(wrong[:3])}"
        yield Row(case.name, BLOCK_ISQ, "its UQFF of GGUF, ours", None if problem else 0.0, problem)
        if name in NOT_RUN:
            return
        architecture = "Mistral" if named == "mistral3" else OWN[name].client
        made = client.generate(folder / "ours", ["q8_0-0.uqff"], architecture=architecture, dtype="F32")
        if name == "gpt-oss":
            its = client.generate(folder / "its", ["q8_0-0.uqff"], architecture=architecture, dtype="F32")
            yield compared(case, BLOCK_ISQ, "its UQFF of GGUF, ours, run", its, made, within=0.0)
            return
        uqff_of_gguf(theirs, folder / "plain")
        for companion in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(folder / "source" / companion, folder / "plain" / companion)
        files = sorted(path.name for path in (folder / "plain").glob("*.uqff"))
        made = client.generate(folder / "plain", files, architecture=architecture, dtype="F32")
        with ONE_AT_A_TIME:
            answer = respond(folder / "plain", PROMPT, tokens=16)
        ours = Generation(answer.tokens, answer.generation.logprobs, answer.generation.finish_reason)
        yield compared(case, case.kind, "converted, run by both", made, ours, within=DENSE)
    except ClientError as exc:
        yield Row(case.name, case.kind, "-", None, str(exc))


def different_layers(its: Path, ours: Path) -> list[str]:
    """The layers of the client's UQFF of a GGUF file that are not ours.

    The client keeps gates and ups apart where they take turns in a checkpoint. It keeps apart, too, DeepSeek's keys,
    transposed, and values, and what goes into Qwen3-Next's linear attention: these are not compared, nor what has value
    heads of Qwen3.5, whose paths the client has as in the model with vision.
    """
    with uqff.open(its) as one, uqff.open(ours) as other:
        layout = layout_beside(one)
        expected = {
            key.replace(".language_model.", "."): in_order(layer, layout.order_of(key, layer.weight.shape[-2]))
            for key, layer in one.items()
        }
        found: dict[str, Layer] = {}
        for key, layer in other.items():
            if key.endswith("gate_up_proj"):
                path = key.removesuffix("gate_up_proj")
                found |= zip((f"{path}gate_proj", f"{path}up_proj"), split_gate_up(layer), strict=True)
            else:
                found[key] = layer
        apart = APART + (TILED if "tiled" in layout.keys.values() else ())
        names = {key for key in (*expected, *found) if not key.endswith(apart)}
        same = {
            key
            for key in names & expected.keys() & found.keys()
            if expected[key].weight == found[key].weight and same_bias(expected[key], found[key])
        }
        return sorted(names - same)


def same_bias(one: Layer, other: Layer) -> bool:
    """Whether two layers have the same bias, or none."""
    if one.bias is None or other.bias is None:
        return one.bias is other.bias
    return torch.equal(one.bias, other.bias)


def check(client: Client, case: Case, folder: Path) -> Iterator[Row]:
    """There, and back if the case has a type for that."""
    source = folder / "source"
    write_source(case, source)
    write_checkpoint(case.config, case.tensors, folder / "theirs.gguf", case.kind, kinds=case.kinds, extra=case.extra)
    kinds = "+".join(dict.fromkeys([case.kind, *case.kinds.values()]))

    def run_uqff(model: Path) -> Generation:
        uqffs = sorted(path.name for path in model.glob("*.uqff"))
        (architecture,) = json.loads((model / "config.json").read_text())["architectures"]
        return client.generate(model, uqffs, architecture=architecture.removesuffix("ForCausalLM"), dtype="F32")

    try:
        uqff_of_gguf(folder / "theirs.gguf", folder / "converted")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(source / name, folder / "converted" / name)
        write_quantised(case, folder / "quantised")
        converted = run_uqff(folder / "converted")
        theirs = client.generate_gguf(folder / "theirs.gguf", source, dtype="F32")
        yield compared(case, kinds, "GGUF, converted", theirs, converted)
        yield compared(case, kinds, "quantised, converted", run_uqff(folder / "quantised"), converted, within=0.0)
        if case.own is not None:
            written = client.write(
                source, folder / "own" / f"{case.own}.uqff", architecture=case.architecture, dtype="F32", isq=case.own
            )
            gguf_of_uqff(written, folder / "ours.gguf", assets=source)
            ours = client.generate_gguf(folder / "ours.gguf", source, dtype="F32")
            yield compared(case, case.own, "its UQFF, our GGUF", run_uqff(folder / "own"), ours)
        yield from check_made(client, case, folder, run_uqff)
    except ClientError as exc:
        yield Row(case.name, kinds, "-", None, str(exc))


def check_made(client: Client, case: Case, folder: Path, run_uqff: Callable[[Path], Generation]) -> Iterator[Row]:
    """What the client makes of the GGUF file."""
    file, source = folder / "theirs.gguf", folder / "source"
    for isq, name in ((DENSE_ISQ, "dense"), (BLOCK_ISQ, "blocks")):
        client.write_gguf(file, source, folder / name / f"{isq}.uqff", dtype="F32", isq=isq)
    with ONE_AT_A_TIME:
        answer = respond(folder / "dense", PROMPT, tokens=16)
    ours = Generation(answer.tokens, answer.generation.logprobs, answer.generation.finish_reason)
    yield compared(case, DENSE_ISQ, "its UQFF of GGUF, run by us", run_uqff(folder / "dense"), ours, within=DENSE)
    gguf_of_uqff(folder / "blocks", folder / "again.gguf", assets=folder / "blocks")
    theirs, again = run_uqff(folder / "blocks"), client.generate_gguf(folder / "again.gguf", source, dtype="F32")
    yield compared(case, BLOCK_ISQ, "its UQFF of GGUF, our GGUF", theirs, again)


def compared(case: Case, kinds: str, what: str, first: Generation, second: Generation, *, within: float = CLOSE) -> Row:
    """The row of two generations."""
    if first.tokens != second.tokens:
        return Row(case.name, kinds, what, None, f"tokens {first.tokens} and {second.tokens}")
    difference = max(abs(a - b) for a, b in zip(first.logits, second.logits, strict=True))
    if len(first.tokens) < 2:
        return Row(case.name, kinds, what, difference, f"only {len(first.tokens)} tokens were generated")
    wrong = not difference <= within or math.isnan(difference)
    return Row(case.name, kinds, what, difference, f"logprobs differ by {difference:.2e}" if wrong else None)


def write_source(case: Case, folder: Path) -> None:
    """The checkpoint's directory, as the client takes it."""
    TinyModel(vocab_size=case.config["vocab_size"], hidden_size=64, heads=4).write(folder)
    (folder / "config.json").write_text(json.dumps(restated(case.config), indent=2))
    save_file({name: torch.from_numpy(values) for name, values in case.tensors.items()}, folder / "model.safetensors")


def write_quantised(case: Case, folder: Path) -> None:
    """A UQFF 1.2 of the same types whose layers come straight from the weights."""
    write_source(case, folder)
    weights = {name: torch.from_numpy(values) for name, values in case.tensors.items()}
    layers = {}
    for name, values in weights.items():
        if values.ndim == 2:
            kind = next((kind for part, kind in case.kinds.items() if part in name), case.kind)
            record = plain(values, kind) if kind in PLAIN else uqff.quantize(values, kind)
            module = name.removesuffix(".weight")
            layers[module] = Layer(record, weights.get(f"{module}.bias"))
    uqff.save(layers, folder / "q.uqff", version=(1, 2, 0))
    (folder / "model.safetensors").unlink()
    norms = {name: values for name, values in weights.items() if name.endswith("norm.weight")}
    save_file(norms, folder / "residual.safetensors")


def plain(values: torch.Tensor, kind: str) -> Any:
    """A GGUF layer of plain numbers."""
    from uqff.families.gguf.blocks import block_type_of_kind
    from uqff.families.gguf.tensor import GGUF

    block_type = block_type_of_kind(kind)
    assert block_type is not None
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
    return GGUF(values.to(dtype).contiguous().view(torch.uint8), block_type)


def table_of(rows: list[Row]) -> Table:
    """The rows as a table."""
    table = Table(title=f"uqff convert, and what transformers saves, in mistralrs {CLIENT_VERSION}")
    for column in ("model", "types", "compared", "logprobs differ by"):
        table.add_column(column)
    for row in rows:
        shown = "-" if row.difference is None else f"{row.difference:.1e}" if row.difference else "0"
        table.add_row(row.case, row.kinds, row.compared, shown, style="red" if row.problem else None)
    return table
