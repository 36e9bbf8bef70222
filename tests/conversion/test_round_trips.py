"""GGUF to UQFF and back: the bytes of every tensor, for every block type, generation and architecture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

import gguf as package
import numpy as np
import pytest
import torch
from gguf import quants
from safetensors.torch import save_file

import uqff
from tests.support.samples_gguf import Tensor, gguf, pair
from tools.tiny.gguf import gguf_name, write_gguf
from tools.tiny.models import TinyModel
from uqff import Layer
from uqff.checkpoints import open_gguf
from uqff.container.report import check_output, check_report, read_report
from uqff.conversion import convert, gguf_of_uqff, uqff_of_gguf
from uqff.conversion.kept import KEPT_NAME
from uqff.errors import FormatError, ShapeError, UnsupportedError, UqffError
from uqff.families.gguf.blocks import BLOCK_TYPES
from uqff.progress import Step

KINDS = [block_type.kind for block_type in BLOCK_TYPES if block_type.name != "Q8_1"]
"""The gguf package, which writes the files of these tests, takes a block of Q8_1 for 40 bytes; in ggml it has 36."""
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


Architecture: TypeAlias = Literal["llama", "qwen2"]


def tiny(architecture: Architecture = "llama", **options: Any) -> TinyModel:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "heads": 4, "kv_heads": 2}
    return TinyModel(architecture, **{**sizes, **options})


def tensors(path: Path) -> dict[str, tuple[Any, ...]]:
    """Type, shape and bytes of every tensor."""
    with open_gguf(path) as file:
        return {
            name: (tensor.type_name, tensor.shape, bytes(tensor.record().data.numpy()))
            for name, tensor in sorted(file.items())
        }


def layers(path: Path) -> dict[str, Layer]:
    with uqff.open(path) as file:
        return dict(file.items())


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_there_and_back(tmp_path: Path, kind: str) -> None:
    """All tensors have the bytes that they had, and the second UQFF is the first, byte for byte."""
    write_gguf(tiny(), tmp_path / "a.gguf", kind)
    first = uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    back = gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf")
    assert first.types == {kind: 9}
    assert back.types == {kind: 9, "f32": 3} if kind != "f32" else back.types == {"f32": 12}
    assert tensors(tmp_path / "a.gguf") == tensors(tmp_path / "b.gguf")
    uqff_of_gguf(tmp_path / "b.gguf", tmp_path / "v")
    for name in (*first.files, "residual.safetensors", "config.json", "uqff_report.json"):
        assert (tmp_path / "u" / name).read_bytes() == (tmp_path / "v" / name).read_bytes(), name


def test_q8_1_there_and_back(tmp_path: Path) -> None:
    """From UQFF; no mistral.rs would load it, which is said."""
    model = tiny()
    model.write(tmp_path / "own")
    weights = {name.removesuffix(".weight"): torch.from_numpy(v) for name, v in model.tensors().items()}
    norms = {f"{name}.weight": v for name, v in weights.items() if v.ndim == 1}
    first = {name: Layer(uqff.quantize(v, "q8_1")) for name, v in weights.items() if v.ndim == 2}
    save_file(norms, tmp_path / "own" / "residual.safetensors")
    uqff.save(first, tmp_path / "own" / "q8_1.uqff", version=(1, 2, 0))
    gguf_of_uqff(tmp_path / "own", tmp_path / "b.gguf")
    result = uqff_of_gguf(tmp_path / "b.gguf", tmp_path / "u")
    assert layers(tmp_path / "u") == first
    assert any("q8_1 layers: no release loads this type" in note for note in result.notes)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_blocks_are_those_of_the_models_own_rows(tmp_path: Path, architecture: Architecture, tied: bool) -> None:
    """What the model's weights quantise to, in its order of rows, is what is in the UQFF; biases with their layers."""
    model = tiny(architecture, tied=tied, layers=2)
    write_gguf(model, tmp_path / "a.gguf", "q4k", kinds={"v_proj": "q6k", "embed": "q8_0"})
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    weights = {name: torch.from_numpy(values) for name, values in model.tensors().items()}
    expected = {}
    for name, values in weights.items():
        if values.ndim == 2:
            kind = "q6k" if "v_proj" in name else "q8_0" if "embed" in name else "q4k"
            module = name.removesuffix(".weight")
            expected[module] = Layer(uqff.quantize(values, kind), weights.get(f"{module}.bias"))
    assert layers(tmp_path / "u") == expected
    assert ("lm_head" in expected) is not tied
    with uqff.open(tmp_path / "u") as file:
        residual = dict(file.residual.items())
    assert residual.keys() == {name for name in weights if name.endswith("norm.weight")}
    assert all(torch.equal(residual[name], weights[name]) for name in residual)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_the_older_generation(tmp_path: Path, architecture: Architecture, tied: bool) -> None:
    """The embedding is dense, a tied head keeps its blocks; so a tied model comes back as it was."""
    write_gguf(tiny(architecture, tied=tied), tmp_path / "a.gguf", "q5k", kinds={"embed": "q6k"})
    result = uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u", version="0.2")
    assert "the embedding is dequantised: 0.x has no quantised one (it was Q6K)" in result.notes
    before, found = tensors(tmp_path / "a.gguf"), layers(tmp_path / "u")
    assert list(found) == [str(index) for index in range(8)]
    head = "token_embd.weight" if tied else "output.weight"
    assert bytes(found["0"].weight.data.numpy()) == before[head][2]  # type: ignore[attr-defined]
    with open_gguf(tmp_path / "a.gguf") as file, uqff.open(tmp_path / "u") as model:
        dense = file["token_embd.weight"].record().dequantize()
        assert torch.equal(model.residual["model.embed_tokens.weight"], dense)
        assert model.version == (0, 2, 0)
    gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf")
    after = tensors(tmp_path / "b.gguf")
    if not tied:
        assert before.pop("token_embd.weight")[0] == "Q6K"
        assert after.pop("token_embd.weight") == ("F32", (64, 256), dense.numpy().tobytes())
    assert before == after


