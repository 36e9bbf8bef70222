"""The embedding, which is a layer from 1.2 on and a dense tensor of the residual before.

Down to an older version its codes become the head's, if head and embedding are tied and there is no other head (but of
Gemma and Gemma 2, which have no head in 1.0 and 1.1); else they stay beside the model, in ``<stem>.kept.safetensors``,
which is a 1.x file of its own.  Either way the residual gets it dequantised, because older loaders need it dense.  Up
again, the codes are taken from where they are, and the dense copy goes.

The head that 0.x files of Gemma and Gemma 2 have is in 1.x the dense embedding, where that is what it holds.

A model that comes from an older version has it dense only, and keeps it so: then mistral.rs 0.9 takes a tied head for
both (but for Gemma, where it takes the dense embedding for both), where older ones had both side by side.

Authority: mistral.rs v0.9.2, ``mistralrs-core/src/layers.rs`` (``embedding_with_legacy_tied_uqff``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from uqff.container.file import UqffFile
from uqff.errors import UnsupportedError
from uqff.migration.mapping import LayerSource, Move
from uqff.models.architectures import EMBEDDING_SINCE, LayerName, architecture_of, embedding_name, is_tied_model

__all__ = ["EMBEDDING_SINCE", "embedding_of", "is_always_tied", "is_tied_head", "lowered", "raised", "untied"]

HEAD: Final = "lm_head"
EMBEDDING: Final = "model.embed_tokens"


def embedding_of(config: Mapping[str, Any], file: UqffFile) -> str | None:
    """The layer of a 1.x model that is its embedding, if one is.

    Of an unknown architecture that is the one that is called like one.
    """
    if file.generation != "1.x":
        return None
    try:
        key = embedding_name(config)
    except UnsupportedError:
        found = [key for key in file if _last(key) == _last(EMBEDDING)]
        key = found[0] if len(found) == 1 else ""
    return key if key in file else None


def is_tied_head(config: Mapping[str, Any], key: str) -> bool:
    """Whether a layer is the head of a model whose head is its embedding."""
    return _last(key) == HEAD and is_tied_model(config)


def is_always_tied(config: Mapping[str, Any], key: str) -> bool:
    """Whether a layer is the head of a model that has none in 1.0 and 1.1: its loader multiplies by the embedding."""
    try:
        return is_tied_head(config, key) and architecture_of(config).tied == "always"
    except UnsupportedError:
        return False


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that says that head and embedding are two."""
    made = {**config, "tie_word_embeddings": False}
    text_config = architecture_of(config).text_config
    return {**made, text_config: {**config[text_config], "tie_word_embeddings": False}} if text_config else made


def lowered(
    config: Mapping[str, Any], file: UqffFile, moves: Sequence[Move], key: str
) -> tuple[list[Move], dict[str, LayerSource]]:
    """The moves within 1.x to a version whose embedding is no layer, and what is kept beside it.

    Args:
        config: the parsed ``config.json``.
        file: the model.
        moves: of all its layers.
        key: of the embedding.
    """
    others = [move for move in moves if move.targets != (key,)]
    head = f"{key.removesuffix(EMBEDDING)}{HEAD}"
    if head in file or not is_tied_head(config, head) or is_always_tied(config, head):
        return others, {key: LayerSource(file, key)}
    return [*others, Move((LayerSource(file, key),), (head,), (LayerName(0, head, f"{key}.weight", None),))], {}


def raised(
    config: Mapping[str, Any], moves: Sequence[Move], marks: Sequence[str], kept: UqffFile | None
) -> tuple[list[Move], bool]:
    """The moves to a version whose embedding is a layer, and whether its codes are still there.

    Args:
        config: the parsed ``config.json``.
        moves: of all layers of the model.
        marks: names of the tensors of the residual that were dequantised from layers.
        kept: what is kept beside the model.
    """
    made = list(moves)
    if kept is not None:
        made += [Move((LayerSource(kept, key),), (key,), (LayerName(0, key, f"{key}.weight", None),)) for key in kept]
    missing = [mark for mark in marks if kept is None or mark.removesuffix(".weight") not in kept]
    for mark in missing:
        at = next((at for at, move in enumerate(made) if is_tied_head(config, move.targets[0])), None)
        if at is None:
            return made, False
        key = mark.removesuffix(".weight")
        made[at] = Move(made[at].sources, (key,), (LayerName(0, key, mark, None),))
    return made, bool(marks)


def _last(key: str) -> str:
    return key.rpartition(".")[2]
