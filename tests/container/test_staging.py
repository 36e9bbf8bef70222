"""Directories that replace others, and room on the disk, told beforehand."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from uqff.container.staging import check_space, staged_directory
from uqff.system import exchange


def test_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check_space(tmp_path / "out", 1000)
    with pytest.raises(OSError, match=r"1,001 bytes needed, 1,000 free") as caught:
        check_space(tmp_path / "out", 1001)
    assert caught.value.errno == errno.ENOSPC


@pytest.fixture(params=["exchange", "two renames"])
def replaced(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that is to be replaced, on a system that can exchange directories or on one that cannot."""
    if request.param != "exchange":
        monkeypatch.setattr("uqff.container.staging.exchange", lambda one, other: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.uqff").write_text("old")
    return tmp_path / "out"


def test_a_model_is_replaced(replaced: Path) -> None:
    with staged_directory(replaced, force=True) as staging:
        (staging / "new.uqff").write_text("new")
    assert os.listdir(replaced) == ["new.uqff"]
    assert os.listdir(replaced.parent) == ["out"]


@pytest.mark.parametrize("call", [1, 2])
def test_killed_between_two_renames_the_old_model_comes_back(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself, with the next command for that directory; force or not, it is there to be refused or replaced."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.uqff").write_text("old")
    monkeypatch.setattr("uqff.container.staging.exchange", lambda one, other: False)
    done = []

    def rename(one: Path, other: Path) -> None:
        done.append(one)
        if len(done) >= call:
            raise Killed
        os.replace(one, other)

    def replace() -> None:
        with staged_directory(tmp_path / "out", force=True) as staging:
            (staging / "new.uqff").write_text("new")

    with monkeypatch.context() as patch:
        patch.setattr("uqff.container.staging.os.rename", rename)
        patch.setattr("uqff.container.staging.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            replace()
    assert (tmp_path / "out").exists() is (call == 1)
    with pytest.raises(FileExistsError, match="--force replaces"), staged_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "old.uqff").read_text() == "old"
    replace()
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["new.uqff"]


class Killed(BaseException):
    """Nothing after it is done."""


def test_what_cannot_be_exchanged_is_an_error_or_said(tmp_path: Path) -> None:
    """Linux and macOS can, where the file system can."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if exchange(tmp_path / "a", tmp_path / "b"):
        assert (os.listdir(tmp_path / "a"), os.listdir(tmp_path / "b")) == (["b"], ["a"])
        with pytest.raises(FileNotFoundError):
            exchange(tmp_path / "a", tmp_path / "c")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
