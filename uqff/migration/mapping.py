"""Which layer of a model becomes which layer of the other generation: the moves of a migration, before any byte moves.

::

    0.x index          1.x key
    i          <--->   path                      one for one
    i, j, k    <--->   path of the experts       one for each expert, stacked exactly
    0          <--->   embedding                 of a tied model whose embedding is a layer (1.2)
    none       <--->   embedding                 of any other: kept in a file of its own beside the model

Every part of a layer goes along as it is.  What has no place in the target is a :class:`Problem`, never left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from uqff.codec.layer import Layer
from uqff.codes import DType, Version
from uqff.container.file import UqffFile
from uqff.container.plan import layer_size
from uqff.errors import ShardError, UnsupportedError, UqffError
from uqff.families import Unquant
from uqff.families.part import Part, stacked
from uqff.families.rows import Order
from uqff.families.stacking import odd_ones, stack
from uqff.models.architectures import LayerName
from uqff.models.layouts import in_order
from uqff.quantization.bias import widened_bias
from uqff.schema.entries import FIRST
from uqff.simd.floats import Floats
from uqff.simd.memory import aligned_bytes

__all__ = ["LayerSource", "MappingRow", "ModelMapping", "Move", "Problem", "plan_mapping"]


class LayerSource(NamedTuple):
    """A layer where it is: an open file and its key there."""

    file: UqffFile
    key: str


class Problem(NamedTuple):
    """A layer that cannot be expressed in the target, and why."""

    layer: str
    reason: str


@dataclass(frozen=True)
class MappingRow:
    """A line of the mapping: one layer of the generation that has more of them.

    Attributes:
        index: number in a pre-1.0 file, None if there is none.
        key: path in a 1.x file.
        expert: number of the expert, None for no expert or all of them.
        kind: the stored type.
        shape: of the weight.
        nbytes: of the layer in the source; in the target, where the source has several in one.
    """

    index: int | None
    key: str
    expert: int | None
    kind: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def path(self) -> str:
        """Key and expert as a file of names has them."""
        return self.key if self.expert is None else f"{self.key}[{self.expert}]"


@dataclass(frozen=True)
class Move:
    """Layers of the source and what they become: one for one, several stacked to one, or one unstacked to several.

    Attributes:
        sources: the layers, in the order of the experts.
        targets: keys in the target, in the order of the experts.
        names: of the layers in the finer of the two generations.
        how: ``same`` for one that stays what it is, else ``stack`` or ``unstack``; ``plain`` for a stack of dequantised
            weights, ``plain_unstack`` for those of a stack, one by one; ``dense`` for a layer made of a tensor of the
            residual, whose name is the source's key.
        dtype: of plain weights.
        order: of the rows of the one layer in the target, if it is another; without values that cannot be told.
    """

    sources: tuple[LayerSource, ...]
    targets: tuple[str, ...]
    names: tuple[LayerName, ...]
    how: Literal["same", "stack", "unstack", "plain", "plain_unstack", "dense"] = "same"
    dtype: DType | None = None
    order: Order | None = None

    def taken(self, bias_dtypes: Mapping[str, DType]) -> list[Layer]:
        """The layers of the source.

        Args:
            bias_dtypes: dtype of the biases to be cast, by the source's key.

        Raises:
            UqffError: a layer is broken.
        """
        if self.how == "dense":
            return [Layer(Unquant.of(_dense(source))) for source in self.sources]
        return [_cast(source.file[source.key], bias_dtypes.get(source.key)) for source in self.sources]

    def made(self, taken: list[Layer]) -> Iterator[tuple[str, Layer]]:
        """The layers of the target by key, of those of the source or of those without values.

        Raises:
            ShardError: they do not stack, or a stack cannot be taken apart.
        """
        if self.how == "plain_unstack":
            yield from zip(self.targets, _unstacked_plain(taken[0], self.dtype), strict=True)
        elif self.how == "unstack":
            yield from zip(self.targets, taken[0].unstack(), strict=True)
        elif self.how == "stack":
            yield self.targets[0], _stacked(taken)
        elif self.how == "plain":
            yield self.targets[0], _plain(taken, self.dtype)
        else:
            layer = taken[0]
            yield self.targets[0], layer if layer.weight.place == "meta" else in_order(layer, self.order)

    def release(self) -> None:
        """Give back the memory of the sources."""
        if self.how == "dense":
            return
        for source in self.sources:
            source.file.release(source.key)


@dataclass
class ModelMapping:
    """All moves of one model.

    Attributes:
        moves: in the order of the source.
        metas: layers of the target, on the meta device, by key.
        rows: the mapping.
        problems: what cannot be expressed.
        failed: the moves that are not possible.
        bias_dtypes: dtype of the biases to be cast, by the source's key.
    """

    moves: list[Move]
    metas: dict[str, Layer] = field(default_factory=dict)
    rows: list[MappingRow] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    failed: list[Move] = field(default_factory=list)
    bias_dtypes: Mapping[str, DType] = field(default_factory=dict)


def plan_mapping(
    moves: Sequence[Move],
    version: Version,
    bias_dtypes: Mapping[str, DType],
    plain_dtype: DType | None = None,
) -> ModelMapping:
    """Look at every layer, and find what cannot be expressed.

    Args:
        moves: what becomes what.
        version: of the target.
        bias_dtypes: dtype of the biases to be cast, by the source's key.
        plain_dtype: in which to store experts, dequantised, that cannot be stacked or not be read as a stack; None if
            that is a problem.
    """
    planned = ModelMapping([], bias_dtypes=bias_dtypes)
    for move in moves:
        taken = move.taken(bias_dtypes)
        made, sizes, problems = _try(move, taken, version)
        if problems and move.how in ("stack", "unstack") and plain_dtype is not None:
            move = replace(move, how="plain" if move.how == "stack" else "plain_unstack", dtype=plain_dtype)
            made, sizes, problems = _try(move, taken, version)
        planned.moves.append(move)
        planned.problems += problems
        planned.failed += [move] if problems else []
        planned.metas |= made
        planned.rows += _rows(move, made, sizes, blobs=version < FIRST)
    return planned


def _try(move: Move, taken: list[Layer], version: Version) -> tuple[dict[str, Layer], dict[str, int], list[Problem]]:
    """The layers of a move without their values, and their sizes, or what makes it impossible."""
    problems = _odd_experts(move)
    if problems:
        return {}, {}, problems
    try:
        made = dict(move.made([layer.meta() for layer in taken]))
        sizes = {key: layer_size(layer, version) for key, layer in made.items()}
        if move.how == "stack":
            _try_stack(taken)
        if move.how == "unstack":
            _try_unstack(taken[0], made)
        return made, sizes, []
    except UqffError as error:
        error.layer = None
        return {}, {}, [Problem(move.names[0].key, str(error))]


def _odd_experts(move: Move) -> list[Problem]:
    """Experts whose type or shape is not that of the others."""
    if move.how != "stack":
        return []
    forms = [_form(source) for source in move.sources]
    odd = odd_ones(forms)
    usual = next(form for at, form in enumerate(forms) if at not in odd)
    return [
        Problem(
            move.names[0].key,
            f"experts are unlike: expert {move.names[at].expert} (index {move.names[at].index}) is {forms[at]}, "
            f"the others are {usual}",
        )
        for at in odd
    ]


def _form(source: LayerSource) -> str:
    record, fields = source.file.fields(source.key)
    bias = "" if fields["bias"] is None else ", with a bias"
    weight = record.parse(fields)
    return f"{weight.kind} {list(weight.shape)}{bias}"


def _try_stack(layers: list[Layer]) -> None:
    """Stack two experts in earnest: types with something for a whole tensor may not stack, though all shapes fit."""
    if len(layers) > 1 and layers[0].weight.STACKS_BY_VALUE:
        stack([layer.weight for layer in layers[:2]])


def _try_unstack(stacked: Layer, made: Mapping[str, Layer]) -> None:
    """Look whether what a stack becomes can be stacked again."""
    stacked.weight.check_apart([layer.weight for layer in made.values()])


def _rows(move: Move, made: Mapping[str, Layer], sizes: Mapping[str, int], *, blobs: bool) -> Iterator[MappingRow]:
    if move.how in ("unstack", "plain_unstack", "dense"):
        for name, target in zip(move.names, move.targets, strict=True):
            if target in made:
                weight = made[target].weight
                yield MappingRow(name.index, name.key, name.expert, weight.kind, weight.shape, sizes[target])
        return
    for name, (file, key) in zip(move.names, move.sources, strict=True):
        record, fields = file.fields(key)
        nbytes = sum(place.nbytes for place in file.places(key).values())
        numbered = blobs or file.generation == "0.x"
        weight = record.parse(fields)
        yield MappingRow(name.index if numbered else None, name.key, name.expert, weight.kind, weight.shape, nbytes)


def _dense(source: LayerSource) -> Part:
    """A tensor of the residual, a view of the file."""
    residual = source.file.residual
    entry = residual.entry(source.key)
    dtype = DType.of_safetensors(entry.dtype)
    if dtype is None:
        raise UnsupportedError("dtype has no code in the format", field=source.key, got=entry.dtype)
    return Part(dtype, tuple(entry.shape), residual.raw(source.key))


def _cast(layer: Layer, dtype: DType | None) -> Layer:
    bias = layer.bias_part
    if dtype is None or bias is None or bias.dtype is dtype:
        return layer
    made = Floats(widened_bias(bias).view(np.uint32), DType.F32).cast(dtype)
    return Layer(layer.weight, Part.of_array(made.bits, dtype))


def _stacked(layers: list[Layer]) -> Layer:
    return Layer(stack([layer.weight for layer in layers]), _stacked_bias(layers))


def _stacked_bias(layers: list[Layer]) -> Part | None:
    biases = [layer.bias_part for layer in layers if layer.bias_part is not None]
    if biases and len(biases) != len(layers):
        raise ShardError("weights do not stack", expected="a bias for all experts or none", got=f"{len(biases)} biases")
    return stacked(biases) if biases else None


def _plain(layers: list[Layer], dtype: DType | None) -> Layer:
    """Dequantised weights as one, on the meta device if they are there."""
    assert dtype is not None
    first, bias = layers[0].weight, _stacked_bias(layers)
    shape = (len(layers), *first.shape)
    if first.place == "meta":
        return Layer(Unquant.of(Part.planned(shape, dtype)), bias)
    made = aligned_bytes(math.prod(shape) * dtype.itemsize)
    for numbers, layer in zip(made.reshape(len(layers), -1), layers, strict=True):
        layer.weight.write_numbers(numbers, dtype)
    return Layer(Unquant.of(Part(dtype, shape, made.data)), bias)


def _unstacked_plain(layer: Layer, dtype: DType | None) -> Iterator[Layer]:
    """The dequantised weights of a stack, on the meta device if they are there."""
    assert dtype is not None
    weight, bias = layer.weight, layer.bias_part
    for expert in range(weight.shape[0]):
        planned = weight.place == "meta"
        plain = Part.planned(weight.shape[1:], dtype) if planned else weight.expert_numbers(expert, dtype)
        own = bias
        if bias is not None and len(bias.shape) > 1:
            own = bias.narrow(0, expert, 1).view(bias.shape[1:])
        yield Layer(Unquant.of(plain), own)
