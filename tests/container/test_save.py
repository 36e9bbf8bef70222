"""``uqff.save``: bytes, shards, streaming, and what is left when something goes wrong."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import uqff
from tests.support.samples import BLOB, BLOBS, file_of, write
from tests.support.strategies import layers
from uqff import FormatError, Layer, ShardError, UnsupportedError
from uqff.container import tensors
from uqff.container.plan import SHARD_BYTES, Item, cut
from uqff.families import Unquant
from uqff.progress import Step

LAYER = uqff.deserialize(BLOB)
NEW = {index: uqff.deserialize(blob) for index, blob in enumerate(BLOBS.values())}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------------


def test_file_is_the_reference_framing_sorted_by_name(tmp_path: Path) -> None:
    """Keys sort as texts, as the engine's writer sorts them; nothing is added."""
    blobs = {str(n): BLOBS["gguf"] for n in (10, 2, 0, 1)}
    (path,) = uqff.save({int(k): uqff.deserialize(b) for k, b in blobs.items()}, tmp_path / "m.uqff")
    expected = file_of({k: blobs[k] for k in ("0", "1", "10", "2")})
    # The reference writes no spaces after separators and pads the header to 8 bytes.
    assert path == tmp_path / "m.uqff"
    data = path.read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0
    assert data[8:].startswith(b'{"0":{"dtype":"U8","shape":[62],"data_offsets":[0,62]},"1":')
    assert data.endswith(expected[-4 * 62 :])
    assert names(tmp_path) == ["m.uqff"]


@given(st.dictionaries(st.integers(0, 200), layers(), min_size=1, max_size=5))
def test_open_gives_back_what_save_was_given(tmp_path_factory: pytest.TempPathFactory, model: dict[int, Layer]) -> None:
    """And saving the open file gives the same bytes."""
    directory = tmp_path_factory.getbasetemp()
    (path,) = uqff.save(model, directory / "property.uqff")
    with uqff.open(path) as file:
        assert {int(key): layer for key, layer in file.items()} == model
        (again,) = uqff.save(file, directory / "again.uqff")
    assert again.read_bytes() == path.read_bytes()


def test_keys_are_kept_as_texts(tmp_path: Path) -> None:
    """``03`` stays ``03``; a number is written in decimal; a bare record is a layer without bias."""
    uqff.save({"03": LAYER, 2: LAYER.weight}, tmp_path / "m.uqff")
    with uqff.open(tmp_path / "m.uqff") as file:
        assert list(file) == ["2", "03"]
        assert file[2] == Layer(LAYER.weight)


@pytest.mark.parametrize("key", ["-1", -1, "+1", "٣", " 1", 1.0, True, None, "1" * 10, "1" * 5000, 10**9])
def test_key_that_cannot_be_read_again_is_not_written(tmp_path: Path, key: Any) -> None:
    """What ``open`` would refuse, ``save`` refuses."""
    with pytest.raises(FormatError, match="key is not a layer index"):
        uqff.save({key: LAYER}, tmp_path / "m.uqff")
    assert names(tmp_path) == []


@pytest.mark.parametrize("key", ["a", ""])
def test_key_that_is_no_number_is_not_written_into_0_x(tmp_path: Path, key: str) -> None:
    """Asked for 0.2, it is refused, and who turns paths into numbers is named."""
    with pytest.raises(FormatError, match=r"key is not a layer index.*`uqff migrate`"):
        uqff.save({key: LAYER}, tmp_path / "m.uqff", version=(0, 2, 0))
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("keys", "version"),
    [((0, 1), (0, 2, 0)), (("0", "1"), (0, 2, 0)), (("lm_head", "model.layers.0.mlp.up_proj"), (1, 2, 0))],
)
def test_keys_say_which_generation(tmp_path: Path, keys: tuple[Any, ...], version: tuple[int, int, int]) -> None:
    """Numbers are 0.2; paths are 1.2, which is what current engines read."""
    uqff.save(dict.fromkeys(keys, LAYER), tmp_path / "m.uqff")
    with uqff.open(tmp_path / "m.uqff") as file:
        assert (file.version, list(file)) == (version, [str(key) for key in keys])


def test_keys_of_two_generations_are_refused(tmp_path: Path) -> None:
    """No file can have both; the first of each is named."""
    with pytest.raises(FormatError, match="keys of two generations") as caught:
        uqff.save({0: LAYER, "lm_head": LAYER}, tmp_path / "m.uqff")
    assert (caught.value.layer, caught.value.got) == ("lm_head", "also 0")
    assert names(tmp_path) == []


