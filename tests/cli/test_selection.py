"""One model of a directory that holds several: ``MODEL:TYPE`` and ``--isq`` in every command that reads a model."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import uqff
from tests.parallel.models import write_tokenizer
from tests.support.golden_models import TinyModel
from uqff import ShardError
from uqff.cli import main
from uqff.container.shards import select

KINDS = ("q4k", "hqq8")
UP = "model.layers.0.mlp.up_proj"

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # of torch, see test_model.py


def call(*arguments: object) -> tuple[int, str, str]:
    """Exit code, output, errors."""
    result = CliRunner().invoke(main, list(map(str, arguments)))
    return result.exit_code, result.stdout, result.stderr


def document(*arguments: object) -> Any:
    """What a command that succeeds prints with ``--json``."""
    code, text, errors = call(*arguments, "--json")
    assert code == 0, errors
    return json.loads(text)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("selection") / "source"
    TinyModel(hidden_size=256, intermediate_size=256, heads=4, kv_heads=2, vocab_size=96).write(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(source: Path) -> Path:
    """As the README makes one: of two types."""
    target = source.parent / "model"
    assert call("quantize", source, target, *(f"--isq={kind}" for kind in KINDS), "--quiet")[0] == 0
    return target


@pytest.fixture(scope="module")
def older(source: Path) -> Path:
    """The same of 0.2."""
    target = source.parent / "older"
    options = [f"--isq={kind}" for kind in KINDS]
    assert call("quantize", source, target, *options, "--format=0.2", "--quiet")[0] == 0
    return target


def forms(model: Path, kind: str) -> list[tuple[object, ...]]:
    """The ways to name a model of several."""
    return [(f"{model}:{kind}",), (model, f"--isq={kind}"), (f"{model}:{kind.upper()}",), (model / f"{kind}-0.uqff",)]


@pytest.mark.parametrize("kind", KINDS)
def test_inspect(model: Path, kind: str) -> None:
    for form in forms(model, kind):
        (types,) = {layer["type"] for layer in document("inspect", *form)["layers"] if layer["key"] == UP}
        assert types == kind
        assert document("inspect", *form, UP)["layer"]["type"] == kind


def test_an_index_is_the_nth_layer_in_either_generation(model: Path, older: Path) -> None:
    """Counted in the order of the table, also with a dump; the API does the same."""
    for folder in (model, older):
        path = f"{folder}:q4k"
        rows = document("inspect", path)["layers"]
        with uqff.open(path) as file:
            assert [file.key(at) for at in range(len(file))] == [row["key"] for row in rows]
            assert file[3] == file[rows[3]["key"]]
            outside: tuple[Any, ...] = (-1, len(file), True)
            assert all(at not in file for at in outside)
            with pytest.raises(KeyError):
                file[len(file)]
        assert document("inspect", path, 3)["layer"]["key"] == rows[3]["key"]
        code, text, errors = call("inspect", path, 3, "--hex", "--no-stats")
        assert (code, errors) == (0, "")
        assert f"{rows[3]['offset']:08x}" in text
        code, _, errors = call("inspect", path, len(rows))
        assert code == 2
        assert f"no layer {len(rows)}; there are: {rows[0]['key']} to {rows[-1]['key']}, {len(rows)} layers" in errors


@pytest.mark.parametrize("kind", KINDS)
def test_verify(model: Path, tmp_path: Path, kind: str) -> None:
    """Only the one that is chosen is looked at."""
    other = KINDS[1 - KINDS.index(kind)]
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    (copy / f"{other}-0.uqff").write_bytes(b"broken")
    (copy / "uqff_report.json").unlink()
    assert call("verify", copy)[0] == 1
    for form in forms(copy, kind):
        code, text, _ = call("verify", *form)
        assert (code, text.startswith("clean: no violation in ")) == (0, True)


def test_diff(model: Path, source: Path) -> None:
    """Two of one directory; with a checkpoint on one side; one type on both sides."""
    between = document("diff", f"{model}:q4k", f"{model}:hqq8")
    (row,) = [row for row in between["layers"] if row["key"] == UP]
    assert (row["a"]["type"], row["b"]["type"]) == KINDS
    (row,) = [row for row in document("diff", source, model, "--isq=hqq8")["layers"] if row["key"] == UP]
    assert (row["a"]["type"], row["b"]["type"]) == ("f32", "hqq8")
    assert document("diff", model, model, "--isq", "q4k")["identical"] is True


@pytest.mark.parametrize("kind", KINDS)
def test_checksum(model: Path, kind: str) -> None:
    digest = hashlib.sha256((model / f"{kind}-0.uqff").read_bytes()).hexdigest()
    layers = [call("checksum", "--layers", model / f"{kind}-0.uqff")[1]]
    for form in forms(model, kind):
        assert call("checksum", *form)[:2] == (0, f"{digest}  {kind}-0.uqff\n")
        layers.append(call("checksum", "--layers", *form)[1])
    assert len(set(layers)) == 1
    assert UP in layers[0]


def test_report(model: Path, tmp_path: Path) -> None:
    """One output of it, checked by itself; it is written for all of them only."""
    for form in forms(model, "hqq8"):
        assert [output["quant"] for output in document("report", *form)["outputs"]] == ["hqq8"]
    assert [output["quant"] for output in document("report", model)["outputs"]] == list(KINDS)
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    (copy / "q4k-0.uqff").write_bytes(b"broken")
    assert (call("report", f"{copy}:hqq8")[0], call("report", f"{copy}:q4k")[0], call("report", copy)[0]) == (0, 1, 1)
    code, _, errors = call("report", f"{model}:hqq8", "--write")
    assert (code, "--write needs that" in errors) == (2, True)


def test_migrate(model: Path, older: Path, tmp_path: Path) -> None:
    """One, or all of them."""
    assert call("migrate", f"{model}:q4k", tmp_path / "one", "--to=0.2", "--quiet")[0] == 0
    assert [path.name for path in (tmp_path / "one").glob("*.uqff")] == ["q4k-0.uqff"]
    assert call("migrate", older, tmp_path / "back", "--isq=hqq8", "--quiet")[0] == 0
    assert [path.name for path in (tmp_path / "back").glob("*.uqff")] == ["hqq8-0.uqff"]
    assert call("migrate", older, tmp_path / "all", "--quiet")[0] == 0
    assert sorted(path.name for path in (tmp_path / "all").glob("*.uqff")) == ["hqq8-0.uqff", "q4k-0.uqff"]


def test_convert_and_dequantize(model: Path, tmp_path: Path) -> None:
    made = []
    for at, form in enumerate(forms(model, "q4k")):
        assert call("dequantize", *form[:1], tmp_path / f"plain{at}", *form[1:], "--quiet")[0] == 0
        made.append((tmp_path / f"plain{at}" / "model.safetensors").read_bytes())
    assert len(set(made)) == 1
    code, _, errors = call("convert", f"{model}:hqq8", tmp_path / "x.gguf", "--quiet")
    assert (code, "hqq8" in errors) == (1, True)  # GGUF has no such type
    code, _, errors = call("convert", model, tmp_path / "x.gguf")
    assert "several models in the directory" in errors


def test_run(model: Path) -> None:
    """The two types answer each as their own file does."""
    for kind in KINDS:
        told = [document("run", *form, "--prompt", "t5 t9", "--tokens", 2) for form in forms(model, kind)]
        assert len({str(each["logprobs"]) for each in told}) == 1
    code, _, errors = call("run", model, "--prompt", "t5")
    assert code == 1
    assert f"choose one, such as {model}:hqq8: got hqq8, q4k" in errors


@pytest.mark.parametrize(
    "command", ["inspect", "verify", "checksum", "report", "dequantize", "migrate", "convert", "run"]
)
def test_what_is_not_there(model: Path, tmp_path: Path, command: str) -> None:
    """The types that there are are named, before anything is made; a path that is not there is a wrong call."""
    out = {"run": ["--prompt", "t5"]}.get(command, [])
    out = [str(tmp_path / "out")] if command in ("dequantize", "migrate", "convert") else out
    for form in ((f"{model}:q5k",), (model, "--isq=q5k")):
        code, _, errors = call(command, *form[:1], *out, *form[1:])
        assert code == 2
        assert f"no model of that type: expected hqq8 or q4k, got q5k (file {model})" in errors
    code, _, errors = call(command, tmp_path / "nothing", *out)
    assert code == 2
    assert f"Path '{tmp_path / 'nothing'}' does not exist." in errors
    assert list(tmp_path.iterdir()) == []


def test_select(tmp_path: Path) -> None:
    """The whole stem, whatever its case, or the end of it; of two that fit alike, none; a real name goes first."""
    for name in ("My-q4k-0.uqff", "My-q4k-1.uqff", "My-Q4_0.uqff", "q8_0-0.uqff", "Q8_0-0.uqff", "a.fp8.uqff"):
        (tmp_path / name).touch()
    (tmp_path / "real:q4k").touch()
    expected = {"q4k": "My-q4k-0.uqff", "MY-Q4K": "My-q4k-0.uqff", "q4_0": "My-Q4_0.uqff", "fp8": "a.fp8.uqff"}
    for isq, name in {**expected, "q8_0": "q8_0-0.uqff", "Q8_0": "Q8_0-0.uqff"}.items():
        assert select(f"{tmp_path}:{isq}") == select(tmp_path, isq) == tmp_path / name
    assert select(tmp_path / "real:q4k") == tmp_path / "real:q4k"
    assert select(tmp_path) == tmp_path
    assert select(tmp_path / "a.fp8.uqff", "fp8") == tmp_path / "a.fp8.uqff"
    (tmp_path / "Your-q4k-0.uqff").touch()
    with pytest.raises(ShardError, match="several models of that type: expected My-q4k, Your-q4k, got q4k"):
        select(tmp_path, "q4k")
