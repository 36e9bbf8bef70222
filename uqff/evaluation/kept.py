r"""The reference's predictions in a file, so that it need not run again.

A safetensors file, of which each window has five tensors, n predictions over V tokens::

    N.codes     U16 [n, V]    code c means ln p = high + ln step · (c - 65535), up to what makes the sum of p 1
    N.high      F32 [n]       the largest logit
    N.step      F32 [n]       of one code; all that is less than 32 below the largest has codes above 0
    N.nll       F64 [n]       -ln p of the text's tokens, exact
    N.top       I32 [n, 5]    the likeliest tokens, exact

Two bytes a probability: a step is at most 32 / 65535, so that the divergence of a model from its own file is some
1e-8 instead of 0; nll and likeliest tokens are exact.  The metadata says whose predictions they are, and of which text
and windows, which must be the same when the file is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch

from uqff.container.framing import TensorEntry
from uqff.container.mapped import MappedFile, TensorMap
from uqff.container.tensors import TensorWriter
from uqff.errors import FormatError
from uqff.evaluation.measures import TOP, Reference
from uqff.evaluation.windows import TextWindows

__all__ = ["KeptLogits", "LogitsWriter"]

FORMAT: Final = "uqff.eval.logits"
VERSION: Final = "1"
SPAN: Final = 32.0
"""Below the largest logit, what still has a code of its own: e^-32 of 2^18 tokens is 3e-9 of the probability."""
CODES: Final = 65535
STEP: Final = float(np.float32(SPAN / CODES))
MOST_NLL: Final = 1e39
"""Logits are float32, two of which are less than that apart; -inf is among them."""


def _shapes(scored: int, vocabulary: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor of a window."""
    rows = (scored,)
    return {
        "codes": ("U16", (scored, vocabulary)),
        "high": ("F32", rows),
        "step": ("F32", rows),
        "nll": ("F64", rows),
        "top": ("I32", (scored, min(TOP, vocabulary))),
    }


class LogitsWriter:
    """Writes such a file, window after window."""

    def __init__(self, path: Path, windows: TextWindows, vocabulary: int, model: str, digest: str) -> None:
        """Create it.

        Args:
            path: under which it is made.
            windows: of the text.
            vocabulary: how many tokens there are.
            model: whose predictions they are, for people.
            digest: and for comparisons.
        """
        shapes = _shapes(windows.scored, vocabulary)
        tensors = [
            (f"{at}.{name}", dtype, shape) for at in range(len(windows)) for name, (dtype, shape) in shapes.items()
        ]
        told = {"format": FORMAT, "version": VERSION, "model": model, "model.digest": digest}
        self._file = TensorWriter(path, tensors, told | {"text.digest": windows.digest()})
        self._window = 0

    def add(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Write the predictions of the next window.

        Args:
            logits: ``[n, vocabulary]``.
            targets: the tokens that follow, int64 ``[n]``.
        """
        known = Reference.of(logits, targets)
        high, low = logits.float().amax(-1), logits.float().amin(-1)
        step = (high - low).clamp(max=SPAN).double() / CODES
        steps = torch.where(step == 0, 1.0, step)[:, None]
        codes = (CODES + (logits.double() - high[:, None]) / steps).round().clamp(0, CODES)
        arrays = {
            "codes": codes.numpy(force=True).astype("<u2"),
            "high": high.numpy(force=True).astype("<f4"),
            "step": step.numpy(force=True).astype("<f4"),
            "nll": known.nll.numpy(force=True).astype("<f8"),
            "top": known.top.numpy(force=True).astype("<i4"),
        }
        for name, array in arrays.items():
            self._file.write(f"{self._window}.{name}", [np.ascontiguousarray(array).data])
        self._window += 1

    def finish(self) -> None:
        """All windows are written."""
        self._file.finish()

    def close(self) -> None:
        """Close the file as it is."""
        self._file.close()


class KeptLogits:
    """The predictions in a file.

    Attributes:
        path: of the file.
        model: whose they are.
        digest: of that.
    """

    def __init__(self, path: Path, windows: TextWindows) -> None:
        """Open the file and make sure that it is of the text.

        Raises:
            FormatError: it is no such file, or of another text or other windows.
            OSError: it cannot be read.
        """
        self.path = path
        self._file = MappedFile(path)
        try:
            self._tensors = TensorMap([self._file])
            told: Mapping[str, str] = self._file.header.metadata or {}
            if (told.get("format"), told.get("version")) != (FORMAT, VERSION):
                raise FormatError("no file of logits", file=str(path), field="__metadata__.format", expected=FORMAT)
            self.model, self.digest = told.get("model", ""), told.get("model.digest", "")
            if told.get("text.digest") != windows.digest():
                raise FormatError(
                    "logits of another text, or of other windows",
                    file=str(path),
                    field="__metadata__.text.digest",
                    expected=windows.digest(),
                    got=told.get("text.digest"),
                )
            self._scored, self._count = windows.scored, len(windows)
            for at in range(self._count):
                self._check(at)
        except BaseException:
            self._file.close()
            raise

    def _check(self, window: int) -> None:
        """A window has all tensors, of the right dtypes and shapes."""
        shapes = _shapes(self._scored, self.vocabulary)
        for name, (dtype, shape) in shapes.items():
            entry = self._entry(window, name)
            if (entry.dtype, tuple(entry.shape)) != (dtype, shape):
                raise FormatError(
                    "logits do not fit the windows",
                    file=str(self.path),
                    field=f"{window}.{name}",
                    expected=f"{dtype} {list(shape)}",
                    got=f"{entry.dtype} {list(entry.shape)}",
                )

    def _entry(self, window: int, name: str) -> TensorEntry:
        full = f"{window}.{name}"
        if full not in self._tensors:
            raise FormatError("logits are missing", file=str(self.path), field=full)
        return self._tensors.entry(full)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are."""
        shape = self._entry(0, "codes").shape
        if len(shape) != 2 or not shape[1]:
            expected = f"[{self._scored}, tokens]"
            raise FormatError(
                "logits do not fit the windows", file=str(self.path), field="0.codes", expected=expected, got=[*shape]
            )
        return shape[1]

    def window(self, at: int, part: slice, device: torch.device) -> Reference:
        """Some of the predictions of a window.

        Raises:
            FormatError: a number is none that :class:`LogitsWriter` writes.
        """
        kept = {name: self._tensors[f"{at}.{name}"][part] for name in _shapes(0, 0)}
        for name, (low, high) in {"step": (0, STEP), "nll": (0, MOST_NLL), "top": (0, self.vocabulary - 1)}.items():
            wrong = (kept[name] < low) | ((kept[name] > high) & kept[name].isfinite())
            if wrong.any():
                raise FormatError(
                    "number that no prediction has",
                    file=str(self.path),
                    field=f"{at}.{name}",
                    expected=f"{low} to {high:g}",
                    got=kept[name][wrong][0].item(),
                )
        codes = kept["codes"].to(torch.int32).double()
        log_probs = ((codes - CODES) * kept["step"].double()[:, None]).log_softmax(-1)
        return Reference(log_probs.to(device), kept["nll"].double().to(device), kept["top"].long().to(device))

    def close(self) -> None:
        """Release the file."""
        self._file.close()
