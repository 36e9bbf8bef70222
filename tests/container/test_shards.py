"""Which files make up a model: siblings, gaps, lists, directories, links, pipes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import uqff
from tests.support.samples import BLOB, BLOBS, write
from uqff import FormatError, ShardError, UnsupportedError
from uqff.container import file as file_module
from uqff.container import shards
from uqff.container.atomic import settle
from uqff.container.mapped import MappedFile
from uqff.container.shards import pending_directory, resolve, shard_name


def make_set(directory: Path, *numbers: int, stem: str = "model") -> list[Path]:
    """Shard N holds the layer of index N."""
    return [write(directory / shard_name(stem, number), {str(number): BLOB}) for number in numbers]


@pytest.mark.parametrize("opened", [0, 1, 2])
def test_siblings_are_found_from_any_shard(tmp_path: Path, opened: int) -> None:
    """In the order of their numbers."""
    paths = make_set(tmp_path, 0, 1, 2)
    make_set(tmp_path, 0, 1, stem="other")
    write(tmp_path / "model.uqff", {"0": BLOB})
    with uqff.open(paths[opened]) as file:
        assert file.paths == tuple(paths)
        assert list(file) == ["0", "1", "2"]


def test_numbers_not_names_give_the_order(tmp_path: Path) -> None:
    """Shard 10 comes after shard 2."""
    paths = make_set(tmp_path, *range(12))
    with uqff.open(str(paths[3])) as file:
        assert file.paths == tuple(paths)
        assert list(file) == [str(n) for n in range(12)]


@pytest.mark.parametrize(("present", "missing"), [([0, 2], 1), ([1, 2], 0), ([0, 1, 5], 2), ([1, 3], 0)])
def test_gap_is_an_error(tmp_path: Path, present: list[int], missing: int) -> None:
    """Half a model is no model; the missing file is named."""
    paths = make_set(tmp_path, *present)
    for opened in (paths[0], paths[-1], tmp_path):
        with pytest.raises(ShardError, match="gap in a set of shards") as caught:
            uqff.open(opened)
        assert caught.value.file == str(tmp_path / shard_name("model", missing))
        assert caught.value.got == f"no shard {missing}"


def test_a_lone_later_shard_is_a_gap(tmp_path: Path) -> None:
    """Unless its content says that the number is part of the name."""
    (path,) = make_set(tmp_path, 1)
    with pytest.raises(ShardError, match="gap") as caught:
        uqff.open(path)
    assert "model-0.uqff" in str(caught.value)
    assert list(uqff.open([path])) == ["1"]
    named = write(tmp_path / "llama-7.uqff", {"0": BLOB, "1": BLOB})
    assert list(uqff.open(named)) == ["0", "1"]


def test_list_is_taken_as_it_is(tmp_path: Path) -> None:
    """No siblings, any names, any iterable; the layers come by index all the same."""
    one, two = write(tmp_path / "b.bin", {"1": BLOB, "3": BLOB}), write(tmp_path / "a.bin", {"0": BLOB, "2": BLOB})
    for paths in ([one, two], (str(one), str(two)), iter([one, two])):
        with uqff.open(paths) as file:  # type: ignore[arg-type]
            assert file.paths == (one, two)
            assert list(file) == ["0", "1", "2", "3"]
    with pytest.raises(ShardError, match="empty list"):
        uqff.open([])


def test_index_in_two_shards_is_an_error(tmp_path: Path) -> None:
    """Across files the set does not fit together; within a file the file is broken."""
    one, two = write(tmp_path / "m-0.uqff", {"0": BLOB, "1": BLOB}), write(tmp_path / "m-1.uqff", {"01": BLOB})
    with pytest.raises(ShardError, match=r"layer index occurs twice: got also 1 in m-0\.uqff") as caught:
        uqff.open(one)
    assert (caught.value.file, caught.value.layer) == (str(two), "01")
    same = write(tmp_path / "same.uqff", {"1": BLOB, "01": BLOB})
    with pytest.raises(FormatError, match="layer index occurs twice"):
        uqff.open(same)
    with pytest.raises(ShardError, match="layer index occurs twice"):
        uqff.open([one, one])


def test_two_files_of_one_number(tmp_path: Path) -> None:
    """``model-0`` and ``model-00`` cannot both be shard 0."""
    (first,) = make_set(tmp_path, 0)
    write(tmp_path / "model-00.uqff", {"1": BLOB})
    with pytest.raises(ShardError, match="two shards of one number"):
        uqff.open(first)


def test_directory(tmp_path: Path) -> None:
    """One file, or one set; other files do not matter."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ShardError, match=r"no \.uqff file in the directory") as caught:
        uqff.open(tmp_path)
    assert caught.value.file == str(tmp_path)
    single = write(tmp_path / "model.uqff", {"0": BLOB})
    assert uqff.open(tmp_path).paths == (single,)
    single.unlink()
    paths = make_set(tmp_path, 0, 1)
    assert uqff.open(str(tmp_path)).paths == tuple(paths)
    (tmp_path / "folder.uqff").mkdir()
    assert uqff.open(tmp_path).paths == tuple(paths)


