"""The safetensors framing: one near miss and one byte-literal error a rule, and the writer against the reference."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from tests.support.samples import entry, framed
from uqff import FormatError, UnsupportedError
from uqff.container.framing import DTYPE_BITS, build_header, parse_header
from uqff.limits import MAX_HEADER_BYTES, MAX_HEADER_VALUES, MAX_NAME, MAX_RANK, MAX_WIDE_HEADER_BYTES


def parse(data: bytes) -> Any:
    return parse_header(memoryview(data))


def test_sound_file() -> None:
    """Entries come in the order of their bytes, offsets count from the start of the file."""
    data = framed({"b": entry(2, 3), "a": entry(3), "__metadata__": {"k": "v"}}, b"12345")
    header = parse(data)
    begin = len(data) - 5
    assert header.data_begin == begin
    assert header.metadata == {"k": "v"}
    assert [tuple(e) for e in header.entries.values()] == [
        ("a", "U8", (3,), begin, begin + 3),
        ("b", "U8", (2,), begin + 3, begin + 5),
    ]


@pytest.mark.parametrize(
    "data",
    [
        framed({}),
        framed(b"{}      "),
        framed({"a": entry(0)}),
        framed({"a": entry(0), "b": entry(0), "c": entry(1)}, b"x"),
        framed({"a": entry(4, dtype="F32", shape=[])}, b"1234"),
        framed({"a": entry(0, dtype="F32", shape=[0, 2**59])}),
        framed({"a": entry(1, dtype="F4", shape=[2])}, b"x"),
        framed({"a": entry(3, dtype="F6_E2M3", shape=[4])}, b"123"),
        framed({"a": entry(1, shape=[1] * MAX_RANK)}, b"x"),
        framed({"__metadata__": {}}),
        framed({"\U0001f600": entry(0)}),
        framed(b'{"a\\u00e9\\ud83d\\ude00":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
    ],
)
def test_near_misses_parse(data: bytes) -> None:
    """What stands just on this side of a rule."""
    assert parse(data).data_begin <= len(data)


def number(text: str) -> bytes:
    """A header whose only dimension is written so."""
    return framed(b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[0,1]}}' % text.encode(), b"x")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "file is too short"),
        (b"\2\0\0\0\0\0\0", "file is too short"),
        (b"\3\0\0\0\0\0\0\0{}", "header runs past the end"),
        (b"\xff" * 8 + b"{}", "header is too long"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "header is too long"),
        (MAX_HEADER_BYTES.to_bytes(8, "little") + b"{}", "header runs past the end"),
        (framed(b""), "header is not a JSON object"),
        (framed(b" {}"), "header is not a JSON object"),
        (framed(b"\xef\xbb\xbf{}"), "header is not a JSON object"),
        (framed(b"{"), "header is not JSON"),
        (framed(b"{}\0"), "header is not JSON"),
        (framed(b"{}{}"), "header is not JSON"),
        (framed(b'{"a":\xff}'), "header is not UTF-8"),
        (framed(b'{"\xed\xa0\x80":1}'), "header is not UTF-8"),
        (framed(b'{"a":' + b"[" * 100_000), "header is not JSON"),
        (framed(b'{"a":' * 100_000), "header is not JSON"),
        (framed(b'{"a":1,"a":1}'), "key occurs twice"),
        (framed(b'{"a":1,"\\u0061":1}'), "key occurs twice"),
        (framed(b'{"a":{"dtype":"U8","dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "key occurs twice"),
        (framed(b'{"__metadata__":{},"__metadata__":{}}'), "key occurs twice"),
        (framed(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'), "text is not Unicode"),
        (framed(b'{"__metadata__":{"\\udfff":""}}'), "text is not Unicode"),
        (framed(b'{"__metadata__":{"":"\\ud83d"}}'), "text is not Unicode"),
        (framed({"__metadata__": None}), "metadata is not a map"),
        (framed({"__metadata__": []}), "metadata is not a map"),
        (framed({"__metadata__": {"a": 1}}), "metadata is not a map"),
        (framed({"__metadata__": {"a": None}}), "metadata is not a map"),
        (framed({"a": []}), "malformed entry"),
        (framed({"a": "text"}), "malformed entry"),
        (framed({"a": {}}), "malformed entry"),
        (framed({"a": {**entry(0), "extra": 1}}), "malformed entry"),
        (framed({"a": entry(0, dtype=None)}), "unknown dtype"),  # type: ignore[arg-type]
        (framed({"a": entry(0, shape=0)}), "not a list"),
        (framed({"a": entry(0, shape={})}), "not a list"),
        (framed({"a": entry(1, shape=["1"])}, b"x"), "not a list"),
        (framed({"a": entry(1, shape=[[1]])}, b"x"), "not a list"),
        (framed({"a": entry(1, shape=[1] * (MAX_RANK + 1))}, b"x"), "list is too long"),
        (framed({"a": {**entry(0), "data_offsets": [0]}}), "malformed offsets"),
        (framed({"a": {**entry(0), "data_offsets": [0, 0, 0]}}), "list is too long"),
        (framed({"a": {**entry(0), "data_offsets": [1, 0]}}), "malformed offsets"),
        (number("true"), "not a list"),
        (number("1.0"), "not a list"),
        (number("1e0"), "not a list"),
        (number("1e400"), "not a list"),
        (number("null"), "not a list"),
        (number("-1"), "number out of range"),
        (number("-0"), "number out of range"),
        (number("NaN"), "not a JSON number"),
        (number("Infinity"), "not a JSON number"),
        (number("-Infinity"), "not a JSON number"),
        (number("01"), "header is not JSON"),
        (number("+1"), "header is not JSON"),
        (number("9" * 5000), "number out of range"),
        (number(str(2**63)), "not a list"),
        (number(str(2**63 - 1)), "size does not fit"),
        (number("2"), "size does not fit"),
        (framed({"a": entry(1, dtype="F4", shape=[1])}, b"x"), "size does not fit"),
        (framed({"a": entry(1, dtype="F4", shape=[3])}, b"x"), "size does not fit"),
        (framed({"a": entry(4, shape=[2**32, 2**32])}, b"1234"), "size does not fit"),
        (framed({"a": entry(0, shape=[2**62, 2**62, 0])}), "shape is too large"),
        (framed({"a": entry(2), "b": entry(2, 1)}, b"123"), "tensors overlap"),
        (framed({"a": entry(2), "b": entry(2)}, b"12"), "tensors overlap"),
        (framed({"a": entry(1), "b": entry(1, 2)}, b"123"), "hole"),
        (framed({"a": entry(1, 1)}, b"12"), "hole"),
        (framed({"a": entry(0, 5)}), "hole"),
        (framed({"a": entry(2)}, b"1"), "truncated"),
        (framed({"a": entry(1)}, b"12"), "trailing bytes"),
        (framed({}, b"1"), "trailing bytes"),
    ],
)
def test_every_rule(data: bytes, problem: str) -> None:
    """One file a rule, and the error it gives."""
    with pytest.raises(FormatError) as caught:
        parse(data)
    assert caught.value.problem.startswith(problem)
    assert str(caught.value).isprintable()
    assert caught.value.offset is not None
    assert caught.value.offset <= len(data)


@pytest.mark.parametrize("dtype", ["X8", "u8", "", "F8_E4M3FN", "\x1b[2J"])
def test_unknown_dtype_is_unsupported(dtype: str) -> None:
    """A newer safetensors may have it: the file is not broken."""
    with pytest.raises(UnsupportedError, match="unknown dtype"):
        parse(framed({"a": entry(0, dtype=dtype)}))


@pytest.mark.parametrize(
    "template", [b'{"a":%s}', b'{"__metadata__":%s}', b'{"a":{"dtype":"U8","shape":%s,"data_offsets":[0,0]}}']
)
def test_nesting_just_below_the_limit_of_the_parser(template: bytes) -> None:
    """What the JSON parser can just take must not be too deep for the message that shows it."""
    for depth in range(900, 1000, 3):
        with pytest.raises(FormatError) as caught:
            parse(framed(template % (b"[" * depth + b"]" * depth)))
        assert len(str(caught.value)) < 1000


def test_many_duplicate_keys_take_linear_time() -> None:
    """A million names with the repeated one last: a search from the front for each name would never end."""
    names = b",".join(b'"%d":0' % n for n in range(200_000))
    with pytest.raises(FormatError, match="key occurs twice") as caught:
        parse(framed(b"{" + names + b',"199999":0}'))
    assert caught.value.field == "header.199999"


def test_errors_name_the_entry() -> None:
    """A model has hundreds."""
    with pytest.raises(FormatError) as caught:
        parse(framed({"0": entry(1), "17": entry(2, 1, shape=[3])}, b"123"))
    assert caught.value.field == "header.17.data_offsets"
    assert (caught.value.expected, caught.value.got) == ("3 bytes", 2)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(lambda n: n != "__metadata__"),
        st.tuples(st.sampled_from(["U8", "F32", "I64", "F16"]), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_writer_against_the_reference(tensors: dict[str, tuple[str, list[int]]]) -> None:
    """``build_header`` gives the bytes of the safetensors library, and ``parse_header`` reads them."""
    numpy_dtypes = {"U8": np.uint8, "F32": np.float32, "I64": np.int64, "F16": np.float16}
    arrays = {name: np.zeros(shape, numpy_dtypes[dtype]) for name, (dtype, shape) in tensors.items()}
    reference = safetensors.numpy.save(arrays)
    made, order = build_header((name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items())[:2]
    assert made + b"".join(arrays[name].tobytes() for name in order) == reference
    header = parse(reference)
    assert {name: (e.dtype, list(e.shape)) for name, e in header.entries.items()} == tensors


def test_metadata_is_written_first() -> None:
    """As the reference does."""
    made = build_header([("a", "U8", (1,))], {"k": "v"})[0]
    reference = safetensors.numpy.save({"a": np.zeros(1, np.uint8)}, {"k": "v"})
    assert made + b"\0" == reference


def test_bits_of_every_dtype() -> None:
    """The table that all size checks rest on."""
    named = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "BF16": 16}
    for dtype, bits in DTYPE_BITS.items():
        digits = "".join(c for c in dtype.split("_")[0] if c.isdigit())
        assert bits == named.get(dtype, int(digits or 8)), dtype
    assert json.loads(framed({})[8:]) == {}


def test_the_number_of_values_in_a_header_is_bounded() -> None:
    """A list of a hundred million small values would take gigabytes as Python objects; it is refused unparsed."""
    most = b'{"a":[' + b"1," * (MAX_HEADER_VALUES - 3) + b"1]}"
    for header, problem in ((most, "malformed entry"), (most.replace(b"1]", b"1,1]"), "too many values")):
        with pytest.raises(FormatError, match=problem):
            parse_header(memoryview(len(header).to_bytes(8, "little") + header))


@pytest.mark.parametrize("wide", ["\U0001f600".encode(), b"\\ud83d\\ude00"])
def test_a_wide_character_makes_a_header_four_times_as_long(wide: bytes) -> None:
    """Python keeps all characters of a text in the width of the widest, be it plain or an escape."""
    for length, problem in ((MAX_WIDE_HEADER_BYTES, "malformed entry"), (MAX_WIDE_HEADER_BYTES + 1, "not plain ASCII")):
        header = b'{"a":"' + b"a" * (length - 8 - len(wide)) + wide + b'"}'
        assert len(header) == length
        with pytest.raises(FormatError, match=problem):
            parse_header(memoryview(length.to_bytes(8, "little") + header))


@pytest.mark.parametrize("metadata", [False, True])
def test_the_length_of_a_name_is_bounded(metadata: bool) -> None:
    """Of 50 MB, it took five to nine times the file: in keys of layers, places of errors, their messages. What is
    written keeps to it, so that it can be read again.
    """
    for name in ("a" * MAX_NAME, "a" * MAX_NAME + "b"):
        written: Any = ([], {name: "x"}) if metadata else ([(name, "U8", (0,))],)
        fields = {"__metadata__": {name: "x"}} if metadata else {name: entry(0)}
        if len(name) == MAX_NAME:
            for data in (build_header(*written)[0], framed(fields)):
                read = parse(data)
                assert [*read.metadata, *read.entries] == [name]
            continue
        for call in (lambda: build_header(*written), lambda: parse(framed(fields))):  # noqa: B023
            with pytest.raises(
                FormatError, match="name is too long: expected at most 65535 characters, got 65536"
            ) as e:
                call()
            assert (e.value.field, e.value.offset) == ("header", 8)
