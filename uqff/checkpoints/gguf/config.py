"""``config.json`` from the metadata of a GGUF file; the way back is :mod:`uqff.checkpoints.gguf.metadata`.

Everything that a loader needs is in the metadata or follows from the tensors.  Metadata of the model that is not known
here might change what it computes, so it is refused unless the model's own ``config.json`` is given, with which the
metadata is compared then.

float32 metadata becomes the shortest decimal that rounds to it: 9.99999974738e-06 is 1e-05 again.

Authority: llama.cpp, ``conversion/base.py`` (``set_gguf_parameters``) and ``gguf-py/gguf/constants.py``; mistral.rs,
``mistralrs-core/src/gguf/normal_config.rs``.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from uqff.checkpoints.gguf.names import ROPE_FACTORS, GgufArchitecture, architecture_of_name, inner_size
from uqff.checkpoints.gguf.pairs import FLOATS, INTEGERS, Pairs
from uqff.checkpoints.gguf.rope import (
    LOG_MULTIPLIER,
    LONGROPE_SCALES,
    TEMPERATURE,
    TEMPERED,
    YARN,
    agree,
    llama3_factors,
    llama3_scaling,
    longrope_agrees,
    longrope_apart,
    longrope_scaling,
    rope_scaling_of,
    yarn_numbers,
    yarn_scaling,
)
from uqff.errors import FormatError, UnsupportedError, UqffError, located
from uqff.gguf.reader import GgufFile
from uqff.gguf.schema import Array, ValueType
from uqff.models.architectures import is_tied_model

__all__ = ["FLOAT32_MAX", "SECTIONS", "architecture_of_file", "check_config", "config_of"]

_KNOWN: Final = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.key_length_mla",
    "attention.value_length_mla",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.finetuned",
    "vocab_size",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
    "nextn_predict_layers",
    "tensor_data_layout",
)
"""Metadata of a model that is read, or says nothing that matters."""

SECTIONS: Final = "rope.dimension_sections"
"""Of rotary positions with several axes."""

INTERVAL: Final = "full_attention_interval"
"""After how many layers of linear attention there is one of full attention, in a configuration."""
RECURRENT: Final = "attention.recurrent_layers"
"""The same of newer files, as a flag of each layer."""

FLOAT32_MAX: Final = float(np.finfo(np.float32).max)

BIAS_OF_ATTENTION: Final = re.compile(r"blk\.[0-9]+\.attn_(q|k|v|output)\.bias")

COMPARED: Final = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "head_dim",
    "rope_theta",
    "tie_word_embeddings",
)
"""What a given configuration and the metadata must agree in."""


class _Metadata(Pairs):
    """The metadata of a model's architecture."""

    def __init__(self, file: GgufFile, architecture: GgufArchitecture) -> None:
        super().__init__(file, architecture.name)
        stated = (architecture.numbers, architecture.counts, architecture.listed)
        yarn = [f"rope.scaling.{key}" for key, _ in YARN.values()] if "yarn" in architecture.scalings else []
        yarn += [f"rope.scaling.{LOG_MULTIPLIER}"] if architecture.latent else []
        yarn += TEMPERED.values() if architecture.tempered else []
        yarn += [] if architecture.derived is None else architecture.derived.stored
        own = (key for each in stated for key in each.values())
        axes = [] if architecture.axes is None else [SECTIONS]
        axes += [RECURRENT] if INTERVAL in architecture.counts else []
        self.own = (architecture.epsilon[1], *architecture.stated, *own, *yarn, *axes)

    def decoder_blocks(self) -> int:
        """How many decoder layers there are, without those that predict further tokens."""
        return self.blocks() - self.integer("nextn_predict_layers", least=0, default=0)

    def unknown(self) -> list[str]:
        known = {f"{self.prefix}.{key}" for key in (*_KNOWN, *self.own)}
        return [key for key in self.file.pairs if key.startswith(f"{self.prefix}.") and key not in known]


def architecture_of_file(file: GgufFile) -> GgufArchitecture:
    """The architecture of a file's model.

    Raises:
        UnsupportedError: see :func:`uqff.checkpoints.gguf.names.architecture_of_name`.
    """
    name = file.get_value("general.architecture")
    experts, gating = (file.get_value(f"{name}.{key}", *INTEGERS) for key in ("expert_count", "expert_gating_func"))
    return architecture_of_name(name, experts=bool(experts), gating=gating)