@pytest.mark.parametrize("version", [(0, 1, 3), (0, 2, 0), (1, 0, 0), (1, 1, 0), (1, 2, 0)])
def test_an_open_file_is_saved_in_its_own_version(tmp_path: Path, version: tuple[int, int, int]) -> None:
    """The same bytes, of whatever generation; the other one needs names that it does not know."""
    key = "lm_head" if version >= (1, 0, 0) else "0"
    (path,) = uqff.save({key: uqff.deserialize(BLOBS["gguf"])}, tmp_path / "m.uqff", version=version)
    with uqff.open(path) as file:
        (again,) = uqff.save(file, tmp_path / "again.uqff")
        other = (0, 2, 0) if version >= (1, 0, 0) else (1, 2, 0)
        with pytest.raises(FormatError, match="`uqff migrate` turns"):
            uqff.save(file, tmp_path / "other.uqff", version=other)
    assert again.read_bytes() == path.read_bytes()
    assert names(tmp_path) == ["again.uqff", "m.uqff"]


def test_no_layers_and_doubled_layers(tmp_path: Path) -> None:
    """Neither makes a file."""
    with pytest.raises(FormatError, match="no layers"):
        uqff.save({}, tmp_path / "m.uqff")
    with pytest.raises(FormatError, match="layer index occurs twice"):
        uqff.save({"3": LAYER, 3: LAYER}, tmp_path / "m.uqff")
    assert names(tmp_path) == []


def test_version(tmp_path: Path) -> None:
    """Written into every blob; a layer that it cannot express is named."""
    uqff.save({0: LAYER}, tmp_path / "m.uqff", version=(0, 1, 0))
    assert uqff.open(tmp_path / "m.uqff").version == (0, 1, 0)
    with pytest.raises(UnsupportedError, match="did not exist yet") as caught:
        uqff.save({0: LAYER, 7: uqff.deserialize(BLOBS["mxfp4"])}, tmp_path / "n.uqff", version=(0, 1, 3))
    assert caught.value.layer == "7"
    assert names(tmp_path) == ["m.uqff"]


def test_meta_tensors_are_not_written(tmp_path: Path) -> None:
    """They have a size and no bytes."""
    with pytest.raises(FormatError, match="meta device") as caught:
        uqff.save({0: LAYER, 4: LAYER.weight.to("meta")}, tmp_path / "m.uqff")
    assert caught.value.layer == "4"
    assert names(tmp_path) == []


