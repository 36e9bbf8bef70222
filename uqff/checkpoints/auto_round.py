"""Checkpoints of auto-round, which packs as GPTQ or AWQ do and says so in ``packing_format`` (``backend`` before 0.5).

::

    auto_round:auto_gptq, auto_round:gptq                         GPTQ, zeros stored less one
    auto_round, auto_round:exllamav2, auto_round:tritonv2, ...    GPTQ, zeros stored as they are
    auto_round:auto_awq, auto_round:awq                           AWQ

``extra_config`` says otherwise of modules by their names, or by regular expressions that are searched in them; modules
of 16 bits and more are not quantised.

Authority: auto-round 0.8, ``auto_round/inference/convert_model.py`` (``get_layer_config``,
``convert_hf_model``), ``auto_round/inference/backend.py`` (``GPTQ_FORMAT``, ``GPTQ_FORMAT_NO_ZP``, ``AWQ_FORMAT``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from uqff.checkpoints.gptq import AWQ, BITS, GPTQ, group_size_of
from uqff.checkpoints.method import Cut, Found, Method, regular, setting
from uqff.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from typing_extensions import Self

    from uqff.checkpoints.companions import Companions
    from uqff.checkpoints.safetensors import TensorFiles
    from uqff.families.base import QuantizedTensor

__all__ = ["AutoRound"]

LESS_ONE: Final = ("auto_round:auto_gptq", "auto_round:gptq")
AS_THEY_ARE: Final = (
    *("auto_round", "auto_round:exllamav2", "auto_round:tritonv2", "auto_round:torch"),
    *("auto_round:gptq:exllamav2", "auto_round:gptq:tritonv2"),
)
IN_ORDER_OF_AWQ: Final = ("auto_round:auto_awq", "auto_round:awq")
PLAIN_BITS: Final = 16


class AutoRound(Method):
    """``quant_method`` ``auto-round`` or ``intel/auto-round``."""

    NAMES: ClassVar[tuple[str, ...]] = ("auto-round", "intel/auto-round")

    def __init__(self, packed: Method) -> None:
        """How the words are packed."""
        self.packed = packed

    @classmethod
    def of(cls, quantization: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        """See :meth:`Method.of`."""
        key = "packing_format" if "packing_format" in quantization else "backend"
        known = (*LESS_ONE, *AS_THEY_ARE, *IN_ORDER_OF_AWQ)
        form = setting(quantization, key, known, default=LESS_ONE[0])
        setting(quantization, "data_type", ("int",), default="int")
        bits = setting(quantization, "bits", BITS)
        size = group_size_of(quantization.get("group_size"), "group_size")
        rules = cls._rules(quantization.get("extra_config"), bits, size)
        if form not in IN_ORDER_OF_AWQ:
            return cls(GPTQ(bits, size, v2=form in AS_THEY_ARE, dynamic=rules))
        if bits != AWQ.BITS or any(rule[1:] != (bits, size) for rule in rules):
            field = "quantization_config.extra_config" if bits == AWQ.BITS else "quantization_config.bits"
            raise UnsupportedError("unknown setting", field=field, expected=f"{AWQ.BITS} bits in all", got=form)
        return cls(AWQ(size))

    @staticmethod
    def _rules(extra: object, bits: int, size: int) -> tuple[tuple[re.Pattern[str], int, int], ...]:
        """Modules with bits or groups of their own."""
        if extra is None:
            return ()
        if not isinstance(extra, Mapping):
            raise FormatError("not an object", field="quantization_config.extra_config", got=extra)
        rules = []
        for name, other in extra.items():
            key = f"extra_config.{name}"
            if not isinstance(other, Mapping):
                raise FormatError("not an object", field=f"quantization_config.{key}", got=other)
            said = other.get("bits", bits)
            if type(said) is int and said >= PLAIN_BITS:
                continue
            of_rule = setting({f"{key}.bits": said}, f"{key}.bits", BITS)
            is_name = re.fullmatch(r"[\w.\-]+", name) is not None
            pattern = regular(rf"{re.escape(name)}\Z" if is_name else f".*?(?:{name})", "", key)
            rules.append((pattern, of_rule, group_size_of(other.get("group_size", size), f"{key}.group_size")))
        return tuple(rules)

    def find(self, tensors: TensorFiles) -> Found:
        """See :meth:`Method.find`."""
        return self.packed.find(tensors)

    def meta(self, stored: Companions) -> QuantizedTensor:
        """See :meth:`Method.meta`."""
        return self.packed.meta(stored)

    def record(self, stored: Companions, cut: Cut | None = None) -> QuantizedTensor:
        """See :meth:`Method.record`."""
        return self.packed.record(stored, cut)
