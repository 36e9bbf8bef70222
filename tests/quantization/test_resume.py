"""Runs that are resumed after an interruption: the same files, nothing made twice, nothing reused silently."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.support.golden_models import TinyModel
from tools.golden.v1 import TinyMixtral
from uqff.cli import main
from uqff.container.queue import WriteQueue
from uqff.container.staging import Journal, ResumeWarning
from uqff.errors import FormatError, UnsupportedError
from uqff.progress import Step
from uqff.quantization.result import Result, result_document
from uqff.quantization.run import quantize_model
from uqff.quantization.types import encode

KINDS = ["q8_0", "afq4"]
LEFT = ".out.resume"


@pytest.fixture(params=["0.2", "1.2"])
def format(request: pytest.FixtureRequest) -> str:
    """Each generation."""
    value: str = request.param
    return value


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A qwen2 checkpoint: 8 layers in 0.x and 9 in 1.2, biases."""
    TinyModel(architecture="qwen2", hidden_size=64, heads=2, intermediate_size=128).write(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every layer is noted at once; gives the types of the layers that were quantised, in order."""
    kinds: list[str] = []

    def listed(loaded: Any, kind: str, **options: Any) -> Any:
        kinds.append(kind)
        return encode(loaded, kind, **options)

    monkeypatch.setattr("uqff.quantization.notes.NOTED_EVERY", 0.0)
    monkeypatch.setattr("uqff.quantization.run.encode", listed)
    return kinds


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def interrupted(source: Path, out: Path, layers_done: int, **options: Any) -> None:
    """Run until so many layers are done and noted."""
    commit = Journal.commit

    def stop(step: Step) -> None:
        if step.done > layers_done:
            raise KeyboardInterrupt

    noted: list[int] = []
    with pytest.MonkeyPatch.context() as patch:

        def committed(journal: Journal, files: Any, done: Any) -> None:
            commit(journal, files, done)
            noted.append(len(done))

        patch.setattr(Journal, "commit", committed)
        # Whoever asks for less memory waits until the writer has done all that it has.
        patch.setattr(WriteQueue, "wait_below", lambda self, nbytes: self.join())
        with pytest.raises(KeyboardInterrupt):
            quantize_model(source, out, KINDS, progress=stop, resume=True, **options)
    assert noted[-1] == layers_done


def document(result: Result) -> Any:
    """All that a run says of what it made, errors to the last digit."""
    return {**result_document(result), "path": None}


@pytest.mark.parametrize("layers_done", [0, 1, 5])
def test_the_same_model_and_nothing_made_twice(
    source: Path, format: str, layers_done: int, tmp_path: Path, made: list[str]
) -> None:
    whole = quantize_model(source, tmp_path / "whole", KINDS, version=format, shard_bytes=20_000)
    layers = len(whole.outputs[0].layers)
    interrupted(source, tmp_path / "out", layers_done, version=format, shard_bytes=20_000)
    assert sorted(os.listdir(tmp_path)) == sorted([LEFT, "source", "whole"])
    made.clear()
    steps: list[Step] = []
    options: dict[str, Any] = {"version": format, "shard_bytes": 20_000, "resume": True, "progress": steps.append}
    resumed = quantize_model(source, tmp_path / "out", KINDS, **options)
    assert len(made) == len(KINDS) * (layers - layers_done)
    assert [step.done for step in steps] == list(range(layers_done + 1, layers + 1))
    assert steps[-1].work_done == steps[-1].work
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert document(resumed) == document(whole)
    assert sorted(os.listdir(tmp_path)) == ["out", "source", "whole"]


def test_interrupted_again_and_after_the_last_layer(source: Path, format: str, tmp_path: Path, made: list[str]) -> None:
    """Files that stand beside the layers and were copied before are no obstacle."""
    quantize_model(source, tmp_path / "whole", KINDS, version=format)
    interrupted(source, tmp_path / "out", 2, version=format)
    interrupted(source, tmp_path / "out", 4, version=format)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", lambda old, new: (_ for _ in ()).throw(OSError("no")))
        with pytest.raises(OSError, match="no"):
            quantize_model(source, tmp_path / "out", KINDS, version=format, resume=True)
    assert "config.json" in os.listdir(tmp_path / LEFT)
    quantize_model(source, tmp_path / "out", KINDS, version=format, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_stacked_experts(tmp_path: Path, made: list[str]) -> None:
    """A layer of which some experts were written is made anew, and only such a layer."""
    TinyMixtral(experts=3).write(tmp_path / "source")
    quiet: dict[str, Any] = {"on_fallback": lambda fallback: None}
    whole = quantize_model(tmp_path / "source", tmp_path / "whole", KINDS, **quiet)
    experts: list[Step] = []

    def stop(step: Step) -> None:
        experts.extend([step] if ".experts." in step.key else [])
        if len(experts) == 5:  # the second of the second stack
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WriteQueue, "wait_below", lambda self, nbytes: self.join())
        with pytest.raises(KeyboardInterrupt):
            quantize_model(tmp_path / "source", tmp_path / "out", KINDS, resume=True, progress=stop, **quiet)
    before = experts[-1].done
    made.clear()
    steps: list[Step] = []
    quantize_model(tmp_path / "source", tmp_path / "out", KINDS, resume=True, progress=steps.append, **quiet)
    assert steps[0].key == experts[-1].key
    assert [step.done for step in steps[:3]] == [before, before, before + 1]
    assert steps[-1].done == len(whole.outputs[0].layers)
    assert len(made) == len(KINDS) * len(steps)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"kinds": ["q8_0", "afq6"]}, "types"),
        ({"kinds": ["afq4", "q8_0"]}, "types"),
        ({"version": "1.1"}, "version"),
        ({"engine": "0.8"}, "engine"),
        ({"dtype": "f16"}, "dtype"),
        ({"measure": False}, "measure"),
        ({"shard_bytes": 1000}, "shard_bytes"),
        ({"promote": False}, "layers"),
    ],
)
def test_another_run_is_not_resumed(source: Path, change: dict[str, Any], field: str, tmp_path: Path) -> None:
    """What differs is named, and what was done stays."""
    interrupted(source, tmp_path / "out", 3)
    before = contents(tmp_path / LEFT)
    arguments = {"kinds": KINDS, **change}
    with pytest.raises(UnsupportedError, match="the interrupted run was another") as caught:
        quantize_model(source, tmp_path / "out", resume=True, **arguments)
    assert caught.value.field == field
    assert contents(tmp_path / LEFT) == before


def test_another_source_is_not_resumed(source: Path, tmp_path: Path) -> None:
    """Neither a file that was changed meanwhile nor another directory."""
    interrupted(source, tmp_path / "out", 3)
    shutil.copytree(source, tmp_path / "copy")
    for path, field in ((tmp_path / "copy", "source"), (source, "files")):
        os.utime(path / "model.safetensors", ns=(1, 1))
        with pytest.raises(UnsupportedError) as caught:
            quantize_model(path, tmp_path / "out", KINDS, resume=True)
        assert caught.value.field == field


def test_what_is_left_must_be_what_was_left(source: Path, tmp_path: Path) -> None:
    """A changed header, a missing file: refused, whatever the note says."""
    interrupted(source, tmp_path / "out", 3)
    left = tmp_path / LEFT
    shard, note = left / "q8_0-0.uqff", left / Journal.NAME
    assert note.is_file()
    raw = bytearray(shard.read_bytes())
    raw[20] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(FormatError, match=r"not the file that was begun.*q8_0-0\.uqff"):
        quantize_model(source, tmp_path / "out", KINDS, resume=True)
    shard.unlink()
    with pytest.raises(FileNotFoundError):
        quantize_model(source, tmp_path / "out", KINDS, resume=True)


def test_a_note_that_is_none_is_said_and_all_is_made_anew(source: Path, tmp_path: Path, made: list[str]) -> None:
    """No kill and no broken disk makes every later run refuse; what is no model's file is never touched."""
    quantize_model(source, tmp_path / "whole", KINDS)
    interrupted(source, tmp_path / "out", 3)
    left = tmp_path / LEFT
    note = left / Journal.NAME
    run = json.loads(note.read_bytes())["run"]
    notes = [{"run": 3, "files": [], "done": []}, {"run": run, "files": 3, "done": []}, {"run": run, "files": []}]
    broken = (b"", b"[]", b"{}", b"\xff", b"[" * 100_000, *(json.dumps(each).encode() for each in notes))
    for raw in broken:
        note.write_bytes(raw)
        journal = Journal(left, run)
        assert journal.lost is not None
        assert (journal.begun, journal.done, os.listdir(left)) == (False, [], [Journal.NAME])
        (left / "q8_0-0.uqff").write_bytes(b"x")
    note.rename(left / f".{Journal.NAME}.{'0' * 16}.tmp")  # killed while it made its first note
    (left / "thesis.tex").write_text("x")
    with pytest.raises(UnsupportedError, match="not what an interrupted run leaves"):
        quantize_model(source, tmp_path / "out", KINDS, resume=True)
    (left / "thesis.tex").unlink()
    made.clear()
    shutil.copytree(left, tmp_path / "kept")
    with pytest.warns(ResumeWarning, match=r"nothing is resumed, all is made anew: .*progress\.json"):
        quantize_model(source, tmp_path / "out", KINDS, resume=True)
    shutil.move(tmp_path / "kept", tmp_path / ".other.resume")
    done = CliRunner().invoke(main, ["quantize", str(source), str(tmp_path / "other"), "--isq", "q8_0", "--resume"])
    assert done.exit_code == 0
    assert "uqff: nothing is resumed, all is made anew: " in done.stderr
    shutil.rmtree(tmp_path / "other")
    del made[len(KINDS) * 9 :]
    assert len(made) == len(KINDS) * 9
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["out", "source", "whole"]


@pytest.mark.parametrize("call", ["rename", "unlink"])
def test_killed_while_the_directory_becomes_the_target(
    call: str, source: Path, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the rename all is there to be resumed, after it the model is whole and holds no note."""
    place, real = (os, os.rename) if call == "rename" else (Path, Path.unlink)

    def die(path: Any, *more: Any, **options: Any) -> None:
        if str(path).endswith(LEFT if call == "rename" else f"{LEFT}.json"):
            raise KeyboardInterrupt
        real(path, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, call, die)
        with pytest.raises(KeyboardInterrupt):
            quantize_model(source, tmp_path / "out", KINDS, resume=True)
    made.clear()
    if call == "rename":
        quantize_model(source, tmp_path / "out", KINDS, resume=True)
    else:
        assert Journal.NAME not in os.listdir(tmp_path / "out")
        quantize_model(source, tmp_path / "out", KINDS, resume=True, force=True)
    assert len(made) == (0 if call == "rename" else len(KINDS) * 9)
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_a_directory_of_that_name_that_is_not_ours(source: Path, tmp_path: Path) -> None:
    """What was there before stays there."""
    (tmp_path / LEFT).mkdir()
    (tmp_path / LEFT / "thesis.tex").write_text("x")
    with pytest.raises(UnsupportedError, match="not what an interrupted run leaves"):
        quantize_model(source, tmp_path / "out", KINDS, resume=True)
    assert (tmp_path / LEFT / "thesis.tex").read_text() == "x"


def test_nothing_is_reused_silently(source: Path, tmp_path: Path, made: list[str]) -> None:
    """Without being asked to, a run makes everything, and leaves alone what another may want to resume."""
    interrupted(source, tmp_path / "out", 3)
    before = contents(tmp_path / LEFT)
    made.clear()
    result = quantize_model(source, tmp_path / "out", KINDS)
    assert len(made) == len(KINDS) * len(result.outputs[0].layers)
    assert contents(tmp_path / LEFT) == before


def test_two_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    """The second is told, and the first goes on."""
    pytest.importorskip("fcntl")
    told: list[str] = []

    def second(step: Step) -> None:
        if step.done == 2:
            with pytest.raises(UnsupportedError, match="another run is at work there") as caught:
                quantize_model(source, tmp_path / "out", KINDS, resume=True)
            told.append(str(caught.value))

    quantize_model(source, tmp_path / "out", KINDS, resume=True, progress=second)
    assert len(told) == 1


def test_the_option(source: Path, tmp_path: Path, made: list[str]) -> None:
    """As a user does it."""
    interrupted(source, tmp_path / "out", 4)
    made.clear()
    arguments = ["quantize", str(source), str(tmp_path / "out"), "--isq", "q8_0", "--isq", "afq4", "--resume", "--json"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    assert len(made) == len(KINDS) * (9 - 4)