def test_path_may_be_text_or_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare name goes into the working directory."""
    monkeypatch.chdir(tmp_path)
    assert uqff.save({0: LAYER}, "m.uqff") == [Path("m.uqff")]
    assert uqff.open("m.uqff")["0"] == LAYER


@pytest.mark.parametrize("name", ["m" * 250 + ".uqff", "層" * 80 + ".uqff"])
def test_longest_names(tmp_path: Path, name: str) -> None:
    """The temporary name is not longer than a file system allows."""
    uqff.save({0: LAYER}, tmp_path / name)
    assert names(tmp_path) == [name]


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    """As with any file that ``open`` makes."""
    old = os.umask(0o027)
    try:
        uqff.save({0: LAYER}, tmp_path / "m.uqff")
    finally:
        os.umask(old)
    assert (tmp_path / "m.uqff").stat().st_mode & 0o777 == 0o640


# ---------------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------------


def test_plan_of_shards() -> None:
    """A new shard begins when the next blob would pass the bound; a larger one stands alone."""
    sizes = {0: 5, 1: 5, 2: 1, 3: 20, 4: 1, 10: 9}

    def indices(sizes: dict[int, int], shard_bytes: int = SHARD_BYTES) -> list[list[int]]:
        items = [Item(str(index), "", "U8", (size,)) for index, size in sizes.items()]
        return [[int(item.name) for item in shard] for shard in cut(items, shard_bytes)]

    assert indices(sizes, 10) == [[0, 1], [2], [3], [4, 10]]
    assert indices(sizes, 100) == indices(sizes) == [[0, 1, 2, 3, 4, 10]]
    assert indices(sizes, 0) == [[0], [1], [2], [3], [4], [10]]
    assert indices({0: 5, 1: 5}, 9) == [[0], [1]]


@pytest.mark.parametrize("given_name", ["m.uqff", "m-0.uqff"])
def test_shards_are_numbered_from_zero(tmp_path: Path, given_name: str) -> None:
    """Whichever of the two names is given; the set opens as one model with the same layers."""
    paths = uqff.save(NEW, tmp_path / given_name, shard_bytes=200)
    assert len(paths) > 3
    assert [path.name for path in paths] == [f"m-{n}.uqff" for n in range(len(paths))]
    assert names(tmp_path) == sorted(path.name for path in paths)
    with uqff.open(tmp_path) as file:
        assert {int(key): layer for key, layer in file.items()} == NEW


def test_one_shard_keeps_its_name(tmp_path: Path) -> None:
    """``m.uqff`` stays ``m.uqff``, ``m-0.uqff`` stays ``m-0.uqff``, and so does a lone ``m-3.uqff``."""
    for name in ("m.uqff", "k-0.uqff", "l-3.uqff", "without suffix"):
        assert uqff.save({0: LAYER}, tmp_path / name) == [tmp_path / name]
        assert uqff.open(tmp_path / name)["0"] == LAYER


@pytest.mark.parametrize("stale", ["m-1.uqff", "m-5.uqff", "m-00.uqff"])
def test_shards_of_another_set_are_not_joined(tmp_path: Path, stale: str) -> None:
    """What would stay behind would be read as part of the new model, or as a gap."""
    old = write(tmp_path / stale, {"9": BLOB}).read_bytes()
    with pytest.raises(ShardError, match="a shard of another set") as caught:
        uqff.save({0: LAYER}, tmp_path / "m-0.uqff")
    assert caught.value.file == str(tmp_path / stale)
    assert names(tmp_path) == [stale]
    assert (tmp_path / stale).read_bytes() == old
    uqff.save({0: LAYER}, tmp_path / "other-0.uqff")


def test_shorter_set_replaces_itself(tmp_path: Path) -> None:
    """Saving the same set again is no conflict."""
    first = uqff.save(NEW, tmp_path / "m.uqff", shard_bytes=200)
    before = [path.read_bytes() for path in first]
    with uqff.open(first[0]) as file:
        assert uqff.save(file, tmp_path / "m.uqff", shard_bytes=200) == first
    assert [path.read_bytes() for path in first] == before


def test_progress(tmp_path: Path) -> None:
    """After each layer, with bytes that only grow, up to all of them."""
    steps: list[Step] = []
    uqff.save(NEW, tmp_path / "m.uqff", shard_bytes=200, progress=steps.append)
    total = sum(map(len, BLOBS.values()))
    assert [int(step.key) for step in steps] == sorted(NEW)
    assert [step.done for step in steps] == list(range(1, len(NEW) + 1))
    assert [step.work_done for step in steps] == sorted({step.work_done for step in steps})
    assert steps[-1] == Step("save", str(max(NEW)), len(NEW), len(NEW), total, total, "bytes")


# ---------------------------------------------------------------------------------------------------------------------
# Streaming
# ---------------------------------------------------------------------------------------------------------------------


class Lazy(Mapping[int, Layer]):
    """Makes layers when asked, and counts how many are alive."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.most = 0
        self.asked: list[int] = []

    def __getitem__(self, index: int) -> Layer:
        self.asked.append(index)
        weight = Unquant.of(torch.full((4, 4), float(index)))
        self.alive.add(weight.data)
        self.most = max(self.most, len(self.alive))
        return Layer(weight)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))

    def __len__(self) -> int:
        return self.count


def test_one_layer_is_held_at_a_time(tmp_path: Path) -> None:
    """Each layer is asked for twice, first for its size, and let go before the next but one."""
    lazy = Lazy(12)
    uqff.save(lazy, tmp_path / "m.uqff")
    assert lazy.most <= 2
    assert len(lazy.asked) == 2 * 12
    assert lazy.asked[:12] == list(range(12))
    assert not lazy.alive
    with uqff.open(tmp_path / "m.uqff") as file:
        assert [int(file[n].weight.dequantize()[0, 0]) for n in range(12)] == list(range(12))


def test_saving_over_the_open_file(tmp_path: Path) -> None:
    """The old file's bytes stay readable until it is closed."""
    path = write(tmp_path / "m.uqff", {str(k): b for k, b in enumerate(BLOBS.values())})
    with uqff.open(path) as file:
        uqff.save(file, path)
        assert {int(key): layer for key, layer in file.items()} == NEW
    with uqff.open(path) as file:
        assert {int(key): layer for key, layer in file.items()} == NEW


