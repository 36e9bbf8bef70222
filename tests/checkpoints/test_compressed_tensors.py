"""compressed-tensors checkpoints, as the library packed them and dequantised them: a golden file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.checkpoints import check_record, checkpoint_of, same_bits
from tools.golden.compressed_tensors_weights import CASES
from uqff import FormatError, MissingError, ShapeError, Shard, UnsupportedError

GOLDEN = load_file(Path(__file__).parent.parent / "golden" / "compressed-tensors-0.20.0.safetensors")
KINDS = {
    "int4": "afq4",
    "int4-zeros": "afq4",
    "int4-channel": "afq4",
    "int8": "afq8",
    "int3-zeros": "afq3",
    "int8-plain": "afq8",
    "fp8": "fp8",
    "fp8-channel": "fp8-channel",
    "nvfp4": "nvfp4",
}


def stored(case: str, path: str = "a") -> dict[str, torch.Tensor]:
    names = [name for name in GOLDEN if name.startswith(f"{case}.") and not name.endswith(".numbers")]
    return {path + name.removeprefix(case): GOLDEN[name] for name in names}


def config(*cases: str, targets: list[list[str]] | None = None) -> dict[str, Any]:
    groups = {
        f"group_{at}": {"targets": targets[at] if targets else ["Linear"], "weights": dict(CASES[case][1])}
        for at, case in enumerate(cases)
    }
    return {"quant_method": "compressed-tensors", "format": CASES[cases[0]][0], "config_groups": groups}


@pytest.mark.parametrize("case", CASES)
def test_as_the_library_dequantises(tmp_path: Path, case: str) -> None:
    """And slices of both dimensions, read as slices, cut of the whole, and joined again."""
    plain = GOLDEN[f"{case}.numbers"]
    with checkpoint_of(tmp_path, stored(case), **config(case)) as checkpoint:
        record = check_record(checkpoint, "a", plain)
        assert (list(checkpoint), record.kind) == (["a"], KINDS[case])


def test_an_order_of_inputs(tmp_path: Path) -> None:
    """By hand: ``weight_g_idx`` says the group of each input; -1 in all is as good as none."""
    backwards = torch.arange(127, -1, -1) // 32
    tensors = stored("int4") | {"a.weight_g_idx": backwards.int()}
    tensors |= stored("int4", "b") | {"b.weight_g_idx": torch.full((128,), -1).int()}
    with checkpoint_of(tmp_path, tensors, **config("int4")) as checkpoint:
        assert [checkpoint.kind(path) for path in "ab"] == ["int4-groups", "afq4"]
        scales, plain = GOLDEN["int4.weight_scale"], GOLDEN["int4.numbers"]
        codes = plain / scales.repeat_interleave(32, 1)
        assert torch.equal(checkpoint.layer("a").weight.dequantize(), codes.round() * scales[:, backwards])


def test_groups_of_modules(tmp_path: Path) -> None:
    """A path counts before a pattern, a pattern before a class, wherever they stand."""
    tensors = (
        stored("int4", "m.a") | stored("int8", "m.b") | stored("fp8", "m.c") | {"lm_head.weight": torch.ones(2, 2)}
    )
    targets = [["Linear"], [r"re:.*\.[bc]$"], ["m.c"]]
    settings = config("int4", "int8", "fp8", targets=targets) | {"format": "mixed-precision", "ignore": ["lm_head"]}
    with checkpoint_of(tmp_path, tensors, **settings) as checkpoint:
        kinds = {path: checkpoint.kind(path) for path in checkpoint}
        assert kinds == {"m.a": "afq4", "m.b": "afq8", "m.c": "fp8", "lm_head": "unquant"}
        assert same_bits(checkpoint.layer("m.b").weight.dequantize(), GOLDEN["int8.numbers"])


@pytest.mark.parametrize("size", [129, 10**40])
def test_groups_that_are_larger_than_the_inputs(tmp_path: Path, size: int) -> None:
    """There is one of all inputs, however large a number a configuration has."""
    settings = config("int4-channel")
    settings["config_groups"]["group_0"]["weights"] |= {"strategy": "group", "group_size": size}
    with checkpoint_of(tmp_path, stored("int4-channel"), **settings) as checkpoint:
        assert check_record(checkpoint, "a", GOLDEN["int4-channel.numbers"]).kind == "afq4"


@pytest.mark.parametrize(
    ("case", "change", "error", "problem"),
    [
        ("int4", {"a.weight_scale": None}, MissingError, r"a tensor weight_scale beside"),
        ("int4", {"a.weight_shape": None}, MissingError, r"a tensor weight_shape beside"),
        ("int4-zeros", {"a.weight_zero_point": None}, MissingError, r"a tensor weight_zero_point beside"),
        ("nvfp4", {"a.weight_global_scale": None}, MissingError, r"a tensor weight_global_scale beside"),
        ("int4", {"a.weight_shape": torch.tensor([8, 256])}, ShapeError, r"expected \[8, 32\], got \[8, 16\]"),
        ("int4", {"a.weight_shape": torch.tensor([-8, 128])}, ShapeError, r"expected positive numbers"),
        ("int4", {"a.weight_scale": torch.ones(8, 3)}, ShapeError, r"expected \[8, 4\], got \[8, 3\] .*weight_scale"),
        ("int4", {"a.weight_scale": torch.full((8, 4), torch.nan)}, FormatError, r"a finite number.*weight_scale"),
        ("int4", {"a.weight_g_idx": torch.full((128,), 4).int()}, FormatError, r"group out of range.*0 to 3, got 4"),
        ("int4", {"a.weight_packed": torch.ones(8, 16)}, FormatError, r"expected I32, got F32 .*weight_packed"),
        ("fp8", {"a.weight": torch.ones(8, 128)}, FormatError, r"wrong dtype: expected F8_E4M3, got F32 .*a\.weight"),
        ("int8-plain", {"a.weight": torch.ones(8, 128)}, FormatError, r"wrong dtype: expected I8, got F32 .*a\.weight"),
        ("nvfp4", {"a.weight_global_scale": torch.zeros(1)}, FormatError, r"division by zero"),
        ("nvfp4", {"a.weight_scale": torch.ones(6, 4)}, FormatError, r"expected F8_E4M3, got F32"),
    ],
)
def test_companions_that_do_not_fit(
    tmp_path: Path, case: str, change: Any, error: type[Exception], problem: str
) -> None:
    tensors = {name: tensor for name, tensor in (stored(case) | change).items() if tensor is not None}
    with checkpoint_of(tmp_path, tensors, **config(case)) as checkpoint, pytest.raises(error, match=problem):
        checkpoint.layer("a")


@pytest.mark.parametrize(
    ("weights", "error", "problem"),
    [
        ({"num_bits": 5}, UnsupportedError, r"got 5 .*config_groups\.group_0\.weights\.num_bits"),
        ({"num_bits": 4, "strategy": "block"}, UnsupportedError, r"one that fits int, got block"),
        ({"num_bits": 4, "strategy": "group"}, FormatError, r"no size of groups"),
        ({"strategy": "channel", "group_size": 32}, FormatError, r"expected none for channel, got 32 .*group_size"),
        ({"num_bits": 4, "group_size": 0}, FormatError, r"not a size of groups"),
        (
            {"num_bits": 4, "type": "float"},
            UnsupportedError,
            r"expected tensor_group of 16, or group of 32, got tensor",
        ),
    ],
)
def test_settings_that_do_not_exist(
    tmp_path: Path, weights: dict[str, Any], error: type[Exception], problem: str
) -> None:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    with pytest.raises(error, match=problem):
        checkpoint_of(tmp_path, stored("int4"), quant_method="compressed-tensors", config_groups=groups)


def test_what_is_ignored(tmp_path: Path) -> None:
    """Modules by name, class or expression; a list of them, and nothing else."""
    settings = config("int4", targets=[["re:a.*"]])
    with checkpoint_of(tmp_path, stored("int4"), **settings, ignore=["lm_head", "re:ab.*"]) as checkpoint:
        method = checkpoint.method
        assert method is not None
        assert [method.leaves_plain(path) for path in ("a", "abc", "lm_head", "b")] == [False, True, True, True]
    with pytest.raises(FormatError, match=r"not a list of modules: got 5 .*quantization_config\.ignore"):
        checkpoint_of(tmp_path, stored("int4"), **settings, ignore=5)


def test_a_weight_that_no_group_names(tmp_path: Path) -> None:
    settings = config("int4", targets=[[r"re:b"]])
    with (
        checkpoint_of(tmp_path, stored("int4"), **settings) as checkpoint,
        pytest.raises(FormatError, match="no group"),
    ):
        checkpoint.meta("a")


@pytest.mark.parametrize(
    ("case", "kind"), [("int4", "afq4"), ("int4-zeros", "afq4"), ("int8", "afq8"), ("int8-plain", "afq8")]
)
def test_stacks(tmp_path: Path, case: str, kind: str) -> None:
    """The library packs each expert of a stack by itself; all are AFQ, or none is."""
    flipped = {name: each.flip(0) if name == "b.weight_scale" else each for name, each in stored(case, "b").items()}
    experts = [stored(case, "b"), flipped]
    tensors = {f"a{name[1:]}": torch.stack([each[name] for each in experts]) for name in flipped}
    if "a.weight_shape" in tensors:
        tensors["a.weight_shape"] = torch.tensor([2, *flipped["b.weight_shape"].tolist()])
    singles = [{f"{at}{name[1:]}": each for name, each in expert.items()} for at, expert in enumerate(experts)]
    with checkpoint_of(tmp_path / "exact", tensors | singles[0] | singles[1], **config(case)) as checkpoint:
        plain = torch.stack([checkpoint.layer(path).weight.dequantize() for path in "01"])
        record: Any = checkpoint.layer("a").weight
        assert (record.kind, checkpoint.shape("a")) == (kind, tuple(plain.shape))
        assert same_bits(record.dequantize(), plain)
        for dim in range(3):
            half = max(plain.shape[dim] // 2, record.alignment(dim))  # of a group that is the row, all
            first = plain.shape[dim] - half
            part = checkpoint.layer("a", Shard.offset(dim, first, half)).weight
            assert part == record.narrow(dim, first, half)
    negative = tensors | {"a.weight_scale": torch.stack([experts[0]["b.weight_scale"], -flipped["b.weight_scale"]])}
    with checkpoint_of(tmp_path / "foreign", negative, **config(case)) as checkpoint:
        made = checkpoint.layer("a").weight
        assert made.kind == checkpoint.kind("a") == f"int{kind[3:]}-groups"
        assert same_bits(made.dequantize_expert(0), plain[0])
        assert torch.equal(made.dequantize_expert(1), -plain[1])
    few = tensors | {"a.weight_scale": tensors["a.weight_scale"][:1]}
    expected = r"too few experts: expected at least 2, got 1 .*a\.weight_scale"
    with checkpoint_of(tmp_path / "few", few, **config(case)) as checkpoint, pytest.raises(ShapeError, match=expected):
        checkpoint.meta("a")


def test_mxfp4(tmp_path: Path) -> None:
    """By hand: codes as of NVFP4, exponents with bias 127."""
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    said = {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    numbers = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = torch.randint(0, 16, (4, 64), generator=torch.Generator().manual_seed(1))
    exponents = torch.tensor([[127, 126], [128, 130], [120, 127], [127, 127]]).byte()
    plain = numbers[codes] * (2.0 ** (exponents.float() - 127)).repeat_interleave(32, 1)
    tensors = {"a.weight_packed": (codes[:, 0::2] | codes[:, 1::2] << 4).byte(), "a.weight_scale": exponents}
    with checkpoint_of(tmp_path, tensors, **said) as checkpoint:
        assert checkpoint.kind("a") == "mxfp4"
        check_record(checkpoint, "a", plain)
    odd, expected = tensors | {"a.weight_scale": exponents[:, :1]}, r"expected \[4, 2\], got \[4, 1\] .*a\.weight_scale"
    with checkpoint_of(tmp_path / "odd", odd, **said) as checkpoint, pytest.raises(ShapeError, match=expected):
        checkpoint.layer("a")
