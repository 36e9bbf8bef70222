"""The metadata of a GGUF file, kept beside the model that was made of it, and put back on the way back.

``config.json`` and the tokenizer's files have no place for who made a model and under which licence, for names of ways
of cutting texts, scores of tokens, sampling advice.  So the metadata stands beside them as it was, in a GGUF file
which no loader looks for::

    metadata.gguf             all pairs of the original, in its order; rope_freqs, if it has them; and tensors of
                              numbers that are not made again, to the last bit, of those that the model has
    uqff.made.general         digests of the pairs that the conversion back would have made of the new directory:
    uqff.made.model           those of the model's architecture
    uqff.made.tokenizer       those of its tokenizer

On the way back pairs are made of what stands in the directory.  Where a group of them is what it was, nobody has
changed what it tells of, and the original pairs are written in its place, to the last one.  Where it is not, what is
made now is written, and that is said; of ``general``, names and licences stay.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from uqff.checkpoints import open_gguf
from uqff.checkpoints.gguf.files import KEPT_NAME
from uqff.checkpoints.gguf.forms import Numbers
from uqff.checkpoints.gguf.metadata import metadata_of
from uqff.checkpoints.gguf.names import ROPE_FACTORS, GgufArchitecture
from uqff.checkpoints.gguf.rope import Factors, agree
from uqff.checkpoints.gguf.tokenizer import tokenizer_metadata
from uqff.container.document import is_present
from uqff.families.gguf.blocks import block_type_of_code
from uqff.gguf.schema import ALIGNMENT_KEY, Value, ValueType, build_head
from uqff.gguf.writer import PlannedTensor, write_gguf

if TYPE_CHECKING:
    from uqff.gguf.reader import GgufFile, GgufTensor

__all__ = [
    "KEPT_NAME",
    "Made",
    "Pairs",
    "keep_metadata",
    "kept_architecture",
    "kept_factors",
    "kept_numbers",
    "made_metadata",
    "with_kept",
]

DIGESTS: Final = "uqff.made."

OF_THE_FILE: Final = (ALIGNMENT_KEY, "split.no", "split.count", "split.tensors.count")
"""Pairs that tell of a file, and not of the model in it."""

FILE_TYPE: Final = "general.file_type"
FILE_TYPES: Final = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2k": 10,
    "q3k": 12,
    "q4k": 15,
    "q5k": 17,
    "q6k": 18,
    "bf16": 32,
}
"""``general.file_type`` of a file that is mostly of a type (llama.cpp, ``enum llama_ftype``); of K types, "medium"."""

QUANTIZATION_VERSION: Final = 2
"""Of ggml's blocks as they have been since May 2023."""

Pairs = Sequence[tuple[str, Value]]


class Made(NamedTuple):
    """Metadata that was made of a model directory, by group, and what could not be, in sentences."""

    general: Pairs
    model: Pairs
    tokenizer: Pairs
    notes: list[str]


def made_metadata(
    directory: Path,
    config: Mapping[str, Any],
    architecture: GgufArchitecture,
    weights: Iterable[tuple[int, int]],
    *,
    absorbed: bool = False,
) -> Made:
    """The metadata of a model directory.

    Args:
        directory: with the tokenizer's files.
        config: the model's configuration, with ``num_key_value_heads``.
        architecture: of the model.
        weights: ggml type and bytes of each tensor.
        absorbed: see :func:`metadata_of`.

    Raises:
        UqffError: the configuration or the tokenizer is none, or cannot be expressed.
    """
    tokenizer, notes = tokenizer_metadata(directory, config)
    name, *model = metadata_of(config, architecture, str(directory / "config.json"), absorbed=absorbed)
    return Made([name, *_general(weights)], model, tokenizer, notes)


def _general(weights: Iterable[tuple[int, int]]) -> list[tuple[str, Value]]:
    sizes: Counter[int] = Counter()
    for code, nbytes in weights:
        sizes[code] += nbytes
    main = block_type_of_code(max(sorted(sizes), key=sizes.__getitem__))
    pairs = [
        ("general.type", Value(ValueType.TEXT, "model")),
        ("general.quantization_version", Value(ValueType.U32, QUANTIZATION_VERSION)),
    ]
    if main is not None and main.kind in FILE_TYPES:
        pairs.append((FILE_TYPE, Value(ValueType.U32, FILE_TYPES[main.kind])))
    return pairs


def keep_metadata(file: GgufFile, made: Made, directory: Path, tensors: Iterable[GgufTensor] = ()) -> str:
    """Write the metadata of a GGUF file beside the model that was made of it.

    Args:
        file: the GGUF file.
        made: what the way back would make of the directory.
        directory: of the model.
        tensors: that the way back would not make of it.

    Returns:
        The name of the file.
    """
    pairs = _without_those_ahead(file)
    kept = [(key, value) for key, value in pairs.items() if key not in OF_THE_FILE and not key.startswith(DIGESTS)]
    groups = {"general": made.general, "model": made.model, "tokenizer": made.tokenizer}
    digests = [(f"{DIGESTS}{name}", Value(ValueType.TEXT, _digest(group))) for name, group in groups.items()]
    factors = [_planned(file[ROPE_FACTORS])] if ROPE_FACTORS in file else []
    write_gguf(directory / KEPT_NAME, [*kept, *digests], [*factors, *map(_planned, tensors)])
    return KEPT_NAME


