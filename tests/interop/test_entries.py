"""The live check of our 1.x files sees what it is there to see: no client is run here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import uqff
from tools.interop.client import Generation
from tools.interop.entries import Result, compare_entries, container, write_ours
from tools.interop.reading import LayerComparison, Outcome

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "v1" / "1.2.0" / "qwen2-mixed-bf16"


@pytest.fixture
def client_dir(tmp_path: Path) -> Path:
    """A model directory as the client writes it."""
    folder = tmp_path / "client"
    folder.mkdir()
    shutil.copyfile(GOLDEN / "q8_0-0.uqff", folder / "q8_0-0.uqff")
    shutil.copyfile(GOLDEN / "q8_0.uqff_report.json", folder / "uqff_report.json")
    (folder / "config.json").write_text("{}")
    return folder


def test_one_file_is_the_clients_but_for_metadata(client_dir: Path, tmp_path: Path) -> None:
    """Saved again, every entry and the container are equal; the client's report stands beside it."""
    with uqff.open(client_dir) as theirs:
        (written,) = write_ours(theirs, tmp_path / "ours")
        with uqff.open(written) as ours:
            comparisons = compare_entries(theirs, ours)
            assert theirs.metadata != ours.metadata
    assert len(comparisons) == 23
    assert {layer.kind for layer in comparisons} == {"q8_0", "afq4", "hqq4", "unquant"}
    assert all(layer.differing == 0 and layer.size > 0 for layer in comparisons)
    assert container(written) == container(client_dir / "q8_0-0.uqff")
    for name in ("uqff_report.json", "config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (client_dir / name).read_bytes()


def test_shards_have_a_report_of_ours(client_dir: Path, tmp_path: Path) -> None:
    """It names all of them, and what it says is right."""
    with uqff.open(client_dir) as theirs:
        written = write_ours(theirs, tmp_path / "ours", 10_000)
        with uqff.open(written[0]) as ours:
            assert not any(layer.differing for layer in compare_entries(theirs, ours))
    assert len(written) > 3
    report = json.loads((tmp_path / "ours" / "uqff_report.json").read_text())
    assert report["outputs"][0]["shards"] == [path.name for path in written]
    assert report["generated_by"]["tool"] == "uqff"


@pytest.mark.parametrize("change", ["flip", "drop"])
def test_differences_are_seen(client_dir: Path, change: str) -> None:
    """One flipped bit, or a dropped layer, is one layer that differs: by the entry's size, or in full."""
    path, other = client_dir / "q8_0-0.uqff", client_dir.parent / "other.uqff"
    with uqff.open(path) as theirs:
        key = "model.layers.1.self_attn.k_proj"
        sizes = {suffix: place.nbytes for suffix, place in theirs.places(key).items()}
        if change == "flip":
            data = bytearray(path.read_bytes())
            data[theirs.places(key)["weight.scales"].offset] ^= 1
            other.write_bytes(data)
        else:
            uqff.save({each: theirs[each] for each in theirs if each != key}, other, version=(1, 2, 0))
        with uqff.open(other) as ours:
            different = [(layer.key, layer.differing) for layer in compare_entries(theirs, ours) if layer.differing]
    assert different == [(key, sizes["weight.scales"] if change == "flip" else sum(sizes.values()))]
    assert container(path) != container(other)


EQUAL = [LayerComparison("a", "q4k", 100, 0, None)]
RUN = Outcome(Generation(["t1"], [-1.0], "length"))


@pytest.mark.parametrize(
    ("layers", "file_equal", "ours", "expected"),
    [
        (EQUAL, True, RUN, True),
        (EQUAL, None, RUN, True),
        (EQUAL, False, RUN, False),
        (EQUAL, True, Outcome(Generation(["t1"], [-1.0000001], "length")), False),
        (EQUAL, True, Outcome(None, "panic"), False),
        ([LayerComparison("a", "q4k", 100, 1, None)], True, RUN, False),
    ],
)
def test_equal_means_entries_container_and_generation(
    layers: list[LayerComparison], file_equal: bool | None, ours: Outcome, expected: bool
) -> None:
    """Any one of them that differs fails the row, and the row says so in red."""
    result = Result("llama", "q4k", "re-saved", layers, file_equal, RUN, ours)
    assert result.equal is expected
    assert any("[red]" in cell for cell in result.row()) is not expected
