"""Layers and experts of a checkpoint: every source on 1 to 4 ranks is the product with the slice of its numbers."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import uqff
from tests.checkpoints.test_bitsandbytes import CONFIG as BITSANDBYTES
from tests.checkpoints.test_bitsandbytes import GOLDEN
from tests.checkpoints.test_bitsandbytes import stored as golden
from tests.parallel.ranks import rank_of, run_ranks
from tests.parallel.sources import MATRICES, doubled, fp8_blocks, gpt_oss, mlx, mxfp4, ternary
from tests.support.checkpoints import checkpoint_of, write_checkpoint
from uqff import MissingError, ShapeError, ShardError, UnsupportedError, UqffError, open_checkpoint
from uqff.checkpoints import Checkpoint
from uqff.checkpoints.scaled_fp8 import ScaledFP8
from uqff.checkpoints.separate import SeparateExperts
from uqff.parallel import (
    ColumnParallelLayer,
    Comm,
    DummyLayer,
    FusedExperts,
    ImmediateIsq,
    IsqPool,
    PackedExperts,
    PendingLayer,
    ReplicatedLayer,
    RowParallelLayer,
    Shard,
)
from uqff.parallel.checkpoint_layers import PlainExpertsWarning
from uqff.parallel.weight import _read_spec, to_spec

OUT, INPUTS = 24, 384
SIZES: dict[str, Any] = {"in_dim": INPUTS, "out_dim": OUT, "bias": True}
WEIGHT, BIAS, X = ternary(OUT, INPUTS), torch.arange(24.0), ternary(5, INPUTS, seed=1)
PATH = "model.layers.0.mlp.up_proj"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stored(folder: Path, source: str) -> Checkpoint:
    """A checkpoint of one layer with a bias."""
    tensors, config = MATRICES[source](PATH, WEIGHT)
    return checkpoint_of(folder, tensors | {f"{PATH}.bias": BIAS}, **config)


ANYWHERE = ("plain", "fp8", "hqq", "hqq-columns", "compressed-fp8", "compressed-fp8-rows", "int8")
"""Sources whose inputs can be cut at any place."""


@pytest.mark.parametrize("source", MATRICES)
def test_every_source_and_layer(tmp_path: Path, source: str) -> None:
    """Row-, column-parallel, replicated and merged layers, 1 to 4 ranks, exactly; what cannot be cut says why."""
    dense = X @ WEIGHT.T
    with stored(tmp_path, source) as checkpoint:
        assert torch.equal(checkpoint.layer(PATH).weight.dequantize(), WEIGHT)
        for world_size in (1, 2, 3, 4):
            partials, columns, chunks = [], [], []
            for rank in range(world_size):
                comm = rank_of(rank, world_size)
                whole: Any = ReplicatedLayer.from_checkpoint(checkpoint, PATH, comm, **SIZES)
                assert torch.equal(whole(X), dense + BIAS)
                row: Any = RowParallelLayer.from_checkpoint(checkpoint, PATH, comm, **SIZES)
                width = INPUTS // world_size
                held = slice(rank * width, (rank + 1) * width)
                assert torch.equal(row.dequantize_w(), WEIGHT[:, held])
                partials.append(row.forward_partial(X[:, held]))
                assert torch.equal(row.bias, BIAS)
                column: Any = ColumnParallelLayer.from_checkpoint(checkpoint, PATH, comm, **SIZES)
                assert torch.equal(column.dequantize_w(), WEIGHT.chunk(world_size)[rank])
                columns.append(column(X))
                if world_size < 4:
                    both = ColumnParallelLayer.merged_from_checkpoint(checkpoint, PATH, comm, **SIZES, chunks=2)
                    chunks.append([each(X) for each in both])
            assert torch.equal(sum(partials, BIAS), dense + BIAS)
            assert torch.equal(torch.cat(columns, 1), dense + BIAS)
            if world_size < 4:
                merged = torch.cat([torch.cat(each, 1) for each in zip(*chunks, strict=True)], 1)
                assert torch.equal(merged, dense + BIAS)
        odd = Shard.offset(1, 7, 13)
        if source in ANYWHERE:
            some: Any = RowParallelLayer.from_checkpoint(checkpoint, PATH, **SIZES, shard=odd)
            assert torch.equal(some.dequantize_w(), WEIGHT[:, 7:20])
        else:
            with pytest.raises(ShardError, match=r"slice cannot be cut exactly.*model.layers.0.mlp.up_proj"):
                RowParallelLayer.from_checkpoint(checkpoint, PATH, **SIZES, shard=odd)


@pytest.mark.parametrize("chunks", [[12, 11], [24, 0], [-1, 25], [], 0, 5])
def test_chunks_that_are_none(tmp_path: Path, chunks: int | list[int]) -> None:
    """One rule for weights that are there and for those of a checkpoint."""
    with pytest.raises(ShardError) as told:
        ColumnParallelLayer.new_merged(WEIGHT, chunks=chunks, key=PATH)
    with stored(tmp_path, "plain") as checkpoint, pytest.raises(ShardError) as likewise:
        ColumnParallelLayer.merged_from_checkpoint(checkpoint, PATH, **SIZES, chunks=chunks)
    assert str(likewise.value) == str(told.value)


@pytest.mark.parametrize("case", ["nf4", "nf4-nested", "int8"])
def test_bitsandbytes(tmp_path: Path, case: str) -> None:
    """What the library stored: each rank's slice has its numbers, where one can be cut; else the error says so."""
    numbers = GOLDEN[f"{case}.numbers"]
    out, inputs = numbers.shape
    sizes: dict[str, Any] = {"in_dim": inputs, "out_dim": out, "bias": False}
    with checkpoint_of(tmp_path, golden(case), **BITSANDBYTES) as checkpoint:
        meta, cut = checkpoint.meta("a").weight, 0
        for world_size in (1, 2, 4):
            for rank in range(world_size):
                for dim, cls in ((0, ColumnParallelLayer), (1, RowParallelLayer)):
                    comm = rank_of(rank, world_size)
                    length = numbers.shape[dim] // world_size
                    if numbers.shape[dim] % world_size or not (
                        world_size == 1 or meta.can_narrow(dim, rank * length, length)
                    ):
                        with pytest.raises(ShardError, match="world sizes that work are"):
                            cls.from_checkpoint(checkpoint, "a", comm, **sizes)
                        continue
                    layer: Any = cls.from_checkpoint(checkpoint, "a", comm, **sizes)
                    assert torch.equal(layer.dequantize_w(), numbers.narrow(dim, rank * length, length))
                    cut += world_size > 1
        assert cut >= 2


