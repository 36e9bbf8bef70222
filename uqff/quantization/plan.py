"""What a run of the quantiser will make, known from shapes alone: the layers of a file, where in the checkpoint their
weights are, and the type that each gets.

The experts of a projection are tensors of their own in most checkpoints, ``experts.3.up_proj.weight [out, in]``; in
some all are one tensor, gate and up joined::

    experts.gate_up_proj   [E, 2 * inner, hidden]   or transposed   [E, hidden, 2 * inner]
    experts.down_proj      [E, hidden, inner]                       [E, inner, hidden]

or, as MLX has them, one a projection: ``switch_mlp.up_proj.weight [E, inner, hidden]``.

In any case a 0.x file has a layer for each expert, and a 1.x file one layer ``[E, out, in]`` for each projection.

Authority: mistral.rs v0.9.2, ``mistralrs-core/src/moe/experts/checkpoint.rs`` (``ExpertSourceLayout::detect``),
``mistralrs-quant/src/lib.rs`` (``promote_for_sensitive_tensor``, ``resolve_immediate_isq``) and
``mistralrs-quant/src/uqff/tracker.rs`` (``resolve_type``: a topology's type is not promoted).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple

from uqff.checkpoints.safetensors import TensorFiles
from uqff.codec.layer import Layer
from uqff.codes import LOADED_DTYPES, DType, Version
from uqff.consolidated import PARAMS_NAME
from uqff.container.plan import layer_size
from uqff.errors import FormatError, ShapeError, UnsupportedError, UqffError, located
from uqff.families.part import Part
from uqff.models.architectures import (
    EMBEDDING_SINCE,
    EntryName,
    LayerName,
    Selector,
    architecture_of,
    check_numbered,
    entry_names,
    layer_names,
    selected_entries,
    selected_layers,
    with_stated_tie,
)
from uqff.models.config import config_to_write
from uqff.models.layouts import ADJACENT, LAYOUTS_SINCE, QK_ROPE_LAYOUT, WeightLayout
from uqff.models.patterns import Pattern
from uqff.quantization.linears import linear_weights
from uqff.quantization.recipe import Recipe
from uqff.quantization.types import Engine, planned, promoted, resolve
from uqff.schema.entries import FIRST
from uqff.simd.floats import Floats

__all__ = [
    "Goal",
    "PlannedLayer",
    "WeightSource",
    "engine_notes",
    "load_dtype",
    "plan_layer",
    "plan_model",
    "planned_bias",
    "residual_names",
    "restated_config",
]

UNUSED: Final = (".rotary_emb.inv_freq",)
"""Tensors that old checkpoints hold and no loader reads."""


class WeightSource(NamedTuple):
    """Where a weight ``[out, in]`` is: a tensor of the checkpoint, a stack of all experts or rows of one of them."""

    tensor: str
    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False

    def shape(self, checkpoint: TensorFiles) -> tuple[int, ...]:
        """Shape of the weight."""
        shape = checkpoint.shape(self.tensor)
        if self.expert is None:
            return (shape[0], *shape[:0:-1]) if self.transposed else shape
        out, last = shape[:0:-1] if self.transposed else shape[1:]
        return (out if self.rows is None else self.rows[1] - self.rows[0], last)

    def take(self, checkpoint: TensorFiles) -> Floats:
        """The weight, a view of the file."""
        weight = checkpoint.floats(self.tensor, self.expert)
        if self.expert is None:
            return weight
        weight = weight.T if self.transposed else weight
        return weight if self.rows is None else weight[slice(*self.rows)]

    def span(self, checkpoint: TensorFiles) -> tuple[int, int]:
        """Bytes of the tensor in which the weight lies."""
        whole = checkpoint.nbytes(self.tensor)
        if self.expert is None:
            return 0, whole
        experts, rows, _ = checkpoint.shape(self.tensor)
        expert = whole // experts
        start, stop = (0, rows) if self.transposed or self.rows is None else self.rows
        row = expert // rows
        return self.expert * expert + start * row, self.expert * expert + stop * row


@dataclass(frozen=True)
class Goal:
    """A layer of the file that will be made.

    Attributes:
        key: in the file: the index in 0.x, the path in 1.x.
        module: path of the layer in the model.
        index: its number in 0.x, None in 1.x.
        name: what rules of a recipe call it: see :mod:`uqff.quantization.recipe`.
        sources: where its weight is; of a stacked layer, that of each expert.
        stacked: whether the layer is the stack of its sources.
        shape: of the layer.
        bias: name of its bias in the checkpoint, None if it has none.
        sensitive: whether it is a head or an embedding that is promoted.
    """

    key: str
    module: str
    index: int | None
    name: LayerName
    sources: tuple[WeightSource, ...]
    stacked: bool
    shape: tuple[int, ...]
    bias: str | None
    sensitive: bool

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @cached_property
    def paths(self) -> list[str]:
        """The path in the model of each weight that the layer is made of: its own, or that of each expert."""
        if not self.stacked:
            return [self.module]
        stack, _, projection = self.key.rpartition(".")
        return [
            f"{stack}.{at}.{projection}" if source.expert is not None else source.tensor.removesuffix(".weight")
            for at, source in enumerate(self.sources)
        ]


@dataclass(frozen=True)
class PlannedLayer:
    """A layer of one output before it is made.

    Attributes:
        requested: the type asked for it, after recipe and promotion.
        promoted: whether that is because it is a head or an embedding.
        stored: the type it gets.
        reason: why that is another, else empty.
        size: bytes of its payload.
        meta: the layer without its values.
        kept: whether it stays what it is in the checkpoint.
    """

    requested: str
    promoted: bool
    stored: str
    reason: str
    size: int
    meta: Layer
    kept: bool = False

    @property
    def is_carried(self) -> bool:
        """Whether the checkpoint's own record is stored."""
        return self.kept and not self.meta.weight.UNQUANTISED

    @property
    def by_expert(self) -> bool:
        """Whether the stack is the experts one after the other: HQQ, FP8 and F8Q8 have groups or scales across them."""
        return self.meta.weight.BY_EXPERT and not self.is_carried


