"""Migration there and back: any architecture, types, versions and shards, to the last byte."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import uqff
from tests.support.golden_models import DIRECTORIES, GOLDEN
from tests.support.roundtrip import same_bytes
from tests.support.small_models import SmallModel, entries_of, files_of, residual_of, small_models, write_v0, write_v1
from uqff.codes import Version
from uqff.migration import migrate
from uqff.models.architectures import layer_names

EXAMPLES = settings(max_examples=25)
versions = st.sampled_from([Version(0, 1, 3), Version(0, 2, 0)])


@EXAMPLES
@given(small_models(), st.data())
def test_0_x_to_1_2_and_back_is_the_same_directory(model: SmallModel, data: st.DataObject) -> None:
    """Every byte of every file: versions of the blobs, boundaries of the shards, residual, configuration."""
    indices = [str(name.index) for name in layer_names(model.config)]
    others = data.draw(st.dictionaries(st.sampled_from(indices), st.just(Version(0, 2, 0)), max_size=2))
    needs_newer = any(kind in ("f8q8", "mxfp4") for kind in model.kinds.values())
    version = Version(0, 2, 0) if needs_newer else data.draw(versions)
    shard_bytes = data.draw(st.sampled_from([2_000, 20_000, 10 * 2**30]))
    with tempfile.TemporaryDirectory() as scratch:
        old, new, back = (Path(scratch) / name for name in ("old", "new", "back"))
        layers = write_v0(model, old, version=version, versions=others, shard_bytes=shard_bytes)
        migrate(old, new, shard_bytes=data.draw(st.sampled_from([3_000, 10 * 2**30])))
        made = entries_of(new)
        with uqff.open(new) as file:
            assert file.version == (1, 2, 0)
            for name in layer_names(model.config):
                weight, bias = file[name.key]
                weight = weight if name.expert is None else weight.unstack()[name.expert]
                assert uqff.Layer(weight, bias) == layers[str(name.index)]
        assert made.keys() == {name.key for name in layer_names(model.config)}
        assert (new / "residual.safetensors").read_bytes() == (old / "residual.safetensors").read_bytes()
        migrate(new, back, version="0.2", shard_bytes=shard_bytes)
        assert files_of(back) == files_of(old)


@EXAMPLES
@given(small_models(), st.sampled_from(["0.2", "1.1"]))
def test_1_2_down_and_up_again_has_the_same_entries(model: SmallModel, through: str) -> None:
    """The embedding's codes come back, and its dense copy goes, whether head and embedding are tied or not."""
    with tempfile.TemporaryDirectory() as scratch:
        old, new, back = (Path(scratch) / name for name in ("old", "new", "back"))
        write_v1(model, old)
        migrate(old, new, version=through)
        with uqff.open(new) as file:
            (dense,) = (name for name in file.residual if name.endswith("embed_tokens.weight"))
            with uqff.open(old) as first:
                weight = first[dense.removesuffix(".weight")].weight
                expected = weight.dequantize(file.residual[dense].dtype)
            assert same_bytes(file.residual[dense], expected)
        migrate(new, back)
        assert entries_of(back) == entries_of(old)
        assert residual_of(back) == residual_of(old)
        names = {path.name for path in back.iterdir()}
        assert names == {path.name for path in old.iterdir()} | {"uqff_report.json"}


@EXAMPLES
@given(small_models(), st.sampled_from([Version(1, 0, 0), Version(1, 1, 0)]))
def test_older_1_x_to_0_x_and_back_has_the_same_entries(model: SmallModel, version: Version) -> None:
    """Versions whose embedding is dense, as that of 0.x is."""
    if version == (1, 0, 0):
        kinds = {key: "q8_0" if kind == "unquant" else kind for key, kind in model.kinds.items()}
        model = SmallModel(model.config, kinds, model.biased, model.seed)
    with tempfile.TemporaryDirectory() as scratch:
        old, new, back = (Path(scratch) / name for name in ("old", "new", "back"))
        write_v1(model, old, version)
        migrate(old, new, version="0.2")
        migrate(new, back, version=f"{version.major}.{version.minor}")
        assert entries_of(back) == entries_of(old)
        assert (back / "residual.safetensors").read_bytes() == (old / "residual.safetensors").read_bytes()


@pytest.mark.parametrize("directory", DIRECTORIES)
def test_files_of_the_client_come_back(directory: str, tmp_path: Path) -> None:
    """All models of a golden directory at once, through every version of 1.x that has their families."""
    plain = any("unquant" in name for name in (directory, *DIRECTORIES[directory]["files"])) or "mixed" in directory
    for to in ("1.1", "1.2") if plain else ("1.0", "1.1", "1.2"):
        migrate(GOLDEN / directory, tmp_path / to, version=to)
        migrate(tmp_path / to, tmp_path / f"{to}-back", version="0.2")
        assert files_of(tmp_path / f"{to}-back") == files_of(GOLDEN / directory)


def test_layers_of_the_two_generations_are_the_same_bytes(tmp_path: Path) -> None:
    """What the 0.6.0 client stored before 1.0, the 0.9.5 client stores in 1.2: entry by entry, of the same weights."""
    folder = GOLDEN / "v1" / "1.2.0" / "llama-edge-64-f32"
    compared = 0
    for path in sorted(folder.glob("*-0.uqff")):
        kind = path.name.removesuffix("-0.uqff")
        migrate(GOLDEN / "v0" / "llama-edge-64-f32" / path.name, tmp_path / kind)
        ours = entries_of(tmp_path / kind)
        with uqff.open(path) as theirs:
            for key in theirs.keys() - {"lm_head", "model.embed_tokens"}:
                entries: dict[str, Any] = {s: (e.dtype, e.shape, bytes(e.data)) for s, e in theirs.entries(key).items()}
                if not kind.startswith("afq"):  # the releases disagree on the sign of zeros there
                    assert ours[key] == entries, (kind, key)
                compared += 1
    assert compared == 7 * len(list(folder.glob("*-0.uqff"))) > 0
