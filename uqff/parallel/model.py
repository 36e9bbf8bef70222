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
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from uqff.errors import FormatError, ShapeError, ShardError, UnsupportedError
from uqff.lora.applied import Adapters, Lora
from uqff.models.layouts import half_split_order
from uqff.parallel import fallback, transformers_model
from uqff.parallel.accept import Weight, parts_of
from uqff.parallel.adapting import Adapting, adapters_digest
from uqff.parallel.comm import Comm
from uqff.parallel.consensus import settle
from uqff.parallel.experts import FusedExperts, PackedExperts
from uqff.parallel.heads import compute_kv_shard
from uqff.parallel.plan import ROLES, Role, Sizes
from uqff.parallel.projection import PROJECTIONS, are_single
from uqff.parallel.source import EMBEDDING, HEAD, ModelSource, open_source
from uqff.parallel.vocabulary import Embedding, Head, vocabulary

if TYPE_CHECKING:
    from uqff.codec.layer import Layer
    from uqff.parallel.layer import QuantizedLinear
    from uqff.parallel.mixture import Mixture
    from uqff.parallel.partition import OnMisaligned

__all__ = ["Check", "load_model"]

Check = Literal["sample", "all"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_model(
    path: str | os.PathLike[str],
    comm: Comm | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    check: Check = "sample",
    isq: str | None = None,
    lora: Lora | tuple[Lora, float] | Sequence[Lora | tuple[Lora, float]] | None = None,
    merge_lora: bool | None = None,
) -> torch.nn.Module:
    """Load this rank's share of a model.

    Args:
        path: model directory of either generation, with ``config.json`` and ``residual.safetensors``; ``DIR:TYPE`` or a
            ``.uqff`` file, if the directory holds several. Or a directory of a checkpoint, in safetensors files, if it
            holds no ``.uqff``.
        comm: the ranks, each of which calls this; a world of one if None.
        device: where the model goes.
        dtype: of activations, norms and products: float32, bfloat16 or float16; if None, that of the residual, in which
            the model was loaded when the file was written; of a checkpoint, what its configuration states.
        check: how to make sure that all ranks have the same files: by headers, sizes and a ``sample`` of each tensor,
            or by ``all`` bytes, see :func:`~uqff.parallel.consensus.digest`.
        isq: the type, if the directory holds several and the path names none.
        lora: adapters, in order: directories or :class:`uqff.lora.Adapter`, each alone or as a pair with its weight.
        merge_lora: whether they are added to the weights, of quantised ones requantised, or multiplied beside them; if
            None, they are added to weights that are not quantised.

    Returns:
        A ``transformers`` causal language model, in evaluation mode. What it returns is the same on every rank.

    Raises:
        ShardError: on every rank, if the model does not fit the world size (those that work are named), if the ranks
            have different files, or if another rank could not load its share.
        UqffError: this rank could not: a file is not valid or lacks a layer, or the architecture is not known.
        CommError: a rank did not take part.

    >>> import torch
    >>> model = uqff.load_model("model")
    >>> with torch.inference_mode():
    ...     model(torch.tensor([[3, 4, 5]])).logits.shape
    torch.Size([1, 3, 64])
    """
    comm, device = Comm.of(comm), torch.device(device)
    exchange = device if device.type == "cuda" else torch.device("cpu")
    what = f"model {os.fspath(path)}"

    def identify() -> tuple[ModelSource, Adapters, bytes]:
        everything = check == "all"
        adapters = Adapters.open(lora)
        try:
            source = open_source(path, isq)
        except BaseException:
            adapters.close()
            raise
        options = (adapters_digest(adapters, everything=everything), merge_lora) if adapters else ()
        return source, adapters, source.digest(dtype, *options, everything=everything)

    source, adapters, digest = settle(comm, f"opening {what}", identify, exchange)
    with source, adapters:
        comm.check_same(digest, what, exchange)

        def load() -> torch.nn.Module:
            return _load(source, comm, device, dtype, adapters, merge_lora)

        return settle(comm, f"loading {what}", load, exchange)


def _load(
    source: ModelSource,
    comm: Comm,
    device: torch.device,
    dtype: torch.dtype | None,
    adapters: Adapters,
    merge: bool | None,
) -> torch.nn.Module:
    dtype = dtype or source.dtype or torch.float32
    if dtype not in _DTYPES:
        raise UnsupportedError("dtype of activations", expected="float32, bfloat16 or float16", got=dtype)
    transformers_model.model_type(source.config)
    Sizes.of(source.config).check(comm.world_size)
    model = transformers_model.build(source.config, dtype)
    transformers_model.share_heads(model, comm)
    adapting = Adapting(adapters, model, dtype, merge=merge)
    _Filling(source, comm, device, dtype, model, adapting).fill()
    transformers_model.materialise(model, adapting.tensors(source.tensor), device, dtype)
    left = source.left()
    if left is not None:
        raise FormatError(
            "layer has no place in the model",
            file=source.name,
            layer=source.key(left),
            expected=f"a module of {type(model).__name__}",
        )
    return model


class _Filling:
    """Puts the layers of a source into the places that a model has for them."""

    def __init__(
        self,
        source: ModelSource,
        comm: Comm,
        device: torch.device,
        dtype: torch.dtype,
        model: torch.nn.Module,
        adapting: Adapting,
    ) -> None:
        self.source, self.comm, self.device, self.dtype, self.model = source, comm, device, dtype, model
        self.adapting = adapting

    def fill(self) -> None:
        """Fill all."""
        for path in transformers_model.sparse_blocks(self.model):
            experts = self.adapting.mixture(f"{path}.experts", self._experts(f"{path}.experts")).to(self.device)
            self._put(path, transformers_model.SparseBlock(self.model.config, experts))
        for path, module in list(self.model.named_modules()):
            role = ROLES.get(path.rpartition(".")[2])
            if role is not None and isinstance(module, torch.nn.Linear):
                self._put(path, self.adapting.linear(path, self._split(role, path, module)).to(self.device))
        self._vocabulary()

    def _split(self, role: Role, path: str, module: torch.nn.Linear) -> QuantizedLinear:
        layer, key = self._layer(path, module.weight.shape), self.source.key(path)
        if module.bias is not None and layer.bias is None:
            raise FormatError("layer lacks a bias", layer=key, expected=f"bias [{module.weight.shape[0]}]")
        if role == "row":
            return fallback.row(layer, self.comm, key)
        shard = None
        if role == "key-value":
            config: Any = self.model.config
            kv_heads = config.num_key_value_heads
            shard = compute_kv_shard(kv_heads, module.weight.shape[0] // kv_heads, self.comm)
        made = fallback.column(layer, self.comm, key, shard)
        heads = self.source.layout.heads_of(path)
        if heads is not None:  # of which every rank holds whole ones
            rows = made.weight.shape[0]
            made.reorder(half_split_order(rows, heads * rows // layer.weight.shape[0], layer=key))
        return made

    def _experts(self, path: str) -> Mixture:
        """A part of every expert: whole blocks, if equal parts cut through them; or all, if there are not enough."""
        try:
            return self._experts_split(path, "uneven")
        except ShardError:
            return self._experts_split(path, "replicate")

    def _experts_split(self, path: str, on_misaligned: OnMisaligned) -> Mixture:
        config: Any = self.model.config
        count, inner, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
        projections = self.source.experts(path, count)
        form: type[Mixture] = FusedExperts
        for (name, _), given, shape in zip(
            PROJECTIONS, projections, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True
        ):
            if are_single(given):
                form = PackedExperts
                for expert, layer in enumerate(given):
                    self._fit(f"{path}.{expert}.{name}", layer, shape)
            else:
                self._fit(f"{path}.{name}", given, (count, *shape))
        gate, up, down = projections
        act = transformers_model.activation(config)
        return form.from_layers(gate, up, down, self.comm, act=act, on_misaligned=on_misaligned, key=path)

    def _vocabulary(self) -> None:
        """Embedding and head; what a tied model has only one of serves as both."""
        config: Any = self.model.config
        tied, source = bool(config.tie_word_embeddings), self.source
        weight: Any = self.model.get_submodule(EMBEDDING).weight
        shape = tuple(weight.shape)
        embedding = vocabulary(self._layer(EMBEDDING, shape), self.comm, source.key(EMBEDDING))
        head = embedding
        if HEAD in source or not tied:
            head = self.adapting.linear(HEAD, vocabulary(self._layer(HEAD, shape), self.comm, source.key(HEAD)))
        self._put(EMBEDDING, Embedding(embedding, self.dtype).to(self.device))
        self._put(HEAD, Head(head).to(self.device))

    def _layer(self, path: str, shape: Sequence[int]) -> Layer:
        layer = self.source.layer(path)
        self._fit(path, layer, shape)
        return layer

    def _fit(self, path: str, given: Weight, shape: Sequence[int]) -> None:
        """Make sure that a weight has the shape that the configuration says."""
        got = tuple(parts_of(given, layer=path)[0].shape)
        if got != tuple(shape):
            raise ShapeError(
                "layer does not fit the configuration",
                file=self.source.name,
                layer=self.source.key(path),
                expected=list(shape),
                got=list(got),
            )

    def _put(self, path: str, made: torch.nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, made)
