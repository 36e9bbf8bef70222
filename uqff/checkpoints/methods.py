"""The methods of quantising that checkpoints are read of, and which one a configuration means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from uqff.checkpoints.auto_round import AutoRound
from uqff.checkpoints.bitsandbytes import BitsAndBytes
from uqff.checkpoints.compressed_tensors import CompressedTensors
from uqff.checkpoints.foreign import ForeignTensor
from uqff.checkpoints.fp8 import FP8Checkpoint
from uqff.checkpoints.gguf.blocks import GgmlBlocks
from uqff.checkpoints.gptq import AWQ, GPTQ
from uqff.checkpoints.grouped import GroupedCodes
from uqff.checkpoints.hqq import HQQCheckpoint
from uqff.checkpoints.int8_rows import Int8Rows
from uqff.checkpoints.method import Method
from uqff.checkpoints.mlx import MLX
from uqff.checkpoints.mxfp4 import MXFP4Checkpoint
from uqff.checkpoints.scaled_fp8 import ScaledFP8
from uqff.checkpoints.separate import SeparateExperts
from uqff.checkpoints.table import TableCodes
from uqff.errors import FormatError, UnsupportedError
from uqff.models.config import names_uqff

__all__ = ["FOREIGN", "METHODS", "method_of", "quantization_of"]

METHODS: Final[tuple[type[Method], ...]] = (
    FP8Checkpoint,
    MLX,
    MXFP4Checkpoint,
    HQQCheckpoint,
    GPTQ,
    AWQ,
    AutoRound,
    BitsAndBytes,
    CompressedTensors,
)
"""All but :class:`~uqff.checkpoints.plain.Plain`, which is what is left."""

FOREIGN: Final[tuple[type[ForeignTensor], ...]] = (
    ScaledFP8,
    GroupedCodes,
    TableCodes,
    Int8Rows,
    GgmlBlocks,
    SeparateExperts,
)
"""The records that are made where no family of UQFF is exact."""

KEYS: Final = ("quantization_config", "quantization")
"""Where a configuration says how the weights were quantised; the latter is MLX's."""


def quantization_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a configuration says of the quantisation: at the top, or of the text model of several; None if nothing.

    Raises:
        FormatError: it is not an object.
    """
    for where in (config, config.get("text_config")):
        for key in KEYS:
            found = where.get(key) if isinstance(where, Mapping) else None
            if found is not None:
                if not isinstance(found, Mapping):
                    raise FormatError("not an object", field=key, got=found)
                return found
    return None


def method_of(config: Mapping[str, Any]) -> Method | None:
    """The method that a configuration means, with its settings; None if it names none.

    Raises:
        UqffError: it is not known, or has settings that do not exist.
    """
    quantization = quantization_of(config)
    if quantization is None:
        return None
    name = quantization.get("quant_method")
    if names_uqff(quantization):
        raise UnsupportedError("the model is UQFF, not a checkpoint", field=f"{KEYS[0]}.quant_method", got=name)
    for method in METHODS:
        if method.means(name, quantization):
            return method.of(quantization, config)
    known = ", ".join(sorted(each for method in METHODS for each in method.NAMES))
    problem = "no method of quantising named" if name is None else "unknown method of quantising"
    raise UnsupportedError(problem, field="quantization_config.quant_method", expected=f"one of {known}", got=name)
