"""A layer's bias on its way into a file: the dtype it is stored in, its bytes, and what that costs.

In which dtype is each family's to say: :mod:`uqff.families.biases`.  Does not import torch, but for tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from uqff.checkpoints.safetensors import TensorFiles
from uqff.codes import LOADED_DTYPES, DType
from uqff.errors import UnsupportedError
from uqff.families.base import QuantizedTensor
from uqff.families.part import Part
from uqff.numerics.packing import e4m3_to_float32, float32_to_e4m3
from uqff.quantization.error import Distance, Measure
from uqff.simd.floats import Floats

if TYPE_CHECKING:
    import torch

__all__ = [
    "BiasLoss",
    "StoredBias",
    "bias_distance",
    "bias_losses",
    "bias_part",
    "cast_bias",
    "largest_of",
    "source_bias",
    "widened_bias",
]

LOAD_DTYPES: Final = (DType.F32, DType.F16, DType.BF16)

_NUMPY: Final[dict[DType, npt.DTypeLike]] = {
    DType.U8: "u1",
    DType.U32: "<u4",
    DType.I32: "<i4",
    DType.I64: "<i8",
    DType.F64: "<f8",
    DType.I16: "<i2",
}


def source_bias(checkpoint: TensorFiles, name: str | None) -> Floats | None:
    """A bias as a checkpoint has it, if it has one; one of a dtype that weights do not have, in float32."""
    if name is None:
        return None
    if checkpoint.dtype(name) in LOADED_DTYPES:
        return checkpoint.floats(name)
    return Floats.of_tensor(checkpoint[name].to(DType.F32.torch))


def bias_part(bias: Floats, load: DType, stored: DType) -> Part:
    """A bias as it is stored.

    Args:
        bias: float32, float16 or bfloat16 ``[..., out]``.
        load: the load dtype, to which it is rounded first, as all that is loaded.
        stored: F32, F16, BF16, or F8E4M3, to which it is cast without a scale; that saturates at 448, as the engine's
            cast does.
    """
    loaded = bias.cast(load)
    if stored is not DType.F8E4M3:
        return Part.of_array(loaded.cast(stored).bits, stored)
    return Part.of_array(float32_to_e4m3(loaded.cast(DType.F32).bits.view(np.float32)), stored)


def cast_bias(
    bias: torch.Tensor,
    weight: QuantizedTensor | type[QuantizedTensor],
    load: torch.dtype | None = None,
    *,
    version: tuple[int, int, int],
    engine_biases: bool = False,
) -> torch.Tensor:
    """A bias as it is stored beside a weight.

    Args:
        bias: float ``[..., out]``; not modified.
        weight: the weight, or the class of its record.
        load: the load dtype: float32, float16 or bfloat16; the bias's own if None.
        version: of the format.
        engine_biases: the engine's bytes, see :mod:`uqff.families.biases`.

    Raises:
        UnsupportedError: not a load dtype.
    """
    dtype = DType.of_torch(bias.dtype if load is None else load)
    if dtype not in LOAD_DTYPES:
        expected = ", ".join(each.torch_name for each in LOAD_DTYPES)
        raise UnsupportedError(
            "not a dtype that biases are loaded as",
            field="dtype",
            expected=expected,
            got=bias.dtype if load is None else load,
        )
    stored = weight.BIAS.dtype(dtype, version, engine=engine_biases)
    return bias_part(Floats.of_tensor(bias.to(dtype.torch)), dtype, stored).tensor()


def widened_bias(bias: Part) -> npt.NDArray[np.float32]:
    """The numbers of a stored bias, whatever its dtype, as float32 of its shape; F64 and I64 are rounded."""
    raw, dtype, shape = bias.array(), bias.dtype, bias.shape
    if dtype in LOAD_DTYPES:
        return Floats.of_bytes(raw, dtype, shape).cast(DType.F32).bits.view(np.float32)
    values = e4m3_to_float32(raw) if dtype is DType.F8E4M3 else raw.view(_NUMPY[dtype]).astype(np.float32)
    return values.reshape(shape)


def bias_distance(a: Floats | Part, b: Part) -> Distance:
    """The distance of a stored bias from another, or from plain numbers, of the same number of elements."""
    true = a.cast(DType.F32).bits.view(np.float32) if isinstance(a, Floats) else widened_bias(a)
    measure = Measure()
    measure.add(np.ascontiguousarray(true).reshape(-1), np.ascontiguousarray(widened_bias(b)).reshape(-1))
    return measure.result()


@dataclass(frozen=True)
class StoredBias:
    """A bias that was stored.

    Attributes:
        dtype: it is stored in.
        distance: from the numbers that it was made of.
    """

    dtype: DType
    distance: Distance

    @property
    def lost(self) -> bool:
        """Whether a number is not what it was."""
        return self.distance.largest != 0


@dataclass(frozen=True)
class BiasLoss:
    """Biases of one dtype that are not what they were made of.

    Attributes:
        dtype: they are stored in.
        layers: which.
        largest: the largest error of a number; NaN or infinite where one is not finite.
        relative: the largest root mean square error of a bias, over its root mean square.
    """

    dtype: DType
    layers: tuple[str, ...]
    largest: float
    relative: float

    def __str__(self) -> str:
        what = "bias" if len(self.layers) == 1 else "biases"
        scale = " without a scale" if self.dtype is DType.F8E4M3 else ""
        return (
            f"{len(self.layers)} {what} stored as {self.dtype.safetensors}{scale} lost something: the largest error "
            f"is {self.largest:.4g}, the largest relative RMS error {self.relative:.4g}"
        )


def bias_losses(biases: Iterable[tuple[str, StoredBias | None]]) -> Iterator[BiasLoss]:
    """The biases, by name of their layer, that lost something; one line for each dtype."""
    by_dtype: dict[DType, list[tuple[str, Distance]]] = {}
    for name, bias in biases:
        if bias is not None and bias.lost:
            by_dtype.setdefault(bias.dtype, []).append((name, bias.distance))
    for dtype, found in by_dtype.items():
        names = tuple(name for name, _ in found)
        yield BiasLoss(
            dtype, names, *(largest_of(getattr(each, of) for _, each in found) for of in ("largest", "relative"))
        )


def largest_of(numbers: Iterable[float]) -> float:
    """The largest; a NaN, if there is one."""
    return max(numbers, key=lambda number: (math.isnan(number), number))
