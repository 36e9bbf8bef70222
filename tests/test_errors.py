"""The exception tree: what a message says, and that nothing in it can hurt a terminal."""

from __future__ import annotations

import copy
import pickle

import pytest

from uqff import CommError, FormatError, HubError, ShapeError, ShardError, UnsupportedError, UqffError
from uqff.errors import MissingError, printable

LEAVES = [FormatError, UnsupportedError, ShapeError, ShardError, CommError]


@pytest.mark.parametrize("error", LEAVES)
def test_tree(error: type[UqffError]) -> None:
    """One root to catch everything; no leaf is another's child."""
    assert error.__mro__[1:3] == (UqffError, Exception)


def test_what_the_hub_did_not_give_is_an_error_of_the_system_too() -> None:
    """As a disk that did not; with all parts, also out of another process."""
    assert HubError.__mro__[1:3] == (UqffError, OSError)
    error = HubError("refused", file="hf://a/b", got="status 403")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "refused: got status 403 (file hf://a/b)"


def test_message_names_what_expected_got_and_where() -> None:
    """The order is fixed: problem, expected, got, then file, layer, field, offset."""
    error = FormatError(
        "wrong dtype", file="a.uqff", layer="3", field="w_q.dtype", offset=17, expected="1 U32", got="0 U8"
    )
    assert str(error) == ("wrong dtype: expected 1 U32, got 0 U8 (file a.uqff, layer 3, field w_q.dtype, offset 17)")
    assert str(FormatError("no layers")) == "no layers"
    assert str(FormatError("truncated", got=0, offset=0)) == "truncated: got 0 (offset 0)"
    assert str(FormatError("truncated", expected=0)) == "truncated: expected 0"
    assert str(FormatError("truncated", layer="")) == "truncated (layer )"


def test_within_fills_in_and_keeps_what_is_known() -> None:
    """Lower modules know fields, higher ones files; offsets become those of the file."""
    error = FormatError("bad", field="dtype", offset=4)
    assert error.within(prefix="w_q") is error
    error.within(file="a.uqff", layer="0", base=100)
    assert (error.file, error.layer, error.field, error.offset) == ("a.uqff", "0", "w_q.dtype", 104)
    error.within(file="b.uqff", layer="1")
    assert (error.file, error.layer, error.offset) == ("a.uqff", "0", 104)
    assert FormatError("bad").within(prefix="bias", base=7).field == "bias"
    assert FormatError("bad").within(base=7).offset is None


def test_a_missing_key_is_caught_as_either() -> None:
    """Mappings raise KeyError, and so do ours; everything that uqff raises is a UqffError, with a message of one."""
    error = MissingError("no such layer", file="a.uqff", got="q_proj")
    assert isinstance(error, KeyError)
    assert str(error) == "no such layer: got q_proj (file a.uqff)"


@pytest.mark.parametrize("error", [UqffError, MissingError, *LEAVES])
def test_errors_travel_between_processes(error: type[UqffError]) -> None:
    """A worker's error arrives whole."""
    sent = error("bad", file="f", layer="l", field="x", offset=3, expected=[1], got=(2,))
    for arrived in (pickle.loads(pickle.dumps(sent)), copy.copy(sent), copy.deepcopy(sent)):
        assert type(arrived) is error
        assert vars(arrived) == vars(sent)
        assert str(arrived) == str(sent)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31m", "\\x1b[31m"),
        ("a\nb", "a\\nb"),
        ("\ud800", "\\ud800"),
        ("\u202e", "\\u202e"),
        ("\x00", "\\x00"),
        ("größe 層", "größe 層"),
        ("\U000e0001", "\\U000e0001"),
    ],
)
def test_names_from_files_are_escaped(text: str, shown: str) -> None:
    """No terminal escapes, no line breaks, no lone surrogates (which would crash ``print``)."""
    assert printable(text) == shown
    for part in ("file", "layer", "field", "expected", "got"):
        message = str(FormatError("bad", **{part: text}))  # type: ignore[arg-type]
        assert shown in message
        assert message.isprintable()
        message.encode("utf-8")


def test_long_names_are_cut() -> None:
    """A name in a hostile file may have a hundred million characters; a message has not."""
    name = "n" * 10**6
    message = str(FormatError("bad", layer=name, field=name, expected=name, got=name))
    assert len(message) < 2000
    assert "nnn..." in message
    assert FormatError("bad", layer=name).layer == name
