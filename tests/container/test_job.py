"""The shape of jobs: a directory appears whole or not at all, and a run that was interrupted can be resumed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from uqff.container.job import Job, Staging
from uqff.container.staging import Journal, staged_directory
from uqff.progress import Progress, Steps


class Letters(Job[str]):
    """Writes a file for each letter, and fails at one."""

    def __init__(self, letters: str, failing: str = "") -> None:
        self.letters = letters
        self.failing = failing

    @property
    def nbytes(self) -> int:
        return len(self.letters)

    def description(self) -> Mapping[str, Any]:
        return {"letters": self.letters}

    def write(self, stage: Staging, progress: Progress | None) -> str:
        done = [] if stage.journal is None else list(stage.journal.done)
        steps = Steps(progress, "convert", len(self.letters), self.nbytes, "bytes")
        for letter in self.letters:
            if letter not in done:
                if letter == self.failing:
                    raise KeyboardInterrupt
                (stage.directory / f"{letter}.uqff").write_text(letter)
                if stage.journal is not None:
                    done.append(letter)
                    stage.journal.commit([f"{each}.uqff" for each in done], done)
            steps.add(letter, 1, tell=letter not in done or stage.journal is None)
        return f"{stage.target.name}, {'begun' if stage.begun else 'new'}"


def test_a_run_gives_a_result_and_tells_its_steps(tmp_path: Path) -> None:
    keys: list[str] = []
    assert Letters("abc").run(tmp_path / "out", progress=lambda step: keys.append(step.key)) == "out, new"
    assert keys == ["a", "b", "c"]
    assert sorted(os.listdir(tmp_path / "out")) == ["a.uqff", "b.uqff", "c.uqff"]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Letters("abc", failing="b").run(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_only_what_is_made_is_replaced_and_only_by_force(tmp_path: Path) -> None:
    Letters("abc").run(tmp_path / "out")
    with pytest.raises(FileExistsError, match="--force replaces the UQFF model"):
        Letters("d").run(tmp_path / "out")
    Letters("d").run(tmp_path / "out", force=True)
    assert os.listdir(tmp_path / "out") == ["d.uqff"]


@pytest.mark.parametrize("force", [False, True])
def test_what_is_not_the_models_is_not_replaced(force: bool, tmp_path: Path) -> None:
    """A diary beside a model would be lost; companions, checksums and what a killed process left are its own."""
    Letters("abc").run(tmp_path / "out")
    for name in ("tokenizer.json", "SHA256SUMS", "x.kept.safetensors", f".a.uqff.{'0' * 16}.tmp"):
        (tmp_path / "out" / name).write_text("x")
    (tmp_path / "out" / "diary.txt").write_text("dear")
    with pytest.raises(FileExistsError, match=r"would be lost: .*diary\.txt" if force else r"not empty: \S*$"):
        Letters("d").run(tmp_path / "out", force=force)
    assert (tmp_path / "out" / "diary.txt").read_text() == "dear"
    (tmp_path / "out" / "diary.txt").unlink()
    Letters("d").run(tmp_path / "out", force=True)
    assert os.listdir(tmp_path / "out") == ["d.uqff"]


@pytest.mark.parametrize("name", ["photos", ".git", "b.uqff", "config.json"])
def test_a_folder_is_not_the_models(name: str, tmp_path: Path) -> None:
    """The message names it, as it names files: the directory is a model, but for that."""
    Letters("abc").run(tmp_path / "out")
    (tmp_path / "out" / "b.uqff").unlink()
    (tmp_path / "out" / name).mkdir()
    with pytest.raises(FileExistsError, match=r"not empty: \S*$"):
        Letters("d").run(tmp_path / "out")
    with pytest.raises(FileExistsError, match=f"would be lost: .*{name}$"):
        Letters("d").run(tmp_path / "out", force=True)
    assert (tmp_path / "out" / name).is_dir()


def test_what_killed_runs_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """But neither what a living run fills, nor what only looks alike."""
    pytest.importorskip("fcntl")
    for name in (f".out.tmp-{'0' * 16}", f".out.tmp-{'0' * 15}", f".other.tmp-{'0' * 16}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.uqff").write_text("x")
    with staged_directory(tmp_path / "out") as living:
        (living / "b.uqff").write_text("b")
        with staged_directory(tmp_path / "out") as second:
            assert living.is_dir()
            (second / "c.uqff").write_text("c")
        assert os.listdir(living) == ["b.uqff"]
        shutil.rmtree(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [f".other.tmp-{'0' * 16}", f".out.tmp-{'0' * 15}", "out"]
    assert os.listdir(tmp_path / "out") == ["b.uqff"]


def test_no_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="3 bytes needed, 2 free"):
        Letters("abc").run(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Letters("abc", failing="c").run(tmp_path / "out", resume=True)
    assert os.listdir(tmp_path) == [".out.resume"]
    assert sorted(os.listdir(tmp_path / ".out.resume")) == ["a.uqff", "b.uqff", Journal.NAME]
    (tmp_path / ".out.resume" / "a.uqff").write_text("A")  # it is not made again
    assert Letters("abc").run(tmp_path / "out", resume=True) == "out, begun"
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {
        "a.uqff": "A",
        "b.uqff": "b",
        "c.uqff": "c",
    }


def test_a_job_that_cannot_be_resumed_says_so(tmp_path: Path) -> None:
    class Plain(Letters):
        def description(self) -> Mapping[str, Any]:
            return super(Letters, self).description()

    with pytest.raises(NotImplementedError):
        Plain("a").run(tmp_path / "out", resume=True)
    assert os.listdir(tmp_path) == []
