"""GPTQ and AWQ checkpoints, made of codes that are known by a packer of our own; not compared with the libraries.

The numbers that must come out are those of their formula in float32, ``scale * (code - zero)``, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import uqff
from tests.support.checkpoints import check_record, checkpoint_of, same_bits, write_checkpoint
from tests.support.packed_weights import GroupedWeight
from tools.golden.grouped_weights import CASES
from uqff import FormatError, MissingError, ShapeError, UnsupportedError
from uqff.checkpoints import Checkpoint
from uqff.checkpoints.grouped import GroupedCodes
from uqff.families import AFQ
from uqff.families.stacking import stack as stack_of
from uqff.models.patterns import Pattern

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
AUTO_ROUND = GPTQ | {"quant_method": "auto-round"}


def check(checkpoint: Checkpoint, plain: torch.Tensor, kind: type) -> None:
    """The whole, and slices of both dimensions, read as slices and cut of the whole."""
    with checkpoint:
        record: Any = checkpoint.layer("a").weight
        assert type(record).__name__ == kind.__name__
        assert same_bits(record.dequantize(), plain)
        meta = checkpoint.meta("a").weight
        assert (meta.kind, meta.shape) == (record.kind, record.shape)
        assert {name: (p.dtype, p.shape) for name, p in meta.parts.items()} == (
            {name: (p.dtype, p.shape) for name, p in record.parts.items()}
        )
        for dim in (0, 1):
            size, unit = record.shape[dim], record.alignment(dim)
            cuts = [(0, size // 2 // unit * unit), (size // 2 // unit * unit, size - size // 2 // unit * unit)]
            parts = [(start, record.narrow(dim, start, length)) for start, length in cuts if length]
            for start, part in parts:
                assert same_bits(part.dequantize(), plain.narrow(dim, start, part.shape[dim]))
                assert checkpoint.paths["a"].record(checkpoint.companions("a"), (dim, start, part.shape[dim])) == part
            assert record.join(parts, dim) == record


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_gptq(data: st.DataObject) -> None:
    """Both conventions of zeros, all bits, groups and dtypes, with ``g_idx`` in order, shuffled, or none."""
    bits = data.draw(st.sampled_from([2, 3, 4, 8]))
    size = data.draw(st.sampled_from([32, 64, 128, 256, -1, 48]))
    columns = data.draw(st.sampled_from([96, 128, 256, 288, 512]))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    order, v2 = data.draw(st.sampled_from(["none", "rows", "shuffled"])), data.draw(st.booleans())
    group = columns if size == -1 else size
    weight = GroupedWeight.random(32, columns, bits, group, dtype, data.draw(st.integers(0, 9)))
    if order == "shuffled":
        weight.index = np.random.default_rng(1).permutation(weight.index)
    moved = not np.array_equal(weight.index, np.arange(columns) // group)
    exact = not moved and columns % 32 == 0 and group % 32 == 0 and dtype != torch.float32
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }
    with TemporaryDirectory() as folder:
        tensors = weight.gptq("a", v2=v2, g_idx=order != "none")
        check(checkpoint_of(Path(folder), tensors, **config), weight.numbers(), AFQ if exact else GroupedCodes)


@pytest.mark.parametrize("size", [32, 128, 256, -1])
def test_awq(tmp_path: Path, size: int) -> None:
    weight = GroupedWeight.random(32, 256, 4, 256 if size == -1 else size, torch.float16)
    config = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
    check(checkpoint_of(tmp_path, weight.awq("a"), **config), weight.numbers(), AFQ)


def test_words_by_hand(tmp_path: Path) -> None:
    """GPTQ: rows 0 to 7 of a column, lowest bits first, and a stored zero of 15, which is 0. AWQ: another order."""
    word = 0x76543210
    tensors = {
        "a.qweight": torch.full((4, 8), word, dtype=torch.int32),
        "a.qzeros": torch.tensor([[-1]], dtype=torch.int32),
        "a.scales": torch.ones(1, 8, dtype=torch.float16),
    }
    with checkpoint_of(tmp_path / "gptq", tensors, **GPTQ) as checkpoint:
        assert checkpoint.layer("a").weight.dequantize()[0, :8].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    tensors = {
        "a.qweight": torch.full((32, 1), word, dtype=torch.int32),
        "a.qzeros": torch.tensor([[0]], dtype=torch.int32),
        "a.scales": torch.ones(1, 8, dtype=torch.float16),
    }
    with checkpoint_of(tmp_path / "awq", tensors, quant_method="awq", bits=4, group_size=32) as checkpoint:
        assert checkpoint.layer("a").weight.dequantize()[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize("scale", [-0.5, 0.0, 0.1])
def test_where_afq_would_round(tmp_path: Path, scale: float) -> None:
    """A negative scale or one of 0 makes -0 of some codes; one of full precision rounds. Both stay as they are."""
    weight = GroupedWeight.random(8, 64, 4, 32, torch.float32)
    weight.scales[3, 1] = scale
    weight.scales = weight.scales.half() if scale <= 0 else weight.scales
    check(checkpoint_of(tmp_path, weight.gptq("a"), **GPTQ), weight.numbers(), GroupedCodes)


def test_float32_scales_that_are_short_are_exact(tmp_path: Path) -> None:
    weight = GroupedWeight.random(8, 64, 4, 32, torch.float16)
    weight.scales = weight.scales.float()
    check(checkpoint_of(tmp_path, weight.gptq("a"), **GPTQ), weight.numbers(), AFQ)


def test_dynamic(tmp_path: Path) -> None:
    """Of GPTQModel: other bits and groups by the path, and modules that are left alone."""
    a, b = (GroupedWeight.random(32, 64, bits, size, torch.float16) for bits, size in ((4, 32), (8, 64)))
    tensors = a.gptq("model.a") | b.gptq("model.b") | {"model.c.weight": torch.ones(2, 2)}
    dynamic = {r"+:.*\.b": {"bits": 8, "group_size": 64}, r"-:.*\.c": {}}
    with checkpoint_of(tmp_path, tensors, **GPTQ, dynamic=dynamic) as checkpoint:
        kinds = {path: checkpoint.kind(path) for path in checkpoint}
        assert kinds == {"model.a": "afq4", "model.b": "afq8", "model.c": "unquant"}
        assert same_bits(checkpoint.layer("model.b").weight.dequantize(), b.numbers())


def test_modules_of_auto_round(tmp_path: Path) -> None:
    """``extra_config``: by name, by an expression that is searched for; of 16 bits: not quantised."""
    a, b = (GroupedWeight.random(32, 64, bits, size, torch.float16) for bits, size in ((4, 32), (8, 64)))
    tensors = a.gptq("model.a") | b.gptq("model.b") | b.gptq("model.x.b2") | {"lm_head.weight": torch.ones(2, 2)}
    extra = {"model.b": {"bits": 8, "group_size": 64}, r"b\d$": {"bits": 8, "group_size": 64}, "lm_head": {"bits": 16}}
    with checkpoint_of(tmp_path, tensors, **AUTO_ROUND, extra_config=extra) as checkpoint:
        kinds = {path: checkpoint.kind(path) for path in checkpoint}
        assert kinds == {"model.a": "afq4", "model.b": "afq8", "model.x.b2": "afq8", "lm_head": "unquant"}
        assert same_bits(checkpoint.layer("model.x.b2").weight.dequantize(), b.numbers())


def test_a_weight_twice(tmp_path: Path) -> None:
    """Plain beside packed: one of them would be dropped without a word."""
    tensors = GroupedWeight.random(8, 64, 4, 32, torch.float16).gptq("a") | {"a.weight": torch.ones(8, 64)}
    with pytest.raises(FormatError, match=r"a weight twice: .*beside a\.qweight, .*layer a, field a\.weight"):
        checkpoint_of(tmp_path, tensors, **GPTQ)


ODD = [(4, 5, 64), (2, 9, 64), (8, 3, 64), (4, 7, 70), (8, 1, 33), (3, 5, 64), (3, 32, 72), (3, 7, 40)]


@pytest.mark.parametrize(("bits", "out", "columns"), ODD)
@pytest.mark.parametrize("at_once", [False, True])
def test_words_that_are_not_full(tmp_path: Path, bits: int, out: int, columns: int, at_once: bool) -> None:
    """GPTQModel rounds both up to whole words: of zeros along the outputs, of codes along the inputs.

    Of 3 bits it packs 32 codes at once, three words.
    """
    weight = GroupedWeight.random(out, columns, bits, 32, torch.float16)
    tensors = weight.gptq("a")
    if at_once and bits == 3:
        for name, dim in (("a.qweight", 0), ("a.qzeros", 1)):
            more = torch.zeros_like(tensors[name].narrow(dim, 0, 1))
            tensors[name] = torch.cat([tensors[name], *[more] * (-tensors[name].shape[dim] % 3)], dim)
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32}
    with checkpoint_of(tmp_path, tensors, **config) as checkpoint:
        check_record(checkpoint, "a", weight.numbers())


def test_an_order_without_an_index(tmp_path: Path) -> None:
    """Of ``desc_act``: which inputs make a group is not known, unless all do."""
    weight = GroupedWeight.random(8, 64, 4, 32, torch.float16)
    bare, config = weight.gptq("a", g_idx=False), GPTQ | {"desc_act": True}
    missing = r"companion of the weight is missing.*expected a tensor g_idx beside a\.qweight"
    with checkpoint_of(tmp_path / "a", bare, **config) as checkpoint, pytest.raises(MissingError, match=missing):
        checkpoint.meta("a")
    with checkpoint_of(tmp_path / "b", weight.gptq("a"), **config) as checkpoint:
        check_record(checkpoint, "a", weight.numbers())
    one = GroupedWeight.random(8, 64, 4, 64, torch.float16)
    with checkpoint_of(tmp_path / "c", one.gptq("a", g_idx=False), **config | {"group_size": -1}) as checkpoint:
        check_record(checkpoint, "a", one.numbers())


@pytest.mark.parametrize("size", [65, 4096, (1 << 32) - 1, 10**40])
def test_groups_that_are_larger_than_the_inputs(tmp_path: Path, size: int) -> None:
    """There is one of all inputs, however large a number a configuration has."""
    weight = GroupedWeight.random(8, 64, 4, 64, torch.float16)
    tensors, config = weight.gptq("a", g_idx=False), GPTQ | {"group_size": size, "desc_act": True}
    with checkpoint_of(tmp_path, tensors, **config) as checkpoint:
        assert check_record(checkpoint, "a", weight.numbers()).kind == "afq4"


@pytest.mark.parametrize(("bits", "kept"), [(4, 58), (4, 62), (8, 61), (2, 60), (3, 56)])
def test_an_index_that_is_too_short(tmp_path: Path, bits: int, kept: int) -> None:
    """It would leave inputs out, in as many words and groups: there are codes where its inputs end."""
    tensors = GroupedWeight.random(32, 64, bits, 32, torch.float16).gptq("a")
    tensors["a.g_idx"] = tensors["a.g_idx"][:kept]
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32}
    problem = rf"index is too short: expected an input for each code.* a\.qweight holds more, got \[{kept}\] .*a\.g_idx"
    with checkpoint_of(tmp_path, tensors, **config) as checkpoint, pytest.raises(FormatError, match=problem):
        checkpoint.meta("a")


@pytest.mark.parametrize(
    ("bits", "out", "columns", "problem"),
    [
        (3, 32, 36, r"rows do not hold whole codes: expected codes of 3 bits, got 4 .*a\.qweight"),
        (4, 8, 33, r"wrong shape: expected \[40\], got \[33\] .*a\.g_idx"),
    ],
)
def test_words_that_are_not_read(tmp_path: Path, bits: int, out: int, columns: int, problem: str) -> None:
    """A row that ends within a byte has no slices."""
    tensors = GroupedWeight.random(out, columns, bits, 32, torch.float16).gptq("a")
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32}
    with checkpoint_of(tmp_path, tensors, **config) as checkpoint, pytest.raises(ShapeError, match=problem):
        checkpoint.meta("a")


def test_groups_that_do_not_fill_the_inputs_of_awq(tmp_path: Path) -> None:
    """48 gives as many groups of 64 inputs as the 32 that they have."""
    tensors = GroupedWeight.random(8, 64, 4, 32, torch.float16).awq("a")
    config = {"quant_method": "awq", "bits": 4, "group_size": 48}
    with checkpoint_of(tmp_path, tensors, **config) as checkpoint, pytest.raises(ShapeError, match="multiple of 48"):
        checkpoint.meta("a")


def test_stacks(tmp_path: Path) -> None:
    """Foreign experts, each with an order of its own, stack, and come apart again."""
    weights = [GroupedWeight.random(8, 64, 4, 32, torch.float16, seed) for seed in (1, 2)]
    for seed, weight in enumerate(weights):
        weight.index = np.random.default_rng(seed).permutation(weight.index)
    tensors = weights[0].gptq("a") | weights[1].gptq("b")
    with checkpoint_of(tmp_path, tensors, **GPTQ) as checkpoint:
        records = [checkpoint.layer(path).weight for path in "ab"]
        stack = stack_of(records)
        plain = torch.stack([weight.numbers() for weight in weights])
        assert same_bits(stack.dequantize(), plain)
        assert same_bits(stack.narrow(2, 32, 32).dequantize(), plain[..., 32:])
        assert same_bits(stack.narrow(1, 3, 2).dequantize(), plain[:, 3:5])
        assert same_bits(stack.dequantize_expert(1), plain[1])
        assert stack.unstack() == records
        with pytest.raises(UnsupportedError, match="no form in UQFF"):
            uqff.serialize(uqff.Layer(stack))


def test_quantised_as_it_is(tmp_path: Path) -> None:
    """``--isq keep``: what is exact is carried over, the rest is made anew; a type is made of both's numbers."""
    a, b = (GroupedWeight.random(32, 256, 4, 32, torch.float16, seed) for seed in (1, 2))
    b.index = b.index[::-1].copy()
    tensors = a.gptq("model.layers.0.mlp.up_proj") | b.gptq("model.layers.0.mlp.gate_proj")
    source = write_checkpoint(tmp_path / "source", tensors, quantization_config=GPTQ)
    quiet: dict[str, Any] = {"fallback": "q8_0", "on_fallback": lambda change: None}
    uqff.quantize_model(source, tmp_path / "out", ["keep", "q4k"], layers=Pattern("_proj"), **quiet)
    with uqff.open(f"{tmp_path / 'out'}:keep") as kept, uqff.open(f"{tmp_path / 'out'}:q4k") as made:
        assert kept["model.layers.0.mlp.gate_proj"].weight.kind == "q8_0"
        assert same_bits(kept["model.layers.0.mlp.up_proj"].weight.dequantize(), a.numbers())
        for path, weight in (("up_proj", a), ("gate_proj", b)):
            assert made[f"model.layers.0.mlp.{path}"].weight == uqff.quantize(weight.numbers(), "q4k")


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"a.qzeros": None}, MissingError, r"companion of the weight is missing.*tensor qzeros beside a\.qweight"),
        ({"a.scales": None}, MissingError, r"tensor scales beside"),
        ({"a.scales": torch.ones(3, 8)}, ShapeError, r"wrong shape: expected \[2, 8\], got \[3, 8\] .*a\.scales"),
        ({"a.scales": torch.ones(2, 8).int()}, FormatError, r"wrong dtype: expected F32 or .*got I32 .*model.safetens"),
        ({"a.scales": torch.full((2, 8), torch.inf)}, FormatError, r"expected a finite number.*a\.scales"),
        ({"a.qzeros": torch.ones(2, 2).int()}, ShapeError, r"wrong shape: expected \[2, 1\], got \[2, 2\] .*a\.qzeros"),
        ({"a.qzeros": torch.ones(2, 0).int()}, ShapeError, r"wrong shape: expected \[2, 1\], got \[2, 0\] .*a\.qzeros"),
        ({"a.qweight": torch.ones(8, 8)}, FormatError, r"wrong dtype: expected I32, got F32 .*a\.qweight"),
        ({"a.qweight": torch.ones(8).int()}, ShapeError, r"wrong shape: expected a matrix"),
        ({"a.g_idx": torch.ones(63).int()}, ShapeError, r"expected \[64\], got \[63\] .*a\.g_idx"),
        ({"a.g_idx": torch.full((64,), 2).int()}, FormatError, r"group out of range.*0 to 1, got 2 at input 0"),
        ({"a.g_idx": torch.full((64,), -1).int()}, FormatError, r"group out of range.*got -1 at input 0"),
    ],
)
def test_companions_that_do_not_fit(tmp_path: Path, change: Any, error: type[Exception], problem: str) -> None:
    tensors = GroupedWeight.random(8, 64, 4, 32, torch.float16).gptq("a") | change
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    with checkpoint_of(tmp_path, tensors, **GPTQ) as checkpoint, pytest.raises(error, match=problem):
        checkpoint.meta("a")


