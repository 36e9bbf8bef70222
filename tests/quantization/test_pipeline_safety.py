"""Runs of the quantiser that go wrong, and those that must not: whole or not at all, bounded memory, either format."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.golden_models import TinyModel
from tests.support.quantize_child import run_child
from uqff.container import staging, tensors
from uqff.progress import Step
from uqff.quantization.run import quantize_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A qwen2 checkpoint: 8 layers in 0.x and 9 in 1.2, biases, 64 wide."""
    TinyModel(architecture="qwen2", hidden_size=64, heads=2, intermediate_size=128).write(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture(params=["0.2", "1.2"])
def format(request: pytest.FixtureRequest) -> str:
    """Each generation."""
    value: str = request.param
    return value


def test_what_is_there_is_not_overwritten(source: Path, format: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    quantize_model(source, out, ["q8_0"], version=format)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        quantize_model(source, out, ["q5_0"], version=format)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    quantize_model(source, out, ["q5_0"], version=format, force=True)
    assert (out / "q5_0-0.uqff").exists()
    assert not (out / "q8_0-0.uqff").exists()
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]


def test_force_replaces_models_only(source: Path, format: str, tmp_path: Path) -> None:
    """Not the source, not a home directory, not what a link points to."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    (tmp_path / "mixed" / "photos").mkdir(parents=True)
    (tmp_path / "mixed" / "q8_0-0.uqff").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    (tmp_path / "file").write_text("x")
    for name in ("home", "source", "mixed", "link", "file"):
        with pytest.raises(FileExistsError):
            quantize_model(source, tmp_path / name, ["q8_0"], version=format, force=True)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        quantize_model(source, tmp_path / "a" / "b", ["q8_0"], version=format)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "x"
    assert (tmp_path / "mixed" / "photos").is_dir()


@pytest.mark.parametrize("layers_done", [1, 4, 8])
def test_an_interrupt_leaves_nothing(source: Path, format: str, tmp_path: Path, layers_done: int) -> None:
    def interrupt(step: Step) -> None:
        if step.done == layers_done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_model(source, tmp_path / "out", ["q8_0"], version=format, progress=interrupt)
    assert os.listdir(tmp_path) == ["source"]


def test_a_failed_replacement_keeps_the_old_model(
    source: Path, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where directories cannot be exchanged, the old one has been moved away when the second step fails."""
    monkeypatch.setattr(staging, "exchange", lambda one, other: False)
    quantize_model(source, tmp_path / "out", ["q8_0"], version=format)
    rename, calls = os.rename, []

    def fail_second(old: Any, new: Any) -> None:
        calls.append(new)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        rename(old, new)

    monkeypatch.setattr(os, "rename", fail_second)
    with pytest.raises(OSError, match="Input/output error"):
        quantize_model(source, tmp_path / "out", ["q5_0"], version=format, force=True)
    assert sorted(os.listdir(tmp_path)) == ["out", "source"]
    assert (tmp_path / "out" / "q8_0-0.uqff").exists()


@pytest.mark.parametrize("writes", [1, 3, 9, 14])
def test_a_disk_that_fills_up_leaves_nothing(
    source: Path, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """Wherever it happens: in a header, in the residual, in a layer."""
    write, count = tensors.TensorWriter._write, []

    def fill(self: Any, at: int, chunk: Any) -> int:
        count.append(at)
        if len(count) == writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        return write(self, at, chunk)

    monkeypatch.setattr(tensors.TensorWriter, "_write", fill)
    with pytest.raises(OSError, match="No space left on device") as caught:
        quantize_model(source, tmp_path / "out", ["q8_0"], version=format)
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["source"]


def test_too_little_space_is_noticed_before_the_work(
    source: Path, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"no space for the model: [0-9,]+ bytes needed, 1,000 free"):
        quantize_model(source, tmp_path / "out", ["q8_0"], version=format)
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_a_killed_run_leaves_no_model(source: Path, format: str, tmp_path: Path) -> None:
    """What it leaves says what it is, and the next run removes it."""
    child = run_child(source, tmp_path / "out", format, "os.kill(os.getpid(), signal.SIGKILL)")
    assert child.returncode == -signal.SIGKILL
    (stale,) = set(os.listdir(tmp_path)) - {"source"}
    assert stale.startswith(".out.tmp-")
    quantize_model(source, tmp_path / "out", ["q8_0"], version=format)
    left = [] if hasattr(os, "O_NOFOLLOW") else [stale]
    assert sorted(os.listdir(tmp_path)) == [*left, "out", "source"]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_is_bounded_by_a_layer_not_by_the_model(format: str, tmp_path: Path) -> None:
    """214 MB of checkpoint and 114 MB of output, 12 + 24 + 7 MB for the largest layer: far less is added.

    The whole process, Python and numba included, takes no more than those and 300 MB.
    """
    width, inner = 2048, 3072
    (tmp_path / "source").mkdir()
    shapes = dict.fromkeys([f"self_attn.{name}_proj" for name in "qkvo"], (width, width))
    shapes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    tensors = {
        f"model.layers.{block}.{name}.weight": torch.full(shape, 0.5, dtype=torch.bfloat16)
        for block in range(3)
        for name, shape in shapes.items()
    }
    tensors |= {f"{name}.weight": torch.ones(64, width).bfloat16() for name in ("lm_head", "model.embed_tokens")}
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    del tensors
    run_child(tmp_path / "source", tmp_path / "first", format, "pass")  # compiles the kernels, if nobody has
    child = run_child(tmp_path / "source", tmp_path / "out", format, "pass")
    assert child.returncode == 0, child.stderr
    growth, peak = map(int, child.stdout.split())
    assert growth < 150
    assert peak < 12 + 24 + 7 + 300
