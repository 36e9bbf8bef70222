"""``adapter_config.json`` of PEFT: which modules an adapter is for, and how large its factors are.

::

    scale    alpha / r, or alpha / sqrt(r) with use_rslora
    r        of rank_pattern, else r
    alpha    of alpha_pattern, else lora_alpha

Patterns are read as PEFT reads them: ``target_modules`` and ``exclude_modules`` as a text match the whole path of a
module, as a list its end from a dot on; the keys of ``rank_pattern`` and ``alpha_pattern`` match the end of it, and the
first that does counts.

Authority: peft 0.21, ``tuners/lora/config.py``, ``tuners/tuners_utils.py`` (``check_target_module_exists``),
``utils/other.py`` (``get_pattern_key``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from uqff.container.document import read_json
from uqff.errors import FormatError, UnsupportedError, located
from uqff.limits import MAX_CONFIG_BYTES, U32_MAX
from uqff.models.patterns import Pattern

__all__ = ["CONFIG_NAME", "LoraConfig", "Size", "read_lora_config"]

CONFIG_NAME: Final = "adapter_config.json"

ALL_LINEAR: Final = "all-linear"

HEADS: Final = ("lm_head", "embed_out", "output")
"""Names of output projections, which ``all-linear`` leaves out."""

REFUSED: Final = {
    "use_dora": "DoRA, whose magnitudes are no sum of a weight and a delta",
    "lora_bias": "biases of the factors",
    "modules_to_save": "modules that were trained whole",
    "trainable_token_indices": "rows of the embedding that were trained",
    "use_qalora": "QALoRA, which pools the inputs",
    "alora_invocation_tokens": "activated LoRA, which begins in the middle of a text",
    "layer_replication": "decoder layers that occur several times",
    "use_bdlora": "block-diagonal factors",
    "arrow_config": "Arrow, which routes between adapters",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA, which changes the weight that it is added to",
    "velora_config": "VeLoRA",
    "megatron_config": "layers of Megatron",
}
"""What makes an adapter more than factors that are added to weights, by its key; null, false and empty are no use."""

MOST_PARTS: Final = 100
"""Names in a path among which the number of a decoder layer is looked for."""

LONGEST_NUMBER: Final = 9
"""Digits of the number of a decoder layer."""

STARTS: Final = ("gaussian", "eva", "orthogonal")
"""Ways to begin training that leave the weight as it is; the others subtract the first factors from it."""


class Size(NamedTuple):
    """What a configuration says of a module: the rank of its factors, and what their product is multiplied by."""

    rank: int
    alpha: float
    scale: float


class LoraConfig:
    """A configuration, checked.

    Attributes:
        path: of the file.
        document: what stands in it.
        fan_in_fan_out: whether weights are stored as ``[in, out]``.
        parameters: ``target_parameters``: paths of tensors, whole or from a dot on.
    """

    def __init__(self, document: Mapping[str, Any], path: Path) -> None:
        """Check a document.

        Raises:
            UnsupportedError: it is no LoRA, or asks for more than factors; the key is named.
            FormatError: a value is not what the key allows.
        """
        self.path = path
        self.document = document
        with located(file=path):
            self._refuse()
            self._rank = self._positive("r", document.get("r", 8))
            self._alpha = self._finite("lora_alpha", document.get("lora_alpha", 8))
            self._rslora = self._flag("use_rslora")
            self.fan_in_fan_out = self._flag("fan_in_fan_out")
            self._ranks = self._patterns("rank_pattern", self._positive)
            self._alphas = self._patterns("alpha_pattern", self._finite)
            self.parameters = tuple(self._texts("target_parameters"))
            self._layers = self._layer_numbers()
            stacks = self._texts("layers_pattern")
            self._stacks = [_pattern(each, _AT_THE_END, "layers_pattern") for each in stacks]
            self._targets = self._modules("target_modules")
            self._excluded = self._modules("exclude_modules")
            if isinstance(self._targets, _Whole) and (self._layers is not None or self._stacks):
                field = "layers_pattern" if self._stacks else "layers_to_transform"
                raise FormatError("only beside a list of target_modules", field=field)
            if not self._targets and not self.parameters:
                raise FormatError("an adapter for nothing", field="target_modules", expected="modules", got="none")

    def size(self, key: str, weight: float = 1.0) -> Size:
        """Rank and scale of the factors of a module.

        Args:
            key: path of the module; of a tensor in ``target_parameters``, that of the tensor.
            weight: of the adapter among others, which multiplies its scale.
        """
        rank = next((value for pattern, value in self._ranks if pattern.search(key)), self._rank)
        alpha = next((value for pattern, value in self._alphas if pattern.search(key)), self._alpha)
        return Size(rank, alpha, weight * alpha / (math.sqrt(rank) if self._rslora else rank))

    def targets(self, path: str) -> bool | None:
        """Whether the adapter is for a module; None if a pattern is one that only backtracking could match."""
        if self._excluded and (excluded := self._excluded.matches(path)) is not False:
            return None if excluded is None else False
        if not self._targets:
            return False
        if not isinstance(self._targets, _Ends) or self._layers is None or path in self._targets:
            return self._targets.matches(path)
        return self._targets.matches(path) and self._layer_of(path) in self._layers

    def parameters_of(self, path: str) -> list[str]:
        """Names that ``target_parameters`` has for tensors of a module; one that stands alone is of any module."""
        named = (each.rpartition(".") for each in sorted(set(self.parameters)))
        return [name for module, _, name in named if not module or f".{path}".endswith(f".{module}")]

    def _layer_of(self, path: str) -> int | None:
        """The number of the decoder layer that a module is in: the first number, behind what ``layers_pattern`` says or
        behind two names at least.
        """
        parts = path.split(".", MOST_PARTS)
        numbers = [at for at in range(1, len(parts) - 1) if parts[at].isdecimal() and len(parts[at]) <= LONGEST_NUMBER]
        if not self._stacks:
            return next((int(parts[at]) for at in numbers if at > 1), None)
        found = (at for pattern in self._stacks for at in numbers if pattern.search(".".join(parts[:at])))
        return next((int(parts[at]) for at in found), None)

    def _refuse(self) -> None:
        document = self.document
        kind = document.get("peft_type", "LORA")
        if not isinstance(kind, str) or kind.upper() != "LORA":
            raise UnsupportedError("adapter is no LoRA", field="peft_type", expected="LORA", got=kind)
        for key, what in REFUSED.items():
            if document.get(key):
                raise UnsupportedError(f"adapter has {what}", field=key, expected="none", got=document[key])
        if document.get("bias") not in (None, "none"):
            raise UnsupportedError("adapter has trained biases", field="bias", expected="none", got=document["bias"])
        start = document.get("init_lora_weights")
        if isinstance(start, str) and start.lower() not in STARTS:
            raise UnsupportedError(
                "adapter belongs to a weight that was changed when its training began",
                field="init_lora_weights",
                expected="an adapter that was converted (path_initial_model_for_weight_conversion of save_pretrained)",
                got=start,
            )

    def _flag(self, key: str) -> bool:
        value = self.document.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise FormatError("neither true nor false", field=key, got=value)

    def _positive(self, field: str, value: Any) -> int:
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= U32_MAX:
            return value
        raise FormatError("not a rank", field=field, expected=f"a whole number from 1 to {U32_MAX}", got=value)

    def _finite(self, field: str, value: Any) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**127:
            return float(value)
        raise FormatError("not a number", field=field, expected="a finite number", got=value)

    def _texts(self, key: str) -> list[str]:
        value = self.document.get(key)
        value = [] if value is None else [value] if isinstance(value, str) else value
        if isinstance(value, list) and all(isinstance(each, str) and each for each in value):
            return value
        raise FormatError("neither a text nor a list of texts", field=key, got=value)

    def _patterns(self, key: str, check: Callable[[str, Any], Any]) -> list[tuple[Pattern, Any]]:
        value = self.document.get(key)
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise FormatError("not a map of patterns to numbers", field=key, got=value)
        made = []
        for pattern, number in value.items():
            field = f"{key}.{pattern}"
            made.append((_pattern(pattern, _AT_THE_END, field), check(field, number)))
        return made

    def _layer_numbers(self) -> frozenset[int] | None:
        value = self.document.get("layers_to_transform")
        numbers = [value] if isinstance(value, int) else value
        if numbers is None or numbers == []:
            return None
        if isinstance(numbers, list) and all(type(each) is int and each >= 0 for each in numbers):
            return frozenset(numbers)
        raise FormatError("not numbers of layers", field="layers_to_transform", got=value)

    def _modules(self, key: str) -> _Ends | _Whole | _AllLinear | None:
        value = self.document.get(key)
        if isinstance(value, str):
            if not value:
                raise FormatError("an empty pattern", field=key)
            return _AllLinear() if value.lower() == ALL_LINEAR and key == "target_modules" else _Whole(value, key)
        names = self._texts(key)
        return _Ends(names) if names else None


def read_lora_config(path: Path) -> LoraConfig:
    """The configuration of an adapter.

    Args:
        path: of ``adapter_config.json``.

    Raises:
        FormatError: it is no JSON object, or a value is not what its key allows.
        UnsupportedError: see :class:`LoraConfig`.
        OSError: it cannot be read.
    """
    return LoraConfig(read_json(path, MAX_CONFIG_BYTES), path)


class _Ends:
    """Ends of paths."""

    def __init__(self, names: list[str]) -> None:
        self._names = frozenset(names)
        self._lengths = sorted({name.count(".") + 1 for name in names})

    def __contains__(self, path: str) -> bool:
        return path in self._names

    def matches(self, path: str) -> bool:
        parts = path.split(".")
        return any(".".join(parts[-length:]) in self._names for length in self._lengths if length <= len(parts))


class _Whole:
    """A regular expression for whole paths."""

    def __init__(self, text: str, field: str) -> None:
        self._pattern = _compiled(text, _WHOLE)
        if self._pattern is None:
            _check_expression(text, field)

    def matches(self, path: str) -> bool | None:
        return None if self._pattern is None else self._pattern.search(path)


class _AllLinear:
    """Everything that is a matrix, but for the head."""

    def matches(self, path: str) -> bool:
        return path not in HEADS


_WHOLE: Final = "^(?:{})$"
_AT_THE_END: Final = r"^(?:.*\.)?(?:{})$"


def _compiled(text: str, form: str) -> Pattern | None:
    """A pattern within another; None if it needs backtracking, or is none."""
    fold = "(?i)" if text.startswith("(?i)") else ""
    try:
        return Pattern(fold + form.format(text.removeprefix(fold)))
    except FormatError:
        return None


def _pattern(text: str, form: str, field: str) -> Pattern:
    made = _compiled(text, form)
    if made is None:
        _check_expression(text, field)
        raise UnsupportedError(
            "pattern needs backtracking", field=field, expected="no look-around and no back reference", got=text
        )
    return made


def _check_expression(text: str, field: str) -> None:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as broken:
        raise FormatError("not a regular expression", field=field, expected=str(broken), got=text) from None