def test_rules_of_the_engine(tmp_path: Path) -> None:
    """Dummies, biases that are not asked for or not there, matformer, shapes."""
    tensors = {
        "a.weight": WEIGHT,
        "a.bias": BIAS,
        "b.weight": WEIGHT.clone(),
        "c.qweight": torch.ones(2, dtype=torch.int32),
    }
    with checkpoint_of(tmp_path / "plain", tensors) as checkpoint:
        for cls in (RowParallelLayer, ColumnParallelLayer, ReplicatedLayer):
            assert isinstance(cls.from_checkpoint(checkpoint, "absent", **SIZES), DummyLayer)
            bare: Any = cls.from_checkpoint(checkpoint, "a", in_dim=INPUTS, out_dim=OUT, bias=False)
            assert bare.bias is None
            with pytest.raises(ShapeError, match=r"expected \[23, 384\], got \[24, 384\]"):
                cls.from_checkpoint(checkpoint, "a", in_dim=INPUTS, out_dim=23, bias=False)
            with pytest.raises(MissingError, match=r"a quantization_config that tells what c.qweight are"):
                cls.from_checkpoint(checkpoint, "c", **SIZES)
        assert RowParallelLayer.from_checkpoint(checkpoint, "b", **SIZES).bias is None
        with pytest.raises(MissingError, match=r"layer has no bias.*expected b.bias"):
            ReplicatedLayer.from_checkpoint(checkpoint, "b", **SIZES)
        comm = rank_of(1, 2)
        column: Any = ColumnParallelLayer.matformer_from_checkpoint(
            checkpoint, "b", comm, in_dim=INPUTS, out_dim=8, orig_out_dim=OUT, bias=False
        )
        assert torch.equal(column.dequantize_w(), WEIGHT[4:8])
        row: Any = RowParallelLayer.matformer_from_checkpoint(
            checkpoint, "a", comm, in_dim=64, orig_in_dim=INPUTS, out_dim=OUT, bias=True
        )
        assert torch.equal(row.dequantize_w(), WEIGHT[:, 32:64])
        assert torch.equal(row.bias, BIAS)
        kept: dict[str, Any] = {"in_dim": INPUTS, "out_dim": OUT, "bias": True, "orig_num_hidden_layers": 6}
        some: Any = ReplicatedLayer.matformer_from_checkpoint(checkpoint, "a", **kept, kept_layers_indices=[2, 0])
        assert torch.equal(some.dequantize_w(), torch.cat([WEIGHT[8:12], WEIGHT[:4]]))
        assert torch.equal(some.bias, torch.cat([BIAS[8:12], BIAS[:4]]))
    with stored(tmp_path / "mlx", "mlx") as checkpoint:
        sizes: dict[str, Any] = {"in_dim": INPUTS, "out_dim": 8, "orig_out_dim": OUT, "bias": False}
        with pytest.raises(UnsupportedError, match="a matformer layer of a checkpoint that is quantised"):
            ColumnParallelLayer.matformer_from_checkpoint(checkpoint, PATH, **sizes)
        with pytest.raises(UnsupportedError, match="a matformer layer of a checkpoint that is quantised"):
            ReplicatedLayer.matformer_from_checkpoint(checkpoint, PATH, **kept, kept_layers_indices=[0])
        whole: Any = ReplicatedLayer.matformer_from_checkpoint(checkpoint, PATH, **kept, kept_layers_indices=None)
        assert torch.equal(whole.dequantize_w(), WEIGHT)


