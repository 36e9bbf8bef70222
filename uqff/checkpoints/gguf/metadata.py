"""The metadata of a GGUF file from ``config.json``: the way back of :mod:`uqff.checkpoints.gguf.config`.

Authority: as there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from uqff.checkpoints.gguf.config import FLOAT32_MAX, SECTIONS
from uqff.checkpoints.gguf.names import GgufArchitecture, architecture_of_config, inner_size
from uqff.checkpoints.gguf.rope import longrope_attention, rope_scaling_of, yarn_numbers
from uqff.errors import FormatError, UnsupportedError, located
from uqff.gguf.schema import Array, Value, ValueType

__all__ = ["active_window", "metadata_of"]

AXES: Final = [11, 11, 10]
"""Of Qwen3.5, where its configuration does not say."""


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


def metadata_of(
    config: Mapping[str, Any], architecture: GgufArchitecture, path: str, *, absorbed: bool = False
) -> list[tuple[str, Value]]:
    """The metadata of a model, from its ``config.json``; the tokenizer's aside.

    Args:
        config: the configuration.
        architecture: of the model.
        path: of the configuration, for messages.
        absorbed: of DeepSeek's attention, whether its keys are transposed: :mod:`uqff.checkpoints.gguf.latent`.

    Raises:
        FormatError: a number is missing or senseless.
        UnsupportedError: a rope scaling that the metadata cannot express.
    """
    prefix = architecture.name

    def count(key: str, default: int | None = None, *, least: int = 1) -> Value:
        value = config.get(key)
        value = default if value is None else value
        if type(value) is not int or not least <= value < 2**31:
            expected = f"a number from {least} to {2**31 - 1}"
            raise FormatError("not a count", file=path, field=key, expected=expected, got=value)
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
        "feed_forward_length": Value(ValueType.U32, inner_size({**config, "intermediate_size": _inner(count)})),
        "rope.dimension_count": _rotated(config, architecture, head_dim.value, path),
        "rope.freq_base": number("rope_theta", config.get("rope_theta") or architecture.rope_default),
        "attention.head_count": heads,
        "attention.head_count_kv": count("num_key_value_heads", heads.value),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        architecture.epsilon[1]: number(architecture.epsilon[0], config.get(architecture.epsilon[0])),
    }
    if architecture.latent:
        pairs |= _latent(count, heads, absorbed=absorbed)
    if architecture.kinds:
        heads_of_layers = _heads_of_layers(config, architecture, pairs["attention.head_count_kv"].value, path)
        pairs["attention.head_count_kv"] = heads_of_layers
    if architecture.axes is not None:
        pairs[SECTIONS] = _axes(config, architecture.axes, path)
    if architecture.derived is not None:
        with located(file=path):
            pairs |= {key: Value(ValueType.U32, each) for key, each in architecture.derived.write(config).items()}
    if architecture.expert_count:
        pairs["expert_count"] = count(architecture.expert_count)
    if architecture.expert_size:
        pairs["expert_used_count"] = count("num_experts_per_tok")
        if architecture.expert_size != "intermediate_size":
            pairs["expert_feed_forward_length"] = count(architecture.expert_size)
    for key, stored in (*architecture.numbers.items(), *architecture.counts.items()):
        default = architecture.unless.get(key)
        value = config.get(key, default)
        if value is None and key in architecture.unless:
            continue
        if key in architecture.numbers:
            pairs[stored] = number(key, value)
        elif type(default) is bool:
            pairs[stored] = Value(ValueType.BOOL, _flag(key, value, path))
        else:
            pairs[stored] = count(key, default, least=int(key not in architecture.unless))
    for key, stored in architecture.listed.items():
        pairs[stored] = Value(ValueType.U32, _same_for_all(config, key, path))
    for key, value in architecture.stated.items():
        pairs[key] = Value(ValueType.BOOL if isinstance(value, bool) else ValueType.U32, value)
    for key, value in {**architecture.fixed, **architecture.implied(config)}.items():
        if config.get(key, value) != value:
            raise UnsupportedError("cannot be said in GGUF", file=path, field=key, expected=value, got=config[key])
    if _window(config):
        pairs["attention.sliding_window"] = count("sliding_window")
    scaling = rope_scaling_of(config)
    if scaling is not None:
        kind = scaling.get("rope_type", scaling.get("type"))
        if kind == "linear" and kind in architecture.scalings:
            pairs["rope.scaling.type"] = Value(ValueType.TEXT, "linear")
            pairs["rope.scaling.factor"] = number("rope_scaling.factor", scaling.get("factor"))
        elif kind == "longrope" and kind in architecture.scalings:
            pairs["rope.scaling.attn_factor"] = number("rope_scaling", longrope_attention(config))
        elif kind == "yarn" and kind in architecture.scalings:
            pairs["rope.scaling.type"] = Value(ValueType.TEXT, "yarn")
            with located(file=path):
                stated = yarn_numbers(scaling, architecture)
            pairs |= {key: number(f"rope_scaling.{key.rpartition('.')[2]}", value) for key, value in stated.items()}
            pairs["rope.scaling.original_context_length"] = _context(scaling, path)
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


def _latent(count: Callable[[str], Value], heads: Value, *, absorbed: bool) -> dict[str, Value]:
    """The sizes of DeepSeek's heads; with transposed keys, those of its cache, which has one head of latent states."""
    rotated, nope, size = (count(f"{each}_head_dim") for each in ("qk_rope", "qk_nope", "v"))
    whole, rank = Value(ValueType.U32, nope.value + rotated.value), count("kv_lora_rank")
    made = {"attention.head_count_kv": heads, "attention.key_length": whole, "attention.value_length": size}
    if absorbed:
        made = {
            "attention.head_count_kv": Value(ValueType.U32, 1),
            "attention.key_length": Value(ValueType.U32, rank.value + rotated.value),
            "attention.value_length": rank,
            "attention.key_length_mla": whole,
            "attention.value_length_mla": size,
        }
    return {"rope.dimension_count": rotated, **made}


