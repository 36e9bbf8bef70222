"""The model of ``transformers`` that is filled: made on the meta device; all that is asked of that library.

What is relied on, in ``transformers`` from 4.51 on: modules have the names that their weights have in a checkpoint;
attention views its projections as ``[..., heads, head_dim]`` for any number of heads, and repeats keys and values
``num_key_value_groups`` times; rotary embeddings are made by ``type(module)(config=...)``; a Qwen3-MoE layer is
``mlp.gate`` and ``mlp.experts``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from uqff.errors import FormatError, ShapeError, UnsupportedError
from uqff.parallel.heads import compute_n_kv_groups

if TYPE_CHECKING:
    from uqff.parallel.comm import Comm

__all__ = ["build", "materialise", "share_heads"]


def build(directory: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The model that a ``config.json`` describes, on the meta device.

    Args:
        directory: of the configuration.
        dtype: that the model shall claim to have.

    Raises:
        UnsupportedError: ``transformers`` is not installed, or is too old for the architecture.
        FormatError: the configuration is not one.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise UnsupportedError(
            "running a model needs transformers (pip install 'uqff-format[run]')", got=str(error)
        ) from None
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
        setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", dtype)
        with torch.device("meta"):
            model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise FormatError(
            "transformers does not take the configuration",
            file=str(directory / "config.json"),
            got=f"{type(error).__name__}: {error}",
        ) from error
    return model.eval().requires_grad_(False)


def share_heads(model: torch.nn.Module, comm: Comm) -> None:
    """Tell attention how many of this rank's query heads share one of its key and value heads.

    Raises:
        ShardError: heads and ranks do not divide.
    """
    config: Any = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    groups = compute_n_kv_groups(kv_heads, heads, comm)
    for module in model.modules():
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = groups  # type: ignore[assignment]


def materialise(
    model: torch.nn.Module, tensor: Callable[[str], torch.Tensor], device: torch.device, dtype: torch.dtype
) -> None:
    """Give what is left on the meta device its values: parameters of the residual, and rotary frequencies.

    Args:
        model: with all quantised layers in place.
        tensor: finds a tensor of the residual by name, or raises.
        device: where everything goes.
        dtype: of the parameters; frequencies stay float32.

    Raises:
        ShapeError: a tensor does not fit the configuration.
        UnsupportedError: the model holds a buffer that this does not know how to make.
    """
    for path, module in list(model.named_modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                full = f"{path}.{name}"
                setattr(module, name, _parameter(tensor(full), parameter.shape, full, device, dtype))
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            made = _rotary(module, path).to(device)
            parent, _, last = path.rpartition(".")
            setattr(model.get_submodule(parent), last, made)


def _parameter(
    value: torch.Tensor, shape: torch.Size, name: str, device: torch.device, dtype: torch.dtype
) -> torch.nn.Parameter:
    if value.shape != shape:
        raise ShapeError(
            "tensor does not fit the configuration", layer=name, expected=list(shape), got=list(value.shape)
        )
    return torch.nn.Parameter(value.to(device, dtype), requires_grad=False)


def _rotary(module: torch.nn.Module, path: str) -> torch.nn.Module:
    if not hasattr(module, "inv_freq"):
        raise UnsupportedError("model has a buffer that no file stores", layer=path, got=type(module).__name__)
    make: Any = type(module)
    made: torch.nn.Module = make(config=module.config)
    return made
