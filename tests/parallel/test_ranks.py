"""What the environment says of this process's place among ranks."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from tests.support.tiny_files import GOLDEN
from uqff.cli import main
from uqff.errors import CommError
from uqff.parallel.ranks import rank_of


def test_a_place_is_read() -> None:
    """As torchrun says it; one rank where nothing is said, also by an empty text."""
    assert rank_of({}) == rank_of({"RANK": "", "WORLD_SIZE": ""}) == (0, 1)
    assert rank_of({"RANK": "2", "WORLD_SIZE": "3"}) == (2, 3)


@pytest.mark.parametrize(
    ("rank", "world_size", "field", "expected"),
    [
        ("x", "2", "RANK", "from 0 to 1"),
        ("-1", "2", "RANK", "from 0 to 1"),
        ("2", "2", "RANK", "from 0 to 1"),
        ("1", "", "RANK", "from 0 to 0"),
        ("0", "0", "WORLD_SIZE", "from 1 to 1000000"),
        ("0", "9" * 5000, "WORLD_SIZE", "from 1 to 1000000"),
        ("0", "two", "WORLD_SIZE", "from 1 to 1000000"),
    ],
)
def test_what_is_no_place_is_refused(rank: str, world_size: str, field: str, expected: str) -> None:
    """By the variable's name; not a ValueError, nor a wait for ranks that never come."""
    with pytest.raises(CommError, match="not a place among ranks") as caught:
        rank_of({"RANK": rank, "WORLD_SIZE": world_size})
    assert (caught.value.field, caught.value.expected) == (field, expected)


def test_the_command_says_so_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """No traceback of ``uqff run``."""
    monkeypatch.setenv("RANK", "first")
    result = CliRunner().invoke(main, ["run", f"{GOLDEN}/qwen2-f32:q4k", "--prompt", "Hello"])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("uqff: not a place among ranks: expected from 0 to 0, got first (field RANK)")
