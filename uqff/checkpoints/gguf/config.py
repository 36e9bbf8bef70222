"""``config.json`` from the metadata of a GGUF file, and back.

Everything that a loader needs is in the metadata or follows from the tensors.  Metadata of the model that is not known
here might change what it computes, so it is refused unless the model's own ``config.json`` is given, with which the
metadata is compared then.

float32 metadata becomes the shortest decimal that rounds to it: 9.99999974738e-06 is 1e-05 again.

Authority: llama.cpp, ``conversion/base.py`` (``set_gguf_parameters``) and ``gguf-py/gguf/constants.py``; mistral.rs,
``mistralrs-core/src/gguf/normal_config.rs``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from uqff.checkpoints.gguf.names import ROPE_FACTORS, GgufArchitecture, architecture_of_config
from uqff.checkpoints.gguf.rope import agree, llama3_factors, llama3_scaling, rope_scaling_of
from uqff.errors import FormatError, UnsupportedError, UqffError, located
from uqff.gguf.reader import GgufFile
from uqff.gguf.schema import Array, Value, ValueType

__all__ = ["active_window", "check_config", "config_of", "experts_of", "metadata_of"]

_INTEGERS: Final = (
    ValueType.U32,
    ValueType.I32,
    ValueType.U64,
    ValueType.I64,
    ValueType.U16,
    ValueType.I16,
    ValueType.U8,
    ValueType.I8,
)
_FLOATS: Final = (ValueType.F32, ValueType.F64)

_KNOWN: Final = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",
    "vocab_size",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
    "tensor_data_layout",
)
"""Metadata of a model that is read, or says nothing that matters."""

FLOAT32_MAX: Final = float(np.finfo(np.float32).max)

COMPARED: Final = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "tie_word_embeddings",
)
"""What a given configuration and the metadata must agree in."""


class _Metadata:
    """The metadata of a model's architecture."""

    def __init__(self, file: GgufFile, architecture: GgufArchitecture) -> None:
        self.file = file
        self.prefix = architecture.name
        self.numbers = tuple(architecture.numbers.values())

    def get(self, key: str, types: tuple[ValueType, ...]) -> Any:
        return self.file.get_value(f"{self.prefix}.{key}", *types)

    def integer(self, key: str, *, least: int = 1, default: int | None = None) -> int:
        """A count; of an array, the value that all its elements have."""
        value = self.get(key, (*_INTEGERS, ValueType.ARRAY))
        if isinstance(value, Array):
            values = set(value.values()) if value.type in _INTEGERS else set()
            if len(values) != 1:
                raise self.error("layers differ", key, "one number for all layers", sorted(values)[:5])
            value = values.pop()
        if value is None and default is not None:
            return default
        if value is None or not least <= value < 2**31:
            raise self.error("not a count", key, f"a number of at least {least}", "none" if value is None else value)
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, _FLOATS)
        if value is None and default is not None:
            return default
        with np.errstate(over="ignore", under="ignore"):  # float64 has numbers that float32 makes infinite, or zero
            rounded = np.float32(0 if value is None else value)
        if not np.isfinite(rounded) or rounded <= 0:
            raise self.error("not a number", key, "above 0, in float32", "none" if value is None else value)
        return float(str(rounded))

    def error(self, problem: str, key: str, expected: object, got: object) -> FormatError:
        path = str(self.file.paths[0])
        return FormatError(problem, file=path, field=f"{self.prefix}.{key}", expected=expected, got=got)

    def unknown(self) -> list[str]:
        known = {f"{self.prefix}.{key}" for key in (*_KNOWN, *self.numbers)}
        return [key for key in self.file.pairs if key.startswith(f"{self.prefix}.") and key not in known]