@pytest.mark.parametrize("kind", DTYPES)
def test_plain_matrices_in_the_older_generation(tmp_path: Path, kind: str) -> None:
    """They are Unquant layers: widened to float32, or as they are with their own load dtype."""
    write_gguf(tiny("qwen2"), tmp_path / "a.gguf", kind)
    for dtype in DTYPES:
        result = uqff_of_gguf(tmp_path / "a.gguf", tmp_path / dtype, version="0.2", dtype=dtype)
        expected = DTYPES["f32" if dtype == "f32" else kind]
        found = layers(tmp_path / dtype)
        assert {layer.weight.weight.dtype for layer in found.values()} == {expected}  # type: ignore[attr-defined]
        assert found["1"].bias is not None
        assert found["1"].bias.dtype == DTYPES[dtype]
        pinned = [limit.what for limit in result.limits if limit.rule == "weight-in-one-dtype"]
        assert pinned == [f"unquant layers in {(kind if dtype != 'f32' else dtype).upper()}"]
        never = any(limit.rule == "several-dtypes" for limit in result.limits)
        assert never == (dtype not in ("f32", kind))
    with open_gguf(tmp_path / "a.gguf") as file:
        weight = file["blk.0.ffn_up.weight"].record().dequantize()
    assert torch.equal(layers(tmp_path / "f32")["6"].weight.dequantize(), weight)


def test_the_report_is_right(tmp_path: Path) -> None:
    """The engine enforces it: names, counts, types; nothing counts as a fallback."""
    write_gguf(tiny(), tmp_path / "a.gguf", "q4k", kinds={"lm_head": "f16"})
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    report = read_report(tmp_path / "u")
    assert report is not None
    assert list(check_report(report, tmp_path / "u")) == []
    with uqff.open(tmp_path / "u") as file:
        assert list(check_output(report.outputs[0], file)) == []
    assert (report.outputs[0].quant, report.outputs[0].fallback_count) == ("q4k", 0)


def test_the_configuration(tmp_path: Path) -> None:
    """What the metadata says is what the model's own configuration said."""
    for architecture in ("llama", "qwen2"):
        model = tiny(architecture)
        write_gguf(model, tmp_path / f"{architecture}.gguf", "q8_0")
        uqff_of_gguf(tmp_path / f"{architecture}.gguf", tmp_path / architecture)
        made = json.loads((tmp_path / architecture / "config.json").read_text())
        own = {**model.config(), "sliding_window": None} if architecture == "qwen2" else model.config()
        assert {key: made[key] for key in own} == own


