"""Looking into models on the hub by ranges: the same is found as beside the files, and hardly anything is read."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import torch

import uqff
from tests.support.command_line import call
from tests.support.golden_models import TinyModel
from tests.support.hub_server import Hub
from tests.support.samples_gguf import ALL_KINDS, Q8_0, Tensor, gguf
from tests.support.small_models import files_of
from tests.support.tiny_files import ROOT
from tools.tiny.gguf import write_gguf
from uqff import UnsupportedError
from uqff.checkpoints.gguf.rope import llama3_factors
from uqff.container.framing import build_header
from uqff.hub.names import HubName, hub_name
from uqff.inspection import remote
from uqff.inspection.gguf import inspect_gguf

pytestmark = pytest.mark.long

GOLDEN = ROOT / "tests" / "golden"
VECTORS = ROOT / "spec" / "vectors"


@pytest.fixture
def sparing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As little as possible is read, and what is not read is no zero but nonsense: a look at it would show."""
    for name, value in {"FIRST": 64, "SMALL": 32, "PROBE": 64, "GAP": 16}.items():
        monkeypatch.setattr(remote, name, value)

    def make_hole(file: Any, nbytes: int) -> None:
        file.write((b"\xa5\x5a\xff" * (nbytes // 3 + 1))[:nbytes])

    monkeypatch.setattr(remote, "make_hole", make_hole)


def blobs_file(folder: Path, patterns: str) -> Path:
    """One file of 0.x with every blob of the vectors, as if they were layers."""
    folder.mkdir()
    blobs = [path.read_bytes() for path in sorted(VECTORS.glob(patterns))]
    assert len(blobs) > 100
    safetensors_file(folder / "q4k-0.uqff", {str(at): blob for at, blob in enumerate(blobs)})
    return folder


def safetensors_file(path: Path, blobs: dict[str, bytes]) -> None:
    header, names = build_header([(name, "U8", (len(blob),)) for name, blob in blobs.items()])
    path.write_bytes(header + b"".join(blobs[name] for name in names))


@pytest.mark.usefixtures("sparing")
@pytest.mark.parametrize("which", ["entries", "bad-entries", "bad", "container", "0.x blobs", "0.x bad blobs"])
def test_the_same_is_found_as_beside_the_files(hub: Hub, tmp_path: Path, which: str) -> None:
    """Summaries, violations and notes of every family in both generations, and of everything that is broken.

    What is not read is nonsense here, so nothing that was not read can have been looked at.
    """
    if which.startswith("0.x"):
        folder = blobs_file(tmp_path / "blobs", "bad/*.bin" if "bad" in which else "[!b]*/*.bin")
    else:
        folder = VECTORS / which
    hub.put("owner/name", files_of(folder))
    for arguments in (["inspect"], ["verify", "--structure"])["bad" in which :]:
        expected = call(*arguments, folder, "--json")
        found = call(*arguments, "owner/name", "--json")
        for ours, theirs in zip(found[1:], expected[1:], strict=True):
            assert ours == theirs.replace(str(folder), "hf://owner/name")
        assert found[0] == expected[0]
        assert len(expected[1]) > 1000


def test_in_a_process_of_its_own(hub: Hub, tmp_path: Path) -> None:
    """Nothing but the command has imported anything of the hub's package there, as it has in these tests."""
    folder = GOLDEN / "v1" / "1.2.0" / "qwen2-f16"
    hub.put("owner/name", files_of(folder) | {"config.json": b"{}"})
    (tmp_path / "fp8-0.uqff").write_bytes((folder / "fp8-0.uqff").read_bytes())
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache")}
    environment |= {"UQFF_KERNELS": "reference", "HF_HUB_DISABLE_XET": "1"}
    refused = "uqff: the hub may not be asked: HF_HUB_OFFLINE is set (file hf://owner/name)\n"
    for arguments, offline, expected in (
        (["inspect", "owner/name:fp8"], "0", (0, "")),
        (["inspect", "owner/name:fp8"], "1", (2, refused)),
        (["verify", "owner/name:fp8", "--deep"], "0", (0, "")),
        (["inspect", "owner/name:fp8"], "1", (0, "")),
        (["push", str(tmp_path), "owner/other", "--quiet"], "0", (0, "")),
    ):
        ended = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "uqff", *arguments],
            env=environment | {"HF_HUB_OFFLINE": offline},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (ended.returncode, ended.stderr) == expected, arguments
    assert hub.files("owner/other")["fp8-0.uqff"] == (folder / "fp8-0.uqff").read_bytes()


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of 1.2 with two layers each, 4 MB."""
    folder = tmp_path_factory.mktemp("big")
    weight = torch.linspace(-1, 1, 1 << 20).reshape(1024, 1024)
    for at, kind in enumerate(("q8_0", "afq4")):
        layer = uqff.Layer(uqff.quantize(weight, kind))
        layers = {f"model.layers.{at}.mlp.{name}_proj": layer for name in ("up", "down")}
        uqff.save(layers, folder / f"{kind}.uqff")
    return folder


def test_hardly_anything_is_read(hub: Hub, big: Path) -> None:
    """Of a file the first bytes, and the small entries: of weights, none but those that lie between."""
    files = files_of(big)
    hub.put("owner/name", files)
    whole = sum(map(len, files.values()))
    assert call("inspect", "owner/name")[0] == 0
    assert call("verify", "owner/name")[1].startswith("note: the structure was checked; the weights were not read\n")
    assert hub.bytes_sent() < whole / 3
    assert all("range" in each.headers for each in hub.asked if "/cdn/" in each.path)


def test_a_plan_of_a_model_that_is_uqff(hub: Hub, big: Path) -> None:
    """Sizes as beside the files, of headers; what a plan would choose types for is asked for, and nothing fetched."""
    files = files_of(big)
    hub.put("owner/name", files)
    ours, theirs = call("plan", "owner/name", "--json"), call("plan", big, "--json")
    assert ours[1] == theirs[1].replace(str(big), "owner/name")
    assert (ours[0], ours[2]) == (0, "")
    assert hub.bytes_sent() < sum(map(len, files.values())) / 3
    assert [each["kind"] for each in json.loads(call("plan", "owner/name:afq4", "--json")[1])["sizes"]] == ["afq4"]
    hub.asked.clear()
    code, _, errors = call("plan", "owner/name", "--bits", "4")
    assert (code, "the model is UQFF already" in errors) == (1, True)
    assert not any("range" in each.headers or "/cdn/" in each.path for each in hub.asked)


@pytest.mark.usefixtures("sparing")
@pytest.mark.parametrize("shards", [1, 2])
def test_a_plan_of_a_checkpoint(hub: Hub, tmp_path: Path, shards: int) -> None:
    """Of headers and documents alone: the same as beside the files; what is broken is named as on the hub."""
    folder = tmp_path / "checkpoint"
    TinyModel(hidden_size=256, intermediate_size=256, heads=2, layers=1).write(folder)
    if shards > 1:
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        parts = {f"{at}.safetensors": dict(list(tensors.items())[at::shards]) for at in range(shards)}
        for part, held in parts.items():
            safetensors.numpy.save_file(held, folder / part)
        index = {name: part for part, held in parts.items() for name in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "pytorch_model.bin").write_bytes(bytes(1 << 20))
    files = files_of(folder)
    hub.put("owner/name", files)
    for options in ([], ["--ranks", "2"], ["--types", "q4_0,afq4"]):
        hub.asked.clear()
        ours, theirs = (call("plan", source, "--json", *options) for source in ("owner/name", folder))
        assert ours[1] == theirs[1].replace(str(folder), "owner/name")
        assert (ours[0], ours[2]) == (0, "")
        assert 0 < hub.bytes_sent() < sum(map(len, files.values())) / 20
    last = [name for name in files if name.endswith(".safetensors")][-1]
    hub.put("owner/broken", files | {last: (1 << 60).to_bytes(8, "little") + files[last][8:]})
    code, _, errors = call("plan", "owner/broken")
    assert (code, f"owner/broken/{last}" in errors) == (1, True)


@pytest.mark.usefixtures("sparing")
@pytest.mark.parametrize("parts", [1, 3])
def test_a_plan_of_a_gguf_file(hub: Hub, tmp_path: Path, parts: int) -> None:
    """Of the heads of its parts alone, however long, and the tensors that are numbers of the configuration."""
    model = TinyModel(vocab_size=600, hidden_size=256, intermediate_size=256, heads=2, layers=1)
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    factors = {"rope_freqs.weight": llama3_factors(scaling, model.config()["rope_theta"], 128)}
    split = 5 if parts > 1 else 0
    folder = tmp_path / "files"
    folder.mkdir()
    write_gguf(model, folder / "a.gguf", "f16", vocabulary=True, split_max_tensors=split, extra=factors)
    files = files_of(folder)
    assert len(files) == parts
    hub.put("owner/name", files | {"README.md": b"", "mmproj-a.gguf": b"GGUF"})
    source = folder / next(iter(files))
    hub.put("owner/several", {f"x-{kind}.gguf": files[source.name] for kind in ("Q4_0", "F16")})
    for options in ([], ["--ranks", "2"], ["--types", "q4_0,afq4"]):
        hub.asked.clear()
        options = [*options, "--mmproj", "none"]
        ours, theirs = (call("plan", each, "--json", *options) for each in ("owner/name", source))
        assert ours[1] == theirs[1].replace(str(source), "owner/name")
        assert (ours[0], ours[2]) == (0, "")
        assert 0 < hub.bytes_sent() < sum(map(len, files.values())) / 10
    code, _, errors = call("plan", "owner/several")
    assert (code, "several GGUF files: choose one" in errors) == (1, True)
    if parts == 1:
        assert call("plan", "owner/several:f16", "--json")[0] == 0
        broken = files[source.name][:24] + b"\xff" * 40 + files[source.name][64:]
        hub.put("owner/broken", {source.name: broken})
        hub.asked.clear()
        code, _, errors = call("plan", "owner/broken")
        assert (code, f"owner/broken/{source.name}" in errors) == (1, True)
        assert hub.bytes_sent() < 2000


def test_a_gguf_file_is_inspected(hub: Hub, tmp_path: Path) -> None:
    """Its head is read by ranges; of several files, one must be named."""
    sound = tmp_path / "m.gguf"
    large = Tensor("large", (1 << 20, 1), 8, bytes((1 << 20) // 32 * 34))
    data = gguf(ALL_KINDS, [Q8_0, large])
    sound.write_bytes(data)
    hub.put("owner/name", {"m.gguf": data, "mmproj-m.gguf": b"GGUF"})
    for name in ("owner/name", "hf://owner/name/m.gguf"):
        hub.asked.clear()
        theirs, ours = (call("inspect", each, "--json") for each in (name, sound))
        assert theirs == (0, ours[1].replace(str(sound), "hf://owner/name/m.gguf"), "")
        assert 0 < hub.bytes_sent() < len(data) / 4
    hub.put("owner/several", {"m-Q8_0.gguf": data, "m-F16.gguf": data})
    code, _, errors = call("inspect", "owner/several")
    assert (code, "several GGUF files: choose one" in errors) == (1, True)
    assert call("inspect", "owner/several:q8_0")[:1] == (0,)
    assert inspect_gguf("owner/several", isq="F16").files[0].path == "hf://owner/several/m-F16.gguf"


def test_one_layer_is_read_by_ranges(hub: Hub, big: Path) -> None:
    """With its values and its statistics, the same as beside the file; the others are not."""
    files = files_of(big)
    hub.put("owner/name", files)
    for options in ([], ["--no-stats"], ["--hex"], ["--hex", "--no-stats", "--hex-bytes=0"]):
        ours = call("inspect", "owner/name:afq4", "1", *options, "--json")
        theirs = call("inspect", f"{big}:afq4", "1", *options, "--json")
        assert ours[1] == theirs[1].replace(str(big), "hf://owner/name")
        assert (ours[0], ours[2]) == (0, "")
    hub.asked.clear()
    call("inspect", "owner/name:afq4", "1", "--no-stats")
    assert hub.bytes_sent() < len(files["afq4.uqff"]) / 2
    code, _, errors = call("inspect", "owner/name:afq4", "model.layers.1.mlp.op_proj")
    assert (code, "did you mean model.layers.1.mlp.up_proj?" in errors) == (2, True)


def test_names(hub: Hub, tmp_path: Path) -> None:
    """A branch, a tag with a slash, a commit, a pull request, a folder, a file, a type."""
    old = files_of(GOLDEN / "v1" / "1.1.0" / "qwen2-f16")
    new = files_of(GOLDEN / "v1" / "1.2.0" / "qwen2-f16")
    first = hub.put("owner/name", old)
    hub.put("owner/name", old, "refs/pr/3")
    hub.put("owner/name", old, "v1/one")
    hub.put("owner/name", new | {f"sub/folder/{name}": data for name, data in old.items()})
    for name, version in {
        "owner/name:fp8": "1.2.0",
        "hf://owner/name:fp8": "1.2.0",
        "hf://owner/name/fp8-0.uqff": "1.2.0",
        f"owner/name@{first}": "1.1.0",
        "owner/name@refs/pr/3": "1.1.0",
        "hf://owner/name@refs/pr/3/afq4-0.uqff": "1.1.0",
        "hf://owner/name@v1%2Fone:afq4": "1.1.0",
        "hf://owner/name/sub/folder": "1.1.0",
        "hf://owner/name@main/sub/folder/afq4-0.uqff": "1.1.0",
    }.items():
        summary = uqff.inspect(name)
        assert [str(each) for each in summary.versions] == [version], name
        assert summary.files[0].path.startswith("hf://owner/name")
        assert call("inspect", name)[0] == 0
    assert uqff.inspect("owner/name", isq="afq4").types[0].kind == "afq4"
    for name in ("hf://datasets/owner/name", "hf://owner", "hf://owner/../x", "hf://owner/name/a//b"):
        with pytest.raises(UnsupportedError, match="not the name of a model on the hub"):
            hub_name(name)
    (tmp_path / "own" / "name").mkdir(parents=True)
    for text in ("a/b/c", "model.uqff", "a/model.gguf", "./a/b", "/a/b", "a/", "~/a", f"{tmp_path}:q4k", "own\\name"):
        assert hub_name(text) is None
    assert hub_name("a/b@r:q4k") == HubName("a/b", "r", "", "q4k")
    assert str(hub_name("hf://models/models/name")) == "hf://models/models/name"  # of an owner of that name


def test_what_is_on_this_machine_comes_first(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``models/mine`` that is a directory is no repository, nor is one with a mistyped type."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    hub.put("owner/name", files_of(GOLDEN / "v1" / "1.2.0" / "qwen2-f16"))
    assert "no .uqff file in the directory" in call("inspect", "owner/name")[2]
    assert "no model of that type" in call("inspect", "owner/name:afq4")[2]
    assert not hub.asked
    assert call("inspect", "hf://owner/name:afq4")[0] == 0


def test_reports(hub: Hub) -> None:
    """The report of a repository is checked against its files; one that does not fit is said not to."""
    folder = GOLDEN / "v1" / "1.2.0" / "qwen2-f16"
    files = files_of(folder)
    files["uqff_report.json"] = files.pop("fp8.uqff_report.json")
    del files["afq4-0.uqff"], files["afq4.uqff_report.json"]
    hub.put("owner/name", files)
    code, out, errors = call("report", "owner/name")
    assert (code, errors) == (0, "")
    assert "fits the files" in out
    assert out.startswith("hf://owner/name")
    report = json.loads(files["uqff_report.json"])
    report["outputs"][0]["shards"] = ["fp8-1.uqff"]
    hub.put("owner/name", files | {"uqff_report.json": json.dumps(report).encode()})
    code, _, errors = call("report", "owner/name")
    assert code == 1
    assert "shard is missing: expected fp8-1.uqff, got no such file (file hf://owner/name/uqff_report.json" in errors
    assert call("report", "owner/name", "--write")[0] == 2


def test_documents_are_read_once(hub: Hub) -> None:
    """For what they say and to be hashed alike; of a model with thousands of layers, a report has megabytes."""
    weights = (GOLDEN / "v1" / "1.2.0" / "qwen2-f16" / "fp8-0.uqff").read_bytes()
    files = {"config.json": b"{}", "fp8-0.uqff": weights, "notes.txt": b"a", "uqff_report.json": b'{"a": 1}'}
    hub.put("owner/name", files)
    assert uqff.checksum("owner/name").digests == {n: hashlib.sha256(data).hexdigest() for n, data in files.items()}
    asked = sorted(each.path.rpartition("/")[2] for each in hub.asked if "/resolve/" in each.path)
    assert asked == ["config.json", "notes.txt", "uqff_report.json"]


def test_checksums(hub: Hub, tmp_path: Path) -> None:
    """The hub has the digests of large files, so these are not read; small ones are."""
    files = files_of(GOLDEN / "v1" / "1.2.0" / "qwen2-f16")
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files["SHA256SUMS"] = "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()
    hub.put("owner/name", files)
    assert uqff.checksum("owner/name").digests == digests
    assert not any("/cdn/" in each.path for each in hub.asked)
    assert call("checksum", "owner/name")[1].encode() == files["SHA256SUMS"]
    assert call("checksum", "owner/name", "--check")[1].endswith(f"{len(digests)} of {len(digests)} are as listed\n")
    assert call("checksum", "owner/name:fp8")[1] == f"{digests['fp8-0.uqff']}  fp8-0.uqff\n"
    hub.put("owner/name", files | {"fp8-0.uqff": b"else"})
    code, out, _ = call("checksum", "owner/name", "--check")
    assert (code, "fp8-0.uqff: differs" in out) == (1, True)
    assert call("checksum", "owner/name", "--write")[0] == 2
    assert call("checksum", "owner/name", "--write", "--sums", tmp_path / "sums")[0] == 0
    assert "fp8-0.uqff" in (tmp_path / "sums").read_text()
