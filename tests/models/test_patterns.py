"""Patterns: what they match (as Python's `re` has it), what they refuse, and that none hangs."""

from __future__ import annotations

import random
import re
import time
import warnings

import pytest

from uqff.errors import FormatError
from uqff.models.patterns import Pattern

NAMES = ["", "a", "b", "ab", "ba", "aab", "abb", "bb", "a2", "2", "x.y", "model.layers.10.mlp.down_proj.weight", "é"]


@pytest.mark.parametrize(
    "text",
    [
        r"a*b",
        r"(a|a)*b",
        r"^model\.layers\.(1|10)\.",
        r"down_proj\.weight$",
        r"a{2,4}b",
        r"a?b+c*",
        r"[^.]+\.y",
        r"(ab|ba){2}",
        r"",
        r"a||b",
        r"^$",
        r"$^",
        r"(a*)*b",
        r"\d{2,}",
        r"(?:q|k|down)_proj",
        r"a{0}b",
        r"(a?){3}b",
        r"[a-c]+$",
        r"^(a|b)?2",
        r"(|a)b",
        r"()*b",
        r"(a|b{2})+$",
        r"[\d_]+\.",
        r"\w\W\w",
        r"\.[]x]",
        r"[a\]]$",
        r".*?b",
        r"\s",
        r"é",
    ],
)
def test_agrees_with_re(text: str) -> None:
    pattern = Pattern(text)
    for name in NAMES:
        assert pattern.search(name) is bool(re.search(text, name)), name


def test_agrees_with_re_on_random_patterns() -> None:
    """Whatever compiles here and there finds the same."""
    draw = random.Random(20)
    agreed = 0
    for _ in range(6000):
        text = "".join(draw.choice("ab|()*+?.^$[]{}2,\\d") for _ in range(draw.randrange(1, 8)))
        try:
            pattern = Pattern(text)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                expected = re.compile(text)
        except (FormatError, re.error, Warning):
            continue
        for name in NAMES:
            assert pattern.search(name) is bool(expected.search(name)), (text, name)
        agreed += 1
    assert agreed > 1500


def test_case_may_be_ignored() -> None:
    assert Pattern("(?i)LM_[H-Z]ead").search("lm_head")
    assert not Pattern("LM_HEAD").search("lm_head")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("(", "missing )"),
        ("a)", "unmatched )"),
        ("*a", "nothing to repeat"),
        ("a**", "nothing to repeat"),
        ("[a", "missing ]"),
        ("[]", "missing ]"),
        ("[b-a]", "malformed range"),
        ("[[a]", "[ in a class: write \\["),
        ("a{", "malformed repetition"),
        ("a{4,2}", "malformed repetition"),
        ("a{1000000}", "malformed repetition"),
        (r"(a)\1", r"\1 is not supported"),
        (r"\bword", r"\b is not supported"),
        ("(?=a)", "only (?: is supported here"),
        ("(?P<n>a)", "only (?: is supported here"),
        ("\\", "missing a character after \\"),
        ("(a{100}){100}", "the pattern has more than 500 states"),
        ("(" * 10_000, "more than 50 nested groups"),
        ("a" * 501, "the pattern has more than 500 states"),
    ],
)
def test_refusals(text: str, problem: str) -> None:
    """With the reason and the column; nothing that compiles slowly, or into much, compiles at all."""
    with pytest.raises(FormatError) as caught:
        Pattern(text)
    assert caught.value.problem == f"bad pattern: {problem}"
    assert caught.value.field is not None
    assert caught.value.field.startswith("column ")


@pytest.mark.parametrize("text", ["(a|a|a*)*(a*)*b", "(a+)+$x", "(.*a){20}b", "(a?){30}a{30}b", ".*.*.*.*.*.*.*.*.*x$"])
def test_no_pattern_hangs(text: str) -> None:
    """Each of these takes a backtracking matcher longer than the age of the universe."""
    pattern = Pattern(text)
    start = time.perf_counter()
    assert not pattern.search("a" * 5000)
    assert time.perf_counter() - start < 5


def test_members_of_classes_count_as_states() -> None:
    """Each of them is tried on each character, and a repetition has them all again."""
    assert Pattern("[" + "a" * 498 + "]").search("a")
    for text in ("[" + "a" * 499 + "]", "[a-z0-9_.]{200}"):
        with pytest.raises(FormatError, match="the pattern has more than 500 states"):
            Pattern(text)
