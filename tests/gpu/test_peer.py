"""Sums and gathers over ranks, compiled as plain C++: the kernels of each rank run on the CPU, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch

from tests.gpu import token_reference
from tests.gpu.compiled import Compiled, compiled, launching, needs_compiler
from uqff.codes import DType
from uqff.errors import CommError
from uqff.gpu import driver, peer, token
from uqff.gpu.source import peer_source

pytestmark = needs_compiler

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels of :mod:`uqff.gpu.peer` are those of a library for the CPU."""
    made = {f"sum_ranks_{name}": f"sum_ranks<{name}>(given);" for name in ("F32", "BF16", "F16")}
    made |= {f"sum_add_norm_{name}": f"sum_add_norm<{name}>(given);" for name in ("F32", "BF16", "F16")}
    made |= {f"gather_ranks_{unit}": f"gather_ranks<F32, {unit}>(given);" for unit in (4, 16)}
    assert made["gather_ranks_4"] in peer_source("gather_ranks", "Peer", 0, DType.F32, (4,))
    common = peer_source("sum_ranks", "Peer", 0, DType.F32).partition('extern "C"')[0]
    given = {name: "PeerNorm" if "norm" in name else "Peer" for name in made}
    entries = [launching(name, given[name], body) for name, body in made.items()]
    library = compiled([common, *entries], tmp_path_factory.mktemp("peer"))

    def kernel(name: str, dtype: DType, how: tuple[int, ...], index: int) -> Compiled:
        return Compiled(library[f"{name}_{how[0] if how else dtype.name}"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer, "_kernel", kernel)
        yield


class World:
    """Ranks of one process. Each shows what it has first, and gives up; then all have shown it, and each is right."""

    def __init__(self, ranks: int) -> None:
        self.memory = [torch.zeros(peer._bytes(), dtype=torch.uint8) for _ in range(ranks)]
        places = [each.data_ptr() for each in self.memory]
        self.ranks = [peer.Peers(rank, places, CPU, 0) for rank in range(ranks)]

    def made(self, name: str, given: list[torch.Tensor]) -> list[torch.Tensor]:
        """What each rank makes of theirs."""
        return self.made_by([partial(getattr(rank, name), x) for rank, x in zip(self.ranks, given, strict=True)])

    def made_by(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """The same, of a call of each rank."""
        counts = [each._count.clone() for each in self.ranks]
        for call in calls:
            call()
        for rank, count in zip(self.ranks, counts, strict=True):
            rank._count.copy_(count)
            rank._failed.zero_()
        made = [call() for call in calls]
        assert not any(rank.failed for rank in self.ranks)
        return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_sums(ranks: int, dtype: torch.dtype) -> None:
    """Of one block and many, a size after the other on the same boards: float32 sums in the order of ranks."""
    world = World(ranks)
    for count in (8, 5120, 8, 1000, peer.MOST_BYTES // dtype.itemsize, 1032):
        generator = torch.Generator().manual_seed(count)
        given = [torch.randn(1, 1, count, generator=generator).to(dtype) for _ in range(ranks)]
        total = given[0].float()
        for each in given[1:]:
            total = total + each.float()
        for made in world.made("sum", given):
            assert made.shape == total.shape
            assert torch.equal(made, total.to(dtype))


@pytest.mark.parametrize("ranks", [2, 5])
def test_gathers(ranks: int) -> None:
    """Of any dtype, a single number among them; sizes that are no multiple of 16."""
    world = World(ranks)
    for x in (torch.tensor(5), torch.arange(1001.0), torch.arange(4096).to(torch.bfloat16).view(2, 2048)):
        given = [x + rank for rank in range(ranks)]
        for made in world.made("gather", given):
            assert torch.equal(made, torch.stack(given))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 3072, token.WIDEST_NORM])
def test_norms_of_sums(width: int, dtype: torch.dtype) -> None:
    """The bits of a sum and a norm after it, several times on the same board."""
    world = World(3)
    for turn in range(3):
        generator = torch.Generator().manual_seed(turn)
        x, weight, *given = (torch.randn(1, 1, width, generator=generator).to(dtype) for _ in range(5))
        added = (given[0].float() + given[1].float() + given[2].float()).to(dtype)
        calls = [
            partial(rank.sum_add_norm, x, y, weight.view(-1), 1e-5) for rank, y in zip(world.ranks, given, strict=True)
        ]
        expected = token_reference.add_norm(x, added, weight.view(-1), 1e-5)
        for total, normed in world.made_by(calls):
            assert torch.equal(total, expected[0])
            assert float((normed.double() - expected[1].double()).abs().max()) <= 8 * torch.finfo(dtype).eps


def test_a_rank_that_does_not_come() -> None:
    """The others give up, say so, and do not wait again."""
    world = World(2)
    rank, x = world.ranks[0], torch.ones(4)
    rank.patience = 1e-6  # a thousand looks at this clock
    rank.sum(x)
    assert rank.failed
    assert int(rank._count[peer.BOARDS + 1]) == 1
    rank.patience = 1e9  # would never end
    rank.sum(x)
    assert rank._count[:2].tolist() == [2, 0]


@pytest.mark.parametrize(
    ("name", "x"),
    [
        ("sum", torch.ones(3)),
        ("sum", torch.ones(4, dtype=torch.float64)),
        ("sum", torch.ones(peer.MOST_BYTES // 4 + 4)),
        ("sum", torch.ones(0)),
        ("gather", torch.ones(5, dtype=torch.uint8)),
        ("gather", torch.ones(peer.MOST_BYTES // 4 + 1)),
        ("sum", torch.ones(9)[1:]),
    ],
)
def test_what_cannot_be_shown(name: str, x: torch.Tensor) -> None:
    """Other dtypes, sizes and addresses are refused; nothing runs."""
    world = World(2)
    with pytest.raises(CommError, match="ranks cannot show this to each other"):
        getattr(world.ranks[0], name)(x)
    assert not world.memory[0].any()


def test_ranks_of_several_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them learn that they cannot see each other, whoever finds it out; none is left waiting."""
    asked: list[bytes] = []

    def exchange(data: bytes) -> list[bytes]:
        asked.append(data)
        return [data, bytes(driver.HANDLE) + b"another"] if len(asked) == 1 else [data, b"1"]

    monkeypatch.setattr(driver, "shared_memory", lambda *_: (16, bytes(driver.HANDLE)))
    monkeypatch.setattr(peer, "start_of_machine", lambda: b"this")
    assert peer.Peers.of(0, 2, CPU, 1.0, exchange) is None
    assert asked == [bytes(driver.HANDLE) + b"this", b""]
