"""uqff.inspection.verify: one violation for every broken rule, at its place in the file, and none for sound files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_files import GOLDEN, HEADER_BYTES, ROOT, q8_0, unquant, write_file
from uqff.inspection.verify import RuleViolation, verify
from uqff.progress import Step

VECTORS = ROOT / "spec" / "vectors"
BAD: list[dict[str, Any]] = json.loads((VECTORS / "bad" / "index.json").read_text("utf-8"))
GOOD = sorted(
    path.relative_to(VECTORS).with_suffix("").as_posix()
    for path in VECTORS.rglob("*.bin")
    # Weights beyond the range of scales, as quantisers have to take them, give scales that are not finite.
    if path.parent.name != "bad" and not path.stem.endswith(("-edges", "-huge", "-overflow"))
)
NAN, INF = float("nan"), float("inf")
SOUND = unquant([1.0, 2.0])


def violations(path: Path, deep: bool = False) -> list[RuleViolation]:
    return list(verify(path, deep=deep))


@pytest.mark.parametrize("path", sorted(GOLDEN.rglob("*.uqff")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_client_files_are_clean(path: Path) -> None:
    """What the real client wrote breaks no rule, its residual included."""
    assert violations(path) == []


def test_client_files_dequantise_to_finite_numbers() -> None:
    """The deep check of a file with three families."""
    assert violations(GOLDEN / "llama-mixed-f32", deep=True) == []


@pytest.mark.parametrize("name", GOOD)
def test_good_vectors_are_clean(name: str, tmp_path: Path) -> None:
    """Every family and variant as the only layer of a file."""
    assert violations(write_file(tmp_path / "m.uqff", {"0": (VECTORS / f"{name}.bin").read_bytes()})) == []


@pytest.mark.parametrize("case", BAD, ids=lambda case: case["file"])
def test_bad_vectors_break_one_rule(case: dict[str, Any], tmp_path: Path) -> None:
    """Every broken blob and container of the spec is one violation, with the field and offset that the spec states."""
    path, base = VECTORS / "bad" / case["file"], 0
    if path.suffix == ".bin":
        path, base = write_file(tmp_path / "m.uqff", {"0": path.read_bytes()}), HEADER_BYTES
    (found,) = violations(path)
    offset = None if case["offset"] is None else case["offset"] + base
    assert (found.file, found.problem, found.field, found.offset) == (str(path), case["problem"], case["field"], offset)
    assert base == 0 or (found.layer, found.expected, found.got) == ("0", case["expected"], case["got"])


def test_the_check_goes_on_after_a_broken_layer(tmp_path: Path) -> None:
    """Two broken layers are two violations; layers between and behind are checked."""
    broken = SOUND[:5] + b"\2" + SOUND[6:]
    path = write_file(tmp_path / "m.uqff", {"0": broken, "1": SOUND, "2": broken, "3": unquant([NAN, 2.0, INF])})
    size = len(SOUND)
    assert violations(path) == [
        RuleViolation(
            "value out of range",
            str(path),
            "0",
            "bias_flag",
            HEADER_BYTES + 5,
            expected="0 or 1",
            got="2",
            rule="BLOB-07",
        ),
        RuleViolation(
            "value out of range",
            str(path),
            "2",
            "bias_flag",
            HEADER_BYTES + 2 * size + 5,
            expected="0 or 1",
            got="2",
            rule="BLOB-07",
        ),
        RuleViolation(
            "2 elements break a rule",
            str(path),
            "3",
            "weight.data",
            HEADER_BYTES + 3 * size + 26,
            expected="a finite number",
            got="element 0",
        ),
    ]


def test_payload_offsets_point_at_the_element(tmp_path: Path) -> None:
    """The scale of a ggml block, an element of a weight, an element of a bias."""
    path = write_file(
        tmp_path / "m.uqff",
        {
            "0": q8_0(INF, [1] * 32),
            "1": unquant([1.0, 2.0, NAN], bias=[0.0]),
            "2": unquant([1.0], [1.0], bias=[0.0, INF]),
        },
    )
    first, second = HEADER_BYTES + 60, HEADER_BYTES + 60 + 26 + 12 + 20
    found = [(v.layer, v.field, v.offset) for v in violations(path) if v.problem != "layers of several versions"]
    assert found == [
        ("0", "data", HEADER_BYTES + 26),
        ("1", "weight.data", first + 26 + 8),
        ("2", "bias.data", second + 26 + 8 + 16 + 4),
    ]


def test_indices_have_no_gap(tmp_path: Path) -> None:
    """Layers 0, 2 and 5: two gaps, each told at the layer behind it."""
    path = write_file(tmp_path / "m.uqff", {"0": SOUND, "2": SOUND, "5": SOUND})
    assert violations(path) == [
        RuleViolation(
            "gap in the layer indices", str(path), "2", None, HEADER_BYTES + 34, expected="layer 1", got="layer 2"
        ),
        RuleViolation(
            "gap in the layer indices", str(path), "5", None, HEADER_BYTES + 68, expected="layer 3", got="layer 5"
        ),
    ]


def test_layers_are_of_one_version(tmp_path: Path) -> None:
    """Across shards too."""
    write_file(tmp_path / "m-0.uqff", {"0": SOUND})
    other = write_file(tmp_path / "m-1.uqff", {"1": unquant([1.0], version=b"\3\1\0\0")})
    assert violations(tmp_path) == [
        RuleViolation(
            "layers of several versions",
            str(other),
            "1",
            "version",
            HEADER_BYTES,
            expected="0.1.0 as in the layers before",
            got="0.1.3",
        )
    ]


def test_the_residual_is_framed_rightly(tmp_path: Path) -> None:
    """A truncated residual is a violation of its own file."""
    path = write_file(tmp_path / "m.uqff", {"0": SOUND})
    residual = tmp_path / "residual.safetensors"
    residual.write_bytes(write_file(tmp_path / "other.uqff", {"x": bytes(16)}).read_bytes()[:-1])
    (tmp_path / "other.uqff").unlink()
    (found,) = violations(path)
    assert (found.file, found.problem, found.field) == (str(residual), "truncated", "header.x.data_offsets")


def test_a_missing_shard_is_one_violation(tmp_path: Path) -> None:
    """A set that does not open is not looked into."""
    write_file(tmp_path / "m-0.uqff", {"0": SOUND})
    write_file(tmp_path / "m-2.uqff", {"1": SOUND})
    (found,) = violations(tmp_path)
    assert (found.file, found.problem) == (str(tmp_path / "m-1.uqff"), "gap in a set of shards")


def test_deep_finds_products_that_overflow(tmp_path: Path) -> None:
    """A finite scale and finite codes can still give infinity: MXFP4's exponent 254 times 6."""
    path = write_file(tmp_path / "m.uqff", {"0": (VECTORS / "mxfp4" / "edge-scales.bin").read_bytes()})
    assert violations(path) == []
    (found,) = violations(path, deep=True)
    assert found.problem == "weight dequantises to numbers that are not finite"
    assert (found.layer, found.expected) == ("0", "160 finite numbers")
    assert found.got == "16 that are not, the first is element 129: -inf"


def test_progress_counts_layers_and_bytes(tmp_path: Path) -> None:
    """After each layer, broken or not."""
    path = write_file(tmp_path / "m.uqff", {"0": SOUND[:5] + b"\2" + SOUND[6:], "1": SOUND})
    steps: list[Step] = []
    assert len(list(verify(path, progress=steps.append))) == 1
    assert steps == [Step("verify", "0", 1, 2, 34, 68, "bytes"), Step("verify", "1", 2, 2, 68, 68, "bytes")]


def test_a_violation_as_text() -> None:
    """Everything that is known, on one line, with nothing a terminal acts on."""
    violation = RuleViolation("a\nproblem", "dir/\x1b[31m.uqff", "3", "scales.data", 7, "finite", "\x07nan")
    assert str(violation) == (
        r"dir/\x1b[31m.uqff: layer 3, field scales.data, offset 7: a\nproblem: expected finite, got \x07nan"
    )
    assert str(RuleViolation("problem", "f.uqff", offset=0)) == "f.uqff: offset 0: problem"
