"""The live check of our files sees what it is there to see: no client is run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import uqff
from tools.interop.client import Client, ClientError, Generation
from tools.interop.reading import LayerComparison, Outcome, Result, compare_layers, differences, write_ours

ROOT = Path(__file__).resolve().parents[2]
DIRECTORY = ROOT / "tests" / "golden" / "v0" / "llama-mixed-f32"


@pytest.fixture
def layers() -> dict[Any, uqff.Layer]:
    """The client's layers, on their own bytes."""
    with uqff.open(DIRECTORY) as file:
        return {
            key: uqff.deserialize(uqff.serialize(layer, version=(0, 1, 3))) for key, layer in dict(file.items()).items()
        }


def test_equal_layers_have_no_differing_byte(layers: dict[Any, uqff.Layer]) -> None:
    """The client's own layers compare equal, all 15 of them, under their types."""
    comparisons = compare_layers(DIRECTORY, layers)
    assert len(comparisons) == 15
    assert all(layer.differing == 0 and layer.first is None and layer.size > 0 for layer in comparisons)
    assert sorted({layer.kind for layer in comparisons}) == ["afq4", "q8_0", "unquant"]


def test_one_flipped_bit_is_one_differing_byte_at_its_offset(layers: dict[Any, uqff.Layer]) -> None:
    """The least difference there is is reported, with its place."""
    key = next(iter(layers))
    blob = bytearray(uqff.serialize(layers[key], version=(0, 1, 3)))
    blob[1000] ^= 1
    layers[key] = uqff.deserialize(bytes(blob))
    different = [layer for layer in compare_layers(DIRECTORY, layers) if layer.differing]
    assert [(layer.key, layer.differing, layer.first) for layer in different] == [(str(key), 1, 1000)]


def test_missing_layer_differs_in_its_whole_size(layers: dict[Any, uqff.Layer]) -> None:
    """A layer that was dropped cannot pass for equal."""
    key = next(iter(layers))
    size = len(uqff.serialize(layers.pop(key), version=(0, 1, 3)))
    different = [layer for layer in compare_layers(DIRECTORY, layers) if layer.differing]
    assert [(layer.key, layer.size, layer.differing, layer.first) for layer in different] == [(str(key), size, size, 0)]


def test_our_directory_has_the_clients_other_files(tmp_path: Path, layers: dict[Any, uqff.Layer]) -> None:
    """The client gets our file with its own residual, configuration and tokenizer; re-saved, it has the same bytes."""
    (written,) = write_ours(DIRECTORY, tmp_path / "ours", layers)
    assert written.read_bytes() == (DIRECTORY / "q8_0-0.uqff").read_bytes()
    others = {path.name: path.read_bytes() for path in DIRECTORY.iterdir() if path.suffix != ".uqff"}
    ours = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir() if path != written}
    assert ours == others


def run(tokens: list[str], logits: list[float]) -> Outcome:
    """A generation that ended by length."""
    return Outcome(Generation(tokens, logits, "length"))


EQUAL = [LayerComparison("0", "q4k", 100, 0, None)]


@pytest.mark.parametrize(
    ("layers", "file_equal", "ours", "expected"),
    [
        (EQUAL, True, run(["t4", "t5"], [1.0, 2.0]), True),
        (EQUAL, None, run(["t4", "t5"], [1.0, 2.0]), True),
        (EQUAL, False, run(["t4", "t5"], [1.0, 2.0]), False),
        (EQUAL, True, run(["t4", "t6"], [1.0, 2.0]), False),
        (EQUAL, True, run(["t4"], [1.0]), False),
        (EQUAL, True, run(["t4", "t5"], [1.0, 2.0000001]), False),
        (EQUAL, True, Outcome(None, "killed by SIGILL"), False),
        ([LayerComparison("0", "q4k", 100, 1, 7)], True, run(["t4", "t5"], [1.0, 2.0]), False),
    ],
)
def test_result_is_equal_only_if_everything_is(
    layers: list[LayerComparison], file_equal: bool | None, ours: Outcome, expected: bool
) -> None:
    """Any one of layer bytes, file bytes, tokens, logits and the way of failing decides."""
    result = Result("llama", "q4k", "re-saved", layers, file_equal, run(["t4", "t5"], [1.0, 2.0]), ours)
    assert result.equal is expected
    assert len(result.row()) == 7


@pytest.mark.parametrize(
    ("kind", "made", "wheel_equal", "ours", "expected"),
    [
        ("q3k", "quantised", True, run(["t6", "t5"], [1.0, 2.0]), True),
        ("q3k", "quantised", False, run(["t4", "t5"], [1.0, 2.0]), False),
        ("q3k", "re-saved", True, run(["t4", "t5"], [1.0, 2.0]), False),
        ("q4k", "quantised", True, run(["t4", "t5"], [1.0, 2.0]), False),
        ("q3k", "quantised", True, Outcome(None, "ValueError"), False),
    ],
)
def test_known_difference_is_the_wheels_and_no_other(
    kind: str, made: str, wheel_equal: bool, ours: Outcome, expected: bool
) -> None:
    """A Q3K of ours may differ if the wheel's defect explains every byte; no re-saved file, none that cannot be run."""
    layers = [LayerComparison("0", kind, 10_000, 1, 5)]
    result = Result("llama", kind, made, layers, False, run(["t4", "t5"], [1.0, 2.0]), ours, wheel_equal)
    assert result.known is expected
    assert not result.equal
    assert [line.split(":")[0] for line in differences([result])] == ([] if expected else [f"llama {kind} {made}"])


def test_difference_names_the_first_token() -> None:
    """The table says where two generations part, or by how much logits do."""
    theirs = run(["t4", "t5"], [1.0, 2.0])
    assert theirs.difference(run(["t4", "t6"], [1.0, 2.0])) == "tokens differ after 1"
    assert theirs.difference(run(["t4", "t5"], [1.0, 2.5])) == "tokens equal, logits differ by up to 0.5"
    assert theirs.difference(Outcome(None, "x", loaded=False)) == "client's: 2 tokens; ours: x"


def test_client_that_cannot_run_is_an_error_with_its_output(tmp_path: Path) -> None:
    """A client process that fails is reported with its last line and all that it printed, never taken for an answer."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho some output\necho the reason >&2\nexit 3\n")
    script.chmod(0o755)
    with pytest.raises(ClientError, match=r"^the reason") as caught:
        Client(script).about()
    assert caught.value.output == "some output\nthe reason\n"
    assert not caught.value.loaded


def test_result_is_found_between_log_lines(tmp_path: Path) -> None:
    """A thread of the client that logs on the same line neither hides the result nor spoils it."""
    script = tmp_path / "python"
    script.write_text("""#!/bin/sh\necho 'INFO uqff-client-result:{"version": "0.6.0"} INFO done'\n""")
    script.chmod(0o755)
    assert Client(script).about() == {"version": "0.6.0"}


def test_client_that_hangs_is_an_error(tmp_path: Path) -> None:
    """The process is ended at the time limit."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 30\n")
    script.chmod(0o755)
    with pytest.raises(ClientError, match=r"^no answer within 0\.2 s"):
        Client(script, timeout=0.2).about()
