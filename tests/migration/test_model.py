"""What a migration makes of experts, biases, heads and embeddings; what it notes, copies and refuses."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import uqff
from tests.support.golden_models import GOLDEN
from tests.support.roundtrip import same_bytes
from tests.support.small_models import (
    SmallModel,
    config_of,
    entries_of,
    files_of,
    llama,
    random_record,
    write_v0,
    write_v1,
)
from uqff import Layer, Version
from uqff.checkpoints.model import ModelDirectory
from uqff.container.mapped import MappedFile
from uqff.container.report import REPORT_NAME, check_output, check_report, read_report, write_report
from uqff.errors import FormatError, ShapeError, ShardError, UnsupportedError
from uqff.families import Unquant
from uqff.families.stacking import stack
from uqff.migration import migrate, plan_migration
from uqff.models.architectures import layer_names
from uqff.models.names import with_stacked_experts

MIXTRAL = SmallModel(config_of("Mixtral"), {}, False, 11)
EXPERTS = "model.layers.0.block_sparse_moe.experts."


def with_kind(model: SmallModel, kind: str) -> SmallModel:
    """All layers of one type."""
    return replace(model, kinds={name.key: kind for name in layer_names(model.config)})


def warnings_of(folder: Path, to: str = "1.2", **options: Any) -> list[str]:
    with ModelDirectory(folder) as directory:
        return plan_migration(directory, to, **options).warnings


def metadata_of(path: Path) -> dict[str, str]:
    file = MappedFile(path)
    file.close()
    return file.header.metadata


# What is noted.


def test_the_files_of_1_x_say_what_they_were(tmp_path: Path) -> None:
    """The usual version of the blobs, and those of the others."""
    write_v0(llama(), tmp_path / "old", version=(0, 1, 3), versions={"5": Version(0, 1, 0), "2": Version(0, 2, 0)})
    migrate(tmp_path / "old", tmp_path / "new")
    metadata = metadata_of(tmp_path / "new" / "q8_0-0.uqff")
    assert metadata["uqff.migrated_from"] == "0.1.3"
    assert json.loads(metadata["uqff.migrated_from.layers"]) == {"2": "0.2.0", "5": "0.1.0"}
    assert (metadata["uqff.producer"], metadata["uqff.version"]) == ("uqff", "1.2.0")
    migrate(tmp_path / "new", tmp_path / "1.1", version="1.1")
    assert metadata_of(tmp_path / "1.1" / "q8_0-0.uqff") == metadata | {"uqff.version": "1.1.0"}
    migrate(tmp_path / "1.1", tmp_path / "back", version="0.1")
    with uqff.open(tmp_path / "back") as file:
        found = {key: file.fields(key)[1]["version"] for key in file}
    # 0.2.0 is newer than what was asked for.
    assert found == {key: Version(0, 1, 0) if key == "5" else Version(0, 1, 3) for key in found}


def test_what_was_never_0_x_gets_the_version_of_the_format(tmp_path: Path) -> None:
    write_v1(llama(), tmp_path / "old", Version(1, 1, 0))
    for to, version in (("0.1", (0, 1, 3)), ("0.2", (0, 2, 0))):
        migrate(tmp_path / "old", tmp_path / to, version=to)
        with uqff.open(tmp_path / to) as file:
            assert {file.fields(key)[1]["version"] for key in file} == {version}


@pytest.mark.parametrize(
    "metadata",
    [
        {"uqff.migrated_from": "one"},
        {"uqff.migrated_from": "0.1"},
        {"uqff.migrated_from": "0.1.3", "uqff.migrated_from.layers": "{"},
        {"uqff.migrated_from": "0.1.3", "uqff.migrated_from.layers": "[]"},
        {"uqff.migrated_from": "0.1.3", "uqff.migrated_from.layers": '{"0": 3}'},
        {"uqff.migrated_from": "0.1.3", "uqff.migrated_from.layers": '{"0": "x"}'},
    ],
)
def test_notes_that_are_none_are_refused(tmp_path: Path, metadata: dict[str, str]) -> None:
    write_v1(llama(), tmp_path / "old", Version(1, 1, 0))
    path = tmp_path / "old" / "q8_0-0.uqff"
    save_file(load_file(path), path, metadata)
    with pytest.raises(FormatError, match=r"field uqff\.migrated_from"):
        migrate(tmp_path / "old", tmp_path / "new", version="0.2")


def test_versions_that_no_reader_has_are_not_written(tmp_path: Path) -> None:
    """A note of a version that never was."""
    write_v1(llama(), tmp_path / "old", Version(1, 1, 0))
    path = tmp_path / "old" / "q8_0-0.uqff"
    save_file(load_file(path), path, {"uqff.migrated_from": "0.0.9"})
    with pytest.raises(UnsupportedError, match="unknown version"):
        migrate(tmp_path / "old", tmp_path / "new", version="0.2")


def test_a_report_is_written_and_agrees(tmp_path: Path) -> None:
    """Of 1.x only; it names each model by its type."""
    migrate(GOLDEN / "v0" / "llama-96-f32", tmp_path / "new")
    report = read_report(tmp_path / "new")
    assert report is not None
    assert list(check_report(report, tmp_path / "new")) == []
    written = (tmp_path / "new" / REPORT_NAME).read_bytes()
    write_report(report, tmp_path / "new")
    assert (tmp_path / "new" / REPORT_NAME).read_bytes() == written, "whoever writes a report writes the same bytes"
    assert {output.quant for output in report.outputs} == {"hqq4", "q2k", "q3k", "q4k", "q5k", "q6k", "q8k"}
    for output in report.outputs:
        with uqff.open(tmp_path / "new" / output.shards[0]) as file:
            assert list(check_output(output, file)) == []
    migrate(tmp_path / "new", tmp_path / "back", version="0.2")
    assert not (tmp_path / "back" / "uqff_report.json").exists()


def test_files_beside_the_model(tmp_path: Path) -> None:
    """What loaders read is copied; what is not copied is named."""
    write_v0(llama(), tmp_path / "old")
    for name in ("chat_template.jinja", "README.md", "notes.txt"):
        (tmp_path / "old" / name).write_text(name)
    made = migrate(tmp_path / "old", tmp_path / "new")
    assert made.copied == ["config.json", "tokenizer.json", "chat_template.jinja"]
    assert made.left == ["README.md", "notes.txt"]
    names = {*made.copied, "residual.safetensors", "q8_0-0.uqff", "uqff_report.json"}
    assert set(os.listdir(tmp_path / "new")) == names
    for name in made.copied[1:]:
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "old" / name).read_bytes()
    named = b'{\n  "quantization_config": {"quant_method": "uqff"},'
    assert (tmp_path / "new" / "config.json").read_bytes() == (
        (tmp_path / "old" / "config.json").read_bytes().replace(b"{", named, 1)
    )


def test_one_file_of_a_directory_with_several(tmp_path: Path) -> None:
    """Named, it is the only one migrated; also where it has no number."""
    write_v0(llama(), tmp_path / "old")
    shutil.copy(tmp_path / "old" / "q8_0-0.uqff", tmp_path / "old" / "my-model-q8_0.uqff")
    made = migrate(tmp_path / "old" / "my-model-q8_0.uqff", tmp_path / "one")
    assert made.shards == {"my-model-q8_0": ["my-model-q8_0-0.uqff"]}
    report = read_report(tmp_path / "one")
    assert report is not None
    assert [output.quant for output in report.outputs] == ["q8_0"]
    made = migrate(tmp_path / "old", tmp_path / "both")
    assert sorted(made.shards) == ["my-model-q8_0", "q8_0"]
    shutil.copy(tmp_path / "old" / "q8_0-0.uqff", tmp_path / "old" / "q8_0.uqff")
    with pytest.raises(ShardError, match="two models of one name"):
        migrate(tmp_path / "old", tmp_path / "no")


def test_models_of_two_generations_do_not_mix(tmp_path: Path) -> None:
    write_v0(llama(), tmp_path / "old")
    migrate(tmp_path / "old", tmp_path / "new")
    shutil.copy(tmp_path / "new" / "q8_0-0.uqff", tmp_path / "old" / "other.uqff")
    with pytest.raises(ShardError, match="models of two generations"):
        migrate(tmp_path / "old", tmp_path / "no")


# Experts.


def test_experts_that_are_unlike_are_named(tmp_path: Path) -> None:
    """By number and index, with what they are and what the others are."""
    layers = write_v0(MIXTRAL, tmp_path / "old")
    names = {name.module: str(name.index) for name in layer_names(MIXTRAL.config)}
    index = names[f"{EXPERTS}1.w3"]
    layers[index] = Layer(random_record("q4_0", (96, 64), 1))
    uqff.save(layers, tmp_path / "old" / "q8_0-0.uqff")
    with pytest.raises(UnsupportedError, match=r"1 layer cannot be expressed in 1\.2\.0") as caught:
        migrate(tmp_path / "old", tmp_path / "new")
    assert caught.value.layer == f"{EXPERTS}up_proj"
    wanted = f"experts are unlike: expert 1 (index {index}) is q4_0 [96, 64], the others are q8_0 [96, 64]"
    assert caught.value.got == wanted
    assert not (tmp_path / "new").exists()
    migrate(tmp_path / "old", tmp_path / "plain", plain_experts=True)
    with uqff.open(tmp_path / "plain") as file:
        weight = file[f"{EXPERTS}up_proj"].weight
        assert isinstance(weight, Unquant)
        experts = [layers[names[f"{EXPERTS}{e}.w3"]].weight.dequantize(torch.bfloat16) for e in range(3)]
        assert same_bytes(weight.weight, torch.stack(experts))
        assert file[f"{EXPERTS}down_proj"].weight.kind == "q8_0"


@pytest.mark.parametrize("kind", ["fp8", "hqq8", "f8q8"])
def test_stacks_that_1_2_does_not_read(tmp_path: Path, kind: str) -> None:
    """All are listed; 1.1 has them where they stack exactly; dequantised, they go anywhere."""
    write_v0(with_kind(MIXTRAL, kind), tmp_path / "old")
    with ModelDirectory(tmp_path / "old") as directory:
        problems = plan_migration(directory).problems
    assert [problem.layer for problem in problems] == [
        f"model.layers.{block}.block_sparse_moe.experts.{name}_proj"
        for block in range(2)
        for name in ("gate", "down", "up")
    ]
    assert all("no longer exist" in problem.reason for problem in problems)
    with pytest.raises(UnsupportedError, match=r"6 layers cannot be expressed in 1\.2\.0.*--plain-experts"):
        migrate(tmp_path / "old", tmp_path / "new")
    migrate(tmp_path / "old", tmp_path / "plain", plain_experts=True)
    with uqff.open(tmp_path / "plain") as file:
        assert {layer.weight.kind for layer in file.values()} == {kind, "unquant"}
    if kind == "f8q8":
        migrate(tmp_path / "old", tmp_path / "1.1", version="1.1")
        migrate(tmp_path / "1.1", tmp_path / "back", version="0.2")
        assert files_of(tmp_path / "back") == files_of(tmp_path / "old")
    else:  # of random scales, each expert has others
        with pytest.raises(UnsupportedError, match="weights do not stack"):
            migrate(tmp_path / "old", tmp_path / "1.1", version="1.1")


def test_experts_that_were_stacked_before_stay_stacked(tmp_path: Path) -> None:
    """Files of builds for Metal and CUDA: three layers in the place of three for each expert, also on the way back."""
    model = SmallModel(config_of("Qwen3Moe"), {}, False, 13)
    write_v0(model, tmp_path / "old")
    names = with_stacked_experts(layer_names(model.config))
    apart = {name.module: model.layer(name).weight for name in layer_names(model.config)}
    layers = {}
    for name in names:
        experts = (
            [apart[f"{name.key.rpartition('.')[0]}.{e}.{name.key.rpartition('.')[2]}"] for e in range(2)]
            if name.stacked
            else []
        )
        layers[name.index] = Layer(stack(experts) if experts else apart[name.module])
    uqff.save(layers, tmp_path / "old" / "q8_0-0.uqff", version=(0, 1, 3))
    migrate(tmp_path / "old", tmp_path / "new")
    with uqff.open(tmp_path / "new") as file:
        assert file["model.layers.0.mlp.experts.up_proj"].weight.shape == (2, 32, 64)
    migrate(tmp_path / "new", tmp_path / "back", version="0.2")
    assert files_of(tmp_path / "back") == files_of(tmp_path / "old")


def test_another_number_of_experts_is_refused(tmp_path: Path) -> None:
    write_v1(MIXTRAL, tmp_path / "old")
    config = MIXTRAL.config | {"num_local_experts": 2}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ShapeError, match=r"expected a stack of 2, got \[3, 96, 64\].*experts\.gate_proj"):
        migrate(tmp_path / "old", tmp_path / "new", version="0.2")


# Down: what 0.x has no place for.


def test_layers_without_an_index_are_listed(tmp_path: Path) -> None:
    layers = write_v1(llama(), tmp_path / "old")
    layers["visual.proj"] = layers.pop("model.layers.0.mlp.up_proj")
    uqff.save(layers, tmp_path / "old" / "q8_0-0.uqff", version=(1, 2, 0))
    with ModelDirectory(tmp_path / "old") as directory:
        assert plan_migration(directory, "0.2").problems == [
            ("model.layers.0.mlp.up_proj", "no such layer in the file, and 0.x needs one of index 6"),
            ("visual.proj", "0.x has no index for it"),
        ]
    with pytest.raises(UnsupportedError, match=r"2 layers cannot be expressed in 0\.2\.0"):
        migrate(tmp_path / "old", tmp_path / "new", version="0.2")


def test_families_that_the_version_has_not(tmp_path: Path) -> None:
    write_v0(with_kind(llama(), "mxfp4"), tmp_path / "old")
    with pytest.raises(UnsupportedError, match=r"8 layers cannot be expressed in 0\.1\.3: got MXFP4 blobs"):
        migrate(tmp_path / "old", tmp_path / "new", version="0.1")
    write_v0(with_kind(llama(), "unquant"), tmp_path / "plain")
    with pytest.raises(UnsupportedError, match=r"8 layers cannot be expressed in 1\.0\.0: got Unquant layers"):
        migrate(tmp_path / "plain", tmp_path / "new", version="1.0")


def test_a_quantised_embedding_is_kept_and_dense(tmp_path: Path) -> None:
    """Untied: its codes lie beside the model, as a 1.x file; the residual has what they stand for, in its own dtype."""
    write_v1(llama(), tmp_path / "old")
    migrate(tmp_path / "old", tmp_path / "new", version="0.2")
    kept = tmp_path / "new" / "q8_0.kept.safetensors"
    with uqff.open(tmp_path / "old") as old, uqff.open(tmp_path / "new") as new, uqff.open(kept) as beside:
        assert list(beside) == ["model.embed_tokens"]
        assert beside["model.embed_tokens"] == old["model.embed_tokens"]
        dense = new.residual["model.embed_tokens.weight"]
        assert same_bytes(dense, old["model.embed_tokens"].weight.dequantize(torch.bfloat16))
        assert new["0"] == old["lm_head"]
    metadata = metadata_of(tmp_path / "new" / "residual.safetensors")
    assert json.loads(metadata["uqff.dequantized"]) == ["model.embed_tokens.weight"]


def test_without_its_codes_the_embedding_stays_dense(tmp_path: Path) -> None:
    """Whoever throws the kept file away has a sound model all the same, and is told."""
    write_v1(llama(), tmp_path / "old")
    migrate(tmp_path / "old", tmp_path / "new", version="0.2")
    (tmp_path / "new" / "q8_0.kept.safetensors").unlink()
    assert any("its codes are not there" in warning for warning in warnings_of(tmp_path / "new"))
    migrate(tmp_path / "new", tmp_path / "back")
    assert entries_of(tmp_path / "back").keys() == entries_of(tmp_path / "old").keys() - {"model.embed_tokens"}
    assert (tmp_path / "back" / "residual.safetensors").read_bytes() == (
        tmp_path / "new" / "residual.safetensors"
    ).read_bytes()


def test_the_best_embedding_of_several_models_is_the_dense_one(tmp_path: Path) -> None:
    """They share a residual; each gets its own codes back."""
    model = llama()
    write_v1(model, tmp_path / "old")
    other = replace(model, kinds={"model.embed_tokens": "q4_0"})
    write_v1(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "q8_0-0.uqff", tmp_path / "old" / "q4_0-0.uqff")
    migrate(tmp_path / "old", tmp_path / "new", version="0.2")
    with uqff.open(tmp_path / "old" / "q8_0-0.uqff") as old, uqff.open(tmp_path / "new" / "q8_0-0.uqff") as new:
        dense = new.residual["model.embed_tokens.weight"]
        assert same_bytes(dense, old["model.embed_tokens"].weight.dequantize(torch.bfloat16))
    migrate(tmp_path / "new", tmp_path / "back")
    for name in ("q8_0-0.uqff", "q4_0-0.uqff"):
        with uqff.open(tmp_path / "old" / name) as old, uqff.open(tmp_path / "back" / name) as back:
            assert {key: old[key] for key in old} == {key: back[key] for key in back}
    (tmp_path / "new" / "q4_0.kept.safetensors").unlink()
    with pytest.raises(FormatError, match="some models of the directory have the codes"):
        migrate(tmp_path / "new", tmp_path / "no")


def test_entries_of_no_layer_are_named(tmp_path: Path) -> None:
    write_v1(llama(), tmp_path / "old", Version(1, 1, 0))
    path = tmp_path / "old" / "q8_0-0.uqff"
    save_file(load_file(path) | {"mark": torch.zeros(1)}, path)
    assert warnings_of(tmp_path / "old") == ["q8_0: entries that belong to no layer are left out: mark"]


# Heads and biases.


@pytest.mark.parametrize("architecture", ["Llama", "Gemma3"])
def test_untied_in_the_configuration_only(tmp_path: Path, architecture: str) -> None:
    """The engine then loads head and embedding apart; everything else is the same."""
    model = SmallModel(config_of(architecture, tie_word_embeddings=True), {}, False, 17)
    write_v0(model, tmp_path / "old")
    assert [warning[:28] for warning in warnings_of(tmp_path / "old")] == ["head and embedding are tied:"]
    migrate(tmp_path / "old", tmp_path / "tied")
    made = migrate(tmp_path / "old", tmp_path / "untied", untie=True)
    assert made.copied == ["config.json", "tokenizer.json"]
    tied, untied = files_of(tmp_path / "tied"), files_of(tmp_path / "untied")
    config = json.loads(untied.pop("config.json"))
    method = {"quantization_config": {"quant_method": "uqff"}}
    assert json.loads(tied.pop("config.json")) == model.config | method
    assert config.pop("quantization_config") == method["quantization_config"]
    assert config["tie_word_embeddings"] is False
    text = config.get("text_config", config)
    assert text == model.config.get("text_config", model.config) | {"tie_word_embeddings": False}
    assert untied == tied


def test_nothing_to_untie(tmp_path: Path) -> None:
    write_v0(llama(), tmp_path / "old")
    with pytest.raises(UnsupportedError, match="nothing to untie"):
        migrate(tmp_path / "old", tmp_path / "new", untie=True)


@pytest.mark.parametrize(
    ("kind", "stored", "fixed", "back"),
    [
        ("fp8", torch.float8_e4m3fn, torch.bfloat16, torch.bfloat16),
        ("mxfp4", torch.bfloat16, None, None),
        ("q8_0", torch.float32, torch.bfloat16, torch.float32),
        ("f8q8", torch.float32, torch.bfloat16, torch.float32),
        ("hqq8", torch.float32, None, None),
        ("unquant", torch.bfloat16, None, None),
    ],
)
def test_biases_that_the_engine_cannot_add(
    tmp_path: Path, kind: str, stored: torch.dtype, fixed: torch.dtype | None, back: torch.dtype | None
) -> None:
    """Kept as they are with a warning, or changed: to the dtype of the activations, but of HQQ, and below 1.0 of GGUF
    and F8Q8, to float32.
    """
    write_v0(replace(with_kind(llama(), kind), biased=True), tmp_path / "old")

    def bias_of(folder: str, key: str) -> torch.Tensor:
        with uqff.open(tmp_path / folder) as file:
            bias = file[key].bias
            assert bias is not None
            return bias.clone()

    query = "model.layers.0.self_attn.q_proj"
    hinted = any("--fix-biases changes them" in warning for warning in warnings_of(tmp_path / "old"))
    assert hinted is (fixed is not None)
    migrate(tmp_path / "old", tmp_path / "new")
    assert same_bytes(bias_of("new", query), torch.full((64,), 0.5).to(stored))
    migrate(tmp_path / "old", tmp_path / "fixed", fix_biases="load")
    assert same_bytes(bias_of("fixed", query), torch.full((64,), 0.5).to(fixed or stored))
    migrate(tmp_path / "fixed", tmp_path / "back", version="0.2", fix_biases="load")
    assert same_bytes(bias_of("back", "1"), torch.full((64,), 0.5).to(back or stored))
    with ModelDirectory(tmp_path / "fixed") as directory:
        (planned,) = plan_migration(directory).models
    # Whatever is in the load dtype runs with activations in it, and with none else; HQQ with all.
    assert {limit.rule for limit in planned.limits} - {"weight-in-one-dtype"} == (
        set() if kind == "hqq8" else {"bias-in-one-dtype"}
    )


def test_biases_for_activations_of_another_dtype(tmp_path: Path) -> None:
    """A model that was loaded in bfloat16 and is to run in float32."""
    write_v0(replace(with_kind(llama(), "unquant"), biased=True), tmp_path / "old")
    migrate(tmp_path / "old", tmp_path / "new", fix_biases="f32")
    with uqff.open(tmp_path / "new") as file:
        assert {layer.bias.dtype for layer in file.values() if layer.bias is not None} == {torch.float32}
    with pytest.raises(UnsupportedError, match="field fix_biases"):
        migrate(tmp_path / "old", tmp_path / "no", fix_biases="f64")


def test_types_that_no_engine_loads_are_named(tmp_path: Path) -> None:
    assert warnings_of(GOLDEN / "v0" / "llama-edge-64-f32" / "q8_1-0.uqff") == [
        "q8_1: 8 q8_1 layers: no release loads this type, though all write it"
    ]
