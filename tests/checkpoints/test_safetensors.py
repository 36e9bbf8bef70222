"""Checkpoints: single files and shards, what an index may name, what is refused, and that tensors stay on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from uqff.checkpoints import open_tensors
from uqff.errors import FormatError, ShardError
from uqff.limits import MAX_CONFIG_BYTES

A = torch.arange(6, dtype=torch.float32).view(2, 3)
B = torch.arange(4, dtype=torch.bfloat16)


def sharded(folder: Path, weight_map: dict[str, Any] | None = None, **index: Any) -> Path:
    """A checkpoint of two files and an index."""
    save_file({"a": A}, folder / "model-1.safetensors")
    save_file({"b": B}, folder / "model-2.safetensors")
    if weight_map is None:
        weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map, **index}))
    return folder


def test_a_single_file_and_its_config(tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architectures": ["X"]}')
    with open_tensors(tmp_path) as checkpoint:
        assert checkpoint.config == {"architectures": ["X"]}
        assert sorted(checkpoint) == ["a", "b"]
        assert (len(checkpoint), "a" in checkpoint, "c" in checkpoint) == (2, True, False)
        assert (checkpoint.shape("a"), checkpoint.dtype("a"), checkpoint.nbytes("a")) == ((2, 3), "F32", 24)
        assert (checkpoint.shape("b"), checkpoint.dtype("b"), checkpoint.nbytes("b")) == ((4,), "BF16", 8)
        a = checkpoint["a"]
        checkpoint.fetch("a")
        checkpoint.release("a")
        checkpoint.release("a", 8, 16)
        assert repr(checkpoint) == f"<TensorFiles {tmp_path}: 2 tensors>"
    assert torch.equal(a, A)


def test_shards_of_an_index(tmp_path: Path) -> None:
    with open_tensors(sharded(tmp_path, metadata={"total_size": 32})) as checkpoint:
        assert torch.equal(checkpoint["a"], A)
        assert torch.equal(checkpoint["b"], B)
        assert checkpoint.config == {}


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    save_file({"c": A}, sharded(tmp_path) / "model.safetensors")
    with open_tensors(tmp_path) as checkpoint:
        assert list(checkpoint) == ["c"]


def test_one_file_of_another_name_is_taken_and_several_are_not(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "weights.safetensors")
    with open_tensors(tmp_path) as checkpoint:
        assert list(checkpoint) == ["a"]
    save_file({"b": B}, tmp_path / "more.safetensors")
    with pytest.raises(ShardError, match=r"several safetensors files without an index: .*got more.*, weights"):
        open_tensors(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../model-2.safetensors",
        "/etc/passwd",
        "sub/model-2.safetensors",
        "sub\\model-2.safetensors",
        "C:model-2.safetensors",
        "model-2.safetensors\0",
        ".hidden.safetensors",
        "model-2.bin",
        "",
    ],
)
def test_an_index_names_plain_siblings_only(tmp_path: Path, name: str) -> None:
    """An index must not make a reader open other files."""
    (tmp_path / "model").mkdir()
    save_file({"b": B}, tmp_path / "model-2.safetensors")
    folder = sharded(tmp_path / "model", {"a": "model-1.safetensors", "b": name})
    with pytest.raises(FormatError, match="not the name of a sibling file"):
        open_tensors(folder)


def test_an_index_that_does_not_fit_its_files(tmp_path: Path) -> None:
    one, two = "model-1.safetensors", "model-2.safetensors"
    for weight_map, error, problem in [
        ({"a": one, "b": "model-3.safetensors"}, ShardError, "a file of the index is missing: got model-3"),
        ({"a": one, "b": one}, ShardError, "a tensor of the index is missing"),
        ({"a": one, "b": two, "c": two}, ShardError, "a tensor of the index is missing"),
        ([one], FormatError, "not a map of tensors to file names"),
        ({"a": 1}, FormatError, "not a map of tensors to file names"),
    ]:
        with pytest.raises(error, match=problem):
            open_tensors(sharded(tmp_path, weight_map))  # type: ignore[arg-type]


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    """Too long for the file system: a file that is missing, not an error of the system."""
    with pytest.raises(ShardError, match="a file of the index is missing"):
        open_tensors(sharded(tmp_path, {"a": "a" * 300 + ".safetensors"}))


def test_escapes_of_whole_characters_are_read(tmp_path: Path) -> None:
    """The near miss of half a character."""
    save_file({"a": A}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"a": "\\ud83d\\ude00 \\u00e9"}')
    with open_tensors(tmp_path) as checkpoint:
        assert checkpoint.config == {"a": "\U0001f600 \u00e9"}


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"a": A, "b": B}, tmp_path / "model-2.safetensors")
    with pytest.raises(FormatError, match="tensor occurs in two files"):
        open_tensors(tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"{", "not JSON"),
        (b"[]", "not a JSON object: got list"),
        (b"\xff{}", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":"\\ud800"}', "not JSON"),
        (b'{"\\udfff":1}', "not JSON"),
        (b" " * (MAX_CONFIG_BYTES + 1), "file is too long"),
    ],
)
def test_configurations_that_are_none(tmp_path: Path, text: bytes, problem: str) -> None:
    save_file({"a": A}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(FormatError, match=problem) as caught:
        open_tensors(tmp_path)
    assert caught.value.file == str(tmp_path / "config.json")


def test_broken_weights_are_named(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(FormatError, match="truncated") as caught:
        open_tensors(tmp_path)
    assert caught.value.file == str(tmp_path / "model.safetensors")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no safetensors file in"):
        open_tensors(tmp_path)
    for name in (tmp_path / "missing", "./a/b", "a/b/c", "/a/b", "name", "a/"):
        with pytest.raises(FileNotFoundError, match="no such directory"):
            open_tensors(name)