def experts_of(file: GgufFile) -> bool:
    """Whether the model of a file has experts."""
    name = file.get_value("general.architecture")
    return bool(file.get_value(f"{name}.expert_count", *_INTEGERS))


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
    if metadata.integer("expert_count", least=0, default=0) and not architecture.experts:
        problem, field = "experts of this architecture are not converted", f"{architecture.name}.expert_count"
        raise UnsupportedError(problem, file=str(file.paths[0]), field=field)
    hidden, heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    head_dim = metadata.integer("attention.key_length", default=hidden // heads or 1)
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.integer(key, default=head_dim) != head_dim:
            raise metadata.error("heads of several sizes", key, head_dim, metadata.integer(key))
    window = metadata.integer("attention.sliding_window", least=0, default=0)
    blocks = metadata.integer("block_count")
    config: dict[str, Any] = {
        "architectures": [_class_of(architecture, window, head_dim * heads != hidden)],
        "head_dim": head_dim,
        "hidden_act": architecture.activation,
        "hidden_size": hidden,
        "intermediate_size": metadata.integer("feed_forward_length"),
        "max_position_embeddings": metadata.integer("context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": blocks,
        "num_key_value_heads": metadata.integer("attention.head_count_kv", default=heads),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_scaling": None,
        "rope_theta": metadata.number("rope.freq_base", architecture.rope_default),
        "tie_word_embeddings": architecture.headless or "output.weight" not in file,
        "vocab_size": vocabulary,
    }
    config["model_type"] = config["architectures"][0].removesuffix("ForCausalLM").lower()
    if architecture.experts:
        config[architecture.expert_count] = metadata.integer("expert_count")
        config["num_experts_per_tok"] = metadata.integer("expert_used_count")
        size = metadata.integer("expert_feed_forward_length", default=config["intermediate_size"])
        config[architecture.expert_size] = size
    config |= architecture.fixed
    config |= {key: metadata.number(stored) for key, stored in architecture.numbers.items()}
    if architecture.name == "gemma2":
        config["query_pre_attn_scalar"] = _attention_scale(config)
    if config["model_type"] != "llama":
        config["sliding_window"] = window or None
    if architecture.name.startswith("qwen"):
        config |= {"use_sliding_window": False, "max_window_layers": blocks}
    if not architecture.biases:
        config["attention_bias"] = any(name.startswith("blk.") and name.endswith(".bias") for name in file)
    for token in ("bos", "eos"):
        number = file.get_value(f"tokenizer.ggml.{token}_token_id", *_INTEGERS)
        if number is not None:
            config[f"{token}_token_id"] = number
    with located(file=file.paths[0]) if strict else contextlib.suppress(UqffError):
        config["rope_scaling"] = _rope_scaling(metadata, config)
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


def _rope_scaling(metadata: _Metadata, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Only what mistral.rs can do, too: ``linear`` and ``llama3``, both for Llama only."""
    kind = metadata.get("rope.scaling.type", (ValueType.TEXT,))
    linear = metadata.get("rope.scale_linear", _FLOATS)
    factors = metadata.file.get(ROPE_FACTORS)
    if linear is not None and linear != 1 and kind is None:
        scaling: dict[str, Any] | None = {"rope_type": "linear", "factor": metadata.number("rope.scale_linear")}
    elif kind == "linear":
        scaling = {"rope_type": "linear", "factor": metadata.number("rope.scaling.factor")}
    elif kind in (None, "none"):
        scaling = None
    else:
        raise UnsupportedError(
            "rope scaling that is not converted; give the model's own configuration (--assets)",
            field=f"{metadata.prefix}.rope.scaling.type",
            expected="none or linear",
            got=kind,
        )
    if factors is not None:
        values = factors.float32().reshape(-1)
        scaling = llama3_scaling(values, config["rope_theta"], config["head_dim"])
    if scaling is not None and config["model_type"] != "llama":
        raise UnsupportedError(
            "rope scaling of another architecture than Llama; give the model's own configuration (--assets)",
            field=f"{metadata.prefix}.rope.scaling.type",
            got=scaling["rope_type"],
        )
    return scaling


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
        "tie_word_embeddings": False,
        "rope_theta": architecture.rope_default,
        **architecture.fixed,
    }
    of_experts = (architecture.expert_count, "num_experts_per_tok", architecture.expert_size)
    for key in (*COMPARED, *(of_experts if architecture.experts else ()), *architecture.fixed, *architecture.numbers):
        got = config.get(key)
        got = defaults.get(key) if got is None else got
        if isinstance(got, float) or isinstance(said[key], float):
            same = (
                isinstance(got, (int, float)) and abs(got) <= FLOAT32_MAX and np.float32(got) == np.float32(said[key])
            )
        else:
            same = type(got) is type(said[key]) and got == said[key]
        if not same:
            raise FormatError("not the file's model", file=path, field=key, expected=said[key], got=got)
    metadata = _Metadata(file, architecture)
    unknown = metadata.unknown()
    notes = [f"config.json has the last word on {', '.join(unknown[:5])}"] if unknown else []
    scaling, factors = rope_scaling_of(config), file.get(ROPE_FACTORS)
    kind = None if scaling is None else scaling.get("rope_type", scaling.get("type"))
    if factors is not None:
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


def _attention_scale(config: Mapping[str, Any]) -> int:
    """What llama.cpp scales queries of Gemma 2 by, whose metadata do not say it: of 27B, whose depth it knows that by,
    another number than of the others.

    Authority: llama.cpp, ``src/models/gemma2.cpp``, ``src/llama-model.cpp``.
    """
    if config["num_hidden_layers"] == 46:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _unsaid(config: Mapping[str, Any], architecture: GgufArchitecture) -> dict[str, Any]:
    """What llama.cpp takes for granted of every model of an architecture."""
    taken = dict(architecture.fixed)
    if architecture.name == "smollm3":
        taken["no_rope_layers"] = [int((block + 1) % 4 != 0) for block in range(config["num_hidden_layers"])]
    if architecture.name == "gemma2":
        taken["query_pre_attn_scalar"] = _attention_scale(config)
    return taken


def _window(config: Mapping[str, Any]) -> Any:
    """The sliding window of a model that has an active one."""
    return config.get("sliding_window") if config.get("use_sliding_window", True) else None


def active_window(config: Mapping[str, Any]) -> str | None:
    """What is to be said of a model with a sliding window, None of others: GGUF states it, and llama.cpp ignores it."""
    window = _window(config)
    if not window or architecture_of_config(config).windowed:
        return None
    return (
        f"the model has a sliding window of {window}, which llama.cpp does not apply to this architecture: "
        "texts longer than that are not computed alike"
    )


def metadata_of(config: Mapping[str, Any], architecture: GgufArchitecture, path: str) -> list[tuple[str, Value]]:
    """The metadata of a model, from its ``config.json``; the tokenizer's aside.

    Raises:
        FormatError: a number is missing or senseless.
        UnsupportedError: a rope scaling that the metadata cannot express.
    """
    prefix = architecture.name

    def count(key: str, default: int | None = None) -> Value:
        value = config.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**31:
            raise FormatError("not a count", file=path, field=key, expected="a number of at least 1", got=value)
        return Value(ValueType.U32, value)

    def number(key: str, value: Any) -> Value:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= FLOAT32_MAX:
            raise FormatError("not a number", file=path, field=key, expected="above 0", got=value)
        return Value(ValueType.F32, float(value))

    heads = count("num_attention_heads")
    head_dim = count("head_dim", count("hidden_size").value // heads.value)
    pairs = {
        "vocab_size": count("vocab_size"),
        "context_length": count("max_position_embeddings"),
        "embedding_length": count("hidden_size"),
        "block_count": count("num_hidden_layers"),
        "feed_forward_length": count("intermediate_size"),
        "rope.dimension_count": head_dim,
        "rope.freq_base": number("rope_theta", config.get("rope_theta") or architecture.rope_default),
        "attention.head_count": heads,
        "attention.head_count_kv": count("num_key_value_heads", heads.value),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": number("rms_norm_eps", config.get("rms_norm_eps")),
    }
    if architecture.experts:
        pairs["expert_count"] = count(architecture.expert_count)
        pairs["expert_used_count"] = count("num_experts_per_tok")
        if architecture.expert_size != "intermediate_size":
            pairs["expert_feed_forward_length"] = count(architecture.expert_size)
    for key, stored in architecture.numbers.items():
        pairs[stored] = number(key, config.get(key))
    for key, value in _unsaid(config, architecture).items():
        if config.get(key, value) != value:
            raise UnsupportedError("cannot be said in GGUF", file=path, field=key, expected=value, got=config[key])
    if _window(config):
        pairs["attention.sliding_window"] = count("sliding_window")
    scaling = rope_scaling_of(config)
    if scaling is not None:
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind == "linear":
            pairs["rope.scaling.type"] = Value(ValueType.TEXT, "linear")
            pairs["rope.scaling.factor"] = number("rope_scaling.factor", scaling.get("factor"))
        elif kind != "llama3" or prefix != "llama":
            raise UnsupportedError(
                "rope scaling that is not converted",
                file=path,
                field="rope_scaling.rope_type",
                expected="linear or llama3",
                got=kind,
            )
    return [("general.architecture", Value(ValueType.TEXT, prefix))] + [
        (f"{prefix}.{key}", value) for key, value in pairs.items()
    ]