def test_assets_are_compared_and_copied(tmp_path: Path) -> None:
    """The model's own files go along; another model's are refused by the first number that differs."""
    model = tiny()
    model.write(tmp_path / "own")
    write_gguf(model, tmp_path / "a.gguf", "q8_0")
    result = uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u", assets=tmp_path / "own")
    assert result.notes == ()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "u" / name).read_bytes() == (tmp_path / "own" / name).read_bytes()
    config = model.config()
    made = json.loads((tmp_path / "u" / "config.json").read_text())
    assert made == config | {"quantization_config": {"quant_method": "uqff"}}
    wrong = {
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 63,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "head_dim": 32,
    }
    for key, value in wrong.items():
        (tmp_path / "own" / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(FormatError, match="not the file's model") as caught:
            uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "no", assets=tmp_path / "own")
        assert (caught.value.field, caught.value.got) == (key, value)
    (tmp_path / "own" / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen2ForCausalLM"]}))
    with pytest.raises(FormatError, match="not the file's architecture: expected LlamaForCausalLM or Mistral"):
        uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "no", assets=tmp_path / "own")
    assert not (tmp_path / "no").exists()


def test_progress_and_split_files(tmp_path: Path) -> None:
    """A split set is one model; each layer is reported with its bytes."""
    write_gguf(tiny(), tmp_path / "a.gguf", "q4_0")
    write_gguf(tiny(), tmp_path / "s.gguf", "q4_0", split_max_tensors=5)
    steps: list[Step] = []
    parts = sorted(tmp_path.glob("s-*.gguf"))
    assert len(parts) == 3
    convert(tmp_path / "a.gguf", tmp_path / "u")
    convert(parts[1], tmp_path / "v", progress=steps.append)
    assert layers(tmp_path / "u") == layers(tmp_path / "v")
    assert [step.key for step in steps] == sorted(layers(tmp_path / "u"))
    assert (steps[-1].done, steps[-1].work_done) == (steps[-1].total, steps[-1].work)
    back: list[str] = []
    convert(tmp_path / "v", tmp_path / "b.gguf", progress=lambda step: back.append(step.key))
    assert back == list(dict.fromkeys(back))
    assert set(back) == set(tensors(tmp_path / "b.gguf"))


def test_the_gguf_package_reads_what_is_written(tmp_path: Path) -> None:
    """Names, shapes and bytes by its own reader; the metadata that a llama.cpp needs is there."""
    import gguf as package

    write_gguf(tiny(), tmp_path / "a.gguf", "q6k")
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    (tmp_path / "u" / KEPT_NAME).unlink()  # all of the metadata is made of config.json and the tokenizer
    gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf")
    before, after = package.GGUFReader(tmp_path / "a.gguf"), package.GGUFReader(tmp_path / "b.gguf")
    seen = {t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in after.tensors}
    assert seen == {t.name: (t.tensor_type, t.shape.tolist(), t.data.tobytes()) for t in before.tensors}
    for key in before.fields:
        if key.startswith("llama.") or key == "general.architecture":
            assert after.fields[key].contents() == before.fields[key].contents(), key
    assert after.fields["general.file_type"].contents() == package.LlamaFileType.MOSTLY_Q6_K
    assert after.fields["general.quantization_version"].contents() == package.GGML_QUANT_VERSION


REFUSED = ["hqq4", "hqq8", "fp8", "afq2", "afq8", "f8q8"]


@pytest.mark.parametrize("kind", REFUSED)
def test_families_that_gguf_does_not_have(tmp_path: Path, kind: str) -> None:
    """All such layers are listed, and no file is begun."""
    model = tiny(layers=2)
    model.write(tmp_path / "u")
    weights = {name.removesuffix(".weight"): torch.from_numpy(v) for name, v in model.tensors().items() if v.ndim == 2}
    mixed = {name: uqff.quantize(v, kind if "mlp" in name else "q8_0") for name, v in weights.items()}
    uqff.save(mixed, tmp_path / "u" / "m.uqff", version=(1, 2, 0))
    with pytest.raises(UnsupportedError, match="6 layers of types that GGUF does not have") as caught:
        gguf_of_uqff(tmp_path / "u" / "m.uqff", tmp_path / "b.gguf")
    assert str(caught.value).count(f"({mixed['model.layers.0.mlp.up_proj'].kind})") == 6
    assert not (tmp_path / "b.gguf").exists()


