"""A model of ``transformers`` that has our layers, written as a directory of UQFF."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, Final

import torch
from transformers.utils import GENERATION_CONFIG_NAME

from uqff.codec.entries import LATEST
from uqff.codec.layer import Layer
from uqff.codes import Version
from uqff.container.atomic import flush_to_disk
from uqff.container.beside import CONFIG_NAME, KEPT_SUFFIX, LAYER_SUMS_NAME, SUMS_NAME
from uqff.container.document import write_json
from uqff.container.file import RESIDUAL_NAME
from uqff.container.plan import SHARD_BYTES, metadata_of
from uqff.container.report import REPORT_NAME
from uqff.container.save import save
from uqff.container.shards import SUFFIX
from uqff.container.staging import changed_directory
from uqff.container.tensors import TensorWriter
from uqff.errors import UnsupportedError, located
from uqff.families import stack
from uqff.families.part import Part
from uqff.families.rows import joined_rows
from uqff.inspection.report import report
from uqff.integrations.whole import IDLE_KEY, NAMES_KEY, WholeModel, WholePaths, is_known
from uqff.models.architectures import idle_paths
from uqff.models.config import config_to_write, read_config
from uqff.models.renaming import ModulePaths
from uqff.parallel.checkpoint_layers import GATE_UP
from uqff.parallel.filling import STORED_KEY
from uqff.parallel.layer import QuantizedLayer
from uqff.parallel.mixture import Mixture
from uqff.parallel.plan import EMBEDDING, HEAD
from uqff.parallel.projection import PROJECTIONS
from uqff.parallel.vocabulary import Embedding, Head

__all__ = ["save_pretrained"]

WRITTEN: Final = (CONFIG_NAME, GENERATION_CONFIG_NAME, RESIDUAL_NAME, REPORT_NAME, SUMS_NAME, LAYER_SUMS_NAME)
"""Files that are of one model, beside its shards."""

TIED_APART: Final = Version(1, 1, 0)
"""The last version that has a head beside the embedding of a tied model."""


WITHOUT_EFFECT: Final = ("safe_serialization", "save_original_format", "save_peft_format", "token")
"""Options of ``transformers`` that change nothing here: what is written is safetensors, by the checkpoint's names."""

SIZE: Final = re.compile(r"(?P<count>[0-9]+) ?(?P<unit>[KMGT]?)(?P<binary>i?)B?", re.IGNORECASE)
"""As ``transformers`` has sizes: ``5GB``, ``200MB``, ``5GiB``."""


def save_pretrained(
    model: Any,
    directory: str | os.PathLike[str],
    is_main_process: bool = True,
    *,
    max_shard_size: int | str | None = None,
    **options: Any,
) -> None:
    """Write a model as UQFF: layers, residual, configurations and report; the tokenizer is saved by itself.

    A directory that is there becomes another one, in one step where the system can, so that a process that is killed
    leaves the old model or the new one.  A model in it is replaced; whatever else it holds stays.

    Args:
        model: of ``transformers``, with all places filled, on one rank.
        directory: where; made if absent.
        is_main_process: of several that have the model, whether this is the one that writes it.
        max_shard_size: bytes of layers, or text such as ``"5GB"``, after which another file begins; 10 GiB if None.
        options: of ``save_pretrained`` of ``transformers``: those that change nothing here.

    Raises:
        UnsupportedError: an option; the model is shared by several ranks, or a part of one with towers, or lacks layers
            that the engine wants; the current directory.
        UqffError: a layer cannot be written.
    """
    unknown = sorted(name for name, value in options.items() if value and name not in WITHOUT_EFFECT)
    if unknown:
        raise UnsupportedError("options that saving UQFF does not know", got=", ".join(unknown))
    shard_bytes = SHARD_BYTES if max_shard_size is None else _bytes(max_shard_size)
    if not is_main_process:
        return
    if not is_known(model):
        raise UnsupportedError(
            "a language model out of a larger one cannot be saved by itself",
            expected="all of it, as AutoModelForImageTextToText loads it",
            got=type(model).__name__,
        )
    named, towers = {"architectures": [type(model).__name__]}, getattr(model, NAMES_KEY, None)
    paths = ModulePaths(named) if towers is None else WholePaths(named, towers)
    view = model if towers is None else WholeModel(model)
    layers = _layers(view, paths)
    idle, idle_tensors = getattr(model, IDLE_KEY, ({}, {}))
    kept = set(layers) | set(idle) | {name.removesuffix(".weight") for name in idle_tensors}
    lost = sorted(idle_paths({**model.config.to_dict(), **named}) - kept)
    if lost:
        raise UnsupportedError(
            "the model cannot be saved: transformers leaves out layers that files of it have, and that do nothing",
            layer=lost[0],
            expected="a model that was loaded from UQFF, which has them",
            got=f"{len(lost)} left out",
        )
    layers |= idle
    version = LATEST
    embedding, head = view.get_submodule(EMBEDDING).rows, view.get_submodule(HEAD).rows
    taken = {f"{path}.weight" for path in layers}
    rest = _rest(view)
    if isinstance(view, WholeModel):
        rest = view.named_as_saved(rest)
    else:
        rest = {paths(name): each for name, each in rest.items()}
    residual = {name: each for name, each in rest.items() if name not in taken} | idle_tensors
    if view.config.tie_word_embeddings and head is not embedding:
        version = TIED_APART
        residual[f"{paths(EMBEDDING)}.weight"] = layers.pop(paths(EMBEDDING)).weight.dequantize(model.dtype)
    ((kind, _),) = Counter(layer.weight.kind for layer in layers.values()).most_common(1)
    model.config.architectures = [type(model).__name__]
    with changed_directory(Path(directory), _is_replaced) as made:
        save(layers, made / f"{kind}-0.uqff", version=version, shard_bytes=shard_bytes)
        parts = {name: Part.of_tensor(each.detach().cpu()) for name, each in residual.items()}
        tensors = [(name, part.dtype.safetensors, part.shape) for name, part in parts.items()]
        with TensorWriter(made / RESIDUAL_NAME, tensors, metadata_of(version)) as written:
            for name, part in parts.items():
                written.write(name, [part.payload])
            written.finish()
        path = made / CONFIG_NAME
        model.config.save_pretrained(made)
        config = config_to_write(path, read_config(path), version)
        if config is not None:
            path.unlink()
            write_json(path, config)
        if model.can_generate():
            model.generation_config.save_pretrained(made)
        report(made, write=True)
        for name in filter(_is_replaced, os.listdir(made)):
            with open(made / name, "rb+") as file:
                flush_to_disk(file)


