"""What each rank of 1, 2 and 4 holds, reads and waits for while it loads a whole model.

Bytes: of a Llama whose layers are arbitrary bytes, in ``/dev/shm`` where there is one; how pages are counted is in
``sharding``.  Seconds are those of the slowest rank, from the opening of the files until the model is there;
``touched`` adds reading all that a rank holds once, which loading leaves to the first forward.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.bench.sharding import MEMORY

__all__ = ["measure"]

HIDDEN, INNER, LAYERS, VOCABULARY = 4096, 11264, 10, 16384
HEADS, KV_HEADS = 32, 8
KINDS = ("q4k", "afq4")
WORLDS = (1, 2, 4)

_CHILD = """
import json, sys, time
from pathlib import Path
import torch
import transformers.models.llama.modeling_llama  # not part of the time
from uqff.parallel import load_model
from uqff.parallel.ranks import joined

directory, out = Path(sys.argv[1]), Path(sys.argv[2])

def accessed():
    size, inside = 0, False
    with open("/proc/self/smaps") as smaps:
        for line in smaps:
            head = line.split()
            if "-" in head[0] and ":" not in head[0]:
                inside = line.rstrip().endswith((".uqff", "residual.safetensors"))
            elif inside and head[0] == "Referenced:":
                size += int(head[1])
    return size * 1024

torch.set_num_threads(1)
with joined(torch.device("cpu"), 300) as comm:
    load_model(directory, comm)
    comm.barrier()
    with open("/proc/self/clear_refs", "w") as marks:
        marks.write("1")
    start = time.perf_counter()
    model = load_model(directory, comm)
    loaded = time.perf_counter() - start
    held = {part.data_ptr(): part for part in (*model.buffers(), *model.parameters())}
    for part in held.values():
        part.sum()
    touched = time.perf_counter() - start
    said = {"loaded": loaded, "touched": touched, "held": sum(part.nbytes for part in held.values())}
    (out / f"{comm.rank}.json").write_text(json.dumps(said | {"accessed": accessed()}))
    comm.barrier()
"""


def _write(directory: Path, kind: str) -> int:
    """A 1.2 model directory; the bytes of its files."""
    import torch
    from safetensors.torch import save_file

    import uqff
    from uqff.parallel.weight import WeightBuffers
    from uqff.quantization.types import meta_weight

    kv = HIDDEN // HEADS * KV_HEADS
    attention = {"q": (HIDDEN, HIDDEN), "k": (kv, HIDDEN), "v": (kv, HIDDEN), "o": (HIDDEN, HIDDEN)}
    shapes = {f"self_attn.{name}_proj": shape for name, shape in attention.items()}
    shapes |= {f"mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")} | {"mlp.down_proj": (HIDDEN, INNER)}
    made = {}
    for shape in {*shapes.values(), (VOCABULARY, HIDDEN)}:
        store = WeightBuffers(meta_weight(kind, shape, torch.float32)).to_empty(device="cpu")
        for name, buffer in store.named_buffers():
            if name != "signature":
                buffer.random_(0, 256)
        made[shape] = uqff.Layer(store.record)
    layers = {f"model.layers.{i}.{name}": made[shape] for i in range(LAYERS) for name, shape in shapes.items()}
    layers |= dict.fromkeys(("lm_head", "model.embed_tokens"), made[VOCABULARY, HIDDEN])
    uqff.save(layers, directory / "0-0.uqff", version=(1, 2, 0))
    norms = [f"model.layers.{i}.{name}_layernorm" for i in range(LAYERS) for name in ("input", "post_attention")]
    save_file(
        {f"{name}.weight": torch.ones(HIDDEN) for name in (*norms, "model.norm")}, directory / "residual.safetensors"
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return sum(path.stat().st_size for path in directory.iterdir() if path.suffix != ".json")


def measure() -> list[dict[str, object]]:
    """One row a type and world size: the most that a rank holds, accesses and waits."""
    rows: list[dict[str, object]] = []
    for kind in KINDS:
        with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as scratch:
            directory, out, child = (Path(scratch, name) for name in ("model", "out", "child.py"))
            directory.mkdir()
            child.write_text(_CHILD)
            size = _write(directory, kind)
            for world in WORLDS:
                out.mkdir(exist_ok=True)
                torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
                command = [sys.executable, *(torchrun if world > 1 else []), str(child), str(directory), str(out)]
                subprocess.run(command, check=True, capture_output=True, text=True)
                said = [json.loads((out / f"{rank}.json").read_text()) for rank in range(world)]
                most = {name: max(rank[name] for rank in said) for name in said[0]}
                rows.append(
                    {
                        "type": kind,
                        "file GiB": round(size / 2**30, 2),
                        "ranks": world,
                        "bytes held": f"{most['held'] / size:.1%}",
                        "pages accessed": f"{most['accessed'] / size:.1%}",
                        "load s": f"{most['loaded']:.3f}",
                        "touched s": f"{most['touched']:.3f}",
                    }
                )
    return rows
