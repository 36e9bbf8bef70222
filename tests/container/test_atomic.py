"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from uqff.container.atomic import atomic_file, atomic_files, settle, sync_directory


def test_new_bytes_appear_at_the_end(tmp_path: Path) -> None:
    """Until the block ends, the old file is what others see."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
        assert len(list(tmp_path.iterdir())) == 2
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failed_block_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    """Not even a temporary file."""

    def fail() -> None:
        with atomic_file(tmp_path / "file") as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX")
@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a pipe", "link to a device"])
def test_what_is_no_file_stays(tmp_path: Path, kind: str) -> None:
    """A pipe, a device, what a link to one leads to: a rename would replace /dev/null itself."""
    path = pipe = tmp_path / "a"
    if kind == "folder":
        path.mkdir()
    elif kind == "link to a device":
        path.symlink_to(os.devnull)
    else:
        os.mkfifo(pipe)
    if kind == "link to a pipe":
        path = tmp_path / "link"
        path.symlink_to("a")
    before = {each.name: os.lstat(each).st_ino for each in tmp_path.iterdir()}
    error, text = (
        (IsADirectoryError, f"Is a directory: '{path}'$")
        if kind == "folder"
        else (FileExistsError, f"^exists and is not a file: {path}$")
    )
    with pytest.raises(error, match=text), atomic_file(path):
        pytest.fail("nothing is to be written")
    assert {each.name: os.lstat(each).st_ino for each in tmp_path.iterdir()} == before


def test_a_link_to_a_file_is_replaced(tmp_path: Path) -> None:
    """What it leads to stays as it is, and so does what does not exist."""
    (tmp_path / "file").write_bytes(b"old")
    for name, target in (("a", "file"), ("b", "nothing")):
        (tmp_path / name).symlink_to(target)
        with atomic_file(tmp_path / name) as file:
            file.write(b"new")
        assert (tmp_path / name).read_bytes() == b"new"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "b", "file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_set_is_renamed_together(tmp_path: Path) -> None:
    """No file of a set is there before all are complete."""
    with atomic_files() as stage:
        for name in "ab":
            stage(tmp_path / name).write_bytes(name.encode())
        assert not {path.name for path in tmp_path.iterdir()} & {"a", "b"}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"a", "b": b"b"}


def test_failed_set_leaves_nothing(tmp_path: Path) -> None:
    """The second file fails: the first does not appear either."""

    def fail() -> None:
        with atomic_files() as stage:
            stage(tmp_path / "a").write_bytes(b"a")
            stage(tmp_path / "b")
            raise ValueError("second")

    with pytest.raises(ValueError, match="second"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_settling_that_fails_lets_go_of_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full for a moment: the next attempt is no second process at the same files."""
    (pending := tmp_path / ".model.new").mkdir()
    (pending / "model-1.uqff").write_bytes(b"1")

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            settle(pending)
    settle(pending)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"model-1.uqff": b"1"}


def test_settling_where_nothing_can_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without ``fcntl`` no lock that is missing is another process's."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    (pending := tmp_path / ".model.new").mkdir()
    (pending / "model-1.uqff").write_bytes(b"1")
    settle(pending)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"model-1.uqff": b"1"}


def test_flushed_before_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut a renamed file must hold its bytes: fsync, rename, fsync of the directory."""
    events: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        events.append("fsync")
        real_fsync(handle)

    def replace(source: Path, target: Path) -> None:
        assert Path(source).read_bytes() == b"bytes"
        events.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with atomic_file(tmp_path / "file") as file:
        file.write(b"bytes")
    assert events == ["fsync", "rename", "fsync"]


def test_sync_of_a_directory_that_is_gone(tmp_path: Path) -> None:
    """A courtesy, never an error."""
    sync_directory(tmp_path / "gone")
