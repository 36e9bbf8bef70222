"""Which weights of a model are layers of a UQFF, and in which order: layer index to weight, per architecture.

A pre-1.0 file knows its layers by number only.  Index 0 is the output projection (``lm_head``; of a tied model it is
the embedding matrix, quantised, while the dense one stays in the residual).  Then come the decoder layers, each with
its projections in the order that :mod:`uqff.models.table` declares.  Everything else is residual: embedding, norms.

A 1.x file names them by their path in the model.  The experts of a decoder layer are stacked there, one layer for each
projection.  From 1.2 on the embedding is a layer too, and a tied model has no head of its own.

Authority: mistral.rs v0.6.0, ``mistralrs-core/src/models/*.rs`` and ``vision_models/gemma3/text.rs`` (``get_layers``);
v0.8.0 has the same order on a CPU; v0.9.2, ``mistralrs-core/src/layers.rs`` (``use_legacy_tied_uqff_head``) and
``moe/``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from uqff.codes import Version
from uqff.errors import FormatError, UnsupportedError, UqffError
from uqff.limits import MAX_BLOCKS, MAX_MODEL_LAYERS
from uqff.models.table import ARCHITECTURES, LANGUAGE_MODEL_PREFIX, architecture_of
from uqff.models.text import Architecture, Tower, count, given

__all__ = [
    "ARCHITECTURES",
    "LANGUAGE_MODEL_PREFIX",
    "Architecture",
    "EntryName",
    "LayerName",
    "Selector",
    "architecture_of",
    "block_of",
    "check_numbered",
    "embedding_name",
    "entry_names",
    "idle_paths",
    "is_table",
    "is_tied_model",
    "last_block",
    "layer_names",
    "pieces_of",
    "selected_entries",
    "selected_layers",
    "stacked_names",
    "text_values",
    "tower_names",
    "with_stated_tie",
]

EMBEDDING_SINCE: Final = Version(1, 2, 0)
"""The first version in which the embedding is a layer, and a tied model has no other head."""


@dataclass(frozen=True)
class LayerName:
    """A layer of a UQFF.

    Attributes:
        index: its number in a pre-1.0 file.
        module: path of the layer in the model, without ``.weight``.
        weight: name of its weight in the checkpoint; not ``module.weight`` for the head of a tied model.
        block: number of the decoder layer it belongs to, None for the head.
        expert: number of the expert it belongs to, None if to none.
        stacked: path of the 1.x layer that it is a part of, if it belongs to an expert.
        promoted: whether the engine quantises it as finely as the embedding, whose layer it is not.
    """

    index: int
    module: str
    weight: str
    block: int | None
    expert: int | None = None
    stacked: str | None = None
    promoted: bool = False

    @property
    def key(self) -> str:
        """Path of the 1.x layer that it is, or is a part of."""
        return self.stacked or self.module

    @property
    def bias(self) -> str:
        """Name that its bias has in the checkpoint, if there is one."""
        return f"{self.module}.bias"


@dataclass(frozen=True)
class EntryName:
    """A layer of a 1.x file.

    Attributes:
        key: its path in the model, without ``.weight``.
        parts: what it is made of: one layer, or one for each expert, in order.
        role: ``head`` or ``embedding``, if it is that or treated like it; the embedding of a tied model is both, and
            called by the latter.
    """

    key: str
    parts: tuple[LayerName, ...]
    role: Literal["head", "embedding"] | None = None

    @property
    def is_stacked(self) -> bool:
        """Whether it has a weight for each expert."""
        return self.parts[0].stacked is not None


def layer_names(config: Mapping[str, Any]) -> list[LayerName]:
    """The layers of a model in the order of the layer index.

    Args:
        config: the parsed ``config.json``.

    Raises:
        UnsupportedError: the architecture is unknown.
        FormatError: the configuration lacks a number or has a senseless one.
    """
    return _layer_names(config, numbered=True)


def last_block(config: Mapping[str, Any]) -> list[str]:
    """The modules of a model's last decoder layer, and keys of its stacks of experts, by their names in files.

    Raises:
        UnsupportedError: the architecture is unknown.
        FormatError: the configuration lacks the number of layers, or no model has as many.
    """
    architecture, config = architecture_of(config), text_values(config)
    last = count(config, "num_hidden_layers", least=1, most=MAX_BLOCKS) - 1
    paths = _block_paths(architecture, config, last, numbered=False)
    names = {name for path, _, stacked, _ in paths for name in (path, stacked) if name}
    return [f"{architecture.stack}.{last}.{name}" for name in sorted(names)]


def _layer_names(config: Mapping[str, Any], *, numbered: bool) -> list[LayerName]:
    """The layers that pre-1.0 files have, or all."""
    architecture = architecture_of(config)
    tied = is_tied(architecture, config)
    config = text_values(config)
    head = architecture.head
    names = [LayerName(0, head, f"{architecture.embedding if tied else head}.weight", None)]
    blocks = count(config, "num_hidden_layers", least=1, most=MAX_BLOCKS)
    experts = config.get(architecture.expert_count)
    per_block = sum(
        len(group.paths) * (experts if group.stacked and type(experts) is int else 1) for group in architecture.groups
    )
    if blocks * per_block > MAX_MODEL_LAYERS:
        raise FormatError(
            "more layers than any model has",
            field="config.num_hidden_layers",
            expected=f"at most {MAX_MODEL_LAYERS} weights",
            got=f"{blocks} x {per_block}",
        )
    for block in range(blocks):
        for path, expert, stacked, promoted in _block_paths(architecture, config, block, numbered=numbered):
            module = f"{architecture.stack}.{block}.{path}"
            key = f"{architecture.stack}.{block}.{stacked}" if stacked else None
            names.append(LayerName(len(names), module, f"{module}.weight", block, expert, key, promoted))
    return names


def text_values(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a ``config.json`` that has the numbers of the language model; all of it, if it has no other.

    Raises:
        UnsupportedError: the architecture is unknown.
        FormatError: there is no such part.
    """
    architecture = architecture_of(config)
    if not architecture.text_config:
        stated = {here: config[there] for here, there in architecture.numbers.items() if there in config}
        return {**config, **stated} if stated else config
    text = config.get(architecture.text_config)
    if not isinstance(text, dict):
        raise FormatError("not an object", field=f"config.{architecture.text_config}", got=type(text).__name__)
    return {**architecture.defaults, **text}


