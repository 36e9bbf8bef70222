"""Foreign records where there is no numpy: their torch operations have the bits of the formula in numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import checkpoint_of, same_bits
from tests.support.packed_weights import GroupedWeight
from uqff.checkpoints.foreign import ForeignTensor
from uqff.checkpoints.int8_rows import Int8Rows
from uqff.checkpoints.scaled_fp8 import ScaledFP8
from uqff.checkpoints.separate import SeparateExperts
from uqff.checkpoints.table import TableCodes
from uqff.families import stack
from uqff.families.part import Part


def drawn(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(7)).byte()


def scales(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(8))


def fp8(rows: int, columns: int, *outer: int) -> ForeignTensor:
    """Of 5 × 40, all codes but those of no number."""
    codes = drawn(*outer, 5, 40)
    codes = torch.where(codes & 0x7F == 0x7F, 0, codes).view(torch.float8_e4m3fn)
    wide = scales(*outer, -(-5 // rows), -(-40 // columns))
    parts = {"weight": Part.of_tensor(codes), "scales": Part.of_tensor(wide)}
    return ScaledFP8.made_of(**parts, rows=rows, columns=columns)


def grouped(tmp_path: Path, bits: int, dtype: torch.dtype, *, single: bool = False) -> ForeignTensor:
    """Two experts, each with an order of its own."""
    weights = [GroupedWeight.random(32, 96, bits, 32, dtype, seed) for seed in (1, 2)]
    for weight in weights:
        weight.index = weight.index[::-1].copy()
    tensors = weights[0].gptq("a") | weights[1].gptq("b")
    with checkpoint_of(tmp_path, tensors, quant_method="gptq", bits=bits, group_size=32) as checkpoint:
        records: list[Any] = [checkpoint.layer(path).weight for path in "ab"]
        made: ForeignTensor = records[0] if single else stack(records)
        return made


def table(*outer: int) -> ForeignTensor:
    parts = {"codes": drawn(*outer, 4, 32), "scales": scales(*outer, 4, 4), "table": scales(16)}
    return TableCodes.made_of(**{name: Part.of_tensor(each) for name, each in parts.items()}, size=16, name="nf4")


def int8(*outer: int) -> ForeignTensor:
    parts = {"weight": drawn(*outer, 4, 32), "scales": scales(*outer, 4, 1)}
    return Int8Rows.made_of(**{name: Part.of_tensor(each) for name, each in parts.items()})


CASES: dict[str, Callable[[Path], ForeignTensor]] = {
    "fp8 blocks": lambda _: fp8(2, 16),
    "fp8 rows": lambda _: fp8(1, 40, 3),
    "fp8 columns": lambda _: fp8(5, 8, 2),
    "2 bits": lambda path: grouped(path, 2, torch.float16),
    "3 bits": lambda path: grouped(path, 3, torch.bfloat16),
    "4 bits": lambda path: grouped(path, 4, torch.float32),
    "8 bits": lambda path: grouped(path, 8, torch.float16),
    "4 bits single": lambda path: grouped(path, 4, torch.float16, single=True),
    "table": lambda _: table(),
    "tables": lambda _: table(2),
    "int8": lambda _: int8(),
    "int8 stack": lambda _: int8(2),
    "side by side": lambda _: SeparateExperts.of([int8(), table().narrow(1, 16, 32), int8()]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_by_torch(tmp_path: Path, case: str) -> None:
    record = CASES[case](tmp_path)
    made = record.values_there()
    assert made is not None
    assert made.shape == record.shape
    assert same_bits(made, torch.from_numpy(record.values()))


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(tmp_path: Path, case: str) -> None:
    record = CASES[case](tmp_path)
    made = record.to("cuda").dequantize()
    assert made.is_cuda
    assert same_bits(made.cpu(), record.dequantize())


@pytest.mark.parametrize("case", [case for case in CASES if "bit" not in case])  # whose order numbers tell
def test_without_bytes(tmp_path: Path, case: str) -> None:
    """On the meta device: nothing is computed on the CPU, and the shape is right."""
    record = CASES[case](tmp_path)
    made = record.to("meta").dequantize()
    assert (made.device.type, made.shape, made.dtype) == ("meta", record.shape, torch.float32)
