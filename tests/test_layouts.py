"""Rows of Q and K that lie as in a GGUF file, and the engine's other keys: honoured or refused by every command.

The model is `tests/golden/gguf`, which the real client made of a GGUF file of float32; `tools/golden/gguf.py` has its
weights. Where they go in order is an index formula of `tools/tiny/gguf.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import uqff
from tests.support.golden_models import TinyModel
from tools.golden.gguf import GOLDEN, KINDS, MODEL
from tools.tiny.gguf import interleaved, write_gguf
from uqff import Layer
from uqff.checkpoints import open_gguf
from uqff.cli import main
from uqff.conversion import gguf_of_uqff, uqff_of_gguf
from uqff.errors import FormatError, ShapeError, UnsupportedError
from uqff.export.dequantize import dequantize_model
from uqff.inspection.checksum import digest_layer, digest_model
from uqff.inspection.compare import compare
from uqff.inspection.verify import verify
from uqff.migration import migrate
from uqff.models.layouts import KEYS, QK_ROPE_LAYOUT, WeightLayout, adjacent_order, half_split_order
from uqff.quantization.run import quantize_model

EXACT = [kind for kind in KINDS if kind != "hqq8"]
"""Types whose rows can change places."""
HEADS = {"q_proj": 2, "k_proj": 1}
MODEL_TENSORS = {name: torch.from_numpy(values) for name, values in MODEL.tensors().items()}
WEIGHTS = {name.removesuffix(".weight"): values for name, values in MODEL_TENSORS.items()}


def adjacent(values: torch.Tensor, module: str) -> torch.Tensor:
    """A weight with its rows as the GGUF file has them."""
    heads = HEADS.get(module.rpartition(".")[2])
    return values if heads is None else torch.from_numpy(interleaved(values.numpy(), heads))


@pytest.fixture
def golden(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The client's directory of one type."""
    kind = getattr(request, "param", "q4_0")
    folder = tmp_path / "golden"
    folder.mkdir()
    for path in GOLDEN.iterdir():
        if path.suffix != ".uqff" or path.name == f"{kind}-0.uqff":
            shutil.copy(path, folder)
    return folder


