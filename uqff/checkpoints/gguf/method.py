"""GGUF files as a method of quantising: what is in blocks, by the types of the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from uqff.checkpoints.gguf.files import GgufTensors
from uqff.checkpoints.method import Cut, Found, Method

if TYPE_CHECKING:
    from typing_extensions import Self

    from uqff.checkpoints.companions import Companions
    from uqff.checkpoints.safetensors import TensorFiles
    from uqff.families.base import QuantizedTensor

__all__ = ["GgufBlocks"]


class GgufBlocks(Method):
    """The tensors of a GGUF file that are no plain F32, F16 or BF16. No configuration names it."""

    NAMES: ClassVar[tuple[str, ...]] = ("gguf",)

    @classmethod
    def means(cls, name: object, quantization: Mapping[str, Any]) -> bool:
        """Never: the file says so."""
        return False

    @classmethod
    def of(cls, quantization: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        """See :meth:`Method.of`; there are no settings."""
        return cls()

    def find(self, tensors: TensorFiles) -> Found:
        """See :meth:`Method.find`."""
        assert isinstance(tensors, GgufTensors)
        blocks = [name for name in tensors if tensors.meta(name).plain is None or tensors.is_across(name)]
        return {name.removesuffix(".weight"): {"blocks": name} for name in blocks}

    def again_on_request(self, stored: Companions) -> bool:
        """Blocks; numbers of other types (F64, I8, ...) are quantised for the first time."""
        ggml_type = _tensors(stored).gguf(stored.name("blocks")).ggml_type
        return ggml_type is not None and ggml_type.block_size > 1

    def meta(self, stored: Companions) -> QuantizedTensor:
        """See :meth:`Method.meta`."""
        return _tensors(stored).meta(stored.name("blocks"))

    def record(self, stored: Companions, cut: Cut | None = None) -> QuantizedTensor:
        """See :meth:`Method.record`.

        Raises:
            UnsupportedError: a type that is not read, or a block of MXFP4 whose scale UQFF does not have.
        """
        return _tensors(stored).record(stored.name("blocks"), cut)


def _tensors(stored: Companions) -> GgufTensors:
    assert isinstance(stored.tensors, GgufTensors)
    return stored.tensors