@pytest.mark.parametrize(
    "names", [["a.uqff", "b.uqff"], ["a-0.uqff", "b-0.uqff"], ["a.uqff", "a-0.uqff"], ["a.uqff", "a.uqff-0.uqff"]]
)
def test_directory_of_several_models(tmp_path: Path, names: list[str]) -> None:
    """Guessing would open the wrong one."""
    for name in names:
        write(tmp_path / name, {"0": BLOB})
    with pytest.raises(ShardError, match="several models in the directory"):
        uqff.open(tmp_path)
    for name in names:
        assert uqff.open(tmp_path / name).paths == (tmp_path / name,)


def test_links_are_followed_and_siblings_sought_beside_the_link(tmp_path: Path) -> None:
    """Hub caches keep the files elsewhere, under their hashes."""
    store, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    store.mkdir()
    snapshot.mkdir()
    for number in (0, 1):
        write(store / f"hash{number}", {str(number): BLOB})
        (snapshot / shard_name("m", number)).symlink_to(store / f"hash{number}")
    for opened in (snapshot, snapshot / "m-0.uqff"):
        assert list(uqff.open(opened)) == ["0", "1"]
    (snapshot / shard_name("m", 2)).symlink_to(store / "gone")
    assert list(uqff.open(snapshot)) == ["0", "1"]


def test_missing_and_unreadable(tmp_path: Path) -> None:
    """What the system refuses is an ``OSError``, not a broken file."""
    with pytest.raises(FileNotFoundError, match="no such file or directory"):
        uqff.open(tmp_path / "gone.uqff")
    with pytest.raises(FileNotFoundError):
        uqff.open([tmp_path / "gone.uqff"])
    with pytest.raises(IsADirectoryError):
        uqff.open([tmp_path])
    with pytest.raises(FileNotFoundError):
        uqff.open(tmp_path / "gone-0.uqff")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", ["pipe.uqff", "pipe-0.uqff"])
def test_pipe_is_refused_at_once(tmp_path: Path, name: str) -> None:
    """Opening one would wait for a writer, for ever."""
    os.mkfifo(tmp_path / name)
    for opened in (tmp_path / name, [tmp_path / name], tmp_path):
        with pytest.raises((FormatError, ShardError)):
            uqff.open(opened)


def test_devices_are_no_files() -> None:
    """They have no size to map."""
    for device in ("/dev/null", "/dev/zero"):
        if Path(device).exists():
            with pytest.raises(FormatError, match="not a regular file"):
                uqff.open(device)


