"""The latent attention of DeepSeek in GGUF: one matrix of a model in two tensors, half of it transposed.

::

    model     kv_b_proj [heads * (nope + v), rank]      of each head nope rows of keys, then v rows of values
    GGUF      attn_kv_b                                  the same: files of before April 2025, and of blocks made here
              attn_k_b [heads, rank, nope]               keys, transposed
              attn_v_b [heads, v, rank]                  values

Blocks run along a row, so that those of ``attn_k_b`` run across the rows of the model: plain numbers are put together
exactly, blocks only as numbers, to be quantised anew.

Authority: llama.cpp, ``conversion/deepseek.py`` (``DeepseekV2Model.modify_tensors``), ``src/models/deepseek2.cpp``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from uqff.checkpoints.gguf.blocks import unpacked_record
from uqff.codes import DType
from uqff.families.gguf.blocks import block_type_of_kind
from uqff.families.gguf.tensor import GGUF
from uqff.families.part import Part
from uqff.gguf.reader import GgufTensor

__all__ = ["WHOLE", "apart", "is_plain", "latent_names", "latent_record", "latent_shapes", "planned_latent"]

WHOLE: Final = "attn_kv_b"

_Words = TypeVar("_Words", bound=np.generic)


def latent_names(stored: str) -> tuple[str, str]:
    """The two tensors that stand for one of a name, ``blk.N.attn_kv_b.weight``."""
    return stored.replace(WHOLE, "attn_k_b"), stored.replace(WHOLE, "attn_v_b")


def latent_shapes(config: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Their shapes."""
    heads, rank = config["num_attention_heads"], config["kv_lora_rank"]
    return (heads, rank, config["qk_nope_head_dim"]), (heads, config["v_head_dim"], rank)


def is_plain(tensors: Sequence[GgufTensor]) -> bool:
    """Whether both are plain numbers of one type, so that no number changes."""
    first = tensors[0].block_type
    return first is not None and first.block_size == 1 and all(each.block_type is first for each in tensors)


def latent_record(tensors: Sequence[GgufTensor]) -> GGUF:
    """The matrix of a model: of plain numbers in their own type, of blocks in F32."""
    if is_plain(tensors):
        block_type = tensors[0].block_type
        assert block_type is not None
        words = [_words(tensor, block_type.type_size) for tensor in tensors]
        return GGUF.made_of(data=_rows(_together(*words)), block_type=block_type)
    numbers = [tensor.float32().reshape(tensor.shape) for tensor in tensors]
    return GGUF.made_of(data=_rows(_together(*numbers)), block_type=block_type_of_kind("f32"))


def planned_latent(tensors: Sequence[GgufTensor], shape: tuple[int, ...]) -> GGUF:
    """What :func:`latent_record` gives, without its bytes."""
    block_type = tensors[0].block_type if is_plain(tensors) else block_type_of_kind("f32")
    assert block_type is not None
    planned = Part.planned((shape[0], shape[1] * block_type.type_size), DType.U8)
    return GGUF.made_of(data=planned, block_type=block_type)


def apart(data: Part, size: int, config: Mapping[str, Any]) -> tuple[Part, Part]:
    """The rows of a matrix of plain numbers of ``size`` bytes as the two tensors, U8 ``[..., row]``; new memory."""
    (heads, rank, nope), (_, value, _) = latent_shapes(config)
    words = data.array().reshape(-1).view(f"<u{size}").reshape(heads, nope + value, rank)
    return _rows(words[:, :nope].swapaxes(1, 2)), _rows(words[:, nope:])


def _words(tensor: GgufTensor, size: int) -> npt.NDArray[Any]:
    data = unpacked_record(tensor).parts["data"].array()
    return np.ascontiguousarray(data).reshape(-1).view(f"<u{size}").reshape(tensor.shape)


def _together(keys: npt.NDArray[_Words], values: npt.NDArray[_Words]) -> npt.NDArray[_Words]:
    whole = np.concatenate((keys.swapaxes(1, 2), values), axis=1)
    return whole.reshape(-1, whole.shape[-1])


def _rows(words: npt.NDArray[Any]) -> Part:
    made = np.ascontiguousarray(words)
    data = made.reshape(-1).view(np.uint8)
    return Part(DType.U8, (*made.shape[:-1], made.shape[-1] * made.itemsize), data.data)
