"""The numbers that every file needs: versions, family ids, tensor dtype codes. One table each.

Authority: mistral.rs, ``mistralrs-quant/src/lib.rs`` (``QuantizedSerdeType``) and ``mistralrs-quant/src/utils/uqff.rs``
(``write_dtype``, ``read_dtype``).  Ids are never reused.  The ggml type codes live in their family's package.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

from uqff.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import dtype as TorchDType

__all__ = ["ENTRY_VERSIONS", "FORMATS", "VERSIONS", "DType", "Version"]


class Version(NamedTuple):
    """A format version, ``major.minor.patch``; each part fits a byte in pre-1.0 files, a u32 in 1.x files."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"

    @classmethod
    def of(cls, value: str | Iterable[int]) -> Version:
        """A version as users write it: ``"1.2"``, the newest of that name, ``"1.2.0"``, or ``(1, 2, 0)``.

        Raises:
            UnsupportedError: no such version was ever written.
        """
        known = {**FORMATS, **{str(each): each for each in FORMATS.values()}, **{str(each): each for each in VERSIONS}}
        text = value if isinstance(value, str) else ".".join(map(str, value))
        if text not in known:
            raise UnsupportedError("unknown version", field="version", expected=", ".join(FORMATS), got=text)
        return known[text]


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
    Version(1, 1, 0): "adds Unquant layers, `__metadata__` and `uqff_report.json` (mistral.rs 0.8.23)",
    Version(
        1, 2, 0
    ): "`model.embed_tokens` may be a layer, and a tied model has no `lm_head`; stacked weights of HQQ, FP8 and F8Q8 "
    "are no longer read (mistral.rs 0.9)",
}
"""The 1.x versions that were ever written, in order, with what each added."""

FORMATS: Final = {f"{each.major}.{each.minor}": each for each in (*VERSIONS, *ENTRY_VERSIONS)}
"""What users call a format, ``major.minor``, and the version that is written for it: the newest of that name."""


class _Families(type):
    """What makes ``Family`` look like an enumeration of those that are known: by number, by name, one after another."""

    _known: dict[int, Family]

    def __call__(cls, number: int, title: str | None = None, since: Version | None = None) -> Family:
        """The family of a number; with a title and a version, a new one.

        Raises:
            ValueError: no known family has the number.
        """
        if title is not None:
            made: Family = type.__call__(cls, number, title, since)
            return made
        if number not in cls._known:
            raise ValueError(f"{number!r} is not a valid Family")
        return cls._known[number]

    def __iter__(cls) -> Iterator[Family]:
        return iter([cls._known[number] for number in sorted(cls._known)])

    def __len__(cls) -> int:
        return len(cls._known)

    def __contains__(cls, value: object) -> bool:
        return value in cls._known

    def __getitem__(cls, name: str) -> Family:
        for family in cls:
            if family.name == name:
                return family
        raise KeyError(name)

    def __getattr__(cls, name: str) -> Family:
        try:
            return cls[name]
        except KeyError:
            raise AttributeError(name) from None

    def __dir__(cls) -> list[str]:
        return [*super().__dir__(), *(family.name for family in cls)]


class Family(int, metaclass=_Families):
    """A family of quantised weights: the type byte at offset 4 of a pre-1.0 blob, ``weight.format`` in 1.x.

    Each is declared by its record, ``family = Family(0, "GGUF", Version(0, 1, 0))``; :data:`uqff.families.FAMILIES`
    lists them.  ``Family.GGUF``, ``Family["GGUF"]`` and ``Family(0)`` are the same.  ``uqff.Family``, the public
    name, knows them all; in this module it has no members until :mod:`uqff.families` is imported.

    Attributes:
        title: the name as the format spells it.
        name: in upper case.
        since: the first version in which a blob of this family exists.
    """

    _known: ClassVar[dict[int, Family]] = {}
    title: str
    since: Version

    def __new__(cls, number: int, title: str, since: Version) -> Family:
        """Declare a family; it is known once :func:`add_family` was called."""
        made = super().__new__(cls, number)
        made.title, made.since = title, since
        return made

    @classmethod
    def of_code(cls, number: int) -> Family | None:
        """The known family of a number, None if there is none."""
        return cls._known.get(number)

    @property
    def name(self) -> str:
        """The title in upper case."""
        return self.title.upper()

    @property
    def value(self) -> int:
        """The number."""
        return int(self)

    def __repr__(self) -> str:
        return f"<Family.{self.name}: {self.value}>"

    def __str__(self) -> str:
        return str(self.value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _family, (int(self), self.title, self.since)


def _family(number: int, title: str, since: Version) -> Family:
    return Family._known.get(number) or Family(number, title, since)


def add_family(family: Family) -> None:
    """Make a family known.

    Raises:
        ValueError: its number is taken, or does not fit a byte.
    """
    if not 0 <= family <= 255 or family in Family._known:
        raise ValueError(f"type byte {int(family)} of {family.title} is taken or no byte")
    Family._known[int(family)] = family


def remove_family(family: Family) -> None:
    """The reverse of :func:`add_family`."""
    del Family._known[int(family)]


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


LOADED_DTYPES: Final = {"F32": DType.F32, "F16": DType.F16, "BF16": DType.BF16}
"""What weights come as and are loaded as, by their name in a safetensors file."""
