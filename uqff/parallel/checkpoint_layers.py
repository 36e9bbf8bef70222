"""Layers and experts of a checkpoint before they are loaded: which tensors, in which of the forms that experts have.

::

    experts.3.up_proj [inter, hidden]            a layer for each expert and projection
    experts.up_proj [E, inter, hidden]           a stack for each projection; also switch_mlp.up_proj, MLX's
    experts.gate_up_proj [E, 2·inter, hidden]    gate and up in one stack; or transposed, which only plain numbers and
                                                 FP8 with scales can be; those of gpt-oss take turns

Authority: mistral.rs v0.8.0, ``mistralrs-quant/src/distributed/layers.rs`` (``PackedExperts::new``,
``FusedExperts::new``).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from uqff.codec.layer import Layer
from uqff.codec.turns import split_gate_up
from uqff.errors import MissingError, ShapeError, UnsupportedError, located
from uqff.families import QuantizedTensor
from uqff.models.architectures import architecture_of
from uqff.parallel.partition import PROJECTIONS, fused_convention
from uqff.parallel.shard import Shard, Slice
from uqff.parallel.unloaded import Unloaded, UnloadedExperts

if TYPE_CHECKING:
    from uqff.checkpoints import Checkpoint

__all__ = [
    "GATE_UP",
    "PlainExpertsWarning",
    "beside",
    "experts_of",
    "halves",
    "layer_of_checkpoint",
    "names_of_experts",
    "split_halves",
    "take_turns",
]

GATE_UP: Final = "gate_up_proj"
SWITCH: Final = "switch_mlp"
"""What MLX calls the module of the experts, beside which there is no ``experts``."""


class PlainExpertsWarning(UserWarning):
    """Experts that the configuration says are FP8 have no scales and are plain numbers: they are taken as they are."""


def layer_of_checkpoint(checkpoint: Checkpoint, path: str, name: str | None = None) -> Unloaded:
    """A layer of a checkpoint; only headers are read.

    Args:
        checkpoint: holds it.
        path: of its weight.
        name: what rules of a recipe call it: of an expert, the first one's path.

    Raises:
        MissingError: there is none; near names are listed.
        UqffError: it is not valid.
    """
    meta = checkpoint.meta(path)

    def take(cut: Slice) -> Layer:
        whole = cut.length == meta.weight.shape[cut.dim]
        return checkpoint.layer(path, None if whole else Shard.offset(*cut))

    return Unloaded(path, meta, take, partial(_release, checkpoint, path), name or path)


def _release(checkpoint: Checkpoint, path: str) -> None:
    for name in checkpoint.companions(path).names.values():
        checkpoint.tensors.release(name)


def beside(path: str) -> tuple[str, ...]:
    """Where experts may be that are not under their path: MLX's."""
    parent, _, last = path.rpartition(".")
    return (f"{parent}.{SWITCH}" if parent else SWITCH,) if last == "experts" else ()


def _stacked_at(checkpoint: Checkpoint, path: str) -> str | None:
    """Where there is a stack for each projection."""
    for place in (path, *beside(path)):
        if f"{place}.{PROJECTIONS[0][0]}" in checkpoint.paths:
            return place
    return None


def names_of_experts(
    checkpoint: Checkpoint,
    path: str,
    count: int,
    single: list[list[str]] | None = None,
    joined: tuple[str, str] | None = None,
) -> list[list[str]]:
    """The paths that the weights of each projection have in the checkpoint; none if it has no such experts.

    Args:
        checkpoint: holds them.
        path: of the experts.
        count: how many there are.
        single: of each projection, the paths of the layer of each expert, if they are unusual.
        joined: the paths of gate and up in one, and of down, likewise.
    """
    gate_up, down = joined or (f"{path}.{GATE_UP}", f"{path}.down_proj")
    if gate_up in checkpoint.paths:
        return [[gate_up], [gate_up], [down]]
    place = _stacked_at(checkpoint, path)
    if place is not None:
        return [[f"{place}.{name}"] for name, _ in PROJECTIONS]
    return single or [[f"{path}.{expert}.{name}" for expert in range(count)] for name, _ in PROJECTIONS]


def experts_of(
    checkpoint: Checkpoint,
    path: str,
    count: int,
    single: list[list[str]] | None = None,
    joined: tuple[str, str] | None = None,
) -> list[UnloadedExperts]:
    """Gate, up and down projections; only headers are read.

    Args:
        checkpoint: holds them.
        path: of the experts, ``model.layers.0.mlp.experts``.
        count: how many there are.
        single: see :func:`names_of_experts`.
        joined: likewise.

    Raises:
        MissingError: there are none.
        ShapeError: gate, up and down do not fit each other.
        UnsupportedError: they are transposed, in a type that cannot be turned.
        UqffError: a layer is not valid.
    """
    names = names_of_experts(checkpoint, path, count, single, joined)
    _tell_if_plain(checkpoint, [each for layers in names for each in layers], path)
    if names[0] == names[1]:
        return _joined(checkpoint, path, names[0][0], names[2][0])
    if _stacked_at(checkpoint, path) is not None:
        return [layer_of_checkpoint(checkpoint, each[0]) for each in names]
    if names[0][0] not in checkpoint.paths:
        raise MissingError(
            "no experts",
            file=str(checkpoint.path),
            layer=path,
            expected=f"{names[0][0]}, {path}.{PROJECTIONS[0][0]} or {path}.{GATE_UP}",
        )
    return [[layer_of_checkpoint(checkpoint, each, layers[0]) for each in layers] for layers in names]


