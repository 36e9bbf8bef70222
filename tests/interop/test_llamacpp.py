"""The table of llama.cpp tells what it is there to tell: other tokens, other bytes, a CPU that cannot run it."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from tools.interop import llamacpp
from tools.tiny.gguf import write_gguf
from tools.tiny.models import TinyModel

MODEL = TinyModel("llama", hidden_size=64, intermediate_size=64, heads=2, kv_heads=1, std=0.1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_gguf(MODEL, tmp_path / "a.gguf", "f32", vocabulary=True)
    return tmp_path / "a.gguf"


def row(file: Path, python: Path = Path("none"), kind: str = "f32") -> llamacpp.Row:
    folder = file.parent / "work"
    folder.mkdir()
    return llamacpp.check(python, "llama", kind, file, folder, lambda _: llamacpp.IDS)


def answers(file: Path, monkeypatch: pytest.MonkeyPatch, **changed: Any) -> None:
    """llama.cpp says what we say, but for some of it."""
    place = file.parent / "own"
    place.mkdir()
    llamacpp.uqff_of_gguf(file, place / "u")
    ids: list[int] = []
    far: list[float] = []
    for _ in range(3):
        asked = {"ids": [*ids, 0], "logprobs": [*far, 0.0]}
        ids.append(llamacpp.run_ours(place / "u", llamacpp.IDS, asked).ids[-1])
        far.append(0.0)
        far[-1] = -llamacpp.run_ours(place / "u", llamacpp.IDS, {"ids": ids, "logprobs": far}).far
    said = {"ids": ids, "logprobs": far, "prompt": len(llamacpp.IDS)} | changed
    monkeypatch.setattr(llamacpp, "run_llamacpp", lambda *_: said)


def test_the_same_answer_is_no_problem(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(file, monkeypatch)
    found = row(file)
    assert (found.problem, found.tokens, found.idle) == (None, "equal", False)
    assert found.there_and_back == "tensors and metadata equal"


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"ids": [9, 9, 9]}, "expected within 0.001"),
        ({"logprobs": [-1.0, -1.0, -99.0]}, "expected within 0.001"),
        ({"prompt": 3}, "the prompt is 3 tokens there, 7 here"),
    ],
)
def test_another_answer_is(file: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], problem: str) -> None:
    answers(file, monkeypatch, **changed)
    assert row(file).problem == problem


def test_other_bytes_are_a_problem(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that comes back with another tensor is never run."""
    back = llamacpp.gguf_of_uqff

    def other(source: Path, target: Path) -> None:
        back(source, target)
        data = bytearray(target.read_bytes())
        data[-1] ^= 1
        target.write_bytes(data)

    monkeypatch.setattr(llamacpp, "gguf_of_uqff", other)
    found = row(file)
    assert (found.there_and_back, found.problem) == ("metadata equal", "the file that came back is another")


def test_a_cpu_that_cannot_run_it(file: Path, tmp_path: Path) -> None:
    """SIGILL: not run, which is said, and no failure; any other end is one."""
    python = tmp_path / "python"
    for body, expected in (("kill -ILL $$", True), ("exit 3", False)):
        python.write_text(f"#!/bin/sh\n{body}\n")
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        if expected:
            found = row(file, python)
            assert (found.idle, found.problem, found.tokens) == (True, None, "killed by SIGILL: not run on this CPU")
        else:
            with pytest.raises(RuntimeError, match=r"llama\.cpp ended with 3"):
                llamacpp.run_llamacpp(python, file, llamacpp.IDS)
