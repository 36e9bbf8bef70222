"""Tiny random checkpoints that mistral.rs loads, the same on every machine.

    python -m tools.tiny.models llama OUT --hidden-size 96 --weight-dtype BF16 --seed 3

writes `config.json`, `model.safetensors`, `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`.

Weights are sums of 16-bit integers taken from the raw PCG64 stream, whose values numpy guarantees, and multiplications:
no libm, no sampling algorithm that a numpy release may change. Each tensor is seeded by the model's seed and its own
name, so its values do not depend on which other tensors there are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

ARCHITECTURES = ("llama", "qwen2")
WEIGHT_DTYPES = ("F32", "F16", "BF16")
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
EDGE_ROWS = 12
"""Rows that `TinyModel.edge_rows` overwrites at the top of each weight."""


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """What a tiny checkpoint is made of; equal parameters make equal files, byte for byte.

    `outliers` is the share of weights multiplied by 32. `edge_rows` overwrites the first 12 rows of every projection
    with values that quantisers treat specially (see `edge_rows`). Attention uses `hidden_size // heads` as its head
    size, as mistral.rs does.
    """

    architecture: Literal["llama", "qwen2"] = "llama"
    hidden_size: int = 256
    intermediate_size: int = 64
    heads: int = 8
    kv_heads: int = 1
    layers: int = 1
    vocab_size: int = 64
    tied: bool = False
    weight_dtype: Literal["F32", "F16", "BF16"] = "F32"
    std: float = 0.02
    outliers: float = 0.0
    edge_rows: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture: expected one of {ARCHITECTURES}, got {self.architecture!r}")
        if self.weight_dtype not in WEIGHT_DTYPES:
            raise ValueError(f"weight_dtype: expected one of {WEIGHT_DTYPES}, got {self.weight_dtype!r}")
        if self.hidden_size % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError("hidden_size must be a multiple of 2 * heads, and heads of kv_heads")
        if self.vocab_size <= len(SPECIAL_TOKENS):
            raise ValueError(f"vocab_size: expected more than {len(SPECIAL_TOKENS)}, got {self.vocab_size}")

    @property
    def head_size(self) -> int:
        """Elements per attention head."""
        return self.hidden_size // self.heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names of the checkpoint's tensors and their shapes, `[out, in]` for weights, in the order of the model."""
        hidden, inner, kv = self.hidden_size, self.intermediate_size, self.kv_heads * self.head_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for index in range(self.layers):
            layer = f"model.layers.{index}"
            for name, out in (("q", hidden), ("k", kv), ("v", kv)):
                shapes[f"{layer}.self_attn.{name}_proj.weight"] = (out, hidden)
                if self.architecture == "qwen2":
                    shapes[f"{layer}.self_attn.{name}_proj.bias"] = (out,)
            shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
            shapes[f"{layer}.mlp.gate_proj.weight"] = (inner, hidden)
            shapes[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
            shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
            shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
            shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        shapes["model.norm.weight"] = (hidden,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    def layer_names(self) -> list[str]:
        """Names of the tracked weights in the order of mistral.rs' layer index (v0.6.0, `get_layers` of the model).

        A tied model has no `lm_head.weight`; its index 0 is the embedding.
        """
        names = ["model.embed_tokens" if self.tied else "lm_head"]
        for index in range(self.layers):
            names += [f"model.layers.{index}.self_attn.{name}_proj" for name in "qkvo"]
            names += [f"model.layers.{index}.mlp.{name}_proj" for name in ("gate", "up", "down")]
        return names

    def tensors(self) -> dict[str, Float32]:
        """The checkpoint's tensors in float32, already rounded to `weight_dtype`."""
        return {name: self._tensor(name, shape) for name, shape in self.shapes().items()}

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Float32:
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        values = random_normal(rng, shape) * np.float32(self.std)
        if name.endswith("norm.weight"):
            values = values + np.float32(1)
        elif name.endswith("bias"):
            values = values * np.float32(5)
        else:
            if self.outliers:
                draws = rng.bit_generator.random_raw(values.size).reshape(shape)
                values = np.where(draws < np.uint64(int(self.outliers * 2**64)), values * np.float32(32), values)
            if self.edge_rows and "_proj" in name:
                values[:EDGE_ROWS] = edge_rows(values[:EDGE_ROWS])
        return round_to(values, self.weight_dtype)

    def config(self) -> dict[str, Any]:
        """The fields of `config.json` that transformers writes and mistral.rs reads."""
        names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
        torch_dtypes = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        config: dict[str, Any] = {
            "architectures": [names.get(self.architecture)],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": 512,
            "model_type": self.architecture,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.tied,
            "torch_dtype": torch_dtypes[self.weight_dtype],
            "vocab_size": self.vocab_size,
        }
        if self.architecture == "qwen2":
            config |= {"sliding_window": 512, "use_sliding_window": False, "max_window_layers": self.layers}
        return config

    def tokenizer(self) -> dict[str, Any]:
        """A `tokenizer.json` of whole words: token `n` is the word `t<n>`, so a generated text spells its token ids."""
        vocab = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
        vocab |= {f"t{i}": i for i in range(len(SPECIAL_TOKENS), self.vocab_size)}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(SPECIAL_TOKENS)],
            "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]},
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        }

    def tokenizer_config(self) -> dict[str, Any]:
        """A `tokenizer_config.json` whose chat template passes the messages' text on unchanged."""
        template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        return {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "chat_template": template,
            "model_max_length": 512,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }

    def write(self, folder: Path) -> None:
        """Write the checkpoint's five files into `folder`, which is made if absent."""
        folder.mkdir(parents=True, exist_ok=True)
        documents = {
            "config.json": self.config(),
            "tokenizer.json": self.tokenizer(),
            "tokenizer_config.json": self.tokenizer_config(),
            "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2},
        }
        for name, document in documents.items():
            (folder / name).write_text(json.dumps(document, indent=2) + "\n")
        (folder / "model.safetensors").write_bytes(self.safetensors())

    def safetensors(self) -> bytes:
        """The bytes of `model.safetensors`; numpy has no BF16, hence the framing here (safetensors README, Format)."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        chunks: list[bytes] = []
        start = 0
        for name, values in self.tensors().items():
            chunk = to_bytes(values, self.weight_dtype)
            offsets = [start, start + len(chunk)]
            header[name] = {"dtype": self.weight_dtype, "shape": list(values.shape), "data_offsets": offsets}
            chunks.append(chunk)
            start += len(chunk)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + b"".join(chunks)

    def sha256(self) -> str:
        """Digest of `model.safetensors`."""
        return hashlib.sha256(self.safetensors()).hexdigest()


def random_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Float32:
    """About N(0, 1) within 4.9 standard deviations: sums of eight 16-bit integers of the raw stream (Irwin-Hall)."""
    raw = rng.bit_generator.random_raw(2 * int(np.prod(shape))).astype("<u8")
    sums = raw.view("<u2").reshape(-1, 8).astype(np.int64).sum(axis=1)
    variance = 8 * (65536**2 - 1) / 12
    centred = (2 * sums - 8 * 65535).astype(np.float64) * (0.5 / float(np.sqrt(variance)))
    normal: Float32 = centred.astype(np.float32).reshape(shape)
    return normal


def edge_rows(rows: Float32) -> Float32:
    """The first rows of a weight, replaced by the cases that quantisers treat specially; at most 12, all finite.

    0 zeros; 1 negative zeros; 2 one positive constant; 3 one negative constant; 4 constant per 32, of alternating sign;
    5 +-1; 6 positive only; 7 negative only; 8 so small that an f16 scale underflows; 9 in the thousands; 10 a single
    spike; 11 ramp with exact ties.
    """
    columns = np.arange(rows.shape[1])
    zeros = np.zeros(rows.shape[1], np.float32)
    cases = [
        zeros,
        -zeros,
        zeros + np.float32(0.25),
        zeros - np.float32(0.3),
        np.where(columns // 32 % 2 == 0, np.float32(0.125), np.float32(-0.0625)),
        np.where(columns % 2 == 0, np.float32(1), np.float32(-1)),
        np.abs(rows[6]),
        -np.abs(rows[7]),
        rows[8] * np.float32(1e-6),
        rows[9] * np.float32(5e4),
        np.where(columns == 37 % rows.shape[1], np.float32(-2), np.float32(0)),
        (columns % 32 - 16).astype(np.float32) * np.float32(0.5),
    ]
    return np.stack(cases)[: rows.shape[0]]


def round_to(values: Float32, dtype: str) -> Float32:
    """`values` rounded to the nearest, ties to even, of `dtype` (F32, F16 or BF16), still as float32."""
    if dtype == "F32":
        return values
    if dtype == "F16":
        return values.astype(np.float16).astype(np.float32)
    bits = values.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    widened: Float32 = (rounded & np.uint32(0xFFFF0000)).view(np.float32)
    return widened


def to_bytes(values: Float32, dtype: str) -> bytes:
    """The little-endian bytes of `values`, which must be exact in `dtype`."""
    if dtype == "F32":
        return values.astype("<f4").tobytes()
    if dtype == "F16":
        return values.astype("<f2").tobytes()
    high = np.ascontiguousarray(values).view(np.uint32) >> np.uint32(16)
    return bytes(high.astype("<u2").data)


@click.command()
@click.argument("architecture", type=click.Choice(ARCHITECTURES))
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--hidden-size", default=256, show_default=True)
@click.option("--intermediate-size", default=64, show_default=True)
@click.option("--heads", default=8, show_default=True)
@click.option("--kv-heads", default=1, show_default=True)
@click.option("--layers", default=1, show_default=True)
@click.option("--vocab-size", default=64, show_default=True)
@click.option("--tied/--untied", default=False, show_default=True, help="Use the embedding as lm_head.")
@click.option("--weight-dtype", type=click.Choice(WEIGHT_DTYPES), default="F32", show_default=True)
@click.option("--std", default=0.02, show_default=True, help="Standard deviation of the weights.")
@click.option("--outliers", default=0.0, show_default=True, help="Share of weights multiplied by 32.")
@click.option("--edge-rows/--no-edge-rows", default=False, show_default=True, help="Constant, tiny, huge, ... rows.")
@click.option("--seed", default=0, show_default=True)
def main(folder: Path, **parameters: Any) -> None:
    """Write a tiny checkpoint of ARCHITECTURE into FOLDER."""
    model = TinyModel(**parameters)
    model.write(folder)
    click.echo(f"{folder}: {len(model.shapes())} tensors, model.safetensors sha256 {model.sha256()}")


if __name__ == "__main__":
    main()
