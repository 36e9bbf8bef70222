"""Ranks that share a step recorded in CUDA graphs, on as many GPUs as there are: two ranks may have the same one.

``make test-gpu`` runs these, see tests/README.md.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.models import PROMPT, TinyCase, write
from tests.parallel.ranks import run_ranks
from uqff.errors import CommError
from uqff.gpu import token
from uqff.gpu.peer import MOST_BYTES
from uqff.parallel import decoding, load_model
from uqff.parallel.comm import Comm
from uqff.parallel.generate import generate
from uqff.parallel.replay import Replayed, peers_of

pytestmark = pytest.mark.cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _device(comm: Comm) -> torch.device:
    os.environ.pop("UQFF_KERNELS", None)
    device = torch.device("cuda", comm.rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _sums_and_gathers(comm: Comm) -> bool:
    device = _device(comm)
    peers = peers_of(comm, device)
    assert peers is not None
    for dtype in DTYPES:
        for count in (8, 5120, 16, 5120, MOST_BYTES // dtype.itemsize):
            generator = torch.Generator("cuda").manual_seed(count + comm.rank)
            x = torch.randn(1, 1, count, generator=generator, device=device).to(dtype)
            parts = comm.all_gather(x)
            total = sum((each.float() for each in parts[1:]), parts[0].float()).to(
                dtype
            )  # what is larger than a message has another order
            with comm.through(peers) as told:
                assert torch.equal(comm.sum_all_reduce(x), total)
                assert all(torch.equal(a, b) for a, b in zip(comm.all_gather(x), parts, strict=True))
                assert [each.split()[0] for each in told] == ["sum_all_reduce", "all_gather"]
                if count <= 5120:
                    both = comm.sum_add_norm(x, x, x.view(-1), 1e-5)
                    assert all(map(torch.equal, both, token.add_norm(x, total, x.view(-1), 1e-5)))
    return not peers.failed


@pytest.mark.parametrize("ranks", [2, 3])
def test_sums_and_gathers_by_kernels(ranks: int) -> None:
    """The bits of those by messages, of every dtype, of one block and of all."""
    assert run_ranks(ranks, _sums_and_gathers, timeout=120) == [True] * ranks


def _recorded_and_not(comm: Comm, directory: Path, dtype: torch.dtype) -> tuple[list[int], list[float], bool]:
    device = _device(comm)
    model = load_model(directory, comm, device=device, dtype=dtype)
    graphs: list[Replayed] = []
    made = Replayed.__init__

    def seen(self: Replayed, *given: Any) -> None:
        graphs.append(self)
        made(self, *given)

    setattr(Replayed, "__init__", seen)  # noqa: B010
    answer = generate(model, PROMPT, 12, comm=comm)
    recorded = graphs[0]._graph is not None
    setattr(Replayed, "__init__", made)  # noqa: B010
    kept = decoding._replays
    vars(decoding)["_replays"] = lambda *_: (False, None)
    plain = generate(model, PROMPT, 12, comm=comm)
    vars(decoding)["_replays"] = kept
    if dtype is torch.float32:
        assert answer.ids == plain.ids
        assert max(abs(a - b) for a, b in zip(answer.logits, plain.logits, strict=True)) <= 2e-5
    return answer.ids, answer.logits, recorded


@pytest.mark.parametrize(("architecture", "kind"), [("llama", "afq4"), ("llama", "q4k"), ("qwen3_moe", "q8_0")])
def test_the_tokens_of_a_recorded_model(architecture: str, kind: str, tmp_path: Path) -> None:
    """Float32: those of one rank, and of ranks that do not record; each rank replays its graph."""
    directory, _ = write(TinyCase(architecture, kind, (1, 2, 0), expert_inner=512), tmp_path)
    expected = generate(load_model(directory), PROMPT, 12)
    found = run_ranks(2, _recorded_and_not, directory, torch.float32, timeout=120)
    for ids, logits, recorded in found:
        assert ids == expected.ids
        assert max(abs(a - b) for a, b in zip(logits, expected.logits, strict=True)) <= 2e-4
        assert recorded or architecture == "qwen3_moe"  # of which float32 experts are dequantised, and counted


def test_a_mixture_that_ranks_share_is_recorded(tmp_path: Path) -> None:
    """Bfloat16: both record it, and choose the same tokens."""
    directory, _ = write(TinyCase("qwen3_moe", "q8_0", (1, 2, 0), expert_inner=512), tmp_path)
    (ids, _, recorded), other = run_ranks(2, _recorded_and_not, directory, torch.bfloat16, timeout=120)
    assert recorded
    assert other[0] == ids
    assert other[2]


def _left_alone(comm: Comm, directory: Path) -> float:
    device = _device(comm)
    model = load_model(directory, comm, device=device)
    following = decoding.NextToken(model, comm, 32)
    with torch.inference_mode():
        ids = torch.tensor([PROMPT], device=device)
        for _ in range(4):
            ids = following.choose(ids)[:1].long().view(1, 1)
        torch.cuda.synchronize()
        comm.barrier()
        if comm.rank:
            os._exit(3)
        begun = time.monotonic()
        with pytest.raises(CommError, match="a token on rank 0 of 2"):
            following.choose(ids)
        return time.monotonic() - begun


def test_a_rank_that_dies(tmp_path: Path) -> None:
    """The other one waits as long as a collective would, and raises."""
    directory, _ = write(TinyCase("llama", "afq4", (1, 2, 0)), tmp_path)
    (seconds,) = run_ranks(2, _left_alone, directory, timeout=20, dead=1)
    assert 20 <= seconds < 40