def restate(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def kinds_of(folder: Path) -> dict[str, str]:
    with uqff.open(folder) as file:
        return {key: layer.weight.kind for key, layer in file.items()}


def in_order(folder: Path, made: Path) -> Path:
    """The model that the client would have made of the checkpoint: the same types, rows and config of the latter."""
    made.mkdir()
    uqff.save(
        {key: Layer(uqff.quantize(WEIGHTS[key], kind)) for key, kind in kinds_of(folder).items()},
        made / "q.uqff",
        version=(1, 2, 0),
    )
    for name in ("residual.safetensors", "tokenizer.json"):
        shutil.copy(folder / name, made)
    config = config_of(folder)
    del config[QK_ROPE_LAYOUT]
    (made / "config.json").write_text(json.dumps(config))
    return made


def cli(*arguments: object) -> Any:
    return CliRunner().invoke(main, [*map(str, arguments)])


def test_the_golden_files_are_the_clients() -> None:
    """Digests, and bytes: each layer is the model's weight, quantised, with rows of Q and K as in the GGUF file."""
    index = json.loads((GOLDEN / "MANIFEST.json").read_text())
    assert index["model_sha256"] == MODEL.sha256()
    for name, digest in index["files"].items():
        assert hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest() == digest, name
    assert config_of(GOLDEN)[QK_ROPE_LAYOUT] == "adjacent"
    for kind in KINDS:
        with uqff.open(GOLDEN / f"{kind}-0.uqff") as file:
            assert len(file) == 9
            for key, layer in file.items():
                assert layer.weight == uqff.quantize(adjacent(WEIGHTS[key], key), layer.weight.kind), key


def test_orders_by_hand() -> None:
    """One head of 8 rows, and two of 4; each is the inverse of the other."""
    assert half_split_order(8, 1).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert adjacent_order(8, 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert half_split_order(8, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert half_split_order(8, 2)[adjacent_order(8, 2)].tolist() == list(range(8))
    for rows, heads in ((6, 2), (8, 0), (7, 1)):
        with pytest.raises(ShapeError, match="rows are not whole heads"):
            half_split_order(rows, heads)


@pytest.mark.parametrize("golden", KINDS, indirect=True)
def test_a_loaded_model_has_its_rows_in_order(golden: Path, tmp_path: Path) -> None:
    """Q and K are the checkpoint's rows of the same codes; HQQ, whose rows cannot move, has their values."""
    from uqff.parallel import load_model

    model = load_model(golden)
    kinds = kinds_of(golden)
    for key in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        path = f"model.layers.0.{key}"
        layer: Any = model.get_submodule(path)
        stored = uqff.quantize(adjacent(WEIGHTS[path], path), kinds[path]).dequantize()
        assert torch.equal(adjacent(layer.dequantize_w(), path), stored)
        if kinds[path] != "hqq8":
            assert layer.weight == uqff.quantize(WEIGHTS[path], kinds[path])
    ids = torch.tensor([[1, 5, 9, 3, 7, 2]])
    dequantize_model(golden, tmp_path / "plain")
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("golden", KINDS, indirect=True)
def test_a_plain_checkpoint_has_its_rows_in_order(golden: Path, tmp_path: Path) -> None:
    """Dequantised weights are the checkpoint's rows; the key goes."""
    kinds = kinds_of(golden)
    dequantize_model(golden, tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    for key, kind in kinds.items():
        expected = uqff.quantize(adjacent(WEIGHTS[key], key), kind).dequantize()
        assert torch.equal(adjacent(tensors[f"{key}.weight"], key), expected), key
    assert QK_ROPE_LAYOUT not in config_of(tmp_path / "plain")


def test_biases_and_plain_tensors_go_along(tmp_path: Path) -> None:
    """A bias of Q, and a K that is not quantised."""
    model = TinyModel("qwen2", hidden_size=64, intermediate_size=64, heads=2, kv_heads=1, vocab_size=16, seed=52)
    model.write(tmp_path / "source")
    restate(tmp_path / "source", **{QK_ROPE_LAYOUT: "adjacent"})
    quantize_model(tmp_path / "source", tmp_path / "u", ["q8_0"])
    assert config_of(tmp_path / "u")[QK_ROPE_LAYOUT] == "adjacent"  # the key follows
    own = {name: torch.from_numpy(values) for name, values in model.tensors().items()}
    with uqff.open(tmp_path / "u") as file:
        layers = dict(file.items())
    k = "model.layers.0.self_attn.k_proj"
    del layers[k]
    residual = load_file(tmp_path / "u" / "residual.safetensors")
    save_file(residual | {n: t for n, t in own.items() if k in n}, tmp_path / "u" / "residual.safetensors")
    for path in (tmp_path / "u").glob("*.uqff"):
        path.unlink()
    uqff.save(layers, tmp_path / "u" / "q8_0.uqff", version=(1, 2, 0))
    dequantize_model(tmp_path / "u", tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    for part in ("weight", "bias"):
        assert torch.equal(adjacent(tensors[f"{k}.{part}"], k), own[f"{k}.{part}"])
    q = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(torch.from_numpy(interleaved(tensors[q].numpy(), 2)), own[q])
    from uqff.parallel import load_model

    loaded: Any = load_model(tmp_path / "u").get_submodule(q.removesuffix(".bias"))
    assert torch.equal(loaded.bias, tensors[q])


@pytest.mark.parametrize("golden", ["q4_0"], indirect=True)
def test_to_gguf_no_row_moves(golden: Path, tmp_path: Path) -> None:
    """The rows are those of a GGUF file already; without the key they are interleaved, to the same bytes."""
    ours = in_order(golden, tmp_path / "ours")
    gguf_of_uqff(golden, tmp_path / "theirs.gguf")
    gguf_of_uqff(ours, tmp_path / "ours.gguf")
    write_gguf(MODEL, tmp_path / "true.gguf", "q4_0")
    with open_gguf(tmp_path / "theirs.gguf") as a, open_gguf(tmp_path / "ours.gguf") as b:
        assert {n: bytes(t.record().data.numpy()) for n, t in a.items()} == {
            n: bytes(t.record().data.numpy()) for n, t in b.items()
        }
        with open_gguf(tmp_path / "true.gguf") as c:
            for name in ("blk.0.attn_q.weight", "blk.0.attn_k.weight"):
                assert torch.equal(a[name].record().data, c[name].record().data)


def test_a_qwen2_model_with_adjacent_rows_is_put_in_order_for_gguf(tmp_path: Path) -> None:
    """Its GGUF files have the checkpoint's order."""
    model = TinyModel("qwen2", hidden_size=64, intermediate_size=64, heads=2, kv_heads=1, vocab_size=16, seed=53)
    model.write(tmp_path / "source")
    quantize_model(tmp_path / "source", tmp_path / "u", ["q8_0"])
    restate(tmp_path / "u", **{QK_ROPE_LAYOUT: "adjacent"})
    gguf_of_uqff(tmp_path / "u", tmp_path / "a.gguf")
    k = "model.layers.0.self_attn.k_proj"
    with open_gguf(tmp_path / "a.gguf") as file, uqff.open(tmp_path / "u") as u:
        made = file["blk.0.attn_k.weight"].record().data
        assert np.array_equal(interleaved(made.numpy(), 1), u[k].weight.data.numpy())  # type: ignore[attr-defined]
        bias = file["blk.0.attn_k.bias"].record().dequantize()
        assert np.array_equal(interleaved(bias.numpy(), 1), u[k].bias.float().numpy())  # type: ignore[union-attr]


def test_from_gguf_with_the_clients_configuration(golden: Path, tmp_path: Path) -> None:
    """Our conversion puts rows in order, so the key of a given configuration must not come along."""
    write_gguf(MODEL, tmp_path / "a.gguf", "q4_0")
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u", assets=golden)
    assert QK_ROPE_LAYOUT not in config_of(tmp_path / "u")
    assert config_of(tmp_path / "u")["hidden_size"] == 64
    q = "model.layers.0.self_attn.q_proj"
    with uqff.open(tmp_path / "u") as file:
        assert file[q].weight == uqff.quantize(WEIGHTS[q], "q4_0")


@pytest.mark.parametrize("golden", EXACT, indirect=True)
def test_migrated_down_the_rows_are_in_order(golden: Path, tmp_path: Path) -> None:
    """0.2: the layers of the checkpoint, no key, said; in 1.2 nothing changes, and the key stays."""
    migrate(golden, tmp_path / "old", "0.2")
    assert QK_ROPE_LAYOUT not in config_of(tmp_path / "old")
    kinds = kinds_of(golden)
    with uqff.open(tmp_path / "old") as file:
        for index, module in ((1, "q_proj"), (2, "k_proj"), (3, "v_proj")):
            key = f"model.layers.0.self_attn.{module}"
            assert file[index].weight == uqff.quantize(WEIGHTS[key], kinds[key])
    result = cli("migrate", golden, tmp_path / "cli", "--to", "1.1")
    assert "rows of Q and K were adjacent" in result.output
    assert QK_ROPE_LAYOUT not in config_of(tmp_path / "cli")
    migrate(golden, tmp_path / "same", "1.2")
    assert config_of(tmp_path / "same")[QK_ROPE_LAYOUT] == "adjacent"
    with uqff.open(golden) as a, uqff.open(tmp_path / "same") as b:
        assert dict(a.items()) == dict(b.items())


@pytest.mark.parametrize("golden", ["hqq8"], indirect=True)
def test_rows_of_hqq_cannot_be_put_in_order(golden: Path, tmp_path: Path) -> None:
    """Down is refused, and says why; nothing is written."""
    with pytest.raises(UnsupportedError, match=r"2 layers cannot be expressed in 0\.2\.0: got its rows are adjacent"):
        migrate(golden, tmp_path / "old", "0.2")
    assert not (tmp_path / "old").exists()


@pytest.mark.parametrize("golden", KINDS, indirect=True)
def test_diff_with_the_model_in_order(golden: Path, tmp_path: Path) -> None:
    """The client's directory and one made of the checkpoint are the same; HQQ differs in codes, not in place."""
    ours = in_order(golden, tmp_path / "ours")
    for a, b in ((golden, ours), (ours, golden)):
        for each in compare(a, b):
            assert each.identical is (kinds_of(golden)[each.key] != "hqq8" or each.key.rpartition(".")[2] not in HEADS)
            assert each.distance is not None
            assert each.distance.relative < 0.02


@pytest.mark.parametrize("golden", KINDS, indirect=True)
def test_diff_with_the_source(golden: Path, tmp_path: Path) -> None:
    """The distance of Q is that of its own rows, whichever of the two says that they are adjacent."""
    MODEL.write(tmp_path / "source")
    q = "model.layers.0.self_attn.q_proj"
    small = {"q4_0": 0.12, "hqq8": 0.01, "fp8": 0.05, "afq4": 0.12}[kinds_of(golden)[q]]

    def far() -> float:
        (found,) = [each for each in compare(tmp_path / "source", golden) if each.key == q]
        assert found.distance is not None
        return found.distance.relative

    assert far() < small
    restate(tmp_path / "source", **{QK_ROPE_LAYOUT: "adjacent"})  # which is not true
    assert far() > 1
    rows = {name: adjacent(t, name.removesuffix(".weight")) for name, t in MODEL_TENSORS.items()}
    save_file(rows, tmp_path / "source" / "model.safetensors")
    assert far() < small
    golden = in_order(golden, tmp_path / "ours")
    assert far() < small


def test_checksums_are_of_rows_in_order(golden: Path, tmp_path: Path) -> None:
    """The digest does not hang on the order, as long as it is said; down in 0.2 it is the same."""
    ours = in_order(golden, tmp_path / "ours")
    with uqff.open(golden) as a, uqff.open(ours) as b:
        assert digest_model(a) == digest_model(b)
        q = "model.layers.0.self_attn.q_proj"
        assert {each.path: each.sha256 for each in digest_model(a).layers}[q] == digest_layer(b[q])
    migrate(golden, tmp_path / "old", "0.2")
    with uqff.open(golden) as a, uqff.open(tmp_path / "old") as b:
        first, second = ({each.path: each.sha256 for each in digest_model(file).layers} for file in (a, b))
        assert {path: first[path] for path in second} == second
    restate(golden, **{QK_ROPE_LAYOUT: None})
    with uqff.open(golden) as a, uqff.open(ours) as b:
        assert digest_model(a) != digest_model(b)


@pytest.mark.parametrize("golden", ["hqq8"], indirect=True)
def test_checksum_of_rows_that_cannot_be_put_in_order(golden: Path) -> None:
    """The same bytes with another order of rows are another layer."""
    with uqff.open(golden) as file:
        here = digest_model(file)
    restate(golden, **{QK_ROPE_LAYOUT: "half_split"})
    with uqff.open(golden) as file:
        there = digest_model(file)
    differ = [a.path for a, b in zip(here.layers, there.layers, strict=True) if a != b]
    assert differ == ["model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.q_proj"]


def test_verify_and_inspect_name_it(golden: Path) -> None:
    """As a note: it breaks no rule. A value that the engine refuses does, and so do rows that are not whole heads."""
    assert list(verify(golden)) == []
    note = f"{QK_ROPE_LAYOUT}: the rows of Q and K are adjacent, as in GGUF files"
    assert note in cli("verify", golden).output
    notes = json.loads(cli("verify", golden, "--json").stdout)["notes"]
    assert [each["text"] for each in notes if each["rule"] == "layout"] == [note]
    assert note in cli("inspect", golden).output
    assert json.loads(cli("inspect", golden, "--json").stdout)["layout"] == {QK_ROPE_LAYOUT: "adjacent"}
    restate(golden, num_attention_heads=3)
    (violation,) = verify(golden)
    assert (violation.problem, violation.layer) == ("rows are not whole heads", "model.layers.0.self_attn.q_proj")
    restate(golden, **{QK_ROPE_LAYOUT: "neither"})
    (violation,) = verify(golden)
    assert (violation.field, violation.got) == (f"config.{QK_ROPE_LAYOUT}", "neither")
    restate(golden, **{QK_ROPE_LAYOUT: "half_split", "num_attention_heads": 2})
    assert list(verify(golden)) == []
    assert "note" not in cli("verify", golden).output


FOREIGN = {
    "_mistralrs_gdn_v_head_layout": "tiled",
    "_mistralrs_muse_glimmer_gguf_collapsed_temporal": True,
    "_mistralrs_ple_hash": {"layer_multipliers": [1]},
    "_mistralrs_use_language_model_prefix": True,
    "_mistralrs_something_new": "any",
}


@pytest.mark.parametrize("key", FOREIGN)
def test_other_keys_are_refused_by_name(golden: Path, tmp_path: Path, key: str) -> None:
    """By whatever needs the checkpoint's order; what carries files over as they are keeps the key."""
    from uqff.parallel import load_model

    restate(golden, **{QK_ROPE_LAYOUT: "half_split", key: FOREIGN[key]})
    MODEL.write(tmp_path / "source")
    steps = {
        "run": lambda: load_model(golden),
        "dequantize": lambda: dequantize_model(golden, tmp_path / "x"),
        "convert": lambda: gguf_of_uqff(golden, tmp_path / "x"),
        "migrate": lambda: migrate(golden, tmp_path / "x", "0.2"),
        "diff": lambda: list(compare(tmp_path / "source", golden)),
        "diff of two": lambda: list(compare(GOLDEN / "q4_0-0.uqff", golden)),
    }
    for name, step in steps.items():
        with pytest.raises(UnsupportedError) as caught:
            step()
        assert (caught.value.field, caught.value.file) == (f"config.{key}", str(golden / "config.json")), name
        assert not (tmp_path / "x").exists()
    assert list(verify(golden)) == []
    assert key in cli("verify", golden).output
    assert all(each.identical for each in compare(golden, golden))
    migrate(golden, tmp_path / "same", "1.2")
    assert config_of(tmp_path / "same")[key] == FOREIGN[key]


@pytest.mark.parametrize(("key", "value"), [(known.name, value) for known in KEYS for value in (*known.harmless, None)])
def test_harmless_values_change_nothing(golden: Path, tmp_path: Path, key: str, value: object) -> None:
    """As without the key."""
    restate(golden, **{QK_ROPE_LAYOUT: None} | {key: value})
    layout = WeightLayout.of(config_of(golden))
    assert not layout.foreign
    assert not layout.heads
    assert not layout.notes
    dequantize_model(golden, tmp_path / "x")


def test_where_keys_stand(golden: Path, tmp_path: Path) -> None:
    """Inside of `text_config` too; but the engine looks for the order of Q and K at the top only."""
    config = {"text_config": {"_mistralrs_gdn_v_head_layout": "tiled", QK_ROPE_LAYOUT: "adjacent"}}
    assert WeightLayout.of(config).foreign == (
        "text_config._mistralrs_gdn_v_head_layout",
        f"text_config.{QK_ROPE_LAYOUT}",
    )
    with pytest.raises(UnsupportedError, match=r"weights do not lie as in a checkpoint: order of the value heads"):
        WeightLayout.of(config).check()


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Phi3ForCausalLM", "Glm4ForCausalLM"])
def test_adjacent_rows_of_other_architectures_are_refused(golden: Path, tmp_path: Path, architecture: str) -> None:
    """Norms of Q and K would have to move, Q and K be cut apart; of the unknown nothing is known."""
    restate(golden, architectures=[architecture])
    assert WeightLayout.of(config_of(golden)).foreign == (QK_ROPE_LAYOUT,)
    with pytest.raises(UnsupportedError, match="order of the rows of Q and K"):
        dequantize_model(golden, tmp_path / "x")


@pytest.mark.parametrize("value", ["neither", True, ["adjacent"]])
def test_values_that_the_engine_refuses(golden: Path, tmp_path: Path, value: object) -> None:
    """A typed error everywhere; the nearest value is taken."""
    restate(golden, **{QK_ROPE_LAYOUT: value})
    with pytest.raises(FormatError, match="expected half_split or adjacent"):
        dequantize_model(golden, tmp_path / "x")
    restate(golden, num_attention_heads=0, **{QK_ROPE_LAYOUT: "adjacent"})
    with pytest.raises(FormatError, match="not a count"):
        dequantize_model(golden, tmp_path / "x")


def test_quantising_for_old_readers_is_refused(tmp_path: Path) -> None:
    """A source whose rows are adjacent becomes 1.2 as it is, and nothing older: those readers know no such key."""
    MODEL.write(tmp_path / "source")
    restate(tmp_path / "source", **{QK_ROPE_LAYOUT: "adjacent"})
    with pytest.raises(UnsupportedError, match="rows of Q and K are adjacent"):
        quantize_model(tmp_path / "source", tmp_path / "u", ["q8_0"], version="1.1")
    quantize_model(tmp_path / "source", tmp_path / "u", ["q8_0"])
    q = "model.layers.0.self_attn.q_proj"
    with uqff.open(tmp_path / "u") as file:
        assert file[q].weight == uqff.quantize(WEIGHTS[q], "q8_0")


def test_a_gemma_3_text_model_may_have_longer_paths() -> None:
    """The key says so, and layers are found by the paths that the engine writes."""
    from uqff.models.architectures import layer_names

    config = {"architectures": ["Gemma3ForCausalLM"], "num_hidden_layers": 1}
    names = [name.module for name in layer_names({**config, "_mistralrs_use_language_model_prefix": True})]
    assert names == [f"language_model.{name.module}" for name in layer_names(config)]
