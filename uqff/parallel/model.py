"""A whole model on one rank or several: a causal language model of ``transformers`` with parallel layers in it.

Every rank opens the files and makes sure that all have the same ones; builds the model on the meta device; and fills it
with its share of the layers, see :mod:`uqff.parallel.plan` for what is split how.  Weights stay quantised.  On the CPU
they are views of the mapped file where the slice is one: nothing is read before it is used.

    comm = uqff.parallel.Comm(torch.distributed.group.WORLD)        # or none, for a world of one
    model = uqff.parallel.load_model("DIR", comm, device="cpu", dtype=torch.float32)
    model(input_ids).logits                                         # the same on every rank
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from uqff.errors import FormatError, UnsupportedError
from uqff.lora.applied import Adapters, Lora
from uqff.parallel import transformers_model
from uqff.parallel.adapting import Adapting, adapters_digest
from uqff.parallel.arithmetic import Arithmetic, check_arithmetic, set_arithmetic
from uqff.parallel.comm import Comm, exchange_device
from uqff.parallel.consensus import settle
from uqff.parallel.filling import Filling
from uqff.parallel.gpt_oss import share_sinks
from uqff.parallel.immediate import ImmediateIsq, IsqPool, Types
from uqff.parallel.loading import when_asked
from uqff.parallel.source import ModelSource, check_depth, open_source
from uqff.progress import Progress
from uqff.quantization.types import FallbackWarning

__all__ = ["Check", "Loading", "load_into", "load_model"]

Check = Literal["sample", "all"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_model(
    path: str | os.PathLike[str],
    comm: Comm | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    check: Check = "sample",
    isq: Types | ImmediateIsq | None = None,
    workers: int | None = None,
    lora: Lora | tuple[Lora, float] | Sequence[Lora | tuple[Lora, float]] | None = None,
    merge_lora: bool | None = None,
    arithmetic: Arithmetic = "exact",
    progress: Progress | None = None,
) -> torch.nn.Module:
    """Load this rank's share of a model.

    Args:
        path: model directory of either generation, with ``config.json`` and ``residual.safetensors``; ``DIR:TYPE`` or a
            ``.uqff`` file, if the directory holds several. Or a GGUF file; or a directory of a checkpoint, in
            safetensors files, if it holds no ``.uqff``.
        comm: the ranks, each of which calls this; a world of one if None.
        device: where the model goes.
        dtype: of activations, norms and products: float32, bfloat16 or float16; if None, that of the residual, in which
            the model was loaded when the file was written; of a checkpoint, what its configuration states.
        check: how to make sure that all ranks have the same files: by headers, sizes and a ``sample`` of each tensor,
            or by ``all`` bytes, see :func:`~uqff.parallel.consensus.digest`.
        isq: of a directory of UQFF, the type, if it holds several and the path names none. Of a checkpoint, what its
            layers are quantised to while they are loaded, see :mod:`uqff.parallel.immediate`: a type (``"q4k"``), a
            number of bits, a :class:`~uqff.quantization.recipe.Recipe` or the file of one, or
            :class:`~uqff.parallel.ImmediateIsq`. A :class:`~uqff.quantization.types.FallbackWarning` says if layers
            became another type than that, because of their shapes.
        workers: threads that quantise; as many as a kernel may use if None. Each takes the memory of one more layer.
        lora: adapters, in order: directories or :class:`uqff.lora.Adapter`, each alone or as a pair with its weight.
        merge_lora: whether they are added to the weights, of quantised ones requantised, or multiplied beside them; if
            None, they are added to weights that are not quantised, or are quantised while they are loaded: before that.
        arithmetic: of products on CPUs: ``exact``, or as the ``engine`` multiplies, which is faster with ggml types and
            less exact, see :mod:`uqff.parallel.arithmetic`; each layer's can be changed afterwards.
        progress: is told of each layer, once it is in its place.

    Returns:
        A ``transformers`` causal language model, in evaluation mode. What it returns is the same on every rank.

    Raises:
        ShardError: on every rank, if the ranks have different files, or if another rank could not load its share.
        UqffError: this rank could not: a file is not valid or lacks a layer, or the architecture is not known; or there
            is no such arithmetic.
        CommError: a rank did not take part.

    >>> import torch
    >>> model = uqff.load_model("model")
    >>> with torch.inference_mode():
    ...     model(torch.tensor([[3, 4, 5]])).logits.shape
    torch.Size([1, 3, 64])
    """
    how = Loading(torch.device(device), dtype, check, isq, workers, lora, merge_lora, arithmetic, progress)
    return load_into(_built, path, comm, how)


def _built(source: ModelSource, dtype: torch.dtype) -> torch.nn.Module:
    transformers_model.model_type(source.config)  # what cannot be run at all is said first
    check_depth(source)
    return transformers_model.build(source.config, dtype)


@dataclass(frozen=True)
class Loading:
    """How a model is loaded: what :func:`load_model` takes, by the same names."""

    device: torch.device
    dtype: torch.dtype | None = None
    check: Check = "sample"
    isq: Types | ImmediateIsq | None = None
    workers: int | None = None
    lora: Lora | tuple[Lora, float] | Sequence[Lora | tuple[Lora, float]] | None = None
    merge_lora: bool | None = None
    arithmetic: Arithmetic = "exact"
    progress: Progress | None = None


def load_into(
    make: Callable[[ModelSource, torch.dtype], torch.nn.Module],
    path: str | os.PathLike[str],
    comm: Comm | None,
    how: Loading,
) -> torch.nn.Module:
    """:func:`load_model` into a model that is there; takes and raises what that does.

    Args:
        make: gives the model of ``transformers``, of a source and in a dtype: its places for layers on the meta device
            (:func:`uqff.parallel.transformers_model.places`), and whatever else is to be filled.
        path: of :func:`load_model`.
        comm: likewise.
        how: likewise.
    """
    comm, device = Comm.of(comm), how.device
    exchange = exchange_device(device)
    what = f"model {os.fspath(path)}"

    check_arithmetic(how.arithmetic)

    def identify() -> tuple[ModelSource, ImmediateIsq | None, Adapters, bytes]:
        everything = how.check == "all"
        adapters = Adapters.open(how.lora)
        try:
            source, quantising = open_source(path, how.isq)
        except BaseException:
            adapters.close()
            raise
        options: tuple[object, ...] = ()
        if adapters:
            options = adapters_digest(adapters, everything=everything), how.merge_lora
        if how.arithmetic != "exact":
            options = *options, how.arithmetic
        digest = source.digest(how.dtype, quantising, *options, everything=everything)
        return source, quantising, adapters, digest

    source, quantising, adapters, digest = settle(comm, f"opening {what}", identify, exchange)
    with source, adapters:
        comm.check_same(digest, what, exchange)

        def load() -> torch.nn.Module:
            return _load(make, source, comm, how, adapters, quantising)

        return settle(comm, f"loading {what}", load, exchange)


def _load(
    make: Callable[[ModelSource, torch.dtype], torch.nn.Module],
    source: ModelSource,
    comm: Comm,
    how: Loading,
    adapters: Adapters,
    isq: ImmediateIsq | None,
) -> torch.nn.Module:
    device, dtype = how.device, how.dtype or source.dtype or torch.float32
    if dtype not in _DTYPES:
        raise UnsupportedError("dtype of activations", expected="float32, bfloat16 or float16", got=dtype)
    model = make(source, dtype)
    shares_heads = "query" in transformers_model.linear_roles(model, comm.world_size).values()
    transformers_model.share_heads(model, comm)
    adapting = Adapting(adapters, model, dtype, merge=how.merge_lora, paths=source.paths)
    if isq is None:
        Filling(source, comm, device, dtype, model, adapting, None, when_asked).fill(how.progress)
    else:
        with IsqPool(how.workers) as pool:
            Filling(source, comm, device, dtype, model, adapting, isq, pool).fill(how.progress)
        _tell(isq)
    transformers_model.materialise(model, adapting.tensors(source.tensor), device, dtype)
    set_arithmetic(model, how.arithmetic)
    if shares_heads:
        share_sinks(model, comm)
    left = source.left()
    if left is not None:
        raise FormatError(
            "layer has no place in the model",
            file=source.name,
            layer=source.key(left),
            expected=f"a module of {type(model).__name__}",
        )
    return model


def _tell(isq: ImmediateIsq) -> None:
    """Warn of layers that became another type."""
    if isq.fallbacks:
        more = f"; and {len(isq.fallbacks) - 1} more" if isq.fallbacks[1:] else ""
        warnings.warn(FallbackWarning(f"{isq.fallbacks[0]}{more}"), stacklevel=2)
