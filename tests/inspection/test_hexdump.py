"""uqff.inspection.hexdump: lines end where fields end, and every byte is there once."""

from __future__ import annotations

import pytest

import uqff
from tests.support.tiny_files import GOLDEN, q8_0, unquant
from uqff.codec.blob import trace
from uqff.inspection import hexdump
from uqff.schema.bricks import FieldTrace

UNQUANT = unquant([1.0, 2.0, -2.0], [0.0, 0.5, 4.0], bias=[0.25, -1.0])
SHOWN = """\
00001000  00 01 00 00                                      |....|              version = 0.1.0
00001004  01                                               |.|                 quant_type = 1 Unquant
00001005  01                                               |.|                 bias_flag = 1
00001006  18 00 00 00                                      |....|              weight.length = 24
0000100a  06 00 00 00                                      |....|              weight.dtype = 6 F32
0000100e  02 00 00 00                                      |....|              weight.ndim = 2
00001012  02 00 00 00 03 00 00 00                          |........|          weight.shape = [2, 3]
0000101a  00 00 80 3f 00 00 00 40 00 00 00 c0 00 00 00 00  |...?...@........|  weight.data
0000102a  00 00 00 3f 00 00 80 40                          |...?...@|
00001032  08 00 00 00                                      |....|              bias.length = 8
00001036  06 00 00 00                                      |....|              bias.dtype = 6 F32
0000103a  01 00 00 00                                      |....|              bias.ndim = 1
0000103e  02 00 00 00                                      |....|              bias.shape = [2]
00001042  00 00 80 3e 00 00 80 bf                          |...>....|          bias.data"""


def test_a_dump_line_by_line() -> None:
    """The exact text, without the meanings, which are the layout's own."""
    lines = hexdump(trace(UNQUANT), memoryview(UNQUANT), base=0x1000)
    assert "\n".join(str(line._replace(meaning="")) for line in lines) == SHOWN


def test_a_line_with_its_meaning() -> None:
    """Value and meaning stand behind the bytes."""
    line = next(hexdump(trace(UNQUANT), memoryview(UNQUANT)))
    assert str(line) == (
        "00000000  00 01 00 00                                      |....|              "
        "version = 0.1.0  (format version: the bytes are patch, minor, major, 0)"
    )


def test_the_first_block_is_taken_apart() -> None:
    """A ggml payload shows the fields of its first block, then the rest."""
    blob = bytearray(q8_0(0.5, list(range(32))))
    blob[5:9] = (68).to_bytes(4, "little")
    blob[18:22] = (2).to_bytes(4, "little")
    blob += blob[26:60]
    lines = [line for line in hexdump(trace(blob), memoryview(blob)) if line.field.startswith("data[")]
    assert [(line.offset, line.field, line.value, line.meaning) for line in lines] == [
        (26, "data[0].d", "0.5", "scale"),
        (28, "data[0].qs", "[0, 1, 2, 3, 4, 5, 6, 7, ... 32 in all]", "codes, in element order"),
        (60, "data[1:]", "", "the blocks, row after row"),
    ]


def test_long_fields_are_cut_and_say_so() -> None:
    """Sixteen of 24 bytes with a limit of 16."""
    lines = [str(line) for line in hexdump(trace(UNQUANT), memoryview(UNQUANT), limit=16)]
    assert lines[8] == "0000002a  ... 8 bytes left out"
    assert len(lines) == 14


@pytest.mark.parametrize("name", ["q4k", "q8_1", "hqq4", "fp8", "afq3"])
@pytest.mark.parametrize("limit", [0, 7, 64])
def test_every_byte_is_shown_once_or_counted(name: str, limit: int) -> None:
    """Lines tile the blob, in order, whatever the limit; without one they are the blob."""
    with uqff.open(GOLDEN / "qwen2-f32" / f"{name}-0.uqff") as file:
        blob = file.blob(1)
        at = 0
        shown = b""
        for line in hexdump(trace(blob), blob, limit=limit):
            assert line.offset == at
            at += len(line.data) + line.skipped
            shown += line.data
        assert at == len(blob)
        assert limit or shown == blob


def test_bytes_behind_a_broken_field_are_not_parsed() -> None:
    """A trace that ends early leaves nothing out."""
    fields: list[FieldTrace] = []
    broken = UNQUANT[:10] + b"\x63" + UNQUANT[11:]
    with pytest.raises(uqff.FormatError, match="unknown dtype"):
        uqff.codec.blob.read_fields(broken, trace=fields)
    assert [field.path for field in fields] == ["version", "quant_type", "bias_flag", "weight.length"]
    lines = list(hexdump(fields, memoryview(broken)))
    assert (lines[4].offset, lines[4].field) == (10, "(not parsed)")
    assert b"".join(line.data for line in lines) == broken
