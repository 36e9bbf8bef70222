"""The model of ``transformers`` that is filled: made on the meta device; all that is asked of that library.

What is relied on, in ``transformers`` from 4.51 on: modules have the names that their weights have in a checkpoint;
attention views its projections as ``[..., heads, head_dim]`` for any number of heads, and repeats keys and values
``num_key_value_groups`` times; rotary embeddings are made by ``type(module)(config=...)``; from 5 on, what is called
``experts`` takes hidden states, indices and weights, and gives their sum; ``base_model_tp_plan`` of a configuration
says which linear layers can be split; a Qwen3-MoE layer is one with ``experts`` and ``gate``, one of gpt-oss, from 4.55
on, with ``experts`` and ``router``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from uqff.errors import FormatError, ShapeError, UnsupportedError
from uqff.models.architectures import is_tied_model, text_values
from uqff.models.config import numbers_of
from uqff.models.multimodal import MULTIMODAL
from uqff.models.table import architecture_of
from uqff.models.text import TEXT
from uqff.parallel.gpt_oss import ClampedSwiGLU, GptOssBlock
from uqff.parallel.heads import compute_n_kv_groups
from uqff.parallel.plan import EMBEDDING, HEAD, Heads, fitting, roles_of
from uqff.parallel.unstored import constants_of

if TYPE_CHECKING:
    from uqff.parallel.comm import Comm
    from uqff.parallel.mixture import Activation, Mixture
    from uqff.parallel.plan import Role

__all__ = [
    "VALUES",
    "ExpertsPlace",
    "SparseBlock",
    "after_embedding",
    "build",
    "expert_places",
    "known_values",
    "linear_roles",
    "materialise",
    "model_type",
    "places",
    "router_of",
    "routers",
    "share_heads",
    "sparse_block",
    "takes_turns",
]


GPT_OSS: Final = "gpt_oss"

BY_BLOCK: Final = ("qwen3_moe", GPT_OSS)
"""The architectures whose blocks are replaced with their routers, whatever their form."""

PLANS: Final = {GPT_OSS: {f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"}}
PLANS[GPT_OSS]["layers.*.self_attn.o_proj"] = "rowwise"
"""Plans of architectures of which ``transformers`` splits what is shared otherwise here, or nothing."""

SCALED: Final = {"mistral": "ministral3"}
"""Kinds of ``transformers``, and those that are the same but for queries scaled by their places: the engine scales them
wherever ``rope_parameters`` say by how much, whatever ``model_type`` says.

Authority: mistral.rs v0.9.2, ``mistralrs-core/src/models/mistral.rs`` (``attention_temperature``).
"""

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
    "layers_block_type",
    "full_attention_interval",
    # by names that newer releases read and do not write
    "block_ff_dim",
    "first_k_dense_replace",
    "global_head_dim",
    "num_global_key_value_heads",
    "rope_local_base_freq",
    "sliding_window_pattern",
    "output_gate_type",
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
        UnsupportedError: it is unknown, to this package or to the installed release; or has no language model by itself
            there; or there is no ``transformers``.
    """
    architecture = architecture_of(values)
    causal: Mapping[str, str] = _transformers().models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if architecture.runs_as:
        stated = text_values(values).get("model_type")
        kind = str(stated) if stated in architecture.runs_as else architecture.runs_as[0]
        kinds = [kind] if kind in causal else []
    else:
        kinds = [kind for kind, name in causal.items() if name in architecture.classes and architecture in TEXT]
    rope = text_values(values).get("rope_parameters")
    if isinstance(rope, Mapping) and rope.get("llama_4_scaling_beta") is not None:
        kinds = [kind for kind in (SCALED.get(kind, kind) for kind in kinds) if kind in causal]
    if not kinds:
        known = {each.title: set(each.classes) for each in TEXT}
        here = [title for title, classes in known.items() if classes & set(causal.values())]
        here += [each.title for each in MULTIMODAL if causal.keys() & set(each.runs_as)]
        raise UnsupportedError(
            "architecture cannot be run", expected=f"one of {', '.join(here)}", got=architecture.title
        )
    stated = values.get("model_type")
    if stated in kinds:
        return str(stated)
    # Several kinds may share a class: the one of text alone, else the one whose name the class has.
    words = causal[kinds[0]].lower()
    return max(kinds, key=lambda kind: (kind.endswith("_text"), words.startswith(kind.replace("_", ""))))


def _transformers() -> Any:
    try:
        import transformers
        import transformers.models.auto.modeling_auto
    except ImportError as error:
        raise UnsupportedError(
            "running a model needs transformers (pip install 'uqff-format[run]')", got=str(error)
        ) from None
    return transformers


def known_values(values: Mapping[str, Any], kind: str | None = None) -> dict[str, Any]:
    """What ``transformers`` is told of a ``config.json``: :data:`VALUES`, whatever else there is.

    Args:
        values: the configuration.
        kind: the architecture, whose own numbers are told, too.
    """
    known = {*VALUES, *(() if kind is None else _own_values(kind))}
    return {name: numbers_of(value) for name, value in values.items() if name in known}


