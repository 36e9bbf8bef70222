"""The model of ``transformers`` that is filled: made on the meta device; all that is asked of that library.

What is relied on, in ``transformers`` from 4.51 on: modules have the names that their weights have in a checkpoint;
attention views its projections as ``[..., heads, head_dim]`` for any number of heads, and repeats keys and values
``num_key_value_groups`` times; rotary embeddings are made by ``type(module)(config=...)``; a layer with experts is one
with ``experts`` and ``gate`` (Qwen3-MoE) or ``router`` (gpt-oss, from 4.55 on).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from uqff.errors import FormatError, ShapeError, UnsupportedError
from uqff.models.architectures import architecture_of
from uqff.parallel.gpt_oss import ClampedSwiGLU, GptOssBlock
from uqff.parallel.heads import compute_n_kv_groups
from uqff.parallel.plan import EMBEDDING, HEAD, ROLES

if TYPE_CHECKING:
    from uqff.parallel.comm import Comm
    from uqff.parallel.mixture import Activation, Mixture
    from uqff.parallel.plan import Role

__all__ = [
    "MODEL_TYPES",
    "VALUES",
    "ExpertSizes",
    "SparseBlock",
    "activation",
    "build",
    "known_values",
    "linear_roles",
    "materialise",
    "model_type",
    "places",
    "router_of",
    "share_heads",
    "sparse_block",
    "sparse_blocks",
    "takes_turns",
]


MODEL_TYPES: Final = {
    "Llama": "llama",
    "Mistral": "mistral",
    "Qwen2": "qwen2",
    "Qwen3": "qwen3",
    "Qwen3-MoE": "qwen3_moe",
    "gpt-oss": "gpt_oss",
}
"""What ``transformers`` calls the architectures that can be run, by their titles."""

GPT_OSS: Final = MODEL_TYPES["gpt-oss"]

VALUES: Final = (
    # sizes
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    # arithmetic
    "hidden_act",
    "rms_norm_eps",
    "attention_bias",
    "mlp_bias",
    # positions
    "max_position_embeddings",
    "original_max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    # experts
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "decoder_sparse_step",
    "mlp_only_layers",
    "norm_topk_prob",
    "swiglu_alpha",
    "swiglu_limit",
    # tokens, for whoever calls ``generate`` of the model
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""The keys of a ``config.json`` that say how an architecture computes.  A model directory comes from anywhere: what
makes ``transformers`` load code (``auto_map``, ``attn_implementation``), quantise, or return something else stays here.
"""


def model_type(values: Mapping[str, Any]) -> str:
    """What ``transformers`` calls the architecture of a ``config.json``.

    Raises:
        UnsupportedError: it is not one of :data:`MODEL_TYPES`.
    """
    title = architecture_of(values).title
    if title not in MODEL_TYPES:
        raise UnsupportedError("architecture cannot be run", expected=f"one of {', '.join(MODEL_TYPES)}", got=title)
    return MODEL_TYPES[title]


def known_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """What ``transformers`` is told of a ``config.json``: :data:`VALUES`, whatever else there is."""
    return {name: values[name] for name in VALUES if name in values}


def build(values: Mapping[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    """The model that a ``config.json`` describes, on the meta device.

    Args:
        values: the configuration; its ``architectures`` decide, whatever it says of a ``model_type``.
        dtype: that the model shall claim to have.

    Raises:
        UnsupportedError: see :func:`model_type`; ``transformers`` is not installed, or is too old for it.
        FormatError: the configuration is not one.
    """
    kind = model_type(values)
    try:
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    except ImportError as error:
        raise UnsupportedError(
            "running a model needs transformers (pip install 'uqff-format[run]')", got=str(error)
        ) from None
    if kind not in CONFIG_MAPPING:
        raise UnsupportedError("this transformers does not know the architecture", expected="a newer one", got=kind)
    try:
        config = CONFIG_MAPPING[kind].from_dict(known_values(values) | {"model_type": kind})
        setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", dtype)
        with torch.device("meta"):
            model: torch.nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise FormatError(
            "transformers does not take the configuration",
            field="config",
            got=f"{type(error).__name__}: {error}",
        ) from error
    return model.eval().requires_grad_(False)


def activation(config: Any) -> Activation:
    """The activation function of experts that a configuration means."""
    if config.model_type == GPT_OSS:
        return ClampedSwiGLU.of(config)
    from transformers.activations import ACT2FN

    act: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[config.hidden_act]
    return act


def sparse_blocks(model: torch.nn.Module) -> list[str]:
    """Paths of the feed-forward layers that have experts."""
    return [
        path
        for path, module in model.named_modules()
        if hasattr(module, "experts") and (hasattr(module, "gate") or hasattr(module, "router"))
    ]


def router_of(model: torch.nn.Module, block: str) -> str:
    """The name of the router in a feed-forward layer with experts."""
    return "gate" if hasattr(model.get_submodule(block), "gate") else "router"


def takes_turns(config: Any) -> bool:
    """Whether gates and ups take turns in the stacks of a model's experts."""
    return bool(config.model_type == GPT_OSS)


class ExpertSizes(NamedTuple):
    """The sizes of the experts of a model.

    Attributes:
        experts: how many there are in a layer.
        inner: outputs of a gate.
        hidden: its inputs.
    """

    experts: int
    inner: int
    hidden: int

    @classmethod
    def of(cls, config: Any) -> ExpertSizes:
        """Those that a configuration of ``transformers`` says."""
        if config.model_type == GPT_OSS:
            return cls(config.num_local_experts, config.intermediate_size, config.hidden_size)
        return cls(config.num_experts, config.moe_intermediate_size, config.hidden_size)


def sparse_block(config: Any, experts: Mixture) -> torch.nn.Module:
    """The feed-forward layer of a model with experts in it."""
    return GptOssBlock(config, experts) if config.model_type == GPT_OSS else SparseBlock(config, experts)


def linear_roles(model: torch.nn.Module) -> dict[str, Role]:
    """Paths of the linear layers that become parallel ones, and how: not of those that belong to experts."""
    of_experts = tuple(f"{path}.experts." for path in sparse_blocks(model))  # layers of their own before transformers 5
    roles: dict[str, Role] = {}
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if name in ROLES and isinstance(module, torch.nn.Linear) and not path.startswith(of_experts):
            roles[path] = ROLES[name]
    return roles


def places(model: torch.nn.Module) -> list[str]:
    """Paths of all modules that are filled with layers of a source: none is within another."""
    return [*sparse_blocks(model), *linear_roles(model), EMBEDDING, HEAD]


class SparseBlock(torch.nn.Module):
    """The feed-forward layer of Qwen3-MoE: a router, whole on every rank, and experts.

    It stands in for the block of ``transformers``, whose form changes from version to version.  The router's
    probabilities are float32; those of the chosen experts are scaled to add up to 1 if the configuration says so.

    Authority: transformers, ``models/qwen3_moe/modeling_qwen3_moe.py`` (``Qwen3MoeSparseMoeBlock``).
    """

    def __init__(self, config: Any, experts: Mixture) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(config.hidden_size, config.num_experts, bias=False, device="meta")
        self.experts = experts
        self.top_k: int = config.num_experts_per_tok
        self.norm_topk_prob: bool = config.norm_topk_prob

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[..., hidden]`` to the same."""
        probabilities = self.gate(hidden_states).softmax(-1, dtype=torch.float32)
        weights, indices = probabilities.topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        y: torch.Tensor = self.experts(hidden_states, indices, weights.to(hidden_states.dtype))
        return y


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
