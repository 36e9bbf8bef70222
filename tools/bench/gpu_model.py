"""``python -m tools.bench.gpu_model``: a Llama of three billion weights on the GPU at hand.

Its layers are a few quantised rows, repeated.  Timed are loading from memory-backed files, through pinned buffers and
as torch does it, and tokens a second after a prompt of 16: each layer launched by itself, all recorded in a CUDA graph,
and the same for a model of plain bfloat16 weights, which ``transformers`` alone runs.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import torch
from safetensors.torch import save_file

import uqff
from tools.bench.__main__ import markdown
from tools.bench.gpu import repeated, tile
from tools.bench.machine import facts
from tools.bench.sharding import MEMORY
from uqff.parallel import Comm, decoding, load_model, loading, upload
from uqff.parallel.decoder_step import DecoderStep
from uqff.parallel.generate import generate

HIDDEN, INNER, LAYERS, VOCABULARY = 3072, 8192, 28, 32768
HEADS, KV_HEADS, HEAD = 24, 8, 128
KINDS = ("q4k", "afq4", "mxfp4", "q8_0")
PROMPT = list(range(3, 19))
SHORT, LONG = 16, 144
ROUNDS = 3


def config() -> dict[str, Any]:
    """The ``config.json``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024,
        "torch_dtype": "bfloat16",
    }


def shapes() -> dict[str, tuple[int, int]]:
    """Of the layers of a block."""
    attention = {"q": (HEADS * HEAD, HIDDEN), "k": (KV_HEADS * HEAD, HIDDEN), "v": (KV_HEADS * HEAD, HIDDEN)}
    made = {f"self_attn.{name}_proj": shape for name, shape in (attention | {"o": (HIDDEN, HEADS * HEAD)}).items()}
    return made | {f"mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")} | {"mlp.down_proj": (HIDDEN, INNER)}


def write(directory: Path, kind: str, kept: Path) -> int:
    """A 1.2 model directory; the bytes of its layers."""
    rows = tile(kind, kept)
    made = {shape: uqff.Layer(repeated(rows, shape).to("cpu")) for shape in {*shapes().values(), (VOCABULARY, HIDDEN)}}
    layers = {f"model.layers.{i}.{name}": made[shape] for i in range(LAYERS) for name, shape in shapes().items()}
    layers |= dict.fromkeys(("lm_head", "model.embed_tokens"), made[VOCABULARY, HIDDEN])
    uqff.save(layers, directory / "0-0.uqff", version=(1, 2, 0))
    norms = [f"model.layers.{i}.{name}_layernorm.weight" for i in range(LAYERS) for name in ("input", "post_attention")]
    plain = {name: torch.ones(HIDDEN, dtype=torch.bfloat16) for name in (*norms, "model.norm.weight")}
    save_file(plain, directory / "residual.safetensors")
    (directory / "config.json").write_text(json.dumps(config()))
    return sum(path.stat().st_size for path in directory.glob("*.uqff"))


def rate(model: torch.nn.Module, comm: Comm | None = None) -> float:
    """Tokens a second, the best of some rounds: prompt, recording and all that is done once taken out."""
    rates = []
    for _ in range(ROUNDS + 1):
        seconds = []
        for tokens in (SHORT, LONG):
            torch.cuda.synchronize()
            start = time.perf_counter()
            generate(model, PROMPT, tokens, comm=comm)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        rates.append((LONG - SHORT) / (seconds[1] - seconds[0]))
    return max(rates[1:])


def rates(model: torch.nn.Module, *, each: bool) -> dict[str, float]:
    """Launched one by one, if asked for; recorded as ``transformers`` has the layers; and in few launches."""
    found, replays, of = {"tokens/s": rate(model)}, decoding._replays, DecoderStep.of
    vars(decoding)["DecoderStep"] = SimpleNamespace(of=lambda *_: None)
    try:
        found["of transformers"] = rate(model)
        if each:
            decoding._replays = lambda *_: (False, None)
            found["one by one"] = rate(model)
    finally:
        decoding._replays, vars(decoding)["DecoderStep"] = replays, SimpleNamespace(of=of)
    return found