def tower_names(config: Mapping[str, Any]) -> list[EntryName]:
    """The layers that a model has besides those of its language model; they have no numbers.

    Args:
        config: the parsed ``config.json``.

    Raises:
        UnsupportedError: the architecture is unknown.
        FormatError: the configuration lacks a number or has a senseless one.
    """
    entries: list[EntryName] = []
    for tower in architecture_of(config).towers:
        if tower.needs and _placed(config, tower.needs) in (None, 0):
            continue
        several = tower.depth or tower.default is not None
        blocks = [f"{tower.path}.{block}" for block in range(_depth(tower, config))] if several else [tower.path]
        for module in (f"{block}.{path}" if path else block for block in blocks for path in tower.paths):
            part = LayerName(-1, module, f"{module}.weight", block_of(module))
            entries.append(EntryName(module, (part,), "embedding" if tower.promoted else None))
    return entries


def _placed(config: Mapping[str, Any], place: str) -> Any:
    """What stands at a dotted place; None if nothing does.

    Raises:
        FormatError: there is something else than an object on the way.
    """
    parent, _, key = place.rpartition(".")
    values = _placed(config, parent) if parent else config
    if not isinstance(values, Mapping):
        raise FormatError("not an object", field=f"config.{parent}", got=type(values).__name__)
    return values.get(key)


def _depth(tower: Tower, config: Mapping[str, Any]) -> int:
    """How many blocks a tower has."""
    depth = _placed(config, tower.depth) if tower.depth else None
    if depth is None and tower.default is not None:
        return tower.default
    return count({tower.depth: depth}, tower.depth, least=tower.less, most=MAX_BLOCKS) - tower.less


def embedding_name(config: Mapping[str, Any]) -> str:
    """Path of the embedding matrix in the model, without ``.weight``.

    Raises:
        UnsupportedError: the architecture is unknown.
    """
    return architecture_of(config).embedding


