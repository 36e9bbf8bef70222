"""In-situ quantisation: which type a weight gets, what happens when its shape does not fit, and the quantiser itself.

The names are the engine's ISQ names.  A type cuts a weight in blocks or groups; if the shape is not whole blocks, the
engine takes another type or fails, and its generations differ::

    weight                              0.6             0.8             0.9
    K types, in % 256 != 0, in % 32 = 0 legacy type     legacy type     legacy type
    ggml types, in % 32 != 0            error           gguf F32        gguf F32
    afq, in % group != 0                error           error, but in   unquantised
                                                        UQFF 1.1 as 0.9
    hqq, size % group != 0              error           error           error
    mxfp4, in % 32 != 0, or stacked     no such type    error           error
    f8q8                                no such type    any shape       any shape
    fp8                                 any shape       any shape       any shape

:func:`plan` says it beforehand, :func:`quantize` does it and reports every change of type.

Authority: mistral.rs, ``mistralrs-quant/src/utils/isq.rs`` (``get_quantization_behaviour``, ``get_fallback``),
``mistralrs-quant/src/unquantized/mod.rs`` (``apply_isq``), ``mistralrs-core/src/pipeline/isq.rs``
(``parse_isq_value``).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from uqff.codes import DType, Version
from uqff.errors import FormatError, ShapeError, UnsupportedError, located
from uqff.families import QuantizedTensor, families, family_of_kind
from uqff.families.encoding import AS_ENGINE, EFFORTS, ENGINES, Effort, EffortName, Engine, Resolution
from uqff.families.feedback import calibrated
from uqff.families.loaded import Loaded
from uqff.simd.floats import Floats

if TYPE_CHECKING:
    import torch

__all__ = [
    "EFFORTS",
    "ENGINES",
    "KEEP",
    "Effort",
    "EffortName",
    "Engine",
    "Fallback",
    "FallbackWarning",
    "Resolution",
    "automatic_kinds",
    "check_effort",
    "effort_of",
    "encode",
    "kind_name",
    "kinds",
    "meta_weight",
    "plan",
    "planned",
    "promoted",
    "quantize",
    "resolve",
    "widened",
]

K_TYPE: Final = re.compile(r"(q[0-9])_k(_[a-z]+)?")
"""How llama.cpp writes a K type, alone or as the mixture that is mostly of it: ``q4_k``, ``q4_k_m``."""

KEEP: Final = "keep"
"""What is asked for where layers are to stay as they are; no type of a weight."""

LOAD_DTYPES: Final = (DType.F32, DType.F16, DType.BF16)


class FallbackWarning(UserWarning):
    """A weight was stored as another type than asked for, and nobody listened for :class:`Fallback`."""


@dataclass(frozen=True)
class Fallback:
    """A weight that is stored as another type than asked for.

    Attributes:
        module: path of the weight in the model, None if not known.
        requested: ISQ name asked for.
        resolved: the type taken: an ISQ name, ``f32`` (ggml's, code 0) or ``unquant``.
        shape: of the weight.
        reason: what does not fit.
    """

    module: str | None
    requested: str
    resolved: str
    shape: tuple[int, ...]
    reason: str

    def __str__(self) -> str:
        of = f"{self.module}: " if self.module else ""
        return f"{of}{self.requested} -> {self.resolved}, shape {list(self.shape)}: {self.reason}"


def kind_name(kind: str | int) -> str:
    """The name of a type: ISQ names in any case, numbers of bits, ``unquant``, and ``hqq1`` to ``hqq3``.

    Raises:
        UnsupportedError: there is no such type.
    """
    text, automatic = str(kind).lower() if not isinstance(kind, bool) else repr(kind), automatic_kinds()
    if text.isdecimal() and int(text) in automatic:
        return automatic[int(text)]
    asked = [*kinds(), *(kind for record in families() if record.UNQUANTISED for kind in record.OTHER_KINDS)]
    if text in asked or any(text in record.OTHER_KINDS for record in families()):
        return text
    known = (*asked, *map(str, automatic))
    text = K_TYPE.sub(r"\1k", text)
    meant = [text] if text in known else get_close_matches(text[:20], kinds(), 1)
    hint = f"; did you mean {meant[0]}?" if meant else ""
    raise UnsupportedError(f"unknown type{hint}", field="kind", expected=f"one of {', '.join(known)}", got=kind)


def kinds() -> tuple[str, ...]:
    """The ISQ names of all families."""
    return tuple(kind for record in families() for kind in record.KINDS)


def automatic_kinds() -> dict[int, str]:
    """What the engine takes on a CPU for a bare number of bits."""
    return {bits: kind for record in families() for bits, kind in record.AUTOMATIC.items()}


def promoted(kind: str) -> str:
    """The type of a head or an embedding where the default is ``kind``: see :attr:`Encoding.PROMOTED`."""
    return _record_of(kind).PROMOTED.get(kind, kind)


def _record_of(kind: str) -> type[QuantizedTensor]:
    record = family_of_kind(kind)
    if record is None:
        raise UnsupportedError("unknown type", field="kind", got=kind)
    return record


def plan(kind: str | int, shape: Sequence[int], engine: Engine = "0.9", *, group_size: int | None = None) -> str:
    """The type a weight of that shape is stored as. Pure arithmetic.

    Args:
        kind: what is asked for, see :func:`kind_name`.
        shape: ``(out, in)`` or ``(experts, out, in)``.
        engine: whose rules; see the table of this module.
        group_size: of AFQ (32, 64, 128) or HQQ; 64 if None.

    Returns:
        The name of the type: ``kind`` itself, a legacy ggml type, ``f32`` (ggml's) or ``unquant``.

    Raises:
        ShapeError: the engine fails on that shape.
        UnsupportedError: no such type, engine or group size.
    """
    return resolve(kind, shape, engine, group_size=group_size).kind


def resolve(
    kind: str | int,
    shape: Sequence[int],
    engine: Engine = "0.9",
    *,
    group_size: int | None = None,
    version: Version | None = None,
) -> Resolution:
    """What :func:`plan` says, with the reason; same arguments and errors.

    Args:
        version: of the file, if that is known: later releases of engine 0.8, which write 1.1, fail on less.
    """
    name, shape = kind_name(kind), tuple(shape)
    record = _record_of(name)
    if engine not in ENGINES:
        raise UnsupportedError("unknown engine", field="engine", expected=f"one of {', '.join(ENGINES)}", got=engine)
    if ENGINES.index(engine) < ENGINES.index(record.SINCE):
        raise UnsupportedError(f"the engine had no {name} yet", field="engine", expected=record.SINCE, got=engine)
    if len(shape) not in (2, 3) or 0 in shape:
        raise ShapeError(
            "not a matrix, nor a stack of them",
            field="shape",
            expected="[out, in] or [experts, out, in]",
            got=list(shape),
        )
    return record.resolve(name, shape, engine, record.group_size_of(name, group_size), version)


def planned(kind: str, shape: Sequence[int], dtype: DType, *, group_size: int | None = None) -> QuantizedTensor:
    """The record that :func:`quantize` will make, without its bytes; does not import torch.

    Args:
        kind: a type that fits the shape, as :func:`plan` returns it.
        shape: of the weight.
        dtype: the load dtype: of unquantised weights and of AFQ's scales.
        group_size: of AFQ or HQQ; 64 if None.
    """
    record = _record_of(kind)
    return record.planned(kind, shape, dtype, record.group_size_of(kind, group_size))


def encode(
    loaded: Loaded, kind: str, *, engine: Engine, group_size: int | None = None, effort: Effort = AS_ENGINE
) -> QuantizedTensor:
    """A weight whose shape fits the type, quantised; does not import torch.

    Args:
        loaded: the weight.
        kind: a type's name as :func:`plan` returns it.
        engine: whose quantiser.
        group_size: of AFQ or HQQ; 64 if None.
        effort: how codes and scales are chosen.

    Raises:
        FormatError: a weight is not finite in its load dtype; its position is named.
    """
    record = _record_of(kind)
    size = record.group_size_of(kind, group_size)
    if effort.name == "calibrated":
        return calibrated(loaded, kind, record, size, engine, effort)
    return record.encode(loaded, kind, engine=engine, group_size=size, effort=effort)


def effort_of(name: str, importance: Any, shape: Sequence[int], hessian: Any = None) -> Effort:
    """An effort, checked against the weight it is for.

    Args:
        name: one of :data:`EFFORTS`.
        importance: mean square of each input, ``[in]``, or ``[experts, in]``: a tensor, an array or a sequence, not
            negative and finite in float32; None: all alike.
        shape: of the weight.
        hessian: XᵀX of the inputs, ``[in, in]``, or ``[experts, in, in]``, finite in float32; ``calibrated`` needs it.

    Raises:
        UnsupportedError: no such effort, or one that needs a Hessian without one.
        ShapeError: the importance or the Hessian is not of so many inputs, or experts.
        FormatError: a number of the importance, or on the diagonal of the Hessian, is negative, or one is not finite;
            its position is named.
    """
    effort = check_effort(name, hessian)
    inputs = shape[-1]
    weights = products = None
    if importance is not None:
        weights = _numbers("importance", importance, (inputs,), shape)
        _check_squares("importance", weights, weights)
        weights = weights.reshape(-1, inputs)
    if hessian is not None:
        products = _numbers("hessian", hessian, (inputs, inputs), shape).reshape(-1, inputs, inputs)
        _check_squares("hessian", products, np.diagonal(products, axis1=1, axis2=2))
    return Effort(effort, weights, products)


def _numbers(name: str, given: Any, one: tuple[int, ...], shape: Sequence[int]) -> npt.NDArray[np.float32]:
    """What is known of the inputs of a weight, float32: of the shape ``one``, or of that of each expert."""
    if hasattr(given, "detach"):
        given = given.detach().cpu().float().numpy()
    try:
        numbers = np.ascontiguousarray(given, np.float32)
    except (TypeError, ValueError) as error:
        raise UnsupportedError(f"{name} is not numbers", field=name, got=type(given).__name__) from error
    experts = [[shape[0], *one]] if len(shape) == 3 else []
    if list(numbers.shape) not in ([*one], [1, *one], *experts):
        expected = " or ".join(map(str, [[*one], *experts]))
        raise ShapeError(name, field=name, expected=expected, got=list(numbers.shape))
    return numbers


def _check_squares(name: str, numbers: npt.NDArray[np.float32], squares: npt.NDArray[np.float32]) -> None:
    for array, wrong in ((squares, ~(squares >= 0)), (numbers, ~np.isfinite(numbers))):
        if wrong.any():
            at = np.unravel_index(int(np.argmax(wrong)), array.shape)
            got = f"{array[at]} at {tuple(map(int, at))}"
            raise FormatError(name, field=name, expected="finite numbers, not negative", got=got)


def check_effort(name: str, hessian: object | None = None) -> EffortName:
    """The effort of that name.

    Raises:
        UnsupportedError: there is none, or it needs a Hessian and there is none.
    """
    for effort in EFFORTS:
        if effort == name:
            if effort == "calibrated" and hessian is None:
                expected = f"XᵀX of the inputs, which {name} needs"
                raise UnsupportedError("no Hessian", field="hessian", expected=expected, got=None)
            return effort
    raise UnsupportedError("unknown effort", field="effort", expected=f"one of {', '.join(EFFORTS)}", got=name)


def widened(kind: str, weights: int) -> int:
    """How many of a weight's numbers are float32 at one time while :func:`encode` makes a type of them."""
    return _record_of(kind).widened(weights)


def meta_weight(
    kind: str, shape: Sequence[int], dtype: torch.dtype, *, group_size: int | None = None
) -> QuantizedTensor:
    """The record that :func:`quantize` will make, on the meta device: all sizes, no payload.

    Args:
        kind: a type that fits the shape, as :func:`plan` returns it.
        shape: of the weight.
        dtype: the load dtype: of unquantised weights and of AFQ's scales.
        group_size: of AFQ or HQQ; 64 if None.
    """
    scales = DType.of_torch(dtype)
    if scales is None or _record_of(kind).UNQUANTISED:
        scales = _load_dtype(dtype)
    return planned(kind, shape, scales, group_size=group_size)


def _load_dtype(dtype: torch.dtype) -> DType:
    stored = DType.of_torch(dtype)
    if stored not in LOAD_DTYPES:
        expected = ", ".join(d.torch_name for d in LOAD_DTYPES)
        raise UnsupportedError("not a dtype that weights are loaded as", field="dtype", expected=expected, got=dtype)
    return stored


def quantize(
    weight: torch.Tensor | npt.NDArray[Any],
    kind: str | int,
    *,
    engine: Engine = "0.9",
    group_size: int | None = None,
    dtype: torch.dtype | None = None,
    effort: EffortName = "engine",
    importance: torch.Tensor | npt.ArrayLike | None = None,
    hessian: torch.Tensor | npt.ArrayLike | None = None,
    module: str | None = None,
    on_fallback: Callable[[Fallback], None] | None = None,
) -> QuantizedTensor:
    """Quantise a weight to the engine's bytes, or better.

    The weight is rounded to its load dtype (to nearest, ties to even), widened to float32 and quantised.  It is not
    modified.  Of two things the bytes are not the engine's: the sign of a zero in five fields (``m`` of Q4_1 and Q5_1,
    ``dmin`` of Q4K and Q5K, AFQ's biases), where the engine's releases disagree; and Q3K as the 0.6.0 wheel writes it,
    which overlooks sub-block 0 in its search for the largest scale if that scale is negative.

    Args:
        weight: float32, float16 or bfloat16 ``[out, in]`` or ``[experts, out, in]``, on the CPU, all finite; or a numpy
            array of float32 or float16, which need not be writable.
        kind: an ISQ name (:func:`kinds`); a number of bits (:func:`automatic_kinds`); ``unquant``; or ``hqq1``,
            ``hqq2``, ``hqq3``, which the engine reads and never writes.
        engine: whose rules: the code of Q8K's largest element (-128 before 0.9, -127 since) and what is done with
            shapes that do not fit (the table of :mod:`uqff.quantization.types`).
        group_size: of AFQ (32, 64, 128) or HQQ; 64 if None.
        dtype: the load dtype; the weight's own if None.
        effort: ``engine``: the engine's bytes; it uses importance for Q2K to Q6K and no other type. ``best``: codes and
            scales of least squared error in the same format, each error weighted with the importance of its input; no
            block is worse than the engine's without importance. ``calibrated``: the same with error feedback along the
            inputs, so that the answers of the layer are nearest to its own; it needs ``hessian``, and importance then
            says nothing more.
        importance: mean square of each input, ``[in]``, or ``[experts, in]``, see :func:`effort_of`.
        hessian: XᵀX of the inputs, ``[in, in]``, or ``[experts, in, in]``.
        module: name of the weight, for reports and errors.
        on_fallback: called if the weight is stored as another type than asked for. If None, a
            :class:`FallbackWarning` is issued.

    Returns:
        The record; its parts are new, but for ``unquant``, which shares the weight's memory if it can.

    Raises:
        FormatError: the weight holds, in its load dtype, a NaN or an infinity; the first one's position is named.
        ShapeError: the engine fails on that shape.
        UnsupportedError: a type, dtype, engine or group size that does not exist.

    >>> import numpy
    >>> weight = uqff.quantize(numpy.eye(256, dtype="f4"), "q4k")
    >>> weight.kind, weight.shape, weight.nbytes
    ('q4k', (256, 256), 36864)
    """
    name, floats = kind_name(kind), _floats(weight)
    loaded = Loaded(floats, floats.dtype if dtype is None else _load_dtype(dtype))
    with located(layer=module):
        resolved, reason = resolve(name, loaded.shape, engine, group_size=group_size)
        if resolved != name:
            _report(Fallback(module, name, resolved, loaded.shape, reason), on_fallback)
        chosen = effort_of(effort, importance, loaded.shape, hessian)
        # A type that is taken for another has groups of its own, if any.
        group_size = group_size if resolved == name else None
        return encode(loaded, resolved, engine=engine, group_size=group_size, effort=chosen)


def _floats(weight: Any) -> Floats:
    """A tensor as it is, an array as a view where there can be one."""
    import torch

    if isinstance(weight, torch.Tensor) and weight.layout is torch.strided:
        _load_dtype(weight.dtype)
        if weight.device.type != "cpu":
            raise UnsupportedError(
                "weights are quantised on the CPU", field="weight.device", expected="cpu", got=weight.device
            )
        return Floats.of_tensor(weight)
    if isinstance(weight, np.ndarray) and weight.dtype.kind == "f" and weight.itemsize in (2, 4):
        array = np.ascontiguousarray(weight, weight.dtype.newbyteorder("="))
        return Floats.of_bytes(array, DType.F16 if weight.itemsize == 2 else DType.F32, array.shape)
    raise UnsupportedError(
        "not a weight",
        field="weight",
        expected="a torch.Tensor, or a numpy array of float32 or float16; of a torch.nn.Linear, its weight",
        got=_described(weight),
    )


def _described(weight: Any) -> str:
    if isinstance(weight, np.ndarray):
        return f"an array of {weight.dtype}"
    layout = getattr(weight, "layout", None)
    return type(weight).__name__ if layout is None else f"a tensor of layout {layout}"


def _report(fallback: Fallback, on_fallback: Callable[[Fallback], None] | None) -> None:
    if on_fallback is None:
        warnings.warn(FallbackWarning(str(fallback)), stacklevel=3)
    else:
        on_fallback(fallback)


def __getattr__(name: str) -> Any:
    """``KINDS``, the ISQ names of the families that are known when it is asked for."""
    if name == "KINDS":
        return kinds()
    raise AttributeError(name)