def kernels_of(model: torch.nn.Module) -> list[dict[str, object]]:
    """What the GPU does for a token, by kernel: the most first."""
    few: dict[str, tuple[int, float]] = {}
    many: dict[str, tuple[int, float]] = {}
    for found, tokens in ((few, SHORT), (many, 2 * SHORT)):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
            generate(model, PROMPT, tokens)
            torch.cuda.synchronize()
        for event in profile.events():
            grid = getattr(event, "name", "")
            count, time_ = found.get(grid, (0, 0.0))
            found[grid] = count + 1, time_ + event.device_time
    rows: list[dict[str, object]] = []
    for name, (count, taken) in many.items():
        before = few.get(name, (0, 0.0))
        launches, microseconds = (count - before[0]) / SHORT, (taken - before[1]) / SHORT
        if launches > 0.5:
            rows.append({"kernel": name[:70], "a token": round(launches, 1), "µs": round(microseconds, 1)})
    return sorted(rows, key=lambda row: -float(str(row["µs"])))[:14]


def load_seconds(directory: Path) -> tuple[float, float, torch.nn.Module]:
    """As torch sends tensors, through pinned buffers, and the model; the best of some rounds."""
    ways: dict[str, Any] = {"plain": lambda place: lambda tensor: tensor.to(place), "pinned": upload.upload_to}
    found: dict[str, list[float]] = {name: [] for name in ways}
    made: list[torch.nn.Module] = []
    for turn in range(2 * ROUNDS):
        name = list(ways)[turn % 2]
        vars(loading)["upload_to"] = ways[name]
        made.clear()
        gc.collect()  # models refer to themselves
        torch.cuda.synchronize()
        start = time.perf_counter()
        made.append(load_model(directory, Comm(), device="cuda", dtype=torch.bfloat16))
        torch.cuda.synchronize()
        found[name].append(time.perf_counter() - start)
    return min(found["plain"]), min(found["pinned"]), made.pop()


def sent(directory: Path) -> float:
    """Bytes a second of all layers of a file that was just opened, through pinned buffers; the best of some rounds."""
    send, found = upload.upload_to(torch.device("cuda", 0)), []
    for _ in range(ROUNDS):
        with uqff.open(directory) as file:
            parts = [part.as_bytes().tensor() for weight, _ in file.values() for part in weight.parts.values()]
            torch.cuda.synchronize()
            start = time.perf_counter()
            there = [send(part) for part in parts]
            torch.cuda.synchronize()
            found.append(sum(part.nbytes for part in there) / (time.perf_counter() - start))
            del there
    return max(found)


@click.command()
@click.option("--kind", "kinds", multiple=True, default=KINDS, help="Only these.")
@click.option("--kept", type=click.Path(path_type=Path), default=Path("/tmp/tiles"), help="Where quantised rows lie.")
@click.option("--each", is_flag=True, help="Also launched one by one.")
@click.option("--profile", is_flag=True, help="Also what the GPU does for a token.")
def main(kinds: tuple[str, ...], kept: Path, *, each: bool, profile: bool) -> None:
    """Print the table of tokens a second and of loading."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    print(json.dumps(facts() | {"gpu": torch.cuda.get_device_name()}))
    with torch.device("cuda"):
        plain = AutoModelForCausalLM.from_config(LlamaConfig(**config()), dtype=torch.bfloat16).eval()
    base = rates(plain, each=each)
    weights = sum(part.numel() for part in plain.parameters())
    first = {"type": "bf16", **{name: round(value, 1) for name, value in base.items()}}
    rows: list[dict[str, object]] = [first | {"GiB": round(weights / 2**29, 2)}]
    del plain
    gc.collect()
    torch.cuda.empty_cache()
    for kind in kinds:
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as scratch:
            size = write(Path(scratch), kind, kept)
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            sending = sent(Path(scratch))
            torch.cuda.reset_peak_memory_stats()
            slow, fast, model = load_seconds(Path(scratch))
        found = rates(model, each=each)
        rows.append(
            {
                "type": kind,
                **{name: round(value, 1) for name, value in found.items()},
                "× bf16": round(found["tokens/s"] / base["of transformers"], 2),
                "GiB": round(size / 2**30, 2),
                "peak / file": round(torch.cuda.max_memory_allocated() / size, 3),
                "load s": round(fast, 2),
                "GB/s": round(size / fast / 1e9, 1),
                "without pinned": round(size / slow / 1e9, 1),
                "sent, GB/s": round(sending / 1e9, 1),
            }
        )
        print(rows[-1], flush=True)
        if profile:
            print(markdown(kernels_of(model)), flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    print(f"{weights / 1e9:.2f} billion weights")
    rows[0] |= dict.fromkeys(rows[-1].keys() - rows[0].keys(), "")
    print(markdown([{name: row[name] for name in rows[-1]} for row in rows]))


if __name__ == "__main__":
    main()