def plan_model(
    checkpoint: TensorFiles, version: Version, layers: Pattern | Literal["auto"] | None, *, promote: bool
) -> list[Goal]:
    """The layers that a file has, in its order.

    Args:
        checkpoint: what is quantised.
        version: of the file.
        layers: which weights are layers, if not those of the architecture; ``auto`` for those of linear layers.
        promote: whether heads and embeddings are, in versions that promote them.

    Raises:
        UqffError: the architecture is unknown, or the checkpoint lacks a weight or has one that is no matrix.
    """
    with located(file=checkpoint.path):
        if layers is None and not checkpoint.config and (checkpoint.path / PARAMS_NAME).is_file():
            raise UnsupportedError(
                "Mistral's own layout, which is known of Voxtral Realtime only",
                expected="config.json, and tensors by the names of transformers",
                got=PARAMS_NAME,
            )
        chosen = linear_weights(checkpoint.config, _shapes(checkpoint)) if isinstance(layers, str) else layers
        if version < FIRST:
            return [_of_blob(checkpoint, name) for name in _blob_names(checkpoint, chosen)]
        promote = promote and version >= EMBEDDING_SINCE
        return [_of_entry(checkpoint, name, promote) for name in _entry_names(checkpoint, version, chosen)]


def _blob_names(checkpoint: TensorFiles, layers: Selector | None) -> list[LayerName]:
    if layers is not None:
        return selected_layers(checkpoint.config, _shapes(checkpoint), layers)
    check_numbered(checkpoint.config)
    return layer_names(checkpoint.config)


def _entry_names(checkpoint: TensorFiles, version: Version, layers: Selector | None) -> list[EntryName]:
    if layers is not None:
        return selected_entries(checkpoint.config, _shapes(checkpoint), layers, version)
    return entry_names(checkpoint.config, version)


def _shapes(checkpoint: TensorFiles) -> Mapping[str, tuple[int, ...]]:
    return {name: checkpoint.shape(name) for name in checkpoint}


def _of_blob(checkpoint: TensorFiles, name: LayerName) -> Goal:
    source = _source(checkpoint, name)
    bias = name.bias if name.bias in checkpoint else None
    shape = _matrix(checkpoint, name, source)
    return Goal(str(name.index), name.module, name.index, name, (source,), False, shape, bias, False)


def _of_entry(checkpoint: TensorFiles, entry: EntryName, promote: bool) -> Goal:
    sources = [_source(checkpoint, part) for part in entry.parts]
    shapes = [_matrix(checkpoint, *each) for each in zip(entry.parts, sources, strict=True)]
    first, shape = entry.parts[0], shapes[0]
    sensitive = promote and entry.role is not None
    if not entry.is_stacked:
        bias = next((each for each in (first.bias, f"{first.module}_bias") if each in checkpoint), None)
        if len(shape) == 3:
            (whole,) = sources
            sources = [whole._replace(expert=expert) for expert in range(shape[0])]
        return Goal(entry.key, entry.key, None, first, tuple(sources), len(shape) == 3, shape, bias, sensitive)
    for part, other in zip(entry.parts, shapes, strict=True):
        if other != shape:
            raise ShapeError(
                "experts of several shapes", layer=part.module, expected=list(shape), got=list(other), field="shape"
            )
        if part.bias in checkpoint:
            raise UnsupportedError("the engine reads no biases of experts", layer=part.module, got=part.bias)
    joined = sources[0].expert is not None
    name = LayerName(first.index, sources[0].tensor, first.weight, first.block) if joined else first
    return Goal(entry.key, entry.key, None, name, tuple(sources), True, (len(sources), *shape), None, sensitive)