def _tell_if_plain(checkpoint: Checkpoint, names: list[str], path: str) -> None:
    """Warn, once, of experts that the configuration calls quantised (the engine: FP8) and that are not."""
    method = checkpoint.method
    if method is None or method.leaves_plain(path):
        return
    found = [name for name in names if name in checkpoint.paths and not method.leaves_plain(name)]
    if found and all(checkpoint.meta(name).weight.plain is not None for name in found):
        said = method.NAMES[0].upper()
        warnings.warn(
            PlainExpertsWarning(f"{path}: the configuration says {said}, the experts have plain numbers"), stacklevel=2
        )


def split_halves(gate_up: Unloaded, down: Unloaded) -> tuple[Unloaded, Unloaded, Unloaded]:
    """Gate, up and down of a stack ``[E, 2·inter, hidden]``, gates before ups, and the other."""
    inter = gate_up.weight.shape[1] // 2
    gate, up = (gate_up.narrow(1, at, inter) for at in (0, inter))
    return gate, up, down


def _joined(checkpoint: Checkpoint, path: str, *names: str) -> list[UnloadedExperts]:
    gate_up, down = (layer_of_checkpoint(checkpoint, name) for name in names)
    if checkpoint.paths[gate_up.key].takes_turns(checkpoint.companions(gate_up.key)):
        return [*halves(gate_up, path), down]
    turned_gate_up, turned_down = fused_convention(gate_up.weight.shape, down.weight.shape, layer=path)
    fused = _turned(gate_up) if turned_gate_up else gate_up
    if take_turns(checkpoint.config):
        return [*halves(fused, path), _turned(down) if turned_down else down]
    inter = fused.weight.shape[1] // 2
    gate, up = (fused.narrow(1, at, inter, f"{path}.{name}") for name, at in (("gate_proj", 0), ("up_proj", inter)))
    return [gate, up, _turned(down) if turned_down else down]


def take_turns(config: Mapping[str, Any]) -> bool:
    """Whether gates and ups take turns in the stacks of an architecture, whatever form those have."""
    try:
        return architecture_of(config).takes_turns
    except UnsupportedError:
        return False


def halves(fused: Unloaded, path: str) -> list[Unloaded]:
    """Gate and up of a stack whose outputs take turns.

    Args:
        fused: the stack.
        path: of the experts.
    """
    return [_half(fused, f"{path}.{name}", which) for which, name in enumerate(("gate_proj", "up_proj"))]


def _half(fused: Unloaded, key: str, which: int) -> Unloaded:
    with located(layer=key):
        meta = split_gate_up(fused.meta)[which]

    def take(cut: Slice) -> Layer:
        inner = Slice(1, 2 * cut.start, 2 * cut.length) if cut.dim == 1 else cut
        return split_gate_up(fused.take(inner))[which]

    return replace(fused, key=key, meta=meta, take=take)


def _turned(source: Unloaded) -> Unloaded:
    """A stack whose matrices are transposed, the other way round."""
    bias = source.meta.bias_part
    turned = _transposed(source.meta.weight, source.key)
    if bias is not None and len(bias.shape) > 1 and bias.shape[-1] != turned.shape[1]:
        expected = f"[{turned.shape[0]}, {turned.shape[1]}]"
        raise ShapeError("bias does not fit weight", layer=source.key, expected=expected, got=list(bias.shape))

    def take(cut: Slice) -> Layer:
        dim = (0, 2, 1)[cut.dim]
        # A bias goes with the outputs, which are the last dimension here.
        part = source.take(Slice(dim, cut.start, cut.length))
        weight = _transposed(part.weight, source.key)
        if bias is None:
            return Layer(weight)
        whole = source.take(source.whole()).bias_part
        return Layer(weight, Layer(turned, whole).narrow(*cut).bias_part)

    return replace(source, meta=Layer(turned, bias), take=take)


def _transposed(weight: QuantizedTensor, key: str) -> QuantizedTensor:
    """A stack with outputs and inputs exchanged; new memory.

    Raises:
        UnsupportedError: the blocks of the type lie along the inputs.
    """
    made = weight.transposed()
    if made is None:
        expected = "outputs before inputs"
        raise UnsupportedError(f"{weight.kind} weights cannot be transposed", layer=key, expected=expected)
    return made
