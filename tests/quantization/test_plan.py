"""Where a layer's weight lies in a checkpoint: whole tensors, and experts in joined ones, either way round."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

from uqff.checkpoints import TensorFiles, open_tensors
from uqff.codes import DType, Version
from uqff.quantization.plan import WeightSource, load_dtype, plan_layer, plan_model, residual_names

JOINED = torch.arange(2 * 6 * 4, dtype=torch.float32).reshape(2, 6, 4)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[TensorFiles]:
    save_file({"joined": JOINED, "turned": JOINED.transpose(1, 2).contiguous()}, tmp_path / "model.safetensors")
    with open_tensors(tmp_path) as opened:
        yield opened


def values(source: WeightSource, checkpoint: TensorFiles) -> npt.NDArray[np.float32]:
    """What a source gives, which is float32 here."""
    floats = source.take(checkpoint)
    assert floats.dtype is DType.F32
    return floats.bits.copy().view(np.float32)


@pytest.mark.parametrize("rows", [None, (0, 3), (3, 6)])
@pytest.mark.parametrize("expert", [0, 1])
def test_an_expert_of_a_joined_tensor(checkpoint: TensorFiles, expert: int, rows: tuple[int, int] | None) -> None:
    """Shape, values, and the bytes where they lie: its own rows, or the expert's all if they are columns there."""
    weight = JOINED[expert][slice(*rows) if rows else slice(None)]
    for source in (WeightSource("joined", expert, rows), WeightSource("turned", expert, rows, transposed=True)):
        assert source.shape(checkpoint) == tuple(weight.shape)
        assert values(source, checkpoint).tolist() == weight.tolist()
    start, stop = WeightSource("joined", expert, rows).span(checkpoint)
    assert JOINED.numpy().tobytes()[start:stop] == weight.numpy().tobytes()
    start, stop = WeightSource("turned", expert, rows, transposed=True).span(checkpoint)
    assert (start, stop) == (expert * 6 * 4 * 4, (expert + 1) * 6 * 4 * 4)


def test_a_whole_tensor(checkpoint: TensorFiles) -> None:
    source = WeightSource("joined")
    assert source.shape(checkpoint) == (2, 6, 4)
    assert values(source, checkpoint).tolist() == JOINED.tolist()
    assert source.span(checkpoint) == (0, JOINED.nbytes)


def test_a_tied_head_in_each_generation(tmp_path: Path) -> None:
    """Layers, what stays in the residual, and the type: the embedding is a layer of 1.2 and promoted there only."""
    config = '{"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "tie_word_embeddings": true}'
    (tmp_path / "config.json").write_text(config)
    names = [f"self_attn.{each}_proj" for each in "qkvo"] + [f"mlp.{each}_proj" for each in ("gate", "up", "down")]
    tensors = {f"model.layers.0.{name}.weight": torch.ones(4, 256) for name in names}
    tensors |= {f"{name}.weight": torch.ones(4, 256) for name in ("model.embed_tokens", "lm_head")}
    save_file(tensors | {"model.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    dense, norm = "model.embed_tokens.weight", "model.norm.weight"
    with open_tensors(tmp_path) as opened:
        for version, key, residual, kind in [
            (Version(0, 2, 0), "0", {dense, norm}, "q4k"),
            (Version(1, 1, 0), "lm_head", {dense, norm}, "q4k"),
            (Version(1, 2, 0), "model.embed_tokens", {norm}, "q6k"),
        ]:
            goals = plan_model(opened, version, None, promote=True)
            (goal,) = (goal for goal in goals if goal.sources == (WeightSource(dense),))
            assert (goal.key, goal.index) == (key, 0 if version < (1, 0, 0) else None)
            assert set(residual_names(opened, goals)) == residual
            dtype = load_dtype(opened, goals, "auto")
            planned = plan_layer(opened, goal, "q4k", None, engine="0.9", version=version, dtype=dtype)
            assert (planned.requested, planned.stored, planned.promoted) == (kind, kind, kind == "q6k")
            assert len(goals) == 8
