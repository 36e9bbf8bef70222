"""What lies beside a model is a file of its own: no pipe, no device, no link out of the directory; names are text."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.golden_models import TinyModel
from tests.support.tiny_files import unquant, write_file
from uqff.cli import main
from uqff.container.document import read_json, write_json
from uqff.container.mapped import MappedBytes
from uqff.container.report import REPORT_NAME
from uqff.conversion.direction import convert
from uqff.errors import FormatError
from uqff.export.dequantize import dequantize_model
from uqff.limits import MAX_CONFIG_BYTES
from uqff.migration import migrate
from uqff.models.assets import companions_of
from uqff.quantization.run import quantize_model

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")


def test_links_out_of_the_directory_are_refused_before_any_work(tmp_path: Path) -> None:
    """What a link leads to would be published with the model; the hub's own links into its store are none of these."""
    (tmp_path / "secret").write_text("root:x:0:0")
    TinyModel(architecture="qwen2", hidden_size=64, heads=2, intermediate_size=128).write(tmp_path / "source")
    quantize_model(tmp_path / "source", tmp_path / "model", ["q8_0"], version="0.2")
    for name in ("source", "model"):
        (tmp_path / name / "tokenizer.json").unlink(missing_ok=True)
        (tmp_path / name / "tokenizer.json").symlink_to(tmp_path / "secret")
    for work in (
        lambda: quantize_model(tmp_path / "source", tmp_path / "out", ["q8_0"]),
        lambda: migrate(tmp_path / "model", tmp_path / "out"),
        lambda: dequantize_model(tmp_path / "model", tmp_path / "out"),
    ):
        with pytest.raises(FormatError, match="link out of the directory") as caught:
            work()
        assert caught.value.file is not None
        assert caught.value.file.endswith("tokenizer.json")
        assert sorted(os.listdir(tmp_path)) == ["model", "secret", "source"]


def test_links_of_the_hub_and_to_a_neighbour_are_taken(tmp_path: Path) -> None:
    """``snapshots/<commit>/<name>`` leads to ``blobs/<hash>``."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "hash").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to(blobs / "hash")
    (snapshot / "vocab.json").symlink_to("tokenizer.json")
    assert companions_of(snapshot) == ["tokenizer.json", "vocab.json"]


@needs_pipes
def test_pipes_and_devices_are_no_files(tmp_path: Path) -> None:
    """Opening a pipe waits for a writer: for ever."""
    for name in ("tokenizer.json", "SHA256SUMS", "SHA256SUMS.layers", "x.bin"):
        os.mkfifo(tmp_path / name)
    model = write_file(tmp_path / "m.uqff", {"0": unquant([1.0])})
    for work in (
        lambda: companions_of(tmp_path),
        lambda: read_json(tmp_path / "tokenizer.json", MAX_CONFIG_BYTES),
        lambda: read_json(Path("/dev/zero"), MAX_CONFIG_BYTES),
        lambda: MappedBytes(Path("/dev/zero")),
        lambda: convert(tmp_path / "x.bin", tmp_path / "out"),
    ):
        with pytest.raises(FormatError, match="not a regular file"):
            work()
    for name in ("tokenizer.json", "x.bin"):
        result = CliRunner().invoke(main, ["checksum", str(model.parent)])
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == f"uqff: not a regular file (file {tmp_path / name})\n"
        (tmp_path / name).unlink()
    for layers, name in (([], "SHA256SUMS"), (["--layers"], "SHA256SUMS.layers")):
        result = CliRunner().invoke(main, ["checksum", "--check", *layers, str(model.parent)])
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr == f"uqff: not a regular file (file {tmp_path / name})\n"


def test_texts_that_are_not_unicode_are_refused_by_name(tmp_path: Path) -> None:
    """Names of files and arguments may be any bytes; JSON may not."""
    with pytest.raises(FormatError, match="text is not Unicode"):
        write_json(tmp_path / "x.json", {"a": "\udcff"})
    assert os.listdir(tmp_path) == []
    TinyModel(architecture="qwen2", hidden_size=64, heads=2, intermediate_size=128).write(tmp_path / "source")
    call = ["quantize", str(tmp_path / "source"), str(tmp_path / "out"), "--isq", "q8_0", "--quiet"]
    result = CliRunner().invoke(main, [*call, "--base-model", "\udcff"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("uqff: text is not Unicode")
    assert os.listdir(tmp_path) == ["source"]
    assert CliRunner().invoke(main, call).exit_code == 0
    before = (tmp_path / "out" / REPORT_NAME).read_bytes()
    result = CliRunner().invoke(main, ["report", "--write", "--repo-id", "\udcff", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert result.stderr.startswith("uqff: text is not Unicode")
    assert (tmp_path / "out" / REPORT_NAME).read_bytes() == before
