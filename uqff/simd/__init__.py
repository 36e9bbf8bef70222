"""Fast twins of the reference paths on the CPU, and the one place where a kernel or the reference is chosen.

Kernels need numba and are bit-equal to the reference (NaN payloads aside).  ``UQFF_KERNELS=reference`` turns them off;
without numba the reference serves, with one warning.  numba is imported when a kernel is first needed.
"""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING

from uqff.codes import DType, Family

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from uqff.families.base import QuantizedTensor
    from uqff.families.encoded import Encoded

__all__ = ["DEQUANTIZERS", "choice", "decode", "dequantize", "enabled"]

ENVIRONMENT_VARIABLE = "UQFF_KERNELS"

DEQUANTIZERS = {
    Family.GGUF: "uqff.families.gguf.cpu_dequantize",
    Family.UNQUANT: "uqff.families.unquant.cpu_dequantize",
    Family.HQQ: "uqff.families.hqq.cpu_dequantize",
    Family.FP8: "uqff.families.fp8.cpu_dequantize",
    Family.AFQ: "uqff.families.afq.cpu_dequantize",
    Family.F8Q8: "uqff.families.f8q8.cpu_dequantize",
    Family.MXFP4: "uqff.families.mxfp4.cpu_dequantize",
}
"""Modules with a ``dequantize(weight, out, form) -> bool``: False, and nothing written, if the weight has no kernel
(small shapes, unusual dtypes) or its parts do not fit each other, which the reference then reports."""


def enabled() -> bool:
    """Whether kernels are used: numba can be imported and compiles, and ``UQFF_KERNELS`` does not say ``reference``.

    Raises:
        ValueError: ``UQFF_KERNELS`` is neither empty, ``numba`` nor ``reference``.
    """
    return choice() != "reference" and _compiles()


def choice() -> str:
    """What ``UQFF_KERNELS`` says: nothing, ``numba`` or ``reference``.

    Raises:
        ValueError: something else.
    """
    said = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if said not in ("", "numba", "reference"):
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected 'numba' or 'reference', got {said!r}")
    return said


@lru_cache
def _compiles() -> bool:
    try:
        import numba
    except ImportError as error:
        warnings.warn(f"numba cannot be imported ({error}): the slow reference paths serve", stacklevel=4)
        return False
    return not numba.config.DISABLE_JIT  # type: ignore[attr-defined]


def decode(weight: Encoded, out: npt.NDArray[np.uint8], dtype: DType) -> bool:
    """Write the numbers of a weight, if there is a kernel for it; does not import torch.

    Args:
        weight: what is to be dequantised.
        out: the bytes of ``numel`` numbers.
        dtype: F32, BF16 or F16.

    Returns:
        Whether it was done; if not, nothing was written.
    """
    if not enabled():
        return False
    from uqff.simd import output as numerics

    done: bool = import_module(DEQUANTIZERS[weight.family]).dequantize(weight, out, numerics.FORMS[dtype])
    return done


def dequantize(record: QuantizedTensor, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor | None:
    """The weight of a record, by a kernel if there is one.

    Args:
        record: with all its tensors on one device.
        dtype: of the result.
        out: where to write: contiguous, of the record's shape, ``dtype`` and device. A new tensor if None.

    Returns:
        ``out`` or the new tensor; None if no kernel applies (kernels are off, the record is not on the CPU, the
        dtype is not float32, bfloat16 or float16, the weight is too small), in which case nothing was written.
    """
    if record.device.type != "cpu" or not enabled():
        return None
    from uqff.simd import memory

    written = DType.of_torch(dtype)
    if written not in (DType.F32, DType.BF16, DType.F16):
        return None
    if out is None:
        out = memory.empty(record.shape, dtype)
    return out if decode(record.encoded(), memory.bytes_of(out), written) else None
