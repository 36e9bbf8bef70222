"""What a CUDA device records of a step, done here without recording: the same tokens as with a cache that grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.models import PROMPT, TinyCase, write
from tests.parallel.ranks import run_ranks
from tests.parallel.weights import KINDS, blob
from uqff.errors import ShapeError
from uqff.parallel import decoding, load_model
from uqff.parallel.comm import Comm
from uqff.parallel.fallback import GatheredLayer
from uqff.parallel.generate import generate
from uqff.parallel.joined import Joined
from uqff.parallel.linear import ColumnParallelLayer, ReplicatedLayer
from uqff.parallel.vocabulary import Embedding


@pytest.mark.parametrize("architecture", ["llama", "qwen3_moe"])
def test_places_that_are_there_from_the_start(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step but the first goes through the part that is recorded, and gets hidden states."""
    case = TinyCase(architecture, "afq4", (1, 2, 0))
    directory, _ = write(case, tmp_path)
    model = load_model(directory)
    expected = generate(model, PROMPT, 6)
    steps: list[tuple[int, ...]] = []

    def recorded(step: Any, *_: object) -> Any:
        def seen(x: torch.Tensor) -> Any:
            steps.append(tuple(x.shape))
            return step(x)

        return seen

    monkeypatch.setattr(decoding, "_replays", lambda *_: (True, None))
    monkeypatch.setattr(decoding, "Replayed", recorded)
    made = generate(model, PROMPT, 6)
    assert made.ids == expected.ids
    assert steps == [(1, 1)] * 5


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_looked_up_on_the_device(kind: str) -> None:
    """The bits that the embedding gives, of every row; types whose rows share words have no such way."""
    embedding = Embedding(ReplicatedLayer.deserialize(blob(kind, bias=False)), torch.float32)
    look_up = embedding.lookup()
    assert (look_up is None) == (kind in ("hqq3", "hqq4"))
    for row in range(embedding.rows.weight.shape[0] if look_up else 0):
        ids = torch.tensor([[row]])
        assert look_up is not None
        assert torch.equal(look_up(ids), embedding(ids))


def _rows_of_ranks(comm: Comm) -> bool:
    whole = blob("q4k", bias=False)
    embedding = Embedding(ColumnParallelLayer.deserialize(whole, comm), torch.float32)
    expected = Embedding(ReplicatedLayer.deserialize(whole), torch.float32)
    look_up = embedding.lookup()
    assert look_up is not None
    every = [torch.tensor([[row]]) for row in range(expected.rows.weight.shape[0])]
    return all(torch.equal(look_up(ids), expected(ids)) for ids in every)


def test_rows_that_ranks_look_up_together() -> None:
    """Of a vocabulary that is cut among them: every row, whichever rank has it."""
    assert run_ranks(2, _rows_of_ranks) == [True, True]


def test_layers_that_gather_are_not_joined() -> None:
    """A layer that does more than multiply is left as it is, though its weight could be joined."""
    whole = blob("q4k", bias=False)
    plain = [ReplicatedLayer.deserialize(whole) for _ in range(3)]
    assert Joined.of(*plain[:2])._whole is not None
    assert Joined.of(plain[2], GatheredLayer.deserialize(whole))._whole is None


def test_windows_that_slide_are_not_recorded() -> None:
    """Their caches count on the host as well, which a replay would leave out."""
    from transformers import LlamaConfig, MistralConfig

    assert decoding._static(MistralConfig(sliding_window=64), 8) is None
    assert decoding._static(LlamaConfig(), 8) is not None


def test_one_token_outside_the_vocabulary(tmp_path: Path) -> None:
    """A single id takes a way of its own through the embedding."""
    directory, _ = write(TinyCase("llama", "afq4", (1, 2, 0)), tmp_path)
    model = load_model(directory)
    for token in (-1, 96):
        with pytest.raises(ShapeError, match="token outside the vocabulary"):
            model(input_ids=torch.tensor([[token]]))