def config_of(file: GgufFile, architecture: GgufArchitecture, *, strict: bool = True) -> dict[str, Any]:
    """The ``config.json`` of a GGUF file's model.

    Args:
        file: the file.
        architecture: of its model.
        strict: refuse what a configuration cannot be made of exactly. If not, it is left out, because the model's own
            configuration will be taken and this one is for comparison.

    Raises:
        FormatError: metadata is missing or senseless.
        UnsupportedError: the model has something that the architecture's loader could not be told of.
    """
    metadata = _Metadata(file, architecture)
    embedding = file.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        got = "no such tensor" if embedding is None else list(embedding.shape)
        raise FormatError(
            "no embedding", file=str(file.paths[0]), field="token_embd.weight", expected="a matrix", got=got
        )
    vocabulary = embedding.shape[0]
    if metadata.integer("vocab_size", default=vocabulary) != vocabulary:
        raise metadata.error("other size of the vocabulary", "vocab_size", vocabulary, metadata.integer("vocab_size"))
    if metadata.integer("expert_count", least=0, default=0) and not architecture.expert_count:
        problem, field = "experts of this architecture are not converted", f"{architecture.name}.expert_count"
        raise UnsupportedError(problem, file=str(file.paths[0]), field=field)
    hidden, heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    head_dim = hidden // heads or 1
    if not architecture.latent:
        head_dim = metadata.integer("attention.key_length", default=head_dim)
    if not architecture.latent and metadata.integer("attention.value_length", default=head_dim) != head_dim:
        raise metadata.error(
            "heads of several sizes", "attention.value_length", head_dim, metadata.integer("attention.value_length")
        )
    window = metadata.integer("attention.sliding_window", least=0, default=0)
    blocks = metadata.decoder_blocks()
    config: dict[str, Any] = {
        "architectures": [_class_of(architecture, window, not architecture.latent and head_dim * heads != hidden)],
        "head_dim": head_dim,
        "hidden_act": architecture.activation,
        "hidden_size": hidden,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "max_position_embeddings": metadata.integer("context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": blocks,
        architecture.epsilon[0]: metadata.number(architecture.epsilon[1]),
        "rope_scaling": None,
        "rope_theta": metadata.number("rope.freq_base", architecture.rope_default),
        "tie_word_embeddings": architecture.headless or "output.weight" not in file,
        "vocab_size": vocabulary,
    }
    config["model_type"] = config["architectures"][0].removesuffix("ForCausalLM").lower()
    config |= _heads_of_layers(metadata, architecture, heads, blocks)
    config |= _latent(metadata) if architecture.latent else _rotated(metadata, architecture, head_dim)
    if architecture.expert_count:
        config[architecture.expert_count] = metadata.integer("expert_count")
    if architecture.expert_size:
        config["num_experts_per_tok"] = metadata.integer("expert_used_count")
        size = metadata.integer("expert_feed_forward_length", default=config["intermediate_size"])
        config[architecture.expert_size] = size
    config |= {**architecture.fixed, **architecture.written, **_stated(metadata, architecture, blocks)}
    config |= {key: name in file for key, name in architecture.told_by.items()}
    if architecture.derived is not None:
        said = {key: metadata.integer(key) for key in architecture.derived.stored}
        with located(file=file.paths[0]):
            config |= architecture.derived.read(said, config)
    if architecture.axes is not None:
        config |= _axes(metadata, architecture, config)
    config |= architecture.implied(config)
    flags = metadata.get(RECURRENT, (ValueType.ARRAY,)) if INTERVAL in architecture.counts else None
    if flags is not None:
        kinds = {True: "linear_attention", False: "full_attention"}
        values = flags.values(blocks) if flags.type is ValueType.BOOL else []
        if len(values) != blocks:
            raise metadata.error("not the kinds of the layers", RECURRENT, f"{blocks} flags", len(values))
        config["layer_types"] = [kinds[value] for value in values]
    if architecture.latent:
        config |= {"head_dim": config["qk_rope_head_dim"], "num_key_value_heads": heads}
    if not architecture.own_head_size:
        if head_dim * heads != hidden:
            raise metadata.error("heads of another size", "attention.key_length", hidden // heads, head_dim)
        del config["head_dim"]
    if config["model_type"] != "llama":
        config["sliding_window"] = window or None
    if architecture.needs_window and not window:
        raise metadata.error("no sliding window", "attention.sliding_window", "a number of at least 1", "none")
    if architecture.name.startswith("qwen"):
        config |= {"use_sliding_window": False, "max_window_layers": blocks}
    if not architecture.biases:
        config["attention_bias"] = any(BIAS_OF_ATTENTION.fullmatch(name) is not None for name in file)
    for token, stored in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        number = file.get_value(f"tokenizer.ggml.{stored}_token_id", *INTEGERS)
        if number is not None:
            config[f"{token}_token_id"] = number
    with located(file=file.paths[0]) if strict else contextlib.suppress(UqffError):
        config["rope_scaling"] = _rope_scaling(metadata, architecture, config)
        for key, expected in architecture.stated.items():
            said = metadata.get(key, (ValueType.BOOL,) if isinstance(expected, bool) else INTEGERS)
            if said not in (None, expected):
                what = "way to choose experts" if key.startswith("expert") else "model of this architecture"
                raise UnsupportedError(
                    f"another {what}; give the model's own configuration (--assets)",
                    field=f"{architecture.name}.{key}",
                    expected=expected,
                    got=said,
                )
        if unknown := metadata.unknown():
            raise UnsupportedError(
                "metadata that is not known here; give the model's own configuration (--assets)",
                field=unknown[0],
                got=", ".join(unknown[:5]),
            )
        if window and architecture.name.startswith("qwen"):
            raise UnsupportedError(
                "which layers have a sliding window is not said; give the model's own configuration (--assets)",
                field=f"{architecture.name}.attention.sliding_window",
                got=window,
            )
    return dict(sorted(config.items()))


def _class_of(architecture: GgufArchitecture, window: int, own_head_dim: bool) -> str:
    """Llama and Mistral compute alike, but mistral.rs gives only the latter a window and a head size of its own."""
    return architecture.classes[-1] if window or own_head_dim else architecture.classes[0]


def _heads_of_layers(metadata: _Metadata, architecture: GgufArchitecture, heads: int, blocks: int) -> dict[str, Any]:
    """The heads of keys and values, and which layers have any, where not all do: of the others, their number is 0."""
    key = "attention.head_count_kv"
    stored = metadata.get(key, (*INTEGERS, ValueType.ARRAY))
    if not architecture.kinds or not isinstance(stored, Array):
        types = {"layer_types": [architecture.kinds[0]] * blocks} if architecture.kinds else {}
        return {"num_key_value_heads": metadata.integer(key, default=heads), **types}
    values = stored.values() if stored.type in INTEGERS else []
    found = {value for value in values if value}
    if len(values) != blocks or len(found) != 1 or min(values) < 0:
        raise metadata.error("not the heads of the layers", key, f"{blocks} numbers, 0 or one other", values[:5])
    types = {"layer_types": [architecture.kinds[not value] for value in values]}
    return {"num_key_value_heads": int(found.pop()), **types}


def _latent(metadata: _Metadata) -> dict[str, Any]:
    """The sizes of DeepSeek's heads; of the form that keeps the latent state, stated apart from those of its cache."""
    rotated = metadata.integer("rope.dimension_count")
    key = metadata.integer("attention.key_length_mla", default=metadata.integer("attention.key_length"))
    value = metadata.integer("attention.value_length_mla", default=metadata.integer("attention.value_length"))
    if key <= rotated:
        raise metadata.error("not a size of heads", "attention.key_length", f"above {rotated}", key)
    return {"qk_rope_head_dim": rotated, "qk_nope_head_dim": key - rotated, "v_head_dim": value}


def _rotated(metadata: _Metadata, architecture: GgufArchitecture, head_dim: int) -> dict[str, Any]:
    """How much of a head is rotated: all of it, but of some architectures."""
    key = "rope.dimension_count"
    rotated = metadata.integer(key, default=head_dim)
    if architecture.rotated is None:
        if rotated != head_dim:
            raise metadata.error("heads of several sizes", key, head_dim, rotated)
        return {}
    if rotated > head_dim or int(head_dim * (rotated / head_dim)) != rotated:
        raise metadata.error("not a part of a head", key, f"at most {head_dim}", rotated)
    return {"partial_rotary_factor": rotated / head_dim}


def _axes(metadata: _Metadata, architecture: GgufArchitecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """How many pairs of numbers turn with the position along each axis; of a text all axes say the same."""
    stored = metadata.get(SECTIONS, (ValueType.ARRAY,))
    sections = stored.values() if isinstance(stored, Array) and stored.type in INTEGERS else []
    if len(sections) != 4 or min(sections) < 0 or sections[3]:
        raise metadata.error("not the axes of rotary positions", SECTIONS, "3 numbers and a 0", sections[:5] or "none")
    if not architecture.axes:
        return {}
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"], "mrope_section": sections[:3]}
    return {architecture.axes: {**rope, "partial_rotary_factor": config["partial_rotary_factor"]}}


def _stated(metadata: _Metadata, architecture: GgufArchitecture, blocks: int) -> dict[str, Any]:
    """What else the metadata says of an architecture."""
    made: dict[str, Any] = {}
    for key, stored in (*architecture.numbers.items(), *architecture.counts.items()):
        if key in architecture.unless and f"{metadata.prefix}.{stored}" not in metadata.file.pairs:
            made[key] = architecture.unless[key]
        elif key in architecture.numbers:
            made[key] = metadata.number(stored)
        elif type(architecture.unless.get(key)) is bool:
            made[key] = metadata.flag(stored)
        else:
            made[key] = metadata.integer(stored, least=int(key not in architecture.unless))
    return {**made, **{key: [metadata.integer(stored)] * blocks for key, stored in architecture.listed.items()}}


def _rope_scaling(
    metadata: _Metadata, architecture: GgufArchitecture, config: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Only what mistral.rs can do, too: ``linear`` and ``llama3`` of Llama, and what others declare."""
    kind = metadata.get("rope.scaling.type", (ValueType.TEXT,))
    linear = metadata.get("rope.scale_linear", FLOATS)
    factors = metadata.file.get(ROPE_FACTORS)
    if architecture.tempered and kind != "yarn" and metadata.get(TEMPERATURE, FLOATS):
        raise metadata.error(
            "queries are scaled by a length that is not there", TEMPERATURE, "rope.scaling.type yarn", kind
        )
    scaling: dict[str, Any] | None = None
    if linear is not None and linear != 1 and kind is None:
        scaling = {"rope_type": "linear", "factor": metadata.number("rope.scale_linear")}
    elif kind == "linear":
        scaling = {"rope_type": "linear", "factor": metadata.number("rope.scaling.factor")}
    elif kind == "yarn" and kind in architecture.scalings:
        context = metadata.integer("rope.scaling.original_context_length")
        scaling = {**yarn_scaling(metadata.number, architecture), "original_max_position_embeddings": context}
    elif kind not in (None, "none"):
        raise UnsupportedError(
            "rope scaling that is not converted; give the model's own configuration (--assets)",
            field=f"{metadata.prefix}.rope.scaling.type",
            expected="none or linear",
            got=kind,
        )
    if factors is not None:
        values = factors.float32().reshape(-1)
        scaling = llama3_scaling(values, config["rope_theta"], config["head_dim"])
    if "longrope" in architecture.scalings:
        scaling = longrope_scaling(metadata.file) or scaling
        attention = metadata.get("rope.scaling.attn_factor", FLOATS)
        agrees = scaling is not None and longrope_agrees(attention, config)
        if scaling is not None and architecture.mscales and attention is not None and not agrees:
            scaling = {**scaling, **dict.fromkeys(LONGROPE_SCALES, metadata.number("rope.scaling.attn_factor"))}
        elif scaling is not None and (architecture.mscales or not agrees):
            raise UnsupportedError(
                "what longrope multiplies by is not in the file, of which llama.cpp's converter writes what follows "
                "from the lengths; give the model's own configuration (--assets)"
                if architecture.mscales
                else "another factor of attention than follows from the lengths; "
                "give the model's own configuration (--assets)",
                field=f"{metadata.prefix}.rope.scaling.attn_factor",
                got=attention,
            )
    kinds = () if architecture.name == "llama" and config["model_type"] != "llama" else architecture.scalings
    if scaling is not None and scaling.get("rope_type", scaling.get("type")) not in kinds:
        raise UnsupportedError(
            "rope scaling of another architecture than Llama; give the model's own configuration (--assets)",
            field=f"{metadata.prefix}.rope.scaling.type",
            got=scaling["rope_type"],
        )
    return scaling


def _same_yarn(one: Mapping[str, Any], other: Mapping[str, Any], architecture: GgufArchitecture) -> bool:
    """Whether two ``yarn`` scalings are the same numbers, in float32."""
    key = "original_max_position_embeddings"
    numbers = [[np.float32(x or 0) for x in yarn_numbers(each, architecture).values()] for each in (one, other)]
    return numbers[0] == numbers[1] and one.get(key) == other.get(key)


def check_config(config: Mapping[str, Any], file: GgufFile, architecture: GgufArchitecture, path: str) -> list[str]:
    """Compare a model's own configuration with a GGUF file.

    Args:
        config: the configuration.
        file: the GGUF file.
        architecture: of the file's model.
        path: of the configuration, for messages.

    Returns:
        What could not be compared, in sentences.

    Raises:
        FormatError: they disagree; ``field``, ``expected`` (the file's) and ``got`` (the configuration's) say in what.
    """
    said = config_of(file, architecture, strict=False)
    defaults = {
        "num_key_value_heads": said["num_attention_heads"],
        "head_dim": said["hidden_size"] // said["num_attention_heads"],
        "tie_word_embeddings": is_tied_model(config),
        "rope_theta": architecture.rope_default,
        "partial_rotary_factor": architecture.rotated,
        **architecture.fixed,
        **architecture.unless,
    }
    of_experts = (architecture.expert_count, "num_experts_per_tok", architecture.expert_size)
    compared = dict.fromkeys((*COMPARED, *architecture.stated_keys, *(of_experts if architecture.expert_size else ())))
    if architecture.latent:  # a configuration may have another head_dim there, or none
        compared |= dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
        del compared["head_dim"]
    for key in compared:
        if key not in said:
            continue
        got = inner_size(config) if key == "intermediate_size" else config.get(key)
        got = defaults.get(key) if got is None else got
        if isinstance(got, float) or isinstance(said[key], float):
            same = False
            if isinstance(got, (int, float)) and isinstance(said[key], (int, float)):
                same = bool(abs(got) <= FLOAT32_MAX and np.float32(got) == np.float32(said[key]))
        else:
            same = type(got) is type(said[key]) and got == said[key]
        if not same:
            raise FormatError("not the file's model", file=path, field=key, expected=said[key], got=got)
    metadata = _Metadata(file, architecture)
    unknown = metadata.unknown()
    notes = [f"config.json has the last word on {', '.join(unknown[:5])}"] if unknown else []
    scaling, factors = rope_scaling_of(config), file.get(ROPE_FACTORS)
    kind = None if scaling is None else scaling.get("rope_type", scaling.get("type"))
    if "longrope" in architecture.scalings:
        scaling, scales = longrope_apart(scaling)
        same = scaling == longrope_scaling(file) and architecture.mscales >= bool(scales)
        if scales:
            notes.append(f"config.json has the last word on {' and '.join(scales)}")
    elif kind == "yarn" and said["rope_scaling"] is not None:
        same = scaling is not None and _same_yarn(scaling, said["rope_scaling"], architecture)
    elif factors is not None:
        values = factors.float32().reshape(-1)
        same = scaling is not None and agree(values, llama3_factors(scaling, said["rope_theta"], said["head_dim"]))
    else:
        stored = metadata.get("rope.scaling.type", (ValueType.TEXT,))
        same = stored in (None, "none", kind)
        if same and stored != kind and kind is not None:
            notes.append(f"the rope scaling of config.json ({kind}) is not in the GGUF file")
    if not same:
        raise FormatError("not the file's rope scaling", file=path, field="rope_scaling", got=scaling)
    return notes