def test_quantised_while_it_is_made(tmp_path: Path) -> None:
    """A type for the layer; rules; threads, which give a pending layer. Also of what is quantised already."""
    with stored(tmp_path, "fp8-block") as checkpoint, IsqPool(2) as pool:
        comm = rank_of(1, 2)
        made: Any = RowParallelLayer.from_checkpoint(checkpoint, PATH, comm, **SIZES, isq="q8_0")
        expected: Any = ReplicatedLayer.from_checkpoint(checkpoint, PATH, **SIZES, isq="q8_0")
        assert (made.weight.kind, made.weight) == ("q8_0", expected.weight.narrow(1, 192, 192))
        isq = ImmediateIsq("q8_0", predicates=["up_proj"], pool=pool)
        pending: Any = RowParallelLayer.from_checkpoint(checkpoint, PATH, comm, **SIZES, isq=isq)
        assert isinstance(pending, PendingLayer)
        assert pending.weight == made.weight
        other = ImmediateIsq("q8_0", predicates=["down_proj"], pool=pool)
        kept: Any = RowParallelLayer.from_checkpoint(checkpoint, PATH, comm, **SIZES, isq=other)
        assert kept.weight.kind == "fp8-block"


E, HIDDEN, INTER = 3, 32, 384
EXPERTS = "model.layers.0.mlp.experts"
GATE, UP, DOWN = ternary(E, INTER, HIDDEN, seed=2), ternary(E, INTER, HIDDEN, seed=3), ternary(E, HIDDEN, INTER, seed=4)
WHOLE = {"gate_proj": GATE, "up_proj": UP, "down_proj": DOWN}
TOKENS, INDICES = ternary(4, HIDDEN, seed=5), torch.tensor([[0, 2], [2, 1], [1, 1], [0, 1]])
WEIGHTS = torch.tensor([[0.5, 0.25], [1.0, 2.0], [1.0, 0.5], [0.25, 0.25]])


