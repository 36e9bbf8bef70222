"""Metadata of GGUF files that a configuration has no place for: kept beside the model, and put back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
from click.testing import CliRunner

from tools.tiny.gguf import write_gguf
from tools.tiny.models import TinyModel
from uqff.checkpoints import open_gguf
from uqff.checkpoints.gguf.rope import llama3_factors
from uqff.cli import main
from uqff.conversion import gguf_of_uqff, uqff_of_gguf
from uqff.conversion.kept import KEPT_NAME
from uqff.errors import FormatError
from uqff.export.dequantize import dequantize_model
from uqff.gguf.schema import Array, Value, ValueType
from uqff.migration import migrate
from uqff.quantization.run import quantize_model

MODEL = TinyModel("llama", hidden_size=64, intermediate_size=64, heads=2, kv_heads=1, vocab_size=20)


def plain(value: Value) -> tuple[str, Any]:
    """Type and content of a value."""
    if isinstance(value.value, Array):
        return value.value.type.name, value.value.values()
    return value.type.name, value.value


def metadata(path: Path) -> dict[str, tuple[str, Any]]:
    with open_gguf(path) as file:
        return {key: plain(value) for key, value in file.pairs.items()}


def tensors(path: Path) -> dict[str, bytes]:
    with open_gguf(path) as file:
        return {name: bytes(tensor.record().data.numpy()) for name, tensor in file.items()}


def rich(path: Path, *, pre: str = "deepseek-r1-qwen", model: str = "gpt2") -> Path:
    """A file with names, licences, a byte pair encoding under another name, scores, advice of all types."""
    write_gguf(MODEL, path.with_name("bare.gguf"), "q8_0")
    reader = package.GGUFReader(path.with_name("bare.gguf"))
    writer = package.GGUFWriter(path, "llama")
    writer.add_string("general.name", "Größe 1")
    writer.add_array("general.tags", ["a", "b"])
    writer.add_string("general.license", "apache-2.0")
    writer.add_uint32("general.file_type", 1007)
    writer.add_uint32("general.alignment", 64)
    writer.data_alignment = 64
    writer.add_uint32("llama.context_length", 512)
    writer.add_uint32("llama.embedding_length", 64)
    writer.add_uint32("llama.block_count", 1)
    writer.add_uint32("llama.feed_forward_length", 64)
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_uint32("llama.attention.head_count_kv", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_bool("llama.rope.scaling.finetuned", False)
    writer.add_uint32("quantize.imatrix.entries_count", 7)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    tokens = ["<s>", "</s>", *"abcdefghijklmnop", "ab", "abc"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 18)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_token_scores([float(-i) for i in range(20)])
    writer.add_uint32("tokenizer.ggml.bos_token_id", 0)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 1)
    writer.add_uint32("tokenizer.ggml.eot_token_id", 1)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("pre", "model"), [("deepseek-r1-qwen", "gpt2"), ("never-heard-of", "gpt2"), ("default", "t5")]
)
def test_there_and_back(tmp_path: Path, pre: str, model: str, dtype: str) -> None:
    """All pairs but those of the file itself, in their order; also of a tokenizer that could not be rebuilt."""
    before = metadata(rich(tmp_path / "a.gguf", pre=pre, model=model))
    there = uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u", dtype=dtype)
    assert KEPT_NAME in there.written
    back = gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf")
    del before["general.alignment"]
    after = metadata(tmp_path / "b.gguf")
    assert after == before
    assert list(after) == list(before)
    assert tensors(tmp_path / "b.gguf").keys() == tensors(tmp_path / "a.gguf").keys()
    if dtype == "f32":
        assert tensors(tmp_path / "b.gguf") == tensors(tmp_path / "a.gguf")
    assert back.notes == ()
    assert any("no tokenizer.json" in note for note in there.notes) is (pre != "deepseek-r1-qwen")


def test_by_way_of_other_directories(tmp_path: Path) -> None:
    """Migrated down and up, the same pairs; dequantised and quantised again, all but the type of the file."""
    before = metadata(rich(tmp_path / "a.gguf"))
    del before["general.alignment"]
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    migrate(tmp_path / "u", tmp_path / "old", "0.2")
    migrate(tmp_path / "old", tmp_path / "new", "1.2")
    gguf_of_uqff(tmp_path / "new", tmp_path / "b.gguf")
    assert metadata(tmp_path / "b.gguf") == before
    dequantize_model(tmp_path / "u", tmp_path / "plain")
    quantize_model(tmp_path / "plain", tmp_path / "again", ["q4_0"], promote=False)
    gguf_of_uqff(tmp_path / "again", tmp_path / "c.gguf")
    other = metadata(tmp_path / "c.gguf")
    assert other.pop("general.file_type") == ("U32", 2)
    made = {"general.type": ("TEXT", "model"), "general.quantization_version": ("U32", 2)}
    assert other == {key: value for key, value in before.items() if key != "general.file_type"} | made


def test_what_was_changed_counts(tmp_path: Path) -> None:
    """A new context length: the group is made anew, which is said; the names and the tokenizer stay."""
    before = metadata(rich(tmp_path / "a.gguf"))
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    config = json.loads((tmp_path / "u" / "config.json").read_text())
    (tmp_path / "u" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    back = gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf")
    after = metadata(tmp_path / "b.gguf")
    assert after["llama.context_length"] == ("U32", 1024)
    assert "llama.rope.scaling.finetuned" not in after
    assert after["tokenizer.ggml.pre"] == before["tokenizer.ggml.pre"]
    assert after["general.name"] == before["general.name"]
    note = f"the model's metadata in {KEPT_NAME} is not put back: what it tells of has been changed since"
    assert back.notes == (note,)
    result = CliRunner().invoke(main, ["convert", str(tmp_path / "u"), str(tmp_path / "c.gguf"), "--json"])
    assert json.loads(result.stdout)["notes"] == [note]
    tokenizer = json.loads((tmp_path / "u" / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (tmp_path / "u" / "tokenizer.json").write_text(json.dumps(tokenizer))
    gguf_of_uqff(tmp_path / "u", tmp_path / "d.gguf")
    after = metadata(tmp_path / "d.gguf")
    assert after["tokenizer.ggml.pre"] == ("TEXT", "qwen2")
    assert "tokenizer.ggml.scores" not in after


def test_kept_metadata_of_another_architecture(tmp_path: Path) -> None:
    """Nothing is put back, which is said; a broken file is an error that names it."""
    rich(tmp_path / "a.gguf")
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    TinyModel("qwen2", hidden_size=64, intermediate_size=64, heads=2, kv_heads=1, vocab_size=20).write(tmp_path / "q")
    (tmp_path / "q" / KEPT_NAME).write_bytes((tmp_path / "u" / KEPT_NAME).read_bytes())
    quantize_model(tmp_path / "q", tmp_path / "v", ["q8_0"])
    back = gguf_of_uqff(tmp_path / "v", tmp_path / "b.gguf")
    assert f"{KEPT_NAME} is of another architecture: nothing of it is put back" in back.notes
    assert "general.name" not in metadata(tmp_path / "b.gguf")
    (tmp_path / "u" / KEPT_NAME).write_bytes(b"GGUF")
    with pytest.raises(FormatError) as caught:
        gguf_of_uqff(tmp_path / "u", tmp_path / "c.gguf")
    assert caught.value.file == str(tmp_path / "u" / KEPT_NAME)


@pytest.mark.parametrize("way", ["there", "back"])
def test_an_active_window_is_noted(tmp_path: Path, way: str) -> None:
    """llama.cpp has none for these architectures; a window that is not in use is no matter."""
    expected = "the model has a sliding window of 128, which llama.cpp does not apply to this architecture"
    if way == "there":
        write_gguf(MODEL, tmp_path / "a.gguf", "q8_0", metadata={"llama.attention.sliding_window": 128})
        assert any(note.startswith(expected) for note in uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u").notes)
        return
    TinyModel("qwen2", hidden_size=64, intermediate_size=64, heads=2, kv_heads=1, vocab_size=20).write(tmp_path / "q")
    quantize_model(tmp_path / "q", tmp_path / "u", ["q8_0"])
    assert not any("window" in note for note in gguf_of_uqff(tmp_path / "u", tmp_path / "a.gguf").notes)
    config = json.loads((tmp_path / "u" / "config.json").read_text())
    config |= {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 0}
    (tmp_path / "u" / "config.json").write_text(json.dumps(config))
    assert any(note.startswith(expected) for note in gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf").notes)


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    """The file says so, as llama.cpp wants it said, and so does the summary."""
    MODEL.write(tmp_path / "q")
    (tmp_path / "q" / "tokenizer.json").unlink()
    quantize_model(tmp_path / "q", tmp_path / "u", ["q8_0"])
    back = gguf_of_uqff(tmp_path / "u", tmp_path / "a.gguf")
    assert back.notes == ("no tokenizer in the GGUF file: there is no tokenizer.json",)
    assert metadata(tmp_path / "a.gguf")["tokenizer.ggml.model"] == (ValueType.TEXT.name, "none")


def test_rotary_factors_keep_their_bits(tmp_path: Path) -> None:
    """Worked out by another library they differ in the last one; other numbers than the configuration's do not stay."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    factors = llama3_factors(scaling, 10000.0, 32)
    theirs = np.where(factors > 1, np.nextafter(factors, np.float32(0)), factors).astype(np.float32)
    theirs[-1] = factors[-1]  # by which the scaling is known
    write_gguf(MODEL, tmp_path / "a.gguf", "q8_0", extra={"rope_freqs.weight": theirs})
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf")
    assert tensors(tmp_path / "b.gguf")["rope_freqs.weight"] == theirs.tobytes() != factors.tobytes()
    config = json.loads((tmp_path / "u" / "config.json").read_text())
    config["rope_scaling"]["factor"] = 4.0
    config.pop("rope_parameters", None)
    (tmp_path / "u" / "config.json").write_text(json.dumps(config))
    gguf_of_uqff(tmp_path / "u", tmp_path / "c.gguf")
    made = llama3_factors({**scaling, "factor": 4.0}, 10000.0, 32)
    assert tensors(tmp_path / "c.gguf")["rope_freqs.weight"] == made.tobytes()