def broken_files(folder: Path) -> Iterator[tuple[str, Path, dict[str, Any], type[UqffError], str]]:
    """Files that are sound GGUF and no model that can be carried over, with what must be said."""

    def made(name: str, **options: Any) -> Path:
        path = folder / f"{name}.gguf"
        write_gguf(options.pop("model", tiny()), path, options.pop("kind", "q8_0"), **options)
        return path

    ones = np.ones(4, np.float32)
    yield "extra", made("extra", extra={"blk.0.strange.weight": ones}), {}, UnsupportedError, "blk.0.strange.weight"
    yield "experts", made("experts", metadata={"llama.expert_count": 8}), {}, FormatError, "llama.expert_used_count"
    of_others = {"model": tiny("qwen2"), "metadata": {"qwen2.expert_count": 8}}
    yield "others", made("others", **of_others), {}, UnsupportedError, "experts of this architecture"
    yield "rotary", made("rotary", metadata={"llama.attention.value_length": 32}), {}, FormatError, "several sizes"
    yield "unknown", made("unknown", metadata={"llama.logit_scale": 1}), {}, UnsupportedError, "llama.logit_scale"
    yield "factors", made("factors", extra={"rope_freqs.weight": ones}), {}, UnsupportedError, "rotary factors"
    sizes = {"model": tiny("qwen2"), "metadata": {"qwen2.attention.key_length": 128}}
    yield "sizes", made("sizes", **sizes), {}, ShapeError, "blk.0.attn_k.weight"
    yield "version", made("version"), {"version": "3.0"}, UnsupportedError, "unknown version"
    yield "dtype", made("dtype"), {"dtype": "f64"}, UnsupportedError, "unknown dtype"


def test_what_cannot_be_carried_over_is_refused(tmp_path: Path) -> None:
    """Before anything is written."""
    for name, path, options, error, words in broken_files(tmp_path):
        with pytest.raises(error) as caught:
            uqff_of_gguf(path, tmp_path / "out", **options)
        assert words in str(caught.value), (name, str(caught.value))
        assert not (tmp_path / "out").exists()


def test_types_that_uqff_does_not_have_are_all_named(tmp_path: Path) -> None:
    foreign = [Tensor(f"blk.{n}.attn_q.weight", (256, 1), 16 + n % 2, bytes(96)) for n in range(12)]
    (tmp_path / "i.gguf").write_bytes(gguf([pair("general.architecture", "text", "llama")], foreign))
    with pytest.raises(UnsupportedError, match="12 tensors of types that UQFF does not have") as caught:
        uqff_of_gguf(tmp_path / "i.gguf", tmp_path / "out")
    assert "blk.0.attn_q.weight (IQ2_XXS), blk.1.attn_q.weight (IQ2_XS)" in str(caught.value)
    assert ", and 2 more (" in str(caught.value)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_types_that_uqff_does_not_have_are_quantised_again_on_request(
    tmp_path: Path, architecture: Architecture
) -> None:
    """What becomes of them is what the package's numbers are quantised to, in the model's order of rows."""
    model = tiny(architecture)
    write_gguf(model, tmp_path / "a.gguf", "tq2_0", kinds={"v_proj": "q6k", "up_proj": "mxfp4", "lm_head": "f16"})
    with pytest.raises(UnsupportedError, match="6 tensors of types that UQFF does not have") as caught:
        uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    assert "a type for them (--requantize KIND)" in str(caught.value)
    result = uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u", requantize="q4_0")
    assert result.types == {"q4_0": 6, "q6k": 1, "mxfp4": 1, "f16": 1}
    assert "quantised anew, from types that UQFF does not have: 6 TQ2_0" in result.notes
    found, weights = layers(tmp_path / "u"), model.tensors()
    for name in ("model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        type = package.GGMLQuantizationType.TQ2_0
        numbers = quants.dequantize(quants.quantize(weights[f"{name}.weight"], type), type)
        values = weights.get(f"{name}.bias")
        bias = None if values is None else torch.from_numpy(values)
        assert found[name] == Layer(uqff.quantize(numbers, "q4_0"), bias), name
    type = package.GGMLQuantizationType.MXFP4
    numbers = quants.dequantize(quants.quantize(weights["model.layers.0.mlp.up_proj.weight"], type), type)
    assert np.array_equal(found["model.layers.0.mlp.up_proj"].weight.dequantize().numpy(), numbers)
    older = uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "v", requantize="hqq4", version="0.2", dtype="bf16")
    assert older.types == {"hqq4": 5, "q6k": 1, "mxfp4": 1, "unquant": 1}


