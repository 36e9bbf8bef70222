"""What the engine does with the layers of a family while a model runs: in which dtypes, and what a layer can become.

Authority: mistral.rs v0.8.0, ``mistralrs-quant/src/<family>/mod.rs`` (``name``, ``dtype_and_device``,
``quantized_act_type``, ``add_delta_w``, ``apply_isq``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from uqff.codes import DType
from uqff.families.part import Part

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

__all__ = ["LayerRules"]


class LayerRules(ABC):
    """The layers of a family."""

    LAYER_NAME: ClassVar[str]
    """What the engine calls a layer of the family."""
    NOT_LOADED: ClassVar[tuple[str, ...]] = ()
    """Types that the engine writes and, in all its generations, does not load."""
    MANUAL_MAPPING: ClassVar[tuple[str, ...]] = ()
    """Types whose blobs load with manual device mapping only."""
    SKIPPED: ClassVar[Mapping[str, str]] = {}
    """What the engine's report says of layers that are plain because the type asked for does not fit them: by the type
    that they are stored as.

    Authority: mistral.rs v0.9.2, ``mistralrs-quant/src/utils/isq.rs`` (``generate_isq``) and
    ``mistralrs-quant/src/unquantized/mod.rs`` (``apply_isq``).
    """
    STACKS_LOAD: ClassVar[bool] = True
    """Whether any release that reads 1.x loads weights of three dimensions."""
    STACKS_RUN_ON_CPU: ClassVar[bool] = True
    """Whether experts that are such a stack run on a CPU."""
    UNQUANTISED: ClassVar[bool] = False
    """Whether the weight is that of a layer which is not quantised."""
    TAKES_DELTA: ClassVar[bool] = True
    """Whether a delta (of LoRA) can be added to the weight."""
    SLICES_QUANTISE_ALIKE: ClassVar[bool] = True
    """Whether slices that are quantised apart are slices of the whole quantised, as far as shapes tell."""

    @property
    @abstractmethod
    def nominal_dtype(self) -> DType:
        """The dtype that a layer claims to have: of its scales or numbers, or what the engine says."""

    @property
    def act_dtype(self) -> DType | None:
        """The dtype that activations are cast to by ``forward_autocast``; None if they stay as they are."""
        return None

    @property
    def engine_activations(self) -> str | None:
        """ISQ name of the ggml type that the engine quantises activations to on a CPU; None if it does not.

        A weight for which it does has an ``engine_product``.
        """
        return None

    @property
    def load_dtype(self) -> DType:
        """The dtype in which the weight is dequantised to be quantised anew."""
        return DType.F32

    @property
    def plain(self) -> Part | None:
        """The weight's numbers, if they are stored as they are, in their own dtype and shape; else None."""
        return None

    @property
    def own_group_size(self) -> int | None:
        """The group size of the weight, if the quantiser has to be told; None if its type has none."""
        return None

    def plain_is_cast(self, major: int) -> bool:
        """Whether plain numbers are cast to the activations' dtype when they are loaded, of the format's version."""
        return False

    def becomes(self, kind: str) -> bool:
        """Whether the engine changes a weight of the family into a type in place."""
        return False

    STAYS: ClassVar[bool] = False
    """Whether a weight that is to become the type that it has stays as it is; else it is quantised anew."""

    def plus(self, delta: torch.Tensor) -> Self | None:
        """The weight plus a delta of its shape, where its numbers are stored as they are; None where they are not."""
        return None

    def transposed(self) -> Self | None:
        """The weight with outputs and inputs exchanged, in new memory; None of a type whose blocks lie along inputs."""
        return None

    @abstractmethod
    def resized(self, outputs: int) -> Self:
        """A weight of the same type and parameters with another number of outputs, without its bytes.

        Raises:
            UnsupportedError: outputs share something, so that there is no such weight.
        """
