"""How texts are cut before byte pair encoding: llama.cpp's names for it, and what ``tokenizer.json`` says.

Authority: llama.cpp, ``conversion/base.py`` (``get_vocab_base_pre``) and ``src/llama-vocab.cpp``; the models' own
``tokenizer.json``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

__all__ = ["PRE_TOKENIZERS", "PreTokenizer", "pre_tokenizer_of_document", "pre_tokenizer_of_name"]

_CONTRACTIONS: Final = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST: Final = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}{_REST}"
_QWEN2: Final = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{_REST}"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """One way of cutting.

    Attributes:
        names: values of ``tokenizer.ggml.pre``; the first is written.
        steps: what ``tokenizer.json`` has before the bytes are made visible: a pattern, ``digits`` (each by itself), or
            nothing for the pattern of GPT-2.
        whole_words: whether a piece that is a token is taken without looking at the merges.
        composed: whether texts are brought to Unicode's form NFC.
        begins: whether a text begins with the token for that, if the file does not say.
    """

    names: tuple[str, ...]
    steps: tuple[str, ...]
    whole_words: bool = False
    composed: bool = False
    begins: bool = False

    def document(self) -> dict[str, Any]:
        """The ``pre_tokenizer`` of ``tokenizer.json``."""
        patterns = [step for step in self.steps if step != "digits"]
        steps: list[dict[str, Any]] = [
            {"type": "Digits", "individual_digits": True}
            if step == "digits"
            else {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
            for step in self.steps
        ]
        visible = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not patterns}
        return {"type": "Sequence", "pretokenizers": [*steps, visible]} if steps else visible


PRE_TOKENIZERS: Final = (
    PreTokenizer(("gpt-2",), ()),
    PreTokenizer(("llama-bpe", "llama3", "llama-v3"), (_LLAMA3,), whole_words=True, begins=True),
    PreTokenizer(("qwen2", "deepseek-r1-qwen"), (_QWEN2,), composed=True),
    PreTokenizer(("tekken",), (_TEKKEN,), whole_words=True, begins=True),
    PreTokenizer(("smollm",), ("digits",)),
)
"""The ways that are known."""


def pre_tokenizer_of_name(name: object) -> PreTokenizer | None:
    """The way that ``tokenizer.ggml.pre`` names, None if it is not known."""
    return next((each for each in PRE_TOKENIZERS if name in each.names), None)


def pre_tokenizer_of_document(document: object) -> PreTokenizer | None:
    """The way that the ``pre_tokenizer`` of a ``tokenizer.json`` describes, None if it is not known."""
    steps = _steps(document)
    return None if steps is None else next((each for each in PRE_TOKENIZERS if list(each.steps) == steps), None)


def _steps(document: object) -> list[str] | None:
    if not isinstance(document, Mapping):
        return None
    parts = document.get("pretokenizers") if document.get("type") == "Sequence" else [document]
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts) or not parts:
        return None
    *before, visible = parts
    steps: list[str] = []
    for part in before:
        if part.get("type") == "Digits" and part.get("individual_digits") is True:
            steps.append("digits")
        elif part.get("type") == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
            pattern = part.get("pattern")
            steps.append(str(pattern.get("Regex")) if isinstance(pattern, Mapping) else "")
        else:
            return None
    by_regex = visible.get("use_regex", True)
    if visible.get("type") != "ByteLevel" or visible.get("add_prefix_space"):
        return None
    return steps if by_regex == (not [step for step in steps if step != "digits"]) else None
