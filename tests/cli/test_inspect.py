"""`uqff inspect`: the exact text and JSON of small files, broken and foreign files, names that attack a terminal."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.support.samples import f32, write
from tests.support.samples_v1 import LAYERS, version
from tests.support.samples_v1 import layer as entries_of_layer
from tests.support.samples_v1 import write as write_entries
from tests.support.tiny_files import GOLDEN, ROOT, q8_0, unquant, write_file
from uqff.cli import main
from uqff.inspection.summary import FileSummary

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
FOREIGN = {
    "a Git LFS pointer": LFS,
    "an HTML page": b"<!DOCTYPE html><html></html>",
    "a zip archive": b"PK\x03\x04" + bytes(26),
    "a Python pickle": pickle.dumps({"weight": [1.0]}, protocol=4),
    "a GGUF file": b"GGUF" + bytes(20),
}

SUMMARY = """\
tiny.uqff
  generation   0.x
  version      0.1.0, 0.1.3
  shards       1
  layers       2
  types        1 q8_0, 1 unquant
  weights      38
  payload      58 bytes
  bits/weight  12.2105
  size         390 bytes
  residual     -

type     layers  weights  bits/weight  payload
q8_0          1       32       8.5000  34 bytes
unquant       1        6      32.0000  24 bytes

layer  type     family   shape    weights  bits/weight  payload  bias     offset  size
    0  unquant  Unquant  [2, 3]         6      32.0000       24  F32 [2]     256    74
    1  q8_0     GGUF     [1, 32]       32       8.5000       34  -           330    60
"""

LAYER = """\
tiny.uqff: layer 0
  blob         74 bytes at 256
  version      0.1.0
  type         unquant (Unquant)
  shape        [2, 3], 6 weights
  payload      24 bytes
  bits/weight  32.0000
  bias         F32 [2]

offset  size  type        field          bytes                        value
   256     4  version     version        00 01 00 00                  0.1.0
   260     1  u8          quant_type     01                           1 Unquant
   261     1  u8          bias_flag      01                           1
   262     4  u32         weight.length  18 00 00 00                  24
   266     4  u32         weight.dtype   06 00 00 00                  6 F32
   270     4  u32         weight.ndim    02 00 00 00                  2
   274     8  u32 × ndim  weight.shape   02 00 00 00 03 00 00 00      [2, 3]
   282    24  bytes       weight.data    00 00 80 3f 00 00 00 40 ...  1, 2, -2, 0, ...
   306     4  u32         bias.length    08 00 00 00                  8
   310     4  u32         bias.dtype     06 00 00 00                  6 F32
   314     4  u32         bias.ndim      01 00 00 00                  1
   318     4  u32 × ndim  bias.shape     02 00 00 00                  [2]
   322     8  bytes       bias.data      00 00 80 3e 00 00 80 bf      0.25, -1

dequantised weight
  min       -2
  max       4
  mean      0.916667
  std       1.83523
  abs mean  1.58333
  zeros     1 (16.67 %)
  NaN       0
  Inf       0

  from      to  weights
    -2  -1.625        1  ████████████████████████████████
-1.625   -1.25        0
 -1.25  -0.875        0
-0.875    -0.5        0
  -0.5  -0.125        0
