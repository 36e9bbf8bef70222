"""What `save_pretrained` of transformers writes through this package, in the 0.9.5 client: for `tools/interop`.

A tiny checkpoint of each text architecture becomes UQFF in Q8_0, is loaded by transformers and saved. The client must
answer the same from both directories, to the last bit: layers, residual and configuration are as it reads them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import torch
import transformers

import uqff.integrations.transformers  # noqa: F401  (registers UQFF)
from tools.interop.client import Client, ClientError, Generation
from tools.interop.gguf import Row
from tools.interop.seeing import TOKENIZER
from tools.tiny import text
from uqff.errors import UqffError
from uqff.quantization.run import quantize_model

__all__ = ["check", "check_all"]

KIND: Final = "q8_0"


def check_all(client: Client, folder: Path, names: Sequence[str] = tuple(text.TEXTS)) -> Iterator[Row]:
    """Try every architecture that transformers has here."""
    transformers.utils.logging.disable_progress_bar()
    for number, name in enumerate(filter(text.has, names)):
        yield check(client, name, folder / f"saved-{number}")


def check(client: Client, name: str, folder: Path) -> Row:
    """What the client answers from UQFF of a checkpoint, and from what transformers saves of that."""
    compared = "UQFF, saved by transformers"
    text.write(name, folder / "model")
    made, saved = folder / "made", folder / "saved"
    quantize_model(folder / "model", made, KIND, dtype="f32", measure=False)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
        model.save_pretrained(saved)
        for each in TOKENIZER:
            shutil.copy(made / each, saved / each)
        theirs, ours = (_asked(client, each) for each in (made, saved))
    except (ClientError, UqffError) as error:
        return Row(name, KIND, compared, None, str(error))
    if theirs is None or ours is None:
        return Row(name, KIND, f"{compared}: both are loaded", None, None if theirs is ours else "only one is run")
    if (theirs.tokens, theirs.logits) == (ours.tokens, ours.logits):
        return Row(name, KIND, compared, 0.0, None)
    return Row(name, KIND, compared, None, f"{ours.tokens} {ours.logits} in place of {theirs.tokens} {theirs.logits}")


def _asked(client: Client, folder: Path) -> Generation | None:
    """What the client answers; None if it cannot run the model, but loads it."""
    files = [f"{KIND}-0.uqff"]
    try:
        return client.generate(folder, files, architecture=None, dtype="F32", tokens=4, temperature=1.0)
    except ClientError:
        client.load(folder, files, architecture=None, dtype="F32")
    return None
