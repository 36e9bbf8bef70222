"""What a dequantiser writes: the dtypes that kernels have, and the check of a tensor that a caller gives for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uqff.codes import DType
from uqff.errors import ShapeError

if TYPE_CHECKING:
    import torch

__all__ = ["KERNEL_DTYPES", "check_out"]

KERNEL_DTYPES = (DType.F32, DType.BF16, DType.F16)
"""What kernels dequantise to."""


def check_out(shape: tuple[int, ...], device: torch.device, out: torch.Tensor, dtype: torch.dtype) -> None:
    """Refuse a tensor that is not contiguous, of that shape, device and dtype, or of a dtype that is written.

    Raises:
        ShapeError: naming what is wrong.
    """
    import torch

    allowed = (torch.float32, torch.bfloat16, torch.float16)
    problem, expected, got = "", "", ""
    if out.dtype not in allowed or out.dtype != dtype:
        wanted = (dtype,) if dtype in allowed else allowed
        problem, expected, got = "wrong dtype", " or ".join(map(str, wanted)), str(out.dtype)
    elif tuple(out.shape) != shape:
        problem, expected, got = "wrong shape", str(list(shape)), str(list(out.shape))
    elif out.device != device:
        problem, expected, got = "wrong device", str(device), str(out.device)
    elif not out.is_contiguous():
        problem, expected, got = "not contiguous", "a contiguous tensor", f"strides {out.stride()}"
    if problem:
        raise ShapeError(problem, field="out", expected=expected, got=got)