@pytest.mark.parametrize(
    ("config", "error", "problem"),
    [
        (GPTQ | {"bits": 5}, UnsupportedError, r"expected one of 2, 3, 4, 8, got 5 .*quantization_config\.bits"),
        (GPTQ | {"bits": "4"}, UnsupportedError, r"expected one of 2, 3, 4, 8, got '4' .*quantization_config\.bits"),
        (AUTO_ROUND | {"packing_format": "auto_round:marlin"}, UnsupportedError, r"got 'auto_round:marlin'"),
        (AUTO_ROUND | {"data_type": "mx_fp"}, UnsupportedError, r"expected one of int, got mx_fp"),
        (AUTO_ROUND | {"extra_config": {"a": {"bits": 5}}}, UnsupportedError, r"got 5 .*extra_config\.a\.bits"),
        (AUTO_ROUND | {"extra_config": {"(": {}}}, FormatError, r"not a regular expression"),
        (GPTQ | {"group_size": 0}, FormatError, r"not a size of groups.*got 0"),
        (GPTQ | {"group_size": None}, FormatError, r"not a size of groups"),
        (GPTQ | {"checkpoint_format": "marlin"}, UnsupportedError, r"got marlin"),
        (GPTQ | {"dynamic": {"(": {}}}, FormatError, r"not a regular expression"),
        ({"quant_method": "awq", "bits": 8, "group_size": 128}, UnsupportedError, r"expected one of 4, got 8"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, UnsupportedError, r"got gemv"),
    ],
)
def test_settings_that_do_not_exist(tmp_path: Path, config: Any, error: type[Exception], problem: str) -> None:
    with pytest.raises(error, match=problem):
        checkpoint_of(tmp_path, {"a.weight": torch.ones(2, 2)}, **config)


GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "auto-round-0.8.0.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_as_the_libraries_dequantise(tmp_path: Path, case: str) -> None:
    """auto-round of both conventions of zeros, AutoAWQ: codes, zeros and words are theirs, and so are the numbers."""
    method, bits, size, _ = CASES[case]
    tensors = {name.replace(case, "a"): part for name, part in GOLDEN.items() if name.startswith(f"{case}.q")}
    tensors["a.scales"] = GOLDEN[f"{case}.scales"]
    config = {"quant_method": method.partition("_")[0], "bits": bits, "group_size": size, "checkpoint_format": method}
    config |= {"checkpoint_format": "gptq"} if method == "awq" else {}
    with checkpoint_of(tmp_path / "a", tensors, **config) as checkpoint:
        assert check_record(checkpoint, "a", GOLDEN[f"{case}.numbers"]).kind == f"afq{bits}"
    if method != "awq":
        packing = {"gptq": "auto_round:auto_gptq", "gptq_v2": "auto_round:exllamav2"}[method]
    else:
        packing = "auto_round:auto_awq"
    config = {"quant_method": "auto-round", "bits": bits, "group_size": size, "packing_format": packing}
    with checkpoint_of(tmp_path / "b", tensors, **config) as checkpoint:
        assert check_record(checkpoint, "a", GOLDEN[f"{case}.numbers"]).kind == f"afq{bits}"
