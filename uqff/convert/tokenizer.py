"""The tokenizer of a GGUF file."""

from __future__ import annotations

from typing import Any

from uqff.sources.gguf import GgufFile


def tokenizer_files(file: GgufFile) -> tuple[dict[str, Any], list[str]]:
    return {}, []
