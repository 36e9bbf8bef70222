"""Tiny checkpoints that see, and the two GGUF files that llama.cpp's own converter makes of each.

    python -m tools.tiny.mmproj LLAMA_CPP

lets the converter of a llama.cpp tree (`convert_hf_to_gguf.py`; the source distribution of `llama-cpp-python` has one)
write both files of each, and what is in them into `tests/golden/MMPROJ.json`: metadata, and of each tensor its name,
type, shape and digest. `write_pair` writes the same files without the converter. It does not know which tensor is
which: it finds them by their digests among what may have been made of the checkpoint's.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
import numpy.typing as npt

from tools.tiny.architectures import GOLDEN, HIDDEN, VOCABULARY
from tools.tiny.models import TinyModel
from tools.tiny.multimodal import MULTIMODALS, write
from tools.tiny.text import EXPERTS, values_of
from tools.tiny.towers import END_TOKEN, IMAGE_TOKEN, START_TOKEN, VIDEO_TOKEN, Multimodal

__all__ = ["CASES", "GOLDEN_FILE", "checkpoint_of", "write_checkpoint", "write_pair"]

GOLDEN_FILE: Final = GOLDEN / "MMPROJ.json"
SOURCE: Final = "llama.cpp, convert_hf_to_gguf.py, of the source distribution of llama-cpp-python 0.3.36"
BLOCKS: Final = 3
"""Of a tower: the converter takes `mlp.2` for one of block 2."""

Numbers = npt.NDArray[Any]

_QWEN = {
    IMAGE_TOKEN: "<|image_pad|>",
    VIDEO_TOKEN: "<|video_pad|>",
    START_TOKEN: "<|vision_start|>",
    END_TOKEN: "<|vision_end|>",
}
_MISTRAL = {IMAGE_TOKEN: "[IMG]", VIDEO_TOKEN: "[IMG_BREAK]", START_TOKEN: "[IMG_END]"}
CASES: Final[dict[str, dict[int, str]]] = {
    "Gemma 3": {IMAGE_TOKEN: "<image_soft_token>", START_TOKEN: "<start_of_image>", END_TOKEN: "<end_of_image>"},
    "Idefics3": {IMAGE_TOKEN: "<image>"},
    "LFM2-VL": {IMAGE_TOKEN: "<image>"},
    "Llama 4": {IMAGE_TOKEN: "<|patch|>", START_TOKEN: "<|image_start|>", END_TOKEN: "<|image_end|>"},
    "Ministral 3": _MISTRAL,
    "Mistral 3": _MISTRAL,
    "Qwen2-VL": _QWEN,
    "Qwen2.5-VL": _QWEN,
    "Qwen3-VL": _QWEN,
    "Qwen3-VL-MoE": _QWEN,
    "Qwen3.5 with vision": _QWEN,
    "Qwen3.5-MoE": _QWEN,
}
"""Titles of `tools.tiny.multimodal`, and the tokens of images by number."""

TEXTS: Final = {"Idefics3": "LlamaForCausalLM", "LFM2-VL": "Lfm2ForCausalLM"}
"""Classes of text models that the converter finds in `text_config` only."""


def case_of(name: str) -> Multimodal:
    """A configuration with a deeper tower, of shapes that the converter takes."""
    made = copy.deepcopy(MULTIMODALS[name])
    vision = made.values["vision_config"]
    vision["depth" if "depth" in vision else "num_hidden_layers"] = BLOCKS
    made.preprocessor.update(image_seq_length=1)
    if name == "Gemma 3":
        made.values["text_config"]["sliding_window_pattern"] = 6  # which llama.cpp takes for granted
    if name == "Llama 4":  # likewise
        made.values["text_config"].update(attention_chunk_size=8192, no_rope_layers=[1, 1])
    if name == "LFM2-VL":
        vision["patch_size"] = 16  # which the converter writes into its code
    if name == "Qwen3-VL-MoE":
        made.values["text_config"]["mlp_only_layers"] = []
    if name in TEXTS:
        made.values["text_config"]["architectures"] = [TEXTS[name]]
    return made


def values(key: str, shape: tuple[int, ...]) -> Numbers:
    """Of a tensor: of norms to which 1 is added, numbers that come back; of Gemma's projection, in F16; of rates,
    logarithms of powers of two.
    """
    if key.endswith(".A_log"):
        return np.array([np.log(2) * power for power in (2, -3, 1, 0)], np.float32)
    made = values_of(key, shape)
    if "mm_" in key or "layernorm" in key or ".norm." in key or "_norm." in key:
        made = made.astype(np.float16).astype(np.float32) / np.float32(2) + np.float32(1)
        made = made.astype(np.float16).astype(np.float32)
    return made


def checkpoint_of(name: str) -> dict[str, Numbers]:
    """The tensors of a checkpoint, by the names that `transformers` gives them."""
    return {key: values(key, tuple(shape)) for key, shape in _golden()[name]["checkpoint"].items()}


def write_checkpoint(name: str, folder: Path) -> None:
    """Write a checkpoint with its configuration and tokenizer."""
    from safetensors.numpy import save_file

    made = case_of(name)
    TinyModel(hidden_size=HIDDEN, heads=2, vocab_size=VOCABULARY).write(folder)
    save_file(checkpoint_of(name), folder / "model.safetensors")
    _write_documents(name, made, folder)


def _write_documents(name: str, made: Multimodal, folder: Path) -> None:
    named = {"architectures": [made.architecture], "torch_dtype": "float32"}
    documents: dict[str, Any] = {"config.json": made.values | named, "preprocessor_config.json": made.preprocessor}
    if made.processor is not None:
        documents["processor_config.json"] = made.processor
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for number, text in CASES[name].items():
        tokenizer["model"]["vocab"] = vocabulary = {
            text if each == number else key: each for key, each in vocabulary.items()
        }
        tokenizer["added_tokens"].append({"id": number, "content": text, "special": True} | _PLAIN)
    documents["tokenizer.json"] = tokenizer
    for each, document in documents.items():
        (folder / each).write_text(json.dumps(document, indent=2))


_PLAIN: Final = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def _golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(GOLDEN_FILE.read_text())["models"]
    return found


def write_pair(name: str, folder: Path, *, dtype: str = "F32", only: str = "") -> None:
    """Write the two files that the converter makes of a checkpoint, `model.gguf` and `mmproj-model.gguf`.

    Args:
        name: of the checkpoint.
        folder: where.
        dtype: `F16` for matrices in that type.
        only: the name of the one to write, if not both.
    """
    import gguf

    golden = _golden()[name]
    tensors = checkpoint_of(name)
    for key in [each for each in tensors if ".experts.0." in each]:
        experts = [tensors[key.replace(".experts.0.", f".experts.{expert}.")] for expert in range(EXPERTS)]
        tensors[key.replace(".experts.0.", ".experts.")] = np.stack(experts)
    stored = {digest(each): each for key, each in tensors.items() for each in forms(key, each)}
    for file in [only] if only else ["model.gguf", "mmproj-model.gguf"]:
        there = golden[file]
        writer = gguf.GGUFWriter(folder / file, "", endianess=gguf.GGUFEndian.LITTLE)
        writer.kv_data[0].clear()
        for key, kind, value in there["metadata"]:
            if isinstance(kind, list):
                writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType[kind[0]])
            else:
                writer.add_key_value(key, value, gguf.GGUFValueType[kind])
        for each, (kind, shape, told) in there["tensors"].items():
            made = stored[told].reshape(shape)
            halved = kind == "F16" or (dtype == "F16" and made.ndim > 1)
            writer.add_tensor(each, np.ascontiguousarray(made, np.float16 if halved else np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def forms(key: str, numbers: Numbers) -> Iterator[Numbers]:
    """What a tensor may have become: itself, one more than it, rows that take turns, parts of it, other orders."""
    yield numbers
    yield numbers + np.float32(1)
    rows = len(numbers)
    for size in (16, 32, 8):  # of a head
        if numbers.ndim == 2 and rows % size == 0:
            halves = numbers.reshape(rows // size, 2, size // 2, -1)
            yield halves.swapaxes(1, 2).reshape(numbers.shape)
    if rows % 3 == 0:
        yield from np.split(numbers, 3)
    if numbers.ndim == 5:
        yield from numbers.swapaxes(0, 2).swapaxes(1, 2)
    if numbers.ndim == 2 and numbers.shape[1] == 3 * 16**2:
        yield numbers.reshape(rows, 16, 16, 3).transpose(0, 3, 1, 2)
    if key.endswith(".A_log"):
        yield -np.exp(numbers.astype(np.float64)).astype(np.float32)
        yield tiled(-np.exp(numbers.astype(np.float64)).astype(np.float32), rows)
    if ".linear_attn." in key:  # of two value heads each, the first of both key heads before the second ones
        yield tiled(numbers, rows)
        yield tiled(numbers.T, numbers.shape[-1]).T
    if numbers.ndim == 3:
        middle = numbers.shape[2] // 2
        for part in (numbers, numbers[:, :, :middle], numbers[:, :, middle:]):  # inputs first
            yield part.swapaxes(1, 2)


def tiled(numbers: Numbers, rows: int) -> Numbers:
    """Rows of four value heads, the last ones of a tensor that may have those of keys before, in GGUF's order."""
    heads, before = (4 if rows == 4 else 64), (rows - 64 if rows > 64 else 0)
    if rows != before + heads:
        return numbers
    values = numbers[before:].reshape(2, 2, heads // 4, -1).swapaxes(0, 1).reshape(numbers[before:].shape)
    return np.concatenate((numbers[:before], values))


def digest(numbers: Numbers) -> str:
    """Of the bytes of numbers in float32, whatever their type and shape."""
    return hashlib.sha256(np.ascontiguousarray(numbers, "<f4").tobytes()).hexdigest()[:20]


def read(path: Path, gguf: Any) -> dict[str, Any]:
    """What is in a file."""
    reader = gguf.GGUFReader(path)
    metadata = []
    for field in reader.fields.values():
        if not field.name.startswith("GGUF."):
            kinds = [kind.name for kind in field.types]
            metadata.append([field.name, kinds[1:] if kinds[0] == "ARRAY" else kinds[0], field.contents()])
    tensors = {
        each.name: [each.tensor_type.name, [int(size) for size in reversed(each.shape)], digest(each.data)]
        for each in reader.tensors
    }
    return {"metadata": metadata, "tensors": tensors}


def converted(name: str, base: Any, conversion: Any, gguf: Any) -> dict[str, Any]:
    """What the converter makes of a checkpoint."""
    import torch
    from safetensors.numpy import load_file, save_file

    made: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder, case = Path(scratch) / "checkpoint", case_of(name)
        MULTIMODALS[name] = case
        write(name, folder)
        shapes = {key: list(each.shape) for key, each in load_file(folder / "model.safetensors").items()}
        for key, shape in shapes.items():
            if ".experts." in key and name == "Qwen3-VL-MoE":
                shape[1:] = shape[:0:-1]  # as it is published: inputs first
        made["checkpoint"] = shapes
        save_file({key: values(key, tuple(shape)) for key, shape in shapes.items()}, folder / "model.safetensors")
        _write_documents(name, case, folder)
        for file, kind in (("model.gguf", "TEXT"), ("mmproj-model.gguf", "MMPROJ")):
            kind = getattr(conversion.ModelType, kind)
            numbers = base.ModelBase.load_hparams(folder, False)
            architecture = base.get_model_architecture(numbers, kind)
            converter = conversion.get_model_class(architecture, mmproj=kind is conversion.ModelType.MMPROJ)
            converter.no_mtp = True  # there are no layers that predict further tokens
            with torch.inference_mode():
                target = Path(scratch) / file
                converter(folder, gguf.LlamaFileType.ALL_F32, target, model_name=name).write()
            made[file] = read(target, gguf)
    return made


def vocabulary(model: Any) -> tuple[list[str], list[int], str]:
    """Tokens, their types and the way of cutting texts: the converter knows that of no tiny tokenizer."""
    tokenizer = json.loads((model.dir_model / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    special = {each["id"] for each in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    return tokens, [3 if number in special else 1 for number in range(len(tokens))], "gpt-2"


@click.command()
@click.argument("tree", metavar="LLAMA_CPP", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(tree: Path) -> None:
    """Let the converter of LLAMA_CPP write the golden file again."""
    sys.path[:0] = [str(tree), str(tree / "gguf-py")]
    base: Any = importlib.import_module("conversion.base")
    conversion: Any = importlib.import_module("conversion")
    gguf: Any = importlib.import_module("gguf")
    pieces: Any = types.ModuleType("sentencepiece")  # asked for before it is seen that there are none
    pieces.SentencePieceProcessor = None
    sys.modules.setdefault("sentencepiece", pieces)
    base.TextModel.get_vocab_base = vocabulary
    models = {name: converted(name, base, conversion, gguf) for name in CASES}
    source = {"source": SOURCE, "command": "python -m tools.tiny.mmproj LLAMA_CPP"}
    lines = [f"{json.dumps(name)}: {json.dumps(model, separators=(',', ':'))}" for name, model in models.items()]
    document = json.dumps(source, indent=1)[:-2] + ',\n "models": {\n' + ",\n".join(lines) + "\n }\n}\n"
    GOLDEN_FILE.write_text(document)
    for name, model in models.items():
        made = sum(len(model[file]["tensors"]) for file in ("model.gguf", "mmproj-model.gguf"))
        click.echo(f"{name}: {len(model['checkpoint'])} tensors, {made} in GGUF")


if __name__ == "__main__":
    main()