def entry_names(config: Mapping[str, Any], version: tuple[int, int, int]) -> list[EntryName]:
    """The layers of a 1.x file in the order in which the engine writes them: sorted by key.

    Args:
        config: the parsed ``config.json``.
        version: 1.0.0 or later.

    Raises:
        UnsupportedError: the architecture is unknown.
        FormatError: the configuration lacks a number or has a senseless one.
    """
    head, *blocks = _layer_names(config, numbered=False)
    entries = [*stacked_names(blocks), *tower_names(config)]
    embedding = embedding_name(config)
    tied = head.weight == f"{embedding}.weight"
    # Before, other tied models have a head of their own; the loaders of these multiply by the dense embedding.
    if not tied or (version < EMBEDDING_SINCE and architecture_of(config).tied != "always"):
        entries.append(EntryName(head.module, (head,), "head"))
    if version >= EMBEDDING_SINCE and not architecture_of(config).embeds_plainly:
        part = LayerName(len(blocks) + 1, embedding, f"{embedding}.weight", None)
        entries.append(EntryName(embedding, (part,), "embedding"))
    return sorted(entries, key=lambda entry: entry.key)


def with_stated_tie(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A configuration that says that the head is the embedding, where the architecture implies it and it does not.

    The engine takes models of these architectures for untied if nobody says otherwise, and then finds no head in a file
    of 1.2; None if there is nothing to say.

    Authority: mistral.rs v0.9.2, ``mistralrs-core/src/models/gemma.rs`` and ``gemma2.rs`` (``word_emb_default``).

    Raises:
        UnsupportedError: the architecture is unknown.
    """
    if architecture_of(config).tied != "always" or config.get("tie_word_embeddings") is True:
        return None
    return {**config, "tie_word_embeddings": True}


def idle_paths(config: Mapping[str, Any]) -> set[str]:
    """Paths of modules that a file has and a model does not: keys and values of layers that take those of others.

    Raises:
        UnsupportedError: the architecture is unknown.
        FormatError: the configuration lacks a number or has a senseless one.
    """
    architecture = architecture_of(config)
    if not architecture.idle:
        return set()
    values = text_values(config)
    blocks = count(values, "num_hidden_layers", least=1, most=MAX_BLOCKS)
    return {
        f"{architecture.stack}.{block}.{path}"
        for block in range(blocks)
        for group in architecture.idle
        if group.when is None or group.when.holds(values, block)
        for path in group.paths
    }


def is_table(config: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor is of a table that stays as it is stored; never of an unknown architecture."""
    try:
        tables = architecture_of(config).tables
    except UnsupportedError:
        return False
    return any(f".{table.path}." in name for table in tables)


def pieces_of(config: Mapping[str, Any], name: str) -> list[str]:
    """The names of the tensors that checkpoints have in place of a table, in order; none of anything else.

    Raises:
        FormatError: the configuration has a senseless number of them.
    """
    for table in architecture_of(config).tables:
        if name.endswith(f".{table.path}.weight"):
            pieces = given(text_values(config), table.count, table.default, least=1)
            path = name.removesuffix("weight")
            return [f"{path}{table.pieces.format(piece=piece)}.weight" for piece in range(pieces)]
    return []


def stacked_names(names: Sequence[LayerName]) -> list[EntryName]:
    """Layers as 1.x has them: those of the experts of a projection together, in order of the experts."""
    parts: dict[str, list[LayerName]] = {}
    for name in names:
        parts.setdefault(name.key, []).append(name)
    return [EntryName(key, tuple(group), "embedding" if group[0].promoted else None) for key, group in parts.items()]


class Selector(Protocol):
    """What chooses weights by their names: :class:`uqff.models.patterns.Pattern`, or a list of them.

    Attributes:
        text: what it is called in messages.
    """

    text: str

    def search(self, name: str) -> bool:
        """Whether a weight is chosen."""


def selected_layers(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], pattern: Selector
) -> list[LayerName]:
    """The weights whose name a pattern is found in, as layers.

    Args:
        config: the parsed ``config.json``; the order of a known architecture is kept, whatever else matches follows in
            natural order (``layers.2`` before ``layers.10``).
        shapes: the checkpoint's tensors; only matrices (and stacks of them) named ``<module>.weight`` can be layers.
        pattern: searched in ``<module>.weight``.

    Raises:
        FormatError: nothing matches.
    """
    try:
        known = layer_names(config)
    except UqffError:
        known = []
    chosen = {name.module: name.weight for name in known if name.weight in shapes}
    others = (name.removesuffix(".weight") for name in shapes if name.endswith(".weight"))
    for module in sorted(others, key=_natural):
        chosen.setdefault(module, f"{module}.weight")
    names: list[LayerName] = []
    for module, weight in chosen.items():
        if len(shapes[weight]) in (2, 3) and pattern.search(f"{module}.weight"):
            names.append(LayerName(len(names), module, weight, block_of(module)))
    if not names:
        raise FormatError("no weight matches", field="layers", got=pattern.text)
    return names


