"""What the format can hold and the engine cannot load or run: declared here, told when a model is made.

:data:`RULES` has a line for each; :func:`limits_of` looks at the layers of a model, without their bytes, and gives
those that apply, with their layers.  ``uqff quantize``, ``migrate`` and ``convert`` say them of what they make
(``--strict`` refuses instead), ``uqff verify`` of what there is.

Many are about dtypes.  A bias is added, and a plain weight multiplied, in the dtype of the activations only, which a
user names (``dtype``) or leaves to the engine (``auto``): see :data:`AUTO`.

A rule says what it was seen with: ``[C]`` a released CPU client, ``[S]`` the source only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from uqff.codec.layer import Layer
from uqff.codes import DType, Version
from uqff.errors import UnsupportedError

__all__ = ["AUTO", "RULES", "EngineRule", "Limit", "limits_document", "limits_of", "refuse_limits"]

ACTIVATIONS: Final = (DType.F32, DType.BF16, DType.F16)
"""What activations can be."""

AUTO: Final = {0: {"a CPU": DType.F16, "a GPU": DType.BF16}, 1: {"a CPU": DType.F32, "a GPU": DType.BF16}}
"""What ``auto`` takes for the activations, by the major version of the format that is read.

Authority: 0.6.0 and 0.9.5 on a CPU [C]; mistral.rs v0.9.2, ``mistralrs-core/src/utils/normal.rs``
(``determine_auto_dtype_all``): on a GPU BF16, F16 where it has no BF16 [S].
"""


@dataclass(frozen=True)
class Limit:
    """Layers of a model that the engine cannot load or run, and why.

    Attributes:
        rule: name of the rule, for programs.
        what: what they have in common: ``biases of AFQ layers in F32``.
        problem: what becomes of it.
        layers: their names.
    """

    rule: str
    what: str
    problem: str
    layers: tuple[str, ...]

    def __str__(self) -> str:
        return f"{len(self.layers)} {self.what}: {self.problem}"


class Match(NamedTuple):
    """What a layer is that a rule is about.

    Attributes:
        what: in words, for several such layers.
        dtype: of what the rule is about, if it is about a dtype.
    """

    what: str
    dtype: DType | None = None


@dataclass(frozen=True)
class EngineRule:
    """A line of the engine's limits.

    Attributes:
        name: for programs; it stays.
        majors: major versions of the format whose readers have the limit.
        match: what a layer is that the rule is about, of the layer and the major version; None for any other layer.
        problem: what becomes of it; ``{dtype}`` is that of the match, ``{auto}`` what ``auto`` takes otherwise.
        seen: the authority.
    """

    name: str
    majors: tuple[int, ...]
    match: Callable[[Layer, int], Match | None]
    problem: str
    seen: str


def _manually_mapped_type(layer: Layer, major: int) -> Match | None:
    return Match(f"{layer.weight.kind} layers") if layer.weight.kind in layer.weight.MANUAL_MAPPING else None


def _stack(layer: Layer) -> Match | None:
    is_stack = len(layer.weight.shape) > 2
    return Match(f"stacks of {layer.weight.family.title} experts") if is_stack else None


def _unloaded_stack(layer: Layer, major: int) -> Match | None:
    return None if layer.weight.STACKS_LOAD else _stack(layer)


def _stack_not_on_cpu(layer: Layer, major: int) -> Match | None:
    return None if layer.weight.STACKS_RUN_ON_CPU else _stack(layer)


def _unloaded_type(layer: Layer, major: int) -> Match | None:
    return Match(f"{layer.weight.kind} layers") if layer.weight.kind in layer.weight.NOT_LOADED else None


def _biases(layer: Layer, dtype: DType) -> Match:
    return Match(f"biases of {layer.weight.family.title} layers in {dtype.name}", dtype)


def _unfit_bias(layer: Layer, major: int) -> Match | None:
    """A bias in a dtype in which no activations are, or not in the one in which the family's are added."""
    if layer.bias_part is None:
        return None
    stored, needed = layer.bias_part.dtype, layer.weight.BIAS.added.get(major)
    fits = stored is needed if needed is not None else stored in ACTIVATIONS
    return None if fits else _biases(layer, stored)


def _pinned_bias(layer: Layer, major: int) -> Match | None:
    """A bias that can be added to activations of its own dtype only."""
    bias = layer.bias_part
    if bias is None or major in layer.weight.BIAS.added or bias.dtype not in ACTIVATIONS:
        return None
    return _biases(layer, bias.dtype)


def _unfit_weight(layer: Layer, major: int) -> Match | None:
    """A plain weight in a dtype in which no activations are."""
    plain = layer.weight.plain
    dtype = None if plain is None else plain.dtype
    return None if dtype is None or dtype in ACTIVATIONS else Match(f"unquantised layers in {dtype.name}", dtype)


