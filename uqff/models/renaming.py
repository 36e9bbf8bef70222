"""Paths of modules of ``transformers`` as checkpoints and files have them.

From 5 on, ``transformers`` gives some modules other paths than checkpoints do, and converts while it loads.  The pairs
of both are declared with each architecture (:attr:`uqff.models.table.Architecture.modules`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Final

from uqff.codes import Version
from uqff.models.architectures import EntryName, architecture_of, entry_names, idle_paths, is_table, pieces_of

__all__ = ["ModulePaths"]

DECODER: Final = "model"
HEAD: Final = "lm_head"
"""Paths in models of text alone."""


class ModulePaths:
    """From paths of modules to those of weights."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Those of the architecture of a ``config.json``.

        Raises:
            UnsupportedError: it is unknown.
        """
        self._config = config
        self._architecture = architecture_of(config)

    def __call__(self, path: str) -> str:
        """The path of a module, or the name of a tensor, as checkpoints have it; what is such a path stays.

        Of a model with towers, modules are those of its language model alone.
        """
        path = self._within(path)
        dotted = f".{path}."
        for here, there in self._architecture.modules:
            if there not in dotted and here in dotted:
                return dotted.replace(here, there)[1:-1]
        return path

    def _within(self, path: str) -> str:
        """Where the language model is within a larger one."""
        decoder, head = self._architecture.decoder, self._architecture.head
        if path == HEAD or path.startswith(f"{HEAD}."):
            return head + path.removeprefix(HEAD)
        if path.startswith(f"{DECODER}.") and not path.startswith(f"{decoder}."):
            return decoder + path.removeprefix(DECODER)
        return path

    def pieces(self, name: str) -> list[str]:
        """The names of what a table is stored in, see :func:`uqff.models.architectures.pieces_of`."""
        return pieces_of(self._config, name)

    def is_table(self, name: str) -> bool:
        """Whether a tensor of a file is of a table."""
        return is_table(self._config, name)

    def is_of_text(self, path: str) -> bool:
        """Whether something belongs to the language model, by its path in a file."""
        decoder, head, towers = self._architecture.decoder, self._architecture.head, self._architecture.towers
        if not self._architecture.text_config and path.startswith(tuple(f"{tower.path}." for tower in towers)):
            return False  # Phi-3-V has its tower within the module that has the decoder layers
        return path.startswith((f"{decoder}.", head))

    @cached_property
    def idle(self) -> set[str]:
        """The paths of what a file has and nothing computes with.

        Raises:
            FormatError: the configuration lacks a number.
        """
        return idle_paths(self._config)

    @cached_property
    def parts(self) -> dict[str, list[str]]:
        """What the layers of 1.x are made of: the path of one weight, or of one for each expert.

        Raises:
            FormatError: the configuration lacks a number.
        """
        return {entry.key: [part.module for part in entry.parts] for entry in self._entries}

    @cached_property
    def _entries(self) -> list[EntryName]:
        return entry_names(self._config, Version(1, 2, 0))

    @cached_property
    def sensitive(self) -> set[str]:
        """The paths of the layers that are promoted: head, embedding, and what the engine treats like them.

        Raises:
            FormatError: the configuration lacks a number.
        """
        return {self(HEAD)} | {entry.key for entry in self._entries if entry.role is not None}

    def experts(self, path: str, projections: tuple[str, ...], count: int) -> list[list[str]]:
        """The paths of the weights of each projection of experts.

        Args:
            path: of the experts as a module.
            projections: by their names in 1.x.
            count: how many experts there are.
        """
        stack = self(path)
        each = [[f"{stack}.{expert}.{name}" for expert in range(count)] for name in projections]
        return [self.parts.get(f"{stack}.{name}", usual) for name, usual in zip(projections, each, strict=True)]

    def declares(self, path: str) -> bool:
        """Whether the weight of a module is a layer of the architecture."""
        return self(path) in self.parts
