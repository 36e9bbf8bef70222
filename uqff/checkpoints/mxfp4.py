"""Checkpoints in MXFP4: blocks of 32 four-bit floats with an exponent, which are MXFP4 records as they are.

::

    gpt-oss      <name>_blocks  U8 [experts, out, in/32, 16]   <name>_scales  U8 [experts, out, in/32]
                 <name>_bias    float [experts, out]
    matrices     <path>.blocks  U8 [..., in/2]                 <path>.scales  U8 [..., in/32]
                 <path>.weight  U8 [..., in/2]                 <path>.scales or .weight_scale

The lower nibble of a byte comes first; exponents have bias 127.  The rows of gpt-oss' ``gate_up_proj`` take turns:
gate, up, gate, up; :func:`uqff.codec.turns.split_gate_up` takes them apart.

A block whose exponent is 0 is multiplied by 2^-127 here and by 0 in UQFF: only such blocks as are 0 anyway can be taken
over.  Exponent 255 is no number.

Authority: transformers, ``integrations/mxfp4.py`` (``convert_moe_packed_tensors``); mistral.rs v0.8.0,
``mistralrs-quant/src/mxfp4/mod.rs`` (``linear_b``, ``packed_linear_b``, ``packed_gptoss_linear``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np

from uqff.checkpoints.companions import Companions
from uqff.checkpoints.e8m0 import EXPONENTS
from uqff.checkpoints.method import Cut, Found, Method
from uqff.codes import DType
from uqff.errors import ShapeError, UnsupportedError
from uqff.families.mxfp4.tensor import MXFP4
from uqff.families.part import Part

if TYPE_CHECKING:
    from typing_extensions import Self

    from uqff.checkpoints.safetensors import TensorFiles

__all__ = ["MXFP4Checkpoint", "block_floats"]

BLOCK: Final = 32
GPT_OSS: Final = "_blocks"
CODES: Final = (GPT_OSS, ".blocks", ".weight")
"""Endings of the names of codes."""


class MXFP4Checkpoint(Method):
    """``quant_method`` ``mxfp4``: gpt-oss."""

    NAMES: ClassVar[tuple[str, ...]] = ("mxfp4",)

    @classmethod
    def of(cls, quantization: Mapping[str, Any], config: Mapping[str, Any]) -> Self:
        """See :meth:`Method.of`; what there is says nothing that the tensors do not."""
        return cls()

    def find(self, tensors: TensorFiles) -> Found:
        """Codes in U8, by their names."""
        found: Found = {}
        for name in tensors:
            end = next((each for each in CODES if name.endswith(each)), None)
            if end is None:
                continue
            path = name.removesuffix(end)
            names = (f"{path}_scales",) if end == GPT_OSS else (f"{path}.scales", f"{path}.weight_scale")
            scales = next((each for each in names if each in tensors), None)
            if tensors.dtype(name) != "U8" and (end == ".weight" or scales is None):
                continue
            found[path] = {"blocks": name} if scales is None else {"blocks": name, "scales": scales}
        return found

    def takes_turns(self, stored: Companions) -> bool:
        """See :meth:`Method.takes_turns`: those of gpt-oss, which its names tell."""
        return stored.name("blocks").endswith(GPT_OSS)

    def meta(self, stored: Companions) -> MXFP4:
        """See :meth:`Method.meta`."""
        return self._record(stored, planned=True)

    def record(self, stored: Companions, cut: Cut | None = None) -> MXFP4:
        """See :meth:`Method.record`.

        Raises:
            UnsupportedError: a block with exponent 0 is not 0.
        """
        return self._record(stored, planned=False, cut=cut)

    @staticmethod
    def _record(stored: Companions, *, planned: bool, cut: Cut | None = None) -> MXFP4:
        blocks = stored.planned("blocks", ("U8",)) if planned else stored.part("blocks", ("U8",))
        shape = blocks.shape
        if stored.name("blocks").endswith(GPT_OSS) and len(shape) > 2:
            if shape[-1] != BLOCK // 2:
                raise stored.problem("wrong shape", "blocks", "[..., in/32, 16]", list(shape), ShapeError)
            blocks = blocks.view((*shape[:-2], shape[-2] * shape[-1]))
        *outer, row = blocks.shape or (0,)
        if not outer or row % (BLOCK // 2):
            raise stored.problem(
                "row is not whole blocks", "blocks", "[..., a multiple of 16]", list(shape), ShapeError
            )
        return block_floats(stored, blocks, "scales", (*outer, row // (BLOCK // 2)), planned=planned, cut=cut)


def block_floats(
    stored: Companions, blocks: Part, role: str, shape: tuple[int, ...], *, planned: bool, cut: Cut | None
) -> MXFP4:
    """The record of nibbles and of exponents.

    Args:
        stored: the tensors.
        blocks: uint8 ``[..., out, in/2]``.
        role: of the exponents.
        shape: that they must have.
        planned: whether the record has no bytes.
        cut: the slice.

    Raises:
        UqffError: the exponents are of another dtype or shape; or one is 255, or 0 and its block is not.
    """
    scales = stored.planned(role, EXPONENTS, shape) if planned else stored.part(role, EXPONENTS, shape)
    record = MXFP4.made_of(blocks=blocks, scales=Part(DType.U8, scales.shape, scales.data))
    record = record if cut is None else record.narrow(*cut)
    if planned:
        return record
    exponents = record.parts["scales"].array()
    if (exponents == 255).any():
        raise stored.problem("scale is not a number", role, "an exponent from 0 to 254", 255)
    zeros = np.flatnonzero(exponents == 0)
    if len(zeros):
        codes = record.parts["blocks"].array().reshape(-1, BLOCK // 2)
        wrong = zeros[(codes[zeros] & 0x77).any(axis=1)]
        if len(wrong):
            problem = "UQFF has no MXFP4 block with a scale of 2^-127"
            raise stored.problem(
                problem, role, "blocks of zeros where the exponent is 0", int(wrong[0]), UnsupportedError
            )
    return record
