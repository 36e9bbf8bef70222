"""A short run of ``make fuzz``: hostile inputs of every target, within bounded time and memory."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import safetensors.numpy

import uqff
from tools.fuzz import __main__ as fuzz
from tools.fuzz import campaign as campaigns
from tools.fuzz import coverage, share
from tools.fuzz.campaign import Campaign, Hanging, Memory, Tally, read_tallies, write_tallies
from tools.fuzz.gguf import numbers
from tools.fuzz.mutators import KINDS, mutated
from tools.fuzz.share import Asked
from tools.fuzz.target import Target

pytestmark = pytest.mark.long


def test_no_input_escapes(tmp_path: Path) -> None:
    """The seeds, good and bad, and some changed ones of each target; millions of them: ``make fuzz``."""
    command = [sys.executable, "-W", "ignore", "-m", "tools.fuzz", "--inputs", "5", "--seed", "0", "--light"]
    own = {"PYTHONPATH": os.getcwd(), "UQFF_FUZZ": str(tmp_path), "UQFF_KERNELS": "reference"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own)
    assert done.returncode == 0, done.stdout + done.stderr
    match = re.search(r"^([0-9]+) inputs, 0 problems$", done.stdout, re.M)
    assert match is not None
    assert int(match[1]) > 1000
    counted = read_tallies(tmp_path / "summary.json")
    assert counted.keys() >= {"blobs", "containers", "residual", "GGUF", "config, 1.2", "recipes", "checkpoint config"}
    assert all(tally.inputs > 5 for tally in counted.values())
    assert sum(tally.inputs for tally in counted.values()) == int(match[1])
    assert not (tmp_path / "found").exists()


def test_the_other_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it is installed, it reads inputs, and what they did is counted likewise; elsewhere, that is said."""
    arguments = ["--engine", "atheris", "--only", "sums", "--time", "1"]
    if coverage.available():
        command = [sys.executable, "-W", "ignore", "-m", "tools.fuzz", *arguments]
        own = {"PYTHONPATH": os.getcwd(), "UQFF_FUZZ": str(tmp_path), "UQFF_KERNELS": "reference"}
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own)
        assert done.returncode == 0, done.stdout + done.stderr
        assert read_tallies(tmp_path / "summary.json")["sums"].inputs > 256
    else:
        monkeypatch.setattr(sys, "argv", ["fuzz", *arguments])
        with pytest.raises(SystemExit) as ended:
            fuzz.main()
        assert ended.value.code == 2
        assert "atheris is not installed here" in capsys.readouterr().err


def _campaign(home: Path, read: Callable[[bytes], object]) -> Campaign:
    return Campaign(Target("a", "bytes", [b"seed", b"more"], read), home, Random(0))


def test_an_escape_is_told_and_kept(tmp_path: Path) -> None:
    """What is no UqffError is a problem; the input is kept, and what was refused is counted apart."""

    def read(data: bytes) -> None:
        if data == b"bad":
            raise ValueError("escaped")
        raise uqff.FormatError("refused")

    campaign = _campaign(tmp_path, read)
    campaign.take(b"bad")
    campaign.batch(20)
    (kept,) = (path for path in (tmp_path / "found" / "a").iterdir() if not path.suffix)
    assert campaign.problems == [f"a: ValueError: escaped, kept as found/a/{kept.name}"]
    assert kept.read_bytes() == b"bad"
    assert kept.with_suffix(".txt").read_text().endswith("\nValueError: escaped\n")
    assert campaign.tally == Tally(23, 22, 2, campaign.tally.slowest, campaign.tally.largest, 1, 0)
    assert b"bad" in campaign.corpus


