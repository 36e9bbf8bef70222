"""Quantising needs no torch: importing it takes as long as quantising a small model, and more memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.support.golden_models import TinyModel
from tests.support.lora_files import factors, write_adapter
from tools.golden.v1 import TinyMixtral
from tools.tiny.gguf import write_gguf
from uqff.checkpoints.gguf.rope import llama3_factors
from uqff.cli import main
from uqff.quantization.types import KINDS

CHILD = """
import sys
sys.modules["torch"] = None  # whoever imports it gets an ImportError
from uqff.cli import main
from uqff.checkpoints.gguf.rope import llama3_factors
main(sys.argv[1:], standalone_mode=False)
"""


def same_alone(tmp_path: Path, *options: str) -> None:
    """`uqff quantize` makes the same files in a process without torch and in this one, which has imported it."""
    arguments = ["quantize", str(tmp_path / "source"), *options, "--json"]
    command = [sys.executable, "-c", CHILD, *arguments, str(tmp_path / "alone")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    main([*arguments, str(tmp_path / "beside")], standalone_mode=False)
    names = sorted(path.name for path in (tmp_path / "beside").iterdir())
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == names
    assert sum(name.endswith(".uqff") for name in names) == sum(option.startswith("--isq") for option in options)
    for name in names:
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "beside" / name).read_bytes(), name


def test_every_type_with_biases_and_a_rounded_residual(tmp_path: Path) -> None:
    """Weights, biases and residual are bfloat16 and rounded to float16."""
    TinyModel("qwen2", hidden_size=64, heads=2, intermediate_size=128, weight_dtype="BF16").write(tmp_path / "source")
    same_alone(tmp_path, "--format=0.2", "--dtype=f16", *(f"--isq={kind}" for kind in (*KINDS, "unquant")))


def test_experts_and_an_integer_in_the_residual(tmp_path: Path) -> None:
    """Stacks made expert by expert (q4k) and as a whole (f8q8, of 1.1); the report beside them."""
    TinyMixtral(experts=3).write(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    tensors["count"] = tensors["model.norm.weight"].long()
    save_file(tensors, file)
    same_alone(tmp_path, "--format=1.1", "--isq=q4k", "--isq=f8q8")


def test_adapters_are_merged(tmp_path: Path) -> None:
    """In float32, by a kernel of ours, not by torch."""
    TinyModel(hidden_size=64, heads=2, intermediate_size=128, weight_dtype="BF16").write(tmp_path / "source")
    write_adapter(tmp_path / "lora", factors("model.layers.0.mlp.up_proj", 128, 64))
    same_alone(tmp_path, "--isq=q8_0", f"--lora={tmp_path / 'lora'}:0.5")


ALL_COMMANDS = """
import sys
sys.modules["torch"] = None
from uqff.cli import main
from uqff.checkpoints.gguf.rope import llama3_factors
for line in sys.stdin.read().splitlines():
    main(line.split("\\t"), standalone_mode=False)
"""


def test_what_looks_at_models_and_carries_them_over(tmp_path: Path) -> None:
    """A layer in numbers and in bytes, every payload, a comparison, digests, both migrations and conversions.

    Of the GGUF files, one has biases; the other rows in another order, numbers to widen, and factors of a rope scaling.
    """
    TinyModel("qwen2", hidden_size=256, heads=2, intermediate_size=512).write(tmp_path / "source")
    source, made, old, new, gguf = (str(tmp_path / name) for name in ("source", "made", "old", "new", "made.gguf"))
    llama = str(tmp_path / "llama.gguf")
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    write_gguf(TinyModel(), Path(llama), "f16", extra={"rope_freqs.weight": llama3_factors(scaling, 10000.0, 32)})
    commands = [
        ["quantize", source, made, "--isq=q8_0", "--quiet"],
        ["inspect", made],
        ["inspect", made, "lm_head", "--hex"],
        ["verify", made, "--deep"],
        ["diff", source, made],
        ["report", made],
        ["migrate", made, old, "--to=0.2", "--fix-biases=f32", "--quiet"],
        ["migrate", old, new, "--to=1.2", "--quiet"],
        ["diff", made, new],
        ["checksum", new, "--layers"],
        ["convert", made, gguf, "--quiet"],
        ["convert", gguf, str(tmp_path / "again"), "--quiet"],
        ["convert", llama, str(tmp_path / "dense"), "--format=0.2", "--dtype=bf16", "--quiet"],
        ["convert", str(tmp_path / "dense"), str(tmp_path / "llama-again.gguf"), "--quiet"],
    ]
    text = "\n".join("\t".join(command) for command in commands)
    command = [sys.executable, "-c", ALL_COMMANDS]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
