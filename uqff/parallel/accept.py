"""What layers take: weights, biases, activations. Everything else is an error before it is a number.

A plain weight is float32, bfloat16, float16 or float64.  Codes without their scales (float8, integers) multiply without
complaint and give garbage, so they are refused here, wherever a weight or an activation comes in.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import numpy as np
import torch

from uqff.codec.layer import Layer
from uqff.codes import DType
from uqff.errors import ShapeError, UnsupportedError, located
from uqff.families import QuantizedTensor, Unquant
from uqff.families.part import Part

__all__ = ["Weight", "bias_of", "check_activations", "layer_of", "parts_of", "plain_of", "record_of"]

Weight: TypeAlias = "QuantizedTensor | torch.Tensor | np.ndarray[Any, Any] | torch.nn.Linear | Layer"
"""What stands for a weight: quantised, plain, or a layer that has one, and perhaps a bias."""

PLAIN: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes of plain weights and of activations."""

_BIASES: Final = (*PLAIN, torch.float8_e4m3fn)
"""The engine stores the biases of FP8 layers as float8, without a scale."""

_ARRAYS: Final = {2: DType.F16, 4: DType.F32, 8: DType.F64}


def parts_of(
    weight: Weight, bias: Any = None, *, layer: str | None = None
) -> tuple[QuantizedTensor | torch.Tensor, torch.Tensor | None]:
    """A weight, quantised or plain, and a bias, however they are given; nothing is copied that torch can view.

    Args:
        weight: see :data:`Weight`.
        bias: a tensor or array, if the weight is not a layer with a bias.
        layer: key of the layer, for errors.

    Raises:
        UnsupportedError: they are something else, or of a dtype that is none of plain numbers; or there are two biases.
        ShapeError: the weight has no dimensions, or no numbers.
    """
    if isinstance(weight, (Layer, torch.nn.Linear)):
        own, weight = weight.bias, weight.weight
        if own is not None and bias is not None:
            expected = "the bias of the layer, or one beside a weight"
            raise UnsupportedError("two biases", layer=layer, field="bias", expected=expected)
        bias = bias if own is None else own
    made: QuantizedTensor | torch.Tensor
    if isinstance(weight, QuantizedTensor):
        if weight.UNQUANTISED and weight.nominal_dtype.torch not in PLAIN:
            raise _not_plain("weight", PLAIN, weight.nominal_dtype.torch, layer)
        made = weight
    else:
        made = _plain("weight", weight, PLAIN, layer)
    if not len(made.shape) or 0 in made.shape:
        expected = "at least 1 dimension, none of them 0"
        raise ShapeError("weight without numbers", layer=layer, expected=expected, got=list(made.shape))
    return made, bias_of(bias, layer=layer)


def bias_of(bias: Any, *, layer: str | None = None) -> torch.Tensor | None:
    """A bias, if there is one; raises what :func:`parts_of` does."""
    return None if bias is None else _plain("bias", bias, _BIASES, layer)


def plain_of(name: str, numbers: Any, *, layer: str | None = None) -> torch.Tensor:
    """Plain numbers of a tensor or array.

    Args:
        name: what they are, for errors.
        numbers: the tensor or array.
        layer: key of the layer, for errors.

    Raises:
        UnsupportedError: they are something else, or of another dtype.
    """
    return _plain(name, numbers, PLAIN, layer)


def record_of(weight: QuantizedTensor | torch.Tensor, *, layer: str | None = None) -> QuantizedTensor:
    """A weight of :func:`parts_of` as a record; shares memory."""
    with located(layer=layer):
        return weight if isinstance(weight, QuantizedTensor) else Unquant.of(weight)


def layer_of(weight: Weight, bias: Any = None, *, layer: str | None = None) -> Layer:
    """A weight and a bias, however they are given, as a layer; shares memory.

    Raises:
        UnsupportedError: see :func:`parts_of`.
        ShapeError: see there; also if the bias does not fit.
    """
    weight, bias = parts_of(weight, bias, layer=layer)
    record = record_of(weight, layer=layer)
    allowed = [list(record.shape[at:-1]) for at in range(len(record.shape) - 1)]
    if bias is not None and allowed and list(bias.shape) not in allowed:
        expected = " or ".join(map(str, allowed))
        raise ShapeError("bias does not fit weight", layer=layer, expected=expected, got=list(bias.shape))
    return Layer(record, bias)


def check_activations(x: Any, inputs: int | None = None, *, layer: str | None = None) -> None:
    """Refuse what is no activation: integers, which no product is made of, and tensors that do not fit the weight.

    Args:
        x: ``[..., inputs]``.
        inputs: of the weight; None if shapes are checked elsewhere.
        layer: key of the layer, for errors.

    Raises:
        UnsupportedError: not a tensor, or not of a dtype of activations.
        ShapeError: they do not fit.
    """
    if not isinstance(x, torch.Tensor):
        got = type(x).__name__
        raise UnsupportedError("activations are not a tensor", layer=layer, expected="a torch.Tensor", got=got)
    if x.dtype not in PLAIN:
        raise _not_plain("activations", PLAIN, x.dtype, layer)
    if inputs is not None and (not x.ndim or x.shape[-1] != inputs):
        raise ShapeError(
            "activations do not fit the weight", layer=layer, expected=f"[..., {inputs}]", got=list(x.shape)
        )


def _plain(name: str, numbers: Any, dtypes: tuple[torch.dtype, ...], layer: str | None) -> torch.Tensor:
    if isinstance(numbers, np.ndarray):
        numbers = _tensor_of_array(name, numbers, layer)
    if not isinstance(numbers, torch.Tensor):
        expected = "a torch.Tensor, or a numpy array"
        if name == "weight":
            expected += ", a torch.nn.Linear, a uqff.Layer or a quantised weight"
        raise UnsupportedError(f"not a {name}", layer=layer, field=name, expected=expected, got=type(numbers).__name__)
    if numbers.dtype not in dtypes:
        raise _not_plain(name, dtypes, numbers.dtype, layer)
    if numbers.layout is not torch.strided:
        got = numbers.layout
        raise UnsupportedError(f"not a dense {name}", layer=layer, field=name, expected="torch.strided", got=got)
    return numbers.detach()


def _tensor_of_array(name: str, array: np.ndarray[Any, Any], layer: str | None) -> torch.Tensor:
    """A view of an array if it is contiguous, whether it may be written to or not."""
    if array.dtype.kind != "f" or array.itemsize not in _ARRAYS:
        raise _not_plain(name, PLAIN, f"an array of {array.dtype}", layer)
    dtype = _ARRAYS[array.itemsize]
    if not array.size:
        return torch.empty(array.shape, dtype=dtype.torch)
    native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    return Part.of_array(native, dtype).tensor()


def _not_plain(name: str, dtypes: tuple[torch.dtype, ...], got: object, layer: str | None) -> UnsupportedError:
    expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return UnsupportedError(
        f"{name} of a dtype that is none of plain numbers", layer=layer, field=name, expected=expected, got=got
    )
