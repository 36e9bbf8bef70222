"""What llama.cpp's importance matrices call the weights of a model.

======================================  ==============================
module                                  entry
======================================  ==============================
``lm_head``                             ``output.weight``
``model.embed_tokens``                  ``token_embd.weight``
``model.layers.N.self_attn.q_proj``     ``blk.N.attn_q.weight``
``...mlp.down_proj``, ``...mlp.fc2``    ``blk.N.ffn_down.weight``
``...mlp.gate``                         ``blk.N.ffn_gate_inp.weight``
``...mlp.experts.down_proj``            ``blk.N.ffn_down_exps.weight``
``...mlp.shared_experts.down_proj``     ``blk.N.ffn_down_shexp.weight``
======================================  ==============================

:mod:`uqff.gguf.names` has all of them.  Experts are one entry for all, ``[E, in]``, whatever a checkpoint calls them
(``w1``, ``w3``, ``w2``: gate, up, down).  What is one matrix here and several there (:data:`SEVERAL`) has the same
inputs in each.  A module that llama.cpp has no name for is called by its path, as in the engine's own ``.cimatrix``.

Authority: mistral.rs v0.9.2, ``mistralrs-core/src/pipeline/isq.rs`` (``gguf_imatrix_names``); llama.cpp,
``gguf-py/gguf/tensor_mapping.py``.
"""

from __future__ import annotations

import itertools
import re
from typing import Final

from uqff.gguf.names import BLOCK

__all__ = ["EMBEDDING", "HEAD", "entry_name", "entry_names", "expert_of", "module_name"]

HEAD: Final = "lm_head"
EMBEDDING: Final = "model.embed_tokens"
OUTPUT: Final = "output.weight"
TOKENS: Final = "token_embd.weight"

OTHER_NAMES: Final = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}

SEVERAL: Final = {
    "linear_attn.in_proj_qkvz": ("attn_qkv", "attn_gate", "ssm_in"),
    "block_sparse_moe.input_linear": ("ffn_gate_exps", "ffn_up_exps"),
    "block_sparse_moe.output_linear": ("ffn_down_exps",),
    "block_sparse_moe.router": ("ffn_gate_inp",),
    "block_sparse_moe.router.layer": ("ffn_gate_inp",),
    "mlp.experts.gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"),
    "shared_mlp.input_linear": ("ffn_gate_shexp", "ffn_up_shexp", "ffn_gate", "ffn_up"),
    "shared_mlp.output_linear": ("ffn_down_shexp", "ffn_down"),
}
"""Modules that are several matrices in GGUF, have another name in other models, or none of their own."""

_MODULE: Final = re.compile(r"(?:.*\.)?layers\.([0-9]{1,9})\.(.+)", re.DOTALL)
_ENTRY: Final = re.compile(r"blk\.([0-9]{1,9})\.(.+)\.weight", re.DOTALL)
_EXPERT: Final = re.compile(r"(.+)\.(?:experts|switch_mlp)\.(?:[0-9]{1,9}\.)?(.+)", re.DOTALL)
_OWN: Final = re.compile(r"(.*layers\.[0-9]{1,9}\..+)\.weight", re.DOTALL)


def entry_name(module: str) -> str | None:
    """What llama.cpp calls a module's weight; None if it has no name for it. An expert's is that of all experts.

    Args:
        module: its path in the model, without ``.weight``.
    """
    return next(iter(entry_names(module)), None)


def entry_names(module: str) -> tuple[str, ...]:
    """The same of a module that may have several names, or none."""
    for end, entry in ((HEAD, OUTPUT), ("embed_tokens", TOKENS)):
        if module == end or module.endswith(f".{end}"):
            return (entry,)
    match = _MODULE.fullmatch(module)
    if match is None:
        return ()
    block, last = match.groups()
    expert = _EXPERT.fullmatch(last)
    if expert is not None:
        last = f"{expert[1]}.experts.{OTHER_NAMES.get(expert[2], expert[2])}"
    names = SEVERAL.get(last) or ((BLOCK[last],) if last in BLOCK else ())
    return tuple(f"blk.{block}.{name}.weight" for name in names)


def module_name(entry: str) -> str | None:
    """The path of a module by its entry, as Llama and Qwen call their modules; None if the entry is not known."""
    if entry in (OUTPUT, TOKENS):
        return HEAD if entry == OUTPUT else EMBEDDING
    match = _ENTRY.fullmatch(entry)
    if match is None:
        own = _OWN.fullmatch(entry)
        return None if own is None else own[1]
    return None if match[2] not in _PATHS else f"model.layers.{match[1]}.{_PATHS[match[2]]}"


_PATHS: Final = {
    name: path
    for path, name in reversed(BLOCK.items())
    if path.partition(".")[0] in ("self_attn", "mlp", "conv", "linear_attn") and not name.endswith("norm")
}
"""By entry, the first of the paths."""


def expert_of(module: str) -> int | None:
    """The number of an expert in a path: ``...experts.3.up_proj``."""
    parts = module.split(".")
    numbers = (b for a, b in itertools.pairwise(parts) if a == "experts" and b.isascii() and b.isdecimal())
    return next((int(each) for each in numbers if len(each) < 10), None)
