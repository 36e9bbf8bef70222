"""An importance matrix: of each layer, the mean square of every input.

importance = uqff.Importance.open("imatrix.gguf")
importance.of("model.layers.0.mlp.down_proj", (256, 768))      float32 [768]
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from uqff.errors import FormatError, ShapeError, UnsupportedError
from uqff.importance.names import EMBEDDING, HEAD, entry_name, entry_names, expert_of

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Importance", "InputSquares"]

Floats32 = npt.NDArray[np.float32]

MOST_MISSING = 8
"""Times as many experts as stand in a file may be meant, so that memory is bounded by its size."""


@dataclass(frozen=True, eq=False)
class InputSquares:
    """Squares of the inputs of a layer.

    Attributes:
        sums: of squares, float32 ``[n, in]``: of one matrix, or of n experts each by itself.
        counts: how many tokens each row is the sum of, int64 ``[n]``.
    """

    sums: Floats32
    counts: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        """Refuse what is none.

        Raises:
            ShapeError: the arrays do not fit each other.
            FormatError: a sum is negative or not finite.
        """
        if self.sums.ndim != 2 or self.counts.shape != self.sums.shape[:1] or not self.sums.size:
            raise ShapeError(
                "sums and counts do not fit", expected="[n, in] and [n]", got=[*self.sums.shape, *self.counts.shape]
            )
        if not np.isfinite(self.sums).all() or (self.sums < 0).any() or (self.counts < 0).any():
            raise FormatError("not sums of squares", expected="finite numbers, none below 0")

    @property
    def means(self) -> Floats32:
        """Mean squares, float32 ``[n, in]``; of experts that got no token, zeros."""
        made: Floats32 = self.sums / np.maximum(self.counts, 1).astype(np.float32)[:, None]
        return made

    def importance(self, shape: Sequence[int]) -> Floats32:
        """What a quantiser multiplies squared errors with.

        Experts that got no token take the mean of the others.

        Args:
            shape: of the weight: ``(out, in)`` or ``(experts, out, in)``.

        Returns:
            float32 ``[in]``, or ``[experts, in]``.

        Raises:
            ShapeError: it is not the importance of such a weight.
        """
        inputs, stacked = shape[-1], len(shape) == 3
        means, counts = self.means, self.counts
        if stacked and means.shape == (1, shape[0] * inputs):  # a file that does not tell how many experts there are
            means, counts = means.reshape(shape[0], inputs), np.full(shape[0], counts[0])
        if means.shape[1] != inputs or len(means) not in ((1, shape[0]) if stacked else (1,)):
            expected = [shape[0], inputs] if stacked else [inputs]
            raise ShapeError("importance does not fit the weight", expected=expected, got=list(means.shape))
        dead = (counts == 0) | ~means.any(1)
        if dead.any() and not dead.all():
            means = np.where(dead[:, None], means[~dead].mean(0, dtype=np.float32), means)
        return np.broadcast_to(means, (shape[0], inputs)) if stacked else means[0]


class Importance(Mapping[str, InputSquares]):
    """Squares of inputs by the path of a module, or by llama.cpp's name of a weight where its module is not known.

    Attributes:
        chunk: tokens of a window, which llama.cpp calls a chunk.
        datasets: what text it is from.
    """

    def __init__(self, entries: Mapping[str, InputSquares], *, chunk: int = 512, datasets: Sequence[str] = ()) -> None:
        """Of entries by path or name."""
        self._entries = dict(entries)
        self._names: dict[str, str] = {}
        for key in self._entries:
            for name in entry_names(key) or (key,):
                self._names.setdefault(name, key)
        self.chunk = chunk
        self.datasets = tuple(datasets)

    def __getitem__(self, key: str) -> InputSquares:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def of(self, module: str, shape: Sequence[int], *, tied: bool = False) -> Floats32 | None:
        """The importance of a module's inputs, whatever the file calls it; None if it has none.

        Args:
            module: its path.
            shape: of its weight: ``(out, in)`` or ``(experts, out, in)``.
            tied: whether the embedding serves as head, whose inputs then count.

        Returns:
            See :meth:`InputSquares.importance`; ``[in]`` for an expert by itself.

        Raises:
            ShapeError: it is of another shape.
        """
        if tied and self._key(module) is None and module.rpartition(".")[2] in ("embed_tokens", HEAD):
            module = HEAD if module.endswith("embed_tokens") else EMBEDDING
        key = self._key(module)
        if key is None:
            return None
        squares, expert = self._entries[key], expert_of(module) if len(shape) == 2 else None
        if expert_of(key) is not None and key != module:
            squares = self.stack(key, shape[0] if len(shape) == 3 else (expert or 0) + 1)
        count = squares.sums.size // shape[-1]  # of experts, also in a file that does not tell how many there are
        try:
            if expert is None or key == module or count <= expert:
                return squares.importance(shape)
            one: Floats32 = squares.importance((count, *shape))[expert]
            return one
        except ShapeError as error:
            raise error.within(layer=module) from None

    def _key(self, module: str) -> str | None:
        if module in self._entries:
            return module
        return next((self._names[name] for name in entry_names(module) or (module,) if name in self._names), None)

    def stack(self, key: str, count: int = 0) -> InputSquares:
        """The squares of a layer's experts that stand singly; those that are not there got no token.

        Args:
            key: of any of them.
            count: how many there are at least.

        Raises:
            ShapeError: they do not fit each other, or most are not there.
        """
        entry, like = entry_name(key), self._entries[key].sums.shape
        named = {each: expert_of(each) for each in self._entries if entry_name(each) == entry}
        experts = {expert: self._entries[each] for each, expert in named.items() if expert is not None}
        count = max(count, *(expert + 1 for expert in experts))
        if count > MOST_MISSING * len(experts):
            raise ShapeError("most experts are missing", layer=key, expected=count, got=len(experts))
        sums, counts = np.zeros((count, like[1]), np.float32), np.zeros(count, np.int64)
        for expert, each in experts.items():
            if each.sums.shape != (1, like[1]):
                got = list(each.sums.shape)
                raise ShapeError("experts do not fit each other", layer=key, expected=[1, like[1]], got=got)
            sums[expert], counts[expert] = each.sums[0], each.counts[0]
        return InputSquares(sums, counts)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file: llama.cpp's, in GGUF or the older form, or the engine's ``.cimatrix``.

        Raises:
            FormatError: it is none of them, or breaks a rule.
            OSError: it cannot be read.
        """
        from uqff.importance.files import read_importance

        entries, chunk, datasets = read_importance(Path(path))
        return cls(entries, chunk=chunk, datasets=datasets)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file, which is replaced if it is there; its ending says in which form.

        ``.gguf``: llama.cpp's; ``.imatrix`` and ``.dat``: its older form, which the engine reads, too;
        ``.cimatrix``: the engine's own.

        Raises:
            UnsupportedError: another ending.
            OSError: it cannot be written.
        """
        self.check_form(path)
        from uqff.importance.files import WRITERS

        WRITERS[Path(path).suffix](self, Path(path))

    def check_form(self, path: str | os.PathLike[str]) -> None:
        """Refuse a name of a file whose ending says no form.

        Raises:
            UnsupportedError: see :meth:`save`.
        """
        from uqff.importance.files import WRITERS

        suffix = Path(path).suffix
        if suffix not in WRITERS:
            raise UnsupportedError(
                "unknown form of an importance matrix", file=os.fspath(path), expected=", ".join(WRITERS), got=suffix
            )
