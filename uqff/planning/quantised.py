"""What a model takes that is UQFF already: each of its types on disk and on each rank, from headers alone."""

from __future__ import annotations

import math
from typing import Final

from uqff.checkpoints.model import ModelDirectory, are_uqff, holds_uqff
from uqff.container.file import UqffFile
from uqff.container.plan import layer_size
from uqff.container.shards import PathLike
from uqff.errors import MissingError
from uqff.hub.client import RemoteFolder, Unreachable
from uqff.hub.names import hub_name
from uqff.inspection.remote import looked_into
from uqff.models.assets import CONFIG_NAME
from uqff.models.modules import modules_of
from uqff.planning.sizes import TypeSize, rank_bytes

__all__ = ["INSTEAD", "is_uqff", "uqff_sizes"]

INSTEAD: Final = "the checkpoint that it was made of (uqff inspect and uqff report say what a UQFF model has)"
"""What types can be chosen for, said of a model that has its types."""


def is_uqff(source: PathLike) -> bool:
    """Whether a path, or a name on the hub, is that of a UQFF model, and of no checkpoint.

    Raises:
        HubError: the hub did not say.
        OSError: the directory cannot be read.
    """
    name = hub_name(source)
    if name is None:
        return holds_uqff(source)
    if name.file is not None:
        return are_uqff([name.file])
    try:
        return are_uqff(RemoteFolder(name).files)
    except Unreachable:  # whoever opens it looks into the cache
        return False


def uqff_sizes(source: PathLike, *, ranks: int = 1) -> tuple[int, int, list[TypeSize]]:
    """The sizes of the models of a directory or repository, by the names that they are chosen by.

    Args:
        source: what :func:`uqff.open` takes, or a directory of several models.
        ranks: how many there are.

    Returns:
        Weights of all layers, bytes of the tensors that are no layers, sizes.

    Raises:
        MissingError: for several ranks, without a configuration: nothing tells then what is split.
        UqffError: a file breaks a rule.
        OSError: a file cannot be read.
    """
    with looked_into(source) as looked, ModelDirectory(looked.path) as model:
        if ranks > 1 and not model.config:
            raise MissingError(
                "no configuration, which tells heads and names of layers", file=str(model.path), expected=CONFIG_NAME
            )
        rest = () if model.residual is None else model.residual.header.entries.values()
        residual = sum(entry.end - entry.begin for entry in rest)
        found = [_size(stem, file, model, ranks) for stem, file in model.models.items()]
        return max(weights for weights, _ in found), residual, [size for _, size in found]


def _size(stem: str, file: UqffFile, model: ModelDirectory, ranks: int) -> tuple[int, TypeSize]:
    modules = modules_of(file, model.config or None) if ranks > 1 else []
    paths = {key: module.path for module in modules for key in module.keys}
    weights = nbytes = held = 0
    for key, layer in file.items():
        size = layer_size(layer, file.version)
        weights += math.prod(layer.weight.shape)
        nbytes += size
        held += rank_bytes(paths.get(key, key), layer, size, model.config, ranks)
    return weights, TypeSize(stem, nbytes, 8 * nbytes / weights, held)
