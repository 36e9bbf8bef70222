"""Each architecture: a file that gguf-py's own names were given to is the checkpoint that it was made of, and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import uqff
from tools.tiny import architectures, text
from tools.tiny.gguf import MINISTRAL3, MINISTRAL3_SCALING, NAMED, OWN, TEXTS, THETA, checkpoint_of, write_checkpoint
from uqff.checkpoints import open_gguf
from uqff.container.document import write_json
from uqff.conversion import gguf_of_uqff, uqff_of_gguf
from uqff.errors import FormatError, ShardError, UnsupportedError, UqffError

pytestmark = pytest.mark.long

NAMES = ("Mistral", "Qwen3", "Qwen3Moe", "Mixtral", "SmolLM3", "Gemma", "Gemma2", "Gemma3", *TEXTS, *OWN)


def skip_without(name: str) -> None:
    if name in text.TEXTS and not text.has(name):
        pytest.skip("transformers lacks it")


def write(name: str, folder: Path, kind: str = "f32") -> None:
    skip_without(name)
    config, tensors = checkpoint_of(name)
    (folder / "checkpoint").mkdir()
    write_json(folder / "checkpoint/config.json", config)
    save_file(tensors, folder / "checkpoint/model.safetensors")
    write_checkpoint(config, tensors, folder / "a.gguf", kind, architecture=NAMED.get(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_its_checkpoint(tmp_path: Path, name: str) -> None:
    """Equal weights by name and value: what is quantised of both is the same, byte for byte."""
    write(name, tmp_path)
    for source, target in (("checkpoint", "u"), ("a.gguf", "v")):
        uqff.quantize_model(tmp_path / source, tmp_path / target, "q8_0", measure=False)
    assert (tmp_path / "u/q8_0-0.uqff").read_bytes() == (tmp_path / "v/q8_0-0.uqff").read_bytes()
    with uqff.open(tmp_path / "u") as one, uqff.open(tmp_path / "v") as other:
        assert one.residual.keys() == other.residual.keys()
        assert all(torch.equal(one.residual[each], other.residual[each]) for each in one.residual)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    """Every tensor has the bytes that it had, experts among them; all metadata."""
    write(name, tmp_path, "q8_0")
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf")
    found = []
    for path in ("a.gguf", "b.gguf"):
        with open_gguf(tmp_path / path) as file:
            tensors = {each: (t.type_name, t.shape, bytes(t.blocks().payload)) for each, t in file.items()}
            found.append((tensors, {key for key in file.pairs if key != "general.alignment"}))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral"])
def test_experts_of_the_older_generation(tmp_path: Path, name: str) -> None:
    """Each is a layer of its own, with the blocks that the stack has of it; they do not go back."""
    write(name, tmp_path, "q8_0")
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "v", version="0.2")
    uqff.migrate(tmp_path / "u", tmp_path / "w", version="0.2")
    with uqff.open(tmp_path / "v") as one, uqff.open(tmp_path / "w") as other:
        blocks = {key: layer.weight for key, layer in one.items() if layer.weight.kind == "q8_0"}
        assert blocks == {key: layer.weight for key, layer in other.items() if layer.weight.kind == "q8_0"}
        assert len(blocks) == 1 + architectures.LAYERS * (4 + 3 * architectures.EXPERTS)
    with pytest.raises(UnsupportedError, match=r"experts of files before 1\.0"):
        gguf_of_uqff(tmp_path / "v", tmp_path / "b.gguf")


def test_experts_of_gpt_oss(tmp_path: Path) -> None:
    """MXFP4 of gate and up becomes one layer whose rows take turns, and comes back; of two types, they cannot."""
    config, tensors = checkpoint_of("gpt-oss")
    write_checkpoint(config, tensors, tmp_path / "a.gguf", "q8_0", kinds={"experts": "mxfp4"})
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf")
    with open_gguf(tmp_path / "a.gguf") as one, open_gguf(tmp_path / "b.gguf") as other:
        assert {each: bytes(t.blocks().payload) for each, t in one.items()} == {
            each: bytes(t.blocks().payload) for each, t in other.items()
        }
        gate, up = (one[f"blk.1.ffn_{each}_exps.weight"].float32() for each in ("gate", "up"))
    with uqff.open(tmp_path / "u") as file:
        layer = file["model.layers.1.mlp.experts.gate_up_proj"].weight
        assert layer.kind == "mxfp4"
        assert np.array_equal(layer.dequantize().numpy(), np.stack((gate, up), 2).reshape(layer.shape))
    write_checkpoint(config, tensors, tmp_path / "c.gguf", "q8_0", kinds={"gate_proj": "mxfp4"})
    with pytest.raises(ShardError, match=r"cannot be put together exactly: .* got mxfp4, q8_0") as caught:
        uqff_of_gguf(tmp_path / "c.gguf", tmp_path / "v")
    assert caught.value.layer == "model.layers.0.mlp.experts.gate_up_proj"


def test_biases_of_experts_that_are_in_the_residual(tmp_path: Path) -> None:
    """As the files have them that were made before they went with their layers: they become the same GGUF file."""
    config, tensors = checkpoint_of("gpt-oss")
    write_checkpoint(config, tensors, tmp_path / "a.gguf", "q8_0")
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    shutil.copytree(tmp_path / "u", tmp_path / "old")
    with uqff.open(tmp_path / "u") as file:
        biases = {
            f"{key}_bias": each.bias for key, each in file.items() if each.bias is not None and ".experts." in key
        }
        layers = {key: uqff.Layer(each.weight) if f"{key}_bias" in biases else each for key, each in file.items()}
        residual = {name: tensor.clone() for name, tensor in file.residual.items()}
        assert biases.keys() == {name for name in tensors if name.endswith(("up_proj_bias", "down_proj_bias"))}
        assert all(np.array_equal(biases[name].numpy(), tensors[name]) for name in biases)
        uqff.save(layers, tmp_path / "old" / "q8_0-0.uqff", version=(1, 2, 0))
    save_torch(residual | {name: each.clone() for name, each in biases.items()}, tmp_path / "old/residual.safetensors")
    for name in ("u", "old"):
        gguf_of_uqff(tmp_path / name, tmp_path / f"{name}.gguf")
    assert (tmp_path / "u.gguf").read_bytes() == (tmp_path / "old.gguf").read_bytes()


def test_yarn_without_its_bounds(tmp_path: Path) -> None:
    """Older files of gpt-oss do not state them: they are those that llama.cpp takes then."""
    config, tensors = checkpoint_of("gpt-oss")
    scaling = dict(config["rope_scaling"])
    write_checkpoint(
        config | {"rope_scaling": scaling | {"beta_fast": None, "beta_slow": None}},
        tensors,
        tmp_path / "a.gguf",
        "q8_0",
    )
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    found = json.loads((tmp_path / "u/config.json").read_text())["rope_scaling"]
    assert found | {"rope_theta": THETA} == scaling | {"rope_theta": THETA}


def test_transposed_keys_of_deepseek(tmp_path: Path) -> None:
    """Blocks cannot be turned: quantised anew on request only, from their very numbers, and then written whole."""
    config, tensors = checkpoint_of("DeepSeek V3")
    write_checkpoint(config, tensors, tmp_path / "a.gguf", "q8_0", kinds={"k_b_proj": "f16"}, absorbed=True)
    path = "model.layers.1.self_attn.kv_b_proj"
    with pytest.raises(UnsupportedError, match="the blocks of 2 layers run across the rows of the model") as caught:
        uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    assert (caught.value.field, caught.value.got) == ("model.layers.0.self_attn.kv_b_proj.weight", "F16 and Q8_0")
    with pytest.raises(UnsupportedError, match="the layer is quantised already") as caught:
        uqff.quantize_model(tmp_path / "a.gguf", tmp_path / "u", "q4_0", measure=False, promote=False)
    with open_gguf(tmp_path / "a.gguf") as file:
        keys, values = (file[f"blk.1.attn_{each}_b.weight"].float32() for each in "kv")
        whole = np.concatenate((keys.swapaxes(1, 2), values), 1).reshape(128, 32)
    made = uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u", requantize="q5_0")
    assert "quantised anew, from types that UQFF does not have: 2 in another order" in made.notes
    uqff.quantize_model(tmp_path / "a.gguf", tmp_path / "v", "q4_0", requantize=True, measure=False, promote=False)
    for name, kind in (("u", "q5_0"), ("v", "q4_0")):
        with uqff.open(tmp_path / name) as file:
            assert file[path].weight == uqff.quantize(torch.from_numpy(whole), kind)
    gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf")
    with open_gguf(tmp_path / "b.gguf") as file:
        assert (file["blk.1.attn_kv_b.weight"].type_name, file.get_value("deepseek2.attention.key_length")) == (
            "Q5_0",
            32,
        )


def test_glm_lite_by_its_own_configuration(tmp_path: Path) -> None:
    """A GGUF file does not tell it from DeepSeek V3, which computes the same; its configuration does."""
    skip_without("GLM-4-MoE Lite")
    config, tensors = checkpoint_of("GLM-4-MoE Lite")
    write_checkpoint(config, tensors, tmp_path / "a.gguf", "q8_0")
    (tmp_path / "own").mkdir()
    write_json(tmp_path / "own/config.json", config)
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "v", assets=tmp_path / "own")
    assert (tmp_path / "u/q8_0-0.uqff").read_bytes() == (tmp_path / "v/q8_0-0.uqff").read_bytes()
    classes = [json.loads((tmp_path / name / "config.json").read_text())["architectures"][0] for name in "uv"]
    assert classes == ["DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM"]


@pytest.mark.parametrize("key", ["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank"])
def test_sizes_of_a_configuration_of_deepseek(tmp_path: Path, key: str) -> None:
    """Those of the file, each; of ``head_dim``, configurations say several things, or nothing."""
    config, tensors = checkpoint_of("DeepSeek V3")
    write_checkpoint(config, tensors, tmp_path / "a.gguf", "q8_0")
    (tmp_path / "own").mkdir()
    config.pop("head_dim")
    own = tmp_path / "own/config.json"
    own.write_text(json.dumps(config))
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u", assets=tmp_path / "own")
    for value in (48, None):
        own.write_text(json.dumps(config | {key: value}))
        with pytest.raises(FormatError, match="not the file's model") as caught:
            uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "v", assets=tmp_path / "own")
        assert caught.value.field == key


def test_nonsense_in_a_configuration_of_granite(tmp_path: Path) -> None:
    """Numbers that are none are refused as such; null heads of keys are as many as those of queries."""
    config, tensors = checkpoint_of("Granite")
    write_checkpoint(config, tensors, tmp_path / "a.gguf", "q8_0")
    (tmp_path / "own").mkdir()
    nonsense = (
        {"num_hidden_layers": "x"},
        {"intermediate_size": None},
        {"model_type": 3.5},
        {"num_key_value_heads": None},
    )
    for changed in nonsense:
        (tmp_path / "own/config.json").write_text(json.dumps(config | changed))
        with pytest.raises(FormatError):
            uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u", assets=tmp_path / "own")


def test_transposed_plain_keys_of_deepseek(tmp_path: Path) -> None:
    """Of F16 and BF16 they are the same words; a file that has them whole comes back with its keys transposed."""
    config, tensors = checkpoint_of("DeepSeek V2")
    for kind in ("f16", "bf16"):
        for absorbed in (True, False):
            path = tmp_path / f"{kind}-{absorbed}.gguf"
            write_checkpoint(config, tensors, path, kind, absorbed=absorbed)
            uqff_of_gguf(path, tmp_path / "u", force=True)
            gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf", force=True)
            with open_gguf(tmp_path / f"{kind}-True.gguf") as one, open_gguf(tmp_path / "b.gguf") as other:
                assert {each: bytes(t.blocks().payload) for each, t in one.items()} == {
                    each: bytes(t.blocks().payload) for each, t in other.items()
                }
                for each in ("key_length", "key_length_mla", "value_length", "value_length_mla", "head_count_kv"):
                    key = f"deepseek2.attention.{each}"
                    assert one.pairs[key] == other.pairs[key], (kind, absorbed, key)


def test_granite_without_rotary_embedding(tmp_path: Path) -> None:
    """The metadata says so by a flag, and the configuration that would be made says that there is one."""
    config, tensors = checkpoint_of("Granite")
    flag = {"granite.rope.scaling.finetuned": False}
    write_checkpoint(config, tensors, tmp_path / "a.gguf", "f32", metadata=flag)
    with pytest.raises(UnsupportedError, match="another model of this architecture") as caught:
        uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    assert caught.value.field == "granite.rope.scaling.finetuned"


@pytest.mark.parametrize(("name", "path"), [("Granite-Hybrid", "mamba"), ("Qwen3-Next", "linear_attn")])
def test_rates_come_back(tmp_path: Path, name: str, path: str) -> None:
    """Their logarithms are rounded: what a file had is kept, and taken again while the model has those logarithms."""
    config, tensors = checkpoint_of(name)
    rates = np.array([1e-8, 0.1, 0.3, 0.999, 1.0, 1.7, 3.3, 150.0], np.float32)
    logs = f"model.layers.0.{path}.A_log"
    tensors[logs] = np.log(rates[: tensors[logs].size])
    write_checkpoint(config, tensors, tmp_path / "a.gguf", "q8_0")
    with open(tmp_path / "a.gguf", "r+b") as file:  # rates that no float32 has as its exponential
        content = file.read()
        stored = -np.exp(tensors[logs])
        assert content.count(stored.tobytes()) == 1
        other = (stored.view(np.uint32) + np.uint32(3)).view(np.float32)
        file.seek(content.index(stored.tobytes()))
        file.write(other.tobytes())
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    with uqff.open(tmp_path / "u") as file:
        found = file.residual[logs].numpy()
        assert np.array_equal(found, np.log(-other.astype(np.float64)).astype(np.float32))
    gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf")
    with open_gguf(tmp_path / "u/metadata.gguf") as kept, open_gguf(tmp_path / "b.gguf") as back:
        assert np.array_equal(back["blk.0.ssm_a"].float32().reshape(-1).view(np.uint32), other.view(np.uint32))
        assert list(kept) == ["blk.0.ssm_a"]
    with uqff.open(tmp_path / "u") as file:
        residual = {each: tensor.clone() for each, tensor in file.residual.items()}
    residual[logs][0] = 1.5
    save_torch(residual, tmp_path / "u/residual.safetensors")
    gguf_of_uqff(tmp_path / "u", tmp_path / "c.gguf")
    with open_gguf(tmp_path / "c.gguf") as back:
        made = -np.exp(residual[logs].double().numpy()).astype(np.float32)
        assert np.array_equal(back["blk.0.ssm_a"].float32().reshape(-1), made)


def test_what_is_no_rate(tmp_path: Path) -> None:
    config, tensors = checkpoint_of("Granite-Hybrid")
    tensors["model.layers.0.mamba.A_log"][1] = np.inf
    write_checkpoint(config, tensors, tmp_path / "a.gguf", "q8_0")
    with pytest.raises(FormatError, match=r"not a rate: expected below 0, got -inf"):
        uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")


@pytest.mark.parametrize(
    ("name", "key", "value", "field"),
    [
        ("Granite-Hybrid", "granitehybrid.ssm.inner_size", 96, "ssm.inner_size"),
        ("Granite-Hybrid", "granitehybrid.ssm.time_step_rank", 7, "ssm.inner_size"),
        ("Qwen3-Next", "qwen3next.ssm.inner_size", 63, "ssm.inner_size"),
    ],
)
def test_sizes_of_states_that_do_not_divide(tmp_path: Path, name: str, key: str, value: int, field: str) -> None:
    config, tensors = checkpoint_of(name)
    write_checkpoint(config, tensors, tmp_path / "a.gguf", "f32", metadata={key: value})
    with pytest.raises(FormatError, match="sizes that do not divide") as caught:
        uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    assert caught.value.field == field


def test_mistral_by_its_newer_name(tmp_path: Path) -> None:
    """The text model of Mistral 3: the same layers as of a ``llama`` file, and back under the name that it had."""
    config, tensors = checkpoint_of("Mistral")
    for name in ("mistral3", "llama"):
        write_checkpoint(config, tensors, tmp_path / f"{name}.gguf", "q8_0", architecture=name)
        uqff_of_gguf(tmp_path / f"{name}.gguf", tmp_path / name)
        gguf_of_uqff(tmp_path / name, tmp_path / "back.gguf", force=True)
        with open_gguf(tmp_path / f"{name}.gguf") as one, open_gguf(tmp_path / "back.gguf") as other:
            assert {key: each for key, each in one.pairs.items() if key != "general.name"} == {
                key: each for key, each in other.pairs.items() if key != "general.name"
            }
            assert {each: bytes(t.blocks().payload) for each, t in one.items()} == {
                each: bytes(t.blocks().payload) for each, t in other.items()
            }
    assert (tmp_path / "mistral3/q8_0-0.uqff").read_bytes() == (tmp_path / "llama/q8_0-0.uqff").read_bytes()
    (tmp_path / "mistral3/metadata.gguf").unlink()
    gguf_of_uqff(tmp_path / "mistral3", tmp_path / "back.gguf", force=True)
    with open_gguf(tmp_path / "back.gguf") as other:
        assert other.get_value("general.architecture") == "llama"


@pytest.mark.parametrize(
    ("key", "problem"),
    [
        ("rope.scaling.type", "queries are scaled by a length that is not there"),
        ("rope.scaling.factor", "not a number"),
        ("rope.scaling.original_context_length", "not a count"),
    ],
)
def test_a_part_of_what_ministral_3_says_is_refused(tmp_path: Path, key: str, problem: str) -> None:
    config, tensors = checkpoint_of("Mistral")
    said = {f"mistral3.{each}": value for each, value in MINISTRAL3.items() if each != key}
    write_checkpoint(config, tensors, tmp_path / "a.gguf", "q8_0", architecture="mistral3", metadata=said)
    with pytest.raises(FormatError, match=problem):
        uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")


def test_ministral_3_is_stretched_and_scales_queries(tmp_path: Path) -> None:
    """The numbers are those of the configuration that it was made of, both ways; without them it is refused again."""
    config, tensors = checkpoint_of("Mistral")
    said = {f"mistral3.{key}": value for key, value in MINISTRAL3.items()}
    write_checkpoint(config, tensors, tmp_path / "a.gguf", "q8_0", architecture="mistral3", metadata=said)
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    made = json.loads((tmp_path / "u/config.json").read_text())
    assert made["rope_scaling"] == MINISTRAL3_SCALING
    assert made["rope_parameters"] == {"rope_theta": config["rope_theta"], **MINISTRAL3_SCALING}
    (tmp_path / "u/metadata.gguf").unlink()
    gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf")
    with open_gguf(tmp_path / "b.gguf") as back:
        assert back.get_value("general.architecture") == "mistral3"
        rounded = {key: np.float32(value) if isinstance(value, float) else value for key, value in said.items()}
        assert {key: back.get_value(key) for key in said} == rounded
    made["rope_scaling"] = made["rope_parameters"] = {**made["rope_parameters"], "attention_factor": 2.0}
    (tmp_path / "u/config.json").write_text(json.dumps(made))
    with pytest.raises(UnsupportedError, match="cannot be said in GGUF") as caught:
        gguf_of_uqff(tmp_path / "u", tmp_path / "c.gguf")
    assert caught.value.field == "rope_scaling.attention_factor"


def test_experts_where_an_architecture_has_none(tmp_path: Path) -> None:
    config, tensors = checkpoint_of("Qwen3")
    write_checkpoint(config, tensors, tmp_path / "a.gguf", "f32", metadata={"qwen3.expert_count": 2})
    with pytest.raises(UnsupportedError, match="experts of this architecture are not converted") as caught:
        uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    assert caught.value.field == "qwen3.expert_count"


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    """And the file that comes back is one without: it says neither of them nor of their layers."""
    config, tensors = checkpoint_of("GLM-4-MoE")
    blocks = config["num_hidden_layers"]
    extra = {f"blk.{blocks}.nextn.enorm.weight": np.ones(64, np.float32)}
    said = {"glm4moe.nextn_predict_layers": 1}
    config["num_hidden_layers"] += 1  # as the file counts them
    write_checkpoint(config, tensors, tmp_path / "a.gguf", "f32", extra=extra, metadata=said, vocabulary=True)
    made = uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    assert "the tensors that predict further tokens are left out (1)" in made.notes
    assert json.loads((tmp_path / "u/config.json").read_text())["num_hidden_layers"] == blocks
    gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf")
    with open_gguf(tmp_path / "a.gguf") as one, open_gguf(tmp_path / "b.gguf") as other:
        assert one.keys() - other.keys() == extra.keys()
        assert other.get_value("glm4moe.block_count") == blocks
        assert "glm4moe.nextn_predict_layers" not in other.pairs


@pytest.mark.parametrize(
    ("name", "changed", "field"),
    [
        ("Phi-3", {"rope_scaling": {"long_factor": [1.0] * 8}}, "rope_factors_short.weight"),
        ("LFM2", {"layer_types": ["conv", "conv"]}, "lfm2.attention.head_count_kv"),
        ("GLM-4", {"partial_rotary_factor": 1.5}, "glm4.rope.dimension_count"),
        ("Gemma3", {"sliding_window": 0}, "gemma3.attention.sliding_window"),
        ("StarCoder2", {"head_dim": 8}, "starcoder2.attention.key_length"),
    ],
)
def test_metadata_that_no_configuration_says(tmp_path: Path, name: str, changed: dict[str, Any], field: str) -> None:
    config, tensors = checkpoint_of(name)
    write_checkpoint({**config, **changed}, tensors, tmp_path / "a.gguf", "f32")
    with pytest.raises(FormatError) as caught:
        uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("name", "changed", "field"),
    [
        ("Phi-3", {"rope_scaling": {"type": "longrope", "long_factor": [1.0] * 8}}, "config.rope_scaling.short_factor"),
        ("Phi-3", {"original_max_position_embeddings": None}, "original_max_position_embeddings"),
        ("LFM2", {"layer_types": ["conv"]}, "layer_types"),
        ("GLM-4", {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ("GLM-4-MoE", {"norm_topk_prob": 1}, "norm_topk_prob"),
        ("HunYuan MoE", {"moe_topk": [1, 2]}, "moe_topk"),
        ("Gemma3", {"sliding_window_pattern": 2}, "sliding_window_pattern"),
        ("DeepSeek V3", {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 1.0}}, "rope_scaling.mscale"),
        ("DeepSeek V3", {"topk_method": "greedy"}, "topk_method"),
        ("Granite", {"position_embedding_type": "nope"}, "position_embedding_type"),
        ("Granite-Hybrid", {"position_embedding_type": "rope"}, "position_embedding_type"),
        ("Granite-Hybrid", {"mamba_d_head": 8}, "mamba_d_head"),
        ("Qwen3-Next", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("Qwen3-Next", {"linear_num_value_heads": 3}, "linear_num_value_heads"),
        ("Phi-3.5-MoE", {"router_jitter_noise": 0.02}, "router_jitter_noise"),
        ("Qwen3.5", {"linear_num_value_heads": 3}, "linear_num_value_heads"),
        ("Qwen3.5", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("gpt-oss", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("gpt-oss", {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "rope_scaling.truncate"),
        ("gpt-oss", {"rope_scaling": {"rope_type": "yarn", "truncate": False}}, "rope_scaling.factor"),
        (
            "gpt-oss",
            {"rope_scaling": {"rope_type": "yarn", "truncate": False, "factor": 8.0, "attention_factor": 1.5}},
            "rope_scaling.attention_factor",
        ),
        (
            "gpt-oss",
            {"rope_scaling": {"rope_type": "yarn", "truncate": False, "factor": 8.0}},
            "rope_scaling.original_max_position_embeddings",
        ),
    ],
)
def test_configurations_that_no_metadata_says(tmp_path: Path, name: str, changed: dict[str, Any], field: str) -> None:
    write(name, tmp_path, "q8_0")
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    config = json.loads((tmp_path / "u/config.json").read_text())
    (tmp_path / "u/config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(UqffError) as caught:
        gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf")
    assert caught.value.field == field