def _matrix(checkpoint: TensorFiles, name: LayerName, source: WeightSource) -> tuple[int, ...]:
    shape = source.shape(checkpoint)
    if len(shape) not in (2, 3):
        raise ShapeError("weight is no matrix", layer=name.module, got=list(shape))
    return shape


def _source(checkpoint: TensorFiles, name: LayerName) -> WeightSource:
    if name.weight in checkpoint:
        return WeightSource(name.weight)
    if name.module in checkpoint and len(checkpoint.shape(name.module)) == 3 and _takes_turns(checkpoint):
        return WeightSource(name.module, transposed=True)  # gpt-oss' in plain numbers: inputs before outputs
    joined = None if name.stacked is None else _joined(checkpoint, name, name.stacked)
    if joined is None:
        raise FormatError("the checkpoint lacks a weight", layer=name.module, got=name.weight)
    return joined


def _takes_turns(checkpoint: TensorFiles) -> bool:
    try:
        return architecture_of(checkpoint.config).takes_turns
    except UnsupportedError:
        return False


def _joined(checkpoint: TensorFiles, name: LayerName, stacked: str) -> WeightSource | None:
    """An expert's weight in tensors of all experts; None if there are none."""
    path, _, projection = stacked.rpartition(".")
    of_mlx = f"{path.removesuffix('experts')}switch_mlp.{projection}.weight"
    if of_mlx in checkpoint and name.expert is not None and len(checkpoint.shape(of_mlx)) == 3:
        experts = checkpoint.shape(of_mlx)[0]
        if name.expert >= experts:
            raise ShapeError("too few experts", layer=name.module, expected=name.expert + 1, got=experts)
        return WeightSource(of_mlx, name.expert)
    gate_up, down = f"{path}.gate_up_proj", f"{path}.down_proj"
    if gate_up not in checkpoint or down not in checkpoint:
        return None
    shapes = [checkpoint.shape(each) for each in (gate_up, down)]
    expected = "[E, 2 * inner, hidden] and [E, hidden, inner], or both transposed"
    if all(len(shape) == 3 for shape in shapes):
        (experts, a, b), (others, c, d) = shapes
        transposed = (a, b) != (2 * d, c)
        inner = c if transposed else d
        if experts == others and (a, b) in ((2 * d, c), (d, 2 * c)) and name.expert is not None:
            if name.expert >= experts:
                raise ShapeError("too few experts", layer=name.module, expected=name.expert + 1, got=experts)
            if projection == "down_proj":
                return WeightSource(down, name.expert, None, transposed)
            start = inner if projection == "up_proj" else 0
            return WeightSource(gate_up, name.expert, (start, start + inner), transposed)
    raise ShapeError("experts of another shape", layer=name.module, expected=expected, got=[*map(list, shapes)])


def residual_names(checkpoint: TensorFiles, goals: Sequence[Goal]) -> list[str]:
    """What is no layer: the embedding too if it is the head's weight only, but not a head that is not used."""
    taken = {f"{goal.module}.weight" for goal in goals}
    taken |= {goal.bias for goal in goals if goal.bias is not None}
    for goal in goals:
        if goal.stacked or goal.sources[0].expert is not None:
            taken |= {source.tensor for source in goal.sources}
    taken |= _unused_head(checkpoint, goals)
    return [name for name in checkpoint if name not in taken and not name.endswith(UNUSED)]


def _unused_head(checkpoint: TensorFiles, goals: Sequence[Goal]) -> set[str]:
    """The head's own weight in the checkpoint of a tied model, whose embedding is a layer."""
    try:
        head = layer_names(checkpoint.config)[0]
    except UqffError:
        return set()
    tied = head.weight != f"{head.module}.weight"
    return {f"{head.module}.weight"} if tied and any(f"{goal.key}.weight" == head.weight for goal in goals) else set()


