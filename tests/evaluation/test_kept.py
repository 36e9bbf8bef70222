"""Files of kept logits that are none, or broken; the rest is in ``test_evaluate.py``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from uqff.errors import FormatError
from uqff.evaluation.evaluate import Evaluation
from uqff.evaluation.kept import FORMAT, VERSION, KeptLogits, LogitsWriter
from uqff.evaluation.measures import Estimate, Predictions
from uqff.evaluation.windows import TextWindows

WINDOWS = TextWindows.of(range(3, 19), context=8)
TOKENS = 24
"""In the vocabulary; three predictions of each of two windows count."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file."""
    path = tmp_path_factory.mktemp("kept") / "sound"
    writer = LogitsWriter(path, WINDOWS, TOKENS, "model", "digest")
    for at in range(len(WINDOWS)):
        writer.add(torch.arange(3.0 * TOKENS).reshape(3, TOKENS).sin() * 10, torch.tensor(WINDOWS.targets(at)))
    writer.finish()
    writer.close()
    return path.read_bytes()


@pytest.mark.parametrize(
    ("name", "made", "problem"),
    [
        ("0.codes", lambda codes: codes.flatten(), "logits do not fit the windows: expected [3, tokens], got [72]"),
        ("0.codes", lambda codes: codes[:, :0], "logits do not fit the windows: expected [3, tokens], got [3, 0]"),
        ("1.codes", lambda codes: codes[:, 1:], "logits do not fit the windows: expected U16 [3, 24], got U16 [3, 23]"),
        ("0.top", lambda top: top.float(), "logits do not fit the windows: expected I32 [3, 5], got F32 [3, 5]"),
        ("1.nll", lambda nll: nll[:, None], "logits do not fit the windows: expected F64 [3], got F64 [3, 1]"),
        ("1.top", lambda top: top * 0 + 24, "number that no prediction has: expected 0 to 23, got 24"),
        ("1.nll", lambda nll: nll * 0 - 2, "number that no prediction has: expected 0 to 1e+39, got -2.0"),
        ("0.step", lambda step: step * 0 + 1, "number that no prediction has: expected 0 to 0.000488289, got 1.0"),
    ],
)
def test_what_is_not_of_the_form_is_refused(
    sound: bytes, tmp_path: Path, name: str, made: Callable[[torch.Tensor], torch.Tensor], problem: str
) -> None:
    """Each tensor has its dtype and shape, and its numbers are such as predictions have."""
    tensors = load(sound)
    told = {"format": FORMAT, "version": VERSION, "text.digest": WINDOWS.digest()}
    path = tmp_path / "broken"
    path.write_bytes(save(tensors | {name: made(tensors[name]).contiguous()}, told))
    with pytest.raises(FormatError) as caught:
        KeptLogits(path, WINDOWS).window(int(name[0]), slice(None), torch.device("cpu"))
    assert str(caught.value) == f"{problem} (file {path}, field {name})"


def test_json_has_no_infinities() -> None:
    """Of a model that gives a token of the text no chance, or NaN."""
    assert Estimate(math.inf, math.nan).document == {"value": None, "error": None}
    assert Estimate(1.0, None).document == {"value": 1.0, "error": None}
    made = Predictions(np.arange(2), *(np.array([1.0, math.nan]) for _ in range(5)))
    document = Evaluation("a", "b", WINDOWS, made, []).document
    assert json.loads(json.dumps(document, allow_nan=False))["distances"]["base_perplexity"]["value"] is None
