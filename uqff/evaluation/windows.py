"""A text cut into windows of tokens, and which of a window's predictions count.

::

    window k    tokens k·stride to k·stride + context; the first replaced by what begins a text, where there is such
    it counts   the predictions of the tokens behind positions first to context - 2

Every prediction that counts has seen at least ``first + 1`` tokens.  With the defaults (``stride = context``, ``first =
context / 2``) these are the windows and the predictions of ``llama-perplexity``, without and with ``--kl-divergence``.
A smaller stride lets windows overlap; where it is below ``context / 2``, only the last ``stride`` predictions of a
window count, so that none counts twice.

Authority: llama.cpp, ``tools/perplexity/perplexity.cpp`` (``perplexity``, ``kl_divergence``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from uqff.errors import FormatError, UnsupportedError

__all__ = ["TextWindows"]


@dataclass(frozen=True)
class TextWindows:
    """A text in windows.

    Attributes:
        ids: of the text's tokens.
        begin: of the token that every window begins with, in place of its own; None if there is none.
        context: tokens of a window.
        stride: tokens from the beginning of one window to that of the next.
        first: position from which on predictions count.
        most: how many windows at most; None for all.
    """

    ids: tuple[int, ...]
    begin: int | None
    context: int
    stride: int
    first: int
    most: int | None = None

    @classmethod
    def of(
        cls,
        ids: Sequence[int],
        begin: int | None = None,
        *,
        context: int,
        stride: int | None = None,
        first: int | None = None,
        most: int | None = None,
    ) -> TextWindows:
        """Windows of a text, and the defaults worked out.

        Args:
            ids: of its tokens.
            begin: see the class.
            context: likewise.
            stride: likewise; ``context`` if None.
            first: likewise; half the context, or more if windows overlap so far, if None.
            most: likewise.

        Raises:
            UnsupportedError: there are no such windows.
            FormatError: the text is too short for one.
        """
        stride = context if stride is None else stride
        first = min(max(context // 2, context - stride - 1), max(context - 2, 0)) if first is None else first
        for name, value, low, high in (
            ("context", context, 2, None),
            ("stride", stride, 1, context),
            ("first", first, 0, context - 2),
            ("windows", most, 1, None),
        ):
            if value is not None and (value < low or (high is not None and value > high)):
                expected = f"{low} or more" if high is None else f"{low} to {high}"
                raise UnsupportedError("no such windows", field=name, expected=expected, got=value)
        made = cls(tuple(ids), begin, context, stride, first, most)
        if not len(made):
            raise FormatError("text is too short", expected=f"at least {context} tokens", got=len(ids))
        return made

    def __len__(self) -> int:
        """How many windows."""
        count = max(0, (len(self.ids) - self.context) // self.stride + 1)
        return count if self.most is None else min(count, self.most)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        """The tokens of each window."""
        for at in range(0, len(self) * self.stride, self.stride):
            window = self.ids[at : at + self.context]
            yield window if self.begin is None else (self.begin, *window[1:])

    @property
    def scored(self) -> int:
        """Predictions of a window that count."""
        return self.context - 1 - self.first

    def targets(self, window: int) -> tuple[int, ...]:
        """The tokens that the predictions of a window are about."""
        at = window * self.stride
        return self.ids[at + self.first + 1 : at + self.context]

    def digest(self) -> str:
        """What identifies text and windows."""
        told = repr((self.ids, self.begin, self.context, self.stride, self.first, len(self)))
        return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()