def test_what_is_slow_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stands still is no problem of the input; what is slow twice is, also while it prints an error."""
    monkeypatch.setattr(campaigns, "MOST_SECONDS", 0.05)
    monkeypatch.setattr(campaigns, "SETTLED", 0.0)
    monkeypatch.setattr(campaigns, "HANGING", 0.06)
    monkeypatch.setattr(signal, "alarm", lambda _: None)
    asked: list[bytes] = []

    class Slow(uqff.FormatError):
        def __str__(self) -> str:
            raise Hanging

    def read(data: bytes) -> None:
        asked.append(data)
        if data == b"always" or (data == b"once" and asked.count(data) == 1):
            end = time.process_time() + 0.06
            while time.process_time() < end:
                pass
        if data == b"error":
            raise Slow("refused")

    campaign = _campaign(tmp_path, read)
    for data in (b"once", b"always", b"error"):
        campaign.take(data)
    assert asked.count(b"once") == asked.count(b"always") == asked.count(b"error") == 2
    assert (campaign.tally.inputs, campaign.tally.stalls, campaign.tally.problems) == (5, 1, 2)
    told = [problem.split(",")[0] for problem in campaign.problems]
    assert told == ["a: took 0.1 s", "a: takes more than 0.06 s"]
    kept = tmp_path / "found" / "a" / campaign.problems[0].split("/")[-1]
    lines = kept.with_suffix(".txt").read_text().splitlines()
    assert lines[0] == "took 0.1 s"
    assert re.fullmatch(r"[0-9.]+ s of the processor, and [0-9.]+ s in the system's calls", lines[1])
    assert any(" in read" in line for line in lines[2:])


@pytest.mark.skipif(not Memory().is_possible, reason="memory is measured on Linux with glibc")
def test_an_input_that_takes_too_much_memory_is_told(tmp_path: Path) -> None:
    """Of many that were measured together, the one; one that takes less than the bound is none."""

    def read(data: bytes) -> None:
        assert b"\1" * (90_000_000 if data == b"seed" else 20_000_000)

    campaign = _campaign(tmp_path, read)
    campaign.batch(1)
    assert campaign.tally.problems == 0
    assert 15_000_000 < campaign.tally.largest < 64_000_000
    for data in (b"less", b"seed"):
        campaign._weigh(data)
    assert campaign.tally.problems == 1
    (kept,) = (path for path in (tmp_path / "found" / "a").iterdir() if not path.suffix)
    assert re.fullmatch(r"a: took [0-9]+ bytes and 4 times its own 4, kept as found/a/\w+", campaign.problems[0])
    assert kept.read_bytes() == b"seed"


def test_runs_add_up(tmp_path: Path) -> None:
    """Counts are sums, bounds are the largest, over all runs of one home."""
    tallies = {"a": Tally(3, 2, 1, 0.5, 10, 1), "b": Tally(1)}
    write_tallies(tmp_path / "summary.json", tallies)
    assert read_tallies(tmp_path / "summary.json") == tallies
    assert read_tallies(tmp_path / "none") == {}
    assert Tally(3, 2, 1, 0.5, 10, 1) + Tally(4, 1, 7, 0.1, 20, 0) == Tally(7, 3, 7, 0.5, 20, 1)


FILE = safetensors.numpy.save({"a": np.ones((2, 3), np.float32), "b": np.zeros(0, np.uint8)}, {"format": "pt"})
GGUF = (
    b"GGUF"
    + struct.pack("<IQQQ1sIB", 3, 1, 1, 1, b"k", 0, 7)
    + struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 0, 0)
    + bytes(16)
)


def test_the_numbers_of_a_gguf_file() -> None:
    """Counts; of a pair the key's length, type and value; of a tensor length, rank, dimensions, type, offset."""
    assert numbers(GGUF) == (
        (4, 4),
        (8, 8),
        (16, 8),
        *((24, 8), (33, 4), (37, 1)),
        *((38, 8), (47, 4), (51, 8), (59, 4), (63, 8)),
    )
    assert numbers(GGUF[:35]) == ((4, 4), (8, 8), (16, 8), (24, 8))
    assert numbers(b"GGUF") == ()


def test_changes_are_those_of_their_seed() -> None:
    """A run can be had again; each kind changes what it is given, and gives bytes whatever it is given."""
    for kind in KINDS:
        for data in (
            b"",
            b"x",
            b'{"a": [1, {"b": null}]}',
            FILE,
            GGUF,
            (8).to_bytes(8, "little") + b'{"a":{}}',
            bytes(300),
        ):
            made = [mutated(data, kind, Random(seed), [data]) for seed in range(40)]
            assert made == [mutated(data, kind, Random(seed), [data]) for seed in range(40)]
            assert len(set(made)) > 1 or not data


def test_what_a_process_dies_of_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several processes one may end, or never end, in C code: the input is told and kept, and the work goes on."""

    def read(data: bytes) -> None:
        if data == b"bad":
            os.kill(os.getpid(), signal.SIGKILL)
        if data == b"stuck":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
            time.sleep(60)
        raise uqff.FormatError("refused")

    (tmp_path / "home").mkdir()
    monkeypatch.setattr(fuzz, "STUCK", 0.5)

    def run(name: str, seed: bytes) -> fuzz.Run:
        target = Target(name, "bytes", [seed], read)
        monkeypatch.setattr(share, "targets", lambda *_, **__: [target])
        (tmp_path / name).mkdir()
        made = fuzz.Run(tmp_path / name, Asked(tmp_path / "home", "", False, 3, 0.0, 0), 2)
        made.go()
        return made

    fine = run("a", b"fine")
    assert fine.tallies["a"].inputs == 7  # the seed is counted once
    assert (fine.deaths, fine.problems) == (0, [])
    for name, seed, deaths in (("b", b"bad", 2), ("c", b"stuck", 4)):  # what hangs is tried twice
        made = run(name, seed)
        assert made.deaths == deaths
        assert made.tallies == {name: Tally(problems=2, stalls=deaths - 2)}
        (kept,) = (path for path in (tmp_path / "home" / "found" / name).iterdir() if not path.suffix)
        assert kept.read_bytes() == seed
        assert {problem.split(",")[0] for problem in made.problems} == {f"{name}: a process ended with SIGKILL"}
        assert all(problem.endswith(f" kept as found/{name}/{kept.name}") for problem in made.problems)
