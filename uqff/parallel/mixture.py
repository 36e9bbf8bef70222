"""The sum over experts that every mixture ends in, whatever form the experts have.

Authority: mistral.rs v0.8.0, ``mistralrs-core/src/moe/experts.rs`` (``MoEExperts``, ``forward_fast``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import torch

from uqff.codec import blob as blobs
from uqff.codec.blob import LATEST
from uqff.codec.layer import Layer
from uqff.errors import ShapeError, UnsupportedError, located
from uqff.parallel.accept import check_activations, plain_of
from uqff.parallel.checkpoint_layers import beside, experts_of
from uqff.parallel.comm import Comm
from uqff.parallel.dummy import DummyLayer
from uqff.parallel.elsewhere import Elsewhere
from uqff.parallel.from_checkpoint import is_absent, prepared_experts
from uqff.parallel.gather import group_by_expert
from uqff.parallel.immediate import ImmediateIsq
from uqff.parallel.layer import DistributedKind
from uqff.parallel.loading import Run, at_once
from uqff.parallel.partition import OnMisaligned, part_of, split_fused
from uqff.parallel.projection import PROJECTIONS, Experts, Projection, UnloadedWhole, Whole, at, check_counts
from uqff.schema.header import HEADER

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from uqff.checkpoints import Checkpoint
    from uqff.container.file import UqffFile
    from uqff.parallel.immediate import Types
    from uqff.parallel.unloaded import UnloadedExperts
    from uqff.quantization.types import EffortName, Engine, Fallback

__all__ = ["Activation", "GatedActivation", "Handling", "Mixture", "MixtureOptions"]


class GatedActivation(ABC):
    """An activation of gate and up; others are of the gate alone, and up is multiplied by that."""

    @abstractmethod
    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """What goes into ``down``."""


Activation: TypeAlias = "Callable[[torch.Tensor], torch.Tensor] | GatedActivation"


class Handling(TypedDict, total=False):
    """What constructors of experts take as keywords besides weights and ranks; all may be left out.

    Attributes:
        act: the activation function, of the gate or a :class:`GatedActivation`; SiLU unless given.
        on_misaligned: what to do if blocks do not allow equal parts, see :mod:`uqff.parallel.experts`; an error unless
            given.
        device: where the slices go; they stay views of the weights, where they can be, if None.
    """

    act: Activation
    on_misaligned: OnMisaligned
    device: torch.device | str | None


class MixtureOptions(Handling, total=False):
    """:class:`Handling`, and what a file would tell.

    Attributes:
        key: of the experts, for errors: ``model.layers.0.mlp.experts``.
        version: that blobs are written with; that of the blobs that experts come from, if there are any.
    """

    key: str | None
    version: tuple[int, int, int]


class Mixture(Elsewhere):
    """What both forms share: how they are made, three projections, and the sum over experts."""

    def __init__(
        self,
        gate: Projection,
        up: Projection,
        down: Projection,
        comm: Comm | None = None,
        *,
        act: Activation = torch.nn.functional.silu,
        key: str | None = None,
    ) -> None:
        """Experts of three projections that are cut already; see the constructors for those that are not.

        Args:
            gate: this rank's outputs of all gates.
            up: likewise.
            down: the same numbers as inputs.
            comm: the ranks; a world of one if None.
            act: the activation function.
            key: of the experts, for errors.

        Raises:
            ShapeError: the projections do not fit each other.
            UnsupportedError: the activation is no function.
        """
        if not callable(act):
            got = repr(act)
            raise UnsupportedError("activation is no function", layer=key, expected="such as torch.relu", got=got)
        super().__init__()
        sizes = [each.size() for each in (gate, up, down)]
        experts, inner, hidden = sizes[0]
        if sizes != [(experts, inner, hidden), (experts, inner, hidden), (experts, hidden, inner)]:
            expected = f"gate and up [E, inter, hidden], down [E, hidden, inter], as gate {list(sizes[0])}"
            got = f"up {list(sizes[1])}, down {list(sizes[2])}"
            raise ShapeError("projections do not fit each other", layer=key, expected=expected, got=got)
        self.gate_proj = gate
        self.up_proj = up
        self.down_proj = down
        self.comm = Comm.of(comm)
        self.act = act
        self.key = key

    @classmethod
    @abstractmethod
    def _whole(cls, given: Experts, key: str | None, name: str, inner: int) -> Whole:
        """A projection as it is given to a constructor."""

    @classmethod
    def from_layers(
        cls,
        gate: Experts,
        up: Experts,
        down: Experts,
        comm: Comm | None = None,
        *,
        act: Activation = torch.nn.functional.silu,
        on_misaligned: OnMisaligned = "error",
        device: torch.device | str | None = None,
        key: str | None = None,
        version: tuple[int, int, int] = LATEST,
    ) -> Self:
        """The rank's part of whole weights, quantised or plain, with or without files.

        Args:
            gate: one weight ``[experts, inter, hidden]``, or one ``[inter, hidden]`` for each expert; only the bytes of
                the slice are read.
            up: likewise.
            down: ``[experts, hidden, inter]``, or ``[hidden, inter]`` for each expert.
            comm: the ranks; a world of one if None.
            act: the activation function.
            on_misaligned: what to do if blocks do not allow equal parts; see the module.
            device: where the slices go; they stay views of the weights, where they can be, if None.
            key: of the experts, for errors: ``model.layers.0.mlp.experts``.
            version: that blobs are written with.

        Raises:
            ShardError: the slices cannot be cut; or experts do not stack, or not come apart.
            ShapeError: the weights do not fit each other, or there are none; some experts have biases and others none.
            UnsupportedError: these are no weights; or have biases, which :class:`PackedExperts` do not take.
        """
        comm, given = Comm.of(comm), (gate, up, down)
        check_counts(given, key)
        wholes = [cls._whole(each, key, *projection) for each, projection in zip(given, PROJECTIONS, strict=True)]
        part = part_of([cut for whole in wholes for cut in whole.cuts()], comm, on_misaligned, key)
        made_gate, made_up, made_down = (whole.place(part, comm, version) for whole in wholes)
        made = cls(made_gate, made_up, made_down, comm, act=act, key=key)
        return made if device is None else made.to(device)

    @classmethod
    @abstractmethod
    def _form(cls, given: UnloadedExperts, key: str) -> UnloadedExperts:
        """A projection in the form that these experts have."""

    @classmethod
    def load(
        cls,
        gate: UnloadedExperts,
        up: UnloadedExperts,
        down: UnloadedExperts,
        comm: Comm | None = None,
        *,
        act: Activation = torch.nn.functional.silu,
        on_misaligned: OnMisaligned = "error",
        device: torch.device | str | None = None,
        key: str | None = None,
        run: Run = at_once,
    ) -> Callable[[], Self]:
        """The rank's part of experts that have not been loaded; nothing else of them is.

        Takes and raises what :meth:`from_layers` does.

        Args:
            gate: a stack, or a layer for each expert.
            up: likewise.
            down: likewise.
            comm: the ranks; a world of one if None.
            act: the activation function.
            on_misaligned: what to do if blocks do not allow equal parts.
            device: where the slices go.
            key: of the experts, for errors.
            run: loads stacks and single layers.

        Returns:
            What puts them together when they are loaded.
        """
        comm, given = Comm.of(comm), (gate, up, down)
        check_counts([each for each in given if isinstance(each, Sequence)], key)
        wholes = [
            UnloadedWhole(key, name, inner, cls._form(each, f"{key}.{name}"))
            for each, (name, inner) in zip(given, PROJECTIONS, strict=True)
        ]
        part = part_of([cut for whole in wholes for cut in whole.cuts()], comm, on_misaligned, key)
        begun = [whole.begin(part, comm, run, device) for whole in wholes]

        return partial(cls._together, begun, comm, act, key)

    @classmethod
    def _together(cls, begun: Sequence[Callable[[], Projection]], comm: Comm, act: Activation, key: str | None) -> Self:
        gate, up, down = [each() for each in begun]
        return cls(gate, up, down, comm, act=act, key=key)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        prefix: str,
        comm: Comm | None = None,
        *,
        num_experts: int,
        hidden: int,
        inter: int,
        bias: bool = False,
        isq: Types | ImmediateIsq | None = None,
        **handling: Unpack[Handling],
    ) -> Self | DummyLayer:
        """The rank's part of the experts of a checkpoint, plain or quantised, in any of the forms that they have there.

        See :mod:`uqff.parallel.checkpoint_layers` for the forms.  If the configuration says FP8 and the experts have
        plain numbers, they are taken as they are, with one warning (``PlainExpertsWarning``).

        Args:
            checkpoint: of :func:`uqff.open_checkpoint`.
            prefix: of the experts, ``model.layers.0.mlp.experts``.
            comm: the ranks; a world of one if None.
            num_experts: how many there are.
            hidden: inputs of gate and up.
            inter: their outputs.
            bias: whether biases are taken; those of the checkpoint are left out if not.
            isq: what the projections are quantised to, see :func:`~uqff.parallel.from_checkpoint.prepared`. They are
                whole when this returns, whatever threads made them.
            handling: see :class:`Handling`.

        Returns:
            The experts; a dummy if the checkpoint has nothing under that prefix.

        Raises:
            ShapeError: they have other sizes.
            UqffError: a layer is not valid, or what :meth:`from_layers` raises.
        """
        if is_absent(checkpoint, prefix, *beside(prefix)):
            return DummyLayer(prefix)
        shapes = ((inter, hidden), (inter, hidden), (hidden, inter))
        made = [
            prepared_experts(given, num_experts, shape, isq, bias=bias)
            for given, shape in zip(experts_of(checkpoint, prefix, num_experts), shapes, strict=True)
        ]
        run = isq.pool if isinstance(isq, ImmediateIsq) and isq.pool is not None else at_once
        return cls.load(made[0], made[1], made[2], comm, key=prefix, run=run, **handling)()

    @classmethod
    def from_file(cls, file: UqffFile, key: str, comm: Comm | None = None, **handling: Unpack[Handling]) -> Self:
        """The rank's part of the experts of an open file of 1.x: nothing else is read of it.

        Layers of pre-1.0 files have numbers, not names: they go to :meth:`from_layers`.

        Args:
            file: of :func:`uqff.open`.
            key: of the experts, ``model.layers.0.mlp.experts``.
            comm: the ranks; a world of one if None.
            handling: see :class:`Handling`.

        Raises:
            KeyError: there are no such experts.
            UqffError: a layer is not valid, or what :meth:`from_layers` raises.
        """
        wholes = [file[f"{key}.{name}"] for name, _ in PROJECTIONS]
        with located(file=file.place(f"{key}.{PROJECTIONS[0][0]}").path):
            return cls.from_layers(wholes[0], wholes[1], wholes[2], comm, key=key, **handling)

    @classmethod
    def from_fused(
        cls, gate_up: torch.Tensor, down: torch.Tensor, comm: Comm | None = None, **options: Unpack[MixtureOptions]
    ) -> Self:
        """The rank's part of a checkpoint that keeps gate and up of all experts in one tensor, in either convention.

        Args:
            gate_up: ``[E, hidden, 2·inter]``, or ``[E, 2·inter, hidden]``.
            down: ``[E, inter, hidden]``, or ``[E, hidden, inter]``.
            comm: the ranks; a world of one if None.
            options: see :class:`MixtureOptions`.

        Raises:
            ShapeError: the shapes fit in no way, see :func:`~uqff.parallel.partition.split_fused`.
            UqffError: what :meth:`from_layers` raises.
        """
        key = options.get("key")
        gate_up, down = plain_of("gate_up", gate_up, layer=key), plain_of("down", down, layer=key)
        return cls.from_layers(*split_fused(gate_up, down, layer=key), comm, **options)

    @classmethod
    def deserialize(
        cls, gate: Any, up: Any, down: Any, comm: Comm | None = None, **options: Unpack[MixtureOptions]
    ) -> Self:
        """The rank's part of pre-1.0 blobs: one stacked blob for each projection, or a list with one for each expert.

        Args:
            gate: bytes, or what has a buffer of them; or a list of such.
            up: likewise.
            down: likewise.
            comm: the ranks; a world of one if None.
            options: see :class:`MixtureOptions`.

        Raises:
            UqffError: a blob is not valid, or what :meth:`from_layers` raises.
        """
        given = (gate, up, down)
        layers = [
            _deserialized(each, at(options.get("key"), name))
            for each, (name, _) in zip(given, PROJECTIONS, strict=True)
        ]
        first = gate[:1] if isinstance(gate, (list, tuple)) else [gate]
        for blob in first:
            options.setdefault("version", HEADER.read(blob, exact=False)["version"])
        return cls.from_layers(layers[0], layers[1], layers[2], comm, **options)

    @property
    def num_experts(self) -> int:
        """How many experts there are."""
        return self.gate_proj.size()[0]

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a part of every expert, not all of it."""
        return self.down_proj._where()[2] is not DistributedKind.REPLICATED

    def forward(
        self, x: torch.Tensor, indices: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The weighted sum of the experts of each token; see the module for the formula.

        Args:
            x: ``[..., hidden]``, the same on every rank.
            indices: experts of each token, integers ``[..., experts_per_token]``; if None, as Llama 4 has it, ``x`` is
                ``[experts · tokens, hidden]``: the rows of the first expert, then those of the second, and so on.
            weights: what each counts, ``[..., experts_per_token]``, floating point; 1 if None.

        Returns:
            ``[..., hidden]`` in the dtype of ``x``, the same on every rank. Experts and ranks are added up in float32.

        Raises:
            ShapeError: shapes do not fit, or there is no such expert.
            UnsupportedError: the indices are not integers; activations or weights are no plain numbers.
        """
        check_activations(x, self.gate_proj.size()[2], layer=self.key)
        if indices is None:
            return self._of_rows(x)
        weights = torch.ones(indices.shape, dtype=x.dtype, device=x.device) if weights is None else weights
        check_activations(weights, layer=self.key)
        leading = tuple(x.shape[:-1])
        if tuple(indices.shape[:-1]) != leading or weights.shape != indices.shape:
            raise ShapeError(
                "indices and weights do not fit the activations",
                layer=self.key,
                expected=f"both {[*leading, 'experts_per_token']}",
                got=f"{list(indices.shape)} and {list(weights.shape)}",
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        rows, weights = x.reshape(-1, 1, x.shape[-1]), weights.reshape(-1, weights.shape[-1], 1).to(wide)
        counted = weights
        if self.sharded:  # each rank uses both for its part of the sum
            rows, counted = self.comm.sum_gradients(rows), self.comm.sum_gradients(weights)
        groups = group_by_expert(indices.reshape(-1, indices.shape[-1]), self.num_experts, layer=self.key)
        gate, up = (each.add_bias(each.gather_partial(rows, groups), groups) for each in (self.gate_proj, self.up_proj))
        inner = self.act(gate, up) if isinstance(self.act, GatedActivation) else self.act(gate) * up
        terms: torch.Tensor = self.down_proj.gather_partial(inner, groups)
        y = (terms.to(wide) * counted).sum(1)
        if self.sharded:
            y = self.comm.sum_all_reduce(y)
        bias = self.down_proj._biases(groups.indices, wide)
        if bias is not None:
            y = y + (bias * weights).sum(1)
        out: torch.Tensor = y.to(x.dtype).view(x.shape)
        return out

    def _of_rows(self, x: torch.Tensor) -> torch.Tensor:
        """What each expert makes of its rows.  Most are zeros, of tokens that were not sent to it."""
        if x.ndim != 2 or len(x) % self.num_experts:
            expected = f"[{self.num_experts} · tokens, hidden]"
            raise ShapeError("no rows for each expert", layer=self.key, expected=expected, got=list(x.shape))
        experts = torch.arange(self.num_experts, device=x.device)
        indices = experts.repeat_interleave(len(x) // self.num_experts)[:, None]
        projections = self.gate_proj, self.up_proj, self.down_proj
        if any(each._biases(indices[:1], x.dtype) is not None for each in projections):
            return self.forward(x, indices)
        sent = (x != 0).any(-1).nonzero()[:, 0]
        y = torch.zeros_like(x)
        return y.index_copy(0, sent, self.forward(x[sent], indices[sent])) if len(sent) else y

    def forward_autocast(self, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """:meth:`forward` in the dtype that the gate's family asks for; the result has the dtype of ``x``."""
        check_activations(x, layer=self.key)
        kind = self.gate_proj._activation_dtype()
        y: torch.Tensor = self.forward(x if kind is None else x.to(kind), indices, weights)
        return y.to(x.dtype)

    def apply_isq(
        self,
        kind: str | int | None,
        device: torch.device | str | None = None,
        *,
        imatrix_weights: Sequence[Any] | None = None,
        effort: EffortName = "engine",
        engine: Engine = "0.8",
        engine_biases: bool = False,
        on_fallback: Callable[[Fallback], None] | None = None,
    ) -> Self:
        """New experts with every weight in another type.

        Takes and raises what :meth:`~uqff.parallel.layer.QuantizedLayer.apply_isq` does.

        Args:
            kind: see there, and so are others.
            device: where the experts go.
            imatrix_weights: importance of the inputs of gate, up and down, each ``[in]`` or ``[experts, in]``.
            effort: how codes and scales are chosen.
            engine: whose quantiser.
            engine_biases: as the engine stores them.
            on_fallback: called for each weight that is stored as another type.
        """
        how: dict[str, Any] = {"effort": effort, "engine": engine, "engine_biases": engine_biases}
        projections = self.gate_proj, self.up_proj, self.down_proj
        gate, up, down = (
            each.apply_isq(kind, device, imatrix_weight=importance, on_fallback=on_fallback, **how)
            for each, importance in zip(projections, imatrix_weights or (None,) * 3, strict=True)
        )
        return type(self)(gate, up, down, self.comm, act=self.act, key=self.key)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        held = "a part of each" if self.sharded else "all of each"
        return f"{self.key or ''} {self.num_experts} experts, {held}, {self.comm!r}".strip()


def _deserialized(given: Any, key: str | None) -> Layer | list[Layer]:
    if not isinstance(given, (list, tuple)):
        with located(layer=key):
            return blobs.deserialize(given)
    layers = []
    for expert, blob in enumerate(given):
        with located(layer=f"{key or 'expert'}.{expert}"):
            layers.append(blobs.deserialize(blob))
    return layers
