"""The ``llama3``, ``longrope`` and ``yarn`` rope scalings: as numbers of a configuration, and as tensors or metadata of
a GGUF file.

Authority: llama.cpp, ``conversion/llama.py`` and ``conversion/phi.py`` (``generate_extra_tensors``); transformers,
``modeling_rope_utils.py`` (``_compute_llama3_parameters``, ``_compute_longrope_parameters``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.checkpoints.gguf.names import LONG_FACTORS, SHORT_FACTORS, GgufArchitecture
from uqff.errors import FormatError, UnsupportedError
from uqff.gguf.reader import GgufFile

__all__ = [
    "LOG_MULTIPLIER",
    "LONGROPE_SCALES",
    "YARN",
    "Factors",
    "agree",
    "llama3_factors",
    "llama3_scaling",
    "longrope_agrees",
    "longrope_apart",
    "longrope_attention",
    "longrope_factors",
    "longrope_scaling",
    "rope_scaling_of",
    "yarn_numbers",
    "yarn_scaling",
]

Factors: TypeAlias = npt.NDArray[np.float32]

LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The numbers of all models that Meta published (3.1 to 3.3); ``factor`` differs."""

LLAMA4: Final = {**LLAMA3, "high_freq_factor": 1.0}
"""Of Llama 4, which has nothing between stretched frequencies and those that are not."""

YARN: Final = {
    "beta_fast": ("yarn_beta_fast", 32.0),
    "beta_slow": ("yarn_beta_slow", 1.0),
}
"""Numbers of a ``yarn`` scaling beside its factor and context: keys in the metadata, and what they are without."""

LOG_MULTIPLIER: Final = "yarn_log_multiplier"
MSCALES: Final = ("mscale", "mscale_all_dim")
"""Of DeepSeek: ten times that key, llama.cpp takes one for both."""

TEMPERATURE: Final = "attention.temperature_scale"
TEMPERED: Final = {"mscale_all_dim": f"rope.scaling.{LOG_MULTIPLIER}", "llama_4_scaling_beta": TEMPERATURE}
"""What a ``yarn`` scaling of Ministral 3 says beside, and the keys of it."""

LONGROPE_SCALES: Final = ("short_mscale", "long_mscale")
"""Of Phi-3.5-MoE: what ``longrope`` multiplies queries and keys by, of texts of the original length and longer ones."""

IGNORED: Final = ("rope_type", "type", "rope_theta", "original_max_position_embeddings", "max_position_embeddings")
"""What a scaling says that is looked at elsewhere."""

TOLERANCE: Final = 1e-5
"""Relative difference of two factors that are the same number worked out by different libraries."""


