"""GGUF files of models that see, with the ``mmproj`` file beside: against checkpoints that llama.cpp's own converter
made such files of (``tests/golden/MMPROJ.json``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import uqff
from tests.support.samples_gguf import F32, Tensor, gguf, pair
from tools.tiny.mmproj import CASES, checkpoint_of, write_checkpoint, write_pair
from tools.tiny.text import EXPERTS
from uqff.checkpoints.gguf import files
from uqff.checkpoints.gguf.files import open_gguf_tensors
from uqff.codes import DType
from uqff.conversion import uqff_of_gguf
from uqff.errors import FormatError, ShapeError, ShardError, UnsupportedError, UqffError
from uqff.quantization.run import quantize_model

TEXT, VISION = "model.gguf", "mmproj-model.gguf"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both files of every case, and its checkpoint, in a directory of its name."""
    home = tmp_path_factory.mktemp("pairs")
    for name in CASES:
        (home / name / "checkpoint").mkdir(parents=True)
        write_checkpoint(name, home / name / "checkpoint")
        write_pair(name, home / name)
    return home


def entries(folder: Path) -> dict[str, Any]:
    """All that the ``.uqff`` files and the residual of a directory hold."""
    files = [*folder.glob("*.uqff"), folder / "residual.safetensors"]
    return {f"{file.name}:{key}": value for file in files for key, value in load_file(file).items()}


