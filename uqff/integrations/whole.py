"""Models of ``transformers`` with towers: where their language model is, and how files call what is beside it.

::

    here                        in the model, for example              in files
    model.layers.0.mlp.up_proj  model.language_model.layers.0. ...     what :mod:`uqff.models.renaming` says
    lm_head                     lm_head                                likewise
    whole.model.visual. ...     model.visual. ...                      what ``transformers`` renames to that

The language model is filled by the names that it has alone, so that ranks share it as they do then.

Authority: transformers 5.0, 5.23, ``conversion_mapping.py`` (``get_model_conversion_mapping``) and
``core_model_loading.py`` (``rename_source_key``, ``revert_weight_conversion``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch

from uqff.errors import UnsupportedError
from uqff.models.multimodal import MULTIMODAL
from uqff.models.renaming import ModulePaths
from uqff.models.table import ARCHITECTURES
from uqff.parallel.plan import EMBEDDING, HEAD
from uqff.parallel.source import ModelSource
from uqff.parallel.uqff_source import UqffSource

__all__ = ["IDLE_KEY", "NAMES_KEY", "WholeModel", "WholePaths", "is_known", "is_whole", "tower_layers"]

DECODER: Final = EMBEDDING.partition(".")[0]
WHOLE: Final = "whole."
NAMES_KEY: Final = "_uqff_names"
"""Where a model keeps what files call the layers of its towers."""
IDLE_KEY: Final = "_uqff_idle"
"""Where a model keeps what its file has and it has no module for: layers and tensors, by their names there."""


class WholePaths(ModulePaths):
    """What modules of a :class:`WholeModel` are called in files."""

    def __init__(self, config: Mapping[str, Any], names: Mapping[str, str]) -> None:
        """Those of the architecture of a ``config.json``.

        Args:
            config: names it.
            names: paths of modules of towers to those in files.

        Raises:
            UnsupportedError: it is unknown.
        """
        super().__init__(config)
        self._names = names

    def __call__(self, path: str) -> str:
        """The path of a module in files; of one beside the language model, its own, unless it is known."""
        if not path.startswith(WHOLE):
            return super().__call__(path)
        path = path.removeprefix(WHOLE)
        return self._names.get(path, path)


class WholeModel(torch.nn.Module):
    """A view of a model with towers: its language model as if it was alone, and all of it under ``whole``.

    A module has the first of its names only, so that nothing of the language model is under ``whole``.

    Attributes:
        model: the decoder.
        lm_head: the head, or what stands in its place.
        config: of the language model.
        base_model_prefix: as in models of text alone.
    """

    base_model_prefix = DECODER

    def __init__(self, whole: Any) -> None:
        """Look at a model.

        Args:
            whole: of ``transformers``.

        Raises:
            UnsupportedError: its language model is of no form that is known here.
        """
        super().__init__()
        self._decoder, self._head = _decoder(whole), _head(whole)
        self.model: Any = whole.get_submodule(self._decoder)
        self.lm_head: Any = whole.get_submodule(self._head)
        self.whole: Any = whole
        self.config = copy.copy(self.model.config)
        self.config.tie_word_embeddings = whole.config.tie_word_embeddings

    def is_of_text(self, path: str) -> bool:
        """Whether a module of this view is of the language model, by its path."""
        return not path.startswith(WHOLE)

    def named_as_saved(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of this view, by their names in it, as ``transformers`` names and divides them in checkpoints."""
        from transformers.core_model_loading import revert_weight_conversion

        made: dict[str, torch.Tensor] = revert_weight_conversion(
            self.whole, {self.path(name): each for name, each in tensors.items()}
        )
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        """Put a module into a place; a head also into that of the model."""
        super().__setattr__(name, value)
        if name == HEAD and "whole" in self._modules:
            parent, _, last = self._head.rpartition(".")
            setattr(self.whole.get_submodule(parent), last, value)

    def path(self, path: str) -> str:
        """The path of a module of this view in the model."""
        if path == HEAD:
            return self._head
        if path.startswith(WHOLE):
            return path.removeprefix(WHOLE)
        return self._decoder + path.removeprefix(DECODER)


def is_known(model: Any) -> bool:
    """Whether the class of a model of ``transformers`` is that of an architecture."""
    return any(type(model).__name__ in each.classes for each in ARCHITECTURES)


def is_whole(model: Any) -> bool:
    """Whether a model of ``transformers`` has more than a language model."""
    return any(type(model).__name__ in each.classes for each in MULTIMODAL)


def _is_decoder(path: str, module: torch.nn.Module) -> bool:
    return (
        path != ""
        and isinstance(getattr(module, "layers", None), torch.nn.ModuleList)
        and hasattr(module, EMBEDDING.rpartition(".")[2])
    )


def _decoder(whole: Any) -> str:
    found: list[str] = [path for path, module in whole.named_modules() if _is_decoder(path, module)]
    if len(found) != 1:
        raise _unknown_form(whole, f"{len(found)} decoders")
    return found[0]


def _head(whole: Any) -> str:
    found: list[str] = [path for path, _ in whole.named_modules() if path == HEAD or path.endswith(f".{HEAD}")]
    if len(found) != 1:
        raise _unknown_form(whole, f"{len(found)} heads")
    return found[0]


def _unknown_form(whole: Any, got: str) -> UnsupportedError:
    return UnsupportedError(
        "transformers loads no UQFF of a model of this form",
        expected="one decoder and one head, beside towers; or what uqff dequantize makes of it",
        got=f"{type(whole).__name__}, with {got}",
    )


def tower_layers(whole: Any, source: ModelSource) -> dict[str, str]:
    """The layers beside the language model: paths of modules to those in the files.

    Args:
        whole: a model of ``transformers``, on the meta device or not.
        source: where its layers come from: of UQFF all that it has, of a checkpoint those that are quantised.

    Raises:
        UnsupportedError: ``transformers`` has no linear layer for one of them.
    """
    paths = source.paths
    known: Iterable[str] = (
        source.keys
        if isinstance(source, UqffSource)
        else (module for parts in paths.parts.values() for module in parts)
    )
    rename = _Renaming(whole)
    found = {}
    for name in known:
        if paths.is_of_text(name):
            continue
        path = rename(name)
        if path is None:
            raise UnsupportedError(
                "layer has no place in the model",
                file=source.name,
                layer=name,
                expected=f"a linear module of {type(whole).__name__}",
            )
        found[path] = name
    return found


class _Renaming:
    """From paths of linear layers in files to those in a model."""

    def __init__(self, whole: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self._rename, self._whole = rename_source_key, whole
        rules = get_model_conversion_mapping(whole)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._tensors = whole.state_dict()

    def __call__(self, name: str) -> str | None:
        """The path in the model; None if there is none, or one that is made of several layers."""
        prefix = self._whole.base_model_prefix
        renamed, pattern = self._rename(f"{name}.weight", self._renamings, self._converters, prefix, self._tensors)
        path: str = renamed.removesuffix(".weight")
        try:
            module = self._whole.get_submodule(path)
        except AttributeError:
            return None
        return path if pattern is None and isinstance(module, torch.nn.Linear) else None