-0.125    0.25        1  ████████████████████████████████
  0.25   0.625        1  ████████████████████████████████
 0.625       1        0
     1   1.375        1  ████████████████████████████████
 1.375    1.75        0
  1.75   2.125        1  ████████████████████████████████
 2.125     2.5        0
   2.5   2.875        0
 2.875    3.25        0
  3.25   3.625        0
 3.625       4        1  ████████████████████████████████
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["inspect", *arguments])


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two layers: an Unquant matrix with a bias, and a row of one Q8_0 block; the working directory is beside it."""
    monkeypatch.chdir(tmp_path)
    blobs = {
        "0": unquant([1.0, 2.0, -2.0], [0.0, 0.5, 4.0], bias=[0.25, -1.0]),
        "1": q8_0(0.5, list(range(-16, 16))),
    }
    return write_file(Path("tiny.uqff"), blobs)


@pytest.mark.usefixtures("tiny")
def test_summary_text() -> None:
    """Not a terminal: no colour, no folding, no trailing spaces."""
    assert (run("tiny.uqff").exit_code, run("tiny.uqff").output) == (0, SUMMARY)


@pytest.mark.usefixtures("tiny")
def test_layer_text() -> None:
    """All fields, the numbers of the weight, the histogram."""
    assert (run("tiny.uqff", "0").exit_code, run("tiny.uqff", "0").output) == (0, LAYER)


@pytest.mark.usefixtures("tiny")
def test_a_dump_stands_between_fields_and_numbers() -> None:
    """With --hex-bytes 16, of each field 16 bytes and how many were left out."""
    lines = run("tiny.uqff", "0", "--hex", "--hex-bytes", "16").output.splitlines()
    begin = lines.index(LAYER.splitlines()[22]) + 2
    assert [line[:57].rstrip() for line in lines[begin : begin + 3]] == [
        "00000100  00 01 00 00",
        "00000104  01",
        "00000105  01",
    ]
    assert lines[begin + 8] == "0000012a  ... 8 bytes left out"
    assert lines[begin + 15 :] == ["dequantised weight", *LAYER.partition("dequantised weight\n")[2].splitlines()]


@pytest.mark.usefixtures("tiny")
def test_summary_json() -> None:
    """The whole document."""
    assert json.loads(run("tiny.uqff", "--json").output) == {
        "schema": 1,
        "generation": "0.x",
        "versions": ["0.1.0", "0.1.3"],
        "files": [{"path": "tiny.uqff", "bytes": 390, "layers": 2}],
        "metadata": {},
        "residual": None,
        "totals": {
            "layers": 2,
            "broken": 0,
            "bytes": 390,
            "weights": 38,
            "payload_bytes": 58,
            "bits_per_weight": 8 * 58 / 38,
        },
        "types": [
            {"type": "q8_0", "layers": 1, "weights": 32, "payload_bytes": 34, "bits_per_weight": 8.5},
            {"type": "unquant", "layers": 1, "weights": 6, "payload_bytes": 24, "bits_per_weight": 32.0},
        ],
        "layers": [
            {
                "key": "0",
                "index": 0,
                "module": None,
                "file": "tiny.uqff",
                "offset": 256,
                "bytes": 74,
                "version": "0.1.0",
                "family": {"code": 1, "name": "Unquant"},
                "type": "unquant",
                "shape": [2, 3],
                "weights": 6,
                "payload_bytes": 24,
                "bits_per_weight": 32.0,
                "bias": {"dtype": "F32", "shape": [2]},
                "error": None,
            },
            {
                "key": "1",
                "index": 1,
                "module": None,
                "file": "tiny.uqff",
                "offset": 330,
                "bytes": 60,
                "version": "0.1.3",
                "family": {"code": 0, "name": "GGUF"},
                "type": "q8_0",
                "shape": [1, 32],
                "weights": 32,
                "payload_bytes": 34,
                "bits_per_weight": 8.5,
                "bias": None,
                "error": None,
            },
        ],
        "extra": [],
        "layout": {},
    }


@pytest.mark.usefixtures("tiny")
def test_statistics_json() -> None:
    """Of -8, -7.5, ..., 7.5, two in each bin."""
    numbers = json.loads(run("tiny.uqff", "1", "--json").output)["statistics"]
    assert numbers == {
        "count": 32,
        "nan": 0,
        "inf": 0,
        "zeros": 1,
        "min": -8.0,
        "max": 7.5,
        "mean": -0.25,
        "std": (1023 / 12) ** 0.5 / 2,
        "abs_mean": 4.0,
        "histogram": {"edges": [-8 + 15.5 / 16 * at for at in range(17)], "counts": [2] * 16},
    }


def test_layer_json_of_a_client_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole document of a Q4K layer, without what needs torch."""
    monkeypatch.chdir(GOLDEN)

    def field(path: str, offset: int, size: int, kind: str, raw: str, value: Any, meaning: str) -> dict[str, Any]:
        members = {"path": path, "offset": offset, "bytes": size, "type": kind, "raw": raw}
        return {**members, "value": value, "preview": None, "meaning": meaning}

    result = run("qwen2-f32/q4k-0.uqff", "0", "--json", "--no-stats")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.output) == {
        "schema": 1,
        "layer": {
            "key": "0",
            "index": 0,
            "module": "lm_head",
            "file": "qwen2-f32/q4k-0.uqff",
            "offset": 520,
            "bytes": 4634,
            "version": "0.1.3",
            "family": {"code": 0, "name": "GGUF"},
            "type": "q4k",
            "shape": [32, 256],
            "weights": 8192,
            "payload_bytes": 4608,
            "bits_per_weight": 4.5,
            "bias": None,
            "error": None,
        },
        "fields": [
            field("version", 520, 4, "version", "03010000", "0.1.3", _meaning("version")),
            field("quant_type", 524, 1, "u8", "00", {"code": 0, "name": "GGUF"}, _meaning("quant_type")),
            field("data_length", 525, 4, "u32", "00120000", 4608, _meaning("data_length")),
            field("bias_flag", 529, 1, "u8", "00", 0, _meaning("bias_flag")),
            field("ggml_dtype", 530, 4, "u32", "0c000000", {"code": 12, "name": "Q4K"}, _meaning("ggml_dtype")),
            field("ndim", 534, 4, "u32", "02000000", 2, _meaning("ndim")),
            field("shape", 538, 8, "u32 × ndim", "2000000000010000", [32, 256], _meaning("shape")),
            field(
                "data",
                546,
                4608,
                "bytes",
                "ba067612ebf1f7edebe2f7d977cff7633557" + "62fd613618fc0baa90a6195268752a2e38a1" + DATA_TAIL,
                None,
                _meaning("data"),
            ),
        ],
        "statistics": None,
    }


