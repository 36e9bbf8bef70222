"""Small random model directories of either generation: configurations, layers of any bits, residuals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

import uqff
from uqff import Layer, QuantizedTensor
from uqff.codes import Version
from uqff.container.plan import plan_files
from uqff.container.shards import shard_names
from uqff.container.writer import LayerWriter
from uqff.models.architectures import LayerName, entry_names, layer_names
from uqff.models.shapes import expected_shape
from uqff.quantization.bias import cast_bias
from uqff.quantization.types import meta_weight

__all__ = [
    "CONFIGS",
    "STACKABLE",
    "SmallModel",
    "config_of",
    "entries_of",
    "files_of",
    "llama",
    "random_record",
    "residual_of",
    "small_models",
    "write_v0",
    "write_v1",
]

NUMBERS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "vocab_size": 32,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Phi3": {},
    "Gemma": {},
    "Mixtral": {"num_local_experts": 3},
    "Qwen3Moe": {"num_experts": 2, "mlp_only_layers": [1]},
    "Gemma3": {},
}
"""What each architecture's configuration has besides the numbers."""

STACKABLE = ("q4_0", "q8_0", "mxfp4", "unquant")
"""Types of which 1.2 has stacks of any random bits, and that fit all shapes of :data:`NUMBERS`."""
KINDS = (*STACKABLE, "hqq4", "hqq8", "fp8", "f8q8")


def config_of(architecture: str, **changes: Any) -> dict[str, Any]:
    """The ``config.json`` of an architecture; Gemma 3 is the one with vision."""
    numbers = NUMBERS | CONFIGS[architecture] | changes
    if architecture == "Gemma3":
        towers: dict[str, Any] = {"text_config": numbers, "vision_config": {"num_hidden_layers": 0}}
        return {"architectures": ["Gemma3ForConditionalGeneration"], **towers}
    return {"architectures": [f"{architecture}ForCausalLM"], **numbers}


def random_record(kind: str, shape: tuple[int, ...], seed: int) -> QuantizedTensor:
    """A record of a type and shape, with any bits."""
    generator = torch.Generator().manual_seed(seed)
    record = meta_weight(kind, shape, torch.bfloat16)
    parts = {
        name: torch.randint(0, 256, (max(part.nbytes, 1),), dtype=torch.uint8, generator=generator)
        .view(part.dtype.torch)
        .reshape(part.shape)
        for name, part in record.parts.items()
    }
    return record.replaced(**parts)


@dataclasses.dataclass(frozen=True)
class SmallModel:
    """A configuration, and of each layer (by its path, all experts of a projection having one) type and bias."""

    config: dict[str, Any]
    kinds: Mapping[str, str]
    biased: bool
    seed: int

    def layer(self, name: LayerName) -> Layer:
        """A layer of the model."""
        kind = self.kinds.get(name.key, "q8_0")
        shape = expected_shape(self.config, name)
        assert shape is not None
        weight = random_record(kind, tuple(int(size or 0) for size in shape), self.seed + name.index)
        if not self.biased or ".self_attn." not in name.key:
            return Layer(weight)
        bias = torch.full(weight.shape[:1], 0.5)
        return Layer(weight, cast_bias(bias, weight, torch.bfloat16, version=(0, 2, 0), engine_biases=True))

    def residual(self, *, embedding: bool) -> dict[str, torch.Tensor]:
        """The tensors that are no layers."""
        names = layer_names(self.config)
        prefix = names[0].module.removesuffix("lm_head")
        blocks = sorted({name.block for name in names if name.block is not None})
        tensors = {f"{prefix}model.layers.{block}.input_layernorm.weight": torch.ones(64) for block in blocks}
        tensors |= {"vision_tower.encoder.layers.7.norm.weight": torch.ones(3)} if prefix else {}
        if embedding:
            tensors[f"{prefix}model.embed_tokens.weight"] = torch.full((32, 64), 0.25)
        return {name: tensor.bfloat16() for name, tensor in tensors.items()}


@st.composite
def small_models(draw: st.DrawFn) -> SmallModel:
    """Any architecture, tied or not, a type for each layer, with biases or without."""
    architecture = draw(st.sampled_from(sorted(CONFIGS)))
    config = config_of(
        architecture,
        num_hidden_layers=draw(st.integers(1, 2)),
        tie_word_embeddings=draw(st.booleans()),
    )
    kinds = {}
    for name in [*layer_names(config), *(part for entry in entry_names(config, (1, 2, 0)) for part in entry.parts)]:
        if name.key not in kinds:
            kinds[name.key] = draw(st.sampled_from(STACKABLE if name.stacked else KINDS))
    return SmallModel(config, kinds, draw(st.booleans()), draw(st.integers(0, 2**20)))


def write_v0(
    model: SmallModel,
    folder: Path,
    *,
    version: tuple[int, int, int] = (0, 2, 0),
    versions: Mapping[str, Version] | None = None,
    shard_bytes: int = 10 * 2**30,
) -> dict[str, Layer]:
    """Write a pre-1.0 directory; gives its layers."""
    folder.mkdir()
    layers = {str(name.index): model.layer(name) for name in layer_names(model.config)}
    plan = plan_files(layers, version, shard_bytes, versions=versions)
    with LayerWriter(plan, shard_names(folder, "q8_0", len(plan.shards))) as files:
        for key, layer in layers.items():
            files.write(key, layer)
        files.finish()
    _surround(model, folder, embedding=True)
    return layers


def write_v1(model: SmallModel, folder: Path, version: tuple[int, int, int] = (1, 2, 0)) -> dict[str, Layer]:
    """Write a 1.x directory, the embedding a layer from 1.2 on; gives its layers."""
    from uqff.families.stacking import stack

    folder.mkdir()
    layers: dict[str, Layer] = {}
    for entry in entry_names(model.config, version):
        parts = [model.layer(part) for part in entry.parts]
        if entry.is_stacked:
            layers[entry.key] = Layer(stack([part.weight for part in parts]))
        else:
            layers[entry.key] = parts[0]
    uqff.save(layers, folder / "q8_0-0.uqff", version=version)
    _surround(model, folder, embedding=version < (1, 2, 0))
    return layers


def _surround(model: SmallModel, folder: Path, *, embedding: bool) -> None:
    save_file(model.residual(embedding=embedding), folder / "residual.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config))
    (folder / "tokenizer.json").write_text("{}")


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents of the files of a directory, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def entries_of(folder: Path) -> dict[str, dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """All entries of a 1.x model, by key and suffix."""
    with uqff.open(folder) as file:
        return {
            key: {suffix: (e.dtype, e.shape, bytes(e.data)) for suffix, e in file.entries(key).items()} for key in file
        }


def residual_of(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    """The tensors of a residual."""
    with uqff.open(folder) as file:
        return {
            name: (t.dtype, tuple(t.shape), t.contiguous().view(torch.uint8).numpy().tobytes())
            for name, t in file.residual.items()
        }


def llama(**changes: Any) -> SmallModel:
    """A Llama of one layer, 8 tensors of q8_0."""
    return dataclasses.replace(SmallModel(config_of("Llama", num_hidden_layers=1), {}, False, 7), **changes)
