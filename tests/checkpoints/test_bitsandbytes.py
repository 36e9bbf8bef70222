"""bitsandbytes checkpoints, as the library stored and dequantised them: a golden file, for the package is large."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import uqff
from tests.support.checkpoints import check_record, checkpoint_of, same_bits
from uqff import FormatError, MissingError, ShapeError, Shard, ShardError, UnsupportedError
from uqff.checkpoints.bitsandbytes import STATE
from uqff.families.stacking import stack

GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "bitsandbytes-0.50.2.safetensors")
CONFIG: dict[str, Any] = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def stored(case: str, path: str = "a") -> dict[str, torch.Tensor]:
    """The tensors of a case, under another path."""
    names = [name for name in GOLDEN if name.startswith(f"{case}.") and not name.endswith(".numbers")]
    return {path + name.removeprefix(case): GOLDEN[name] for name in names}


def with_state(tensors: dict[str, torch.Tensor], **changes: Any) -> dict[str, torch.Tensor]:
    name = next(each for each in tensors if STATE in each)
    state = json.loads(bytes(tensors[name].tolist())) | changes
    return tensors | {name: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize("case", ["nf4", "nf4-nested", "nf4-across-rows", "fp4", "fp4-nested", "int8"])
def test_as_the_library_dequantises(tmp_path: Path, case: str) -> None:
    """And slices of both dimensions, read as slices, cut of the whole, and joined again."""
    plain = GOLDEN[f"{case}.numbers"]
    if case.startswith("fp4"):  # code 8 is 0 in the stored table, but -0 in the library's kernel
        plain = plain + 0.0
    with checkpoint_of(tmp_path, stored(case), **CONFIG) as checkpoint:
        record = check_record(checkpoint, "a", plain)
        assert (list(checkpoint), record.kind) == (["a"], "int8-rows" if case == "int8" else case[:3])
        both = stack([record, record])
        assert same_bits(both.dequantize_expert(1), plain)
        assert both.unstack() == [record, record]
        with pytest.raises(UnsupportedError, match=r"no form in UQFF"):
            uqff.serialize(uqff.Layer(record))


def test_a_block_is_not_cut(tmp_path: Path) -> None:
    with (
        checkpoint_of(tmp_path, stored("nf4"), **CONFIG) as checkpoint,
        pytest.raises(ShardError, match=r"cut exactly"),
    ):
        checkpoint.layer("a", Shard.simple(1, 0, 4))


def test_configurations_of_old_and_storage_in_numbers(tmp_path: Path) -> None:
    """They do not name the method; and codes may be stored as bfloat16, whose bytes they are."""
    tensors = stored("nf4") | {"a.weight": GOLDEN["nf4.weight"].view(1, -1).view(torch.bfloat16)}
    with checkpoint_of(tmp_path, tensors, load_in_4bit=True) as checkpoint:
        assert same_bits(checkpoint.layer("a").weight.dequantize(), GOLDEN["nf4.numbers"])


@pytest.mark.parametrize(
    ("case", "change", "error", "problem"),
    [
        ("nf4", {"a.weight": None}, MissingError, r"a tensor weight beside"),
        ("nf4", {"a.weight.quant_map": None}, MissingError, r"a tensor quant_map beside"),
        ("nf4", {f"a.weight.{STATE}nf4": None}, MissingError, r"a tensor quant_state\.bitsandbytes__\.\.\. beside"),
        ("nf4-nested", {"a.weight.nested_quant_map": None}, MissingError, r"a tensor nested_quant_map beside"),
        ("nf4-nested", {"a.weight.nested_absmax": None}, MissingError, r"a tensor nested_absmax beside"),
        ("nf4", {"a.weight.absmax": torch.ones(3)}, ShapeError, r"expected \[16\], got \[3\] .*a\.weight\.absmax"),
        ("nf4", {"a.weight.absmax": torch.ones(16).half()}, FormatError, r"expected F32, got F16"),
        ("nf4", {"a.weight.absmax": torch.full((16,), torch.nan)}, FormatError, r"a finite number.*a\.weight\.absmax"),
        ("nf4", {"a.weight": torch.ones(9, 1).byte()}, ShapeError, r"wrong number of bytes: expected 512, got 9"),
        ("nf4", {f"a.weight.{STATE}nf4": torch.ones(3).byte()}, FormatError, r"not a JSON object"),
        ("int8", {"a.SCB": torch.ones(3)}, ShapeError, r"expected \[8\], got \[3\] .*a\.SCB"),
        ("int8", {"a.weight": torch.ones(8, 48)}, FormatError, r"expected I8, got F32"),
        ("int8", {"a.weight_format": torch.tensor(2).byte()}, UnsupportedError, r"weights in tiles.*got 2"),
    ],
)
def test_companions_that_do_not_fit(
    tmp_path: Path, case: str, change: Any, error: type[Exception], problem: str
) -> None:
    tensors = {name: tensor for name, tensor in (stored(case) | change).items() if tensor is not None}
    with checkpoint_of(tmp_path, tensors, **CONFIG) as checkpoint, pytest.raises(error, match=problem):
        checkpoint.layer("a")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"shape": [1024]}, r"wrong shape in the state: expected \[out, in\]"),
        ({"shape": [8, -128]}, r"wrong shape"),
        ({"blocksize": 48}, r"wrong blocksize in the state.*got 48"),
        ({"dtype": "float64"}, r"wrong dtype in the state: expected one of float32, float16, bfloat16, got float64"),
        ({"quant_type": "fp4"}, r"wrong quant_type in the state: expected nf4, got fp4"),
        ({"nested_blocksize": 0}, r"wrong nested_blocksize"),
        ({"nested_offset": 10**400}, r"wrong nested_offset in the state"),
        ({"nested_offset": float("nan")}, r"wrong nested_offset in the state"),
        ({"nested_offset": "x"}, r"wrong nested_offset in the state: expected a finite number"),
    ],
)
def test_states_that_do_not_exist(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    tensors = with_state(stored("nf4-nested"), **changes)
    with checkpoint_of(tmp_path, tensors, **CONFIG) as checkpoint, pytest.raises(FormatError, match=problem):
        checkpoint.meta("a")
