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

import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from uqff.codes import DType, Version
from uqff.errors import ShapeError, UnsupportedError, UqffError
from uqff.families import QuantizedTensor
from uqff.families.gguf.blocks import QK, QK_K, block_type_of_kind
from uqff.numerics.floats import Floats
from uqff.numerics.packing import PLANES
from uqff.quantization.encode import AFQ_BITS, HQQ_BITS, Loaded, encode, planned

if TYPE_CHECKING:
    import torch

__all__ = [
    "AUTOMATIC",
    "ENGINES",
    "KINDS",
    "Engine",
    "Fallback",
    "FallbackWarning",
    "Resolution",
    "kind_name",
    "outline",
    "plan",
    "promoted",
    "quantize",
    "resolve",
]

Engine: TypeAlias = Literal["0.6", "0.8", "0.9"]

ENGINES: Final[tuple[Engine, ...]] = ("0.6", "0.8", "0.9")
"""The engine generations whose rules are known: mistral.rs 0.6.0, 0.8.0 and 0.9.x."""

LEGACY: Final = {"q2k": "q4_0", "q3k": "q4_0", "q4k": "q4_1", "q5k": "q5_0", "q6k": "q5_1", "q8k": "q8_1"}
"""What a K type falls back to where rows are whole blocks of 32, not of 256."""

LEGACY_KINDS: Final = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q8_1")
AFQ_GROUPS: Final = (32, 64, 128)

KINDS: Final = (*LEGACY_KINDS, *LEGACY, "hqq4", "hqq8", "fp8", *AFQ_BITS, "f8q8", "mxfp4")
"""The 22 ISQ names."""

AUTOMATIC: Final = {2: "q2k", 3: "q3k", 4: "q4k", 5: "q5k", 6: "q6k", 8: "q8_0"}
"""What the engine takes on a CPU for a bare number of bits."""

K_TYPE: Final = re.compile(r"(q[0-9])_k(_[a-z]+)?")
"""How llama.cpp writes a K type, alone or as the mixture that is mostly of it: ``q4_k``, ``q4_k_m``."""

PROMOTED: Final = {
    **dict.fromkeys(("afq2", "afq3", "afq4"), "afq6"),
    **dict.fromkeys(("afq6", "afq8"), "afq8"),
    **dict.fromkeys(("q2k", "q3k", "q4k", "q4_0", "q4_1"), "q6k"),
    **dict.fromkeys(("q5k", "q6k", "q8k", "q5_0", "q5_1", "q8_0", "q8_1"), "q8_0"),
}
"""What a head or an embedding gets in place of the default type, since UQFF 1.2; other types stay.

Authority: mistral.rs v0.9.2, ``mistralrs-quant/src/lib.rs`` (``promote_for_sensitive_tensor``).
"""

GROUP: Final = 64
"""Weights per group of AFQ and HQQ unless another size is asked for; the engine knows no other."""

SINCE: Final = {"f8q8": "0.8", "mxfp4": "0.8"}
"""Types that older engines do not have."""

UNQUANT_SINCE: Final = Version(1, 1, 0)
"""The first 1.x that has unquantised layers: engine 0.8.23, which writes it, has them in place of AFQ; 0.8.12 fails."""

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
    text = str(kind).lower() if not isinstance(kind, bool) else repr(kind)
    if text.isdecimal() and int(text) in AUTOMATIC:
        return AUTOMATIC[int(text)]
    if text in KINDS or text in HQQ_BITS or text == "unquant":
        return text
    known = (*KINDS, "unquant", *map(str, AUTOMATIC))
    text = K_TYPE.sub(r"\1k", text)
    meant = [text] if text in known else get_close_matches(text[:20], KINDS, 1)
    hint = f"; did you mean {meant[0]}?" if meant else ""
    raise UnsupportedError(f"unknown type{hint}", field="kind", expected=f"one of {', '.join(known)}", got=kind)


def promoted(kind: str) -> str:
    """The type of a head or an embedding where the default is ``kind``: see :data:`PROMOTED`."""
    return PROMOTED.get(kind, kind)


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


class Resolution(NamedTuple):
    """The type a weight is stored as, and the reason if that is not the type asked for (else empty)."""

    kind: str
    reason: str


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
    return Resolution(*_resolve(kind_name(kind), tuple(shape), engine, group_size, version))


def _resolve(
    kind: str, shape: tuple[int, ...], engine: Engine, group_size: int | None, version: Version | None
) -> tuple[str, str]:
    if engine not in ENGINES:
        raise UnsupportedError("unknown engine", field="engine", expected=f"one of {', '.join(ENGINES)}", got=engine)
    if kind in SINCE and ENGINES.index(engine) < ENGINES.index(SINCE[kind]):
        raise UnsupportedError(f"the engine had no {kind} yet", field="engine", expected=SINCE[kind], got=engine)
    if len(shape) not in (2, 3) or 0 in shape:
        raise ShapeError(
            "not a matrix, nor a stack of them",
            field="shape",
            expected="[out, in] or [experts, out, in]",
            got=list(shape),
        )
    group = _group_size(kind, group_size)
    if block_type_of_kind(kind) is not None:
        return _resolve_ggml(kind, shape, engine)
    if kind in AFQ_BITS and shape[-1] % group:
        if engine == "0.6" or (engine == "0.8" and (version is None or version < UNQUANT_SINCE)):
            raise _row_misfit(kind, group, shape)
        return "unquant", f"the last dimension is not a multiple of {group}"
    if kind in HQQ_BITS and math.prod(shape) % group:
        size = math.prod(shape)
        raise _misfit(kind, f"a number of weights in multiples of {group}", f"{size} of {list(shape)}")
    if kind == "mxfp4" and len(shape) != 2:
        raise _misfit(kind, "a matrix: the engine quantises no stack of experts to it", list(shape))
    if kind == "mxfp4" and shape[-1] % 32:
        raise _row_misfit(kind, 32, shape)
    return kind, ""