def _without_those_ahead(file: GgufFile) -> dict[str, Value]:
    """The pairs as of a file without the layers that predict further tokens, which are left out."""
    pairs, name = dict(file.pairs), file.get_value("general.architecture")
    ahead = pairs.pop(f"{name}.nextn_predict_layers", None)
    if ahead is not None:
        blocks = pairs[f"{name}.block_count"]
        pairs[f"{name}.block_count"] = Value(blocks.type, blocks.value - ahead.value)
    return pairs


def _planned(tensor: GgufTensor) -> PlannedTensor:
    return PlannedTensor(
        tensor.name, tensor.shape, tensor.type_code, tensor.nbytes, lambda: [tensor.record().parts["data"].payload]
    )


def kept_factors(directory: Path, made: Factors) -> Factors:
    """The divisors of the rotary frequencies as the original had them, if they are those that follow from a model's
    configuration but for their last bits; else the latter.

    Args:
        directory: of the model.
        made: float32 ``[head_dim / 2]``.

    Raises:
        FormatError: the kept metadata breaks a rule.
    """
    path = directory / KEPT_NAME
    if not is_present(path):
        return made
    with open_gguf(path) as file:
        kept = file.get(ROPE_FACTORS)
        values = None if kept is None else kept.float32().reshape(-1)
    return made if values is None or not agree(values, made) else values


def kept_architecture(directory: Path) -> object:
    """``general.architecture`` of the original; None if nothing is kept.

    Raises:
        FormatError: the kept metadata breaks a rule.
    """
    path = directory / KEPT_NAME
    if not is_present(path):
        return None
    with open_gguf(path) as file:
        return file.get_value("general.architecture")


def kept_numbers(directory: Path) -> dict[str, Numbers]:
    """The tensors that are kept as the original had them, float32; empty if there are none.

    Raises:
        FormatError: the kept metadata breaks a rule.
    """
    path = directory / KEPT_NAME
    if not is_present(path):
        return {}
    with open_gguf(path) as file:
        kept = {name: tensor for name, tensor in file.items() if name != ROPE_FACTORS}
        return {name: tensor.float32().reshape(tensor.shape).copy() for name, tensor in kept.items()}


def with_kept(directory: Path, made: Made) -> tuple[Pairs, list[str]]:
    """The metadata of a model, those of the GGUF file that it was made of among them.

    Args:
        directory: of the model; it may hold no such metadata.
        made: of it.

    Returns:
        Pairs, and what could not be put back, in sentences.

    Raises:
        FormatError: the kept metadata breaks a rule.
    """
    path = directory / KEPT_NAME
    if not is_present(path):
        return [*made.general, *made.model, *made.tokenizer], made.notes
    with open_gguf(path) as file:
        pairs = dict(file.pairs)
    stated = {name: pairs.pop(f"{DIGESTS}{name}", None) for name in ("general", "model", "tokenizer")}
    name, own = made.general[0]
    if pairs.get(name) != own:
        return [*made.general, *made.model, *made.tokenizer], [
            *made.notes,
            f"{KEPT_NAME} is of another architecture: nothing of it is put back",
        ]
    for key in OF_THE_FILE:
        pairs.pop(key, None)
    now = {"general": made.general, "model": made.model, "tokenizer": made.tokenizer}
    new = {group: dict(each) for group, each in now.items() if stated[group] != Value(ValueType.TEXT, _digest(each))}
    notes = [
        f"the {group}'s metadata in {KEPT_NAME} is not put back: what it tells of has been changed since"
        for group in new
        if group != "general"
    ]
    if "general" in new:  # what else there is of it tells nothing of the types of the tensors
        rest = {key: value for key, value in pairs.items() if key.startswith("general.") and key != FILE_TYPE}
        new["general"] = {**rest, **new["general"]}
    prefixes = {"general": "general", str(own.value): "model", "tokenizer": "tokenizer"}
    found: dict[str, Value] = {}
    for key, value in pairs.items():
        group = prefixes.get(key.partition(".")[0])
        found.update(new.get(group or "", {key: value}))
    for each in new.values():
        found.update(each)
    if "tokenizer" in new or found.get("tokenizer.ggml.model") in (None, Value(ValueType.TEXT, "none")):
        notes += made.notes
    return list(found.items()), notes


def _digest(pairs: Pairs) -> str:
    return hashlib.sha256(build_head(pairs, [])).hexdigest()
