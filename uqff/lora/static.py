"""Adapters that stand in the checkpoint itself, as in Phi-4 multimodal: which layers they are for, a pattern says.

::

    PATH.base_layer.weight        [out, in]
    PATH.lora_A.NAME.weight       A [r, in]
    PATH.lora_B.NAME.weight       B [out, r]

    config.json    "NAME_lora": {"layer": "layers.*self_attn", "r": 256, "lora_alpha": 512}

Each adapter whose pattern is found in PATH is added, with ``scale = lora_alpha / r``.

Authority: mistral.rs v0.8.0, ``mistralrs-quant/src/lora/static_lora.rs`` (``linear_no_bias_static_lora``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from uqff.checkpoints.safetensors import CONFIG_NAME, TensorFiles
from uqff.codes import LOADED_DTYPES, DType
from uqff.errors import FormatError, MissingError, UnsupportedError, located
from uqff.lora.config import LoraConfig
from uqff.lora.low_rank import LowRank, merged
from uqff.models.patterns import Pattern
from uqff.simd.floats import Floats

__all__ = ["StaticLora", "static_loras", "static_weight"]

SUFFIX: Final = "_lora"
BASE: Final = "base_layer.weight"


@dataclass(frozen=True)
class StaticLora:
    """An adapter that stands in the checkpoint.

    Attributes:
        layer: pattern that is found in the paths of its layers, see :mod:`uqff.models.patterns`.
        r: rank.
        lora_alpha: what is divided by the rank.
    """

    layer: str
    r: int
    lora_alpha: float


def static_loras(config: Mapping[str, Any]) -> dict[str, StaticLora]:
    """The adapters that a ``config.json`` tells of, by their names in those of tensors.

    >>> uqff.lora.static_loras({"vision_lora": {"layer": "self_attn", "r": 8, "lora_alpha": 16}})
    {'vision': StaticLora(layer='self_attn', r=8, lora_alpha=16)}
    """
    keys = ("layer", "r", "lora_alpha")
    return {
        key.removesuffix(SUFFIX): StaticLora(*(value[each] for each in keys))
        for key, value in config.items()
        if key.endswith(SUFFIX) and isinstance(value, dict) and all(each in value for each in keys)
    }


def static_weight(
    tensors: TensorFiles, path: str, loras: Mapping[str, StaticLora], *, dim: int = 0, part: slice | None = None
) -> npt.NDArray[np.float32] | None:
    """The weight of a layer with its adapters added, in their order, in float32: see :mod:`uqff.lora.low_rank`.

    Args:
        tensors: of the checkpoint, ``uqff.open_checkpoint(DIR).tensors``.
        path: of the layer.
        loras: the adapters to add, by name; those whose pattern is not found in the path are left out.
        dim: which dimension a rank's part is cut from: 0 for outputs, 1 for inputs.
        part: the rank's part; all if None.

    Returns:
        float32 ``[out, in]``; None if the checkpoint has no such layer, as of a stage that is elsewhere.

    Raises:
        MissingError: a factor is missing.
        FormatError: a pattern, a rank or a number is none; the sum is not finite.
        ShapeError: factors do not fit the weight.
        UnsupportedError: a tensor is of a dtype that is none of plain numbers.

    >>> with uqff.open_checkpoint("checkpoint") as checkpoint:
    ...     uqff.lora.static_weight(checkpoint.tensors, "model.layers.0.mlp.up_proj", {}) is None
    True
    """
    name = f"{path}.{BASE}"
    if name not in tensors:
        return None
    with located(file=tensors.file_of(name), layer=path):
        weight = _floats(tensors, name)
        deltas = [_delta(tensors, path, *each) for each in loras.items() if _pattern(tensors, *each).search(path)]
        for delta in deltas:
            delta.check(weight.shape, layer=path)
        if part is not None:
            start, stop, _ = part.indices(weight.shape[dim])
            weight = weight[:, start:stop] if dim else weight[start:stop]
            deltas = [delta.narrow(dim, start, stop - start) for delta in deltas]
        total = merged(weight, deltas, layer=path)
    made: npt.NDArray[np.float32] = total.cast(DType.F32).bits.view(np.float32)
    return made


def _pattern(tensors: TensorFiles, name: str, lora: StaticLora) -> Pattern:
    with located(file=tensors.path / CONFIG_NAME):
        return Pattern(lora.layer)


def _delta(tensors: TensorFiles, path: str, name: str, lora: StaticLora) -> LowRank:
    document = {"r": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": [name]}
    scale = LoraConfig(document, tensors.path / CONFIG_NAME).size(path).scale
    a, b = (f"{path}.lora_{factor}.{name}.weight" for factor in "AB")
    for factor in (a, b):
        if factor not in tensors:
            raise MissingError("adapter lacks a factor", field=factor, expected=f"{a} and {b}")
    delta = LowRank(_floats(tensors, b), _floats(tensors, a), scale, f"{a}, {b}")
    if delta.rank != lora.r:
        raise FormatError(
            "factors of another rank than the configuration says", field=a, expected=lora.r, got=delta.rank
        )
    return delta


def _floats(tensors: TensorFiles, name: str) -> Floats:
    dtype = tensors.dtype(name)
    if dtype not in LOADED_DTYPES or len(tensors.shape(name)) != 2:
        got = f"{dtype} {list(tensors.shape(name))}"
        raise UnsupportedError("no matrix of plain numbers", field=name, expected=", ".join(LOADED_DTYPES), got=got)
    return tensors.floats(name)