def _pinned_weight(layer: Layer, major: int) -> Match | None:
    """A plain weight that can be multiplied with activations of its own dtype only.

    GGUF's are cast when they are loaded; but those in F32 are refused if activations are narrower.
    """
    plain = layer.weight.plain
    dtype = None if plain is None else plain.dtype
    if dtype not in ACTIVATIONS or layer.weight.plain_is_cast(major):
        return None
    return Match(f"{layer.weight.kind} layers in {dtype.name}", dtype)


ONE_DTYPE: Final = "they run with activations in {dtype} only, and auto takes {auto}"

RULES: Final = (
    EngineRule(
        "type-not-loaded",
        (0, 1),
        _unloaded_type,
        "no release loads this type, though all write it",
        "0.6.0, 0.8.12, 0.8.23, 0.9.5: 'quantized type Q8K is not supported yet' [C]",
    ),
    EngineRule(
        "plain-blocks",
        (0,),
        _manually_mapped_type,
        "they load with manual device mapping only",
        "0.6.0: 'Expected valid GGML ISQ type' [C]",
    ),
    EngineRule(
        "stack-not-loaded",
        (1,),
        _unloaded_stack,
        "no release loads weights of three dimensions of this family",
        "0.8.23 writes them and does not load them, 0.9.5 does neither [C]",
    ),
    EngineRule(
        "experts-not-on-cpu",
        (1,),
        _stack_not_on_cpu,
        "they do not run on a CPU",
        "0.9.5: 'moe experts forward' [C]",
    ),
    EngineRule(
        "bias-not-added",
        (0, 1),
        _unfit_bias,
        "no release can add them: it loads the model and then fails",
        "0.6.0, 0.9.5: 'dtype mismatch in add' [C]; uqff.families.biases",
    ),
    EngineRule(
        "bias-in-one-dtype",
        (0, 1),
        _pinned_bias,
        ONE_DTYPE,
        "0.9.5: 'dtype mismatch in add' [C]; uqff.families.biases",
    ),
    EngineRule(
        "weight-not-multiplied",
        (0, 1),
        _unfit_weight,
        "no release computes with them",
        "follows from the next",
    ),
    EngineRule(
        "weight-in-one-dtype",
        (0, 1),
        _pinned_weight,
        ONE_DTYPE,
        "0.9.5: 'dtype mismatch in matmul'; wider ones: 'more than its dense estimate' [C]",
    ),
)
"""All that is about single layers; beside it, layers that run one by one may not run together (``several-dtypes``)."""


def limits_of(layers: Mapping[str, Layer], version: Version) -> list[Limit]:
    """What of a model the engine cannot load or run: a line for each rule and kind of layer, in the order of the rules.

    Args:
        layers: by name, which may lack their bytes.
        version: of the format.
    """
    limits = []
    for rule in (rule for rule in RULES if version.major in rule.majors):
        found: dict[Match, list[str]] = {}
        for name, layer in layers.items():
            match = rule.match(layer, version.major)
            if match is not None:
                found.setdefault(match, []).append(name)
        for match, names in found.items():
            limits.append(Limit(rule.name, match.what, _problem(rule, match, version.major), tuple(names)))
    return limits + _of_several_dtypes(layers, version.major)


def _problem(rule: EngineRule, match: Match, major: int) -> str:
    auto = [f"{dtype.name} on {where}" for where, dtype in AUTO[major].items() if dtype is not match.dtype]
    return rule.problem.format(dtype="" if match.dtype is None else match.dtype.name, auto=" and ".join(auto))


def _of_several_dtypes(layers: Mapping[str, Layer], major: int) -> list[Limit]:
    """Layers that run with one dtype of activations each, and not with the same."""
    pinned: dict[str, set[DType]] = {}
    for name, layer in layers.items():
        matches = _pinned_bias(layer, major), _pinned_weight(layer, major)
        dtypes = {match.dtype for match in matches if match is not None and match.dtype is not None}
        if dtypes:
            pinned[name] = dtypes
    wanted = [dtype.name for dtype in ACTIVATIONS if any(dtype in dtypes for dtypes in pinned.values())]
    if len(wanted) < 2:
        return []
    problem = "no activations suit all of them, so the model never runs"
    return [Limit("several-dtypes", f"layers, each for one of {', '.join(wanted)}", problem, tuple(pinned))]


def refuse_limits(limits: Iterable[Limit]) -> None:
    """Refuse a model that the engine could not load or run.

    Raises:
        UnsupportedError: there is a limit; all are told.
    """
    lines = list(dict.fromkeys(map(str, limits)))
    if lines:
        raise UnsupportedError(
            "the engine could not load or run this", expected="a model without limits (strict)", got="; ".join(lines)
        )


def limits_document(limits: Iterable[Limit]) -> list[dict[str, Any]]:
    """Limits as JSON values."""
    return [
        {"rule": each.rule, "what": each.what, "problem": each.problem, "layers": list(each.layers)} for each in limits
    ]
