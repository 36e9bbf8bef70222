"""`uqff checksum`: lists, checks, exit codes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.support.samples import write
from tests.support.tiny_files import unquant, write_file
from uqff.cli import main


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["checksum", *map(str, arguments)])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a model of one layer, its head."""
    write_file(tmp_path / "m.uqff", {"0": unquant([1.0, 2.0])})
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_list_of_files(model: Path) -> None:
    """One line a file, as sha256sum prints it; of a file, that one."""
    lines = [f"{sha256(model / name)}  {name}" for name in ("config.json", "m.uqff")]
    assert run(model).output.splitlines() == lines
    assert run(model / "m.uqff").output.splitlines() == lines[1:]


def test_write_and_check(model: Path) -> None:
    """What was written is right until something changes; what changed or went is named, what came does not count."""
    assert run(model, "--write").output == ""
    assert (model / "SHA256SUMS").read_text() == run(model).output
    (model / "new").touch()
    result = run(model, "--check")
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "config.json: OK",
        "m.uqff: OK",
        "new: not in the list",
        "2 of 2 are as listed",
    ]
    (model / "config.json").unlink()
    write_file(model / "m.uqff", {"0": unquant([1.0, 3.0])})
    result = run(model, "--check")
    assert result.exit_code == 1
    assert result.output.splitlines()[:2] == ["config.json: missing", f"m.uqff: differs: {sha256(model / 'm.uqff')}"]
    assert run(model / "m.uqff", "--check").exit_code == 1
    document = json.loads(run(model, "--check", "--json").output)
    assert document["matches"] is False
    assert [row["matches"] for row in document["checks"]] == [False, False]
    assert document["unlisted"] == ["new"]


def test_a_list_elsewhere(model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """--sums names it; in the directory itself it is not one of its files."""
    elsewhere = tmp_path_factory.mktemp("lists") / "sums"
    for path in (elsewhere, model / "sums"):
        assert run(model, "--write", "--sums", path).exit_code == 0
        assert run(model, "--check", "--sums", path).exit_code == 0
    assert elsewhere.read_text() == (model / "sums").read_text()


def test_layers(model: Path) -> None:
    """Without names a layer has its number and the model no digest; the reason goes to the standard error."""
    result = run(model, "--layers")
    assert result.stdout.splitlines()[0].endswith("  0")
    assert "# model" not in result.stdout
    assert "uqff: layers have numbers, not paths: unknown architecture" in result.stderr
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    (model / "config.json").write_text(json.dumps(config))
    write(model / "m.uqff", {str(index): unquant([1.0, float(index)]) for index in range(8)})
    result = run(model, "--layers")
    *lines, last = result.stdout.splitlines()
    assert result.stderr == ""
    assert [line.split("  ")[1] for line in lines][:2] == ["lm_head", "model.layers.0.mlp.down_proj"]
    listing = "".join(f"{line}\n" for line in lines)
    assert last == f"# model {hashlib.sha256(listing.encode()).hexdigest()}"
    assert json.loads(run(model, "--layers", "--json").output)["model"] == last.split()[-1]


def test_check_of_layers(model: Path) -> None:
    """A layer that is not listed is a difference: the list is about a whole model."""
    assert run(model, "--layers", "--write").exit_code == 0
    assert run(model, "--layers", "--check").exit_code == 0
    write_file(model / "m.uqff", {"0": unquant([1.0, 2.0]), "1": unquant([1.0])})
    result = run(model, "--layers", "--check")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == ["0: OK", "1: not in the list", "1 of 1 are as listed"]


@pytest.mark.parametrize(
    "arguments", [["--write", "--check"], ["--sums", "x"], ["m.uqff"], ["--check"], ["--layers", "--check"]]
)
def test_a_wrong_call_is_2(model: Path, arguments: list[str]) -> None:
    """Contradictions, half a directory's list, a list that is not there."""
    path = [model / arguments[0], "--write"] if arguments == ["m.uqff"] else [model, *arguments]
    assert run(*path).exit_code == 2


def test_a_broken_layer_is_1(model: Path) -> None:
    """There is no digest of what cannot be read."""
    write_file(model / "m.uqff", {"0": unquant([1.0])[:-1]})
    result = run(model, "--layers")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "layer 0" in result.stderr
