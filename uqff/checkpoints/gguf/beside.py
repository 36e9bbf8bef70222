"""The ``mmproj`` file of a model that sees: found beside the GGUF file of its text, and what the two make together."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uqff.checkpoints.gguf.names import NEWEST
from uqff.checkpoints.gguf.vision import Vision, vision_of
from uqff.errors import ShardError, UnsupportedError, located
from uqff.gguf.reader import open_gguf
from uqff.hub.names import NO_PROJECTOR, is_projector_name, several_projectors
from uqff.models.architectures import EntryName, architecture_of, entry_names, is_tied_model
from uqff.models.renaming import ModulePaths

if TYPE_CHECKING:
    from uqff.container.shards import PathLike
    from uqff.gguf.reader import GgufFile

__all__ = ["check_text_model", "open_vision", "stated_text", "text_entries", "text_paths"]


def check_text_model(file: GgufFile) -> None:
    """Make sure that a file holds a text model, and not the part of one that sees or hears.

    Raises:
        UnsupportedError: it does not.
    """
    kind, name = (file.get_value(f"general.{key}") for key in ("type", "architecture"))
    if name == "clip" or kind == "mmproj":
        raise UnsupportedError(
            "mmproj file: the part of a model that sees or hears, which is taken with the text that it goes with",
            field="general.type" if kind == "mmproj" else "general.architecture",
            expected="the GGUF file of the text model, and this one beside it or named by --mmproj",
            got=", ".join(key for key in ("vision", "audio") if file.get_value(f"clip.has_{key}_encoder")) or "neither",
        )
    if kind not in (None, "model"):
        raise UnsupportedError("no model", field="general.type", expected="model", got=kind)


def open_vision(text: Path, mmproj: PathLike | None = None) -> Vision | None:
    """Open the part of a model that sees.

    Args:
        text: the GGUF file of its text.
        mmproj: the other file, or its name beside that; ``none`` for the text alone. None: the only file beside it
            that is called like one, if there is one.

    Returns:
        It, with its file open; None if there is none.

    Raises:
        UnsupportedError: it is of a kind that is not converted.
        FormatError: the file breaks a rule.
        ShardError: there are several, and none was named.
        FileNotFoundError: there is no such file.
    """
    path = _found(text, mmproj)
    if path is None:
        return None
    file = open_gguf(path)
    try:
        with located(file=path):
            return vision_of(file)
    except BaseException:
        file.close()
        raise


def _found(text: Path, mmproj: PathLike | None) -> Path | None:
    if mmproj is not None and os.fspath(mmproj) == NO_PROJECTOR:
        return None
    if mmproj is not None:
        named = Path(mmproj)
        return text.parent / named if not named.exists() and named.name == str(named) else named
    found = sorted(each for each in text.parent.glob("*.gguf") if is_projector_name(each.name) and each != text)
    if len(found) > 1:
        names = [each.name for each in found]
        raise ShardError(several_projectors(names), file=str(text.parent), got=", ".join(names[:10]))
    return found[0] if found else None


def text_paths(config: Mapping[str, Any]) -> Callable[[str], str]:
    """From the names of tensors in a text model to those in the model of a configuration that it is a part of."""
    architecture = architecture_of(config)

    def within(name: str) -> str:
        if name.startswith("lm_head."):
            return architecture.head + name.removeprefix("lm_head")
        return architecture.decoder + name.removeprefix("model")

    return within


def text_entries(config: Mapping[str, Any]) -> list[EntryName]:
    """The layers of a text model by their names there, of the configuration of the whole that it is a part of."""
    paths, architecture = ModulePaths(config), architecture_of(config)
    found = [entry for entry in entry_names(config, NEWEST) if entry.role is None and paths.is_of_text(entry.key)]
    return [replace(entry, key=f"model{entry.key.removeprefix(architecture.decoder)}") for entry in found]


def stated_text(config: Mapping[str, Any], said: Mapping[str, Any], sizes: Mapping[str, str]) -> dict[str, Any]:
    """The configuration of a text model in that of the whole.

    Args:
        config: of the whole.
        said: what the GGUF file says of the text model, which counts where the other says nothing.
        sizes: see :attr:`uqff.checkpoints.gguf.vision.Vision.text_sizes`.
    """
    architecture = architecture_of(config)
    nested = config.get(architecture.text_config) if architecture.text_config else config
    given = {key: value for key, value in nested.items() if value is not None} if isinstance(nested, Mapping) else {}
    given |= {here: given[there] for here, there in sizes.items() if there in given}
    scaling = given.get("rope_scaling")
    if isinstance(scaling, Mapping) and "mrope_section" in scaling:  # of a text, all axes say the same
        scaling = None
    own = {key: said[key] for key in ("architectures", "model_type")}
    return {**said, **given, **own, "rope_scaling": scaling, "tie_word_embeddings": is_tied_model(config)}
