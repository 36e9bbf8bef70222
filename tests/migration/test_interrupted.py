"""A migration is there whole or not at all: progress, interrupts, full disks, broken layers, memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import uqff
from tests.support.quantize_child import PEAK
from tests.support.small_models import (
    config_of,
    llama,
    write_v0,
)
from uqff.container import tensors
from uqff.errors import UnsupportedError
from uqff.migration import migrate
from uqff.models.architectures import layer_names
from uqff.models.shapes import expected_shape
from uqff.progress import Step


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A llama of 8 layers."""
    write_v0(llama(), tmp_path / "source")
    return tmp_path / "source"


def test_progress(source: Path, tmp_path: Path) -> None:
    steps: list[Step] = []
    migrate(source, tmp_path / "out", progress=steps.append)
    assert [step.done for step in steps] == list(range(1, 9))
    assert {step.total for step in steps} == {8}
    assert steps[0].key == "lm_head"
    assert steps[-1].work_done == steps[-1].work == sum(layer.weight.numel for layer in uqff.open(source).values())


@pytest.mark.parametrize("layers_done", [1, 8])
def test_an_interrupt_leaves_nothing(source: Path, tmp_path: Path, layers_done: int) -> None:
    def interrupt(step: Step) -> None:
        if step.done == layers_done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        migrate(source, tmp_path / "out", progress=interrupt)
    assert os.listdir(tmp_path) == ["source"]


@pytest.mark.parametrize("writes", [1, 4, 12, 30])
def test_a_disk_that_fills_up_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    write, count = tensors.TensorWriter._write, []

    def fill(self: Any, at: int, chunk: Any) -> int:
        count.append(at)
        if len(count) == writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        return write(self, at, chunk)

    monkeypatch.setattr(tensors.TensorWriter, "_write", fill)
    with pytest.raises(OSError, match="No space left on device"):
        migrate(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_too_little_space_is_noticed_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"no space for the model: [0-9,]+ bytes needed, 1,000 free"):
        migrate(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_a_broken_layer_is_found_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    """With its place in the file."""
    path = source / "q8_0-0.uqff"
    with uqff.open(path) as file:
        offset = file.place("3").offset
    data = bytearray(path.read_bytes())
    data[offset + 4] = 99
    path.write_bytes(data)
    with pytest.raises(UnsupportedError, match="unknown type") as caught:
        migrate(source, tmp_path / "out")
    assert (caught.value.file, caught.value.layer, caught.value.offset) == (str(path), "3", offset + 4)
    assert os.listdir(tmp_path) == ["source"]


def test_only_a_model_is_replaced(source: Path, tmp_path: Path) -> None:
    migrate(source, tmp_path / "out")
    with pytest.raises(FileExistsError, match="not empty"):
        migrate(source, tmp_path / "out")
    migrate(source, tmp_path / "out", version="1.1", force=True)
    with uqff.open(tmp_path / "out") as file:
        assert file.version == (1, 1, 0)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError):
        migrate(source, tmp_path / "home", force=True)
    assert sorted(os.listdir(tmp_path)) == ["home", "out", "source"]


CHILD = f"""
import os, signal, sys
import torch
from uqff.migration import migrate
def step(step):
    if step.done == 1 and sys.platform == "linux":
        firsts.append(peak())
    if step.done == 3:
        {{action}}
{PEAK}
firsts = []
migrate(sys.argv[1], sys.argv[2], progress=step)
print(peak() - firsts[0])
"""


def run_child(source: Path, out: Path, action: str) -> subprocess.CompletedProcess[str]:
    """Migrate in a process of its own."""
    code = CHILD.format(action=action)
    return subprocess.run([sys.executable, "-c", code, str(source), str(out)], capture_output=True, text=True)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_a_killed_run_leaves_no_model(source: Path, tmp_path: Path) -> None:
    """What it leaves says what it is, and the next run removes it."""
    child = run_child(source, tmp_path / "out", "os.kill(os.getpid(), signal.SIGKILL)")
    assert child.returncode == -signal.SIGKILL
    (stale,) = set(os.listdir(tmp_path)) - {"source"}
    assert stale.startswith(".out.tmp-")
    migrate(source, tmp_path / "out")
    left = [] if hasattr(os, "O_NOFOLLOW") else [stale]
    assert sorted(os.listdir(tmp_path)) == [*left, "out", "source"]


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_is_bounded_by_a_layer_not_by_the_model(tmp_path: Path) -> None:
    """Stacks of 4 MB of a file of 130 MB: after the first layer, what is added is a few stacks."""
    config = config_of("Mixtral", num_hidden_layers=8, hidden_size=1024, intermediate_size=1024, num_local_experts=4)
    config |= {"head_dim": 64, "num_attention_heads": 16, "num_key_value_heads": 16}
    weight = uqff.quantize(torch.ones(1024, 1024), "q8_0")
    small = {(size, 1024): uqff.quantize(torch.ones(size, 1024), "q8_0") for size in (4, 32)}
    layers = {name.index: small.get(expected_shape(config, name), weight) for name in layer_names(config)}  # type: ignore[arg-type]
    (tmp_path / "source").mkdir()
    uqff.save(layers, tmp_path / "source" / "q8_0-0.uqff")
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    assert (tmp_path / "source" / "q8_0-0.uqff").stat().st_size > 130e6
    child = run_child(tmp_path / "source", tmp_path / "out", "pass")
    assert child.returncode == 0, child.stderr
    assert int(child.stdout) < 30
