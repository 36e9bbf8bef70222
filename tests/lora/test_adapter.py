"""Adapter directories: what is read, and what is refused with the file and the tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import uqff
from tests.support.lora_files import PREFIX, exact_numbers, factors, write_adapter
from uqff.errors import FormatError, MissingError, ShapeError, UnsupportedError

Q = "model.layers.0.self_attn.q_proj"
A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


def test_deltas_by_path(tmp_path: Path) -> None:
    tensors = factors(Q, 6, 8) | factors("lm_head", 5, 8, seed=1)
    tensors |= {name: tensor.bfloat16() for name, tensor in factors("model.layers.1.mlp.up_proj", 7, 8, 3).items()}
    write_adapter(tmp_path, tensors, r=2, lora_alpha=3, rank_pattern={"up_proj": 3})
    with uqff.lora.open_adapter(tmp_path) as adapter:
        assert set(adapter) == {Q, "lm_head", "model.layers.1.mlp.up_proj"}
        assert len(adapter) == 3
        assert repr(adapter) == f"<Adapter {tmp_path}: 3 modules>"
        delta = adapter[Q]
        assert (delta.shape, delta.rank, delta.scale) == ((6, 8), 2, 1.5)
        assert (delta.delta() == (tensors[B] @ tensors[A]).numpy() * np.float32(1.5)).all()
        assert adapter["model.layers.1.mlp.up_proj"].scale == 1.0
        with pytest.raises(MissingError, match="adapter has no such module") as caught:
            adapter["model.layers.0.self_attn.k_proj"]
        assert caught.value.file == str(tmp_path / "adapter_model.safetensors")


def test_names_without_the_prefix(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write_adapter(tmp_path, factors(Q, 6, 8))
    save_file(factors(Q, 6, 8), tmp_path / "adapter_model.safetensors")
    assert list(uqff.lora.open_adapter(tmp_path)) == [Q]


def test_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^no such directory: "):
        uqff.lora.open_adapter(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"it lacks adapter_config\.json$"):
        uqff.lora.open_adapter(tmp_path)
    write_adapter(tmp_path, factors(Q, 6, 8))
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"it lacks adapter_model\.safetensors$"):
        uqff.lora.open_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedError, match="adapter is a pickle") as caught:
        uqff.lora.open_adapter(tmp_path)
    assert caught.value.file == str(tmp_path / "adapter_model.bin")


@pytest.mark.parametrize(
    ("name", "problem", "error"),
    [
        (f"{Q}.lora_magnitude_vector", "DoRA", UnsupportedError),
        ("model.embed_tokens.lora_embedding_A", "factors of an embedding", UnsupportedError),
        (f"{Q}.lora_B.bias", "biases of the factors", UnsupportedError),
        (f"{Q}.bias", "trained whole", UnsupportedError),
        ("lm_head.weight", "trained whole", UnsupportedError),
        ("lm_head.modules_to_save.weight", "a module that was trained whole", UnsupportedError),
        (f"{Q}.lora_A.default.weight", "tensor is no factor", FormatError),
        (f"{Q}.lora_C.weight", "tensor is no factor", FormatError),
    ],
)
def test_tensors_that_are_no_factors(name: str, problem: str, error: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path, factors(Q, 6, 8) | {name: torch.ones(2)})
    with pytest.raises(error, match=problem) as caught:
        uqff.lora.open_adapter(tmp_path)
    assert caught.value.file == str(tmp_path / "adapter_model.safetensors")
    assert caught.value.field == PREFIX + name


def nan_at(shape: tuple[int, int], place: tuple[int, int]) -> torch.Tensor:
    made = exact_numbers(shape, 0)
    made[place] = float("nan")
    return made


@pytest.mark.parametrize(
    ("changes", "problem", "error", "field"),
    [
        ({A: None}, "factor lacks the other: expected .*lora_A.weight, got no such tensor", FormatError, B),
        ({B: None}, "factor lacks the other: expected .*lora_B.weight, got no such tensor", FormatError, A),
        ({B: torch.ones(6, 3)}, r"factors of different ranks: .*\[out, 2\]", ShapeError, B),
        ({A: torch.ones(3, 8), B: torch.ones(6, 3)}, "another rank .*: expected 2, got 3", ShapeError, A),
        ({A: torch.ones(2, 8, 1, 1)}, "factor is no matrix", ShapeError, A),
        ({A: torch.ones(2, 0)}, "factor is no matrix", ShapeError, A),
        ({A: torch.ones(2, 8).double()}, "unknown dtype: expected F32, F16, BF16, got F64", UnsupportedError, A),
        ({A: torch.ones(2, 8, dtype=torch.int8)}, "unknown dtype", UnsupportedError, A),
        ({A: nan_at((2, 8), (1, 3))}, r"not finite: expected finite numbers, got nan at \[1, 3\]", FormatError, A),
        ({B: torch.full((6, 2), torch.inf).half()}, r"not finite: .* got inf at \[0, 0\]", FormatError, B),
    ],
)
def test_bad_factors(changes: Any, problem: str, error: Any, field: str, tmp_path: Path) -> None:
    """Each is named with the file, the module and the tensor."""
    tensors = {name: tensor for name, tensor in (factors(Q, 6, 8) | changes).items() if tensor is not None}
    write_adapter(tmp_path, tensors)
    with pytest.raises(error, match=problem) as caught:
        uqff.lora.open_adapter(tmp_path)
    assert caught.value.file == str(tmp_path / "adapter_model.safetensors")
    assert caught.value.field == PREFIX + field
    assert caught.value.layer in (Q, None)


def test_factors_that_the_configuration_leaves_out(tmp_path: Path) -> None:
    """PEFT would drop them in silence."""
    write_adapter(tmp_path, factors(Q, 6, 8), target_modules=["k_proj"])
    with pytest.raises(FormatError, match="factors of a module that the configuration leaves out") as caught:
        uqff.lora.open_adapter(tmp_path)
    assert (caught.value.layer, caught.value.field) == (Q, PREFIX + A)


def test_an_adapter_without_tensors(tmp_path: Path) -> None:
    write_adapter(tmp_path, {})
    with pytest.raises(FormatError, match="adapter has no tensors"):
        uqff.lora.open_adapter(tmp_path)