def restated_config(checkpoint: TensorFiles, version: Version) -> dict[str, Any] | None:
    """What must stand in ``config.json`` for the engine to load the model; None if the checkpoint's own will do.

    Raises:
        UnsupportedError: a model that the engine ties has a head of its own; or the weights do not lie as in other
            checkpoints, see :mod:`uqff.models.layouts`, and readers of the version know of no other way; or see
            :func:`uqff.models.config.config_to_write`.
        FormatError: see :meth:`WeightLayout.of`.
    """
    path = str(checkpoint.config_path)
    with located(file=path):
        layout = WeightLayout.of(checkpoint.config)
        if version < LAYOUTS_SINCE:
            layout.check()
            if layout.heads:
                raise UnsupportedError(
                    "rows of Q and K are adjacent, which readers of this version do not know",
                    field=f"config.{QK_ROPE_LAYOUT}",
                    expected="half_split, or another format",
                    got=f"{ADJACENT}, to be written as {version}",
                )
    try:
        stated = with_stated_tie(checkpoint.config) if version >= EMBEDDING_SINCE else None
    except UqffError:
        stated = None
    if stated is not None and checkpoint.config.get("tie_word_embeddings") is False and "lm_head.weight" in checkpoint:
        raise UnsupportedError(
            "head and embedding of this architecture are one matrix",
            file=str(checkpoint.path),
            field="config.tie_word_embeddings",
            expected="true, or no lm_head.weight",
            got="false",
        )
    return config_to_write(checkpoint.config_path, stated or checkpoint.config, version)


def engine_notes(checkpoint: TensorFiles, goals: Sequence[Goal]) -> list[str]:
    """What the engine makes otherwise of a checkpoint, in sentences.

    Authority: 0.8.12, 0.8.23, 0.9.5: files without the biases, and other logits of a file that has them.
    """
    try:
        architecture = architecture_of(checkpoint.config)
    except UnsupportedError:
        return []
    dropped = architecture.drops_biases
    biases = sum(goal.bias is not None and goal.module.startswith(dropped) for goal in goals)
    if not biases:
        return []
    what = "1 bias" if biases == 1 else f"{biases} biases"
    title = architecture.title
    return [f"{what} of {title} stored: the engine drops such when it quantises, and adds them when it loads"]


def load_dtype(checkpoint: TensorFiles, goals: Sequence[Goal], dtype: str) -> DType:
    """The dtype asked for, or the one that holds every layer exactly; the layers' own dtypes are checked.

    Layers that are computed from codes have none; if all are, it is that of the other tensors.
    """
    found: dict[str, str] = {}
    computed = checkpoint.computed
    for goal in goals:
        for source in goal.sources:
            if source.tensor not in computed:
                found.setdefault(checkpoint.dtype(source.tensor), goal.module)
    for stored, module in found.items():
        if stored not in LOADED_DTYPES:
            expected = ", ".join(LOADED_DTYPES)
            raise UnsupportedError(
                "weight cannot be quantised", layer=module, field="dtype", expected=expected, got=stored
            )
    if dtype != "auto":
        if dtype.upper() not in LOADED_DTYPES:
            raise UnsupportedError("unknown dtype", field="dtype", expected="auto, f32, f16 or bf16", got=dtype)
        return LOADED_DTYPES[dtype.upper()]
    if computed and not found:
        found = {checkpoint.dtype(name): name for name in checkpoint if name not in computed}
        found = {stored: name for stored, name in found.items() if stored in LOADED_DTYPES}
    return LOADED_DTYPES[next(iter(found))] if len(found) == 1 else DType.F32


def plan_layer(
    checkpoint: TensorFiles,
    goal: Goal,
    kind: str,
    recipe: Recipe | None,
    *,
    engine: Engine,
    version: Version,
    dtype: DType,
    engine_biases: bool = False,
) -> PlannedLayer:
    """The type of a layer, and what is known of it for that.

    Args:
        checkpoint: holds its bias.
        goal: the layer.
        kind: the default type of the output.
        recipe: what a recipe says of a layer is neither the default nor promoted.
        engine: whose rules.
        version: of the file.
        dtype: the load dtype.
        engine_biases: whether biases are stored as the engine does it, see :mod:`uqff.families.biases`.

    Raises:
        UqffError: the layer cannot be what is asked for, or not in that version.
    """
    explicit = None if recipe is None else recipe.explicit_kind(goal.name, engine=engine)
    requested = explicit or (promoted(kind) if goal.sensitive else kind)
    with located(layer=goal.module):
        stored, reason = resolve(requested, goal.shape, engine, version=version)
        weight = planned(stored, goal.shape, dtype)
        bias_dtype = weight.BIAS.dtype(dtype, version, engine=engine_biases)
        layer = Layer(weight, planned_bias(checkpoint, goal, bias_dtype))
        size = layer_size(layer, version)
    return PlannedLayer(requested, explicit is None and requested != kind, stored, reason, size, layer)


def planned_bias(checkpoint: TensorFiles, goal: Goal, dtype: DType) -> Part | None:
    """The bias of a layer without its bytes; None if it has none."""
    return None if goal.bias is None else Part.planned(checkpoint.shape(goal.bias), dtype)