DATA_TAIL = (GOLDEN / "qwen2-f32" / "q4k-0.uqff").read_bytes()[546 + 36 : 546 + 64].hex()


def _meaning(field: str) -> str:
    from uqff.families import GGUF

    return next(row.meaning for row in GGUF.LAYOUT.rows() if row.field == field)


def test_the_page_lists_every_member(tiny: Path) -> None:
    """docs/pages/reference/inspect-json.md and the documents agree: no member is undocumented, none is made up."""
    page = (ROOT / "docs" / "pages" / "reference" / "inspect-json.md").read_text("utf-8")
    documented = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    (tiny.parent / "residual.safetensors").write_bytes(b"GGUF" + bytes(20))
    outputs = [run(str(tiny), "--json").stdout, run(str(tiny), "0", "--json", "--hex").stdout]
    found: set[str] = set()

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            found.update(value)
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            visit(item)

    for output in outputs:
        visit(json.loads(output))
    assert documented == found


def test_json_of_numbers_that_json_has_not(tmp_path: Path) -> None:
    """NaN and infinities are texts in previews, and absent from statistics."""
    path = write_file(tmp_path / "m.uqff", {"0": unquant([float("nan"), float("inf"), float("-inf")])})
    document = json.loads(run(str(path), "0", "--json").output, parse_constant=pytest.fail)
    assert document["fields"][-1]["preview"] == ["NaN", "Infinity", "-Infinity"]
    assert document["statistics"]["min"] is None
    assert document["statistics"]["histogram"] == {"edges": [], "counts": [0] * 16}
    assert run(str(path), "0").exit_code == 0


