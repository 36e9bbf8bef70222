"""Products with one weight per expert: of a stack, in one operator of :mod:`uqff.parallel.product`; of single layers,
rows of activations are grouped by the expert that they go to.

Authority: mistral.rs v0.8.0, ``gather_forward`` of each family in ``mistralrs-quant/src``.  There a weight is selected,
or the whole stack dequantised, for every token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from uqff.errors import ShapeError, UnsupportedError
from uqff.parallel.accept import check_activations
from uqff.parallel.comm import Comm
from uqff.parallel.grouping import ExpertGroups
from uqff.parallel.layer import DistributedKind, QuantizedLayer, QuantizedLinear
from uqff.parallel.product import gather_multiply
from uqff.parallel.shard import Shard
from uqff.parallel.stats import InputStats, TracksInputs

__all__ = [
    "ColumnParallelStack",
    "ExpertList",
    "Gathering",
    "ReplicatedStack",
    "RowParallelStack",
    "group_by_expert",
]

_INDEX_DTYPES = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint32,
    torch.uint64,
    torch.uint16,
)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def group_by_expert(indices: torch.Tensor, experts: int, *, layer: str | None = None) -> ExpertGroups:
    """The experts that tokens go to, checked.

    Args:
        indices: integers ``[tokens, experts_per_token]`` from 0 to ``experts - 1``; a token may name one twice.
        experts: how many there are.
        layer: key of the layer, for errors.

    Raises:
        UnsupportedError: the indices are not integers.
        ShapeError: they have other dimensions, or name an expert that there is not.
    """
    dtype = indices.dtype if isinstance(indices, torch.Tensor) else type(indices).__name__
    if dtype not in _INDEX_DTYPES:
        raise UnsupportedError("indices are not integers", layer=layer, expected="an integer dtype", got=dtype)
    if indices.ndim != 2:
        expected = "[tokens, experts_per_token]"
        raise ShapeError("indices are not a matrix", layer=layer, expected=expected, got=list(indices.shape))
    indices = indices.to(torch.int64)
    if indices.numel() and not _is_recorded(indices):
        low, high = torch.stack(indices.aminmax()).tolist()
        if low < 0 or high >= experts:
            got = low if low < 0 else high
            raise ShapeError("no such expert", layer=layer, field="indices", expected=f"0 to {experts - 1}", got=got)
    return ExpertGroups(indices, experts)


def _is_recorded(indices: torch.Tensor) -> bool:
    """Whether they have no values yet, as in a CUDA graph; kernels make zeros of what is no expert's number."""
    return indices.is_cuda and torch.cuda.is_current_stream_capturing()


