"""Adapters on a model: which of its weights each changes, and by what.

Several are added one after the other, each with a weight of its own::

    W' = W + (B1 · A1) · scale1 + (B2 · A2) · scale2 + ...        scale: weight * alpha / r

A module of an adapter is a weight of the same path.  Where modules of ``transformers`` have other paths than tensors of
checkpoints, both are found: ``model.language_model`` is ``language_model.model``, ``mlp`` of Mixtral is
``block_sparse_moe``, and ``gate_proj`` of its experts is ``w1``.  Experts are single modules, or a stack whose factors
are cut (:mod:`uqff.lora.adapter`)::

    experts.gate_up_proj [E, 2 * inner, hidden]    rows of B: the gate's, then those of up; or in turns (gpt-oss)
    experts.down_proj    [E, hidden, inner]

An adapter is applied whole or refused: there is a weight for each of its factors.  Weights that its configuration names
and it has no factors for stay as they are, as with PEFT; they are told.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Final, TypeAlias, Union

from uqff.container.closing import Closing
from uqff.errors import FormatError, ShapeError, UnsupportedError
from uqff.lora.adapter import Adapter, Factors, open_adapter
from uqff.lora.low_rank import LowRank, merged

if TYPE_CHECKING:
    from typing_extensions import Self

    from uqff.simd.floats import Floats

__all__ = ["Adapters", "Applied", "AppliedAdapter", "Lora", "LoraWarning", "ModelWeights", "missing_text"]

Lora: TypeAlias = Union[str, "os.PathLike[str]", Adapter]
"""An adapter, open or as a directory."""

ALIASES: Final = (("language_model.model.", "model.language_model."), (".block_sparse_moe.", ".mlp."))
"""Parts of paths: in checkpoints, and in the modules of newer releases of transformers."""

PARTS: Final = {"gate_up_proj": ("gate_proj", "up_proj")}
"""Tensors of experts that are several projections along the outputs, one behind the other or in turns."""

HEAD: Final = "lm_head"


@dataclass
class ModelWeights:
    """The matrices of a model that an adapter may change.

    Attributes:
        shapes: ``(out, in)`` of each, by its path; experts singly.
        stacks: the paths of the experts of a projection in order, by the path of the projection.
        layers: paths of those that an adapter should have factors for, if its configuration names them.
        linear: whether all are ``[out, in]``, whatever a configuration says.
        tied: whether the head is the embedding's matrix.
        turns: whether gates and ups take turns where they are one tensor.
        names: what else weights are called, to their paths.
    """

    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    stacks: dict[str, list[str]] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    linear: bool = True
    tied: bool = False
    turns: bool = False
    names: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._aliases: dict[str, str] | None = None

    def find(self, path: str) -> str | None:
        """The path of a weight, or of a stack, by what an adapter calls it."""
        if path in self.shapes or path in self.stacks:
            return path
        if self._aliases is None:
            found = {alias: known for known in (*self.shapes, *self.stacks) for alias in aliases(known)}
            self._aliases = found | self.names
        return self._aliases.get(path)


def aliases(path: str) -> Iterator[str]:
    """Other paths of a module."""
    for ours, theirs in ALIASES:
        if ours in path:
            yield path.replace(ours, theirs, 1)


class Adapters(Closing):
    """Open adapters with their weights, in order.

    Attributes:
        each: adapter and weight.
    """

    def __init__(self, each: Sequence[tuple[Adapter, float]], owned: Sequence[Adapter] = ()) -> None:
        self.each = list(each)
        self._owned = list(owned)

    @classmethod
    def open(cls, given: Lora | tuple[Lora, float] | Sequence[Lora | tuple[Lora, float]] | None) -> Self:
        """Open what is given: one adapter or several, each alone or with its weight.

        Raises:
            UqffError: one is not valid, or a weight is not a finite number.
            OSError: one is not there, or cannot be read.
        """
        each: list[tuple[Adapter, float]] = []
        owned: list[Adapter] = []
        try:
            for lora, weight in _pairs(given):
                if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not math.isfinite(weight):
                    raise FormatError(
                        "weight of an adapter", field="lora", expected="a finite number", got=repr(weight)
                    )
                adapter = lora if isinstance(lora, Adapter) else open_adapter(lora)
                if adapter is not lora:
                    owned.append(adapter)
                each.append((adapter, float(weight)))
        except BaseException:
            for adapter in owned:
                adapter.close()
            raise
        return cls(each, owned)

    def __bool__(self) -> bool:
        return bool(self.each)

    def applied(self, weights: ModelWeights) -> Applied:
        """The adapters on a model.

        Raises:
            FormatError: an adapter has factors for no weight.
            ShapeError: factors do not fit the weight.
            UnsupportedError: factors of a head that is the embedding.
        """
        made = Applied()
        for adapter, weight in self.each:
            changed = 0
            for factors in adapter.factors:
                for path, delta in _deltas(adapter, factors, weight, weights):
                    made.deltas.setdefault(path, []).append(delta)
                    changed += 1
            made.adapters.append(AppliedAdapter(adapter, weight, changed, _missing(adapter, weights)))
        return made

    def close(self) -> None:
        """Release the files of those that were opened here."""
        for adapter in self._owned:
            adapter.close()


class LoraWarning(UserWarning):
    """An adapter has no factors for layers that its configuration names: they stay as they are."""


def missing_text(path: object, missing: Sequence[str]) -> str:
    """A sentence about the layers that an adapter has no factors for; empty if there are none."""
    if not missing:
        return ""
    layers = f"{len(missing)} layers" if len(missing) > 1 else "a layer"
    return f"{path} has no factors for {layers} that its configuration names, such as {missing[0]}"


@dataclass(frozen=True)
class AppliedAdapter:
    """What an adapter does to a model.

    Attributes:
        adapter: that it is.
        weight: that it was given.
        matrices: how many it changes, experts counted singly.
        missing: paths of layers that its configuration names and it has no factors for.
    """

    adapter: Adapter
    weight: float
    matrices: int
    missing: list[str]

    @property
    def told(self) -> str:
        """What is missing, in words; empty if nothing is."""
        return missing_text(self.adapter.path, self.missing)


@dataclass
class Applied:
    """What adapters do to a model.

    Attributes:
        deltas: of each weight that is changed, by its path, in order.
        adapters: each, in order.
    """

    deltas: dict[str, list[LowRank]] = field(default_factory=dict)
    adapters: list[AppliedAdapter] = field(default_factory=list)

    def __contains__(self, path: object) -> bool:
        return path in self.deltas

    def description(self) -> list[object]:
        """Which adapters these are, as JSON values."""
        return [[str(each.adapter.path.resolve()), each.weight, each.adapter.stamps()] for each in self.adapters]

    def merged(self, path: str, weight: Floats) -> Floats:
        """A weight with what is added to it, in float32; itself if that is nothing.

        Raises:
            FormatError: the sum is not finite.
        """
        return merged(weight, self.deltas.get(path, ()), layer=path)


def _pairs(given: object) -> Iterable[tuple[Lora, float]]:
    if given is None:
        return
    if isinstance(given, (str, os.PathLike, Adapter)):
        yield given, 1.0
        return
    if not isinstance(given, Sequence):
        raise UnsupportedError("not an adapter", field="lora", expected="directories or adapters", got=repr(given))
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], (int, float)):
        yield given
        return
    for each in given:
        if isinstance(each, tuple) and len(each) == 2:
            yield each
        elif isinstance(each, (str, os.PathLike, Adapter)):
            yield each, 1.0
        else:
            expected = "an adapter, its directory, or a pair of either and a weight"
            raise UnsupportedError("not an adapter", field="lora", expected=expected, got=repr(each))


def _deltas(adapter: Adapter, factors: Factors, weight: float, weights: ModelWeights) -> Iterator[tuple[str, LowRank]]:
    """The matrices that factors change, with their deltas."""
    path = weights.find(factors.path)
    if factors.parameters and (factors.key is None or path not in weights.shapes):
        yield from _of_stack(adapter, factors, weight, weights)
        return
    if path is None or path not in weights.shapes:
        raise _homeless(adapter, factors, weights)
    delta = adapter.low_rank(factors, weight)
    shape = weights.shapes[path]
    is_turned = adapter.config.fan_in_fan_out and not weights.linear
    if delta.shape != shape or is_turned:
        if delta.T.shape != shape or not is_turned:
            raise _misfit(adapter, factors, shape, delta.shape)
        delta = delta.T
    yield path, delta


def _of_stack(
    adapter: Adapter, factors: Factors, weight: float, weights: ModelWeights
) -> Iterator[tuple[str, LowRank]]:
    """The experts that the factors of a stack change: of the tensor whose shape they fit."""
    seen = []
    for name in factors.parameters:
        whole = weights.find(f"{factors.path}.{name}") in weights.stacks
        parts = (name,) if whole else PARTS.get(name, (name,))
        projections = [weights.find(f"{factors.path}.{part}") for part in parts]
        stacks = [weights.stacks[each] for each in projections if each in weights.stacks]
        if len(stacks) != len(projections):
            continue
        experts, rows = len(stacks[0]), [weights.shapes[stack[0]][0] for stack in stacks]
        shape = (experts, sum(rows), weights.shapes[stacks[0][0]][1])
        size = adapter.config.size(f"{factors.path}.{name}", weight)
        seen.append(f"{name} {list(shape)} of rank {size.rank}")
        split = _split(factors, size.rank, shape)
        if split is None:
            continue
        origin = adapter.origin(factors)
        for expert, (b, a) in enumerate(split):
            start, step = 0, len(stacks) if weights.turns else 1
            for at, (stack, count) in enumerate(zip(stacks, rows, strict=True)):
                held = slice(at, None, step) if weights.turns else slice(start, start + count)
                yield stack[expert], LowRank(b[held], a, size.scale, origin)
                start += count
        return
    if not seen:
        raise _homeless(adapter, factors, weights)
    raise _misfit(adapter, factors, " or ".join(seen), [list(factors.b.shape), list(factors.a.shape)])


def _split(factors: Factors, rank: int, shape: tuple[int, int, int]) -> list[tuple[Floats, Floats]] | None:
    """B and A of each expert; None if they do not fit a stack of that shape.

    PEFT before it knew ``[experts, out, in]`` took every stack for ``[experts, in, out]``: its B is our A turned.
    """
    (experts, out, inputs), (b, a) = shape, (factors.b, factors.a)
    if a.shape[0] != experts * rank:
        return None
    firsts = a.bits.reshape(experts, rank, a.shape[1])
    lasts = b.bits.reshape(b.shape[0], rank, experts)
    parts = [(type(b)(lasts[:, :, at], b.dtype), type(a)(firsts[at], a.dtype)) for at in range(experts)]
    if (b.shape[0], a.shape[1]) == (out, inputs):
        return parts
    if (b.shape[0], a.shape[1]) == (inputs, out):
        return [(first.T, last.T) for last, first in parts]
    return None


def _homeless(adapter: Adapter, factors: Factors, weights: ModelWeights) -> FormatError | UnsupportedError:
    if weights.tied and factors.path.rpartition(".")[2] == HEAD:
        return UnsupportedError(
            "adapter changes a head that is the embedding",
            file=str(adapter.file),
            layer=factors.path,
            field=factors.names[0],
            expected="a model that is not tied",
        )
    near = get_close_matches(factors.path[:200], [*weights.shapes], 3)
    return FormatError(
        "adapter has factors for no weight of the model",
        file=str(adapter.file),
        layer=factors.path,
        field=factors.names[0],
        expected=f"a weight, such as {', '.join(near)}" if near else "a weight of the model",
        got="none of that name",
    )


def _misfit(adapter: Adapter, factors: Factors, expected: object, got: object) -> ShapeError:
    return ShapeError(
        "factors do not fit the weight",
        file=str(adapter.file),
        layer=factors.path,
        field=factors.names[1],
        expected=list(expected) if isinstance(expected, tuple) else expected,
        got=list(got) if isinstance(got, tuple) else got,
    )


def _missing(adapter: Adapter, weights: ModelWeights) -> list[str]:
    """The layers that the configuration names and the file has no factors for."""
    has = {weights.find(factors.path) for factors in adapter.factors}
    others = (path for path in weights.layers if path not in has)
    return [path for path in others if all(adapter.config.targets(name) for name in (path, *aliases(path)))]
