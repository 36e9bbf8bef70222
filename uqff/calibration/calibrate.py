"""A model reads a text, block by block, and what goes into its layers is kept: squares, and products if asked for.

Authority: llama.cpp, ``tools/imatrix/imatrix.cpp`` (``IMatrixCollector::collect_imatrix``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from uqff.calibration.blocks import Blocks
from uqff.container.atomic import atomic_files, check_outputs
from uqff.evaluation.evaluate import text_windows
from uqff.importance.hessians import HessianWriter
from uqff.importance.matrix import Importance, InputSquares
from uqff.parallel.gather import Gathering
from uqff.parallel.layer import QuantizedLinear
from uqff.parallel.mixture import Mixture
from uqff.parallel.model import load_model
from uqff.parallel.plan import EMBEDDING, HEAD
from uqff.parallel.projection import PROJECTIONS
from uqff.parallel.stats import InputStats
from uqff.progress import Progress, Steps

__all__ = ["calibrate"]


def calibrate(
    path: str | os.PathLike[str],
    *,
    text: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    hessian: str | os.PathLike[str] | None = None,
    context: int = 512,
    windows: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    isq: str | None = None,
    progress: Progress | None = None,
) -> Importance:
    """Let a model read a text, and find out how much each input of each layer matters.

    The importance of an input is its mean square over all tokens; of experts, over the tokens that go to each. The
    model is run block by block, so that it may be larger than memory, see :mod:`uqff.calibration.blocks`.

    Args:
        path: a checkpoint, or UQFF, as :func:`uqff.load_model` takes it.
        text: a file of UTF-8 text.
        out: where the importance matrix is written; see :meth:`uqff.Importance.save` for the forms.
        hessian: where XᵀX of each layer is written, float32, of all inputs x of the layer as rows of X.
        context: tokens of a window.
        windows: how many at most.
        device: where the model goes.
        dtype: of activations.
        isq: of UQFF, which model of several.
        progress: is told of each window and block.

    Returns:
        The importance matrix: of each projection, experts by themselves, and of the head; if embedding and head are
        one matrix, under both names.

    Raises:
        FormatError: the text is too short or is no text.
        UnsupportedError: both files are one.
        UqffError: see :func:`uqff.load_model` and :meth:`uqff.Importance.save`.
        OSError: a file cannot be read or written.

    >>> importance = uqff.calibrate("checkpoint", text="text.txt", out="imatrix.gguf", context=64)
    >>> importance["model.layers.0.mlp.down_proj"].means.shape
    (1, 256)
    """
    cut = text_windows(path, isq, text, context=context, first=0, most=windows)
    if out is not None:
        Importance({}).check_form(out)
    check_outputs(out, hessian)
    model: Any = load_model(path, device=device, dtype=dtype, isq=isq)
    blocks = Blocks(model)
    steps = Steps(progress, "calibrate", blocks.count, (blocks.count + 1) * len(cut) * context, "tokens")
    found: dict[str, InputSquares] = {}
    with contextlib.ExitStack() as stack:
        writer = None
        if hessian is not None:
            stage = stack.enter_context(atomic_files())
            writer = HessianWriter(stage(Path(hessian)), _shapes(model))
            stack.callback(writer.close)

        def keep(module: str, seen: list[InputStats], *, stacked: bool) -> None:
            counts = np.array([each.rows for each in seen], np.int64)
            found[module] = InputSquares(np.stack([_array(each.squares) for each in seen]), counts)
            if writer is not None:
                products = [_array(each.products) for each in seen if each.products is not None]
                writer.add(module, np.stack(products) if stacked else products[0], counts)

        blocks.begin(list(cut))
        for block in range(blocks.count):
            watched = list(_tracked(f"model.layers.{block}", model.model.layers[block]))
            for _, layer in watched:
                layer.begin_track_stats(products=writer is not None)
            for at in blocks.run(block):
                steps.add(f"model.layers.{block}, window {at + 1}", context, done=int(at == len(cut) - 1))
            for module, layer in watched:
                seen = layer.take_stats()
                keep(module, seen if isinstance(seen, list) else [seen], stacked=isinstance(layer, Gathering))
        hidden = model.config.get_text_config().hidden_size
        stats = InputStats(hidden, torch.device(device), products=writer is not None)
        for given in blocks.heads():
            stats.process(given)
            steps.add("head", context, done=0)
        for name in _heads(model):
            keep(name, [stats], stacked=False)
        if writer is not None:
            writer.finish()
    importance = Importance(found, chunk=context, datasets=[Path(text).name])
    if out is not None:
        importance.save(out)
    return importance


def _array(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    made: npt.NDArray[np.float32] = tensor.numpy(force=True)
    return made


def _tracked(path: str, block: torch.nn.Module) -> Iterator[tuple[str, QuantizedLinear | Gathering]]:
    """The layers of a block with their paths; of experts, the three projections."""
    for name, module in block.named_modules(prefix=path):
        if isinstance(module, Mixture):
            for projection, _ in PROJECTIONS:
                yield f"{name}.{projection}", getattr(module, projection)
        elif isinstance(module, QuantizedLinear) and ".experts." not in name:
            yield name, module


def _heads(model: Any) -> list[str]:
    return [HEAD, EMBEDDING] if model.config.get_text_config().tie_word_embeddings else [HEAD]


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Of what is written of each layer, in the order of the model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for block, layer in enumerate(model.model.layers):
        for module, each in _tracked(f"model.layers.{block}", layer):
            if isinstance(each, Gathering):
                experts, _, inputs = each.size()
                shapes[module] = (experts, inputs, inputs)
            else:
                shapes[module] = (each.weight_buffers.shape[1],) * 2
    return shapes | dict.fromkeys(_heads(model), (model.config.get_text_config().hidden_size,) * 2)
