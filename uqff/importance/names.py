"""What llama.cpp's importance matrices call the weights of a model.

======================================  ==============================
module                                  entry
======================================  ==============================
``lm_head``                             ``output.weight``
``model.layers.N.self_attn.q_proj``     ``blk.N.attn_q.weight``
``...mlp.down_proj``                    ``blk.N.ffn_down.weight``
``...mlp.gate``                         ``blk.N.ffn_gate_inp.weight``
``...mlp.experts.down_proj``            ``blk.N.ffn_down_exps.weight``
======================================  ==============================

Experts are one entry for all, ``[E, in]``, whatever a checkpoint calls them (``w1``, ``w3``, ``w2``: gate, up, down).
The engine's own ``.cimatrix`` has the module's path.

Authority: mistral.rs v0.9.2, ``mistralrs-core/src/pipeline/isq.rs`` (``gguf_imatrix_names``); llama.cpp,
``gguf-py/gguf/tensor_mapping.py``.
"""

from __future__ import annotations

import itertools
import re
from typing import Final

__all__ = ["HEAD", "entry_name", "expert_of", "module_name"]

HEAD: Final = "lm_head"
OUTPUT: Final = "output.weight"

ATTENTION: Final = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "o_proj": "attn_output",
}
PROJECTIONS: Final = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
OTHER_NAMES: Final = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

_MODULE: Final = re.compile(r"(?:.*\.)?layers\.([0-9]{1,9})\.(?:(?:self_attn|mlp|block_sparse_moe|feed_forward)\.)(.+)")
_ENTRY: Final = re.compile(r"blk\.([0-9]{1,9})\.(.+)\.weight")
_EXPERT: Final = re.compile(r"(?:experts|switch_mlp)\.(?:[0-9]{1,9}\.)?(.+)")


def entry_name(module: str) -> str | None:
    """What llama.cpp calls a module's weight; None if it has no name for it. An expert's is that of all experts.

    Args:
        module: its path in the model, without ``.weight``.
    """
    if module == HEAD or module.endswith(f".{HEAD}"):
        return OUTPUT
    match = _MODULE.fullmatch(module)
    if match is None:
        return None
    block, last = match.groups()
    expert = _EXPERT.fullmatch(last)
    if expert is not None:
        name = PROJECTIONS.get(OTHER_NAMES.get(expert[1], expert[1]))
        return None if name is None else f"blk.{block}.{name}_exps.weight"
    name = "ffn_gate_inp" if last == "gate" else ATTENTION.get(last) or PROJECTIONS.get(last)
    return None if name is None else f"blk.{block}.{name}.weight"


def module_name(entry: str) -> str | None:
    """The path of a module by its entry, as Llama and Qwen call their modules; None if the entry is not known."""
    if entry == OUTPUT:
        return HEAD
    match = _ENTRY.fullmatch(entry)
    return None if match is None or match[2] not in _PATHS else f"model.layers.{match[1]}.{_PATHS[match[2]]}"


_PATHS: Final = {
    **{entry: f"self_attn.{name}" for name, entry in ATTENTION.items()},
    **{entry: f"mlp.{name}" for name, entry in PROJECTIONS.items()},
    **{f"{entry}_exps": f"mlp.experts.{name}" for name, entry in PROJECTIONS.items()},
    "ffn_gate_inp": "mlp.gate",
}


def expert_of(module: str) -> int | None:
    """The number of an expert in a path: ``...experts.3.up_proj``."""
    parts = module.split(".")
    return next((int(b) for a, b in itertools.pairwise(parts) if a == "experts" and b.isdecimal()), None)