def _context(scaling: Mapping[str, Any], path: str) -> Value:
    """The length of texts that a scaling begins with."""
    key = "original_max_position_embeddings"
    value = scaling.get(key)
    if type(value) is not int or not 0 < value < 2**31:
        raise FormatError("not a length", file=path, field=f"rope_scaling.{key}", expected="at least 1", got=value)
    return Value(ValueType.U32, value)


def _inner(count: Callable[[str], Value]) -> int:
    size: int = count("intermediate_size").value
    return size


def _rotated(config: Mapping[str, Any], architecture: GgufArchitecture, head_dim: int, path: str) -> Value:
    """How many numbers of a head are rotated."""
    factor = config.get("partial_rotary_factor")
    factor = architecture.rotated if factor is None else factor
    if architecture.rotated is None:
        return Value(ValueType.U32, head_dim)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor <= 1:
        raise FormatError("not a part", file=path, field="partial_rotary_factor", expected="from 0 to 1", got=factor)
    return Value(ValueType.U32, int(head_dim * factor))


def _heads_of_layers(config: Mapping[str, Any], architecture: GgufArchitecture, heads: int, path: str) -> Value:
    """The heads of keys and values of each layer, 0 where there are none."""
    types = config.get("layer_types")
    if not isinstance(types, list) or len(types) != config["num_hidden_layers"]:
        raise FormatError("not the kinds of the layers", file=path, field="layer_types", got=types)
    values = [0 if each == architecture.kinds[1] else heads for each in types]
    return Value(ValueType.ARRAY, Array.of(ValueType.I32, values))


def _axes(config: Mapping[str, Any], key: str, path: str) -> Value:
    """How many pairs of numbers turn with the position along each axis, and a fourth number."""
    stated = config.get(key) if key else None
    sections = stated.get("mrope_section", AXES) if isinstance(stated, Mapping) else AXES
    if not isinstance(sections, list) or len(sections) != 3 or any(type(x) is not int or x < 0 for x in sections):
        raise FormatError("not the axes of rotary positions", file=path, field=f"{key}.mrope_section", got=sections)
    return Value(ValueType.ARRAY, Array.of(ValueType.I32, [*sections, 0]))


def _flag(key: str, value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise FormatError("not a flag", file=path, field=key, expected="true or false", got=value)
    return value


def _same_for_all(config: Mapping[str, Any], key: str, path: str) -> int:
    """The number that a list has for each layer."""
    values = config.get(key)
    first = values[0] if isinstance(values, list) and values else values
    if type(first) is not int or not 0 < first < 2**31 or (isinstance(values, list) and set(values) != {first}):
        raise FormatError("not a count", file=path, field=key, expected="one number for all layers", got=values)
    return first
