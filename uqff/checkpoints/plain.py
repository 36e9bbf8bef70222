"""Plain numbers: what no method has quantised becomes an Unquant record of its own dtype, a view of the file.

::

    <path>.weight, <path>.bias        a layer of a model, or a norm: of any number of dimensions from one on
    <name>, <name>_bias               a tensor of another name, such as experts.down_proj, by its whole name
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from uqff.checkpoints.method import Cut, Found, Method
from uqff.errors import UnsupportedError
from uqff.families.unquant.tensor import Unquant

if TYPE_CHECKING:
    from typing_extensions import Self

    from uqff.checkpoints.companions import Companions
    from uqff.checkpoints.safetensors import TensorFiles

__all__ = ["Plain"]

NUMBERS = ("F32", "F16", "BF16", "F64")
"""What plain numbers are; anything else that is called a weight is the codes of one."""


class Plain(Method):
    """Checkpoints that are not quantised, and what the others leave unquantised."""

    NAMES: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of(cls, quantization: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        """See :meth:`Method.of`; there are no settings."""
        return cls()

    def find(self, tensors: TensorFiles) -> Found:
        """Everything that is named as a weight, and all other numbers of one dimension or more."""
        found: Found = {}
        for name in tensors:
            if name.endswith(".weight") and tensors.shape(name):
                found[name.removesuffix(".weight")] = {"weight": name}
            elif tensors.dtype(name) in NUMBERS and tensors.shape(name):
                found[name] = {"weight": name}
        return found

    def meta(self, stored: Companions) -> Unquant:
        """See :meth:`Method.meta`.

        Raises:
            UnsupportedError: the tensor holds codes, not numbers.
        """
        if stored.dtype("weight") not in NUMBERS:
            raise stored.problem(
                "codes without a method: the tensor is no plain weight, and the configuration does not say what it is",
                "weight",
                f"{' or '.join(NUMBERS)}, or another quantization_config",
                stored.dtype("weight"),
                UnsupportedError,
            )
        return Unquant.of(stored.planned("weight"))

    def record(self, stored: Companions, cut: Cut | None = None) -> Unquant:
        """See :meth:`Method.record`."""
        self.meta(stored)
        whole = Unquant.of(stored.part("weight"))
        return whole if cut is None else whole.narrow(*cut)
