"""Models of two generations, layer by layer: by path, expert by expert, head by embedding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import uqff
from tests.support.golden_models import GOLDEN
from tests.support.moe_models import save_moe
from uqff.errors import ShapeError, ShardError, UnsupportedError
from uqff.inspection.compare import LayerDifference, compare


def labels(differences: list[LayerDifference]) -> list[tuple[str, str | None, str | None]]:
    """Name, and the key on each side."""
    return [(d.key, None if d.a is None else d.a.key, None if d.b is None else d.b.key) for d in differences]


def test_experts_apart_and_stacked(tmp_path: Path) -> None:
    """The same model in 0.2 and 1.2, in either order: every layer has the same bytes, biases included."""
    old, new = save_moe(tmp_path / "old", stacked=False), save_moe(tmp_path / "new", stacked=True)
    forth, back = list(compare(old, new)), list(compare(new, old))
    assert len(forth) == len(back) == 18
    assert all(d.identical and d.distance is not None and d.distance.largest == 0 for d in (*forth, *back))
    block = "model.layers.0.mlp.experts"
    assert [row for row in labels(forth) if "experts" in row[0]] == [
        (f"{block}.{name}_proj[{expert}]", str(index + 3 * expert), f"{block}.{name}_proj")
        for index, name in enumerate(("gate", "up", "down"), 5)
        for expert in (0, 1)
    ]
    assert sorted(labels(back)) == sorted((key, b, a) for key, a, b in labels(forth))
    assert labels(forth)[0] == ("lm_head", "0", "lm_head")
    assert [d.shape for d in forth] == [(32, 32)] * 18


def test_one_expert_differs(tmp_path: Path) -> None:
    """The row of that expert alone, with the distance of its weights."""
    old, new = save_moe(tmp_path / "old", stacked=False), save_moe(tmp_path / "new", stacked=True)
    with uqff.open(old) as file:
        layers = {index: file[index] for index in range(len(file))}
        other = uqff.Layer(uqff.quantize(torch.ones(32, 32), "q8_0"), layers[8].bias)
        weight = layers[8].weight.dequantize()
        uqff.save({**layers, 8: other}, tmp_path / "q4_0.uqff")
    shutil.move(tmp_path / "q4_0.uqff", old / "q4_0.uqff")
    (row,) = [d for d in compare(old, new) if not d.identical]
    assert row.key == "model.layers.0.mlp.experts.gate_proj[1]"
    assert row.a is not None
    assert row.b is not None
    assert (row.a.kind, row.b.kind) == ("q8_0", "q4_0")
    assert row.distance is not None
    assert row.distance.largest == (weight - other.weight.dequantize()).abs().max().item()


def test_layers_of_one_side_are_shown(tmp_path: Path) -> None:
    """1.2 of the client has the embedding as a layer, and another type for the head; the rest is what 0.6.0 wrote."""
    directory = GOLDEN / "v0" / "llama-edge-64-f32"
    rows = list(compare(directory / "afq4-0.uqff", GOLDEN / "v1" / "1.2.0" / "llama-edge-64-f32" / "afq4-0.uqff"))
    assert [(d.key, d.identical) for d in rows if not d.identical] == [
        ("lm_head", False),
        ("model.embed_tokens", False),
    ]
    head, embedding = rows[0], rows[-1]
    assert head.a is not None
    assert head.b is not None
    assert (head.a.kind, head.b.kind) == ("afq4", "afq6")
    assert (embedding.a, embedding.distance, embedding.shape) == (None, None, (32, 64))


def test_head_of_a_tied_model_is_its_embedding(tmp_path: Path) -> None:
    """0.x calls the quantised embedding the head, 1.2 the embedding: they are one layer."""
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "tie_word_embeddings": True}
    weights = [uqff.quantize(torch.full((2, 32), float(index)), "q8_0") for index in range(8)]
    paths = ["model.embed_tokens", *(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo")]
    paths += [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")]
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / "new" / "config.json").write_text(json.dumps(config))
    uqff.save(dict(enumerate(weights)), tmp_path / "old" / "m.uqff")
    uqff.save(dict(zip(paths, weights, strict=True)), tmp_path / "new" / "m.uqff", version=(1, 2, 0))
    for a, b, first in (
        ("old", "new", ("lm_head / model.embed_tokens", "0", "model.embed_tokens")),
        ("new", "old", ("model.embed_tokens / lm_head", "model.embed_tokens", "0")),
    ):
        rows = list(compare(tmp_path / a, tmp_path / b))
        assert first in labels(rows)
        assert [d.identical for d in rows] == [True] * 8


def test_stacks_that_cannot_be_cut(tmp_path: Path) -> None:
    """Experts that share words and scales are compared by their numbers, under their own type."""
    old = save_moe(tmp_path / "old", stacked=False)
    with uqff.open(save_moe(tmp_path / "new", stacked=True)) as file:
        layers = dict(file)
    path = "model.layers.0.mlp.experts.up_proj"
    plain = layers[path].weight.dequantize()
    layers[path] = uqff.Layer(uqff.quantize(plain, "hqq8"))
    uqff.save(layers, tmp_path / "new" / "q4_0.uqff", version=(1, 1, 0))
    rows = [d for d in compare(old, tmp_path / "new") if d.key.startswith(path)]
    for expert, row in enumerate(rows):
        assert row.b is not None
        assert (row.key, row.identical, row.b.kind) == (f"{path}[{expert}]", False, "hqq8")
        far = (layers[path].weight.dequantize()[expert] - plain[expert]).abs().max().item()
        assert row.distance is not None
        assert row.distance.largest == far > 0


def test_what_cannot_be_matched(tmp_path: Path) -> None:
    """No configuration, one of another model, another number of experts: an error that says so, and no rows."""
    old, new = save_moe(tmp_path / "old", stacked=False), save_moe(tmp_path / "new", stacked=True)
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ShardError, match="expected 28 layers, got 18"):
        list(compare(old, new))
    (old / "config.json").unlink()
    assert all(d.identical for d in compare(old, new))  # the one beside the other file does as well
    (new / "config.json").unlink()
    with pytest.raises(UnsupportedError, match=r"layers of 0\.x have no names"):
        list(compare(new, old))
    (new / "config.json").write_text(json.dumps(config))
    with uqff.open(new) as file:
        layers = dict(file)
    path = "model.layers.0.mlp.experts.gate_proj"
    layers[path] = uqff.Layer(layers[path].weight.narrow(0, 0, 1))
    uqff.save(layers, new / "q4_0.uqff", version=(1, 2, 0))
    with pytest.raises(ShapeError, match="stacks differ in size: expected 2, got 1"):
        list(compare(old, new))
