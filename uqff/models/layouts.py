"""How the weights of a model lie where that is not a checkpoint's way: the engine's own keys in ``config.json``.

From 0.9.1 on mistral.rs makes UQFF out of GGUF files and keeps the order that rows have there.  Nothing in the
``.uqff`` files says so, only keys ``_mistralrs_*`` beside the numbers of the model::

    "_mistralrs_qk_rope_layout": "adjacent"      rows of Q and K of each head   a0 b0 a1 b1 ...
    "_mistralrs_qk_rope_layout": "half_split"    the same as without the key    a0 a1 ... b0 b1 ...

What every command does about them is decided here.  Adjacent rows are put in order as whole rows of blocks, so that no
code is touched (:mod:`uqff.families.rows`).  A key that means something else, or nothing that is known here, is
refused by whatever needs the checkpoint's order, and named; files are still read, verified and carried over with it.

Authority: mistral.rs v0.9.2, ``mistralrs-core/src/pipeline/loaders/mod.rs`` (``qk_rope_layout_from_config``),
``loaders/normal_loaders.rs`` (``is_gptx_for``), ``gdn/config.rs``, ``vision_models/gemma3/mod.rs``,
``gguf/muse_glimmer_bindings.rs``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np

from uqff.codec.layer import Layer
from uqff.codes import Version
from uqff.container.file import UqffFile
from uqff.errors import FormatError, ShapeError, UnsupportedError, located
from uqff.families import Unquant
from uqff.families.rows import Order, can_reorder, reordered, reordered_bias
from uqff.models.architectures import LANGUAGE_MODEL_PREFIX, architecture_of
from uqff.models.assets import CONFIG_NAME
from uqff.models.modules import config_beside

__all__ = [
    "ADJACENT",
    "KEYS",
    "LAYOUTS_SINCE",
    "PREFIX",
    "QK_ROPE_LAYOUT",
    "LayoutKey",
    "WeightLayout",
    "adjacent_order",
    "half_split_order",
    "in_order",
    "layout_beside",
    "without_rope_layout",
]

PREFIX: Final = "_mistralrs_"
"""How the engine's own keys begin."""

QK_ROPE_LAYOUT: Final = "_mistralrs_qk_rope_layout"
ADJACENT: Final = "adjacent"
HALF_SPLIT: Final = "half_split"

LAYOUTS_SINCE: Final = Version(1, 2, 0)
"""The first version of which a reader knows these keys; readers of older ones take every row for the checkpoint's."""

ORDERED: Final = ("Llama", "Mistral", "Mixtral", "Qwen2", "Gemma", "Gemma 2", "SmolLM3", "Granite 4")
"""Architectures, by title, whose adjacent rows are put in order: Q and K are layers of their own, without norms whose
numbers would have to move, too."""

HEADS: Final = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
"""Where ``config.json`` says how many heads a projection has."""

_PROJECTION: Final = re.compile(r"(?:.*\.)?self_attn\.(q_proj|k_proj)", re.DOTALL)


class LayoutKey(NamedTuple):
    """A key that is known.

    Attributes:
        name: of the key.
        harmless: values with which weights lie as in a checkpoint; null is one of them for every key.
        meaning: what it says.
        here: what is done about its other values.
    """

    name: str
    harmless: tuple[Any, ...]
    meaning: str
    here: str


KEYS: Final = (
    LayoutKey(
        QK_ROPE_LAYOUT,
        (HALF_SPLIT,),
        "order of the rows of Q and K in each head: `half_split` or `adjacent`",
        "`adjacent` rows are put in order",
    ),
    LayoutKey(
        "_mistralrs_gdn_v_head_layout",
        ("grouped",),
        "order of the value heads of gated delta nets: `grouped` or `tiled`",
        "`tiled` is refused",
    ),
    LayoutKey(
        LANGUAGE_MODEL_PREFIX,
        (False,),
        "whether the paths of a Gemma 3 text model begin with `language_model.`",
        "the paths are read so; no plain checkpoint is made of them",
    ),
    LayoutKey(
        "_mistralrs_muse_glimmer_gguf_collapsed_temporal",
        (False,),
        "whether the patch projection of Muse-Glimmer has its two frames added up",
        "`true` is refused",
    ),
    LayoutKey("_mistralrs_ple_hash", (), "constants by which Qwen4-Exp finds rows of its n-gram embeddings", "refused"),
    LayoutKey(
        "_mistralrs_mtp", (False, True), "whether to load a head that predicts several tokens", "nothing: no weight"
    ),
)
"""The keys of mistral.rs 0.9.1 to 0.9.5."""

