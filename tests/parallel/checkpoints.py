"""Checkpoints of the tiny models: plain ones, in every form that experts have there."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file

from tests.parallel.models import TinyCase, fused_experts, plain_model, single_experts, write_tokenizer
from uqff.quantization.run import quantize_model

Written = Callable[[str], Path]
"""Architecture to a directory."""

Form = Literal["single", "outputs first", "inputs first"]
"""How experts are kept: a tensor each, or one of all, in one convention or the other."""


def written_once(
    has: Callable[[str], bool],
    write: Callable[[str, Path], object],
    folders: pytest.TempPathFactory,
    kind: str,
) -> Written:
    """What gives the directory of an architecture: its checkpoint in `model` and the same in a type in `uqff`.

    Both are written when they are first asked for; a test is skipped if `transformers` has no such architecture.
    """

    @cache
    def make(name: str) -> Path:
        if not has(name):
            pytest.skip("this transformers has no such architecture, or not as it is published (tools.tiny.multimodal)")
        folder = folders.mktemp("written")
        write(name, folder / "model")
        quantize_model(folder / "model", folder / "uqff", [kind], dtype="f32")
        return folder

    return make


def write_checkpoint(
    case: TinyCase, directory: Path, form: Form = "single", **config: Any
) -> tuple[dict[str, torch.Tensor], torch.nn.Module]:
    """Write a plain checkpoint of random weights; of a tied model, with a head that nobody shall use.

    Returns:
        Its tensors, and the model of ``transformers`` with them.
    """
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(case.config() | config))
    write_tokenizer(directory)
    model = plain_model(directory, case.dtype)
    torch.manual_seed(sum(case.name.encode()))
    shapes = single_experts({name: tensor.to("meta") for name, tensor in model.state_dict().items()})
    single = {name: torch.randn(tensor.shape) * 0.08 for name, tensor in shapes.items()}
    single = {name: (each + 1 if "norm" in name else each).to(case.dtype) for name, each in single.items()}
    if case.tied:
        single["lm_head.weight"] = single["model.embed_tokens.weight"]
    state = model.state_dict()
    fused = fused_experts(single) if any(".experts." in name for name in single) else single
    model.load_state_dict(fused if fused.keys() == state.keys() else single)
    tensors = dict(single if form == "single" else fused)
    if form == "inputs first":
        tensors |= {name: each.transpose(1, 2) for name, each in tensors.items() if each.ndim == 3}
    if case.tied:
        tensors["lm_head.weight"] = torch.ones_like(tensors["lm_head.weight"])
    save_file({name: each.contiguous() for name, each in tensors.items()}, directory / "model.safetensors")
    return single, model
