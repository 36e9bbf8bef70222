"""tools/interop/running.py: what counts as a difference, without a client."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tools.interop.client import Generation
from tools.interop.running import DENSE, GGML, HALF, KINDS, MODELS, OTHER_KINDS, WORLDS, Case, Row, by_turns, compare

ANSWER = Generation(["t5", "</s>"], [-0.25, -0.5], "stop")
OURS: dict[str, Any] = {
    "ids": [5, 2],
    "logits": [1.0, 2.0],
    "forced_logits": [10**-0.25, 10**-0.5],
    "forced_logprobs": [-0.25, -0.5],
    "behind": [0.0, 0.0],
}


def case(version: str = "0.9.5", kind: str = "afq4", generation: Generation | None = ANSWER) -> Case:
    return Case(version, "llama", kind, Path(), generation)


def row(of: Case, ranks: dict[str, Any] | None = None, **ours: Any) -> Row:
    """The row of a case where one rank says ``ours``, and two say ``ranks``."""
    one = OURS | ours
    return compare(of, {1: one, 2: one | (ranks or {})})


@pytest.mark.parametrize("version", ["0.6.0", "0.9.5"])
def test_equal(version: str) -> None:
    """0.6.0 gives the base-10 logarithm of the logit, 0.9.5 the log probability."""
    assert row(case(version)).equal


@pytest.mark.parametrize(
    ("ranks", "ours"),
    [
        ({"ids": [5, 3]}, {}),
        ({"logits": [1.0, 2.0 + 2e-4]}, {}),
        ({}, {"forced_logprobs": [-0.25, -0.5 + 2e-4]}),
        ({}, {"ids": [6, 2]}),
    ],
)
def test_any_difference_counts(ranks: dict[str, Any], ours: dict[str, Any]) -> None:
    """Between ranks, in a number, in a token."""
    assert not row(case(), ranks, **ours).equal


def test_noise_of_the_client() -> None:
    """A token of the client may be behind ours by twice its noise, not more; nothing excuses a dense type."""
    near: dict[str, Any] = {
        "ids": [7, 2],
        "behind": [2 * GGML - 0.01, 0.0],
        "forced_logprobs": [-0.25 + GGML - 0.01, -0.5],
    }
    assert row(case(kind="q4k"), **near).equal
    assert not row(case(kind="q4k"), **near | {"behind": [2 * GGML + 0.01, 0.0]}).equal
    assert not row(case(kind="q4k"), **near | {"forced_logprobs": [-0.25, -0.5 - GGML - 0.01]}).equal
    assert not row(case(), **near).equal
    bounds = [case(version, kind).bound for version in ("0.6.0", "0.9.5") for kind in ("hqq4", "fp8", "q8_0")]
    assert bounds == [HALF, DENSE, GGML, DENSE, DENSE, GGML]


def test_all_numbers_of_ranks_have_their_turn() -> None:
    """Of every model and type all numbers, one at least; of each generation, every number for the types of a model."""
    given = [(name, version) for name in MODELS for version in ("0.6.0", "0.9.5")]
    cases = [
        Case(version, name, kind, Path(), None)
        for name, version in given
        for kind in KINDS.get(name, OTHER_KINDS)
        if version == "0.9.5" or kind not in ("f8q8", "mxfp4")
    ]
    found = list(zip(cases, by_turns(cases), strict=True))
    assert all(worlds[0] == 1 and len(worlds) > 1 for _, worlds in found)
    assert [worlds for case, worlds in found if case.kind in ("f8q8", "mxfp4")] == [WORLDS] * 3
    for name, version in given:
        assert {
            world for case, worlds in found if (case.model, case.version) == (name, version) for world in worlds
        } == {*WORLDS}
        for kind in KINDS.get(name, OTHER_KINDS):
            files = [worlds for case, worlds in found if (case.model, case.kind) == (name, kind)]
            assert {world for worlds in files for world in worlds} == {*WORLDS}
    alone = [Case("0.9.5", "llama", "afq4", Path(), None)]
    assert by_turns(alone) == [WORLDS]


def test_a_file_that_the_client_cannot_run() -> None:
    """Only the ranks are compared."""
    assert row(case(generation=None)).equal
    assert not row(case(generation=None), {"ids": [5, 3]}).equal


def test_the_arithmetic_of_the_engine() -> None:
    """Most numbers of short answers are the client's; the others lie within its noise."""
    of = replace(case(kind="q4k"), short=(ANSWER,) * 4)
    numbers = [-0.25, -0.5] * 4
    assert row(of, engine=numbers).equal
    assert row(of, engine=[*numbers[:7], -0.5 + GGML / 2]).equal
    assert "7 of 8 within 0.0001" in row(of, engine=[*numbers[:7], -0.6]).row()[-1]
    assert not row(of, engine=[*numbers[:6], -0.25 + GGML / 2, -0.5 + GGML / 2]).equal
    assert not row(of, engine=[*numbers[:7], -0.5 + 2 * GGML]).equal
