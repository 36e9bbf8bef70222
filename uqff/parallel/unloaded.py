"""A layer before it is loaded: what headers tell of it, and how a slice of it is had. The one place where that is done.

::

    file or checkpoint -> Unloaded -> (changed: LoRA) -> (quantised: immediate ISQ) -> slice -> layer of a rank

What is known beforehand decides how the ranks share a layer; what is done then is done to the slice alone, if its
bytes are those of the slice of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from uqff.checkpoints.separate import SeparateExperts
from uqff.codec.layer import Layer
from uqff.codes import DType, Version
from uqff.errors import ShapeError, ShardError, located
from uqff.families import PLAIN_KIND, QuantizedTensor, Unquant, stack
from uqff.families.loaded import Loaded
from uqff.families.part import Part, stacked
from uqff.parallel.shard import Slice
from uqff.quantization.bias import bias_part, widened_bias
from uqff.quantization.types import Engine, Fallback, encode, planned, resolve
from uqff.simd.floats import Floats

__all__ = ["Unloaded", "UnloadedExperts", "numbers_of", "quantised"]

BIASES: Final = Version(1, 2, 0)
"""The version whose rules say in which dtype a bias is kept."""

_FLOATS: Final = (DType.F32, DType.F16, DType.BF16)


def _nothing() -> None:
    """There is nothing to give back."""


@dataclass(frozen=True)
class Unloaded:
    """A layer that has not been loaded.

    Attributes:
        key: what errors call it.
        meta: the whole layer without its bytes.
        take: makes a slice of it; the slice of everything is the whole.
        release: gives back the memory of the file that making a slice took.
        name: what rules of a recipe call it, if not by its key.
        computed: whether slices are the float32 result of something, which quantising does not round first.
    """

    key: str
    meta: Layer
    take: Callable[[Slice], Layer]
    release: Callable[[], None] = _nothing
    name: str | None = None
    computed: bool = False

    @classmethod
    def of(cls, layer: Layer, key: str) -> Unloaded:
        """A layer that is there, a view of a file or not."""

        def take(cut: Slice) -> Layer:
            return layer if cut.length == layer.weight.shape[cut.dim] else layer.narrow(*cut)

        return cls(key, layer.meta(), take)

    @property
    def weight(self) -> QuantizedTensor:
        """The whole weight, without its bytes."""
        return self.meta.weight

    @property
    def path(self) -> str:
        """What rules of a recipe call it."""
        return self.name or self.key

    def whole(self) -> Slice:
        """The slice that is everything."""
        return Slice(0, 0, self.weight.shape[0])

    def fit(self, shape: tuple[int, ...], file: str | None = None) -> Unloaded:
        """Itself, of a shape.

        Raises:
            ShapeError: it has another.
        """
        if self.weight.shape != shape:
            raise ShapeError(
                "layer does not fit the configuration",
                file=file,
                layer=self.key,
                expected=list(shape),
                got=list(self.weight.shape),
            )
        return self

    def narrow(self, dim: int, start: int, length: int, key: str | None = None) -> Unloaded:
        """A range of one dimension, as a layer of its own.

        Raises:
            ShardError: it cannot be cut.
        """
        key = key or self.key
        with located(layer=key):
            meta = self.meta.narrow(dim, start, length)

        def take(cut: Slice) -> Layer:
            if cut.dim == dim:
                return self.take(Slice(dim, start + cut.start, cut.length))
            part = self.take(Slice(dim, start, length))
            return part if cut.length == meta.weight.shape[cut.dim] else part.narrow(*cut)

        return replace(self, key=key, meta=meta, take=take)

    def unstack(self) -> list[Unloaded]:
        """The experts of a stack.

        Raises:
            ShardError: an expert cannot be cut out exactly.
        """
        return [self._expert(at) for at in range(self.weight.shape[0])]

    def _expert(self, at: int) -> Unloaded:
        parent, _, name = self.key.rpartition(".")
        single = self.narrow(0, at, 1, f"{parent}.{at}.{name}" if parent else f"{name}.{at}")
        (meta,) = single.meta.unstack()

        def take(cut: Slice) -> Layer:
            (layer,) = single.take(Slice(0, 0, 1)).unstack()
            return layer if cut.length == meta.weight.shape[cut.dim] else layer.narrow(*cut)

        return replace(single, meta=meta, take=take)

    @classmethod
    def stack(cls, experts: Sequence[Unloaded], key: str) -> Unloaded:
        """Experts as one layer, put together exactly: a stack of their type, or side by side where there is none.

        Raises:
            ShardError: they have other shapes.
            ShapeError: some have biases and others none.
        """
        biases = [each.meta.bias_part is not None for each in experts]
        if any(biases) and not all(biases):
            expected, got = "a bias for every expert or none", f"{sum(biases)} of {len(biases)}"
            raise ShapeError("some experts have no bias", layer=key, expected=expected, got=got)

        with located(layer=key):
            together = stack if _can_stack(experts) else SeparateExperts.of

        def joined(layers: Sequence[Layer]) -> Layer:
            with located(layer=key):
                weight: QuantizedTensor = together([layer.weight for layer in layers])
            parts = [layer.bias_part for layer in layers]
            return Layer(weight, None if None in parts else stacked([part for part in parts if part is not None]))

        def take(cut: Slice) -> Layer:
            if cut.dim == 0:
                return joined([each.take(each.whole()) for each in experts[cut.start : cut.start + cut.length]])
            return joined([each.take(Slice(cut.dim - 1, cut.start, cut.length)) for each in experts])

        def release() -> None:
            for each in experts:
                each.release()

        return cls(key, joined([each.meta for each in experts]), take, release)

    def without_bias(self) -> Unloaded:
        """The layer without its bias."""
        return self.changed(lambda layer, _: Layer(layer.weight), Layer(self.meta.weight))

    def changed(
        self, change: Callable[[Layer, Slice], Layer], meta: Layer | None = None, *, computed: bool = False
    ) -> Unloaded:
        """The layer with something done to each slice as it is loaded.

        Args:
            change: a slice and where it was cut to another of the same shape.
            meta: the whole that the slices are then cut from; the same as before if None.
            computed: see the attribute.
        """
        take = self.take
        return replace(
            self, meta=meta or self.meta, take=lambda cut: change(take(cut), cut), computed=computed or self.computed
        )


def _can_stack(experts: Sequence[Unloaded]) -> bool:
    """Whether layers make a stack of their type; of the numbers, only what all must share is looked at, if any is."""
    try:
        stack([each.weight for each in experts])
        if experts[0].weight.STACKS_BY_VALUE:
            first, *others = experts
            weight = first.take(first.whole()).weight
            for each in others:
                weight.check_stack([weight, each.take(each.whole()).weight])
    except ShardError:
        return False
    return True


UnloadedExperts: TypeAlias = "Unloaded | Sequence[Unloaded]"
"""A projection of all experts: one layer ``[experts, out, in]``, or a layer ``[out, in]`` for each."""


def numbers_of(weight: QuantizedTensor) -> Floats:
    """A weight as plain numbers: those that are stored, if they are F32, F16 or BF16; else float32."""
    plain = weight.plain
    if plain is None or plain.dtype not in _FLOATS:
        plain = weight.numbers()
    return Floats.of_bytes(plain.array(), plain.dtype, plain.shape)


def quantised(
    source: Unloaded,
    kind: str,
    *,
    engine: Engine = "0.9",
    on_fallback: Callable[[Fallback], None] | None = None,
) -> Unloaded:
    """The layer as another type, quantised while it is loaded.

    A slice has the bytes that the slice of the whole, quantised, has: types whose blocks do not know of each other are
    made of the slice alone; of others (one scale for all: HQQ, FP8; F8Q8 and MXFP4) the whole is made, then cut.

    Args:
        source: the layer; it is dequantised first, if need be.
        kind: the type, as :func:`~uqff.quantization.types.kind_name` spells it; ``unquant`` leaves the layer as it is.
        engine: whose quantiser and rules for shapes that do not fit.
        on_fallback: called if the layer becomes another type.

    Raises:
        UqffError: the engine fails on that shape, or there is no such type.
    """
    if kind == PLAIN_KIND:
        return source
    before = source.meta.weight
    dtype = before.load_dtype if before.load_dtype in _FLOATS else DType.F32
    with located(layer=source.key):
        stored, reason = resolve(kind, before.shape, engine)
    if stored != kind and on_fallback is not None:
        on_fallback(Fallback(source.key, kind, stored, before.shape, reason))
    if stored == PLAIN_KIND:
        return source.changed(lambda layer, _: _rounded(layer, dtype)) if source.computed else source
    whole = planned(stored, before.shape, dtype)
    bias = source.meta.bias_part
    bias_dtype = whole.BIAS.dtype(dtype, BIASES, engine=False)

    def take(cut: Slice) -> Layer:
        everything = cut.length == before.shape[cut.dim]
        apart = whole.BY_EXPERT and whole.SLICES_QUANTISE_ALIKE and whole.can_narrow(*cut)
        layer = source.take(cut if apart or everything else source.whole())
        loaded = Loaded(numbers_of(layer.weight), dtype, rounded=not source.computed)
        weight = encode(loaded, stored, engine=engine)
        made = Layer(weight, _bias(layer.bias_part, bias_dtype))
        source.release()
        return made if apart or everything else made.narrow(*cut)

    meta = Layer(whole, None if bias is None else Part.planned(bias.shape, _bias_dtype(bias, bias_dtype)))
    return replace(source, meta=meta, take=take)


def _rounded(layer: Layer, dtype: DType) -> Layer:
    """A layer that was computed, in the dtype that its weight had."""
    return Layer(Unquant.of(Part.of_array(numbers_of(layer.weight).cast(dtype).bits, dtype)), layer.bias_part)


def _bias_dtype(bias: Part, stored: DType) -> DType:
    return stored if bias.dtype in _FLOATS or bias.dtype is DType.F64 else bias.dtype


def _bias(bias: Part | None, stored: DType) -> Part | None:
    """A bias as it is stored beside a quantised weight; one that is no plain numbers stays."""
    if bias is None or _bias_dtype(bias, stored) is bias.dtype:
        return bias
    if bias.dtype in _FLOATS:
        floats = Floats.of_bytes(bias.array(), bias.dtype, bias.shape)
    else:
        floats = Floats(widened_bias(bias).view("u4"), DType.F32)
    return bias_part(floats, floats.dtype, stored)