def _resolve_ggml(kind: str, shape: tuple[int, ...], engine: Engine) -> tuple[str, str]:
    last = shape[-1]
    if last % QK:
        if engine == "0.6":
            raise _row_misfit(kind, QK, shape)
        return "f32", f"the last dimension is not a multiple of {QK}"
    if kind in LEGACY and last % QK_K:
        return LEGACY[kind], f"the last dimension is not a multiple of {QK_K}"
    return kind, ""


def _row_misfit(kind: str, unit: int, shape: tuple[int, ...]) -> ShapeError:
    return _misfit(kind, f"a last dimension in multiples of {unit}", f"{shape[-1]} of {list(shape)}")


def _misfit(kind: str, expected: str, got: object) -> ShapeError:
    return ShapeError(f"the shape cannot be {kind}", field="shape", expected=expected, got=got)


def _group_size(kind: str, group_size: int | None) -> int:
    if group_size is None:
        return GROUP
    if kind in AFQ_BITS:
        if group_size in AFQ_GROUPS:
            return group_size
        expected = ", ".join(map(str, AFQ_GROUPS))
    elif kind in HQQ_BITS:
        codes = 1 if kind == "hqq3" else PLANES[HQQ_BITS[kind]]
        if group_size >= 1 and group_size % codes == 0:
            return group_size
        expected = f"a multiple of {codes}"
    else:
        expected = f"none: {kind} has no group size"
    raise UnsupportedError("group size", field="group_size", expected=expected, got=group_size)


def outline(kind: str, shape: Sequence[int], dtype: torch.dtype, *, group_size: int | None = None) -> QuantizedTensor:
    """The record that :func:`quantize` will make, on the meta device: all sizes, no payload.

    Args:
        kind: a type that fits the shape, as :func:`plan` returns it.
        shape: of the weight.
        dtype: the load dtype: of unquantised weights and of AFQ's scales.
        group_size: of AFQ or HQQ; 64 if None.
    """
    scales = DType.of_torch(dtype)
    if scales is None or kind == "unquant":
        scales = _load_dtype(dtype)
    return planned(kind, tuple(shape), scales, _group_size(kind, group_size)).as_record()


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
    module: str | None = None,
    on_fallback: Callable[[Fallback], None] | None = None,
) -> QuantizedTensor:
    """Quantise a weight to the engine's bytes.

    The weight is rounded to its load dtype (to nearest, ties to even), widened to float32 and quantised.  It is not
    modified.  Of two things the bytes are not the engine's: the sign of a zero in five fields (``m`` of Q4_1 and Q5_1,
    ``dmin`` of Q4K and Q5K, AFQ's biases), where the engine's releases disagree; and Q3K as the 0.6.0 wheel writes it,
    which overlooks sub-block 0 in its search for the largest scale if that scale is negative.

    Args:
        weight: float32, float16 or bfloat16 ``[out, in]`` or ``[experts, out, in]``, on the CPU, all finite; or a numpy
            array of float32 or float16, which need not be writable.
        kind: an ISQ name (:data:`KINDS`); a number of bits (:data:`AUTOMATIC`); ``unquant``; or ``hqq1``, ``hqq2``,
            ``hqq3``, which the engine reads and never writes.
        engine: whose rules: the code of Q8K's largest element (-128 before 0.9, -127 since) and what is done with
            shapes that do not fit (the table of :mod:`uqff.quantization.types`).
        group_size: of AFQ (32, 64, 128) or HQQ; 64 if None.
        dtype: the load dtype; the weight's own if None.
        module: name of the weight, for reports and errors.
        on_fallback: called if the weight is stored as another type than asked for. If None, a
            :class:`FallbackWarning` is issued.

    Returns:
        The record; its tensors are new, but for ``unquant``, which shares the weight's memory if it can.

    Raises:
        FormatError: the weight holds, in its load dtype, a NaN or an infinity; the first one's position is named.
        ShapeError: the engine fails on that shape.
        UnsupportedError: a type, dtype, engine or group size that does not exist.
    """
    name = kind_name(kind)
    floats = _floats(weight)
    loaded = Loaded(floats, floats.dtype if dtype is None else _load_dtype(dtype))
    try:
        resolved, reason = resolve(name, loaded.shape, engine, group_size=group_size)
        if resolved != name:
            _report(Fallback(module, name, resolved, loaded.shape, reason), on_fallback)
        return encode(loaded, resolved, engine=engine, group_size=_group_size(name, group_size)).as_record()
    except UqffError as error:
        raise error.within(layer=module) from None


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