def selected_entries(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], pattern: Selector, version: tuple[int, int, int]
) -> list[EntryName]:
    """The weights whose name a pattern is found in, as layers of a 1.x file.

    Takes and raises what :func:`selected_layers` does.  The experts of a known architecture are one layer, which is
    found by its own name or by any that its weights have in the checkpoint.

    Args:
        version: 1.0.0 or later.
    """
    try:
        known, names = entry_names(config, version), _layer_names(config, numbered=False)
    except UqffError:
        known, names = [], []
    chosen = [
        entry
        for entry in known
        if any(pattern.search(f"{module}.weight") for module in (entry.key, *(part.module for part in entry.parts)))
    ]
    taken = {f"{name.module}.weight" for name in names} | {part.weight for entry in known for part in entry.parts}
    for name, shape in shapes.items():
        if name.endswith(".weight") and name not in taken and len(shape) in (2, 3) and pattern.search(name):
            module = name.removesuffix(".weight")
            chosen.append(EntryName(module, (LayerName(len(chosen), module, name, block_of(module)),)))
    if not chosen:
        raise FormatError("no weight matches", field="layers", got=pattern.text)
    return sorted(chosen, key=lambda entry: entry.key)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key that takes runs of digits as numbers."""
    return [(0, int(run[:18]), run) if run.isdecimal() else (1, 0, run) for run in re.findall(r"[0-9]+|[^0-9]+", name)]


def block_of(module: str) -> int | None:
    """The engine's rule for the number of a decoder layer, or of whatever else calls itself a layer."""
    match = re.search(r"(?:^|\.)(?:layers?|h)\.([0-9]{1,9})(?:\.|$)", module)
    return int(match[1]) if match else None


def is_tied(architecture: Architecture, config: Mapping[str, Any]) -> bool:
    """Whether the head of a model is its embedding matrix, by the whole of its configuration."""
    if architecture.tied == "always":
        return True
    text = config if architecture.tie_at_top else config.get(architecture.text_config, config)
    key = architecture.numbers.get("tie_word_embeddings", "tie_word_embeddings")
    tied = text.get(key) if isinstance(text, Mapping) else None
    return architecture.tied if tied is None else tied is True


def check_numbered(config: Mapping[str, Any]) -> None:
    """Make sure that the layers of an architecture have numbers, see :attr:`Architecture.numbered`.

    Raises:
        UnsupportedError: they have none, or the architecture is unknown.
    """
    architecture = architecture_of(config)
    if not architecture.numbered:
        raise UnsupportedError(
            "layers of this architecture have no numbers",
            field="config.architectures",
            expected="version 1.0 or later",
            got=architecture.title,
        )


def is_tied_model(config: Mapping[str, Any]) -> bool:
    """Whether the head of the model that a ``config.json`` describes is its embedding matrix.

    Of an unknown architecture, whether the configuration says so.
    """
    try:
        architecture = architecture_of(config)
    except UnsupportedError:
        return config.get("tie_word_embeddings") is True
    return is_tied(architecture, config)


def _block_paths(
    architecture: Architecture, config: Mapping[str, Any], block: int, *, numbered: bool
) -> Iterator[tuple[str, int | None, str | None, bool]]:
    """Path of each weight, the expert it belongs to, the path it is stacked under, and whether it is promoted."""
    for group in architecture.groups:
        if (numbered and not group.numbered) or (group.when is not None and not group.when.holds(config, block)):
            continue
        if not group.stacked:
            for path in group.paths:
                yield path, None, None, group.promoted
            continue
        for expert in range(count(config, architecture.expert_count, least=0)):
            for template, stacked in zip(group.paths, group.stacked, strict=True):
                yield template.format(expert=expert), expert, stacked, group.promoted
