"""Commands that need weights fetch what they need of a repository, no more, and no more than once."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path

import huggingface_hub
import pytest

import uqff
from tests.support.command_line import call
from tests.support.golden_models import TinyModel
from tests.support.hub_server import LARGE, SIGNATURE, TOKEN, Asked, Handler, Hub
from tests.support.lora_files import factors, write_adapter
from tests.support.small_models import files_of
from tests.support.tiny_files import ROOT
from tools.tiny import multimodal
from tools.tiny.gguf import write_gguf
from tools.tiny.mmproj import write_pair
from uqff import FormatError, HubError, ShardError, UnsupportedError
from uqff.checkpoints import open_tensors
from uqff.container.shards import at_hand
from uqff.limits import MAX_HEADER_VALUES

GOLDEN = ROOT / "tests" / "golden"
NAME = "owner/name"


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UQFF_KERNELS", "reference")


def fetched(hub: Hub, repo: str = NAME) -> set[str]:
    """The large files of a repository that were sent whole."""
    of = {name: data for name, data in hub.files(repo).items() if name.endswith(LARGE)}
    sent = {each.path.rpartition("/")[2] for each in hub.asked if "/cdn/" in each.path and each.sent}
    return {name for name, data in of.items() if hashlib.sha256(data).hexdigest() in sent}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    TinyModel(hidden_size=64, intermediate_size=64, heads=2, layers=1).write(tmp_path / "source")
    return tmp_path / "source"


def test_of_several_models_the_one_that_is_meant(hub: Hub, tmp_path: Path) -> None:
    """Its shards, the residual, and the documents; the same comes out as beside the files."""
    folder = GOLDEN / "v0" / "qwen2-f32"
    hub.put(NAME, files_of(folder) | {"extra.bin": b"x" * 1000, "sub/q4_0-0.uqff": b"x", "README.md": b"# x"})
    for name, options in ((f"{NAME}:q4_0", ()), (NAME, ("--isq", "q4_0")), (f"hf://{NAME}@main/q4_0-0.uqff", ())):
        out = tmp_path / "out"
        assert call("migrate", name, out, *options, "--force", "--quiet")[:2] == (0, "")
        assert fetched(hub) == {"q4_0-0.uqff", "residual.safetensors"}
        assert call("migrate", f"{folder}:q4_0", tmp_path / "expected", "--force", "--quiet")[0] == 0
        assert files_of(out) == files_of(tmp_path / "expected")
    assert not any(each.path.endswith(("extra.bin", "README.md")) for each in hub.asked)
    hub.asked.clear()
    assert call("dequantize", f"{NAME}:q4_0", tmp_path / "plain", "--quiet")[0] == 0
    assert not fetched(hub)
    code, _, errors = call("dequantize", NAME, tmp_path / "none")
    assert (code, f"choose one, such as hf://{NAME}:afq2" in errors) == (2, True)
    assert not fetched(hub)
    code, out_, _ = call("diff", f"{NAME}:q4_0", f"{folder}:q4_0")
    with uqff.open(f"{folder}:q4_0") as file:
        assert (code, f"{len(file)} of {len(file)} layers have the same bytes" in out_) == (0, True)


def test_every_model_where_all_are_meant(hub: Hub, tmp_path: Path) -> None:
    """To migrate a directory is to migrate what is in it; to verify it deeply, too."""
    folder = GOLDEN / "v0" / "qwen2-bf16"
    hub.put(NAME, files_of(folder))
    assert call("migrate", NAME, tmp_path / "out", "--to=1.0", "--quiet")[0] == 0
    assert {path.name for path in (tmp_path / "out").glob("*.uqff")} == {path.name for path in folder.glob("*.uqff")}
    assert uqff.verify(NAME, deep=True).layers == uqff.verify(folder, deep=True).layers
    with uqff.open(f"{NAME}:fp8") as ours, uqff.open(f"{folder}:fp8") as theirs:
        assert dict(ours) == dict(theirs)
    assert uqff.checksum(f"{NAME}:fp8", layers=True).text == uqff.checksum(f"{folder}:fp8", layers=True).text


def test_checkpoints(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    """Of one file or of several with an index; whatever else lies there in other forms is left."""
    files = files_of(checkpoint)
    hub.put(NAME, files | {"pytorch_model.bin": b"x", "other.safetensors": b"x", "onnx/model.safetensors": b"x"})
    assert call("quantize", f"{NAME}@main", tmp_path / "out", "--isq=q8_0", "--quiet")[0] == 0
    assert fetched(hub) == {"model.safetensors"}
    assert not any(each.path.endswith(".bin") for each in hub.asked)
    assert call("quantize", checkpoint, tmp_path / "expected", f"--base-model={NAME}", "--isq=q8_0", "--quiet")[0] == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    whole = files.pop("model.safetensors")
    hub.put("owner/shards", files | {
        "a.safetensors": whole, "consolidated.safetensors": b"x",
        "model.safetensors.index.json": json.dumps(
            {"weight_map": dict.fromkeys(open_tensors(checkpoint), "a.safetensors")}
        ).encode(),
    })  # fmt: skip
    hub.asked.clear()
    with open_tensors("hf://owner/shards") as tensors, open_tensors(checkpoint) as expected:
        assert list(tensors) == list(expected)
    assert fetched(hub, "owner/shards") == {"a.safetensors"}
    hub.put("owner/folder", {f"deep/er/{name}": data for name, data in (files | {"model.safetensors": whole}).items()})
    assert call("quantize", "hf://owner/folder/deep/er", tmp_path / "deep", "--isq=q8_0", "--quiet")[0] == 0
    assert files_of(tmp_path / "deep")["q8_0-0.uqff"] == files_of(tmp_path / "out")["q8_0-0.uqff"]


def test_of_two_layouts_the_one_that_the_engine_reads(hub: Hub, checkpoint: Path, tmp_path: Path) -> None:
    """Repositories of Mistral have each model twice; of Voxtral Realtime that of its authors counts, else the other."""
    folder = tmp_path / "voxtral"
    multimodal.write("Voxtral", folder)
    own = files_of(folder)
    named = {"architectures": ["VoxtralRealtimeForConditionalGeneration"], "model_type": "voxtral_realtime"}
    (folder / "config.json").write_text(json.dumps(named))
    (folder / "model.safetensors").write_bytes(files_of(checkpoint)["model.safetensors"])
    for repo, files in (("owner/twice", files_of(folder)), ("owner/alone", own)):
        hub.put(repo, files)
        hub.asked.clear()
        with open_tensors(f"hf://{repo}") as tensors, open_tensors(folder) as expected:
            assert list(tensors) == list(expected)
            assert "mm_streams_embeddings.embedding_module.tok_embeddings.weight" in tensors
            assert tensors.config == expected.config
        assert fetched(hub, repo) == {"consolidated.safetensors"}
        assert call("plan", repo)[0] == 0
    others = files_of(checkpoint)
    hub.put("owner/mistral", others | {"consolidated.safetensors": b"x", "params.json": own["params.json"]})
    with open_tensors("hf://owner/mistral") as tensors, open_tensors(checkpoint) as expected:
        assert list(tensors) == list(expected)
    assert fetched(hub, "owner/mistral") == {"model.safetensors"}


def test_an_index_of_a_stranger(hub: Hub) -> None:
    """It is read with the bounds of any other document, and nothing of the repository is fetched."""
    for index, problem in (
        (b'{"weight_map": {}, "a": [' + b"0," * MAX_HEADER_VALUES + b"0]}", "too many values"),
        (b'{"weight_map": {}, "a": ' + b"1" * 400 + b"}", "not JSON: got an integer of 400 digits"),
        (b'{"weight_map": {"a": "\\ud800"}}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "not a map of tensors to file names"),
        (b'{"weight_map": {"a": 1}}', "not a map of tensors to file names"),
    ):
        hub.put(NAME, {"model.safetensors.index.json": index, "a.safetensors": b"x"})
        with pytest.raises(FormatError, match=problem) as caught:
            at_hand(NAME)
        assert caught.value.file == f"hf://{NAME}/model.safetensors.index.json"
    assert not fetched(hub)


def test_gguf_files(hub: Hub, tmp_path: Path) -> None:
    """The only one of a repository, or the one that is named, by its file or its type."""
    model = GOLDEN / "gguf"
    assert call("convert", f"{model}:q4_0", tmp_path / "m-Q4_0.gguf", "--quiet")[0] == 0
    data = (tmp_path / "m-Q4_0.gguf").read_bytes()
    hub.put(NAME, {"m-Q4_0.gguf": data, "m-Q8_0.gguf": b"GGUF", "mmproj-m.gguf": b"GGUF"})
    for at, name in enumerate((f"{NAME}:Q4_0", f"{NAME}:q4_0", f"hf://{NAME}/m-Q4_0.gguf")):
        assert call("convert", name, tmp_path / f"out{at}", "--quiet", "--mmproj", "none")[:2] == (0, "")
    options = ("--isq", "q4_0", "--mmproj", "none", "--quiet")
    assert call("convert", NAME, tmp_path / "by-option", *options)[:2] == (0, "")
    assert files_of(tmp_path / "by-option") == files_of(tmp_path / "out0")
    assert fetched(hub) == {"m-Q4_0.gguf"}
    assert "no model of that type" in call("convert", NAME, tmp_path / "none", "--isq", "q2k")[2]
    code, _, errors = call("convert", NAME, tmp_path / "none")
    assert (code, f"choose one, such as hf://{NAME}/m-Q4_0.gguf" in errors) == (2, True)
    assert "no model of that type" in call("convert", f"{NAME}:q2k", tmp_path / "none")[2]


def test_a_model_that_sees(hub: Hub, tmp_path: Path) -> None:
    """With the only mmproj file of its folder, or the one that is named; or without. A plan reads heads only."""
    write_pair("Qwen2.5-VL", tmp_path)
    text, vision = ((tmp_path / each).read_bytes() for each in ("model.gguf", "mmproj-model.gguf"))
    hub.put(NAME, {"q/m-F32.gguf": text, "q/mmproj-F32.gguf": vision})
    assert call("quantize", tmp_path / "model.gguf", tmp_path / "here", "--isq", "q8_0", "--quiet")[0] == 0
    name = f"hf://{NAME}/q"
    assert call("plan", name, "--json")[1] == call("plan", tmp_path / "model.gguf", "--json")[1].replace(
        str(tmp_path / "model.gguf"), name
    )
    assert 0 < hub.bytes_sent() < len(text + vision) / 2
    hub.asked.clear()
    assert call("quantize", name, tmp_path / "fetched", "--isq", "q8_0", "--quiet")[:2] == (0, "")
    (left, right) = (files_of(tmp_path / each) for each in ("here", "fetched"))
    assert {each for each in left if left[each] != right[each]} == {"uqff_report.json"}  # which names the repository
    assert fetched(hub) == {"q/m-F32.gguf", "q/mmproj-F32.gguf"}

    hub.put("owner/several", {"m.gguf": text, "mmproj-a.gguf": vision + bytes(32), "mmproj-b.gguf": vision})
    for command in (["quantize", "--isq", "q8_0"], ["convert"], ["plan"]):
        out = [] if command == ["plan"] else [tmp_path / "none"]
        code, _, errors = call(*command, "owner/several", *out)
        assert (code, "choose one (--mmproj mmproj-a.gguf)" in errors) == (2 if command == ["convert"] else 1, True)
    for named, names in (("mmproj-b.gguf", {"m.gguf", "mmproj-b.gguf"}), ("none", {"m.gguf"})):
        hub.asked.clear()
        assert call("convert", "owner/several", tmp_path / named, "--mmproj", named, "--quiet")[:2] == (0, "")
        assert (tmp_path / named / "preprocessor_config.json").exists() == (named != "none")
        assert fetched(hub, "owner/several") <= names
    code, _, errors = call("convert", "owner/several", tmp_path / "none2", "--mmproj", "mmproj-c.gguf")
    assert (code, "no such file in the repository" in errors) == (2, True)


def test_gguf_files_are_quantised(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the repository's name, a type's or a file's; of a split one all parts; from the cache when the hub is away."""
    write_gguf(TinyModel(hidden_size=64, intermediate_size=64, heads=2, layers=1), tmp_path / "m-f32.gguf", "f32")
    write_gguf(
        TinyModel(hidden_size=64, intermediate_size=64, heads=2, layers=1),
        tmp_path / "m-Q8_0.gguf",
        "q8_0",
        split_max_tensors=8,
    )
    files = {path.name: path.read_bytes() for path in tmp_path.glob("*.gguf")}
    parts = {name for name in files if "-of-" in name}
    hub.put(NAME, files | {"README.md": b"# x"})
    hub.put("owner/both", files | {"model.safetensors": b"x"})
    options = ("--isq=q4_0", "--quiet", "--requantize", "--force")
    assert call("quantize", tmp_path / "m-f32.gguf", tmp_path / "expected", *options)[0] == 0
    expected = (tmp_path / "expected/q4_0-0.uqff").read_bytes()
    for name in (f"{NAME}:f32", f"{NAME}@main:m-f32.gguf", f"hf://{NAME}/m-f32.gguf", "owner/both:F32"):
        assert call("quantize", name, tmp_path / "out", *options)[:2] == (0, ""), name
        assert (tmp_path / "out/q4_0-0.uqff").read_bytes() == expected
    assert fetched(hub) == {"m-f32.gguf"}
    first = min(parts)
    for name in (f"{NAME}:q8_0", f"{NAME}:{first}"):
        with uqff.open_checkpoint(name) as here, uqff.open_checkpoint(tmp_path / first) as there:
            assert list(here) == list(there)
    assert fetched(hub) == {"m-f32.gguf", *parts}
    code, _, errors = call("quantize", NAME, tmp_path / "none", *options)
    assert (code, f"choose one, such as hf://{NAME}/{first}" in errors) == (1, True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in (f"{NAME}:f32", f"{NAME}:m-f32.gguf"):
        assert call("quantize", name, tmp_path / "out", *options)[:2] == (0, ""), name
    assert "several GGUF files" in call("quantize", NAME, tmp_path / "none", *options)[2]
    assert "HF_HUB_OFFLINE is set" in call("quantize", f"{NAME}:other.gguf", tmp_path / "none", *options)[2]


def test_adapters(hub: Hub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their weights and documents, once; with a weight behind the name; what is no adapter is not fetched."""
    path = "model.layers.0.mlp.up_proj"
    write_adapter(tmp_path / "adapter", factors(path, 64, 64))
    hub.put("me/adapter", files_of(tmp_path / "adapter") | {"optimizer.safetensors": b"x", "x.bin": b"x"})
    options = ("--isq=q8_0", "--quiet")
    local = f"--lora={tmp_path}/adapter:.5"
    assert call("quantize", checkpoint, tmp_path / "expected", *options, local)[0] == 0
    for at, name in enumerate(("me/adapter", "hf://me/adapter@main")):
        assert call("quantize", checkpoint, tmp_path / f"{at}", *options, f"--lora={name}:.5")[0] == 0
        assert files_of(tmp_path / f"{at}") == files_of(tmp_path / "expected")
    assert fetched(hub, "me/adapter") == {"adapter_model.safetensors"}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with uqff.lora.open_adapter(tmp_path / "adapter") as here, uqff.lora.open_adapter("me/adapter") as cached:
        assert cached[path].delta().tobytes() == here[path].delta().tobytes()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.put("me/pickle", {"adapter_config.json": b"{}", "adapter_model.bin": b"x"})
    with pytest.raises(UnsupportedError, match=r"pickle, which may run code.*hf://me/pickle/adapter_model.bin"):
        uqff.lora.open_adapter("me/pickle")
    hub.put(NAME, files_of(checkpoint))
    with pytest.raises(HubError, match=f"^no adapter in the repository: .*hf://{NAME}"):
        uqff.lora.open_adapter(NAME)
    with pytest.raises(UnsupportedError, match="not the name of an adapter: expected a repository, or a folder in it"):
        uqff.lora.open_adapter(f"{NAME}:q4k")
    assert not fetched(hub) | fetched(hub, "me/pickle")


def test_without_the_hub(hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the cache serves, offline or unreachable; what is not, is said to need the hub."""
    hub.put(NAME, files_of(GOLDEN / "v1" / "1.2.0" / "qwen2-f16") | {"config.json": b"{}"})
    with uqff.open(f"{NAME}:fp8") as file:
        first = dict(file)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    with uqff.open(f"{NAME}:fp8") as file:
        assert dict(file) == first
    assert uqff.inspect(f"{NAME}:fp8").types[0].kind == "fp8"
    assert uqff.verify(f"{NAME}:fp8").clean
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        uqff.open("owner/other")
    assert len(hub.asked) == asked
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def hung_up(handler: Handler, request: Asked) -> bool:
        handler.close_connection = True
        return True

    hub.fault = hung_up
    with uqff.open(f"{NAME}:fp8") as file:
        assert dict(file) == first
    with pytest.raises(HubError, match="hf://owner/other"):
        uqff.open("owner/other")
    with pytest.raises(ShardError, match=f"no model of that type: expected fp8, got afq4 .*hf://{NAME}"):
        uqff.open(f"{NAME}:afq4", isq=None)


def test_without_the_hub_a_type_means_that_type(hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is in the cache, however many models that are: another one, or a checkpoint, is no substitute."""
    files = files_of(GOLDEN / "v1" / "1.2.0" / "qwen2-f16") | {"config.json": b"{}"}
    hub.put(NAME, files)
    hub.put("owner/both", files)
    hub.put("owner/plain", files_of(checkpoint))
    with uqff.open(f"{NAME}:fp8"), uqff.open("owner/both:fp8"), uqff.open("owner/both:afq4"):
        at_hand("owner/plain")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for kind, isq in (("afq4", None), (None, "afq4")):
        with pytest.raises(ShardError, match=f"^no model of that type: expected fp8, got afq4 .file hf://{NAME}"):
            uqff.open(NAME if kind is None else f"{NAME}:{kind}", isq=isq)
    for kind in ("fp8", "afq4"):
        assert Path(at_hand(f"owner/both:{kind}")).name == f"{kind}-0.uqff"
        assert Path(at_hand("owner/both", kind)).name == f"{kind}-0.uqff"
    with pytest.raises(ShardError, match=r"^no model of that type: expected a .uqff file, got fp8"):
        at_hand("owner/plain:fp8")
    assert Path(at_hand("owner/plain", "q4k")).is_dir()  # what it is to become


def test_without_the_hub_a_type_is_looked_into_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two models in the cache the one that ``isq`` means, whatever is asked about it."""
    folder = GOLDEN / "v1" / "1.2.0" / "qwen2-f16"
    report = (folder / "fp8.uqff_report.json").read_bytes()
    hub.put(NAME, files_of(folder) | {"config.json": b"{}", "uqff_report.json": report})
    with uqff.open(f"{NAME}:fp8") as fp8, uqff.open(f"{NAME}:afq4"):
        layers = len(fp8)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert uqff.verify(NAME, isq="fp8").layers == layers
    assert uqff.verify(NAME).layers == 2 * layers
    assert list(uqff.checksum(NAME, isq="fp8").digests) == ["fp8-0.uqff"]
    assert [each.quant for each in uqff.report(NAME, isq="fp8").report.outputs] == ["fp8"]
    assert uqff.inspect(NAME, isq="fp8").types[0].kind == "fp8"
    assert uqff.inspect(NAME, 0, isq="fp8", statistics=False).row.path.endswith("fp8-0.uqff")


def test_a_download_that_breaks_off_is_gone_on_with(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    """The hub's package says so, and names the address; whoever reads the log cannot take it. A busy hub is waited for.

    The package asks what there is once more, and does not ask again.
    """
    hub.put(NAME, files_of(GOLDEN / "v1" / "1.2.0" / "qwen2-f16") | {"config.json": b"{}"})
    lists: list[str] = []
    broken: list[str] = []

    def fault(handler: Handler, asked: Asked) -> bool:
        if asked.path.startswith("/api/"):
            lists.append(asked.path)
            if len(lists) == 2:
                handler.send(429, b"{}", {"Retry-After": "0"})
            return len(lists) == 2
        if "/cdn/" not in asked.path or broken:
            return False
        broken.append(asked.path)
        data = hub.objects[asked.path.rpartition("/")[2]]
        handler.send(200, data[:-9], {"Content-Length": str(len(data))})
        handler.close_connection = True
        return True

    hub.fault = fault
    with caplog.at_level("WARNING"), uqff.open(f"hf://{NAME}:fp8") as file:
        assert len(file) == 9
    assert len(lists) > 2
    said = [record.getMessage() for record in caplog.records if record.name.startswith("huggingface_hub")]
    if int(huggingface_hub.__version__.partition(".")[0]):  # before 1.0, it says nothing
        assert any("/cdn/" in text and "?..." in text for text in said)
    assert SIGNATURE not in str(said)


def test_failures_are_one_line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback and no token; a full disk is a full disk; a mistyped path is said to be one, or no repository."""
    files = files_of(GOLDEN / "v1" / "1.2.0" / "qwen2-f16")
    hub.put(NAME, files)

    def fails(handler: Handler, asked: Asked) -> bool:
        if "/cdn/" not in asked.path:
            return False
        handler.send(403, f"{asked.headers} {TOKEN}".encode(), {"X-Error-Message": f"see {TOKEN}"})
        return True

    hub.fault = fails
    code, out, errors = call("migrate", f"{NAME}:fp8", tmp_path / "out")
    assert (code, out, errors.count("\n"), TOKEN in errors) == (2, "", 1, False)
    assert errors.startswith("uqff: the hub refuses: got status 403")
    hub.fault = None
    code, _, errors = call("quantize", "models/lama", tmp_path / "out", "--isq=q4k")
    assert (code, errors) == (2, "uqff: no such repository, or it is private (file hf://models/models/lama)\n")
    code, _, errors = call("run", f"{NAME}:nope", "--prompt=x")
    assert (code, "no model of that type: expected afq4 or fp8, got nope" in errors) == (1, True)
    with pytest.raises(ShardError, match="several models"):
        at_hand(NAME)
    with pytest.raises(HubError, match="no such file in the repository"):
        at_hand(f"hf://{NAME}/none.uqff")

    def full(*args: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    said = f"uqff: {os.strerror(errno.ENOSPC)}: {tmp_path / 'cache'}\n"
    assert call("migrate", f"{NAME}:fp8", tmp_path / "out")[1:] == ("", said)
