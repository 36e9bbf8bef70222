"""In which dtype a layer's bias is stored: what the engine writes, and what it can add.

::

                    the engine writes   0.x adds it in    1.x adds it in
    gguf, f8q8      F32                 F32               the activations' dtype
    hqq             F32                 F32               F32
    afq, unquant    the load dtype      the activations'  the activations'
    fp8             F8E4M3, no scale    the activations'  the activations'
    mxfp4           BF16                the activations'  the activations'

A bias of another dtype than the one it is added in makes the engine load the model and then fail ("dtype mismatch in
add").  So by default a bias is stored in what its readers add: F32 where they say so, else the load dtype, which costs
nothing that loading has not rounded already.  All layers of a model then want the same activations.

Authority: written: mistral.rs, ``mistralrs-quant/src/distributed/layers.rs`` (``apply_isq`` of the parallel layers,
which cast to the weight's ``dtype_and_device``), seen with 0.6.0, 0.8.12, 0.8.23 and 0.9.5. Added, 1.x: every family
with biases and activations in F32, BF16 and F16 each, seen with 0.9.5. Added, 0.x: seen with 0.6.0; F8Q8 and MXFP4,
which it has not, read in the source of v0.8.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from uqff.codes import DType

__all__ = ["BiasRule"]


@dataclass(frozen=True)
class BiasRule:
    """A family's line of the table of this module.

    Attributes:
        written: the dtype in which the engine stores a bias; None for the load dtype.
        added: by the major version of the format, the dtype in which its readers add one; where there is none, that of
            the activations.
    """

    written: DType | None = None
    added: Mapping[int, DType] = field(default_factory=dict)

    def dtype(self, load: DType, version: tuple[int, int, int], *, engine: bool = False) -> DType:
        """The dtype in which a bias is stored.

        Args:
            load: the load dtype.
            version: of the format.
            engine: what the engine writes, though it may not be able to add it, instead of what it adds.
        """
        return (self.written if engine else self.added.get(version[0])) or load
