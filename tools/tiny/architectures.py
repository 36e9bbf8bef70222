"""Tiny checkpoints of the architectures that `tiny_models.py` does not make, and what the real client makes of them.

    python -m tools.tiny.architectures --client PYTHON

lets the client quantise each to Q8_0 and writes the digests of the `.uqff` file and of the residual of each:
`mistralrs==0.6.0` into `tests/golden/ARCHITECTURES.json`, `mistralrs==0.9.5` into `tests/golden/v1/ARCHITECTURES.json`,
0.8.12 and 0.8.23 into the folders of their versions beside it.
A file hangs on the order or the names of its layers, so its digest proves them; `__metadata__`, which names the writer,
is left out of it. The values are those of `tiny_models.random_normal`, the same on every machine.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tools.interop.client import Client
from tools.tiny.digests import command, written
from tools.tiny.models import Float32, TinyModel, random_normal

ROOT = Path(__file__).resolve().parent.parent.parent
GOLDEN = ROOT / "tests" / "golden"
DIGESTS = {
    "0.6.0": GOLDEN / "ARCHITECTURES.json",
    "0.8.12": GOLDEN / "v1" / "1.0.0" / "ARCHITECTURES.json",
    "0.8.23": GOLDEN / "v1" / "1.1.0" / "ARCHITECTURES.json",
    "0.9.5": GOLDEN / "v1" / "ARCHITECTURES.json",
}
"""Client to the file of digests."""

HIDDEN, INNER, VOCABULARY, LAYERS = 64, 96, 64, 3
HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 16
EXPERTS, EXPERT_INNER = 4, 64
DENSE_LAYERS = [1]
"""Of Qwen3-MoE, to have both kinds of layers."""

GELU = {"attention_bias": False, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}
NO_WINDOW = {"sliding_window": None}
CONFIGS: dict[str, dict[str, Any]] = {
    "Mistral": NO_WINDOW,
    "Qwen3": NO_WINDOW | {"use_sliding_window": False, "max_window_layers": LAYERS, "attention_bias": False},
    "Qwen3Moe": NO_WINDOW
    | {
        "use_sliding_window": False,
        "max_window_layers": LAYERS,
        "attention_bias": False,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "mlp_only_layers": DENSE_LAYERS,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": EXPERT_INNER,
        "norm_topk_prob": True,
    },
    "Mixtral": NO_WINDOW | {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "Phi3": NO_WINDOW | {"rope_scaling": None, "original_max_position_embeddings": 512, "pad_token_id": 0},
    "Gemma": GELU,
    "Gemma2": GELU
    | {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 512,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": HEAD_SIZE,
    },
}
"""What each architecture's `config.json` has besides what all have, by the client's name of it."""


def config(name: str) -> dict[str, Any]:
    """The `config.json` of an architecture."""
    common = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": HEAD_SIZE,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "max_position_embeddings": 512,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": VOCABULARY,
    }
    return common | CONFIGS[name]


def newer(values: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` of :func:`config` in the form that transformers 5 gives to it."""
    made = {key: value for key, value in values.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    scaling = dict(values.get("rope_scaling") or {})
    kind = scaling.pop("type", scaling.pop("rope_type", "default"))
    made["rope_parameters"] = {"rope_theta": values["rope_theta"], **scaling, "rope_type": kind}
    made["dtype"] = values["torch_dtype"]
    if "partial_rotary_factor" in made:
        made["rope_parameters"]["partial_rotary_factor"] = made.pop("partial_rotary_factor")
    if "num_experts" in made:
        made["num_local_experts"] = made.pop("num_experts")
        made.pop("max_window_layers", None)
    return made


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    if name not in ("Gemma", "Gemma2"):
        found["lm_head.weight"] = (VOCABULARY, HIDDEN)
    for index in range(LAYERS):
        for part, shape in _layer(name, index):
            found[f"model.layers.{index}.{part}.weight"] = shape
    return found


def _layer(name: str, index: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    query, kv = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE
    norms = ["input_layernorm", "post_attention_layernorm"]
    if name == "Gemma2":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    yield from ((norm, (HIDDEN,)) for norm in norms)
    if name == "Phi3":
        yield "self_attn.qkv_proj", (query + 2 * kv, HIDDEN)
        yield "self_attn.o_proj", (HIDDEN, query)
        yield "mlp.gate_up_proj", (2 * INNER, HIDDEN)
        yield "mlp.down_proj", (HIDDEN, INNER)
        return
    if name.startswith("Qwen3"):
        yield from ((f"self_attn.{norm}_norm", (HEAD_SIZE,)) for norm in "qk")
    yield from ((f"self_attn.{part}_proj", (out, HIDDEN)) for part, out in (("q", query), ("k", kv), ("v", kv)))
    yield "self_attn.o_proj", (HIDDEN, query)
    if name == "Mixtral":
        yield "block_sparse_moe.gate", (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            yield from _mlp(f"block_sparse_moe.experts.{expert}.", ("w1", "w3", "w2"), INNER)
    elif name == "Qwen3Moe" and index not in DENSE_LAYERS:
        yield "mlp.gate", (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            yield from _mlp(f"mlp.experts.{expert}.", ("gate_proj", "up_proj", "down_proj"), EXPERT_INNER)
    else:
        yield from _mlp("mlp.", ("gate_proj", "up_proj", "down_proj"), INNER)


def _mlp(prefix: str, names: tuple[str, str, str], inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in zip(names, ((inner, HIDDEN), (inner, HIDDEN), (HIDDEN, inner)), strict=True):
        yield prefix + name, shape


def tensor(name: str, shape: tuple[int, ...]) -> Float32:
    """A tensor of a checkpoint: its values depend on its name and shape only; norms are about 1."""
    values = random_normal(np.random.default_rng([7, zlib.crc32(name.encode())]), shape) * np.float32(0.02)
    return values + np.float32(1) if len(shape) == 1 else values


EXPERT_NAMES = {
    "Mixtral": ("block_sparse_moe.experts", ("w1", "w3", "w2")),
    "Qwen3Moe": ("mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}
"""Where the experts of an architecture are, and what gate, up and down are called there."""


def joined_experts(name: str, tensors: dict[str, Float32], *, transposed: bool = False) -> dict[str, Float32]:
    """The tensors with the experts of a layer as two, `gate_up_proj` and `down_proj`, as some checkpoints have them."""
    joined = dict(tensors)
    path, names = EXPERT_NAMES[name]
    for index in range(LAYERS):
        experts = f"model.layers.{index}.{path}"
        if f"{experts}.0.{names[0]}.weight" not in joined:
            continue
        gate, up, down = (
            np.stack([joined.pop(f"{experts}.{expert}.{each}.weight") for expert in range(EXPERTS)]) for each in names
        )
        pair = {"gate_up_proj": np.concatenate([gate, up], axis=1), "down_proj": down}
        for each, values in pair.items():
            joined[f"{experts}.{each}"] = np.ascontiguousarray(values.transpose(0, 2, 1) if transposed else values)
    return joined


def write(name: str, folder: Path, *, joined: bool = False, transposed: bool = False) -> None:
    """Write a checkpoint of an architecture; see :func:`joined_experts`."""
    from safetensors.numpy import save_file

    TinyModel(hidden_size=HIDDEN, heads=2, vocab_size=VOCABULARY).write(folder)
    tensors = {each: tensor(each, shape) for each, shape in shapes(name).items()}
    if joined:
        tensors = joined_experts(name, tensors, transposed=transposed)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config(name), indent=2))


def client_digests(client: Client, name: str) -> dict[str, str]:
    """What the client writes for an architecture: digests by file name.

    Raises ClientError if it writes nothing.
    """
    return written(client, partial(write, name), architecture=name)


main = command(client_digests, CONFIGS, DIGESTS)

if __name__ == "__main__":
    main()
