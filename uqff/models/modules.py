"""Which layer of a file is which module of the model, in both generations: by number in 0.x, by path in 1.x.

::

    0.x   "0"                 lm_head                                    config.json gives the order
          "5" "8" ... "29"    model.layers.0.mlp.experts.gate_proj       one matrix for each expert
    1.x   the path itself     model.layers.0.mlp.experts.gate_proj       one stack of all experts

A module has the path that 1.x gives to it, so that the same module of two files has the same name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from uqff.codes import ENTRY_VERSIONS
from uqff.container import UqffFile
from uqff.container.document import is_present
from uqff.errors import ShardError
from uqff.models.architectures import LayerName, check_numbered, embedding_name, entry_names, layer_names, stacked_names
from uqff.models.assets import CONFIG_NAME
from uqff.models.config import read_config

__all__ = ["Module", "check_complete", "config_beside", "modules_of"]

LISTED: Final = 5
"""Names that an error lists."""


@dataclass(frozen=True)
class Module:
    """A layer of a model, wherever a file keeps it.

    Attributes:
        path: the weight's path in the model as 1.x spells it; of a 0.x file without names, the key.
        keys: of the layers of the file that make it up: one, or one for each expert, in order.
        parts: its names in a checkpoint: one, or one for each expert; none if nothing is known of them.
    """

    path: str
    keys: tuple[str, ...]
    parts: tuple[LayerName, ...] = ()


def config_beside(file: UqffFile) -> dict[str, Any] | None:
    """The ``config.json`` in the directory of a model, see :mod:`uqff.models.config`; None if there is none.

    Raises:
        FormatError: it is no JSON object, or too long; or it says the same thing twice, differently.
        OSError: it cannot be read.
    """
    path = file.paths[0].parent / CONFIG_NAME
    return read_config(path) if is_present(path) else None


def modules_of(
    file: UqffFile, config: Mapping[str, Any] | None, names: Sequence[LayerName] | None = None
) -> list[Module]:
    """The modules of a file, in the order of its keys.

    Args:
        file: an open model of either generation.
        config: of the model; None if there is none, then 0.x layers keep their numbers and no module has ``parts``.
        names: of the layers of 0.x in the order of their index, in place of those that the architecture has.

    Raises:
        UnsupportedError: the architecture is unknown.
        FormatError: the configuration lacks a number or has a senseless one.
        ShardError: a 0.x file has not the layers that configuration or names announce.
    """
    if config is None and (names is None or file.generation == "1.x"):
        return [Module(key, (key,)) for key in file]
    if file.generation == "1.x":
        assert config is not None
        versions = min(ENTRY_VERSIONS), max(ENTRY_VERSIONS)
        parts = {entry.key: entry.parts for version in versions for entry in entry_names(config, version)}
        return [Module(key, (key,), parts.get(key, ())) for key in file]
    if names is None:
        assert config is not None
        check_numbered(config)
        names = layer_names(config)
    stacks = stacked_names(names)
    keys = {int(key): key for key in file}
    # Files written on a GPU hold the experts of a projection as one stack in the place of the first of them.
    apart = len(keys) != len(stacks)
    count = len(names) if apart else len(stacks)
    if sorted(keys) != list(range(count)):
        paths = [name.module for name in names] if apart else [stack.key for stack in stacks]
        missing = [f"{index} ({paths[index]})" for index in range(count) if index not in keys]
        listed = ", ".join(missing[:LISTED]) + (", ..." if missing[LISTED:] else "")
        raise ShardError(
            "the file has not the layers that its model has",
            file=str(file.paths[0]),
            expected=f"{count} layers",
            got=f"{len(keys)}" + (f", without {listed}" if missing else ""),
        )
    if not apart:
        return [Module(stack.key, (keys[index],), stack.parts) for index, stack in enumerate(stacks)]
    return [Module(stack.key, tuple(keys[part.index] for part in stack.parts), stack.parts) for stack in stacks]


def check_complete(file: UqffFile, config: Mapping[str, Any], modules: Sequence[Module]) -> None:
    """Make sure that every weight that a configuration announces is a layer of the file, or in the residual.

    Args:
        file: an open model.
        config: of the model.
        modules: of the file.

    Raises:
        UnsupportedError: the architecture is unknown.
        ShardError: a weight is in neither.
        FormatError: the residual, or the configuration, breaks a rule.
    """
    wanted = {entry.key for entry in entry_names(config, max(ENTRY_VERSIONS))} | {embedding_name(config)}
    paths = {module.path for module in modules}
    missing = sorted(path for path in wanted - paths if f"{path}.weight" not in file.residual)
    if missing:
        raise ShardError(
            "the model lacks a weight",
            file=str(file.paths[0]),
            expected="all weights of its configuration as layers, or in residual.safetensors beside them",
            got=f"none for {', '.join(missing[:LISTED])}{', ...' if missing[LISTED:] else ''}",
        )