def _own_values(kind: str) -> set[str]:
    """The keys that the configurations of an architecture have and others have not: none of these loads code."""
    library = _transformers()
    made = _config_class(kind)
    common = library.PretrainedConfig().to_dict()
    own = {name for name in made().to_dict() if name not in common and not name.startswith(("_", "output_"))}
    return own | set(made.attribute_map)


def _config_class(kind: str) -> Any:
    """The configuration of an architecture's language model, which may stand within a larger one (Llama 3.2 Vision)."""
    made = _transformers().CONFIG_MAPPING[kind]
    return getattr(made, "sub_configs", {}).get("text_config", made)


def _told(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a ``config.json`` that describes the language model, as if there was nothing else.

    Positions of text alone are the same along each of the axes that multimodal rotary embeddings have.
    """
    if not architecture_of(values).runs_as:
        return values
    told = {**text_values(values), "tie_word_embeddings": is_tied_model(values)}
    scaling = told.get("rope_scaling")
    if isinstance(scaling, dict) and "mrope_section" in scaling:
        del told["rope_scaling"]
    return told


def build(values: Mapping[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    """The model that a ``config.json`` describes, on the meta device; of one with towers, its language model alone.

    Args:
        values: the configuration; its ``architectures`` decide, whatever it says of a ``model_type``.
        dtype: that the model shall claim to have.

    Raises:
        UnsupportedError: see :func:`model_type`.
        FormatError: the configuration is not one.
    """
    kind, library = model_type(values), _transformers()
    try:
        made = _config_class(kind)
        within = made is not library.CONFIG_MAPPING[kind]
        config = made.from_dict(known_values(_told(values), kind) | {"model_type": made.model_type if within else kind})
        setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", dtype)
        with torch.device("meta"):
            model: torch.nn.Module
            if within:
                causal = library.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
                model = getattr(library, causal)(config)
            else:
                model = library.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise FormatError(
            "transformers does not take the configuration",
            field="config",
            got=f"{type(error).__name__}: {error}",
        ) from error
    return model.eval().requires_grad_(False)


def after_embedding(module: torch.nn.Module) -> tuple[float | None, torch.nn.Module | None]:
    """What the rows of a model's embedding are multiplied by, and what normalises them; None is nothing.

    Raises:
        UnsupportedError: something else is done with them.
    """
    scale: float | None = getattr(module, "scalar_embed_scale", None)
    norm: torch.nn.Module | None = getattr(module, "embed_norm", None)
    if type(module).forward is not torch.nn.Embedding.forward and (scale is None) == (norm is None):
        raise UnsupportedError(
            "embedding of this form cannot be run",
            layer=EMBEDDING,
            expected="rows, scaled or normalised at most",
            got=type(module).__name__,
        )
    return scale, norm


class ExpertsPlace(NamedTuple):
    """Where a model has experts.

    Attributes:
        path: of the module that is replaced: the experts, or the block that they are in.
        experts: path of the experts.
        number: how many there are.
        inner: outputs of gate and up.
        hidden: their inputs.
        act: the activation function.
    """

    path: str
    experts: str
    number: int
    inner: int
    hidden: int
    act: Activation

    @property
    def with_router(self) -> bool:
        """Whether the block is replaced, by what :func:`sparse_block` gives."""
        return self.path != self.experts


def expert_places(model: torch.nn.Module) -> list[ExpertsPlace]:
    """All experts of a model, in order.

    Raises:
        UnsupportedError: they are of a form that is not known here: before ``transformers`` 5, of another architecture
            than Qwen3-MoE and gpt-oss.
    """
    config: Any = model.config
    places = []
    for path, block in model.named_modules():
        # Of Granite 4, transformers 4 has a module for each projection of all experts.
        is_stack = hasattr(block, "num_experts") and getattr(getattr(block, "weight", None), "ndim", 0) == 3
        experts = block if is_stack else getattr(block, "experts", None)
        if not isinstance(experts, torch.nn.Module):
            continue
        if config.model_type in BY_BLOCK:
            of_gpt = config.model_type == GPT_OSS
            count = config.num_local_experts if of_gpt else config.num_experts
            inner = config.intermediate_size if of_gpt else config.moe_intermediate_size
            act = _activation(config)
            places.append(ExpertsPlace(path, f"{path}.experts", count, inner, config.hidden_size, act))
            continue
        gate_up, down = (getattr(experts, name, None) for name in ("gate_up_proj", "down_proj"))
        if gate_up is not None and down is not None and _takes_all(experts, gate_up, down):
            count, inner, hidden = down.shape
        elif gate_up is not None and down is not None and gate_up.shape[1:] == (2 * down.shape[2], down.shape[1]):
            count, hidden, inner = down.shape
        else:
            raise UnsupportedError(
                "experts of this form cannot be run",
                layer=path if is_stack else f"{path}.experts",
                expected="transformers 5, and gate_up_proj [E, 2·inner, hidden] beside down_proj [E, hidden, inner]",
                got=type(experts).__name__,
            )
        own: Any = experts.act_fn
        places.append(ExpertsPlace(f"{path}.experts", f"{path}.experts", count, inner, hidden, own))
    return places


def _takes_all(experts: torch.nn.Module, gate_up: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether experts are those of Llama 4: inputs first, and called with rows for each of them, one after another."""
    asked = inspect.signature(type(experts).forward).parameters
    return gate_up.shape[1:] == (down.shape[2], 2 * down.shape[1]) and list(asked) == ["self", "hidden_states"]


def _block(place: ExpertsPlace) -> str:
    """Path of the feed-forward layer that experts are in."""
    return place.experts.rpartition(".")[0]


def _activation(config: Any) -> Activation:
    if config.model_type == GPT_OSS:
        return ClampedSwiGLU.of(config)
    from transformers.activations import ACT2FN

    act: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[config.hidden_act]
    return act


def router_of(model: torch.nn.Module, block: str) -> str:
    """The name of the router in a feed-forward layer with experts."""
    return "gate" if hasattr(model.get_submodule(block), "gate") else "router"


def takes_turns(config: Any) -> bool:
    """Whether gates and ups take turns in the stacks of a model's experts."""
    return bool(config.model_type == GPT_OSS)


def sparse_block(config: Any, experts: Mixture) -> torch.nn.Module:
    """The feed-forward layer of a model with experts in it."""
    return GptOssBlock(config, experts) if config.model_type == GPT_OSS else SparseBlock(config, experts)


def _plan(config: Any) -> Mapping[str, str]:
    """Styles of linear layers by their paths, of a configuration or its class."""
    plan: Mapping[str, str] | None = getattr(config, "base_model_tp_plan", None)
    return PLANS.get(config.model_type) or plan or {}


def linear_roles(model: torch.nn.Module, ranks: int = 1) -> dict[str, Role]:
    """Paths of the linear layers but for the head, and how ranks share them: not of those that belong to experts."""
    whole: Any = model
    found = expert_places(model)
    replaced = tuple(f"{place.path}." for place in found) + tuple(f"{_block(place)}.gate." for place in found)
    prefix = f"{whole.base_model_prefix}."
    paths = {
        path: path.removeprefix(prefix)
        for path, module in model.named_modules()
        if _is_linear(module) and path != HEAD and not path.startswith(replaced)
    }
    roles = roles_of(_plan(whole.config), paths.values())
    named = {path: roles[planned] for path, planned in paths.items()}
    shapes = {path: tuple(model.get_parameter(f"{path}.weight").shape) for path in named}
    return fitting(named, shapes, _heads(whole.config), ranks)


def _is_linear(module: torch.nn.Module) -> bool:
    """Whether a module multiplies and adds its bias, and nothing else."""
    return isinstance(module, torch.nn.Linear) and type(module).forward is torch.nn.Linear.forward


def _heads(config: Any) -> Heads:
    query: int = config.num_attention_heads
    try:
        return Heads(query, getattr(config, "num_key_value_heads", None) or query)
    except RuntimeError:  # layers have different numbers, of which ranks share none
        return Heads(1, 1)


def routers(model: torch.nn.Module) -> list[str]:
    """Paths of modules that have a matrix for a weight and are neither linear layers nor the vocabulary."""
    taken = {*(place.path for place in expert_places(model)), *linear_roles(model), EMBEDDING, HEAD}
    return [
        path
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name == "weight" and parameter.ndim == 2 and path not in taken
    ]


def places(model: torch.nn.Module) -> list[str]:
    """Paths of all modules that are filled with layers of a source: none is within another."""
    found = expert_places(model)
    inside = tuple(f"{place.path}." for place in found)
    apart = [path for path in routers(model) if not path.startswith(inside)]
    return [*(place.path for place in found), *linear_roles(model), *apart, EMBEDDING, HEAD]


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
    """Tell attention how many of this rank's query heads share one of its key and value heads, if ranks share them."""
    if comm.world_size == 1 or "key-value" not in linear_roles(model, comm.world_size).values():
        return
    heads = _heads(model.config)
    groups = compute_n_kv_groups(heads.pairs, heads.query, comm)
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
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta and name not in module._non_persistent_buffers_set:
                full = f"{path}.{name}"
                setattr(module, name, _parameter(tensor(full), buffer.shape, full, device, buffer.dtype).data)
        for name, number in constants_of(module).items():
            setattr(module, name, torch.tensor(number, device=device))
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
    if not any(name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)):
        raise UnsupportedError("model has a buffer that no file stores", layer=path, got=type(module).__name__)
    make: Any = type(module)
    made: torch.nn.Module = make(config=module.config)
    return made
