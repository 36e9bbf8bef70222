"""Which layer of one UQFF is which layer of another, whatever the generations.

In one generation the same key is the same layer.  Between the two, layers of 0.x get the paths that ``config.json``
gives to them, and an expert that has a layer of its own there is compared with its place in the stack of 1.x.  The head
of a tied model is matched with the embedding where that is all the other file has: from 1.2 on the two are one layer.
Rows of Q and K that one file has as GGUF does are put in order (:mod:`uqff.models.layouts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from uqff.codec.layer import Layer
from uqff.container import UqffFile
from uqff.errors import ShapeError, ShardError, UnsupportedError
from uqff.families import Unquant
from uqff.models.architectures import LayerName, embedding_name, layer_names
from uqff.models.assets import CONFIG_NAME
from uqff.models.layouts import WeightLayout, in_order, layout_beside
from uqff.models.modules import Module, config_beside, modules_of

__all__ = ["Held", "Pair", "pairs_of"]


class Held(NamedTuple):
    """A layer, or one expert of it, in a file: its key, type, bytes (of an expert: of its payload), and content."""

    key: str
    kind: str
    nbytes: int
    layer: Layer


class Pair(NamedTuple):
    """The same layer of two files: its name, and what each file has of it; None if it has nothing."""

    name: str
    a: Held | None
    b: Held | None


class _Model(NamedTuple):
    """An open model, and how its rows lie where that is not as in the other."""

    file: UqffFile
    layout: WeightLayout

    @classmethod
    def both(cls, a: UqffFile, b: UqffFile) -> tuple[_Model, _Model]:
        """Two models; what lies alike in both is compared as it is.

        Raises:
            UnsupportedError: one has a layout from which the other's cannot be had.
        """
        first, second = layout_beside(a), layout_beside(b)
        if (first.heads, first.foreign_values) == (second.heads, second.foreign_values):
            return cls(a, WeightLayout()), cls(b, WeightLayout())
        for file, layout in ((a, first), (b, second)):
            layout.check(str(file.paths[0].parent / CONFIG_NAME))
        return cls(a, first), cls(b, second)


def pairs_of(a: UqffFile, b: UqffFile, names: Sequence[LayerName] | None = None) -> Iterator[Pair]:
    """The layers of two files in the order of the first; then those that only the second has.

    Each is made when it is asked for, and the memory of its bytes given back with the next.

    Args:
        a: an open model.
        b: another.
        names: of 0.x layers in the order of their index, if no ``config.json`` tells them.

    Raises:
        UnsupportedError: the files are of two generations, and nothing tells the paths of 0.x layers; or the weights of
            one lie in a way that is not known here.
        ShardError: a 0.x file has not the layers that its configuration announces.
        ShapeError: one has more experts than the other.
        UqffError: a layer is not valid.
    """
    if a.generation == b.generation:
        names = None
    here, there = _Model.both(a, b)
    by_key = a.generation == b.generation and (a.generation == "1.x" or not (here.layout.heads or there.layout.heads))
    config = None if by_key or names is not None else _config(a, b)
    first, second = (_by_path(file, config, names) for file in (a, b))
    other_name = _head_as_embedding(first, second, config)
    for path, module in first.items():
        match = second.pop(path, None)
        name = path
        if match is None and path in other_name and (match := second.pop(other_name[path], None)):
            name = f"{path} / {match.path}"
        if match is None:
            yield from _alone(here, name, module, is_first=True)
        else:
            yield from _pairs(name, here, module, there, match)
            _release(b, match)
        _release(a, module)
    for path, module in second.items():
        yield from _alone(there, path, module, is_first=False)
        _release(b, module)


def _config(a: UqffFile, b: UqffFile) -> dict[str, Any]:
    old, new = (a, b) if a.generation == "0.x" else (b, a)
    config = config_beside(old) or config_beside(new)
    if config is None:
        raise UnsupportedError(
            "layers of 0.x have no names",
            file=str(old.paths[0]),
            expected="config.json beside one of the two files, or names",
            got="none",
        )
    return config


def _by_path(file: UqffFile, config: Mapping[str, Any] | None, names: Sequence[LayerName] | None) -> dict[str, Module]:
    """The modules of a file by what makes them the same in two: path, or index as a plain number."""
    modules = modules_of(file, config, names)
    if config is None and names is None and file.generation == "0.x":
        return {str(int(module.path)): module for module in modules}
    return {module.path: module for module in modules}


def _head_as_embedding(
    a: Mapping[str, Module], b: Mapping[str, Module], config: Mapping[str, Any] | None
) -> dict[str, str]:
    """The head of a tied model to its embedding, and back, if each file has one of the two."""
    if config is None:
        return {}
    head, embedding = layer_names(config)[0], embedding_name(config)
    if head.weight != f"{embedding}.weight" or (head.module in a) == (head.module in b):
        return {}
    return {head.module: embedding, embedding: head.module}


def _alone(model: _Model, name: str, module: Module, *, is_first: bool) -> Iterator[Pair]:
    for at, key in enumerate(module.keys):
        held = _whole(model, module, key)
        yield Pair(name if len(module.keys) == 1 else f"{name}[{at}]", *((held, None) if is_first else (None, held)))


def _pairs(name: str, a: _Model, first: Module, b: _Model, second: Module) -> Iterator[Pair]:
    if len(first.keys) == len(second.keys) == 1:
        yield Pair(name, _whole(a, first, first.keys[0]), _whole(b, second, second.keys[0]))
        return
    counts = _experts(a.file, first), _experts(b.file, second)
    if counts[0] != counts[1]:
        raise ShapeError(
            "stacks differ in size", file=str(b.file.paths[0]), layer=name, expected=counts[0], got=counts[1]
        )
    for expert in range(counts[0]):
        yield Pair(f"{name}[{expert}]", _expert(a, first, expert), _expert(b, second, expert))


def _experts(file: UqffFile, module: Module) -> int:
    if len(module.keys) > 1:
        return len(module.keys)
    record, fields = file.fields(module.keys[0])
    shape = record.parse(fields).shape
    return shape[0] if len(shape) > 2 else 1


def _expert(model: _Model, module: Module, expert: int) -> Held:
    if len(module.keys) > 1:
        return _whole(model, module, module.keys[expert])
    key = module.keys[0]
    weight, bias = model.file[key]
    if len(weight.shape) < 3:
        return _whole(model, module, key)
    if bias is not None and bias.ndim == len(weight.shape) - 1:
        bias = bias[expert]
    try:
        layer = Layer(weight.narrow(0, expert, 1).unstack()[0], bias)
    except ShardError:  # shared words or scales: only its numbers can be had
        layer = Layer(Unquant.of(weight.dequantize_expert(expert)), bias)
    return Held(key, weight.kind, layer.weight.nbytes + (0 if bias is None else bias.nbytes), layer)


def _whole(model: _Model, module: Module, key: str) -> Held:
    layer, nbytes = model.file[key], sum(place.nbytes for place in model.file.places(key).values())
    order = model.layout.order_of(module.path, layer.weight.shape[0])
    return Held(key, layer.weight.kind, nbytes, in_order(layer, order))


def _release(file: UqffFile, module: Module) -> None:
    for key in module.keys:
        file.release(key)
