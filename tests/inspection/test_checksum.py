"""Digests: what goes into them by hand, what does not change them, and lists that sha256sum reads and writes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given

import uqff
from tests.support import samples, samples_v1, strategies
from tests.support.moe_models import save_moe
from tests.support.samples import f32, run, u32
from uqff.codec.entries import from_entries
from uqff.errors import FormatError
from uqff.families import stack
from uqff.inspection.checksum import (
    Check,
    check,
    digest_files,
    digest_layer,
    digest_model,
    files_of,
    read_sums,
    sums_text,
    write_sums,
)
from uqff.migration import migrate, read_names
from uqff.models.architectures import LayerName, layer_names
from uqff.progress import Step
from uqff.schema.entries import RawTensor

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
PAGE = (ROOT / "docs" / "pages" / "reference" / "checksum.md").read_text()

Q4_0_TEXT = b"".join(
    [
        b"uqff layer 1\n",
        b"bias F32 [2]\n" + f32(0.5, -2.0),
        b"weight U8 [36]\n" + run(36),
        b"weight.dtype U32 []\n" + u32(2),
        b"weight.format U8 []\n" + b"\0",
        b"weight.shape U32 [2]\n" + u32(2, 32),
    ]
)
"""What is hashed of the example layer of the spec."""


def example_layer() -> uqff.Layer:
    """The same layer as a 0.x blob."""
    return uqff.deserialize(samples.gguf((2, 32), 2, run(36), samples.BIAS))


def entries_of(name: str, **more: samples_v1.Tensor) -> dict[str, RawTensor]:
    tensors = {**samples_v1.LAYERS[name], **more}
    return {suffix: RawTensor(dtype, shape, memoryview(data)) for suffix, (dtype, shape, data) in tensors.items()}


def test_layer_by_hand() -> None:
    """The digest is SHA-256 over the tag and the entries, sorted by suffix, with dtype, shape and bytes."""
    assert digest_layer(example_layer()) == hashlib.sha256(Q4_0_TEXT).hexdigest()


def test_spec_page_has_the_bytes_and_digests_of_this_layer() -> None:
    """The worked example of the page is what this implementation computes."""
    dump = re.search(r"```hex\n(.*?)```", PAGE, re.DOTALL)
    assert dump is not None
    assert bytes.fromhex(dump[1]) == Q4_0_TEXT
    layer = example_layer()
    assert layer.bias is not None
    experts = uqff.Layer(stack([layer.weight, layer.weight]), torch.stack([layer.bias, layer.bias]))
    lines = f"{digest_layer(layer)}  lm_head\n{digest_layer(experts)}  model.layers.0.mlp.experts.up_proj\n"
    stated = re.findall(r"`([0-9a-f]{64})`", PAGE)
    assert stated == [digest_layer(layer), digest_layer(experts), hashlib.sha256(lines.encode()).hexdigest()]


@pytest.mark.parametrize("name", samples_v1.LAYERS)
def test_same_in_both_generations(name: str) -> None:
    """A layer that 0.x and 1.x spell differently has one digest."""
    assert digest_layer(from_entries(entries_of(name))) == digest_layer(uqff.deserialize(samples.BLOBS[name]))


@given(strategies.versioned_layers())
def test_any_layer_has_a_digest_that_its_blob_keeps(layer_and_version: tuple[uqff.Layer, uqff.Version]) -> None:
    """Every layer that 0.x can hold has a digest, whatever its version, dtypes and dimensions."""
    layer, version = layer_and_version
    assert digest_layer(uqff.deserialize(uqff.serialize(layer, version=version))) == digest_layer(layer)


def test_every_part_counts() -> None:
    """A changed byte of any entry changes the digest, and so does a bias, its dtype, and the family."""
    digests = {digest_layer(uqff.deserialize(blob)) for blob in samples.BLOBS.values()}
    assert len(digests) == len(samples.BLOBS)
    weight, bias = example_layer()
    assert bias is not None
    variants = [(weight, None), (weight, bias), (weight, bias.half()), (weight, -bias)]
    assert len({digest_layer(uqff.Layer(*variant)) for variant in variants}) == len(variants)


def test_stack_is_made_of_the_digests_of_its_experts() -> None:
    """1.x stacks experts, 0.x has a layer for each: both give one digest; a common bias is the bias of each."""
    one, two = (uqff.Layer(uqff.quantize(torch.full((4, 32), value), "q4_0"), torch.ones(4)) for value in (1.0, 2.0))
    expected = hashlib.sha256(b"uqff experts 1\n" + bytes.fromhex(digest_layer(one) + digest_layer(two))).hexdigest()
    stacked = stack([one.weight, two.weight])
    assert digest_layer(uqff.Layer(stacked, torch.ones(2, 4))) == expected
    assert digest_layer(uqff.Layer(stacked, torch.ones(4))) == expected
    assert digest_layer(uqff.Layer(stacked)) != expected


def test_stacks_that_cannot_be_divided_are_hashed_whole() -> None:
    """HQQ shares words and scales among experts, F8Q8 blocks may cross: there is one text for all of them."""
    ragged = uqff.quantize(torch.ones(2, 3, 5), "f8q8")
    assert (
        digest_layer(uqff.Layer(ragged))
        == hashlib.sha256(
            b"uqff layer 1\n"
            b"weight U8 [33]\n" + bytes(ragged.to_entries()["weight"].data) + b"weight.format U8 []\n\5"
            b"weight.num_blocks U32 []\n" + u32(1) + b"weight.shape U32 [3]\n" + u32(2, 3, 5)
        ).hexdigest()
    )


def test_model_digest_does_not_depend_on_generation_and_shards(tmp_path: Path) -> None:
    """Per-expert 0.x layers, the stack of 1.x, one file and several: the same list, the same digest."""
    with (
        uqff.open(save_moe(tmp_path / "a", stacked=False, shard_bytes=3000)) as old,
        uqff.open(save_moe(tmp_path / "b", stacked=True, shard_bytes=5000)) as new,
    ):
        assert len(old.paths) > 1
        assert len(new.paths) > 1
        a, b = digest_model(old), digest_model(new)
    assert [(each.path, each.sha256, each.experts) for each in a.layers] == [
        (each.path, each.sha256, each.experts) for each in b.layers
    ]
    assert a.sha256 == b.sha256
    assert [each.keys for each in a.layers if each.experts] == [("7", "10"), ("5", "8"), ("6", "9")]
    assert sum(len(each.keys) for each in b.layers) == 15
    listing = "".join(f"{each.sha256}  {each.path}\n" for each in a.layers)
    assert a.sha256 == hashlib.sha256(listing.encode()).hexdigest()


def test_golden_layers_of_two_clients_agree() -> None:
    """0.6.0 and 0.9.5 quantised the same weights: their layers are the same but for the head, which 1.2 promotes."""
    paths = GOLDEN / "v0" / "llama-edge-64-f32", GOLDEN / "v1" / "1.2.0" / "llama-edge-64-f32"
    with uqff.open(paths[0] / "afq8-0.uqff") as old, uqff.open(paths[1] / "afq8-0.uqff") as new:
        a, b = ({each.path: each.sha256 for each in digest_model(file).layers} for file in (old, new))
    assert set(b) - set(a) == {"model.embed_tokens"}
    assert {path: b[path] for path in a} == a


def test_layers_without_a_configuration_keep_their_numbers(tmp_path: Path) -> None:
    """Nothing tells what 0.x layers are called: the model says why."""
    uqff.save({0: example_layer()}, tmp_path / "a.uqff")
    with uqff.open(tmp_path / "a.uqff") as file:
        model = digest_model(file)
    assert [each.path for each in model.layers] == ["0"]
    assert model.unnamed == "no config.json beside the file"


def test_configuration_of_another_model(tmp_path: Path) -> None:
    """A file that has not the layers of its configuration is not given wrong names."""
    directory = save_moe(tmp_path / "a", stacked=False)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_experts": 3}))
    with uqff.open(directory) as file:
        unnamed = digest_model(file).unnamed
    assert unnamed is not None
    missing = [f"{at} (model.layers.1.mlp.{name}_proj)" for at, name in ((18, "gate"), (19, "up"), (20, "down"))]
    assert f"expected 21 layers, got 18, without {', '.join(missing)}" in unnamed


def test_progress_ends_with_all_bytes(tmp_path: Path) -> None:
    """Progress counts up to the size of all layers."""
    seen: list[Step] = []
    with uqff.open(save_moe(tmp_path / "a", stacked=True)) as file:
        digest_model(file, progress=seen.append)
        size = sum(place.nbytes for key in file for place in file.places(key).values())
    assert [step.work_done for step in seen] == sorted(step.work_done for step in seen)
    assert (seen[-1].done, seen[-1].work_done) == (seen[-1].total, seen[-1].work)
    assert (seen[-1].work, seen[-1].unit) == (size, "bytes")


def test_files_of_a_directory(tmp_path: Path) -> None:
    """All files but hidden ones, lists and directories, by the bytes of their names; of a shard, its set."""
    for name in ("b.json", "a-0.uqff", "a-1.uqff", ".hidden", "SHA256SUMS", "SHA256SUMS.layers", "Z"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "folder").mkdir()
    assert files_of(tmp_path) == (tmp_path, ["Z", "a-0.uqff", "a-1.uqff", "b.json"])
    assert files_of(tmp_path / "a-1.uqff") == (tmp_path, ["a-0.uqff", "a-1.uqff"])
    digests = digest_files(tmp_path, ["Z", "b.json"])
    assert [(each.name, each.nbytes, each.sha256) for each in digests] == [
        ("Z", 1, hashlib.sha256(b"Z").hexdigest()),
        ("b.json", 6, hashlib.sha256(b"b.json").hexdigest()),
    ]


AWKWARD = ["plain", "two  spaces", "line\nbreak", "back\\slash", "return\r", "ünï", "-dash", " *"]


def test_lists_are_read_back(tmp_path: Path) -> None:
    """Any name survives, and so does one that is no text."""
    sums = dict.fromkeys([*AWKWARD, os.fsdecode(b"\xff")], "0" * 63 + "a")
    write_sums(tmp_path / "sums", sums_text(sums.items()))
    assert read_sums(tmp_path / "sums") == sums


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum")
def test_sha256sum_agrees(tmp_path: Path) -> None:
    """The list is the one that sha256sum writes, and it checks ours; awkward names included."""
    for name in AWKWARD:
        (tmp_path / name).write_bytes(name.encode() * 1000)
    directory, names = files_of(tmp_path)
    text = sums_text((each.name, each.sha256) for each in digest_files(directory, names))
    theirs = subprocess.run(["sha256sum", "--", *names], cwd=tmp_path, capture_output=True, check=True).stdout
    assert text.encode() == theirs
    write_sums(tmp_path / "SHA256SUMS", text + "# model 0\n")
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path, capture_output=True, check=True)


DIGEST = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (DIGEST, "not a line of checksums"),
        (f"{DIGEST} name", "not a line of checksums"),
        (f"{DIGEST}  ", "not a line of checksums"),
        (f"{DIGEST[1:]}g  name", "not a line of checksums"),
        (f"\\{DIGEST}  a\\t", "unknown escape"),
        (f"\\{DIGEST}  a\\", "unknown escape"),
        (f"{DIGEST}  ok\n{DIGEST[::-1]}  ok", "name occurs twice"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, problem: str) -> None:
    """A line that is none is an error with its number; nothing is skipped."""
    (tmp_path / "sums").write_text(f"# a comment\n{line}\n")
    with pytest.raises(FormatError, match=problem) as caught:
        read_sums(tmp_path / "sums")
    assert caught.value.field == f"line {2 + line.count(chr(10))}"


def test_near_misses_of_bad_lines(tmp_path: Path) -> None:
    """Binary mode, capitals, CR LF, a repeated line and a missing last line break are as good."""
    (tmp_path / "sums").write_bytes(f"{DIGEST.upper()} *a\r\n\n{DIGEST}  a\n{DIGEST}  b c".encode())
    assert read_sums(tmp_path / "sums") == {"a": DIGEST, "b c": DIGEST}


def test_check_names_what_differs() -> None:
    """Other bytes, nothing there, and what is as listed."""
    checks = check({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"})
    assert checks == [Check("a", "1", "1"), Check("b", "2", "9"), Check("c", "3", None)]
    assert [each.matches for each in checks] == [True, False, False]


def test_names_in_place_of_a_configuration(tmp_path: Path) -> None:
    """An architecture that is not known here has names as well, if somebody tells them."""
    directory = save_moe(tmp_path / "a", stacked=False)
    names = layer_names(json.loads((directory / "config.json").read_text()))
    (directory / "names").write_text("".join(f"{n.index} {n.key}{_place(n)}\n" for n in names))
    with uqff.open(directory) as file, uqff.open(save_moe(tmp_path / "b", stacked=True)) as other:
        expected = digest_model(other)
        (directory / "config.json").unlink()
        named = digest_model(file, names=read_names(directory / "names"))
    assert (named.sha256, named.unnamed) == (expected.sha256, None)


def _place(name: LayerName) -> str:
    return "" if name.expert is None else f"[{name.expert}]"


@pytest.mark.parametrize("stacked", [False, True])
def test_migrated_model_is_equal(stacked: bool, tmp_path: Path) -> None:
    """What the digest is for: a model and its copy in the other generation have one digest."""
    source = save_moe(tmp_path / "source", stacked=stacked)
    migrate(source, tmp_path / "copy", "0.2" if stacked else "1.2")
    with uqff.open(source) as a, uqff.open(tmp_path / "copy") as b:
        assert a.generation != b.generation
        assert digest_model(a).sha256 == digest_model(b).sha256