def test_link_is_replaced_not_followed(tmp_path: Path) -> None:
    """A rename puts a file where the link was; the file elsewhere is not touched."""
    target = write(tmp_path / "target", {"0": BLOBS["gguf"]})
    before = target.read_bytes()
    (tmp_path / "m.uqff").symlink_to(target)
    uqff.save({0: LAYER}, tmp_path / "m.uqff")
    assert not (tmp_path / "m.uqff").is_symlink()
    assert target.read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# What is left when something goes wrong
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path: Path) -> dict[str, bytes]:
    """A set of shards that is about to be replaced; its files' bytes by name."""
    paths = uqff.save(dict.fromkeys(NEW, LAYER), tmp_path / "m.uqff", shard_bytes=len(BLOB) * 5)
    assert len(paths) == 3
    return {path.name: path.read_bytes() for path in paths}


class Failing(dict[int, Layer]):
    """Gives every layer once, then fails at one."""

    def __init__(self, layers: Mapping[int, Layer], error: BaseException) -> None:
        super().__init__(layers)
        self.error = error
        self.asked: set[int] = set()

    def __getitem__(self, index: int) -> Layer:
        if index in self.asked and index == max(self):
            raise self.error
        self.asked.add(index)
        return super().__getitem__(index)


def is_untouched(directory: Path, old: dict[str, bytes]) -> bool:
    """Whether the old files are there with their old bytes, and nothing else."""
    return {path.name: path.read_bytes() for path in directory.iterdir()} == old


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), MemoryError(), SystemExit(1)])
def test_failing_source(tmp_path: Path, old: dict[str, bytes], error: BaseException) -> None:
    """The last layer cannot be made when all shards but one are written: the whole old set stays."""
    with pytest.raises(type(error)):
        uqff.save(Failing(NEW, error), tmp_path / "m.uqff", shard_bytes=300)
    assert is_untouched(tmp_path, old)


def test_layer_that_changes_while_it_is_written(tmp_path: Path, old: dict[str, bytes]) -> None:
    """A mapping that gives another layer the second time is caught by its size."""

    class Changing(Failing):
        def __getitem__(self, index: int) -> Layer:
            try:
                return super().__getitem__(index)
            except RuntimeError:
                return LAYER

    with pytest.raises(FormatError, match="layer changed while it was written"):
        uqff.save(Changing(NEW, RuntimeError()), tmp_path / "m.uqff", shard_bytes=300)
    assert is_untouched(tmp_path, old)


def test_full_disk(tmp_path: Path, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC on flushing, the last moment at which a disk can be full."""
    calls = []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("uqff.container.atomic.os.fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        uqff.save(NEW, tmp_path / "m.uqff", shard_bytes=300)
    assert is_untouched(tmp_path, old)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_write_that_fails(tmp_path: Path, old: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A real ENOSPC out of ``write``: the temporary file is a device that is always full."""

    def full(path: Any, mode: str, **options: Any) -> Any:
        file = open(path, mode, **options)  # noqa: SIM115
        if ".tmp-" in str(path):
            os.dup2(device, file.fileno())
        return file

    device = os.open("/dev/full", os.O_WRONLY)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(tensors, "open", full, raising=False)
            with pytest.raises(OSError, match="No space left"):
                uqff.save(NEW, tmp_path / "m.uqff", shard_bytes=300)
    finally:
        os.close(device)
    assert is_untouched(tmp_path, old)


def test_target_that_cannot_be_replaced(tmp_path: Path) -> None:
    """A directory stands where the file should go, or there is no directory to write to."""
    (tmp_path / "m.uqff").mkdir()
    with pytest.raises(OSError, match="directory"):
        uqff.save({0: LAYER}, tmp_path / "m.uqff")
    assert names(tmp_path) == ["m.uqff"]
    with pytest.raises(FileNotFoundError):
        uqff.save({0: LAYER}, tmp_path / "gone" / "m.uqff")


def test_killed_while_writing(tmp_path: Path, old: dict[str, bytes]) -> None:
    """SIGKILL in the middle of the last shard: the old set is there, whole; what else is there is no model."""
    code = (
        "import os, signal, sys, torch, uqff\n"
        "from uqff.families import Unquant\n"
        "class Layers(dict):\n"
        "    asked = 0\n"
        "    def __getitem__(self, index):\n"
        "        self.asked += 1\n"
        "        if self.asked > 2 * len(self) - 1:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return Unquant.of(torch.zeros(64, 64))\n"
        "uqff.save(Layers(dict.fromkeys(range(7))), sys.argv[1], shard_bytes=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.uqff")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == old
    (left,) = (path.name for path in tmp_path.iterdir() if path.is_dir())
    assert left.startswith(".m-0.uqff.tmp-")
    with uqff.open(tmp_path) as file:
        assert len(file) == len(NEW)
    uqff.save(NEW, tmp_path / "m.uqff", shard_bytes=300)
    assert left not in names(tmp_path), "the next of that name removes it"
