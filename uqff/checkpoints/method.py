"""What every method of quantising fulfils: :class:`Method`. One class a method, each in a module of its own.

A method says which tensors of a checkpoint belong to which weight, and makes a record of them: of a family of UQFF
where that is exact, so that the record dequantises to the very bits that the method's own formula gives in float32;
else a :class:`~uqff.checkpoints.foreign.ForeignTensor`.  :mod:`uqff.checkpoints.methods` lists all; nothing else asks
which method a checkpoint has.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from uqff.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from typing_extensions import Self

    from uqff.checkpoints.companions import Companions
    from uqff.checkpoints.safetensors import TensorFiles
    from uqff.families.base import QuantizedTensor

__all__ = ["Cut", "Found", "Method", "by_suffix", "is_ignored", "modules_of", "regular", "setting"]

Cut: TypeAlias = tuple[int, int, int]
"""A range of one dimension of the weight: dimension, start, length; what :meth:`QuantizedTensor.narrow` takes."""

Found: TypeAlias = dict[str, dict[str, str]]
"""Of each weight, by its path, the tensors that it is made of, by their roles."""


class Method(ABC):
    """How the weights of a checkpoint were quantised."""

    NAMES: ClassVar[tuple[str, ...]]
    """What ``quantization_config.quant_method`` calls it."""

    @classmethod
    def means(cls, name: object, quantization: Mapping[str, Any]) -> bool:
        """Whether a configuration means this method.

        Args:
            name: its ``quant_method``, None if it names none.
            quantization: all that it says.
        """
        return name in cls.NAMES

    @classmethod
    @abstractmethod
    def of(cls, quantization: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        """The method with the settings of a checkpoint, checked.

        Args:
            quantization: ``quantization_config`` of config.json, or what stands for it.
            config: all of config.json.

        Raises:
            UqffError: a setting that does not exist; its ``field`` begins with ``quantization_config``.
        """

    @abstractmethod
    def find(self, tensors: TensorFiles) -> Found:
        """The weights that are quantised, by names and headers alone.

        Of a weight some of whose tensors are missing, those that are there; :meth:`meta` then says what lacks.
        Tensors that are found belong to their weight and to nothing else: they are never taken for weights.
        """

    def leaves_plain(self, path: str) -> bool:
        """Whether a weight may be plain numbers without a remark; False if the configuration says that it is not."""
        return True

    def takes_turns(self, stored: Companions) -> bool:
        """Whether the outputs of a stack of gates and ups take turns, whatever architecture it is of."""
        return False

    def again_on_request(self, stored: Companions) -> bool:
        """Whether a weight becomes another type only if that is asked for: it was quantised for good."""
        return False

    @abstractmethod
    def meta(self, stored: Companions) -> QuantizedTensor:
        """The record of a weight without its bytes, by headers alone: type, shape and alignment.

        Raises:
            UqffError: companions are missing, or of another dtype or shape; file, weight and tensor are named.
        """

    @abstractmethod
    def record(self, stored: Companions, cut: Cut | None = None) -> QuantizedTensor:
        """The record of a weight, or of a slice of it.

        Only the bytes of the slice are touched.  Where records are views of the file,
        ``record(stored).narrow(*cut)`` does that; a method that packs codes anew cuts first.

        Args:
            stored: the tensors.
            cut: the slice, to which the weight can be cut; None for the whole.

        Raises:
            UqffError: what :meth:`meta` raises; or a scale that is not finite, an index out of range.
        """


def by_suffix(tensors: TensorFiles, key: str, roles: Mapping[str, str]) -> Found:
    """Weights by the endings of their tensors' names.

    Args:
        tensors: of the checkpoint.
        key: ending of the tensor that makes a weight: ``.qweight``.
        roles: ending of each companion, ``key`` among them, by role.
    """
    paths = (name.removesuffix(key) for name in tensors if name.endswith(key) and name != key)
    return {path: {role: path + end for role, end in roles.items() if path + end in tensors} for path in paths}


def setting(
    quantization: Mapping[str, Any],
    key: str,
    allowed: Sequence[Any],
    *,
    default: Any = None,
    error: type[Any] = UnsupportedError,
) -> Any:
    """A setting that must be one of several values.

    Args:
        quantization: where it stands.
        key: its name.
        allowed: the values; of their very types, so that true is no 1.
        default: what it is if it is not said, or null.
        error: to raise.
    """
    value = quantization.get(key)
    value = default if value is None else value
    if not any(type(value) is type(each) and value == each for each in allowed):
        expected = ", ".join(map(str, allowed))
        raise error(
            "unknown setting", field=f"quantization_config.{key}", expected=f"one of {expected}", got=_told(value)
        )
    return value


def _told(value: object) -> object:
    """So that a string of digits is not taken for a number."""
    return repr(value) if isinstance(value, str) and not value.isidentifier() else value


def modules_of(quantization: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """A setting that is a list of modules, or of regular expressions for them; empty if it is not said, or null.

    Raises:
        FormatError: it is something else.
    """
    value = quantization.get(key)
    value = [] if value is None else value
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise FormatError("not a list of modules", field=f"quantization_config.{key}", got=value)
    for each in value:
        if each.startswith("re:"):
            regular(each, "re:", key)
    return tuple(value)


def regular(text: str, mark: str, key: str) -> re.Pattern[str]:
    """A regular expression of a configuration.

    Args:
        text: the expression, as it stands there.
        mark: what stands in front of it, if it does.
        key: the setting.

    Raises:
        FormatError: it is none.
    """
    try:
        return re.compile(text.removeprefix(mark))
    except re.error as broken:
        field = f"quantization_config.{key}"
        raise FormatError("not a regular expression", field=field, expected=str(broken), got=text) from None


def is_ignored(path: str, modules: Iterable[str]) -> bool:
    """Whether a weight is one of the modules that were left as they are, or lies in one.

    Args:
        path: of the weight.
        modules: paths, whole or from some dot to some dot, where ``*`` is any part: ``lm_head``, ``layers.*.mlp``; or
            ``re:`` and a regular expression, which matches from the start of the path.
    """
    names, patterns = _compiled(tuple(modules))
    return any(pattern.match(path) for pattern in patterns) or (
        names is not None and names.search(f".{path}.") is not None
    )


@lru_cache(maxsize=8)
def _compiled(modules: tuple[str, ...]) -> tuple[re.Pattern[str] | None, list[re.Pattern[str]]]:
    """One pattern for all names, if there are any, and those that are patterns themselves."""
    names = [re.escape(each).replace(r"\*", "[^.]*") for each in modules if not each.startswith("re:")]
    return (
        re.compile(rf"\.(?:{'|'.join(names)})\.") if names else None,
        [re.compile(each[3:]) for each in modules if each.startswith("re:")],
    )
