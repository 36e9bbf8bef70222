"""Records of ggml's blocks: the verbs of a record, MXFP4 repacked exactly, what cannot be."""

from __future__ import annotations

import pickle
from pathlib import Path

import gguf as package
import numpy as np
import pytest
import torch
from gguf import quants

from tests.support.samples_gguf import Tensor, gguf
from uqff.checkpoints import open_gguf
from uqff.checkpoints.gguf.blocks import GgmlBlocks, planned_record, record_of, stored_blocks, stored_type
from uqff.errors import ShardError, UnsupportedError
from uqff.families import stack
from uqff.families.mxfp4.tensor import MXFP4
from uqff.gguf.types import FOREIGN_TYPES, ForeignType

IQ4_XS = next(each for each in FOREIGN_TYPES if each.name == "IQ4_XS")
GGML_MXFP4 = next(each for each in FOREIGN_TYPES if each.name == "MXFP4")


def blocks(block_type: ForeignType, *shape: int) -> bytes:
    """Random blocks with scales that are numbers."""
    made = np.zeros((*shape[:-1], shape[-1] // block_type.block_size), block_type.numpy)
    made.view(np.uint8)[:] = np.random.default_rng(3).integers(0, 256, made.view(np.uint8).shape, np.uint8)
    if block_type is GGML_MXFP4:
        made["e"] = made["e"] % 253 + 1
    else:
        made["d"] = np.float16(0.25)
    return made.tobytes()


def record(path: Path, block_type: ForeignType, *shape: int, data: bytes | None = None) -> object:
    data = blocks(block_type, *shape) if data is None else data
    path.write_bytes(gguf([], [Tensor("t.weight", shape[::-1], block_type.code, data)]))
    with open_gguf(path) as file:
        made = record_of(file["t.weight"])
        assert planned_record(file["t.weight"]).shape == made.shape == shape
        assert type(planned_record(file["t.weight"])) is type(made)
    return made


def test_blocks_have_the_verbs_of_a_record(tmp_path: Path) -> None:
    made = record(tmp_path / "a.gguf", IQ4_XS, 4, 512)
    assert isinstance(made, GgmlBlocks)
    data = np.frombuffer(blocks(IQ4_XS, 4, 512), np.uint8)
    theirs = quants.dequantize(data.reshape(4, -1), package.GGMLQuantizationType.IQ4_XS)
    whole = made.dequantize()
    assert torch.equal(whole, torch.from_numpy(theirs))
    assert (made.kind, made.shape, made.nbytes) == ("iq4_xs", (4, 512), len(data))
    assert torch.equal(made.narrow(1, 256, 256).dequantize(), whole[:, 256:])
    with pytest.raises(ShardError, match="iq4_xs in multiples of 256"):
        made.narrow(1, 32, 32)
    assert made.join([(0, made.narrow(0, 0, 1)), (1, made.narrow(0, 1, 3))], 0) == made
    both = stack([made, made])
    assert both.unstack() == [made, made]
    assert torch.equal(both.dequantize_expert(1), whole)
    assert pickle.loads(pickle.dumps(made)) == made
    with pytest.raises(UnsupportedError, match="no form in UQFF"):
        made.build()


def test_mxfp4_is_repacked_exactly(tmp_path: Path) -> None:
    """The numbers are ggml's, but that a negative zero stays one; of exponents from 1 to 254."""
    made = record(tmp_path / "a.gguf", GGML_MXFP4, 3, 4096)
    assert isinstance(made, MXFP4)
    data = np.frombuffer(blocks(GGML_MXFP4, 3, 4096), np.uint8).reshape(3, -1)
    with np.errstate(over="ignore"):
        theirs = quants.dequantize(data, package.GGMLQuantizationType.MXFP4)
    numbers = made.dequantize().numpy()
    assert np.array_equal(numbers, theirs)
    same = numbers.view(np.uint32) == theirs.view(np.uint32)
    assert np.array_equal(~same, (theirs == 0) & np.signbit(numbers))
    assert np.isfinite(numbers).any()


@pytest.mark.parametrize(
    ("exponent", "code", "fits"), [(0, 0x00, True), (0, 0x80, True), (0, 0x10, False), (255, 0, False)]
)
def test_scales_of_mxfp4_that_uqff_does_not_have(tmp_path: Path, exponent: int, code: int, *, fits: bool) -> None:
    data = bytes([127] + [0x11] * 16) + bytes([exponent, *[0] * 15, code])
    if fits:
        made = record(tmp_path / "a.gguf", GGML_MXFP4, 1, 64, data=data)
        assert isinstance(made, MXFP4)
        assert made.dequantize()[0, 32:].eq(0).all()
        return
    with pytest.raises(UnsupportedError, match="has no MXFP4 block with such a scale") as caught:
        record(tmp_path / "a.gguf", GGML_MXFP4, 1, 64, data=data)
    assert (caught.value.field, caught.value.got) == ("t.weight", f"{exponent} in block 1")


def test_mxfp4_goes_back(tmp_path: Path) -> None:
    """Byte for byte; of a scale of 0, with which all numbers are 0 in UQFF, zeros, and no infinity."""
    made = record(tmp_path / "a.gguf", GGML_MXFP4, 3, 4096)
    assert isinstance(made, MXFP4)
    assert stored_type(made) is GGML_MXFP4
    assert bytes(stored_blocks(made).payload) == blocks(GGML_MXFP4, 3, 4096)
    zeros = MXFP4(torch.full((1, 16), 0x92, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.uint8))
    assert bytes(stored_blocks(zeros).payload) == bytes([0, *[0x00, 0x88] * 8])  # elements 0, 2, ...: 2; others: -1/2
    infinite = MXFP4(zeros.blocks, torch.full((1, 1), 255, dtype=torch.uint8))
    with pytest.raises(UnsupportedError, match=r"ggml has no MXFP4 block with such a scale: .* got 255 in block 0"):
        stored_blocks(infinite)