def _bytes(size: int | str) -> int:
    """A size as a number."""
    found = SIZE.fullmatch(str(size))
    if found is None or int(found["count"]) < 1:
        raise UnsupportedError("no such size", field="max_shard_size", expected="a number, or such as 5GB", got=size)
    power = " KMGT".index(found["unit"].upper() or " ")
    return int(found["count"]) * int((1024 if found["binary"] else 1000) ** power)


def _is_replaced(name: str) -> bool:
    """Whether a file is of the model that is written, or of one that was there; not the tokenizer's, or another."""
    return name.endswith((SUFFIX, KEPT_SUFFIX)) or name in WRITTEN


def _layers(model: Any, paths: ModulePaths) -> dict[str, Layer]:
    """The layers, by their paths in a checkpoint; experts stacked."""
    layers: dict[str, Layer] = {}
    for path, module in model.named_modules():
        if isinstance(module, Mixture):
            layers |= _experts(path, module, paths)
        elif isinstance(module, Embedding | Head):
            layers[paths(path)] = _layer(module.rows)
        elif isinstance(module, QuantizedLayer) and ".experts." not in path and not path.endswith(".rows"):
            layers[paths(path)] = _layer(module)
        elif _is_as_stored(module):
            layers[paths(path)] = Layer(getattr(module, STORED_KEY))
    if model.get_submodule(HEAD).rows is model.get_submodule(EMBEDDING).rows:
        del layers[paths(HEAD)]
    return layers


def _is_as_stored(module: Any) -> bool:
    """Whether a module has the plain numbers of a layer, still: another weight may have been put in."""
    stored = getattr(module, STORED_KEY, None)
    return stored is not None and torch.equal(
        stored.dequantize(module.weight.dtype).to(module.weight.device), module.weight
    )


def _layer(module: QuantizedLayer) -> Layer:
    if module.comm.world_size > 1:
        raise UnsupportedError("a model of several ranks cannot be saved", layer=module.key, expected="one rank")
    return Layer(module.weight, module.bias)


def _experts(path: str, module: Mixture, paths: ModulePaths) -> dict[str, Layer]:
    """A stack for each projection; of gate and up one, gates first, where files have it under a name of its own."""
    gate, up, down = (_stacked(getattr(module, name)) for name, _ in PROJECTIONS)
    fused, last = paths(f"{path}.{GATE_UP}"), paths(f"{path}.down_proj")
    if last == f"{paths(path)}.down_proj":
        return {f"{paths(path)}.{name}": each for (name, _), each in zip(PROJECTIONS, (gate, up, down), strict=True)}
    if any(each.bias is not None for each in (gate, up)):
        raise UnsupportedError("experts of this form cannot be saved with biases", layer=fused)
    with located(layer=fused):
        return {fused: Layer(joined_rows([gate.weight, up.weight], turns=False)), last: down}


def _stacked(projection: Any) -> Layer:
    if isinstance(projection, QuantizedLayer):
        return _layer(projection)
    return Layer(stack([_layer(each).weight for each in projection]))


def _rest(model: Any) -> dict[str, torch.Tensor]:
    """Parameters that belong to no layer, and what modules of ``transformers`` keep beside them."""
    of_layers = {
        id(each) for module in model.modules() if isinstance(module, QuantizedLayer) for each in module.parameters()
    }
    rest: dict[str, torch.Tensor] = {name: each for name, each in model.named_parameters() if id(each) not in of_layers}
    for path, module in model.named_modules():
        if type(module).__module__.startswith("transformers."):
            kept = dict(module.named_buffers(prefix=path, recurse=False))
            rest |= {
                name: each
                for name, each in kept.items()
                if name.rpartition(".")[2] not in module._non_persistent_buffers_set
            }
    return rest
