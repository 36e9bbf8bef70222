"""What every parallel layer is: a weight and bias, and the slice of a whole that they are; and a product.

How a weight is multiplied is in :mod:`uqff.parallel.product`.

Authority: mistral.rs v0.8.0, ``mistralrs-quant/src/lib.rs`` (``QuantMethod``, ``QuantizedSerde``) and
``distributed/layers.rs``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from uqff.codec import blob as blobs
from uqff.codec.blob import LATEST
from uqff.codec.layer import Layer
from uqff.errors import ShapeError, ShardError, located
from uqff.families import QuantizedTensor, Unquant
from uqff.families.rows import Order
from uqff.models.layouts import in_order
from uqff.parallel.accept import Weight, check_activations, layer_of, parts_of, plain_of, record_of
from uqff.parallel.arithmetic import ChoosesArithmetic
from uqff.parallel.comm import Comm, exchange_device
from uqff.parallel.dummy import DummyLayer
from uqff.parallel.elsewhere import Elsewhere
from uqff.parallel.lora import check_merged
from uqff.parallel.placement import DistributedKind, Placement
from uqff.parallel.product import multiply
from uqff.parallel.requantize import add_delta, requantize
from uqff.parallel.shard import Shard, Slice
from uqff.parallel.stats import InputStats, TracksInputs
from uqff.parallel.weight import WeightBuffers
from uqff.quantization.bias import cast_bias
from uqff.quantization.types import planned
from uqff.schema.header import HEADER

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from uqff.container.file import UqffFile
    from uqff.quantization.types import EffortName, Engine, Fallback

__all__ = ["DistributedKind", "QuantizedLayer", "QuantizedLinear"]

START_BYTES = 8
"""A slice travels as its first index, then its blob."""


class QuantizedLayer(ChoosesArithmetic, torch.nn.Module):
    """What all layers share: a weight, a bias, and where in the whole they belong."""

    kind: ClassVar[DistributedKind] = DistributedKind.REPLICATED
    dims: ClassVar[tuple[str, ...]] = ("out", "in")
    """The dimensions of the weight."""
    lora: Any
    """Adapters that are not merged; None if there are none."""

    def __init__(
        self,
        weight: Weight,
        bias: torch.Tensor | None = None,
        comm: Comm | None = None,
        *,
        shard: Shard | None = None,
        device: torch.device | str | None = None,
        key: str | None = None,
        version: tuple[int, int, int] = LATEST,
    ) -> None:
        """The rank's slice of a whole layer.

        Args:
            weight: the whole, of the dimensions :attr:`dims`, quantised or plain: float32, bfloat16, float16 or
                float64, a tensor or a numpy array; or a ``torch.nn.Linear`` or layer, which bring their bias along.
                Only the bytes of the slice are read.
            bias: what belongs to it, ``[out]``, or ``[experts, out]`` of stacked experts.
            comm: the ranks; a world of one if None.
            shard: the slice, if it is not the rank's equal part.
            device: where the slice goes; it stays a view of the weight, where it can be one, if None.
            key: of the layer in its file, for errors.
            version: that blobs are written with.

        Raises:
            UnsupportedError: the weight or the bias is none, or of a dtype that is none of plain numbers.
            ShapeError: they have other dimensions, or do not fit each other.
            ShardError: the slice cannot be cut.
        """
        super().__init__()
        comm = Comm.of(comm)
        given, bias = parts_of(weight, bias, layer=key)
        if len(given.shape) != len(self.dims):
            problem = "weight is not a matrix" if len(self.dims) == 2 else "weight is not a stack of matrices"
            raise ShapeError(problem, layer=key, expected=f"[{', '.join(self.dims)}]", got=list(given.shape))
        cut = Shard.of(shard or self._shard(comm), layer=key).slice_of(given, layer=key)
        if bias is None and isinstance(given, torch.Tensor):  # of any strides: what is not the slice is not read
            part = Layer(record_of(given.narrow(*cut), layer=key))
            whole: QuantizedTensor = Unquant.of(torch.empty(given.shape, dtype=given.dtype, device="meta"))
        else:
            layer = layer_of(given, bias, layer=key)
            part = layer if cut.length == layer.weight.shape[cut.dim] else layer.narrow(*cut)
            whole = layer.weight.meta()
        self._hold(part, whole, cut, comm, key=key, version=version)
        if device is not None:
            self.to(device)

    def _hold(
        self,
        part: Layer,
        whole: QuantizedTensor | None,
        cut: Slice,
        comm: Comm,
        *,
        key: str | None,
        version: tuple[int, int, int],
    ) -> None:
        self.comm = comm
        self.key = key
        self.version = version
        self.cut = cut
        self._whole = whole
        self.lora = None
        self._store(part.weight, part.bias)

    @classmethod
    def _holding(
        cls,
        part: Layer,
        whole: QuantizedTensor | None,
        cut: Slice,
        comm: Comm,
        *,
        key: str | None,
        version: tuple[int, int, int],
    ) -> Self:
        """A layer of a slice that is cut already.

        Args:
            part: the slice.
            whole: the weight that it was cut from, on the meta device; None if slices make up none.
            cut: where it was cut.
            comm: the ranks.
            key: of the layer, for errors.
            version: that blobs are written with.
        """
        made = cls.__new__(cls)
        torch.nn.Module.__init__(made)
        made._hold(part, whole, cut, comm, key=key, version=version)
        return made

    @property
    def _place(self) -> str:
        """Which part of the whole this is, in words; empty if it is the whole."""
        cut, whole = self.cut, self._whole
        if whole is not None and cut.length == whole.shape[cut.dim]:
            return ""
        return f"{cut.start} to {cut.start + cut.length} of dimension {cut.dim}"

    @classmethod
    def _shard(cls, comm: Comm) -> Shard:
        return Shard.whole()

    @classmethod
    def from_layer(cls, layer: Weight, comm: Comm | None = None, **placement: Unpack[Placement]) -> Self:
        """The slice of a whole layer, with its bias: the constructor, for what comes in one piece.

        Args:
            layer: the whole.
            comm: the ranks; a world of one if None.
            placement: the other arguments of the constructor.
        """
        return cls(layer, None, comm, **placement)

    @classmethod
    def from_file(
        cls,
        file: UqffFile,
        key: str | int,
        comm: Comm | None = None,
        *,
        shard: Shard | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """The slice of a layer of an open file, of either generation: nothing else is read of it.

        Args:
            file: of :func:`uqff.open`.
            key: of the layer, or its index.
            comm: the ranks; a world of one if None.
            shard: as for the constructor.
            device: likewise.

        Raises:
            MissingError: no such layer.
            UqffError: the layer is not valid, or the slice cannot be cut; the file is named.
        """
        layer = file[key]
        version = _version_of(file.blob(key)) if file.generation == "0.x" else LATEST
        with located(file=file.place(key).path):
            return cls(layer, None, comm, shard=shard, device=device, key=file.key(key), version=version)

    @classmethod
    def deserialize(cls, blob: Any, comm: Comm | None = None, **placement: Unpack[Placement]) -> Self:
        """The slice of a pre-1.0 blob; the byte at offset 4 tells its family.

        Args:
            blob: bytes, or what has a buffer of them.
            comm: the ranks; a world of one if None.
            placement: the other arguments of the constructor.

        Raises:
            UqffError: the blob is not valid, or the slice cannot be cut.
        """
        with located(layer=placement.get("key")):
            layer = blobs.deserialize(blob)
        placement.setdefault("version", _version_of(blob))
        return cls(layer, None, comm, **placement)

    @property
    def weight(self) -> QuantizedTensor:
        """The quantised weight that this rank holds."""
        return self.weight_buffers.record

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias that this rank holds, in the dtype it is stored in."""
        if self.bias_buffers is None:
            return None
        plain = self.bias_buffers.record.plain
        return None if plain is None else plain.tensor()

    def reorder(self, order: Order) -> None:
        """Put the outputs that this rank holds in another order: :func:`uqff.families.rows.reordered`.

        A weight whose rows cannot change places (HQQ) becomes plain numbers: :func:`uqff.models.layouts.in_order`.

        Args:
            order: int64 ``[out of the slice]``.
        """
        kind = self.weight.kind
        weight, bias = in_order(Layer(self.weight, self.bias), order)
        if weight.kind != kind and self._whole is not None:
            self._whole = Unquant.of(torch.empty(self._whole.shape, device="meta"))
        self._store(weight, bias)

    def _store(self, weight: QuantizedTensor, bias: torch.Tensor | None) -> None:
        """Keep weight and bias; both follow a cast of the module if the weight is not quantised."""
        self.weight_buffers = WeightBuffers(weight, self._place, numbers=weight.UNQUANTISED)
        self.bias_buffers = None
        if bias is not None:
            self.bias_buffers = WeightBuffers(Unquant.of(bias.detach()), numbers=weight.UNQUANTISED)

    def _plain_bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        return None if self.bias_buffers is None else self.bias_buffers.plain(dtype)

    def dequantize_w(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight that this rank holds as plain numbers; float32 if no dtype is given."""
        return self.weight.dequantize(dtype)

    def unquant_weight_bias(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Weight and bias of a layer that is not quantised; None of one that is."""
        weight = self.weight
        plain = weight.plain if weight.UNQUANTISED else None
        return None if plain is None else (plain.tensor(), self.bias)

    def dtype_and_device(self) -> tuple[torch.dtype, torch.device]:
        """The dtype that the weight's family claims, and where it is."""
        weight = self.weight
        return weight.nominal_dtype.torch, weight.device

    def is_distributed(self) -> DistributedKind:
        """How the layer is partitioned over ranks; ``REPLICATED`` if every rank holds all of it."""
        return self.kind

    def isq_serde_supported(self) -> bool:
        """Whether :meth:`serialize` works: always, for a layer with a weight."""
        return True

    @property
    def name(self) -> str:
        """What the engine calls a layer of the family: ``gguf``, ``hqq``, ``fp8-linear``, ..."""
        return self.weight_buffers._meta.LAYER_NAME

    def add_delta_w(self, delta: torch.Tensor, *, engine: Engine = "0.8") -> Self:
        """A new layer with a delta (of LoRA: B @ A, scaled) added to its weight.

        What each family does is in :mod:`uqff.parallel.requantize`.

        Args:
            delta: for the whole weight, of which this rank takes its slice, or for the slice.
            engine: whose quantiser.

        Raises:
            UnsupportedError: HQQ, MXFP4 and foreign weights take no delta.
            ShapeError: the delta fits neither.
        """
        weight, delta = self.weight, plain_of("delta", delta, layer=self.key)
        if self._whole is not None and tuple(delta.shape) == self._whole.shape:
            delta = delta.narrow(*self.cut)
        changed = add_delta(weight, delta, engine=engine)
        return self._changed(changed, self.bias)

    def apply_isq(
        self,
        kind: str | int | None,
        device: torch.device | str | None = None,
        *,
        imatrix_weight: Sequence[float] | torch.Tensor | None = None,
        effort: EffortName = "engine",
        engine: Engine = "0.8",
        engine_biases: bool = False,
        on_fallback: Callable[[Fallback], None] | None = None,
    ) -> Self:
        """A new layer with the weight in another type.

        Which families change into which is in :mod:`uqff.parallel.requantize`.
        The bias keeps its numbers, and its dtype but where readers add it in float32 (:mod:`uqff.families.biases`).

        Args:
            kind: an ISQ name or a number of bits; None only moves the layer.
            device: where the new layer goes; where this one is if None.
            imatrix_weight: importance of the inputs that this layer holds, as :meth:`end_track_stats` gives it.
            effort: how codes and scales are chosen, see :func:`uqff.quantize`.
            engine: whose quantiser and rules for shapes that do not fit.
            engine_biases: cast the bias to what the engine stores beside that type, though it may lose by that.
            on_fallback: called if this rank's slice is stored as another type.

        Raises:
            UnsupportedError: the family does not change into that type.
            ShapeError: the importance is of another number of inputs.
        """
        weight, bias = self.weight, self.bias
        how: dict[str, Any] = {"engine": engine, "effort": effort, "importance": imatrix_weight}
        changed = requantize(weight, kind, on_fallback=on_fallback, module=self.key, **how)
        if changed is not weight and bias is not None:
            bias = self._bias_beside(changed, bias, engine_biases=engine_biases)
        made = self._changed(changed, bias)
        return made.to(weight.device if device is None else device)

    def _bias_beside(self, weight: QuantizedTensor, bias: torch.Tensor, *, engine_biases: bool) -> torch.Tensor:
        """The bias as it is stored beside another weight."""
        if bias.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return bias
        return cast_bias(bias.cpu(), weight, version=self.version, engine_biases=engine_biases)

    def _changed(self, weight: QuantizedTensor, bias: torch.Tensor | None) -> Self:
        """The layer with another weight: still a slice of a whole, if slices quantised apart make up a whole."""
        whole = self._whole
        if whole is not None and weight.kind != self.weight_buffers._meta.kind:
            whole = planned(weight.kind, whole.shape, weight.nominal_dtype)
        if whole is not None and self.cut.length != whole.shape[self.cut.dim]:
            apart = not weight.SLICES_QUANTISE_ALIKE or not whole.can_narrow(*self.cut)
            whole = None if apart else whole
        made = self._holding(Layer(weight, bias), whole, self.cut, self.comm, key=self.key, version=self.version)
        made.lora, made.arithmetic = self.lora, self.arithmetic
        return made

    def serialize(self) -> bytes:
        """The pre-1.0 blob of what this rank holds, the bias in the bias extension."""
        check_merged(self)
        return blobs.serialize(self.weight, self.bias, version=self.version)

    def gather_serialize(self, comm: Comm | None = None) -> bytes:
        """The pre-1.0 blob of the whole layer, on every rank, byte-identical to the one the slices were cut from.

        Takes and raises what :meth:`gather_layer` does.
        """
        return blobs.serialize(self.gather_layer(comm), version=self.version)

    def gather_layer(self, comm: Comm | None = None) -> Layer:
        """The whole layer, on every rank: to be written in either generation.

        Args:
            comm: the ranks that hold the slices; the layer's own if None.

        Raises:
            ShardError: the slices do not make up a whole: ranks hold other parts, or quantised theirs by themselves.
            CommError: a rank did not take part.
        """
        comm, cut = self.comm if comm is None else Comm.of(comm), self.cut
        travelling = cut.start.to_bytes(START_BYTES, "little") + self.serialize()
        received = comm.all_gather_bytes(travelling, exchange_device(self.weight.device))
        if self._whole is None:
            raise ShardError("slice was quantised by itself and is part of no whole", layer=self.key)
        parts = [
            (int.from_bytes(each[:START_BYTES], "little"), blobs.deserialize(each[START_BYTES:])) for each in received
        ]
        weight = self._whole.join([(start, part.weight) for start, part in parts], cut.dim)
        bias = parts[0][1].bias
        if bias is not None:
            axis = cut.dim - (len(weight.shape) - 1 - bias.ndim)  # of the bias, as Layer.narrow has it
            if 0 <= axis < bias.ndim:
                slices = {start: part.bias for start, part in parts if part.bias is not None}
                bias = torch.cat([slices[start] for start in sorted(slices)], axis)
        return Layer(weight, bias)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.key or ''} {self.comm!r}".strip()


