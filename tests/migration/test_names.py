"""Index to weight: files of names, and files that are not of the model that stands beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import uqff
from tests.support.small_models import SmallModel, config_of, write_v0
from uqff.errors import FormatError, ShapeError, UnsupportedError, UqffError
from uqff.migration import migrate, parse_names, read_names
from uqff.models.architectures import layer_names
from uqff.models.names import known_names, with_stacked_experts
from uqff.models.shapes import SHAPES, expected_shape

EXAMPLE = """
# a model
1 model.layers.0.a   # of the first block
0 lm_head

2 experts.up[1]
3 experts.up[0]
"""


def test_a_file_of_names() -> None:
    """Lines in any order, comments, experts as places in a stack."""
    names = parse_names(EXAMPLE)
    assert [(name.index, name.module, name.key, name.expert) for name in names] == [
        (0, "lm_head", "lm_head", None),
        (1, "model.layers.0.a", "model.layers.0.a", None),
        (2, "experts.up[1]", "experts.up", 1),
        (3, "experts.up[0]", "experts.up", 0),
    ]
    as_json = json.dumps({str(name.index): name.module for name in names})
    assert parse_names(as_json) == names


@pytest.mark.parametrize(
    ("text", "problem", "field"),
    [
        ("", "wrong number of names", None),
        ("0 a\n0 b", "index occurs twice", "line 2"),
        ("0 a\n2 b", "index is missing", "1"),
        ("1 a", "index is missing", "0"),
        ("0 a\n1 a", "path occurs twice", "0"),
        ("0 a[0]\n1 a", "path occurs twice", "0"),
        ("0 a[0]\n1 a[2]", "expert is missing", None),
        ("0 a[1]", "expert is missing", None),
        ("0", "not a name", "line 1"),
        ("-1 a", "not a name", "line 1"),
        ("0 a b", "not a name", "line 1"),
        ("0 a.weight", "not the path of a weight", "line 1"),
        ("0 7", "not the path of a weight", "line 1"),
        ("0 a[x]", "not the path of a weight", "line 1"),
        ("0 a]", "not the path of a weight", "line 1"),
        ("{", "not JSON", None),
        ('{"x": "a"}', "not a name", "x"),
        ('{"0": 1}', "not a name", "0"),
        ('{"0": "a", "0": "b"}', "index occurs twice", "0"),
    ],
)
def test_rules_of_a_file_of_names(text: str, problem: str, field: str | None) -> None:
    with pytest.raises(FormatError, match=problem) as caught:
        parse_names(text)
    assert caught.value.field == field


def test_near_misses_of_a_file_of_names() -> None:
    """One name; a key that looks like a number but is none; a single expert."""
    assert parse_names("000 a7")[0].index == 0
    assert parse_names("0 model.layers.7")[0].module == "model.layers.7"
    assert parse_names("0 a[0]")[0].expert == 0


def test_errors_of_a_file_of_names_name_it(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("0 a\n0 b")
    with pytest.raises(FormatError, match=r"names\.txt"):
        read_names(path)
    path.write_bytes(b"0 \xff")
    with pytest.raises(FormatError, match="text is not Unicode"):
        read_names(path)


def test_every_weight_of_every_architecture_has_a_shape() -> None:
    """The table of shapes names nothing that no architecture has, and leaves nothing out."""
    used = set()
    for architecture in ("Llama", "Phi3", "Gemma", "Mixtral", "Qwen3Moe", "Gemma3"):
        config = config_of(architecture)
        for name in layer_names(config):
            shape = expected_shape(config, name)
            assert None not in (shape or [None]), name
            used |= {rule for rule in SHAPES if name.key.endswith(rule)}
    assert used == SHAPES.keys() - {"model.embed_tokens"}


def test_shapes_by_hand() -> None:
    """Numbers that the configuration does not have are not checked; experts may be one stack."""
    config = config_of("Qwen3Moe", num_attention_heads=8)
    shapes = {name.module: expected_shape(config, name) for name in layer_names(config)}
    assert shapes["model.layers.0.self_attn.q_proj"] == (128, 64)
    assert shapes["model.layers.0.self_attn.o_proj"] == (64, 128)
    assert shapes["model.layers.0.self_attn.k_proj"] == (32, 64)
    assert shapes["model.layers.0.mlp.experts.1.down_proj"] == (64, 32)
    assert shapes["model.layers.1.mlp.down_proj"] == (64, 96)
    stacked = with_stacked_experts(layer_names(config))
    assert expected_shape(config, stacked[5]) == (2, 32, 64)
    del config["head_dim"]
    assert expected_shape(config, layer_names(config)[1]) == (64, 64)
    del config["hidden_size"]
    assert expected_shape(config, layer_names(config)[1]) == (None, None)


def test_stacked_experts_are_known_by_their_number() -> None:
    """As builds for Metal and CUDA write them: three stacks in the place of three matrices for each expert."""
    config = config_of("Qwen3Moe")
    stacked = with_stacked_experts(layer_names(config))
    shapes = {name.index: tuple(n or 0 for n in expected_shape(config, name) or ()) for name in stacked}
    assert known_names(config, shapes) == stacked
    assert [name.key.rpartition(".layers.")[2] for name in stacked[5:8]] == [
        "0.mlp.experts.gate_proj",
        "0.mlp.experts.up_proj",
        "0.mlp.experts.down_proj",
    ]
    apart = {name.index: tuple(n or 0 for n in expected_shape(config, name) or ()) for name in layer_names(config)}
    assert known_names(config, apart) == layer_names(config)


@pytest.fixture
def model() -> SmallModel:
    """A llama of two blocks in q8_0."""
    return SmallModel(config_of("Llama"), {}, False, 3)


def rewrite(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value != "-"}))


@pytest.mark.parametrize(
    ("changes", "error", "expected", "got", "layer"),
    [
        ({"num_hidden_layers": 3}, FormatError, "22 by config.json", "15, 15 is missing", "15"),
        ({"num_hidden_layers": 1}, FormatError, "8 by config.json", "15, 8 is none of them", "8"),
        ({"vocab_size": 33}, ShapeError, "lm_head [33, 64] by config.json", [32, 64], "0"),
        ({"num_key_value_heads": 4}, ShapeError, "model.layers.0.self_attn.k_proj [64, 64]", [32, 64], "2"),
        ({"intermediate_size": 64}, ShapeError, "model.layers.0.mlp.gate_proj [64, 64]", [96, 64], "5"),
        ({"architectures": ["BertModel"]}, UnsupportedError, "one of Llama", ["BertModel"], None),
        ({"architectures": "-"}, UnsupportedError, "one of Llama", "none", None),
        ({"num_hidden_layers": "-"}, FormatError, "a number from 1", None, None),
    ],
)
def test_files_of_another_model_are_refused(
    model: SmallModel,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[UqffError],
    expected: str,
    got: object,
    layer: str | None,
) -> None:
    """The error says what was expected, what was found, and at which index."""
    write_v0(model, tmp_path / "old")
    rewrite(tmp_path / "old", **changes)
    with pytest.raises(error) as caught:
        migrate(tmp_path / "old", tmp_path / "new")
    assert expected in str(caught.value.expected)
    assert (caught.value.got, caught.value.layer) == (got, layer)
    assert "q8_0-0.uqff" in str(caught.value.file)
    assert not (tmp_path / "new").exists()


def test_a_configuration_that_says_less_is_enough(model: SmallModel, tmp_path: Path) -> None:
    """The near miss: numbers that are not there are not compared."""
    write_v0(model, tmp_path / "old")
    rewrite(tmp_path / "old", vocab_size="-", intermediate_size="-", num_key_value_heads="-", head_dim="-")
    with pytest.raises(ShapeError, match=r"k_proj \[64, 64\]"):
        migrate(tmp_path / "old", tmp_path / "new")
    rewrite(tmp_path / "old", num_attention_heads="-")
    migrate(tmp_path / "old", tmp_path / "new")


@pytest.mark.parametrize(
    ("tensors", "problem", "layer"),
    [
        ({"model.embed_tokens.weight": (31, 64)}, r"expected lm_head \[31, 64\], as the embedding", "0"),
        ({"model.layers.0.mlp.up_proj.weight": (1, 1)}, "a layer and in the residual", "6"),
        ({"model.layers.0.norm.weight": (1,)}, r"expected the same decoder layers in both.*layers\.1", "8"),
        ({f"model.layers.{n}.norm.weight": (1,) for n in range(3)}, r"none in the file.*model\.layers\.2", None),
    ],
)
def test_a_residual_of_another_model_is_refused(
    model: SmallModel, tmp_path: Path, tensors: dict[str, tuple[int, ...]], problem: str, layer: str | None
) -> None:
    write_v0(model, tmp_path / "old")
    path = tmp_path / "old" / "residual.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
    with pytest.raises(UqffError, match=problem) as caught:
        migrate(tmp_path / "old", tmp_path / "new")
    assert caught.value.layer == layer


def test_names_in_place_of_the_architecture(model: SmallModel, tmp_path: Path) -> None:
    """An architecture that nobody knows, there and back; without names it is refused, as is another number of them."""
    write_v0(model, tmp_path / "old")
    rewrite(tmp_path / "old", architectures=["MyOwnModel"])
    with pytest.raises(UnsupportedError, match="unknown architecture"):
        migrate(tmp_path / "old", tmp_path / "new")
    text = "\n".join(f"{name.index} {name.module.replace('layers', 'h')}" for name in layer_names(model.config))
    (tmp_path / "old" / "residual.safetensors").unlink()
    names = parse_names(text)
    with pytest.raises(FormatError, match="the names are of another file"):
        migrate(tmp_path / "old", tmp_path / "new", names=names[:-1])
    migrate(tmp_path / "old", tmp_path / "new", names=names)
    with uqff.open(tmp_path / "new") as file:
        assert list(file) == sorted(name.module for name in names)
    migrate(tmp_path / "new", tmp_path / "back", version="0.2", names=names)
    assert (tmp_path / "back" / "q8_0-0.uqff").read_bytes() == (tmp_path / "old" / "q8_0-0.uqff").read_bytes()


def test_names_of_experts_stack_them(tmp_path: Path) -> None:
    """What no architecture says, a file of names can: which layers are experts."""
    model = SmallModel(config_of("Mixtral"), {}, False, 5)
    layers = write_v0(model, tmp_path / "old")
    (tmp_path / "old" / "residual.safetensors").unlink()
    names = layer_names(model.config)
    text = "\n".join(f"{n.index} {n.key.upper()}{'' if n.expert is None else f'[{n.expert}]'}" for n in names)
    migrate(tmp_path / "old", tmp_path / "new", names=parse_names(text))
    with uqff.open(tmp_path / "new") as file:
        stack = file["MODEL.LAYERS.1.BLOCK_SPARSE_MOE.EXPERTS.UP_PROJ"].weight
        w3 = [name for name in names if name.block == 1 and name.module.endswith("w3")]
        assert stack.unstack() == [layers[str(name.index)].weight for name in w3]
