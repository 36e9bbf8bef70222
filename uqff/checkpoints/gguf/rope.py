"""The ``llama3`` rope scaling: as numbers of a configuration, and worked out as GGUF stores it.

Authority: llama.cpp, ``conversion/llama.py`` (``generate_extra_tensors``); transformers, ``modeling_rope_utils.py``
(``_compute_llama3_parameters``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.errors import FormatError, UnsupportedError

__all__ = ["Factors", "agree", "llama3_factors", "llama3_scaling", "rope_scaling_of"]

Factors: TypeAlias = npt.NDArray[np.float32]

LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The numbers of all models that Meta published (3.1 to 3.3); ``factor`` differs."""

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
    if not low < high:
        raise FormatError(
            "bounds in the wrong order", field="config.rope_scaling", expected=f"below {high:g}", got=f"{low:g}"
        )
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(theta, exponents.astype(np.float64)).astype(np.float32)  # float32's own power varies with the CPU
    wavelengths = np.float32(2 * math.pi) / (np.float32(1) / powers)
    smooth = (np.float32(context) / wavelengths - np.float32(low)) / np.float32(high - low)
    made: Factors = np.float32(1) / ((np.float32(1) - smooth) / np.float32(factor) + smooth)
    made[wavelengths < np.float32(context / high)] = 1
    made[wavelengths > np.float32(context / low)] = factor
    return made


def llama3_scaling(factors: Factors, theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling that gives these factors.

    Raises:
        UnsupportedError: it is not one of Llama 3's.
    """
    scaling = {"rope_type": "llama3", "factor": float(factors.max()), **LLAMA3}
    if tuple(factors.shape) != (head_dim // 2,) or not agree(factors, llama3_factors(scaling, theta, head_dim)):
        raise UnsupportedError(
            "rotary factors that are not of Llama 3; give the model's own configuration (--assets)",
            field="rope_freqs.weight",
        )
    return scaling


def agree(factors: Factors, others: Factors) -> bool:
    """Whether two sets of factors are the same numbers, rounding aside."""
    return factors.shape == others.shape and bool((np.abs(factors - others) <= TOLERANCE * np.abs(others)).all())
