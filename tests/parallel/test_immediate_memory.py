"""Quantising while loading takes the memory of what comes out, and of a layer for each worker: the process's peak."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.quantize_child import PEAK
from uqff.container.framing import build_header

pytestmark = pytest.mark.long

HIDDEN, INNER, LAYERS = 1024, 8192, 10
LARGEST = 2 * HIDDEN * INNER
"""Bytes of the largest layer, in bfloat16."""

CHILD = f"""
import sys
import torch
import transformers.models.llama.modeling_llama
import uqff
{PEAK}
directory, workers = sys.argv[1], int(sys.argv[2])
uqff.quantize(torch.ones(256, 1024, dtype=torch.bfloat16), "q4k")  # compiled, or found
before = peak()
model = uqff.load_model(directory, isq="q4k", workers=workers)
held = {{part.data_ptr(): part.nbytes for part in (*model.buffers(), *model.parameters())}}
print(before, peak(), sum(held.values()) // 2**20)
"""


def write_zeros(directory: Path) -> int:
    """A Llama of zeros, which take no room on the disk; bytes of its weights."""
    directory.mkdir()
    kv = HIDDEN // 4
    shapes = {
        "model.embed_tokens.weight": (256, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (256, HIDDEN),
    }
    for at in range(LAYERS):
        attention = {"q": (HIDDEN, HIDDEN), "k": (kv, HIDDEN), "v": (kv, HIDDEN), "o": (HIDDEN, HIDDEN)}
        shapes |= {f"model.layers.{at}.self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
        shapes |= {f"model.layers.{at}.mlp.{name}_proj.weight": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[f"model.layers.{at}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        for name in ("input", "post_attention"):
            shapes[f"model.layers.{at}.{name}_layernorm.weight"] = (HIDDEN,)
    header, _ = build_header([(name, "BF16", shape) for name, shape in shapes.items()], None)
    size = sum(2 * math.prod(shape) for shape in shapes.values())
    with open(directory / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    numbers = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": 256}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 128}
    more = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(numbers | heads | more | {"tie_word_embeddings": False}))
    return size


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of a process are told by Linux")
def test_peak(tmp_path: Path) -> None:
    """Beside what torch and transformers take: quantised size + (workers + 1) layers + 100 MB."""
    workers = 2
    dense = write_zeros(tmp_path / "model") // 2**20
    command = [sys.executable, "-c", CHILD, str(tmp_path / "model"), str(workers)]
    said = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"UQFF_NUM_THREADS": "2"})
    assert said.returncode == 0, said.stderr
    before, peak, held = map(int, said.stdout.split())
    assert 50 < held < dense / 3
    bound = held + (workers + 1) * LARGEST // 2**20
    assert peak - before <= bound + 100, (before, peak, held, bound)
    assert peak - before < dense
