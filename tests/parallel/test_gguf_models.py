"""GGUF files as models: loaded and run as what they become, without a file in between."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import uqff
from tests.checkpoints.gguf.test_tokenizers import trained
from tests.support.command_line import call
from tools.tiny.gguf import write_gguf
from tools.tiny.mmproj import write_pair
from tools.tiny.models import TinyModel
from uqff.checkpoints.gguf.pretokenizers import PRE_TOKENIZERS
from uqff.errors import UnsupportedError
from uqff.parallel.checkpoint_source import CheckpointSource
from uqff.parallel.layer import QuantizedLayer

MODEL = TinyModel(hidden_size=64, intermediate_size=96, heads=4, kv_heads=2, layers=2, vocab_size=71)


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UQFF_KERNELS", "reference")


def logits(path: Path) -> torch.Tensor:
    with torch.inference_mode():
        model = uqff.load_model(path, dtype=torch.float32)
        found: torch.Tensor = model(torch.tensor([[1, 5, 9, 30]])).logits
    return found


def kinds(model: torch.nn.Module) -> set[str]:
    return {each.weight.kind for each in model.modules() if isinstance(each, QuantizedLayer)}


@pytest.mark.parametrize("parts", [0, 5])
def test_the_same_as_what_is_converted(parts: int, tmp_path: Path) -> None:
    """The codes are the file's own, in the order of the model; of a split file, any part names all."""
    write_gguf(MODEL, tmp_path / "m.gguf", "q8_0", split_max_tensors=parts)
    file = sorted(tmp_path.glob("*.gguf"))[-1]
    uqff.convert(file, tmp_path / "model")
    assert torch.equal(logits(file), logits(tmp_path / "model"))
    assert kinds(uqff.load_model(file)) == {"q8_0"}
    assert kinds(uqff.load_model(file, isq="fp8")) == {"fp8"}


def test_the_text_of_a_model_that_sees(tmp_path: Path) -> None:
    """Computes the same with the other file beside it, without it, and beside one that cannot be had."""
    write_pair("Qwen2.5-VL", tmp_path)
    with CheckpointSource(tmp_path / "model.gguf") as source:
        assert source.config["model_type"] == "qwen2_5_vl"
    seen = logits(tmp_path / "model.gguf")
    (tmp_path / "mmproj-model.gguf").write_bytes(b"GGUF")
    with CheckpointSource(tmp_path / "model.gguf") as source:
        assert source.config["model_type"] == "qwen2"
    assert torch.equal(logits(tmp_path / "model.gguf"), seen)


def test_ranks_tell_files_apart(tmp_path: Path) -> None:
    """By a sample of each tensor, as of files of safetensors; the last byte counts where all are taken in."""
    write_gguf(MODEL, tmp_path / "a.gguf", "q8_0")
    data = bytearray((tmp_path / "a.gguf").read_bytes())
    (tmp_path / "b.gguf").write_bytes(data)
    found: dict[str, list[bytes]] = {}
    for change in ("none", "middle", "end"):
        if change != "none":
            data[{"middle": len(data) // 2, "end": -1}[change]] ^= 1
            (tmp_path / "b.gguf").write_bytes(data)
        found[change] = []
        for name in ("a", "b"):
            with CheckpointSource(tmp_path / f"{name}.gguf") as source:
                found[change].append(source.digest(everything=True))
    assert [a == b for a, b in found.values()] == [True, False, False]


def test_it_is_run(tmp_path: Path) -> None:
    """With the tokenizer that its metadata make; without one, or with one that is none, that is said of the file."""
    tokenizer = trained(PRE_TOKENIZERS[0])
    replace(MODEL, vocab_size=tokenizer.get_vocab_size()).write(tmp_path / "source")
    tokenizer.save(str(tmp_path / "source" / "tokenizer.json"))
    (tmp_path / "source" / "tokenizer_config.json").unlink()
    uqff.quantize_model(tmp_path / "source", tmp_path / "made", "q8_0", measure=False)
    assert call("convert", tmp_path / "made", tmp_path / "m.gguf", "--quiet")[0] == 0
    assert call("convert", tmp_path / "m.gguf", tmp_path / "model", "--quiet")[0] == 0
    ask = ("--prompt=a", "--raw", "--tokens=4", "--dtype=f32")
    expected = call("run", tmp_path / "model", *ask)
    assert call("run", tmp_path / "m.gguf", *ask) == expected
    assert (expected[0], len(expected[1]) > 1) == (0, True), expected
    for vocabulary, problem in ((False, "no tokenizer.json"), (True, "tokenizer cannot be read")):
        write_gguf(MODEL, tmp_path / "none.gguf", "q8_0", vocabulary=vocabulary)
        code, _, said = call("run", tmp_path / "none.gguf", *ask)
        assert (code, problem in said, f"(file {tmp_path / 'none.gguf'})" in said) == (1, True, True), said


def test_a_directory_of_them_is_none(tmp_path: Path) -> None:
    """Which of them is meant would be a guess."""
    write_gguf(MODEL, tmp_path / "m.gguf", "q8_0")
    with pytest.raises(
        uqff.ShardError, match=r"no \.uqff file in the directory: got a GGUF file, which uqff inspect, plan"
    ):
        uqff.load_model(tmp_path)
    with pytest.raises(UnsupportedError, match="the layer is quantised already"):
        uqff.quantize_model(tmp_path / "m.gguf", tmp_path / "out", "q4_0", measure=False)