def test_a_model_that_lacks_something(tmp_path: Path) -> None:
    """A bias that Qwen2 must have; a norm; a layer of the UQFF; a tensor of the residual."""
    for missing in ("model.layers.0.self_attn.k_proj.bias", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        write_gguf(tiny("qwen2"), tmp_path / "a.gguf", "q8_0", without=[missing])
        with pytest.raises(FormatError, match="the file lacks a tensor") as caught:
            uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "out")
        assert caught.value.field == gguf_name(missing)
    write_gguf(tiny(), tmp_path / "a.gguf", "q8_0")
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    (tmp_path / "u" / "residual.safetensors").unlink()
    with pytest.raises(FormatError, match="the residual lacks a tensor"):
        gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf")
    config = json.loads((tmp_path / "u" / "config.json").read_text())
    (tmp_path / "u" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    with pytest.raises(FormatError, match=r"not the layers of the configuration.*7 missing, 0 superfluous"):
        gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_parameters", 1),
        ("rope_theta", "x"),
        ("rope_scaling", {"rope_type": "llama3"}),
        ("rope_scaling", {"rope_type": "yarn"}),
        ("num_key_value_heads", "2"),
        ("head_dim", 0),
        ("hidden_size", 512),
        ("vocab_size", 65),
        ("rms_norm_eps", None),
        ("architectures", [3]),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit(tmp_path: Path, key: str, value: object) -> None:
    """Both ways: numbers of the wrong kind, another model's numbers; never a file that contradicts itself."""
    model = tiny()
    model.write(tmp_path / "own")
    write_gguf(model, tmp_path / "a.gguf", "q8_0")
    uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u")
    (tmp_path / "own" / "config.json").write_text(json.dumps({**model.config(), key: value}))
    with pytest.raises(UqffError):
        gguf_of_uqff(tmp_path / "u", tmp_path / "b.gguf", assets=tmp_path / "own")
    assert not (tmp_path / "b.gguf").exists()
    if key != "rope_scaling":
        with pytest.raises(UqffError):
            uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "v", assets=tmp_path / "own")
        assert not (tmp_path / "v").exists()
    else:
        uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "v", assets=tmp_path / "own")


def test_direction(tmp_path: Path) -> None:
    """By what the source is, whatever it is called; ``to`` only makes sure."""
    write_gguf(tiny(), tmp_path / "a.gguf", "q8_0")
    (tmp_path / "a.gguf").rename(tmp_path / "a.bin")
    assert convert(tmp_path / "a.bin", tmp_path / "u", to="uqff").format == "UQFF 1.2.0"
    assert convert(tmp_path / "u", tmp_path / "b", to="gguf").format == "GGUF 3"
    for source, to in ((tmp_path / "a.bin", "gguf"), (tmp_path / "u", "uqff")):
        with pytest.raises(UnsupportedError, match="already"):
            convert(source, tmp_path / "c", to=to)
    with pytest.raises(FileExistsError, match="exists"):
        convert(tmp_path / "u", tmp_path / "b")
    with pytest.raises(FileExistsError, match="is not a file"):
        convert(tmp_path / "u", tmp_path / "u", force=True)
    before = (tmp_path / "b").read_bytes()
    assert convert(tmp_path / "u", tmp_path / "b", force=True).nbytes == len(before)
    assert (tmp_path / "b").read_bytes() == before


def test_what_the_engine_cannot_load_is_refused_strictly(tmp_path: Path) -> None:
    """Before anything is written."""
    write_gguf(tiny("qwen2"), tmp_path / "a.gguf", "q4_0")
    with pytest.raises(UnsupportedError, match=r"could not load or run this.*3 biases of GGUF layers in F32"):
        uqff_of_gguf(tmp_path / "a.gguf", tmp_path / "u", strict=True)
    assert not (tmp_path / "u").exists()
