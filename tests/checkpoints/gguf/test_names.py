"""Names of tensors, and the order of the rows of Q and K, against formulas of their own."""

from __future__ import annotations

import re
from typing import Any

import gguf as package
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tools.tiny.gguf import granite_name, known_name
from uqff.checkpoints.gguf.names import (
    ARCHITECTURES,
    architecture_of_config,
    architecture_of_name,
    gguf_name,
    wanted_names,
)
from uqff.errors import ShapeError, UnsupportedError
from uqff.models.layouts import adjacent_order, half_split_order


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a checkpoint as a GGUF file has them."""
    return rows[adjacent_order(len(rows), heads)]


def deinterleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The reverse."""
    return rows[half_split_order(len(rows), heads)]


def test_rows_by_hand() -> None:
    """Two heads of four rows: the halves of each head are dealt out in turn."""
    rows = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13]).view(8, 1)
    assert interleave(rows, 2).flatten().tolist() == [0, 2, 1, 3, 10, 12, 11, 13]
    assert deinterleave(rows, 2).flatten().tolist() == [
        0,
        2,
        1,
        3,
        10,
        12,
        11,
        13,
    ]  # undoes itself
    assert interleave(torch.arange(6), 1).tolist() == [0, 3, 1, 4, 2, 5]
    assert deinterleave(torch.arange(6), 1).tolist() == [0, 2, 4, 1, 3, 5]


@given(st.integers(1, 8), st.integers(1, 16), st.integers(0, 3))
def test_rows_by_index(heads: int, pairs: int, columns: int) -> None:
    """Row ``2j + s`` of a head in ggml is row ``j + s·d/2`` of the model; one way undoes the other."""
    size = 2 * pairs
    rows = torch.arange(heads * size * columns).view(heads * size, columns).to(torch.uint8)
    order = [head * size + j + s * pairs for head in range(heads) for j in range(pairs) for s in (0, 1)]
    assert torch.equal(interleave(rows, heads), rows[order])
    assert torch.equal(deinterleave(interleave(rows, heads), heads), rows)
    assert torch.equal(interleave(deinterleave(rows, heads), heads), rows)