def rope_scaling_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The rope scaling of a configuration as :mod:`uqff.models.config` reads it; None if none."""
    scaling = config.get("rope_scaling")
    if isinstance(scaling, Mapping) and scaling.get("rope_type", scaling.get("type", "default")) != "default":
        return scaling
    return None


def llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> Factors:
    """What each rotary frequency is divided by, float32 ``[head_dim / 2]``.

    Raises:
        FormatError: a number of the scaling is missing.
    """

    def number(key: str) -> float:
        value = scaling.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise FormatError("not a number", field=f"config.rope_scaling.{key}", expected="above 0", got=value)
        return value

    factor, low, high = number("factor"), number("low_freq_factor"), number("high_freq_factor")
    context = number("original_max_position_embeddings")
    if not low <= high:
        raise FormatError(
            "bounds in the wrong order", field="config.rope_scaling", expected=f"at most {high:g}", got=f"{low:g}"
        )
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(theta, exponents.astype(np.float64)).astype(np.float32)  # float32's own power varies with the CPU
    wavelengths = np.float32(2 * math.pi) / (np.float32(1) / powers)
    made: Factors = np.ones_like(wavelengths)
    if low < high:
        smooth = (np.float32(context) / wavelengths - np.float32(low)) / np.float32(high - low)
        made = np.float32(1) / ((np.float32(1) - smooth) / np.float32(factor) + smooth)
    made[wavelengths < np.float32(context / high)] = 1
    made[wavelengths > np.float32(context / low)] = factor
    return made


def llama3_scaling(factors: Factors, theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling that gives these factors.

    Raises:
        UnsupportedError: it is not one of Llama 3's.
    """
    for numbers in (LLAMA3, LLAMA4):
        scaling = {"rope_type": "llama3", "factor": float(factors.max()), **numbers}
        if tuple(factors.shape) == (head_dim // 2,) and agree(factors, llama3_factors(scaling, theta, head_dim)):
            return scaling
    raise UnsupportedError(
        "rotary factors that are not of Llama 3; give the model's own configuration (--assets)",
        field="rope_freqs.weight",
    )


def agree(factors: Factors, others: Factors) -> bool:
    """Whether two sets of factors are the same numbers, rounding aside."""
    return factors.shape == others.shape and bool((np.abs(factors - others) <= TOLERANCE * np.abs(others)).all())


def yarn_scaling(number: Callable[[str, float | None], float], architecture: GgufArchitecture) -> dict[str, Any]:
    """The ``yarn`` scaling that a file's metadata states.

    Args:
        number: of the metadata of the architecture, by its key; and what it is where there is none, None if there must
            be one.
        architecture: of the file's model.

    Raises:
        FormatError: a number is missing.
    """
    made: dict[str, Any] = {"rope_type": "yarn", "factor": number("rope.scaling.factor", None)}
    for key, (stored, default) in YARN.items():
        made[key] = number(f"rope.scaling.{stored}", default)
    if architecture.latent and (multiplier := number(f"rope.scaling.{LOG_MULTIPLIER}", 0.0)):
        made |= dict.fromkeys(MSCALES, float(str(np.float32(multiplier * 10))))
    if architecture.tempered:
        made |= {key: said for key, stored in TEMPERED.items() if (said := number(stored, 0.0))}
    return {**made, **architecture.yarn}


def yarn_numbers(scaling: Mapping[str, Any], architecture: GgufArchitecture) -> dict[str, Any]:
    """The numbers of a ``yarn`` scaling, by the keys of a file's metadata; some may be None, or no numbers.

    Raises:
        UnsupportedError: the scaling says something that the metadata cannot.
    """
    said = {key: value for key, value in scaling.items() if key not in IGNORED and value is not None}
    stated: dict[str, Any] = {"truncate": True, **architecture.yarn}
    scales = {}
    if architecture.latent and said.get("mscale_all_dim") is not None:
        stated |= dict.fromkeys(MSCALES, said["mscale_all_dim"])
        scales[LOG_MULTIPLIER] = said["mscale_all_dim"] / 10
    tempered = {key: said.get(key) for key in TEMPERED if said.get(key)} if architecture.tempered else {}
    stated |= tempered
    for key, value in {"truncate": True, **said}.items():
        if key not in ("factor", *YARN) and value != stated.get(key):
            raise UnsupportedError(
                "cannot be said in GGUF", field=f"rope_scaling.{key}", expected=stated.get(key, "none"), got=value
            )
    numbers = {stored: said.get(key, default) for key, (stored, default) in YARN.items()}
    scaled = {"factor": said.get("factor"), **numbers, **scales}
    beside = {TEMPERED[key]: value for key, value in tempered.items()}
    return {**{f"rope.scaling.{key}": value for key, value in scaled.items()}, **beside}


def longrope_scaling(file: GgufFile) -> dict[str, Any] | None:
    """The ``longrope`` scaling whose divisors a file has, each the shortest decimal of its float32; None if none.

    Raises:
        FormatError: it has one of both lists only.
    """
    found = {key: file.get(name) for key, name in (("short_factor", SHORT_FACTORS), ("long_factor", LONG_FACTORS))}
    if all(tensor is None for tensor in found.values()):
        return None
    made: dict[str, Any] = {"type": "longrope"}
    for key, tensor in found.items():
        if tensor is None:
            raise FormatError("one of two lists of rotary factors", field=f"rope_factors_{key[:-7]}.weight", got="none")
        made[key] = [float(str(value)) for value in tensor.float32().reshape(-1)]
    return made


def longrope_factors(scaling: Mapping[str, Any], key: str, pairs: int) -> Factors:
    """One of the lists of a configuration, float32 ``[pairs]``.

    Raises:
        FormatError: it is none.
    """
    values = scaling.get(key)
    numbers = values if isinstance(values, list) else []
    if len(numbers) != pairs or any(type(each) not in (int, float) or not each > 0 for each in numbers):
        raise FormatError(
            "not rotary factors", field=f"config.rope_scaling.{key}", expected=f"{pairs} numbers above 0", got=values
        )
    return np.array(numbers, np.float32)


def longrope_apart(scaling: Mapping[str, Any] | None) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """What a ``longrope`` scaling says that a file has as tensors, and what it says it multiplies by."""
    if scaling is None:
        return None, {}
    scales = {key: scaling[key] for key in LONGROPE_SCALES if key in scaling}
    if not scales:
        return dict(scaling), {}
    divisors = {key: scaling[key] for key in ("short_factor", "long_factor") if key in scaling}
    return {"type": scaling.get("type", scaling.get("rope_type")), **divisors}, scales


def longrope_attention(config: Mapping[str, Any]) -> float:
    """What ``longrope`` multiplies queries and keys by: a number for texts of all lengths, if the scaling says it; else
    it follows from the lengths.

    Raises:
        FormatError: a length, or a number, is missing.
        UnsupportedError: it is another number for long texts, which a file has no place for.
    """
    stated = longrope_apart(rope_scaling_of(config))[1]
    if stated:
        short, long = (stated.get(key) for key in LONGROPE_SCALES)
        if short != long:
            field = f"rope_scaling.{LONGROPE_SCALES[1]}"
            raise UnsupportedError("cannot be said in GGUF", field=field, expected=short, got=long)
        if isinstance(short, bool) or not isinstance(short, (int, float)) or not short > 0:
            raise FormatError("not a number", field=f"rope_scaling.{LONGROPE_SCALES[0]}", expected="above 0", got=short)
        return float(short)
    lengths = [config.get(key) for key in ("max_position_embeddings", "original_max_position_embeddings")]
    if any(type(each) is not int or each < 2 for each in lengths):
        raise FormatError("not a length", field="config.original_max_position_embeddings", got=lengths[1])
    longest, original = lengths
    scale = longest / original  # type: ignore[operator]
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0  # type: ignore[arg-type]


def longrope_agrees(attention: float | None, config: Mapping[str, Any]) -> bool:
    """Whether a file says of attention what follows from the lengths."""
    return attention is not None and abs(attention - longrope_attention(config)) <= TOLERANCE * attention
