"""The numbers that every file needs: versions, family ids, tensor dtype codes. One table each.

Authority: mistral.rs, ``mistralrs-quant/src/lib.rs`` (``QuantizedSerdeType``) and ``mistralrs-quant/src/utils/uqff.rs``
(``write_dtype``, ``read_dtype``).  Ids are never reused.  The ggml type codes live in their family's room.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from functools import cache
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from torch import dtype as TorchDType

__all__ = ["ENTRY_VERSIONS", "FORMATS", "VERSIONS", "DType", "Family", "Version"]


class Version(NamedTuple):
    """A format version, ``major.minor.patch``; each part fits a byte in pre-1.0 files, a u32 in 1.x files."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


VERSIONS: dict[Version, str] = {
    Version(0, 1, 0): "first release: GGUF, Unquant, HQQ (mistral.rs 0.3)",
    Version(0, 1, 1): "adds the I16 dtype",
    Version(0, 1, 2): "adds the F8E4M3 dtype and the FP8 family (mistral.rs 0.5)",
    Version(0, 1, 3): "adds the AFQ family (mistral.rs 0.6)",
    Version(0, 2, 0): "names dtypes 10 to 13; F8Q8 and MXFP4 arrived under this number (mistral.rs 0.7 to 0.8.3)",
}
"""The pre-1.0 versions that were ever written, in order, with what each added."""

ENTRY_VERSIONS: dict[Version, str] = {
    Version(
        1, 0, 0
    ): "one safetensors entry per part, keyed by weight path; all families but Unquant (mistral.rs 0.8.12)",
    Version(1, 1, 0): "adds Unquant layers and `__metadata__` (mistral.rs 0.8.23)",
    Version(1, 2, 0): "embeddings are layers; stacked weights of HQQ, FP8 and F8Q8 are no longer read (mistral.rs 0.9)",
}
"""The 1.x versions that were ever written, in order, with what each added."""

FORMATS: Final = {f"{each.major}.{each.minor}": each for each in (*VERSIONS, *ENTRY_VERSIONS)}
"""What users call a format, ``major.minor``, and the version that is written for it: the newest of that name."""


class Family(IntEnum):
    """The seven families; the value is the type byte at offset 4 of a pre-1.0 blob."""

    GGUF = 0
    UNQUANT = 1
    HQQ = 2
    FP8 = 3
    AFQ = 4
    F8Q8 = 5
    MXFP4 = 6

    @property
    def title(self) -> str:
        """The name as the format spells it."""
        return "Unquant" if self is Family.UNQUANT else self.name

    @property
    def since(self) -> Version:
        """The first version in which a blob of this family exists."""
        return _FAMILY_SINCE[self]


_FAMILY_SINCE = {
    Family.GGUF: Version(0, 1, 0),
    Family.UNQUANT: Version(0, 1, 0),
    Family.HQQ: Version(0, 1, 0),
    Family.FP8: Version(0, 1, 2),
    Family.AFQ: Version(0, 1, 3),
    Family.F8Q8: Version(0, 2, 0),
    Family.MXFP4: Version(0, 2, 0),
}


class DType(Enum):
    """The 14 tensor dtypes of the tensor record: (code, bytes per element, safetensors name, torch name, since).

    Codes 10 to 13 are reserved names: the engine can neither write nor read a tensor of them, so their size is 0 here
    and both directions refuse them.
    """

    U8 = (0, 1, "U8", "uint8", Version(0, 1, 0))
    U32 = (1, 4, "U32", "uint32", Version(0, 1, 0))
    I32 = (2, 4, "I32", "int32", Version(0, 1, 0))
    I64 = (3, 8, "I64", "int64", Version(0, 1, 0))
    F16 = (4, 2, "F16", "float16", Version(0, 1, 0))
    BF16 = (5, 2, "BF16", "bfloat16", Version(0, 1, 0))
    F32 = (6, 4, "F32", "float32", Version(0, 1, 0))
    F64 = (7, 8, "F64", "float64", Version(0, 1, 0))
    I16 = (8, 2, "I16", "int16", Version(0, 1, 1))
    F8E4M3 = (9, 1, "F8_E4M3", "float8_e4m3fn", Version(0, 1, 2))
    F6E2M3 = (10, 0, "", "", Version(0, 2, 0))
    F6E3M2 = (11, 0, "", "", Version(0, 2, 0))
    F4 = (12, 0, "", "", Version(0, 2, 0))
    F8E8M0 = (13, 0, "", "", Version(0, 2, 0))

    def __init__(self, code: int, itemsize: int, safetensors: str, torch_name: str, since: Version) -> None:
        self.code = code
        self.itemsize = itemsize
        self.safetensors = safetensors
        self.torch_name = torch_name
        self.since = since

    def __repr__(self) -> str:
        return f"DType.{self.name}"

    @property
    def storable(self) -> bool:
        """Whether a tensor of this dtype can be written and read at all."""
        return self.itemsize > 0

    @property
    def torch(self) -> TorchDType:
        """The torch dtype of the same bits."""
        return _torch_dtype(self.torch_name)

    @classmethod
    def of_code(cls, code: int) -> DType | None:
        """The dtype of a stored code, None if there is none."""
        return _BY_CODE.get(code)

    @classmethod
    def of_torch(cls, dtype: TorchDType) -> DType | None:
        """The dtype of a torch dtype, None if the format has none."""
        return _BY_TORCH_NAME.get(str(dtype).removeprefix("torch."))

    @classmethod
    def of_safetensors(cls, name: str) -> DType | None:
        """The dtype of a safetensors name, None if the format has none."""
        return _BY_SAFETENSORS.get(name)


@cache
def _torch_dtype(name: str) -> TorchDType:
    import torch

    dtype: TorchDType = getattr(torch, name)
    return dtype


_BY_CODE = {d.code: d for d in DType}
_BY_TORCH_NAME = {d.torch_name: d for d in DType if d.storable}
_BY_SAFETENSORS = {d.safetensors: d for d in DType if d.storable}