def test_interleaved_rows_turn_neighbours() -> None:
    """What it is for: rotating halves of the model's heads is rotating neighbours of ggml's, and scores are equal."""
    rng = np.random.default_rng(0)
    heads, size, position = 2, 8, 5
    query, hidden = rng.normal(size=(heads * size, 16)), rng.normal(size=16)
    angles = position * 10000.0 ** (-np.arange(0, size, 2) / size)
    turn = np.cos(angles) + 1j * np.sin(angles)
    model = (query @ hidden).reshape(heads, 2, size // 2)
    halves = (model[:, 0] + 1j * model[:, 1]) * turn
    ggml = (interleave(torch.from_numpy(query), heads).numpy() @ hidden).reshape(heads, size // 2, 2)
    neighbours = (ggml[..., 0] + 1j * ggml[..., 1]) * turn
    assert np.array_equal(halves, neighbours)


@pytest.mark.parametrize(("rows", "heads"), [(6, 2), (8, 3), (3, 1), (8, 0)])
def test_rows_that_are_no_heads(rows: int, heads: int) -> None:
    for function in (interleave, deinterleave):
        with pytest.raises(ShapeError, match="rows are not whole heads"):
            function(torch.zeros(rows, 1), heads)


def parts_of(name: str, *, experts: bool, apart: bool) -> list[str]:
    """What llama.cpp's converter calls a tensor when it looks for its name, or the parts that it cuts it into."""
    name = name.replace(".switch_mlp.", ".experts.")
    if name.endswith(".sinks"):
        return [f"{name}.weight"]
    if name.endswith("_bias") and ".experts." in name:
        name = f"{name.removesuffix('_bias')}.bias"
    if "_linear." in name:  # Granite
        parts = ("gate_proj", "up_proj") if "input_linear" in name else ("down_proj",)
        return [granite_name(name, each, experts) for each in parts]
    if name.endswith(".dt_bias"):
        return [name.replace(".dt_bias", ".dt_proj.bias")]
    if name.endswith((".A_log", ".D")):
        return [name]
    if "in_proj_qkvz" in name:
        return [name.replace("in_proj_qkvz", each) for each in ("in_proj_qkv", "in_proj_z")]
    if "in_proj_ba" in name and apart:
        return [name.replace("in_proj_ba", each) for each in ("in_proj_b", "in_proj_a")]
    joined = "experts.gate_up_proj."
    return [name.replace(joined, f"experts.{each}_proj.") for each in ("gate", "up")] if joined in name else [name]


def test_names_are_those_of_the_gguf_package() -> None:
    """Of every tensor of each architecture: the package's table for it gives the same name, each its own."""
    kinds = {name: kind for kind, name in package.MODEL_ARCH_NAMES.items()}
    w123 = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    config: dict[str, Any] = {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_dense_layers": 1,
        "n_shared_experts": 1,
        "q_lora_rank": 8,
    }
    config |= {"layer_types": ["conv", "full_attention", "full_attention"]}
    for architecture in ARCHITECTURES:
        table = package.get_tensor_name_map(kinds[architecture.name], 3)
        experts = {architecture.expert_count: 2} if architecture.expert_count else {}
        own = {**config, **architecture.fixed, **experts, "architectures": [architecture.classes[0]]}
        if architecture.kinds:
            own["layer_types"] = [architecture.kinds[each != "conv"] for each in own["layer_types"]][::-1]
        else:
            del own["layer_types"]
        named = list(wanted_names(architecture, own))
        assert architecture.headless == (table.get_name("lm_head") is None)
        for name, stored, _ in named:
            parts = parts_of(name, experts=bool(experts), apart=len(stored) > 1)
            for theirs, each in zip(parts, stored, strict=True):
                theirs = known_name(theirs)
                if ".experts." in theirs and ".mlp." not in theirs:
                    theirs = re.sub(r"(gate|up|down)_proj", lambda match: w123[match[0]], theirs)
                assert each == table.get_name(theirs, (".weight", ".bias")), name
        assert len({each for _, stored, _ in named for each in stored}) == sum(len(each[1]) for each in named) > 20
    assert gguf_name("model.layers.0.mlp.gates") is None
    assert gguf_name("model.rotary_emb") is None


def test_architectures() -> None:
    """Mistral is llama in GGUF; what is not known is refused with what is."""
    assert [architecture_of_name(name).interleaved for name in ("llama", "qwen2", "qwen3")] == [True, False, False]
    assert architecture_of_config({"architectures": ["MistralForCausalLM"]}).name == "llama"
    for name in ("gemma3n", None, 3):
        with pytest.raises(
            UnsupportedError,
            match="expected one of llama, mistral3, qwen2, qwen2vl, qwen3, qwen3vl, qwen3moe, qwen3vlmoe, smollm3",
        ):
            architecture_of_name(name)
    with pytest.raises(UnsupportedError, match=r"architecture that is not converted: .*got Qwen3VLForConditional"):
        architecture_of_config({"architectures": ["Qwen3VLForConditionalGeneration"]})
    with pytest.raises(UnsupportedError, match="unknown architecture"):
        architecture_of_config({})
    for gating, first in ((2, "DeepseekV3ForCausalLM"), (1, "DeepseekV2ForCausalLM"), (None, "DeepseekV2ForCausalLM")):
        assert architecture_of_name("deepseek2", experts=True, gating=gating).classes[0] == first
    qwen = {"architectures": ["Qwen3NextForCausalLM"]}
    assert [architecture_of_config(qwen, name).name for name in (None, "qwen35moe")] == ["qwen3next", "qwen35moe"]
    assert [architecture_of_name("qwen35moe", experts=True).classes, architecture_of_name("qwen35").classes] == [
        ("Qwen3NextForCausalLM",),
        ("Qwen3_5ForCausalLM",),
    ]
    granite = {"architectures": ["GraniteMoeHybridForCausalLM"], "num_hidden_layers": 2}
    assert architecture_of_config(granite).name == "granite"
    assert architecture_of_config(granite | {"num_local_experts": 4}).name == "granitemoe"
    hybrid = granite | {"layer_types": ["mamba", "attention"]}
    for own, experts in ((hybrid, False), (hybrid | {"num_local_experts": 4}, True)):
        found = architecture_of_config(own)
        assert (found.name, bool(found.expert_count)) == ("granitehybrid", experts)
        assert architecture_of_name("granitehybrid", experts=experts) is found
