"""Linear layers of vLLM, each of one layer of a file or of several: query, key and value; gate and up."""

from __future__ import annotations

from typing import Any, Final

import torch
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear

from uqff.errors import FormatError
from uqff.integrations.vllm.part import LinearPart, make_place
from uqff.integrations.vllm.stored import unloaded_of
from uqff.parallel.shard import Slice

__all__ = ["UqffLinearMethod"]

QKV: Final = {"q": 0, "k": 1, "v": 2}
"""Which part of a layer vLLM means."""


class UqffLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Holds the codes of a linear layer of vLLM, and multiplies with them."""

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
        """Make a parameter without numbers, whose ``weight_loader`` takes the layers."""
        make_place(layer, "weight", params_dtype, _load)
        layer.uqff_inputs = Slice(1, 0, input_size)
        if input_size_per_partition != input_size:
            layer.uqff_inputs = Slice(1, layer.tp_rank * input_size_per_partition, input_size_per_partition)
        layer.uqff_input_size = input_size
        layer.uqff_sizes = list(output_partition_sizes)
        layer.uqff_parts = torch.nn.ModuleDict()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Make sure that all parts are there, and put them in order.

        Raises:
            FormatError: the files lack one.
        """
        held = layer.uqff_parts
        if ALL not in held and len(held) != len(layer.uqff_sizes):
            raise FormatError(
                "model lacks a weight", layer=layer.prefix, expected=f"{len(layer.uqff_sizes)} parts", got=len(held)
            )
        layer.uqff_parts = torch.nn.ModuleDict({name: held[name] for name in sorted(held)})

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x Wᵀ``, of all parts one behind the other, plus the bias."""
        made = [part(x) for part in layer.uqff_parts.values()]
        y: torch.Tensor = made[0] if len(made) == 1 else torch.cat(made, -1)
        return y if bias is None else y + bias


ALL: Final = "all"
"""The name of a part that is the whole of a layer of several parts."""


def _whole_sizes(layer: Any) -> list[int]:
    """The outputs of each part on all ranks."""
    if isinstance(layer, QKVParallelLinear):
        heads = (layer.total_num_heads, layer.total_num_kv_heads, layer.total_num_kv_heads)
        sizes = (layer.head_size, layer.head_size, layer.v_head_size)
        return [count * size for count, size in zip(heads, sizes, strict=True)]
    return list(getattr(layer, "output_sizes", [layer.output_size]))


def _rank(layer: Any, part: int) -> int:
    """Which of the equal shares of a part this rank has: several may have the same head of keys and values."""
    rank: int = layer.tp_rank
    return rank // layer.num_kv_head_replicas if part and isinstance(layer, QKVParallelLinear) else rank


def _load(layer: Any, param: torch.Tensor, loaded_weight: torch.Tensor, shard_id: Any = None) -> None:
    """What vLLM calls for each tensor of a layer.

    Args:
        layer: of vLLM.
        param: its parameter, which says where weights go.
        loaded_weight: a layer of a file, or plain numbers.
        shard_id: which part; several one after another, or all of them if None.
    """
    source, sizes = unloaded_of(loaded_weight, layer.prefix), _whole_sizes(layer)
    if shard_id is None and layer.uqff_sizes == sizes:
        shape = (sum(sizes), layer.uqff_input_size)
        whole = layer.uqff_inputs if layer.uqff_inputs.length != layer.uqff_input_size else Slice(0, 0, sum(sizes))
        layer.uqff_parts[ALL] = LinearPart(source, shape, whole, param)
        return
    parts = _parts(shard_id, len(sizes))
    shape, start = (sum(sizes[part] for part in parts), layer.uqff_input_size), 0
    for part in parts:
        mine = layer.uqff_sizes[part]
        cut = Slice(0, start if mine == sizes[part] else start + _rank(layer, part) * mine, mine)
        layer.uqff_parts[f"{part:02}"] = LinearPart(source, shape, cut, param)
        start += sizes[part]


def _parts(shard_id: Any, count: int) -> list[int]:
    if shard_id is None:
        return list(range(count))
    return list(shard_id) if isinstance(shard_id, tuple) else [QKV.get(shard_id, shard_id)]
