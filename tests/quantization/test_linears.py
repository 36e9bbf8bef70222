"""Which weights are those of linear layers: of architectures that are not declared, under other names, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import uqff
from tools.tiny import multimodal
from uqff.errors import FormatError, UnsupportedError
from uqff.quantization.linears import linear_weights
from uqff.quantization.run import quantize_model

NEOX = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}
NEOX_LAYERS = sorted(
    [
        "embed_out",
        *(
            f"gpt_neox.layers.{layer}.{path}"
            for layer in range(2)
            for path in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
        ),
    ]
)


def test_an_architecture_that_is_not_declared(tmp_path: Path) -> None:
    """The embedding has the shape of the head, and is none of the linear layers; biases come along."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(**{name: value for name, value in NEOX.items() if name != "architectures"})
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(NEOX))
    with pytest.raises(UnsupportedError, match="unknown architecture"):
        quantize_model(tmp_path / "model", tmp_path / "out", ["q8_0"])
    quantize_model(tmp_path / "model", tmp_path / "out", ["q8_0"], layers="auto")
    with uqff.open(tmp_path / "out") as made:
        assert list(made) == NEOX_LAYERS
        assert made["gpt_neox.layers.0.attention.dense"].bias is not None
        assert "gpt_neox.embed_in.weight" in made.residual


def test_names_of_checkpoints_that_transformers_changes(tmp_path: Path) -> None:
    """LLaVA has other paths in checkpoints than in transformers 5: the projector is linear, and no convolution is."""
    multimodal.write("LLaVA", tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "np") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    found = linear_weights(json.loads((tmp_path / "config.json").read_text()), shapes)
    wanted = {
        name
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and "embed" not in name.rpartition("layers")[2]
    }
    assert found.names == wanted
    assert {"multi_modal_projector.linear_1.weight", "language_model.lm_head.weight"} < found.names
    assert not any("embed_tokens" in name or "position_embedding" in name for name in found.names)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"architectures": ["Unheard"]}, UnsupportedError, "transformers has no such architecture"),
        ({"architectures": ["os"]}, UnsupportedError, "transformers has no such architecture"),
        ({"architectures": None}, UnsupportedError, "got none"),
        ({"model_type": "unheard"}, UnsupportedError, "transformers has no such architecture"),
        ({"num_hidden_layers": 10**9}, FormatError, "config.num_hidden_layers"),
        ({"hidden_size": "a"}, FormatError, "transformers does not take the configuration"),
    ],
)
def test_configurations_that_make_no_model(changes: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        linear_weights(NEOX | changes, {})


def test_nothing_that_loads_code_is_told() -> None:
    """What names code, a quantiser or attention is left out: the model is made all the same."""
    more = {
        "auto_map": {"AutoModel": "x--y.Z"},
        "quantization_config": {"quant_method": "x"},
        "_attn_implementation": "x",
    }
    assert linear_weights(NEOX | more, {"embed_out.weight": (96, 64)}).names == {"embed_out.weight"}


def test_a_model_without_linear_layers() -> None:
    """GPT-2 has matrices of a class of its own, inputs first; the error says what is looked for."""
    config = {"architectures": ["GPT2Model"], "model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}
    with pytest.raises(UnsupportedError, match=r"no linear layer .*: expected torch.nn.Linear, or a pattern"):
        linear_weights(config, {"h.0.attn.c_attn.weight": (32, 96)})


def test_infinite_numbers_of_a_configuration() -> None:
    """As transformers 5 writes them; Mamba 2 has one unless it is told otherwise."""
    config = {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "vocab_size": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 8,
        "n_groups": 1,
        "num_hidden_layers": 1,
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
    }
    assert linear_weights(config, {"lm_head.weight": (32, 32)}).names == {"lm_head.weight"}
