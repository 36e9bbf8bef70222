"""Embedding and head of vLLM: this rank's rows of the vocabulary, of which those of tokens are dequantised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from uqff.errors import FormatError
from uqff.integrations.vllm.part import LinearPart, make_place
from uqff.integrations.vllm.stored import unloaded_of
from uqff.parallel.shard import Slice
from uqff.parallel.vocabulary import rows_of
from uqff.parallel.weight import of_spec, record_of_bytes

__all__ = ["UqffEmbeddingMethod", "give_head"]


class UqffEmbeddingMethod(QuantizeMethodBase):  # type: ignore[misc]
    """Holds the rows of an embedding or a head of vLLM."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make a parameter without numbers, whose ``weight_loader`` takes the layer."""
        make_place(layer, "weight", params_dtype, _load)
        layer.uqff_rows = None
        layer.uqff_tied = ()  # no module of the layer

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """Let a head use the rows of an embedding, unless the files have some for it: :func:`give_head`."""
        layer.weight = embed_tokens.weight
        layer.uqff_tied = (embed_tokens,)
        return layer

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make sure that the rows are there.

        Raises:
            FormatError: the files lack them.
        """
        if layer.uqff_rows is None and not layer.uqff_tied:
            raise FormatError("model lacks a weight", layer=layer.prefix, expected="a layer", got="none")

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states to the logits of this rank, with zeros for what vLLM adds to the vocabulary."""
        held = _held(layer)
        if held is None:  # of an embedding that vLLM did not ask a method about
            return torch.nn.functional.linear(x, layer.uqff_tied[0].weight, bias)
        y: torch.Tensor = held(x)
        missing = layer.num_embeddings_per_partition - y.shape[-1]
        if missing:
            y = torch.nn.functional.pad(y, (0, missing))
        return y if bias is None else y + bias

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        """Tokens, counted from this rank's first, to hidden states."""
        held, dtype = layer.uqff_rows, layer.weight.dtype
        buffers, start = held.codes, 0 if held.rest is None else held.rest.start
        if buffers.numbers is not None:
            return torch.nn.functional.embedding(input_, buffers.numbers)
        made: torch.Tensor = rows(input_ + start, buffers.bytes(), buffers.spec, dtype)
        return made


def give_head(layer: Any, weight: torch.Tensor) -> None:
    """Give a tied head rows of its own.

    Args:
        layer: the head.
        weight: what a file has for it.
    """
    _load(layer, layer.weight, weight)


def _held(layer: Any) -> LinearPart | None:
    """The rows of a layer, or those of the embedding that it is tied to; None if that has plain numbers."""
    if layer.uqff_rows is None and layer.uqff_tied:
        held: LinearPart | None = getattr(layer.uqff_tied[0], "uqff_rows", None)
    else:
        held = layer.uqff_rows
    return held


def _load(layer: Any, param: torch.Tensor, loaded_weight: torch.Tensor) -> None:
    """What vLLM calls for the tensor of a layer."""
    source, mine = unloaded_of(loaded_weight, layer.prefix), layer.shard_indices
    cut = Slice(0, mine.org_vocab_start_index, mine.num_org_elements)
    layer.uqff_rows = LinearPart(source, (layer.org_vocab_size, layer.embedding_dim), cut, param)


# torch 2.4 cannot read a schema off annotations that are text, as all are here.
_ROWS = "(Tensor ids, Tensor[] parts, str spec, ScalarType dtype) -> Tensor"


@torch.library.custom_op("uqff::rows", mutates_args=(), schema=_ROWS)
def rows(ids: torch.Tensor, parts: Sequence[torch.Tensor], spec: str, dtype: torch.dtype) -> torch.Tensor:
    """Some rows of a weight as numbers.

    Args:
        ids: ``[...]``, of rows that there are.
        parts: the bytes of the weight's parts, in the order of the record.
        spec: what else it is, see :func:`~uqff.parallel.weight.to_spec`.
        dtype: of the result.

    Returns:
        ``[..., in]``.
    """
    return rows_of(record_of_bytes(of_spec(spec), parts), ids, dtype)


@rows.register_fake
def _(ids: torch.Tensor, parts: Sequence[torch.Tensor], spec: str, dtype: torch.dtype) -> torch.Tensor:
    return parts[0].new_empty((*ids.shape, of_spec(spec).shape[1]), dtype=dtype)
