"""What ``--help`` of each command ends with: command lines that do something useful as they stand."""

from __future__ import annotations

from typing import Final

__all__ = ["EXAMPLES", "epilog"]

EXAMPLES: Final[dict[str, tuple[str, ...]]] = {
    "inspect": (
        "uqff inspect model",
        "uqff inspect model model.layers.0.mlp.up_proj --hex",
        "uqff inspect owner/name:q4k --html page.html",
    ),
    "verify": ("uqff verify model --deep", "uqff verify owner/name --structure"),
    "diff": ("uqff diff checkpoint model", "uqff diff old new"),
    "checksum": ("uqff checksum model --write", "uqff checksum model --check"),
    "report": ("uqff report model", "uqff report model --write --base-model owner/name"),
    "plan": ("uqff plan checkpoint", "uqff plan checkpoint --bits 4.5 -o mix.yaml"),
    "quantize": (
        "uqff quantize checkpoint out --isq q4k",
        "uqff quantize owner/name out --isq q4k --isq q8_0 --effort best",
    ),
    "migrate": ("uqff migrate old new --uqff-version 1.2", "uqff migrate old --dry-run"),
    "convert": ("uqff convert model.gguf out", "uqff convert model:q8_0 out.gguf"),
    "dequantize": ("uqff dequantize model plain --dtype bf16",),
    "run": (
        'uqff run model --prompt "Hello" --tokens 20',
        'uqff run checkpoint --isq q4k --prompt "Hello"',
    ),
    "calibrate": ("uqff calibrate checkpoint --text text.txt -o importance.gguf",),
    "eval": ("uqff eval model --text text.txt --reference checkpoint",),
    "push": ("uqff push model owner/name --dry-run", "uqff push model owner/name --private"),
    "completion": ("uqff completion bash",),
}
"""The examples of each command."""


def epilog(name: str) -> str:
    """The examples of a command, for click, which does not wrap what a backspace stands before."""
    return "\n".join(("\b", "Examples:", *(f"  {line}" for line in EXAMPLES[name])))
