"""Models that see, of GGUF files, in the 0.9.5 client: for `tools/interop`.

A tiny checkpoint, and the two files that llama.cpp's converter makes of it, become UQFF in Q8_0. The configuration of
the latter is made of metadata. The client must answer a text the same from both, to the last bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tools.interop.client import Client, ClientError
from tools.interop.gguf import Row
from tools.tiny.mmproj import CASES, write_checkpoint, write_pair
from tools.tiny.multimodal import MULTIMODALS
from uqff.quantization.run import quantize_model

__all__ = ["check", "check_all"]

KIND: Final = "q8_0"
LOADER: Final = "MultimodalPlain"
TOKENIZER: Final = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
"""Whose metadata make none in these files."""


def check_all(client: Client, folder: Path) -> Iterator[Row]:
    """Try every case."""
    for name in CASES:
        yield check(client, name, folder / name)


def check(client: Client, name: str, folder: Path) -> Row:
    """What the client answers from UQFF of a checkpoint, and of the files that are made of it."""
    checkpoint, compared = folder / "checkpoint", "checkpoint, both GGUF files"
    checkpoint.mkdir(parents=True)
    write_checkpoint(name, checkpoint)
    write_pair(name, folder)
    answers = []
    for source, made in ((checkpoint, folder / "a"), (folder / "model.gguf", folder / "b")):
        quantize_model(source, made, KIND, measure=False)
        for each in TOKENIZER:
            shutil.copy(checkpoint / each, made / each)
        try:
            shards = sorted(path.name for path in made.glob("*.uqff"))
            architecture = MULTIMODALS[name].client
            answers.append(client.generate(made, shards, architecture=architecture, dtype="F32", kind=LOADER))
        except ClientError as exc:
            return Row(name, KIND, compared, None, str(exc))
    theirs, ours = answers
    if (theirs.tokens, theirs.logits) == (ours.tokens, ours.logits):
        return Row(name, KIND, compared, 0.0, None)
    return Row(name, KIND, compared, None, f"{ours.tokens} {ours.logits} in place of {theirs.tokens} {theirs.logits}")