def test_a_broken_layer_is_shown_beside_the_others(tmp_path: Path) -> None:
    """Its row says what is wrong; the exit code is 1."""
    blob = unquant([1.0, 2.0])
    path = write_file(tmp_path / "m.uqff", {"0": blob, "1": blob[:10] + b"\x63" + blob[11:]})
    problem = "unknown dtype: expected a code from 0 to 13, got 99"
    result = run(str(path))
    assert (result.exit_code, result.stderr) == (1, "uqff: 1 of 2 layers broken\n")
    assert [line.split() for line in result.stdout.splitlines()[-2:]] == [
        ["0", "unquant", "Unquant", "[1,", "2]", "2", "32.0000", "8", "-", "256", "34"],
        ["1", "broken", *"------", "290", "34", *f"{problem} (field weight.dtype, offset 300)".split()],
    ]
    result = run(str(path), "1")
    assert result.exit_code == 1
    assert result.stderr == f"uqff: {problem} (file {path}, layer 1, field weight.dtype, offset 300)\n"
    assert [line.split()[3] for line in result.stdout.splitlines()[-5:]] == [
        "field",
        "version",
        "quant_type",
        "bias_flag",
        "weight.length",
    ]


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_named(kind: str, tmp_path: Path) -> None:
    """Whatever its name says; nothing is unpickled, nothing is printed as a result."""
    path = tmp_path / "model.uqff"
    path.write_bytes(FOREIGN[kind])
    result = run(str(path))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"uqff: not a UQFF file: {kind}")


def test_names_do_not_reach_the_terminal_raw(tmp_path: Path) -> None:
    """Keys, metadata and file names are escaped; square brackets are not taken for markup."""
    path = write_file(tmp_path / "m.uqff", {"\x1b[31m": b"x"})
    result = run(str(path))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        "uqff: key is not a layer index: expected a decimal number, got \\x1b[31m "
        f"(file {path}, field header.\\x1b[31m, offset 8)\n"
    )
    text = json.dumps({"__metadata__": {"\x1b[1m[bold]": "a\nb\u202e[red]:smile:"}}).encode().ljust(128)
    path = tmp_path / "a\x1b[2J.uqff"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    result = run(str(path))
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0] == f"{tmp_path}/a\\x1b[2J.uqff"
    assert lines[11] == "  metadata \\x1b[1m[bold]  a\\nb\\u202e[red]:smile:"
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", result.stdout)
    assert not re.search(r"[^\x20-\x7e\n]", run(str(path), "--json").stdout)


def test_shards_are_listed(tmp_path: Path) -> None:
    """Opened by any of them; rows say where a layer lies."""
    write_file(tmp_path / "m-0.uqff", {"0": unquant([1.0])})
    write_file(tmp_path / "m-1.uqff", {"1": unquant([2.0])})
    result = run(str(tmp_path / "m-1.uqff"))
    lines = result.output.splitlines()
    assert lines[3].split() == ["shards", "2"]
    assert [line.split() for line in lines[12:15]] == [
        ["shard", "layers", "size"],
        [str(tmp_path / "m-0.uqff"), "1", "286", "bytes"],
        [str(tmp_path / "m-1.uqff"), "1", "286", "bytes"],
    ]
    assert [line.split()[-1] for line in lines[-2:]] == [str(tmp_path / f"m-{n}.uqff") for n in (0, 1)]


def test_long_names_are_not_cut(tmp_path: Path) -> None:
    """200 columns and more stay on one line when piped."""
    path = tmp_path / ("n" * 200)
    path.mkdir()
    write_file(path / "m-0.uqff", {"0": unquant([1.0])})
    write_file(path / "m-1.uqff", {"1": unquant([1.0])})
    lines = run(str(path)).output.splitlines()
    assert [line.split()[-1] for line in lines[-2:]] == [str(path / f"m-{n}.uqff") for n in (0, 1)]


def test_keys(tmp_path: Path) -> None:
    """As written in the file, or as a number; an unknown one is a wrong call."""
    path = write_file(tmp_path / "m.uqff", {"00": unquant([1.0])})
    for key in ("00", "0"):
        assert run(str(path), key, "--no-stats").output.startswith(f"{path}: layer 00\n")
    for key in ("1", "x", "\u0660", "9" * 5000):
        assert run(str(path), key).exit_code == 2
    assert "no layer \\x1b; there are: 00 to 00" in run(str(path), "\x1b").stderr


