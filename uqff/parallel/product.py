"""Products with weights straight from their codes, as operators of torch.

::

    uqff::linear          y = x Wᵀ                           x [..., in]
    uqff::gather_linear   y[t, k] = x[t, k] W[indices[t, k]]ᵀ   x [tokens, 1 or k, in], a weight for each expert

They take a weight as ``uqff::dequantize`` does, so they are one node to ``torch.compile`` and ``torch.export``, with
gradients of any order in ``x``.  ``linear`` has two arithmetics, see :mod:`uqff.parallel.arithmetic`.

Each device has its way of multiplying, one entry in :data:`DEVICES`.  Where there is none, or it does not apply, the
weight is dequantised into the dtype of ``x``, multiplied, and dropped again: so a device need not know every weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from uqff.errors import ShapeError
from uqff.parallel import product_cpu, product_cuda
from uqff.parallel.grouping import ExpertGroups
from uqff.parallel.weight import WeightBuffers, dequantize, of_spec, record_of_bytes

if TYPE_CHECKING:
    from uqff.families import QuantizedTensor
    from uqff.parallel.arithmetic import Arithmetic

__all__ = ["DEVICES", "Device", "gather_linear", "gather_multiply", "linear", "multiply"]


class Device(NamedTuple):
    """How a device multiplies; each returns None where it does not, and then has written nothing.

    Attributes:
        linear: ``(x, parts, spec)``, of :func:`linear`.
        gather_linear: ``(x, indices, parts, spec)``, of :func:`gather_linear`; None if every expert is dequantised.
        linear_as_engine: :attr:`linear` in the engine's arithmetic; None if that is the exact one.
        multiply: ``(x, weight, arithmetic)``, of :func:`multiply` if nobody watches; None if there is no shorter way.
    """

    linear: Callable[[torch.Tensor, Sequence[torch.Tensor], str], torch.Tensor | None]
    gather_linear: Callable[[torch.Tensor, torch.Tensor, Sequence[torch.Tensor], str], torch.Tensor | None] | None = (
        None
    )
    linear_as_engine: Callable[[torch.Tensor, Sequence[torch.Tensor], str], torch.Tensor | None] | None = None
    multiply: Callable[[torch.Tensor, WeightBuffers, str], torch.Tensor | None] | None = None


DEVICES: dict[str, Device] = {
    "cpu": Device(product_cpu.linear, product_cpu.gather_linear, product_cpu.linear_as_engine, product_cpu.multiply),
    "cuda": Device(product_cuda.linear, product_cuda.gather_linear),
}
"""By ``torch.device.type``."""

# torch 2.4 cannot read a schema off annotations that are text, as all are here.
_LINEAR = "(Tensor x, Tensor[] parts, str spec, str arithmetic) -> Tensor"
_GATHER = "(Tensor x, Tensor indices, Tensor[] parts, str spec, bool transposed) -> Tensor"


def multiply(x: torch.Tensor, weight: WeightBuffers, arithmetic: Arithmetic = "exact") -> torch.Tensor:
    """``x Wᵀ``.

    Args:
        x: ``[..., in]`` on the weight's device.
        weight: ``[out, in]``.
        arithmetic: see :mod:`uqff.parallel.arithmetic`.
    """
    if weight.numbers is not None:
        return torch.nn.functional.linear(x, weight.numbers.to(x.dtype))
    eager = is_eager(x)
    if eager:
        device = DEVICES.get("cpu" if x.is_cpu else x.device.type)
        y = None if device is None or device.multiply is None else device.multiply(x, weight, arithmetic)
        if y is not None:
            return y
    call: Callable[..., torch.Tensor] = _linear if eager else linear
    return call(x, weight.bytes(), weight.spec, arithmetic)


def gather_multiply(x: torch.Tensor, indices: torch.Tensor, weight: WeightBuffers) -> torch.Tensor:
    """The product of each token with each of its experts.

    Args:
        x: ``[tokens, 1 or experts_per_token, in]`` on the weight's device.
        indices: int64 ``[tokens, experts_per_token]``, each of an expert that there is.
        weight: ``[experts, out, in]``.

    Returns:
        ``[tokens, experts_per_token, out]``.
    """
    call: Callable[..., torch.Tensor] = _gather_linear if is_eager(x) else gather_linear
    return call(x, indices, weight.bytes(), weight.spec, False)


def is_eager(x: torch.Tensor) -> bool:
    """Whether nobody watches: no graph, gradient, trace, mode or transformation of torch needs to see an operator.

    To call one takes several times as long as everything else that a product does beside multiplying.
    """
    return (
        not torch.compiler.is_compiling()
        and type(x) is torch.Tensor
        and not (x.requires_grad and torch.is_grad_enabled())
        and not (_modes() or _transforms() or _tracing())
    )


_modes, _transforms, _tracing = (
    getattr(torch._C, name, lambda: True)
    for name in ("_len_torch_dispatch_stack", "_are_functorch_transforms_active", "_get_tracing_state")
)
"""Torch has no public names for these; where it has none at all, somebody may watch."""


@torch.library.custom_op("uqff::linear", mutates_args=(), schema=_LINEAR)
def linear(x: torch.Tensor, parts: Sequence[torch.Tensor], spec: str, arithmetic: str) -> torch.Tensor:
    """``x Wᵀ`` in the dtype of ``x``.

    Args:
        x: ``[..., in]``.
        parts: the bytes of the weight's parts, in the order of the record.
        spec: what else it is, see :func:`~uqff.parallel.weight.to_spec`.
        arithmetic: see :mod:`uqff.parallel.arithmetic`.
    """
    return _linear(x, parts, spec, arithmetic)


def _linear(x: torch.Tensor, parts: Sequence[torch.Tensor], spec: str, arithmetic: str) -> torch.Tensor:
    device, y = DEVICES.get(x.device.type), None
    if arithmetic == "engine" and device is not None and device.linear_as_engine is not None:
        y = device.linear_as_engine(x, parts, spec)
    if y is None and device is not None:
        y = device.linear(x, parts, spec)
    return torch.nn.functional.linear(x, dequantize(parts, spec, x.dtype)) if y is None else y


@linear.register_fake
def _(x: torch.Tensor, parts: Sequence[torch.Tensor], spec: str, arithmetic: str) -> torch.Tensor:
    shape = of_spec(spec).shape
    if x.shape[-1] != shape[1]:
        raise _misfit(x, shape)
    return x.new_empty((*x.shape[:-1], shape[0]))


def _misfit(x: torch.Tensor, shape: tuple[int, ...]) -> ShapeError:
    return ShapeError("activations do not fit the weight", expected=f"[..., {shape[-1]}]", got=list(x.shape))


def _keep(ctx: Any, inputs: tuple[torch.Tensor, list[torch.Tensor], str, str], output: torch.Tensor) -> None:
    _, parts, ctx.spec, _ = inputs
    ctx.save_for_backward(*parts)


def _of_linear(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, list[None], None, None]:
    parts = list(ctx.saved_tensors)
    return gradient @ dequantize(parts, ctx.spec, gradient.dtype), [None] * len(parts), None, None


linear.register_autograd(_of_linear, setup_context=_keep)


@torch.library.custom_op("uqff::gather_linear", mutates_args=(), schema=_GATHER)
def gather_linear(
    x: torch.Tensor, indices: torch.Tensor, parts: Sequence[torch.Tensor], spec: str, transposed: bool
) -> torch.Tensor:
    """The product of each token with each of its experts, in the dtype of ``x``.

    Args:
        x: ``[tokens, 1 or experts_per_token, in]``.
        indices: int64 ``[tokens, experts_per_token]``, each of an expert that there is.
        parts: the bytes of the parts of a stack ``[experts, out, in]``, in the order of the record.
        spec: what else it is.
        transposed: whether ``x`` has ``out`` numbers and is multiplied with ``W``, as gradients are.
    """
    return _gather_linear(x, indices, parts, spec, transposed)


def _gather_linear(
    x: torch.Tensor, indices: torch.Tensor, parts: Sequence[torch.Tensor], spec: str, transposed: bool
) -> torch.Tensor:
    device = DEVICES.get(x.device.type)
    if device is not None and device.gather_linear is not None and not transposed:
        y = device.gather_linear(x, indices, parts, spec)
        if y is not None:
            return y
    return _by_expert(x, indices, record_of_bytes(of_spec(spec), parts), transposed)


@gather_linear.register_fake
def _(
    x: torch.Tensor, indices: torch.Tensor, parts: Sequence[torch.Tensor], spec: str, transposed: bool
) -> torch.Tensor:
    _, outputs, inputs = of_spec(spec).shape
    return x.new_empty((*indices.shape, inputs if transposed else outputs))


def _by_expert(x: torch.Tensor, indices: torch.Tensor, weight: QuantizedTensor, transposed: bool) -> torch.Tensor:
    """Each expert that any token goes to is dequantised once, multiplied with all its rows, and dropped again."""
    (experts, *matrix), room = weight.shape, None
    if x.dtype in (torch.float32, torch.bfloat16, torch.float16):
        # New memory for every expert would cost more than dequantising.
        room = torch.empty(matrix, dtype=x.dtype, device=weight.device)
    # Dequantising is by way of float32; plain numbers need no arithmetic.
    stack = weight.plain.tensor() if room is None and weight.plain is not None else None
    y = x.new_empty(indices.numel(), matrix[1] if transposed else matrix[0])
    for expert, places, rows in ExpertGroups(indices, experts).rows(x):
        dense = weight.dequantize_expert(expert, x.dtype, out=room) if stack is None else stack[expert].to(x.dtype)
        y[places] = torch.nn.functional.linear(rows, dense.T if transposed else dense)
    return y.view(*indices.shape, y.shape[1])


def _keep_gathered(
    ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], str, bool], output: torch.Tensor
) -> None:
    x, indices, parts, ctx.spec, ctx.transposed = inputs
    ctx.shared = x.shape[1] != indices.shape[1]
    ctx.save_for_backward(indices, *parts)


def _of_gathered(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, list[None], None, None]:
    indices, *parts = ctx.saved_tensors
    made = gather_linear(gradient, indices, parts, ctx.spec, not ctx.transposed)
    return made.sum(1, keepdim=True) if ctx.shared else made, None, [None] * len(parts), None, None


gather_linear.register_autograd(_of_gathered, setup_context=_keep_gathered)