def test_too_many_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is an error of its own."""
    make_set(tmp_path, 0, 1, 2)
    monkeypatch.setattr(shards, "MAX_SHARDS", 3)
    assert len(resolve(tmp_path)[0]) == 3
    monkeypatch.setattr(shards, "MAX_SHARDS", 2)
    with pytest.raises(ShardError, match="too many shards"):
        resolve(tmp_path)


def test_number_of_a_shard_is_bounded(tmp_path: Path) -> None:
    """A name with 30 digits is a name, not a number to count to."""
    path = write(tmp_path / f"model-{'9' * 30}.uqff", {"0": BLOBS["gguf"]})
    assert uqff.open(path).paths == (path,)


def test_strange_names(tmp_path: Path) -> None:
    """Line breaks, quotes, and bytes that are no UTF-8; the repr stays printable."""
    for name in ("a\nb-0.uqff", "a'b.uqff", " .uqff", "-0.uqff", "x\udcff.uqff"):
        path = write(tmp_path / name, {"0": BLOB})
        with uqff.open(path) as file:
            assert list(file) == ["0"]
            assert repr(file).isprintable()
        path.write_bytes(b"")
        with pytest.raises(FormatError) as caught:
            uqff.open(path)
        assert str(caught.value).isprintable()
        path.unlink()


def pending_set(tmp_path: Path) -> tuple[list[Path], dict[str, bytes]]:
    """A set of two shards, and one of three that takes its place; killed after the rename of the first shard."""
    paths, pending = make_set(tmp_path, 0, 1), pending_directory(tmp_path, "model")
    pending.mkdir()
    made = [write(pending / shard_name("model", number), {str(number): BLOBS["hqq"]}) for number in range(3)]
    new = {path.name: path.read_bytes() for path in made}
    made[0].replace(paths[0])
    return paths, new


def test_a_set_whose_renaming_was_cut_off_is_the_new_one(tmp_path: Path) -> None:
    """However it is opened; the next of that name brings the renaming to an end."""
    paths, new = pending_set(tmp_path)
    whats: list[Any] = [tmp_path, *paths, paths, f"{tmp_path}:model"]
    for what in whats:
        with uqff.open(what) as file:
            count = 2 if what is paths else 3
            assert [bytes(file.blob(n)) for n in range(count)] == [BLOBS["hqq"]] * count
    settle(pending_directory(tmp_path, "model"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == new


def test_a_link_is_not_followed_to_what_is_pending(tmp_path: Path) -> None:
    """It may lead anywhere."""
    pending_set(tmp_path)
    pending_directory(tmp_path, "model").rename(tmp_path / "elsewhere")
    pending_directory(tmp_path, "model").symlink_to(tmp_path / "elsewhere")
    with uqff.open(tmp_path) as file:
        assert [bytes(file.blob(n)) for n in (0, 1)] == [BLOBS["hqq"], BLOB]
    settle(pending_directory(tmp_path, "model"))
    assert sorted(os.listdir(tmp_path / "elsewhere")) == ["model-1.uqff", "model-2.uqff"]


def test_what_another_process_is_renaming_stays_its(tmp_path: Path) -> None:
    """It holds a lock."""
    fcntl = pytest.importorskip("fcntl")
    pending_set(tmp_path)
    handle = os.open(pending_directory(tmp_path, "model"), os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UnsupportedError, match="another process writes these files"):
        uqff.save({0: uqff.deserialize(BLOB)}, tmp_path / "model-0.uqff", shard_bytes=1)
    os.close(handle)


@pytest.mark.parametrize("times", [1, 10])
def test_a_set_that_is_replaced_while_it_is_opened(tmp_path: Path, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never some shards of the one and some of the other: it is opened again, and not for ever."""
    paths = make_set(tmp_path, 0, 1)
    replaced: list[Path] = []

    class Mapped(MappedFile):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            if path == paths[0] and len(replaced) < times:
                for each in paths:
                    write(each.with_suffix(".new"), {each.stem[-1]: BLOBS["hqq"]}).replace(each)
                replaced.append(path)

    monkeypatch.setattr(file_module, "MappedFile", Mapped)
    if times == 10:
        with pytest.raises(ShardError, match="replaced again and again while it is opened"):
            uqff.open(tmp_path)
        return
    with uqff.open(tmp_path) as file:
        assert [bytes(file.blob(n)) for n in (0, 1)] == [BLOBS["hqq"]] * 2


@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("m.gguf", "a GGUF file, which uqff inspect, plan, convert, quantize and run take"),
        ("model.safetensors", "a checkpoint, which uqff plan, quantize and run take"),
        ("residual.safetensors", None),
    ],
)
def test_a_directory_of_something_else_says_what_takes_it(name: str, got: str | None, tmp_path: Path) -> None:
    """A checkpoint or a GGUF file is what users have before they have UQFF."""
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ShardError, match=r"no \.uqff file in the directory") as caught:
        resolve(tmp_path)
    assert caught.value.got == got