class Gathering:
    """A projection with one weight per expert; what :class:`ExpertList` and stacks have in common."""

    @abstractmethod
    def size(self) -> tuple[int, int, int]:
        """Experts, and this rank's outputs and inputs of each."""

    @abstractmethod
    def _where(self) -> tuple[str | None, Comm, DistributedKind]:
        """Key for errors, ranks, and how the projection is partitioned over them."""

    @abstractmethod
    def _product(self, x: torch.Tensor, groups: ExpertGroups) -> torch.Tensor:
        """The product of each place; ``x`` was checked."""

    @abstractmethod
    def _biases(self, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """The bias of each place, ``[tokens, experts_per_token, out]`` or less."""

    @abstractmethod
    def _activation_dtype(self) -> torch.dtype | None:
        """The dtype of activations that the family asks for; None if it takes any."""

    @abstractmethod
    def begin_track_stats(self, *, products: bool = False) -> None:
        """Watch the inputs of each expert from now on: of the tokens that go to it.

        Args:
            products: also of any two of them, of each expert.
        """

    @abstractmethod
    def take_stats(self) -> list[InputStats]:
        """Stop watching; what was seen of each expert's inputs.

        Raises:
            UnsupportedError: :meth:`begin_track_stats` was not called.
        """

    def end_track_stats(self) -> torch.Tensor:
        """Stop watching; the importance of each input of each expert, float32 ``[experts, in]``.

        Raises:
            UnsupportedError: :meth:`begin_track_stats` was not called.
        """
        return torch.stack([each.imatrix() for each in self.take_stats()])

    def gather_forward(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """The product of each token with each of its experts, plus the experts' biases.

        Row-parallel projections are added up over the ranks here, before the bias: one reduction of everything that is
        returned.  (:class:`~uqff.parallel.experts.FusedExperts` adds up later, once, what is much less.)

        Args:
            x: ``[tokens, experts_per_token, in]``, or ``[tokens, 1, in]`` for all experts of a token alike.
            indices: integers ``[tokens, experts_per_token]``.

        Returns:
            ``[tokens, experts_per_token, out]`` in the dtype of ``x``.

        Raises:
            ShapeError: shapes do not fit, or there is no such expert.
            UnsupportedError: the indices are not integers, or the activations are none.
        """
        key, comm, kind = self._where()
        check_activations(x, layer=key)
        groups = group_by_expert(indices, self.size()[0], layer=key)
        if kind is DistributedKind.COLUMN_PARALLEL:
            x = comm.sum_gradients(x)
        y: torch.Tensor = self.gather_partial(x, groups)
        if kind is DistributedKind.ROW_PARALLEL:
            y = comm.sum_all_reduce(y)
        z: torch.Tensor = self.add_bias(y, groups)
        return z

    def gather_forward_autocast(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """:meth:`gather_forward` in the dtype that the family asks for; the result has the dtype of ``x``."""
        check_activations(x, layer=self._where()[0])
        kind = self._activation_dtype()
        return self.gather_forward(x if kind is None else x.to(kind), indices).to(x.dtype)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def gather_partial(self, x: torch.Tensor, groups: ExpertGroups) -> torch.Tensor:
        """:meth:`gather_forward` with what this rank holds: no bias, no communication."""
        key, _, _ = self._where()
        inputs = self.size()[2]
        tokens, per_token = groups.indices.shape
        if x.ndim != 3 or x.shape[0] != tokens or x.shape[1] not in (1, per_token) or x.shape[2] != inputs:
            raise ShapeError(
                "activations do not fit weight and indices",
                layer=key,
                expected=f"[{tokens}, {per_token} or 1, {inputs}]",
                got=list(x.shape),
            )
        return self._product(x, groups)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def add_bias(self, y: torch.Tensor, groups: ExpertGroups) -> torch.Tensor:
        """Add the bias of each place's expert."""
        bias = self._biases(groups.indices, y.dtype)
        return y if bias is None else y + bias


class ReplicatedStack(TracksInputs[list[InputStats]], QuantizedLayer, Gathering):
    """Stacked experts ``[experts, out, in]`` that every rank holds whole.

    Example:
        >>> import torch
        >>> stack = uqff.parallel.ReplicatedStack(torch.arange(1.0, 4).view(3, 1, 1).expand(3, 2, 4))
        >>> stack(torch.ones(1, 1, 4), torch.tensor([[2, 0]]))
        tensor([[[12., 12.],
                 [ 4.,  4.]]])
    """

    dims = ("experts", "out", "in")
    _stats: list[InputStats] | None = None

    def begin_track_stats(self, *, products: bool = False) -> None:
        """See :meth:`Gathering.begin_track_stats`."""
        experts, _, inputs = self.size()
        self._stats = [InputStats(inputs, self.weight.device, products=products) for _ in range(experts)]

    def size(self) -> tuple[int, int, int]:
        """Experts, and this rank's outputs and inputs of each."""
        experts, outputs, inputs = self.weight_buffers.shape
        return experts, outputs, inputs

    def _where(self) -> tuple[str | None, Comm, DistributedKind]:
        return self.key, self.comm, self.kind

    def _product(self, x: torch.Tensor, groups: ExpertGroups) -> torch.Tensor:
        if self._stats is not None:
            for expert, _, rows in groups.rows(x):
                self._stats[expert].process(rows)
        y = gather_multiply(x, groups.indices, self.weight_buffers)
        return y if self.lora is None else self.lora(x, y, groups)

    def _biases(self, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        bias: torch.Tensor | None = self._plain_bias(dtype)
        return bias[indices] if bias is not None and bias.ndim == 2 else bias

    def forward(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """See :meth:`gather_forward`."""
        return self.gather_forward(x, indices)


class ColumnParallelStack(ReplicatedStack):
    """Stacked experts of each of which a rank holds some outputs (dimension 1), and their bias.

    Example:
        >>> import torch
        >>> from uqff.parallel import ColumnParallelStack, Shard
        >>> ColumnParallelStack(torch.ones(3, 8, 4), shard=Shard.simple(1, rank=0, world_size=2)).size()
        (3, 4, 4)
    """

    kind = DistributedKind.COLUMN_PARALLEL

    @classmethod
    def _shard(cls, comm: Comm) -> Shard:
        return Shard.simple(1, comm.rank, comm.world_size)


class RowParallelStack(ReplicatedStack):
    """Stacked experts of each of which a rank holds some inputs (dimension 2), and all of the bias.

    Example:
        >>> import torch
        >>> from uqff.parallel import RowParallelStack, Shard
        >>> RowParallelStack(torch.ones(3, 8, 4), shard=Shard.simple(2, rank=0, world_size=2)).size()
        (3, 8, 2)
    """

    kind = DistributedKind.ROW_PARALLEL

    @classmethod
    def _shard(cls, comm: Comm) -> Shard:
        return Shard.simple(2, comm.rank, comm.world_size)


class ExpertList(Gathering, torch.nn.ModuleList):
    """One layer per expert, of any types; all partitioned over the ranks alike.

    Example:
        >>> import torch
        >>> from uqff.parallel import ExpertList, ReplicatedLayer
        >>> weights = torch.ones(32, 64), uqff.quantize(torch.ones(32, 64), "q8_0")
        >>> experts = ExpertList([ReplicatedLayer(weight) for weight in weights])
        >>> experts.size()
        (2, 32, 64)
        >>> [expert.weight.kind for expert in experts]
        ['unquant', 'q8_0']
    """

    def __init__(self, layers: Sequence[QuantizedLinear], key: str | None = None) -> None:
        """Layers of equal size.

        Args:
            layers: in the order of experts, at least one.
            key: of the projection, for errors.

        Raises:
            ShapeError: there are none, or sizes differ.
            UnsupportedError: one is no layer.
        """
        for layer in layers:
            if not isinstance(layer, QuantizedLinear):
                got = type(layer).__name__
                raise UnsupportedError("not a layer", layer=key, expected="a parallel layer for each expert", got=got)
        super().__init__(layers)
        self.key = key
        shapes = [layer.weight_buffers.shape for layer in layers]
        odd = [i for i, shape in enumerate(shapes) if shape != shapes[0]]
        if not layers or odd:
            raise ShapeError(
                "no experts" if not layers else "experts have different shapes",
                layer=key,
                expected="at least 1" if not layers else list(shapes[0]),
                got=0 if not layers else f"{list(shapes[odd[0]])} for expert {odd[0]}",
            )

    def __getitem__(self, expert: int) -> QuantizedLinear:  # type: ignore[override]
        layer = self._modules[str(range(len(self))[expert])]
        assert isinstance(layer, QuantizedLinear)
        return layer

    def size(self) -> tuple[int, int, int]:
        """Experts, and this rank's outputs and inputs of each."""
        outputs, inputs = self[0].weight_buffers.shape
        return len(self), outputs, inputs

    def begin_track_stats(self, *, products: bool = False) -> None:
        """See :meth:`Gathering.begin_track_stats`."""
        for expert in range(len(self)):
            self[expert].begin_track_stats(products=products)

    def take_stats(self) -> list[InputStats]:
        """See :meth:`Gathering.take_stats`."""
        return [self[expert].take_stats() for expert in range(len(self))]

    def quantized_act_type(self) -> torch.dtype | str | None:
        """What the first expert asks for, as the engine has it."""
        return self[0].quantized_act_type()

    def _activation_dtype(self) -> torch.dtype | None:
        return self[0]._activation_dtype()

    def apply_isq(
        self,
        kind: str | int | None,
        device: torch.device | str | None = None,
        *,
        imatrix_weight: Any = None,
        **kwargs: Any,
    ) -> ExpertList:
        """New layers, each in another type; takes what :meth:`QuantizedLayer.apply_isq` does.

        The importance is ``[in]``, of all, or ``[experts, in]``, as :meth:`end_track_stats` gives it.
        """
        of_each = getattr(imatrix_weight, "ndim", 1) == 2 and len(imatrix_weight) == len(self)
        rows = imatrix_weight if of_each else [imatrix_weight] * len(self)
        made = [
            self[expert].apply_isq(kind, device, imatrix_weight=rows[expert], **kwargs) for expert in range(len(self))
        ]
        return ExpertList(made, self.key)

    def _where(self) -> tuple[str | None, Comm, DistributedKind]:
        return self.key, self[0].comm, self[0].kind

    def _product(self, x: torch.Tensor, groups: ExpertGroups) -> torch.Tensor:
        tokens, per_token = groups.indices.shape
        y = x.new_empty(tokens * per_token, self.size()[1])
        for expert, places, rows in groups.rows(x):
            y[places] = self[expert].forward_partial(rows)
        return y.view(tokens, per_token, y.shape[1])

    def _biases(self, indices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        biases = [self[expert]._plain_bias(dtype) for expert in range(len(self))]
        given = [bias for bias in biases if bias is not None]
        if not given:
            return None
        zeros = torch.zeros_like(given[0])
        return torch.stack([zeros if bias is None else bias for bias in biases])[indices]

    def forward(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """See :meth:`gather_forward`."""
        return self.gather_forward(x, indices)
