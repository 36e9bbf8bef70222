"""Recipes: the engine's topology, what wins, and every way in which a file can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from uqff.errors import FormatError
from uqff.models.architectures import LayerName, layer_names
from uqff.quantization.recipe import load_recipe, parse_recipe

LAYERS = layer_names({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 7})


def by_block(text: str, path: str = "mlp.up_proj", *, engine: str = "0.9") -> list[str]:
    """The type of one projection in each decoder layer."""
    recipe = parse_recipe(text)
    return [recipe.kind_for(layer, "-", engine=engine) for layer in LAYERS if layer.module.endswith(path)]


def test_ranges_exclude_their_end_and_numbers_are_one_layer() -> None:
    assert by_block("0-2:\n  isq: Q4K\n5:\n  isq: 8\n") == ["q4k", "q4k", "-", "-", "-", "q8_0", "-"]


@pytest.mark.parametrize("text", ["0-4:\n  isq: q4k\n2-6:\n  isq: q6k\n", "2-6:\n  isq: q6k\n0-4:\n  isq: q4k\n"])
def test_the_higher_end_wins(text: str) -> None:
    """In either order of the file."""
    assert by_block(text) == ["q4k", "q4k", "q6k", "q6k", "q6k", "q6k", "-"]


def test_of_equal_ends_the_later_wins() -> None:
    assert by_block("0-4:\n  isq: q4k\n2-4:\n  isq: q3k\n")[:4] == ["q4k", "q4k", "q3k", "q3k"]
    assert by_block("2-4:\n  isq: q3k\n0-4:\n  isq: q4k\n")[:4] == ["q4k", "q4k", "q4k", "q4k"]


def test_the_later_pattern_wins_and_patterns_win_over_ranges() -> None:
    text = "'/mlp\\./':\n  isq: q4k\n'/up_proj\\.weight$/':\n  isq: q6k\n0-7:\n  isq: q2k\n"
    assert by_block(text) == ["q6k"] * 7
    assert by_block(text, "gate_proj") == ["q4k"] * 7
    assert by_block(text, "q_proj") == ["q2k"] * 7


def test_the_head_belongs_to_no_range() -> None:
    recipe = parse_recipe("0-100:\n  isq: q4k\n")
    assert recipe.kind_for(LAYERS[0], "q8_0") == "q8_0"
    assert parse_recipe("/lm_head/:\n  isq: q6k\n").kind_for(LAYERS[0], "q8_0") == "q6k"


def test_an_entry_without_isq() -> None:
    """Unquantised for 0.6, the default later; `unquant` says it plainly."""
    for entry in ("isq:", "device: cuda[0]", "isq: null"):
        assert by_block(f"1:\n  {entry}\n", engine="0.6")[:2] == ["-", "unquant"]
        assert by_block(f"1:\n  {entry}\n", engine="0.8")[:2] == ["-", "-"]
    assert by_block("1:\n  isq: unquant\n")[:2] == ["-", "unquant"]


def test_an_empty_pattern_is_passed_over() -> None:
    """Later engines overlook a pattern with neither type nor device, but not one with a device, nor an empty range."""
    below, above = "0-7:\n  isq: q2k\n'/proj/':\n  isq: q4k\n", "0-7:\n  isq: q2k\n0-8:\n  isq:\n"
    for text, engine, kind in [
        (f"{below}'/up_proj/':\n  isq:\n", "0.9", "q4k"),
        (f"{below}'/up_proj/':\n  isq:\n", "0.8", "q4k"),
        (f"{below}'/up_proj/':\n  isq:\n", "0.6", "unquant"),
        (f"{below}'/up_proj/':\n  device: cpu\n", "0.9", "-"),
        ("0-7:\n  isq: q2k\n'/up_proj/':\n  isq:\n", "0.9", "q2k"),
        (above, "0.9", "-"),
    ]:
        assert by_block(text, engine=engine) == [kind] * 7, (text, engine)


def test_rules_that_match_nothing_are_found() -> None:
    recipe = parse_recipe("3:\n  isq: q4k\n7-9:\n  isq: q4k\n/expert/:\n  isq: q4k\n/lm_head/:\n  isq: q4k\n")
    assert [(rule.selector, rule.line) for rule in recipe.unmatched(LAYERS)] == [("7-9", 3), ("/expert/", 5)]
    assert recipe.unmatched([*LAYERS, LayerName(9, "x.experts.0.w1", "x", 8)]) == []


@pytest.mark.parametrize(
    ("text", "problem", "line"),
    [
        ("", "recipe is empty", 1),
        ("q4k", "recipe is not a map", 1),
        ("- 0", "recipe is not a map", 1),
        ("0: q4k", "entry is not a map", 1),
        ("0:\n  isq: q9k", "unknown type", 2),
        ("0:\n  isq: 7", "unknown type", 2),
        ("0:\n  isq: [q4k]", "too deeply nested", 2),
        ("0:\n  isq: q4k\n  gpu: 1", "unknown key", 3),
        ("0:\n  isq: q4k\n  isq: q5k", "key occurs twice", 3),
        ("0:\n  isq: q4k\n0:\n  isq: q5k", "selector occurs twice", 3),
        ("0:\n  isq: q4k\n  device: tpu", "unknown device", 3),
        ("layers:\n  isq: q4k", "unknown selector", 1),
        ("-1:\n  isq: q4k", "unknown selector", 1),
        ("1-2-3:\n  isq: q4k", "unknown selector", 1),
        ("1.5:\n  isq: q4k", "unknown selector", 1),
        ("0:\n  isq: q4k\n4-4:\n  isq: q4k", "empty range", 3),
        ("5-4:\n  isq: q4k", "empty range", 1),
        ("0-999999999:\n  isq: q4k", "empty range", 1),
        ("0:\n  isq: q4k\n/(/:\n  isq: q4k", "bad pattern: missing )", 3),
        ("0: &a\n  isq: q4k\n1: *a", "anchors and aliases are not allowed", 1),
        ("0:\n\tisq: q4k", "recipe is not YAML", 2),
        ("0:\n  isq: q4k\n---\n1:\n  isq: q4k", "recipe is not YAML", 3),
        ("0:\n  isq: !!python/name:os.system", "not a plain text", 2),
        ("!!python/object/apply:os.system [x]", "recipe is not a map", 1),
        ("[" * 5000, "too deeply nested", 1),
        ("? [a]\n: 1", "not a plain text", 1),
    ],
)
def test_errors_name_line_and_reason(text: str, problem: str, line: int) -> None:
    with pytest.raises(FormatError) as caught:
        parse_recipe(text, "recipe.yaml")
    error = caught.value
    assert (error.problem, error.field, error.file) == (problem, f"line {line}", "recipe.yaml")


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"0:\n  isq: \xff\xfe\n")
    with pytest.raises(FormatError, match="recipe is not YAML"):
        load_recipe(tmp_path / "recipe.yaml")


def test_too_long(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b" " * 100_001)
    with pytest.raises(FormatError, match=r"recipe is too long: expected at most 100000 bytes"):
        load_recipe(tmp_path / "recipe.yaml")


def test_256_selectors_are_the_most() -> None:
    """However few texts each takes; each is tried on each weight."""
    lines = [f"'{at}':\n  isq: q4k\n" for at in range(257)]
    assert len(parse_recipe("".join(lines[:256])).rules) == 256
    with pytest.raises(FormatError, match="too many selectors: expected at most 256") as caught:
        parse_recipe("".join(lines))
    assert caught.value.field == "line 513"


def test_too_many_texts() -> None:
    """They are counted before a document is made of them."""
    lines = [f"/a{number}/: {{isq: q4k}}\n" for number in range(427)]
    with pytest.raises(FormatError, match="too many selectors: expected at most 1280 texts") as caught:
        parse_recipe("".join(lines))
    assert caught.value.field == "line 427"
