"""``python -m tools.bench.gpu_mixture``: a mixture of experts of ten billion weights on the GPU at hand.

As Qwen3-30B-A3B has them, a third of its layers: 128 experts, of which a token uses 8.  Tokens a second after a prompt
of 16, recorded in a CUDA graph, and launched one by one.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

import uqff
from tools.bench.__main__ import markdown
from tools.bench.gpu import repeated, tile
from tools.bench.gpu_model import PROMPT, kernels_of
from tools.bench.machine import facts
from tools.bench.sharding import MEMORY
from uqff.parallel import Comm, decoding, load_model
from uqff.parallel.generate import generate

HIDDEN, INNER, LAYERS, VOCABULARY = 2048, 768, 16, 32768
HEADS, KV_HEADS, HEAD = 32, 4, 128
EXPERTS, PER_TOKEN = 128, 8
KINDS = ("q4k", "afq4", "mxfp4", "q8_0")


def config() -> dict[str, Any]:
    """The ``config.json``."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "intermediate_size": 8 * INNER,
        "moe_intermediate_size": INNER,
        "num_experts": EXPERTS,
        "num_experts_per_tok": PER_TOKEN,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024,
        "torch_dtype": "bfloat16",
    }


def shapes() -> dict[str, tuple[int, ...]]:
    """Of the layers of a block."""
    return {
        "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
        "mlp.experts.gate_proj": (EXPERTS, INNER, HIDDEN),
        "mlp.experts.up_proj": (EXPERTS, INNER, HIDDEN),
        "mlp.experts.down_proj": (EXPERTS, HIDDEN, INNER),
    }


def write(directory: Path, kind: str, kept: Path) -> int:
    """A 1.2 model directory; the bytes of its layers."""
    rows = tile(kind, kept)
    wanted = {*shapes().values(), (VOCABULARY, HIDDEN)}
    made = {shape: uqff.Layer(repeated(rows, shape).to("cpu")) for shape in wanted}
    layers = {f"model.layers.{i}.{name}": made[shape] for i in range(LAYERS) for name, shape in shapes().items()}
    layers |= dict.fromkeys(("lm_head", "model.embed_tokens"), made[VOCABULARY, HIDDEN])
    uqff.save(layers, directory / "0-0.uqff", version=(1, 2, 0))
    plain = {"model.norm.weight": torch.ones(HIDDEN)}
    for i in range(LAYERS):
        of = f"model.layers.{i}"
        plain |= {f"{of}.{name}_layernorm.weight": torch.ones(HIDDEN) for name in ("input", "post_attention")}
        plain |= {f"{of}.self_attn.{name}_norm.weight": torch.ones(HEAD) for name in ("q", "k")}
        plain[f"{of}.mlp.gate.weight"] = torch.randn(EXPERTS, HIDDEN) / 50
    save_file({name: each.bfloat16() for name, each in plain.items()}, directory / "residual.safetensors")
    (directory / "config.json").write_text(json.dumps(config()))
    return sum(path.stat().st_size for path in directory.glob("*.uqff"))


def rate(model: torch.nn.Module, tokens: int) -> float:
    """Tokens a second by the median time of one, once everything is compiled and recorded."""
    found: list[float] = []
    for _ in range(2):
        times: list[float] = []
        generate(model, PROMPT, tokens, on_token=lambda _, times=times: times.append(time.perf_counter()))  # type: ignore[misc]
        found = [after - before for before, after in pairwise(times[4:])]
    return 1 / statistics.median(found)


def one_by_one(model: torch.nn.Module) -> float:
    """The same, of launches that are not recorded."""
    replays = decoding._replays
    decoding._replays = lambda *_: (False, None)
    try:
        return rate(model, 24)
    finally:
        decoding._replays = replays


@click.command()
@click.option("--kind", "kinds", multiple=True, default=KINDS, help="Only these.")
@click.option("--kept", type=click.Path(path_type=Path), default=Path("/tmp/tiles"), help="Where quantised rows lie.")
@click.option("--profile", is_flag=True, help="Also what the GPU does for a token.")
def main(kinds: tuple[str, ...], kept: Path, *, profile: bool) -> None:
    """Print the table of tokens a second."""
    print(json.dumps(facts() | {"gpu": torch.cuda.get_device_name()}))
    rows: list[dict[str, object]] = []
    for kind in kinds:
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as scratch:
            size = write(Path(scratch), kind, kept)
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            model = load_model(scratch, Comm(), device="cuda", dtype=torch.bfloat16)
        row: dict[str, object] = {"type": kind, "tokens/s": round(rate(model, 128), 1)}
        row["one by one"] = round(one_by_one(model), 1)
        row["GiB"] = round(size / 2**30, 2)
        row["peak / file"] = round(torch.cuda.max_memory_allocated() / size, 3)
        rows.append(row)
        print(row, flush=True)
        if profile:
            print(markdown(kernels_of(model)), flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    print(markdown(rows))


if __name__ == "__main__":
    main()
