"""What reads files of strangers, and what it is given to begin with."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import uqff
from tools.fuzz import gguf
from tools.fuzz.target import Target, seed_of
from tools.fuzz.written import targets_of_written
from tools.tiny.mmproj import write_pair
from tools.tiny.models import TinyModel
from tools.tiny.quantised import METHODS, save_tensors, write_quantised
from uqff.checkpoints.gguf.files import open_gguf_tensors
from uqff.checkpoints.gguf.tokenizer import tokenizer_files
from uqff.container.framing import parse_header
from uqff.gguf.reader import head_end, open_gguf
from uqff.importance.files import WRITERS
from uqff.importance.matrix import Importance, InputSquares
from uqff.inspection.checksum import read_sums
from uqff.inspection.gguf import gguf_document, summarize_gguf
from uqff.models.names import parse_names
from uqff.quantization.recipe import parse_recipe

__all__ = ["targets"]

VECTORS = Path(__file__).resolve().parents[2] / "spec" / "vectors"
MOST_SEED = 20_000
"""Bytes of the longest seed: what is long is slow, and no more hostile."""

SEEING = ("Mistral 3", "Qwen3-VL")
"""Models that see, of whose files with towers the heads are changed."""
ZEROS = 1 << 19
"""Bytes of the tensors of these: there are enough."""

ALL_OF = 16
"""One in so many inputs is read to the last byte of the model that it lies in, the others as far as they matter."""

RECIPES = (
    b"0-8:\n  isq: q6k\n31:\n  isq: q8_0\n'/\\.down_proj\\.weight$/':\n  isq: q5k\n",
    b"'/(?i)layers\\.(0|1[0-9]*)\\.[a-z_]+(x{2,4}|y?)*$/': {isq: q4k, device: 'cuda[0]'}\n0: {}\n",
)

SUMS = f"{'0' * 64}  a.uqff\n\\{'1f' * 32} *b\\\\c\\n.uqff\n# model {'2' * 64}\n".encode()

FOREIGN: tuple[dict[str, Any], ...] = (
    {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": "auto_round:auto_gptq", "sym": True},
    {
        "quant_method": "gptq",
        "bits": 3,
        "group_size": -1,
        "desc_act": True,
        "checkpoint_format": "gptq_v2",
        "sym": False,
    },
    {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": ["lm_head"],
    },
    {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {
            "a": {"targets": ["re:.*_proj$"], "weights": {"num_bits": 8, "strategy": "channel", "type": "int"}},
            "b": {"targets": ["lm_head"], "weights": {"num_bits": 8, "strategy": "block", "block_structure": [8, 8]}},
        },
    },
    {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {}},
)
"""Settings of methods that the tensors beside them are not of."""

TEMPLATES = (
    b"{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}{{ raise_exception('x') }}",
    b"{%- set ns = namespace(n=0) -%}{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[0].content * 3 }}",
)


def _vectors(suffix: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted(VECTORS.rglob(f"*{suffix}")) if path.stat().st_size <= MOST_SEED]


def _blob(data: bytes) -> None:
    weight, _ = uqff.deserialize(data)
    if weight.numel < 1 << 20:
        weight.dequantize()


def _recipe(data: bytes) -> None:
    recipe = parse_recipe(data)
    for rule in recipe.rules:
        if rule.pattern is not None:
            rule.pattern.search("model.layers.10.mlp.down_proj.weight")


def _names(data: bytes) -> None:
    parse_names(data.decode("utf-8", "replace"))


class _Directory:
    """A directory of which one file is hostile."""

    def __init__(self, home: Path, source: Path | None, name: str) -> None:
        number = len(list(home.glob("read-*")))
        self.home, self.path = home / f"read-{number}", home / f"read-{number}" / name
        if source is None:
            self.home.mkdir()
        else:
            shutil.copytree(source, self.home)

    def layers(self, data: bytes) -> None:
        self.path.write_bytes(data)
        with uqff.open(self.home) as file:
            for key in file:
                weight, _ = file[key]
                if weight.numel < 1 << 20:
                    weight.dequantize()
            for name in file.residual:
                _ = file.residual[name]

    def model(self, data: bytes) -> str:
        self.path.write_bytes(data)
        is_whole = zlib.crc32(data) % ALL_OF == 0
        found = uqff.verify(self.home, deep=is_whole, strict=True)
        if found.clean and is_whole:
            uqff.inspect(self.home)
            uqff.checksum(self.home, layers=True)
        return ", ".join(sorted({violation.problem for violation in found}))

    def seeing(self, data: bytes) -> None:
        self.path.write_bytes(data + bytes(ZEROS))
        with open_gguf_tensors(self.home / "model.gguf") as tensors:
            assert tensors.vision is not None
            tensors.vision.documents(tensors.config["architectures"][0])

    def gguf(self, data: bytes) -> None:
        self.path.write_bytes(data)
        with open_gguf(self.path) as file:
            gguf_document(summarize_gguf(file))
            for tensor in file.values():
                if tensor.block_type is not None and tensor.shape and tensor.nbytes < 1 << 20:
                    tensor.record().dequantize()
            for value in file.pairs.values():
                if hasattr(value.value, "values"):
                    value.value.values()
            tokenizer_files(file, {"max_position_embeddings": 8, "bos_token_id": 1})

    def quantize(self, data: bytes) -> None:
        self.path.write_bytes(data)
        uqff.quantize_model(self.home, self.home / "out", "q4_0", force=True)

    def dequantize(self, data: bytes) -> None:
        self.path.write_bytes(data)
        uqff.dequantize_model(self.home, self.home / "out", force=True)

    def migrate(self, data: bytes) -> None:
        self.path.write_bytes(data)
        uqff.migrate(self.home, self.home / "out", force=True)

    def conversion(self, data: bytes) -> None:
        self.path.write_bytes(data)
        uqff.convert(self.path, self.home / "out", to="uqff", force=True)

    def checkpoint(self, data: bytes) -> None:
        self.path.write_bytes(data)
        with uqff.open_checkpoint(self.home) as checkpoint:
            for path in list(checkpoint.paths)[:20]:
                if checkpoint.meta(path).weight.numel < 1 << 20:
                    checkpoint.layer(path).weight.dequantize()

    def adapter(self, data: bytes) -> None:
        self.path.write_bytes(data)
        with uqff.lora.open_adapter(self.home) as adapter:
            for path in adapter:
                _ = adapter[path]

    def importance(self, data: bytes) -> None:
        self.path.write_bytes(data)
        found = Importance.open(self.path)
        for each in found.values():
            each.importance((1, 64))

    def sums(self, data: bytes) -> None:
        self.path.write_bytes(data)
        read_sums(self.path)


def _adapter(folder: Path) -> Path:
    """An adapter of two factors."""
    folder.mkdir()
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    tensors = {f"{name}A.weight": torch.ones(2, 32), f"{name}B.weight": torch.ones(32, 2)}
    save_tensors(tensors, folder / "adapter_model.safetensors")
    document = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up_proj"], "rank_pattern": {"up": 2}}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def _importance(folder: Path) -> list[bytes]:
    """Importance matrices of each form."""
    entries = {
        f"model.layers.{layer}.mlp.up_proj": InputSquares(np.ones((1, 64), np.float32), np.ones(1, np.int64))
        for layer in range(3)
    }
    made = []
    for ending in WRITERS:
        Importance(entries, datasets=["a"]).save(folder / f"importance{ending}")
        made.append((folder / f"importance{ending}").read_bytes())
    return made


def _sharded(source: Path, folder: Path) -> Path:
    """A checkpoint in two files, with an index of them."""
    shutil.copytree(source, folder)
    one, other = folder / "model-1.safetensors", folder / "model-2.safetensors"
    (folder / "model.safetensors").rename(one)
    save_tensors({"model.extra.weight": torch.zeros(2, 2)}, other)
    weights = dict.fromkeys(parse_header(memoryview(one.read_bytes())).entries, one.name)
    index = {"metadata": {}, "weight_map": {**weights, "model.extra.weight": other.name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _of_models(folder: Path) -> Iterator[Target]:
    """Files of model directories."""
    plain = folder / "checkpoint"
    TinyModel(hidden_size=32, intermediate_size=32, heads=2, vocab_size=32).write(plain)
    for name, version in (("v1", "1.2"), ("v0", "0.2")):
        model = folder / name
        uqff.quantize_model(plain, model, "q8_0", version=version, measure=False)
        residual, config = model / "residual.safetensors", model / "config.json"
        yield Target(f"config, {version}", "json", [seed_of(config)], _Directory(folder, model, config.name).model)
        (shard,) = sorted(model.glob("*.uqff"))
        read = _Directory(folder, model, shard.name).dequantize
        yield Target(f"dequantize, {version}", "safetensors", [shard.read_bytes()], read)
        if name == "v0":
            yield Target("migrate", "safetensors", [shard.read_bytes()], _Directory(folder, model, shard.name).migrate)
        if name == "v1":
            report = model / "uqff_report.json"
            seeds = [residual.read_bytes()]
            yield Target("residual", "safetensors", seeds, _Directory(folder, model, residual.name).model)
            yield Target("report", "json", [seed_of(report)], _Directory(folder, model, report.name).model)
    uqff.convert(folder / "v1", folder / "m.gguf", to="gguf")
    made = [(folder / "m.gguf").read_bytes()]
    yield Target("GGUF", "gguf", made, _Directory(folder, None, "m.gguf").gguf)
    yield Target("GGUF, conversion", "gguf", made, _Directory(folder, None, "m.gguf").conversion)
    yield Target("GGUF, types", "gguf", gguf.of_each_type(folder), _Directory(folder, None, "m.gguf").gguf)
    for name in SEEING:
        (folder / name).mkdir()
        write_pair(name, folder / name)
        vision = folder / name / "mmproj-model.gguf"
        head = vision.read_bytes()[: head_end(memoryview(vision.read_bytes()))]
        yield Target(f"GGUF, {name}", "gguf", [head], _Directory(folder, folder / name, vision.name).seeing)
    for path in gguf.split(folder / "split"):
        read = _Directory(folder, folder / "split", path.name).gguf
        yield Target(f"GGUF, {path.stem[2:]}", "gguf", [path.read_bytes()], read)
    plain_seed = [(plain / "model.safetensors").read_bytes()]
    yield Target("quantize", "safetensors", plain_seed, _Directory(folder, plain, "model.safetensors").quantize)
    read = _Directory(folder, plain, "config.json").checkpoint
    yield Target("checkpoint config", "json", [seed_of(plain / "config.json")], read)
    sharded = _sharded(plain, folder / "sharded")
    index = sharded / "model.safetensors.index.json"
    yield Target("checkpoint index", "json", [seed_of(index)], _Directory(folder, sharded, index.name).checkpoint)
    said = [{"quantization_config": each} for each in FOREIGN] + [each for _, each in METHODS.values()]
    config = json.loads(seed_of(plain / "config.json"))
    others = [json.dumps(config | each, separators=(",", ":")).encode() for each in said]
    for method in METHODS:
        home = write_quantised(method, plain, folder / method)
        for name, kind, more in (("config.json", "json", others), ("model.safetensors", "safetensors", [])):
            read = _Directory(folder, home, name).checkpoint
            yield Target(f"{method} {name.split('.')[0]}", kind, [seed_of(home / name), *more], read)
    yield from targets_of_written(folder, folder / "v1")


def _of_files(folder: Path) -> Iterator[Target]:
    """Files by themselves."""
    files = _vectors(".uqff")
    yield Target("blobs", "bytes", _vectors(".bin"), _blob)
    yield Target("framing", "safetensors", files, lambda data: parse_header(memoryview(data)))
    yield Target("containers", "safetensors", files, _Directory(folder, None, "m.uqff").layers)
    yield Target("recipes", "lines", list(RECIPES), _recipe)
    yield Target("names", "json", [b'{"0":"model.layers.0.mlp.up_proj","1":"lm_head"}'], _names)
    yield Target("names, lines", "lines", [b"0 lm_head # a\n1 model.layers.0.mlp.up_proj[0]\n"], _names)
    yield Target("sums", "lines", [SUMS], _Directory(folder, None, "SHA256SUMS").sums)
    yield Target("importance", "bytes", _importance(folder), _Directory(folder, None, "imatrix").importance)
    adapter = _adapter(folder / "adapter")
    for name, kind in (("adapter_config.json", "json"), ("adapter_model.safetensors", "safetensors")):
        read = _Directory(folder, adapter, name).adapter
        yield Target(name.split(".")[0].replace("_", " "), kind, [seed_of(adapter / name)], read)


def _of_running(folder: Path) -> Iterator[Target]:
    """What ``uqff run`` reads beside the weights: with ``transformers`` and ``tokenizers``, and Jinja in a process."""
    from uqff.models.template import render
    from uqff.parallel.text import Text

    model = folder / "v1"

    def text(home: Path) -> None:
        made = Text(home)
        made.decode(made.encode("t4 t5", raw=True)[:64])

    def template(data: bytes) -> None:
        render(data.decode("utf-8", "replace"), {"messages": [{"role": "user", "content": "a"}], "tools": None})

    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        place = _Directory(folder, model, name)

        def read(data: bytes, place: _Directory = place) -> None:
            place.path.write_bytes(data)
            text(place.home)

        yield Target(f"run, {name.split('.')[0]}", "json", [seed_of(model / name)], read)
    place = _Directory(folder, model, "config.json")

    def load(data: bytes) -> None:
        place.path.write_bytes(data)
        uqff.load_model(place.home)

    yield Target("run, config", "json", [seed_of(model / "config.json")], load)
    yield Target("run, templates", "lines", list(TEMPLATES), template)


def targets(folder: Path, only: str = "", *, light: bool = False) -> list[Target]:
    """Those whose name begins so; models to begin with are made in a folder.

    Args:
        folder: an empty one.
        only: the beginning of their names.
        light: leave out those that need ``transformers``.
    """
    found = [*_of_files(folder), *_of_models(folder), *([] if light else _of_running(folder))]
    return [each for each in found if each.name.startswith(only)]
