"""Which weights of a checkpoint are those of linear layers, of any architecture that ``transformers`` has: ``--layers
auto``.

The model is made on the meta device, without weights, to see which of its matrices belong to a ``torch.nn.Linear``.  A
checkpoint may call modules otherwise than ``transformers`` does, and otherwise than it saves them
(``language_model.model.layers`` for ``model.language_model.layers``), so a matrix of the checkpoint belongs to the
module of the same shape whose path has most of the last words of its name, numbers aside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from uqff.errors import FormatError, UnsupportedError
from uqff.limits import MAX_BLOCKS
from uqff.models.config import numbers_of

__all__ = ["AUTO", "NamedWeights", "linear_weights"]

AUTO: Final = "auto"
"""In place of a pattern for the names of layers."""

DEPTHS: Final = re.compile(r"layer|depth|block|stage")
"""Keys of a configuration whose numbers decide how many modules there are."""
LOADING: Final = ("auto_map", "quantization_config", "attn_implementation", "torch_dtype", "dtype")
"""Keys that say how ``transformers`` loads, or what code it runs, and not what a model is made of."""

Path = tuple[str, ...]


class NamedWeights:
    """Weights by their names, where else there is a :class:`~uqff.models.patterns.Pattern` for them."""

    text = AUTO

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names

    def search(self, name: str) -> bool:
        """Whether it is one of them."""
        return name in self.names


def linear_weights(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> NamedWeights:
    """The weights of linear layers among the tensors of a checkpoint.

    Args:
        config: the parsed ``config.json``.
        shapes: of the tensors, by name.

    Raises:
        UnsupportedError: there is no ``transformers``, or it has no such architecture, or none of it is such a weight.
        FormatError: it does not take the configuration.
    """
    linear, others = _matrices(_outline(config))
    chosen = set()
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module == name or len(shape) != 2:
            continue
        path = _path(module)
        alike = _likeness(path, linear.get(shape, ()))
        if alike and alike > _likeness(path, others.get(shape, ())):
            chosen.add(name)
    if not chosen:
        raise UnsupportedError(
            "the model has no linear layer whose weight is in the checkpoint",
            field="layers",
            expected="torch.nn.Linear, or a pattern for the names of layers",
            got=config.get("architectures"),
        )
    return NamedWeights(frozenset(chosen))


def _path(module: str) -> Path:
    """The words of a path, without numbers."""
    return tuple("*" if word.isdecimal() else word for word in module.split("."))


def _likeness(path: Path, others: Any) -> int:
    """How many words the ends of paths have in common, at most."""
    best = 0
    for other in others:
        common = 0
        for a, b in zip(reversed(path), reversed(other), strict=False):
            if a != b:
                break
            common += 1
        best = max(best, common)
    return best


def _matrices(model: Any) -> tuple[dict[tuple[int, ...], set[Path]], dict[tuple[int, ...], set[Path]]]:
    """Paths of linear layers, and of other modules with a matrix, by its shape."""
    import torch

    linear: dict[tuple[int, ...], set[Path]] = {}
    others: dict[tuple[int, ...], set[Path]] = {}
    kinds = {f"{path}.weight": isinstance(module, torch.nn.Linear) for path, module in model.named_modules()}
    weights = {name: tensor for name, tensor in model.state_dict().items() if name in kinds and tensor.ndim == 2}
    for name, stored in _stored(model, weights):
        found = linear if kinds[name] else others
        shape = tuple(weights[name].shape)
        found.setdefault(shape, set()).update(_path(each.removesuffix(".weight")) for each in (name, stored))
    return linear, others


def _stored(model: Any, weights: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The names of weights in a model, and what it is saved with, where that is only another name."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before transformers 5, modules have the names of checkpoints
        return [(name, name) for name in weights]
    names = {id(tensor): name for name, tensor in weights.items()}
    saved = {id(tensor): name for name, tensor in revert_weight_conversion(model, dict(weights)).items()}
    return [(name, saved.get(key, name)) for key, name in names.items()]


def _outline(config: Mapping[str, Any]) -> Any:
    """The model that a configuration describes, on the meta device."""
    try:
        import torch
        import transformers
        from transformers.models.auto import modeling_auto
    except ImportError as error:
        raise UnsupportedError(
            "finding linear layers needs transformers (pip install 'uqff-format[run]')", got=str(error)
        ) from None
    known = {
        name
        for mapping, names in vars(modeling_auto).items()
        if mapping.endswith("_MAPPING_NAMES")
        for each in names.values()
        for name in ((each,) if isinstance(each, str) else each)
    }
    stated = config.get("architectures")
    name = stated[0] if isinstance(stated, list) and stated else None
    kind = config.get("model_type")
    if name not in known or kind not in transformers.CONFIG_MAPPING:
        raise UnsupportedError(
            "transformers has no such architecture",
            field="config.architectures",
            expected="one of its models, or a pattern for the names of layers",
            got=stated or "none",
        )
    values = _told(config, "config")
    try:
        made = transformers.CONFIG_MAPPING[kind].from_dict(numbers_of(values))
        with torch.device("meta"):
            return getattr(transformers, str(name))(made)
    except Exception as error:
        raise FormatError(
            "transformers does not take the configuration", field="config", got=f"{type(error).__name__}: {error}"
        ) from error


def _told(values: Mapping[str, Any], field: str) -> dict[str, Any]:
    """What a configuration says of the model, however deep.

    Raises:
        FormatError: it has more layers than any model.
    """
    told: dict[str, Any] = {}
    for name, value in values.items():
        if name in LOADING or name.startswith("_"):
            continue
        if DEPTHS.search(name) and isinstance(value, int) and value > MAX_BLOCKS and name.startswith(("n", "d")):
            raise FormatError("not a count", field=f"{field}.{name}", expected=f"at most {MAX_BLOCKS}", got=value)
        told[name] = _told(value, f"{field}.{name}") if isinstance(value, dict) else value
    return told