class QuantizedLinear(TracksInputs[InputStats], Elsewhere, QuantizedLayer):
    """A layer that is a matrix: the product with it, and what goes into that."""

    _stats: InputStats | None = None

    @classmethod
    def new(
        cls,
        weight: Weight | None,
        bias: torch.Tensor | None = None,
        comm: Comm | None = None,
        **placement: Unpack[Placement],
    ) -> Self | DummyLayer:
        """The constructor; a :class:`DummyLayer` if there is no weight."""
        return DummyLayer(placement.get("key")) if weight is None else cls(weight, bias, comm, **placement)

    @classmethod
    def _new_of_first(
        cls, dim: int, size: int, weight: Weight | None, bias: torch.Tensor | None, comm: Comm | None, key: str | None
    ) -> Self | DummyLayer:
        """A rank's slice of the first elements of a dimension of a larger weight."""
        if weight is None:
            return DummyLayer(key)
        first = Shard.offset(dim, 0, size).apply_to(layer_of(weight, bias, layer=key), layer=key)
        return cls(first, None, comm, key=key)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self._modules["weight_buffers"]  # torch finds it by way of a failure, which takes a microsecond
        check_activations(x, weight.shape[1], layer=self.key)
        if self._stats is not None:
            self._stats.process(x)
        y = multiply(x, weight, self._arithmetic)
        return y if self.lora is None else self.lora(x, y)

    def _add_bias(self, y: torch.Tensor) -> torch.Tensor:
        bias = self._plain_bias(y.dtype)
        return y if bias is None else y + bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product with the weight, plus the bias.

        Args:
            x: ``[..., in]`` of any leading dimensions, float32, bfloat16, float16 or float64, on the weight's device.

        Returns:
            ``[..., out]`` in the dtype of ``x``.

        Raises:
            UnsupportedError: these are no activations: integers, codes, no tensor.
            ShapeError: they do not fit the weight.
        """
        if self.kind is DistributedKind.COLUMN_PARALLEL and self.comm.world_size > 1:
            check_activations(x, layer=self.key)
            x = self.comm.sum_gradients(x)
        return self._add_bias(self._product(x))

    def forward_autocast(self, x: torch.Tensor) -> torch.Tensor:
        """:meth:`forward` in the dtype that the family asks for; the result has the dtype of ``x``."""
        check_activations(x, layer=self.key)
        kind = self._activation_dtype()
        y: torch.Tensor = self.forward(x if kind is None else x.to(kind))
        return y.to(x.dtype)

    def forward_partial(self, x: torch.Tensor) -> torch.Tensor:
        """The product with what this rank holds of the weight: no bias, no communication.

        Of a row-parallel layer it is this rank's term of the sum, for a caller that adds up several layers at once; of
        a column-parallel one, the gradient in ``x`` is this rank's part (:meth:`Comm.sum_gradients` adds it up).
        """
        return self._product(x)

    def begin_track_stats(self, *, products: bool = False) -> None:
        """Watch the inputs of every forward from now on.

        Args:
            products: also of any two of them: a matrix of inputs × inputs.
        """
        weight = self.weight
        self._stats = InputStats(weight.shape[1], weight.device, products=products)

    def end_track_stats(self) -> torch.Tensor:
        """Stop watching; the importance of each input that this rank holds, float32 ``[in]``; raises what that does."""
        return self.take_stats().imatrix()


def _version_of(blob: Any) -> tuple[int, int, int]:
    version: tuple[int, int, int] = HEADER.read(blob, exact=False)["version"]
    return version