_BY_NAME: Final = {key.name: key for key in KEYS}


@dataclass(frozen=True)
class WeightLayout:
    """What a ``config.json`` says of how its model's weights lie.

    Attributes:
        keys: the engine's keys by their place (``text_config._mistralrs_...``), with their values.
        foreign: places of those that change what weights mean, or may, and are not put in order here.
        heads: of the projections whose rows are adjacent, by the last word of their paths; empty if none are.
    """

    keys: Mapping[str, Any] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()
    heads: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Mapping[str, Any] | None) -> WeightLayout:
        """The layout that a configuration states; None, for no configuration, states none.

        Raises:
            FormatError: a value that the engine does not take, or a number of heads that is none.
        """
        keys = {place: value for place, value in _found(config or {}) if value is not None}
        foreign = [place for place, value in keys.items() if not _is_harmless(place, value)]
        rope = keys.get(QK_ROPE_LAYOUT)
        if rope not in (None, HALF_SPLIT, ADJACENT):
            raise FormatError(
                "unknown order of the rows of Q and K",
                field=f"config.{QK_ROPE_LAYOUT}",
                expected=f"{HALF_SPLIT} or {ADJACENT}",
                got=rope,
            )
        if rope != ADJACENT:
            return cls(keys, tuple(foreign))
        assert config is not None
        heads = _heads(config)
        if heads:
            foreign.remove(QK_ROPE_LAYOUT)
        return cls(keys, tuple(foreign), heads)

    def check(self, file: str | None = None) -> WeightLayout:
        """Refuse a layout from which the checkpoint's order cannot be had; the layout itself otherwise.

        Args:
            file: the configuration's path, for messages.

        Raises:
            UnsupportedError: naming the keys.
        """
        if self.foreign:
            place = self.foreign[0]
            known = _BY_NAME.get(place.rpartition(".")[2])
            raise UnsupportedError(
                f"weights do not lie as in a checkpoint: {known.meaning.replace('`', '')}"
                if known is not None
                else "the engine's key is not known: it may change what weights mean",
                file=file,
                field=f"config.{place}",
                expected="no such key" if known is None or not known.harmless else f"{known.harmless[0]}".lower(),
                got=", ".join(f"{place}: {self.keys[place]}" for place in self.foreign),
            )
        return self

    @property
    def foreign_values(self) -> dict[str, Any]:
        """The values of :attr:`foreign`: where two models have the same, their weights lie alike."""
        return {place: self.keys[place] for place in self.foreign}

    def heads_of(self, module: str) -> int | None:
        """How many heads of adjacent rows a module has; None if its rows lie as in a checkpoint."""
        match = _PROJECTION.fullmatch(module)
        return self.heads.get(match[1]) if match is not None else None

    def order_of(self, module: str, rows: int) -> Order | None:
        """The order that makes a module's stored rows those of a checkpoint; None if they are.

        Raises:
            ShapeError: the rows are not whole heads.
        """
        heads = self.heads_of(module)
        return None if heads is None else half_split_order(rows, heads, layer=module)

    def order_from(self, other: WeightLayout, module: str, rows: int) -> Order | None:
        """The order that makes a module's rows, as another layout has them, those of this one; None if they are.

        Raises:
            ShapeError: the rows are not whole heads.
        """
        heads = self.heads_of(module)
        if heads == other.heads_of(module):
            return None
        return other.order_of(module, rows) if heads is None else adjacent_order(rows, heads, layer=module)

    @property
    def notes(self) -> list[str]:
        """What is to be known of the model's weights, in sentences; nothing where they lie as in a checkpoint."""
        found = []
        if self.heads:
            found.append(f"{QK_ROPE_LAYOUT}: the rows of Q and K are adjacent, as in GGUF files")
        for place in self.foreign:
            known = _BY_NAME.get(place.rpartition(".")[2])
            meaning = "not known here: it may change what weights mean" if known is None else known.meaning
            found.append(f"{place}: {meaning.replace('`', '')} (it is {self.keys[place]})")
        return found