def test_a_dump_needs_a_layer(tiny: Path) -> None:
    """The whole file in hexadecimal is not what is meant."""
    assert run(str(tiny), "--hex").exit_code == 2


def test_layers_have_names_where_a_configuration_tells(tmp_path: Path) -> None:
    """In the table, in JSON, and as KEY; a configuration that does not fit gives none."""
    blobs = {str(index): unquant([float(index)]) for index in range(8)}
    path = write(tmp_path / "m.uqff", blobs)
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    assert run(str(path), "lm_head").exit_code == 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = [layer["module"] for layer in json.loads(run(str(path), "--json").output)["layers"]]
    assert names[:2] == ["lm_head", "model.layers.0.self_attn.q_proj"]
    assert names[7] == "model.layers.0.mlp.down_proj"
    rows = [line.split()[:2] for line in run(str(path)).output.splitlines()]
    assert ["layer", "weight"] in rows
    assert ["7", names[7]] in rows
    result = run(str(path), names[7], "--no-stats")
    assert (result.exit_code, result.output.splitlines()[:2]) == (0, [f"{path}: layer 7", f"  weight       {names[7]}"])
    wrong = run(str(path), "model.layers.0.mlp.dwn_proj")
    assert (wrong.exit_code, "; did you mean model.layers.0.mlp.down_proj?" in wrong.stderr) == (2, True)
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    assert {layer["module"] for layer in json.loads(run(str(path), "--json").output)["layers"]} == {None}


def test_entries_of_no_layer_are_counted(tmp_path: Path) -> None:
    """Readers of 1.x ignore them; somebody put them there."""
    more: dict[str, tuple[str, tuple[int, ...], bytes]] = {"note": ("F32", (2,), f32(1, 2))}
    path = write_entries(tmp_path / "m.uqff", version(), entries_of_layer("a", LAYERS["gguf"]), more)
    assert "  extra        1 entries of no layer" in run(str(path)).output.splitlines()
    assert json.loads(run(str(path), "--json").output)["extra"] == [{"name": "note", "dtype": "F32", "shape": [2]}]


def test_time_is_linear_in_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is broken is looked for once, and not once for every row: a model of experts has twenty thousand."""
    looked: list[int] = []
    broken = vars(FileSummary)["broken"].fget

    def counted(summary: FileSummary) -> Any:
        looked.append(1)
        return broken(summary)

    monkeypatch.setattr(FileSummary, "broken", property(counted))
    layers = [entries_of_layer(f"l{n}", LAYERS["gguf"]) for n in range(50)]
    path = write_entries(tmp_path / "m.uqff", version(), *layers)
    result = CliRunner().invoke(main, ["inspect", str(path)])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 50
    assert len(looked) < 5


def test_every_model_of_a_directory(tmp_path: Path) -> None:
    """A published model has several types: a line each, the broken one on the standard error."""
    write_file(tmp_path / "a-0.uqff", {"0": q8_0(0.5, list(range(-16, 16)))})
    write_file(tmp_path / "b.uqff", {"0": unquant([1.0]), "1": q8_0(0.5, list(range(-16, 16)))})
    result = run(str(tmp_path))
    assert (result.exit_code, result.stderr) == (0, "")
    assert [line.split()[:5] for line in result.stdout.splitlines()[1:]] == [
        ["a", "0.1.3", "1", "1", "8.5000"],
        ["b", "0.1.0,", "0.1.3", "1", "2"],
    ]
    documents = json.loads(run(str(tmp_path), "--json").output)["models"]
    assert documents == [json.loads(run(str(tmp_path / name), "--json").output) for name in ("a-0.uqff", "b.uqff")]
    (tmp_path / "c.uqff").write_bytes(b"GGUF")
    result = run(str(tmp_path))
    assert (result.exit_code, len(result.stdout.splitlines())) == (1, 3)
    told = "a GGUF file, which uqff inspect, plan, convert, quantize and run take"
    assert result.stderr == f"uqff: not a UQFF file: {told} (file {tmp_path / 'c.uqff'}, offset 0)\n"
    assert run(str(tmp_path), "0").exit_code == 1
