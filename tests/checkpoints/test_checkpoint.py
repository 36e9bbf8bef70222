"""Checkpoints as layers: the mapping, prefixes, slices, what is refused; and records that UQFF has no form for."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import uqff
from tests.support.checkpoints import checkpoint_of, write_checkpoint
from uqff import FormatError, MissingError, Shard, ShardError, UnsupportedError
from uqff.checkpoints.checkpoint import CheckpointView
from uqff.checkpoints.method import is_ignored
from uqff.checkpoints.methods import FOREIGN, METHODS
from uqff.checkpoints.scaled_fp8 import ScaledFP8
from uqff.families import FAMILIES, stack
from uqff.parallel import weight as parallel_weight

WEIGHT = torch.arange(24, dtype=torch.float32).view(4, 6)
PLAIN = {
    "model.layers.0.self_attn.q_proj.weight": WEIGHT,
    "model.layers.0.self_attn.q_proj.bias": torch.arange(4, dtype=torch.bfloat16),
    "model.layers.0.input_layernorm.weight": torch.ones(6, dtype=torch.bfloat16),
    "model.layers.1.self_attn.q_proj.weight": WEIGHT + 1,
    "model.layers.1.mlp.experts.down_proj": torch.ones(2, 4, 6),
    "model.layers.1.mlp.experts.down_proj_bias": torch.ones(2, 4),
    "model.step": torch.tensor(3),
}
Q0 = "model.layers.0.self_attn.q_proj"


def test_a_plain_checkpoint_is_a_mapping_of_layers(tmp_path: Path) -> None:
    with checkpoint_of(tmp_path, PLAIN) as checkpoint:
        assert sorted(checkpoint) == [
            "model.layers.0.input_layernorm",
            Q0,
            "model.layers.1.mlp.experts.down_proj",
            "model.layers.1.self_attn.q_proj",
        ]
        assert (len(checkpoint), Q0 in checkpoint, f"{Q0}.weight" in checkpoint) == (4, True, False)
        assert (checkpoint.shape(Q0), checkpoint.dtype(Q0), checkpoint.kind(Q0)) == ((4, 6), "F32", "unquant")
        assert not checkpoint.is_quantised
        weight, bias = checkpoint.layer(Q0)
        assert torch.equal(weight.dequantize(), WEIGHT)
        assert torch.equal(bias, PLAIN[f"{Q0}.bias"])
        assert torch.equal(checkpoint.tensors["model.step"], torch.tensor(3))
        assert checkpoint.layer("model.layers.0.input_layernorm").weight.shape == (6,)
        stacked = checkpoint.layer("model.layers.1.mlp.experts.down_proj").bias_part
        assert stacked is not None
        assert stacked.shape == (2, 4)
    assert torch.equal(weight.dequantize(), WEIGHT)


def test_prefixes_are_checkpoints_of_what_lies_under_them(tmp_path: Path) -> None:
    with checkpoint_of(tmp_path, PLAIN) as checkpoint:
        view = checkpoint["model.layers.0"]
        assert isinstance(view, CheckpointView)
        assert sorted(view) == ["input_layernorm", "self_attn.q_proj"]
        assert ("self_attn" in view, "self_attn.q_proj" in view, "q_proj" in view, "mlp" in view) == (
            (True, True, False, False)
        )
        assert (view.shape("self_attn.q_proj"), view.kind("self_attn.q_proj")) == ((4, 6), "unquant")
        inner = view["self_attn"]
        assert isinstance(inner, CheckpointView)
        assert view["self_attn.q_proj"] == inner["q_proj"] == checkpoint[Q0] == checkpoint.layer(Q0)
        assert view.layer("self_attn.q_proj", Shard.simple(0, 1, 2)).weight.shape == (2, 6)


@pytest.mark.parametrize("shard", [Shard.simple(0, 1, 2), Shard.offset(1, 2, 3), Shard.whole()])
def test_slices(tmp_path: Path, shard: Shard) -> None:
    """As those of a layer that was taken out whole; the bias of a slice of the inputs is whole."""
    with checkpoint_of(tmp_path, PLAIN) as checkpoint:
        assert checkpoint.layer(Q0, shard) == shard.apply_to(checkpoint.layer(Q0))
        with pytest.raises(ShardError, match=r"divisible by the world size.*layer model.layers.0.self_attn.q_proj"):
            checkpoint.layer(Q0, Shard.simple(0, 0, 3))


def test_a_missing_name_lists_near_ones(tmp_path: Path) -> None:
    with checkpoint_of(tmp_path, PLAIN) as checkpoint:
        with pytest.raises(MissingError, match=r"no such layer: expected near names: .*0\.self_attn\.q_proj"):
            checkpoint["model.layers.0.self_attn.qproj"]
        with pytest.raises(MissingError, match="expected one of 4 layers"):
            checkpoint.layer("zzz")
        view = checkpoint["model.layers.0"]
        assert isinstance(view, CheckpointView)
        with pytest.raises(KeyError):
            view.shape("self_attn.k_proj")


def test_codes_are_never_taken_for_weights(tmp_path: Path) -> None:
    """Codes whose method the configuration does not name: refused, and the tensors that are there are named."""
    tensors = {"a.qweight": torch.ones(4, 4, dtype=torch.int32), "b.weight": torch.ones(4, 4, dtype=torch.int8)}
    with checkpoint_of(tmp_path, tensors) as checkpoint:
        with pytest.raises(MissingError, match=r"a quantization_config that tells what a\.qweight are"):
            checkpoint["a"]
        with pytest.raises(UnsupportedError, match=r"codes without a method.*got I8 .*model\.safetensors.*b\.weight"):
            checkpoint["b"]


def test_methods_that_are_not_known_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"expected one of .*fp8.*, got vptq .*quantization_config.quant_method"):
        checkpoint_of(tmp_path, PLAIN, quant_method="vptq")
    with pytest.raises(UnsupportedError, match=r"no method of quantising named.*config\.json"):
        checkpoint_of(tmp_path, PLAIN, bits=4)
    with pytest.raises(FormatError, match=r"not an object: got 4 .*config\.json"):
        uqff.open_checkpoint(write_checkpoint(tmp_path, PLAIN, quantization_config=4))


def test_opening_needs_no_torch(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, PLAIN)
    code = (
        "import sys, uqff; c = uqff.open_checkpoint(sys.argv[1]); "
        f"c.kind({Q0!r}); c[{Q0!r}]; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# Foreign records
# ---------------------------------------------------------------------------------------------------------------------


def foreign(rows: int = 4, columns: int = 6) -> ScaledFP8:
    """Three by two blocks, the last ones smaller."""
    codes = torch.arange(rows * columns, dtype=torch.uint8).view(rows, columns).view(torch.float8_e4m3fn)
    scales = torch.arange(1, 1 + -(-rows // 2) * -(-columns // 4), dtype=torch.float32)
    return ScaledFP8(codes, scales.view(-(-rows // 2), -1), 2, 4)


def test_foreign_records_cannot_be_written() -> None:
    """Every way to write one says so, and what to do."""
    record = foreign()
    for write in (
        lambda: uqff.serialize(record),
        lambda: record.to_entries(),
        lambda: record.family,
        lambda: ScaledFP8.parse({}),
        lambda: ScaledFP8.planned("fp8-block", (2, 2), uqff.DType.F32),
    ):
        with pytest.raises(UnsupportedError, match=r"has no form in UQFF: expected a weight quantised.*--isq"):
            write()


def test_foreign_records_cannot_be_saved(tmp_path: Path) -> None:
    for key in ("0", "model.layer"):
        with pytest.raises(UnsupportedError, match="has no form in UQFF"):
            uqff.save({key: foreign()}, tmp_path / "model.uqff")
    assert list(tmp_path.iterdir()) == []


def test_foreign_records_have_the_verbs_of_a_family(tmp_path: Path) -> None:
    record = foreign(5, 6)
    whole = record.dequantize()
    by_hand = record.weight.float() * record.scales.repeat_interleave(2, 0)[:5].repeat_interleave(4, 1)[:, :6]
    assert torch.equal(whole, by_hand)
    assert torch.equal(record.dequantize(torch.bfloat16), by_hand.bfloat16())
    assert record.numbers().tensor().equal(by_hand)
    assert record.numbers(uqff.DType.F16).tensor().equal(by_hand.half())
    assert (record.kind, record.shape, record.nbytes, record.device.type) == ("fp8-block", (5, 6), 30 + 24, "cpu")
    assert "ScaledFP8 fp8-block [5, 6], 54 bytes" in repr(record)
    slices = [(0, record.narrow(0, 0, 2)), (2, record.narrow(0, 2, 3))]
    assert all(part.dequantize().equal(by_hand[at : at + part.shape[0]]) for at, part in slices)
    assert record.join(slices, 0) == record
    assert record.narrow(1, 4, 2).dequantize().equal(by_hand[:, 4:])
    with pytest.raises(ShardError, match="fp8-block in multiples of 4 along dimension 1"):
        record.narrow(1, 2, 2)
    both = stack([record, record])
    assert (both.shape, both.unstack()) == ((2, 5, 6), [record, record])
    assert both.dequantize_expert(1).equal(by_hand)
    assert pickle.loads(pickle.dumps(record)) == record
    assert record.to("meta").meta().shape == (5, 6)


def test_foreign_records_are_weights_of_parallel_layers() -> None:
    """What an exported program keeps of one finds its class again, by name."""
    record = foreign()
    module = parallel_weight.WeightBuffers(record)
    assert module.plain(torch.float32).equal(record.dequantize())
    read = parallel_weight._read_spec(parallel_weight.to_spec(record.meta()))
    assert isinstance(read, ScaledFP8)
    assert (read.shape, read.rows, read.columns) == ((4, 6), 2, 4)


def test_names_are_unique() -> None:
    names = [name for method in METHODS for name in method.NAMES]
    classes = [each.__name__ for each in (*FAMILIES, *FOREIGN)]
    assert len({*names}) == len(names)
    assert len({*classes}) == len(classes)


@pytest.mark.parametrize(
    ("path", "modules", "ignored"),
    [
        ("lm_head", ["lm_head"], True),
        ("model.lm_head_2", ["lm_head"], False),
        ("model.layers.0.mlp.gate", ["model.layers.*.mlp.gate"], True),
        ("model.layers.0.mlp.gate_proj", ["model.layers.*.mlp.gate"], False),
        ("model.layers.0.self_attn.q_proj", ["layers.0.self_attn"], True),
        ("model.layers.10.self_attn.q_proj", ["layers.0.self_attn"], False),
        ("model.layers.10.self_attn.q_proj", ["re:.*q_proj$"], True),
        ("model.layers.10.self_attn.q_proj", ["re:q_proj", "x.y"], False),
        ("a(b", ["a(b"], True),
        ("a", [], False),
    ],
)
def test_modules_that_are_ignored(path: str, modules: list[str], ignored: bool) -> None:
    """Whole names between dots, patterns from the start."""
    assert is_ignored(path, modules) == ignored


def test_near_names_among_many(tmp_path: Path) -> None:
    """Where there are tens of thousands, those beside the missing one and those that end alike are looked at."""
    tensors = {f"layers.{at}.experts.{number}.up.weight": torch.ones(1) for at in range(5) for number in range(900)}
    found = pytest.raises(MissingError, match=r"near names: .*layers\.3\.experts\.12\.up")
    with checkpoint_of(tmp_path, tensors) as checkpoint, found:
        checkpoint["layers.3.experts.12.upp"]


E4M3 = torch.float8_e4m3fn
HQQ_NUMBERS = {"nbits": 8, "group_size": 32, "axis": 1, "channel_wise": 1, "view_as_float": 0}


@pytest.mark.parametrize(
    ("said", "tensors", "scales"),
    [
        (
            {"quant_method": "fp8", "weight_block_size": [2, 32]},
            {"weight": torch.ones(4, 64).to(E4M3)},
            "weight_scale_inv",
        ),
        ({"quant_method": "fp8"}, {"weight": torch.ones(4, 64).to(E4M3)}, "weight_scale"),
        (
            {"bits": 4, "group_size": 32},
            {"weight": torch.ones(4, 8).to(torch.uint32), "biases": torch.ones(4, 2)},
            "scales",
        ),
        (
            {"bits": 5, "group_size": 32},
            {"weight": torch.ones(4, 10).to(torch.uint32), "biases": torch.ones(4, 2)},
            "scales",
        ),
        ({"quant_method": "mxfp4"}, {"weight": torch.ones(4, 32).byte()}, "scales"),
        (
            {"quant_method": "hqq", **HQQ_NUMBERS},
            {"W_q": torch.ones(8, 32).byte(), "zero": torch.ones(8, 1), "shape": torch.tensor([4, 64])},
            "scale",
        ),
    ],
)
def test_a_slice_looks_at_nothing_else(
    tmp_path: Path, said: dict[str, Any], tensors: dict[str, torch.Tensor], scales: str
) -> None:
    """What is wrong in the other half is not seen, and that of its own is."""
    shape = {"weight_scale_inv": (2, 2), "weight_scale": (4, 1), "scale": (8, 1)}.get(scales, (4, 2))
    wrong = torch.ones(shape)
    wrong[: shape[0] // 2] = torch.nan
    if said.get("quant_method") == "mxfp4":
        wrong = torch.where(wrong == 1, 1, 255).byte()
    with checkpoint_of(
        tmp_path, {f"a.{name}": each for name, each in (tensors | {scales: wrong}).items()}, **said
    ) as checkpoint:
        right = checkpoint.layer("a", Shard.simple(0, 1, 2)).weight
        assert right.shape == (2, 64)
        assert right.dequantize().isfinite().all()
        for touching in (lambda: checkpoint["a"], lambda: checkpoint.layer("a", Shard.simple(0, 0, 2))):
            with pytest.raises(FormatError, match=rf"layer a, field a\.{scales}"):
                touching()
