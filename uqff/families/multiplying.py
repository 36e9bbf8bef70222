"""How a weight on the CPU is multiplied in the engine's arithmetic, of families that it multiplies by their codes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from uqff.simd.chain import Task

__all__ = ["EngineProduct", "Multiplying"]

EngineProduct: TypeAlias = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]


class Multiplying:
    """Products of a weight; there are none unless its family has them."""

    def engine_product(self) -> EngineProduct | None:
        """``x Wᵀ`` in the engine's arithmetic, of a weight on the CPU: a function of float32 ``[rows, in]`` in C order.

        It is a kernel or the reference, and gives float32 ``[rows, out]``.  None where the engine multiplies with plain
        numbers: ``engine_activations``.
        """
        return None

    def engine_task(
        self, x: npt.NDArray[np.float32], y: npt.NDArray[np.float32], laid: dict[Hashable, Task]
    ) -> Task | None:
        """:meth:`engine_product` of one row as a task of a chain, the same bits; None where there is no kernel.

        Args:
            x: where the activations are going to be, ``[1, in]``.
            y: where the product goes, ``[1, out]``.
            laid: tasks of the stage before, which lay out ``x``, by what they make: one that is missing is added.
        """
        return None

    def rounded_as_engine(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32] | None:
        """Activations as the engine's arithmetic knows them: the exact product with them is that of the engine.

        Takes what :meth:`engine_product` gives does; None where there is no such product, or rounding is not all of it.
        """
        return None