def experts_in(form: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The experts in one of the forms that they have."""
    how, _, where = form.partition(" ")
    encode = {"plain": None, "fp8": fp8_blocks, "mlx": mlx, "mxfp4": mxfp4, "gpt-oss": gpt_oss}[how]
    tensors: dict[str, torch.Tensor] = {}
    config: dict[str, Any] = {}
    if where == "single":
        for name, stack in WHOLE.items():
            for at, weight in enumerate(stack):
                made, config = (encode or MATRICES["plain"])(f"{EXPERTS}.{at}.{name}", weight)
                tensors |= made
        return tensors, config
    if where in ("stacks", "switch_mlp"):
        place = EXPERTS if where == "stacks" else EXPERTS.replace("experts", "switch_mlp")
        for name, stack in WHOLE.items():
            made, config = (encode or MATRICES["plain"])(f"{place}.{name}", stack)
            tensors |= made
        return tensors, config
    both = {"gate_up_proj": torch.cat([GATE, UP], 1), "down_proj": DOWN}
    if where == "turns":
        both["gate_up_proj"] = torch.stack([GATE, UP], 2).flatten(1, 2)
    if where == "inputs":
        both = {name: each.transpose(1, 2) for name, each in both.items()}
    for name, each in both.items():
        path = f"{EXPERTS}.{name}"
        if encode is None:
            made = {path: each}
        elif encode is fp8_blocks:
            scale = "{}.weight_scale_inv" if where == "inputs" else "{}_scale_inv"  # the engine's, transformers'
            made, config = fp8_blocks(path, each, name="{}", scale=scale)
        else:
            made, config = encode(path, each)
        tensors |= made
    return tensors, config


FORMS = (
    "plain single",
    "plain outputs",
    "plain inputs",
    "fp8 single",
    "fp8 outputs",
    "fp8 inputs",
    "mlx switch_mlp",
    "mlx single",
    "mxfp4 stacks",
    "gpt-oss turns",
)


class Adding(Comm):
    """A rank whose terms the test adds up."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size

    def sum_all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x


def mixture(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weighted sum of the experts of each token, each by a plain product."""
    y = torch.zeros(len(TOKENS), HIDDEN)
    for token, (experts, of_experts) in enumerate(zip(INDICES.tolist(), WEIGHTS, strict=True)):
        for expert, weight in zip(experts, of_experts, strict=True):
            gate, up = (weights[name][expert] @ TOKENS[token] for name in ("gate_proj", "up_proj"))
            y[token] += weight * (weights["down_proj"][expert] @ (gate.relu() * up))
    return y


SHAPE: dict[str, Any] = {"num_experts": E, "hidden": HIDDEN, "inter": INTER, "act": torch.relu}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_experts(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused and packed experts on 1 to 4 ranks, exactly; no dense copy of all experts of FP8 is ever made."""
    expected = mixture(WHOLE)
    made_dense: list[tuple[int, ...]] = []
    values = ScaledFP8.values

    def noted(weight: ScaledFP8) -> Any:
        made_dense.append(weight.shape)
        return values(weight)

    monkeypatch.setattr(ScaledFP8, "values", noted)
    tensors, config = experts_in(form)
    with checkpoint_of(tmp_path, tensors, **config) as checkpoint:
        for world_size in (1, 2, 3, 4):
            for cls in (FusedExperts, PackedExperts):
                total = torch.zeros(len(TOKENS), HIDDEN)
                for rank in range(world_size):
                    experts: Any = cls.from_checkpoint(checkpoint, EXPERTS, Adding(rank, world_size), **SHAPE)
                    total += experts(TOKENS, INDICES, WEIGHTS)
                    part = INTER // world_size
                    held = slice(rank * part, (rank + 1) * part)
                    up = experts.up_proj
                    first = up[0].weight if cls is PackedExperts else up.weight.narrow(0, 0, 1)
                    assert torch.equal(first.dequantize().view(part, HIDDEN), UP[0, held])
                assert torch.equal(total, expected), (cls, world_size)
    assert all(len(shape) == 2 or shape[0] == 1 for shape in made_dense)


def single_experts(source: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Experts one by one, the second twice WHOLE, by its scales; ``mixed``: the last one is plain, others are FP8."""
    tensors: dict[str, torch.Tensor] = {}
    config: dict[str, Any] = {}
    for name, stack in WHOLE.items():
        for at, weight in enumerate(stack):
            how = source if source != "mixed" else "plain" if at == 2 else "fp8"
            made, said = MATRICES[how](f"{EXPERTS}.{at}.{name}", weight)
            tensors |= doubled(made) if at == 1 else made
            config = said or config
    return tensors, config


SINGLE = {name: stack * torch.tensor([1.0, 2, 1]).view(3, 1, 1) for name, stack in WHOLE.items()}


@pytest.mark.parametrize("source", [*MATRICES, "mixed"])
def test_every_source_of_experts(tmp_path: Path, source: str) -> None:
    """Experts one by one, each with scales of its own: packed and fused, on 1 to 4 ranks, exactly.

    Where they make no stack of their type, they are fused side by side: nothing is lost, or copied.
    """
    expected = mixture(SINGLE)
    tensors, config = single_experts(source)
    with checkpoint_of(tmp_path, tensors, **config) as checkpoint:
        for world_size in (1, 2, 3, 4):
            for cls in (PackedExperts, FusedExperts):
                total = torch.zeros(len(TOKENS), HIDDEN)
                part = INTER // world_size
                for rank in range(world_size):
                    made: Any = cls.from_checkpoint(checkpoint, EXPERTS, Adding(rank, world_size), **SHAPE)
                    total += made(TOKENS, INDICES, WEIGHTS)
                    down = made.down_proj
                    held = down[1].weight if cls is PackedExperts else down.weight.narrow(0, 1, 1).unstack()[0]
                    assert torch.equal(held.dequantize(), SINGLE["down_proj"][1].narrow(1, rank * part, part))
                    if cls is FusedExperts:
                        apart = isinstance(down.weight, SeparateExperts)
                        assert apart == (source in ("fp8", "compressed-fp8", "hqq-columns", "mixed"))
                        assert apart or down.weight.kind == checkpoint.meta(f"{EXPERTS}.1.down_proj").weight.kind
                assert torch.equal(total, expected), (cls, world_size)


def test_experts_side_by_side(tmp_path: Path) -> None:
    """Of one scale for all they are a stack of their type; of several they are a record as any other, but a form."""
    alike: dict[str, Any] = {}
    for name, stack in WHOLE.items():
        for at, weight in enumerate(stack):
            alike |= MATRICES["fp8"](f"{EXPERTS}.{at}.{name}", weight)[0]
    with checkpoint_of(tmp_path / "alike", alike, quant_method="fp8") as checkpoint:
        one: Any = FusedExperts.from_checkpoint(checkpoint, EXPERTS, **SHAPE)
        assert one.up_proj.weight.kind == "fp8"
    tensors, config = single_experts("mixed")
    with checkpoint_of(tmp_path / "mixed", tensors, **config) as checkpoint:
        made: Any = FusedExperts.from_checkpoint(checkpoint, EXPERTS, **SHAPE)
    record = made.up_proj.weight
    assert isinstance(record, SeparateExperts)
    assert (record.kind, record.shape, record.alignment(0)) == ("separate-experts", (E, INTER, HIDDEN), 1)
    again = _read_spec(to_spec(record.meta()))
    assert (again.shape, to_spec(again)) == (record.shape, to_spec(record.meta()))
    assert pickle.loads(pickle.dumps(record)) == record != made.gate_proj.weight
    assert [each.kind for each in record.unstack()] == ["fp8", "fp8", "unquant"]
    for dim in (0, 1, 2):
        size = record.shape[dim]
        cuts = [(start, record.narrow(dim, start, length)) for start, length in ((0, 1), (1, size - 1))]
        assert record.meta().join(cuts, dim) == record
    for take, piece in record.tiles():
        assert torch.equal(piece.dequantize(), take(SINGLE["up_proj"]))
    with pytest.raises(UnsupportedError, match="experts that do not stack exactly has no form in UQFF"):
        uqff.serialize(uqff.Layer(record))
    with pytest.raises(ShardError, match="weights do not stack: expected matrices of one shape"):
        SeparateExperts.of([record.unstack()[0], record.unstack()[0].narrow(0, 0, 1)])


def test_biases_of_experts(tmp_path: Path) -> None:
    """gpt-oss': of gate and up in turns, of down added once; packed experts take none."""
    tensors, config = experts_in("gpt-oss turns")
    gate, up, down = ternary(E, INTER, seed=7), ternary(E, INTER, seed=8), ternary(E, HIDDEN, seed=9)
    tensors[f"{EXPERTS}.gate_up_proj_bias"] = torch.stack([gate, up], 2).flatten(1)
    tensors[f"{EXPERTS}.down_proj_bias"] = down
    with checkpoint_of(tmp_path, tensors, **config) as checkpoint:
        for world_size in (1, 2, 3):
            for rank in range(world_size):
                made: Any = FusedExperts.from_checkpoint(
                    checkpoint, EXPERTS, rank_of(rank, world_size), **SHAPE, bias=True
                )
                assert torch.equal(made.gate_proj.bias, gate.chunk(world_size, 1)[rank])
                assert torch.equal(made.up_proj.bias, up.chunk(world_size, 1)[rank])
                assert torch.equal(made.down_proj.bias, down)
        with pytest.raises(UnsupportedError, match="PackedExperts take no bias"):
            PackedExperts.from_checkpoint(checkpoint, EXPERTS, **SHAPE, bias=True)


def test_experts_that_are_not_what_they_should_be(tmp_path: Path) -> None:
    """Dummies; FP8 without scales, plain in truth, or not; other sizes; types that cannot be turned."""
    tensors, _ = experts_in("plain outputs")
    fp8 = {"quant_method": "fp8", "weight_block_size": [2, 32]}
    with checkpoint_of(tmp_path / "plain", tensors, **fp8) as checkpoint:
        for cls in (FusedExperts, PackedExperts):
            assert isinstance(cls.from_checkpoint(checkpoint, "model.layers.1.mlp.experts", **SHAPE), DummyLayer)
            with pytest.warns(PlainExpertsWarning, match="the configuration says FP8") as told:
                made: Any = cls.from_checkpoint(checkpoint, EXPERTS, **SHAPE)
            assert len(told) == 1
            assert torch.equal(made(TOKENS, INDICES, WEIGHTS), mixture(WHOLE))
    ignored = fp8 | {"modules_to_not_convert": [EXPERTS]}
    with checkpoint_of(tmp_path / "ignored", tensors, **ignored) as checkpoint, warnings.catch_warnings():
        warnings.simplefilter("error")
        FusedExperts.from_checkpoint(checkpoint, EXPERTS, **SHAPE)
        with pytest.raises(ShapeError, match=r"expected \[3, 384, 31\], got \[3, 384, 32\]"):
            FusedExperts.from_checkpoint(checkpoint, EXPERTS, **SHAPE | {"hidden": 31})
    codes = {name: each.to(torch.float8_e4m3fn) for name, each in tensors.items()}
    with checkpoint_of(tmp_path / "codes", codes, **fp8) as checkpoint, pytest.raises(MissingError, match="companion"):
        FusedExperts.from_checkpoint(checkpoint, EXPERTS, **SHAPE)
    turned = {
        f"{EXPERTS}.gate_up_proj": torch.cat([GATE, UP], 1).transpose(1, 2),
        f"{EXPERTS}.down_proj": DOWN.transpose(1, 2),
    }
    made_of: dict[str, Any] = {}
    for path, each in turned.items():
        made_of |= mlx(path, each)[0]
    opened = checkpoint_of(tmp_path / "turned", made_of, bits=4, group_size=32)
    with opened, pytest.raises(UnsupportedError, match="afq4 weights cannot be transposed"):
        FusedExperts.from_checkpoint(opened, EXPERTS, **SHAPE)


def test_experts_are_quantised_while_they_are_made(tmp_path: Path) -> None:
    """Of each form, by threads or not; the slices of the whole."""
    tensors, config = experts_in("fp8 inputs")
    with checkpoint_of(tmp_path, tensors, **config) as checkpoint, IsqPool(2) as pool:
        whole: Any = FusedExperts.from_checkpoint(checkpoint, EXPERTS, **SHAPE, isq="q8_0")
        isq = ImmediateIsq("q8_0", pool=pool)
        for rank in range(2):
            made: Any = FusedExperts.from_checkpoint(checkpoint, EXPERTS, rank_of(rank, 2), **SHAPE, isq=isq)
            assert made.down_proj.weight == whole.down_proj.weight.narrow(2, rank * 192, 192)
            assert made.up_proj.weight.kind == "q8_0"


def on_ranks(comm: Comm, directory: Path) -> bool:
    """Products on ranks that are there."""
    with open_checkpoint(directory) as checkpoint:
        for source in MATRICES:
            path = f"{source}.up_proj"
            if path not in checkpoint.paths:
                continue
            row: Any = RowParallelLayer.from_checkpoint(checkpoint, path, comm, **SIZES)
            held = INPUTS // comm.world_size
            assert torch.equal(row(X[:, comm.rank * held :][:, :held]), X @ WEIGHT.T + BIAS)
            made: Any = RowParallelLayer.from_checkpoint(checkpoint, path, comm, **SIZES, isq="q8_0")
            whole: Any = ReplicatedLayer.from_checkpoint(checkpoint, path, **SIZES, isq="q8_0")
            assert made.gather_layer().weight == whole.weight
            column: Any = ColumnParallelLayer.from_checkpoint(checkpoint, path, comm, **SIZES)
            assert torch.equal(comm.gather_last(column(X)), X @ WEIGHT.T + BIAS)
        if EXPERTS in checkpoint.prefixes:
            experts: Any = PackedExperts.from_checkpoint(checkpoint, EXPERTS, comm, **SHAPE)
            assert torch.equal(experts(TOKENS, INDICES, WEIGHTS), mixture(WHOLE))
    return True


def test_ranks_that_are_there(tmp_path: Path) -> None:
    """Two processes: sums and gathers are the dense product, too."""
    tensors, config = experts_in("fp8 inputs")
    layer, _ = MATRICES["fp8-block"]("fp8-block.up_proj", WEIGHT)
    write_checkpoint(tmp_path, tensors | layer | {"fp8-block.up_proj.bias": BIAS}, quantization_config=config)
    assert run_ranks(2, on_ranks, tmp_path) == [True, True]


def test_a_missing_companion_is_not_a_dummy(tmp_path: Path) -> None:
    """Something is there: that it is not enough is an error, not a layer without a weight."""
    tensors, config = MATRICES["fp8"](PATH, WEIGHT)
    tensors.pop(f"{PATH}.weight_scale")
    with checkpoint_of(tmp_path, tensors, **config) as checkpoint, pytest.raises(UqffError, match="companion"):
        RowParallelLayer.from_checkpoint(checkpoint, PATH, **SIZES)