def with_stacks(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a checkpoint with experts as GGUF has them: a stack of each projection."""
    made: dict[str, Any] = {}
    for key, numbers in tensors.items():
        path, _, last = key.partition(".experts.")
        if not last:
            made[key] = numbers
        elif last == "down_proj":
            made[f"{path}.switch_mlp.down_proj.weight"] = numbers.swapaxes(1, 2)
        elif last == "gate_up_proj":
            for projection, part in zip(("gate_proj", "up_proj"), np.split(numbers, 2, 2), strict=True):
                made[f"{path}.switch_mlp.{projection}.weight"] = part.swapaxes(1, 2)
        elif last.startswith("0."):
            experts = [tensors[f"{path}.experts.{at}.{last[2:]}"] for at in range(EXPERTS)]
            made[f"{path}.switch_mlp.{last[2:]}"] = np.stack(experts)
    return made


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("assets", [True, False])
def test_every_tensor_is_the_checkpoints(pairs: Path, name: str, assets: bool) -> None:
    """By its name, its shape and its bits; experts are stacks of each projection."""
    folder, wanted = pairs / name, with_stacks(checkpoint_of(name))
    with open_gguf_tensors(folder / TEXT, folder / "checkpoint" if assets else None) as tensors:
        assert set(tensors) == set(wanted)
        for key, numbers in wanted.items():
            assert tensors.shape(key) == numbers.shape
            stored = tensors.numbers(key).array().reshape(-1).view(np.float32)
            assert np.array_equal(stored.view(np.uint32), numbers.reshape(-1).view(np.uint32)), key
        assert tensors.notes == []


@pytest.mark.parametrize("name", CASES)
def test_uqff_is_that_of_the_checkpoint(pairs: Path, tmp_path: Path, name: str) -> None:
    """Every entry, and every tensor of the residual, whoever says what the configuration is."""
    source = pairs / name
    quantize_model(source / "checkpoint", tmp_path / "a", "q8_0", measure=False)
    quantize_model(source / TEXT, tmp_path / "b", "q8_0", measure=False)
    theirs, ours = entries(tmp_path / "a"), entries(tmp_path / "b")
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert np.array_equal(ours[key], value), key
    report = json.loads((tmp_path / "b" / "uqff_report.json").read_text())
    assert any("vis" in each["module"] for each in report["outputs"][0]["layer_details"]) == (
        not name.startswith("Qwen3")
    )


GRANTED = {
    "attention_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
    "max_window_layers",
    "rope_scaling",
    "sliding_window",
    "use_sliding_window",
    "vision_feature_layer",
}
"""What a configuration may say or not: of these models, it goes without saying."""
OTHERS = {
    "Gemma 3": {"text_config.hidden_act"},
    "LFM2-VL": {
        *(f"text_config.block_{each}" for each in ("ff_dim", "ffn_dim_multiplier", "multiple_of")),
        "text_config.rms_norm_eps",
    },
    "Qwen2-VL": {"vision_config.in_channels", "vision_config.in_chans"},
    "Qwen2.5-VL": {"vision_config.in_channels", "vision_config.in_chans", "vision_config.window_size"},
}
"""What the tiny checkpoints have otherwise than llama.cpp takes for granted."""


def flat(config: dict[str, Any], start: str = "") -> dict[str, Any]:
    """The values of nested objects, by their paths."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, dict) and key.endswith("_config")
        found |= flat(value, f"{start}{key}.") if nested else {start + key: value}
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_configuration_is_made_of_metadata(pairs: Path, name: str) -> None:
    """Sizes of both parts, numbers of tokens, axes of positions: as the checkpoint's own says them."""
    with open_gguf_tensors(pairs / name / TEXT) as tensors:
        made = flat(tensors.config)
    own = flat(json.loads((pairs / name / "checkpoint" / "config.json").read_text()))
    left = {"torch_dtype", "use_cache", "text_config.architectures", *OTHERS.get(name, ())}
    odd: dict[str, Any] = {
        key: (own.get(key), made.get(key))
        for key in own.keys() | made.keys()
        if own.get(key) != made.get(key) and key not in left and key.rpartition(".")[2] not in GRANTED
    }
    if name.startswith("Qwen3.5"):
        before, after = odd.pop("text_config.rope_parameters")
        assert before | {"mrope_interleaved": True} == after
    if name == "Ministral 3":
        before, after = odd.pop("text_config.rope_parameters")
        assert {key: value for key, value in before.items() if key != "max_position_embeddings"} == after
        assert odd.pop("text_config.rope_theta") == (None, before["rope_theta"])
    assert odd == {}


def test_what_stands_beside_the_model(pairs: Path, tmp_path: Path) -> None:
    """The configurations of processors; of the model's own directory, copies."""
    source = pairs / "Gemma 3"
    uqff_of_gguf(source / TEXT, tmp_path / "made")
    made = json.loads((tmp_path / "made" / "preprocessor_config.json").read_text())
    assert made["size"] == {"height": 28, "width": 28}
    assert (made["image_mean"], made["image_processor_type"]) == ([0.5, 0.5, 0.5], "Gemma3ImageProcessor")
    beside = json.loads((tmp_path / "made" / "processor_config.json").read_text())
    assert beside == {"image_seq_length": 1, "processor_class": "Gemma3Processor"}
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert (config["torch_dtype"], config["mm_tokens_per_image"]) == ("float32", 1)
    assert not (tmp_path / "made" / "metadata.gguf").exists()
    uqff_of_gguf(source / TEXT, tmp_path / "copied", assets=source / "checkpoint")
    copied, own = (each / "preprocessor_config.json" for each in (tmp_path / "copied", source / "checkpoint"))
    assert copied.read_bytes() == own.read_bytes()
    assert uqff.verify(tmp_path / "made", deep=True).clean


def test_what_the_tokenizer_is_told(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class of the processor, and of Gemma 3 tokens by names, which its processor asks for."""
    made = {"tokenizer_config.json": {"eos_token": "</s>"}}
    monkeypatch.setattr(files, "tokenizer_files", lambda file, config: (dict(made), []))
    with open_gguf_tensors(pairs / "Gemma 3" / TEXT) as tensors:
        tensors.write_companions(tmp_path, None, DType.F32)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "eos_token": "</s>",
        "extra_special_tokens": {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        "processor_class": "Gemma3Processor",
    }
    with open_gguf_tensors(pairs / "Mistral 3" / TEXT) as tensors:
        (tmp_path / "other").mkdir()
        tensors.write_companions(tmp_path / "other", None, DType.F32)
    told = json.loads((tmp_path / "other" / "tokenizer_config.json").read_text())
    assert told == {"eos_token": "</s>", "processor_class": "PixtralProcessor"}


@pytest.mark.parametrize("name", ["Qwen2.5-VL", "Mistral 3"])
def test_blocks_are_carried_over(pairs: Path, tmp_path: Path, name: str) -> None:
    """F16 of both files stays F16: of Q, K and V, whose rows are put together, and of heads put in order."""
    write_pair(name, tmp_path, dtype="F16")
    result = uqff_of_gguf(tmp_path / TEXT, tmp_path / "made")
    assert dict(result.types) == {"f16": sum(result.types.values())}
    with uqff.open(tmp_path / "made") as model:
        for key, numbers in checkpoint_of(name).items():
            if key.removesuffix(".weight") in model and numbers.ndim == 2:
                made = model[key.removesuffix(".weight")].weight.numbers().array().reshape(-1).view(np.float32)
                assert np.array_equal(made.reshape(numbers.shape), numbers.astype(np.float16)), key


def test_the_text_alone(pairs: Path, tmp_path: Path) -> None:
    """Where it is asked for, or there is nothing else."""
    folder = pairs / "Qwen3-VL"
    with open_gguf_tensors(folder / TEXT, mmproj="none") as tensors:
        assert tensors.config["architectures"] == ["Qwen3ForCausalLM"]
        assert len(tensors) == 25
        assert "model.layers.1.self_attn.q_norm.weight" in tensors
    write_pair("Qwen2-VL", tmp_path, only=TEXT)
    with uqff.open_checkpoint(tmp_path / TEXT) as checkpoint:
        assert checkpoint.config["architectures"] == ["Qwen2ForCausalLM"]


def test_which_file_is_taken(pairs: Path, tmp_path: Path) -> None:
    """The only one beside; of several, the one that is named, here or there."""
    folder = pairs / "Idefics3"
    (tmp_path / TEXT).write_bytes((folder / TEXT).read_bytes())
    for each in ("mmproj-F16.gguf", "model-mmproj-f32.gguf"):
        (tmp_path / each).write_bytes((folder / VISION).read_bytes())
    with pytest.raises(ShardError, match=r"several mmproj files: choose one \(--mmproj mmproj-F16.gguf\)") as several:
        open_gguf_tensors(tmp_path / TEXT)
    assert several.value.got == "mmproj-F16.gguf, model-mmproj-f32.gguf"
    for named in ("mmproj-F16.gguf", tmp_path / "model-mmproj-f32.gguf", str(folder / VISION)):
        with open_gguf_tensors(tmp_path / TEXT, mmproj=named) as tensors:
            assert tensors.config["model_type"] == "idefics3"
    with pytest.raises(FileNotFoundError):
        open_gguf_tensors(tmp_path / TEXT, mmproj="mmproj-Q8_0.gguf")
    with pytest.raises(UnsupportedError, match="only GGUF files have an mmproj file"):
        uqff.open_checkpoint(folder / "checkpoint", mmproj="none")
    with pytest.raises(UnsupportedError, match="no mmproj file"):
        open_gguf_tensors(tmp_path / TEXT, mmproj=tmp_path / TEXT)


HEAD = [pair("general.architecture", "text", "clip"), pair("clip.has_vision_encoder", "bool", True)]


@pytest.mark.parametrize(
    ("pairs_of_file", "problem", "field", "got"),
    [
        ([*HEAD, pair("clip.projector_type", "text", "ultravox")], "projector that is not converted",
         "clip.projector_type", "ultravox"),
        ([*HEAD, pair("clip.vision.projector_type", "text", "gemma4v")], "projector that is not converted",
         "clip.vision.projector_type", "gemma4v"),
        (HEAD, "projector that is not converted", "clip.vision.projector_type", None),
        ([*HEAD, pair("clip.has_audio_encoder", "bool", True)], "a part that hears", "clip.has_audio_encoder", True),
        ([*HEAD, pair("clip.projector_type", "text", "pixtral"), pair("clip.use_gelu", "bool", True)],
         "another activation", "clip.use_gelu", True),
    ],
)  # fmt: skip
def test_projectors_that_are_not_converted(
    pairs: Path, tmp_path: Path, pairs_of_file: list[bytes], problem: str, field: str, got: object
) -> None:
    """By name, with what is known."""
    (tmp_path / VISION).write_bytes(gguf(pairs_of_file, [F32]))
    with pytest.raises(UnsupportedError, match=problem) as caught:
        open_gguf_tensors(pairs / "Mistral 3" / TEXT, mmproj=tmp_path / VISION)
    assert (caught.value.field, caught.value.got) == (field, got)
    assert caught.value.file == str(tmp_path / VISION)


def changed(
    path: Path,
    target: Path,
    *,
    drop: str = "",
    add: bytes = b"",
    values: dict[str, Any] | None = None,
    renamed: tuple[str, str] = ("", ""),
) -> None:
    """A GGUF file with other metadata, or other tensors."""
    import gguf as package

    reader = package.GGUFReader(path)
    writer = package.GGUFWriter(target, "clip")
    writer.kv_data[0].clear()
    for field in reader.fields.values():
        if field.name.startswith("GGUF."):
            continue
        value = (values or {}).get(field.name, field.contents())
        if value is not None:
            writer.add_key_value(field.name, value, field.types[0], *field.types[1:])
    for key, value in (values or {}).items():
        if key not in reader.fields:
            writer.add_key_value(key, value, package.GGUFValueType.UINT32)
    for tensor in reader.tensors:
        if tensor.name != drop:
            here, there = renamed if renamed[0] and renamed[0] in tensor.name else renamed[::-1]
            writer.add_tensor(tensor.name.replace(here, there) if here else tensor.name, np.array(tensor.data))
    if add:
        writer.add_tensor(add.decode(), np.zeros(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("change", "kind", "problem", "field", "got"),
    [
        ({"drop": "v.blk.1.attn_qkv.bias"}, FormatError, "the file lacks a tensor", "v.blk.1.attn_qkv.bias", None),
        ({"drop": "v.position_embd.weight"}, FormatError, "the file lacks a tensor", "v.position_embd.weight", None),
        ({"add": b"v.blk.3.ln1.bias"}, UnsupportedError, "tensors that the projector does not have",
         "v.blk.3.ln1.bias", "v.blk.3.ln1.bias"),
        ({"values": {"clip.vision.feed_forward_length": 96}}, ShapeError, "does not fit the metadata",
         "v.blk.0.ffn_up.weight", "[64, 32]"),
        ({"values": {"clip.vision.block_count": 2}}, FormatError, "not the blocks", "clip.vision.is_deepstack_layers",
         "3"),
        ({"values": {"clip.vision.block_count": 2**20}}, FormatError, "more layers than any model has",
         "clip.vision.block_count", str(2**20)),
        ({"values": {"clip.vision.projection_dim": 128}}, FormatError, "not the projector of this model",
         "clip.vision.projection_dim", "128"),
        ({"values": {"clip.vision.image_mean": [0.5]}}, FormatError, "not numbers", "clip.vision.image_mean",
         "1 of them"),
        ({"values": {"clip.vision.swiglu": 1}}, UnsupportedError, "metadata that is not known", "clip.vision.swiglu",
         None),
        ({"values": {"clip.projector_type": "gemma3"}}, FormatError, "not the projector of this model",
         "clip.projector_type", "gemma3, which goes with gemma3"),
    ],
)  # fmt: skip
def test_files_that_are_not_right(
    pairs: Path, tmp_path: Path, change: dict[str, Any], kind: type[UqffError], problem: str, field: str, got: str
) -> None:
    """What is missing, left over, or does not fit the text, with its name."""
    folder = pairs / "Qwen3-VL"
    changed(folder / VISION, tmp_path / VISION, **change)
    with pytest.raises(kind, match=problem) as caught:
        uqff_of_gguf(folder / TEXT, tmp_path / "made", mmproj=tmp_path / VISION)
    assert caught.value.field == field
    assert got is None or str(caught.value.got) == got
    assert caught.value.file == str(tmp_path / VISION)


@pytest.mark.parametrize("name", ["Idefics3", "Qwen2.5-VL"])
def test_older_files(pairs: Path, tmp_path: Path, name: str) -> None:
    """In which two matrices of an MLP are called by each other's names; newer kinds never were."""
    swapped = ("ffn_up", "ffn_down")
    changed(pairs / name / VISION, tmp_path / VISION, renamed=swapped)
    with open_gguf_tensors(pairs / name / TEXT, mmproj=tmp_path / VISION) as tensors:
        for key, numbers in checkpoint_of(name).items():
            assert np.array_equal(tensors.numbers(key).array().view(np.float32).reshape(numbers.shape), numbers), key
    changed(pairs / "Qwen3-VL" / VISION, tmp_path / VISION, renamed=swapped)
    with pytest.raises(ShapeError, match="does not fit the metadata"):
        open_gguf_tensors(pairs / "Qwen3-VL" / TEXT, mmproj=tmp_path / VISION)


def test_the_models_own_configuration(pairs: Path, tmp_path: Path) -> None:
    """Is compared with both files, and has the last word on metadata that is not known."""
    folder = pairs / "Qwen3-VL"
    config = json.loads((folder / "checkpoint" / "config.json").read_text())
    for key, value, expected in (("depth", 4, 3), ("deepstack_visual_indexes", [1], [0]), ("num_heads", 4, 2)):
        other = {**config, "vision_config": {**config["vision_config"], key: value}}
        (tmp_path / "config.json").write_text(json.dumps(other))
        with pytest.raises(FormatError, match="not the file's model") as caught:
            open_gguf_tensors(folder / TEXT, tmp_path)
        assert (caught.value.field, caught.value.expected) == (f"vision_config.{key}", expected)
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "architectures": ["Qwen3VLMoeForConditionalGeneration"]})
    )
    with pytest.raises(FormatError, match="not the file's architecture"):
        open_gguf_tensors(folder / TEXT, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    changed(folder / VISION, tmp_path / VISION, values={"clip.vision.swiglu": 1})
    with open_gguf_tensors(folder / TEXT, tmp_path, tmp_path / VISION) as tensors:
        assert len(tensors) == 76


def test_a_token_that_is_not_there(pairs: Path, tmp_path: Path) -> None:
    """Its text is named; the model's own configuration does without."""
    folder = pairs / "Idefics3"
    text = (folder / TEXT).read_bytes()
    (tmp_path / TEXT).write_bytes(text.replace(b"<image>", b"<IMAGE>"))
    with pytest.raises(UnsupportedError, match="a token of images is not there") as caught:
        open_gguf_tensors(tmp_path / TEXT, mmproj=folder / VISION)
    assert (caught.value.expected, caught.value.field) == ("<image>", "tokenizer.ggml.tokens")
    with open_gguf_tensors(tmp_path / TEXT, folder / "checkpoint", folder / VISION) as tensors:
        assert tensors.config["image_token_id"] == 60


def test_blocks_of_types_that_uqff_does_not_have(pairs: Path, tmp_path: Path) -> None:
    """In the part that sees, too: all are named before any work."""
    tensor = Tensor("v.blk.0.attn_k.weight", (256, 1), 23, bytes(136))
    head = [*HEAD, pair("clip.projector_type", "text", "idefics3")]
    (tmp_path / VISION).write_bytes(gguf(head, [tensor]))
    with pytest.raises(UqffError):
        uqff_of_gguf(pairs / "Idefics3" / TEXT, tmp_path / "made", mmproj=tmp_path / VISION)