def layout_beside(file: UqffFile) -> WeightLayout:
    """The layout of an open model, by the ``config.json`` in its directory.

    Raises:
        FormatError: see :meth:`WeightLayout.of`, or the configuration cannot be read.
        OSError: likewise.
    """
    with located(file=file.paths[0].parent / CONFIG_NAME):
        return WeightLayout.of(config_beside(file))


def in_order(layer: Layer, order: Order | None) -> Layer:
    """A layer with its rows, and its bias, in another order; the layer itself if None.

    A weight whose rows cannot change places exactly becomes plain float32 numbers, of the values it stands for.

    Raises:
        ShapeError: the order is of another number of rows.
    """
    if order is None:
        return layer
    weight, bias = layer.weight, layer.bias_part
    moved = reordered(weight if can_reorder(weight) else Unquant.of(weight.numbers()), order)
    return Layer(moved, None if bias is None else reordered_bias(bias, order))


def without_rope_layout(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of a model whose rows of Q and K have been put in order."""
    return {key: value for key, value in config.items() if key != QK_ROPE_LAYOUT}


def half_split_order(rows: int, heads: int, *, layer: str | None = None) -> Order:
    """Where the rows of a checkpoint are among adjacent ones: ``[0, 2, 4, ..., 1, 3, 5, ...]`` for each head.

    Raises:
        ShapeError: the rows are not heads of an even number each.
    """
    return _exchanged(rows, heads, (-1, 2), layer)


def adjacent_order(rows: int, heads: int, *, layer: str | None = None) -> Order:
    """The inverse: ``[0, d/2, 1, d/2 + 1, ...]`` for each head of d rows."""
    return _exchanged(rows, heads, (2, -1), layer)


def _exchanged(rows: int, heads: int, cut: tuple[int, int], layer: str | None) -> Order:
    if heads < 1 or rows % (2 * heads):
        raise ShapeError(
            "rows are not whole heads", layer=layer, expected=f"rows in multiples of 2 x {heads} heads", got=rows
        )
    order: Order = np.arange(rows).reshape(heads, *cut).swapaxes(1, 2).reshape(-1)
    return order


def _found(values: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """All of the engine's keys, however deep they stand."""
    for name, value in values.items():
        if name.startswith(PREFIX):
            yield f"{place}{name}", value
        elif isinstance(value, Mapping):
            yield from _found(value, f"{place}{name}.")


def _is_harmless(place: str, value: Any) -> bool:
    parents, _, name = place.rpartition(".")
    if name == QK_ROPE_LAYOUT and parents:  # the engine looks for it at the top only
        return False
    return name in _BY_NAME and any(value is each or value == each for each in _BY_NAME[name].harmless)


def _heads(config: Mapping[str, Any]) -> dict[str, int]:
    """The heads of Q and K; none for an architecture whose rows are not put in order."""
    try:
        architecture = architecture_of(config)
    except UnsupportedError:
        return {}
    if architecture.title not in ORDERED:
        return {}
    found = {}
    for projection, name in HEADS.items():
        heads = config.get(name)
        heads = config.get("num_attention_heads") if heads is None else heads
        if type(heads) is not int or heads < 1:
            raise FormatError("not a count", field=f"config.{name}", expected="a number of at least 1", got=heads)
        found[projection] = heads
    return found
