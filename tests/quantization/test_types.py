"""Which type a weight becomes, per engine generation; what `quantize` refuses and reports; sizes before payloads."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import uqff
from tests.support.golden_models import GOLDEN, TinyModel
from uqff import FormatError, ShapeError, UnsupportedError
from uqff.codec.blob import blob_size
from uqff.container.mapped import MappedFile, TensorMap
from uqff.families import AFQ, F8Q8, FP8, GGUF, HQQ, MXFP4, Unquant, families
from uqff.families.encoding import Engine
from uqff.quantization.bias import cast_bias
from uqff.quantization.types import KINDS, Fallback, automatic_kinds, kind_name, meta_weight, plan, widened

pytestmark = pytest.mark.long

HQQ_ONLY_READ = ("hqq1", "hqq2", "hqq3")
LOAD_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
K_TO_LEGACY = {"q2k": "q4_0", "q3k": "q4_0", "q4k": "q4_1", "q5k": "q5_0", "q6k": "q5_1", "q8k": "q8_1"}
GGML = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q8_1", *K_TO_LEGACY)


def weight_of(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal weights of spread 0.02, the same every time."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 0.02).to(dtype)


def test_there_are_22_types() -> None:
    """The engine's names: ggml's types first, then the other families."""
    assert " ".join(KINDS) == (
        "q4_0 q4_1 q5_0 q5_1 q8_0 q8_1 q2k q3k q4k q5k q6k q8k hqq4 hqq8 fp8 afq2 afq3 afq4 afq6 afq8 f8q8 mxfp4"
    )


@pytest.mark.parametrize(
    ("given", "name"),
    [(2, "q2k"), (3, "q3k"), (4, "q4k"), (5, "q5k"), (6, "q6k"), (8, "q8_0"), ("8", "q8_0"), ("Q4K", "q4k")],
)
def test_numbers_of_bits_are_the_engines_automatic_choice(given: str | int, name: str) -> None:
    assert kind_name(given) == name


@pytest.mark.parametrize("given", [7, 0, True, "q4_k", "", "f32", "hqq5", "q4k "])
def test_other_names_are_refused_with_the_list(given: str | int) -> None:
    with pytest.raises(UnsupportedError, match=r"expected one of q4_0, .*, unquant, 2, 3, 4, 5, 6, 8, got"):
        kind_name(given)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("Q4_K", "q4k"), ("q6_k", "q6k"), ("Q5_K_M", "q5k"), ("q3_k_xl", "q3k"), ("Q40", "q4_0"), ("mxfp8", "mxfp4")],
)
def test_the_name_that_was_meant(given: str, meant: str) -> None:
    """llama.cpp's names of K types, and slips."""
    with pytest.raises(UnsupportedError, match=f"^unknown type; did you mean {meant}\\?: expected one of"):
        kind_name(given)
    with pytest.raises(UnsupportedError, match=r"^unknown type: expected one of"):
        kind_name("nonsense")


def test_a_stack_that_cannot_be_is_told_from_a_row_that_does_not_fit() -> None:
    """The dimension that matters is named; of a stack of whole rows there is none."""
    with pytest.raises(ShapeError) as caught:
        plan("mxfp4", (4, 256, 256))
    assert caught.value.expected == "a matrix: the engine quantises no stack of experts to it"
    assert caught.value.got == [4, 256, 256]
    with pytest.raises(ShapeError, match=r"expected a last dimension in multiples of 32, got 40 of \[256, 40\]"):
        plan("mxfp4", (256, 40))
    with pytest.raises(ShapeError, match=r"expected a number of weights in multiples of 64, got 120 of \[3, 40\]"):
        plan("hqq4", (3, 40))


@pytest.mark.parametrize("engine", ["0.6", "0.8", "0.9"])
@pytest.mark.parametrize("kind", K_TO_LEGACY)
def test_k_types_fall_back_to_legacy_types(kind: str, engine: Engine) -> None:
    """Whole blocks of 32 that are not whole super-blocks: the same in all generations."""
    assert plan(kind, (4, 256), engine=engine) == kind
    assert plan(kind, (4, 96), engine=engine) == K_TO_LEGACY[kind]
    assert plan(kind, (3, 4, 288), engine=engine) == K_TO_LEGACY[kind]


@pytest.mark.parametrize("kind", GGML)
def test_ggml_types_of_no_whole_block(kind: str) -> None:
    """0.6 cannot write such a layer; later engines store ggml's F32."""
    with pytest.raises(ShapeError, match=f"the shape cannot be {kind}: .* multiples of 32, got 80 of \\[4, 80\\]"):
        plan(kind, (4, 80), engine="0.6")
    assert plan(kind, (4, 80), engine="0.8") == plan(kind, (4, 80), engine="0.9") == "f32"


@pytest.mark.parametrize("kind", ["afq2", "afq3", "afq4", "afq6", "afq8"])
def test_afq_of_no_whole_group(kind: str) -> None:
    """Only 0.9 has an answer: unquantised. The group size counts."""
    assert plan(kind, (4, 96)) == "unquant"
    assert plan(kind, (4, 96), group_size=32) == kind
    assert plan(kind, (4, 64), group_size=128) == "unquant"
    for engine in ("0.6", "0.8"):
        with pytest.raises(ShapeError, match=r"multiples of 64, got 96 of \[4, 96\]"):
            plan(kind, (4, 96), engine=engine)


def test_hqq_counts_all_weights() -> None:
    assert plan("hqq4", (4, 16)) == "hqq4"
    with pytest.raises(ShapeError, match=r"a number of weights in multiples of 64, got 48 of \[3, 16\]"):
        plan("hqq4", (3, 16))


def test_mxfp4_needs_matrices_of_whole_blocks_and_a_newer_engine() -> None:
    assert plan("mxfp4", (4, 32)) == "mxfp4"
    for kind in ("mxfp4", "f8q8"):
        with pytest.raises(UnsupportedError, match=f"the engine had no {kind} yet: expected 0.8, got 0.6"):
            plan(kind, (4, 32), engine="0.6")


def test_fp8_and_f8q8_take_any_shape() -> None:
    for shape in [(1, 1), (5, 7), (2, 3, 5)]:
        assert (plan("fp8", shape), plan("f8q8", shape)) == ("fp8", "f8q8")


@pytest.mark.parametrize("shape", [(), (8,), (1, 2, 3, 4), (0, 32), (4, 0)])
def test_only_matrices_and_stacks_of_them(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="not a matrix, nor a stack of them"):
        plan("q8_0", shape)


def test_group_sizes_that_do_not_exist() -> None:
    for kind, size, expected in [
        ("afq4", 16, "32, 64, 128"),
        ("hqq4", 33, "a multiple of 2"),
        ("hqq1", 12, "a multiple of 8"),
        ("hqq3", 0, "a multiple of 1"),
        ("q4k", 64, "none: q4k has no group size"),
    ]:
        with pytest.raises(UnsupportedError, match=f"expected {expected}, got {size}"):
            plan(kind, (64, 256), group_size=size)


def test_unknown_engine() -> None:
    with pytest.raises(UnsupportedError, match=r"expected one of 0\.6, 0\.8, 0\.9, got 0\.7"):
        plan("q4k", (4, 256), engine="0.7")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", LOAD_DTYPES)
@pytest.mark.parametrize("kind", [*KINDS, *HQQ_ONLY_READ, "unquant"])
def test_meta_weights_have_the_shapes_dtypes_and_size_of_the_record(kind: str, dtype: torch.dtype) -> None:
    """What is planned on the meta device is what comes out; the kind and the shape are kept."""
    weight = weight_of(6, 256, dtype=dtype)
    record = uqff.quantize(weight, kind)
    sketch = meta_weight(kind, (6, 256), dtype)
    assert (record.kind, record.shape, record.family) == (kind, (6, 256), sketch.family)
    assert blob_size(sketch) == len(uqff.serialize(record))
    assert str(sketch).replace("meta", "cpu") == str(record)
    assert uqff.deserialize(uqff.serialize(record)).weight == record


@pytest.mark.parametrize(
    ("kind", "group_size", "shape"), [("afq3", 32, (2, 96)), ("afq8", 128, (2, 128)), ("hqq3", 16, (4, 20))]
)
def test_other_group_sizes(kind: str, group_size: int, shape: tuple[int, int]) -> None:
    record = uqff.quantize(weight_of(*shape), kind, group_size=group_size)
    assert isinstance(record, (AFQ, HQQ))
    assert (record.group_size, record.shape) == (group_size, shape)
    assert blob_size(meta_weight(kind, shape, torch.float32, group_size=group_size)) == len(uqff.serialize(record))


@pytest.mark.parametrize("kind", ["q4_0", "q8k", "afq4", "hqq8", "fp8", "f8q8", "unquant"])
def test_stacks_are_their_matrices(kind: str) -> None:
    """Blocks and groups along the last dimension do not see the stacking; every type keeps the shape."""
    stack = weight_of(3, 4, 256)
    record = uqff.quantize(stack, kind)
    assert record.shape == (3, 4, 256)
    if isinstance(record, (GGUF, AFQ, Unquant)):
        parts = [uqff.quantize(matrix, kind).dequantize() for matrix in stack]
        assert torch.equal(record.dequantize(), torch.stack(parts))


def test_q8k_has_another_largest_code_in_each_generation() -> None:
    weight = weight_of(1, 256)
    peak = int(weight.abs().argmax())
    codes = {}
    for engine in ("0.6", "0.8", "0.9"):
        record = uqff.quantize(weight, "q8k", engine=engine)
        assert isinstance(record, GGUF)
        codes[engine] = int(record.blocks[0, 4 + peak].view(torch.int8))
    assert codes == {"0.6": -128, "0.8": -128, "0.9": -127}


@pytest.mark.parametrize("kind", ["q8_0", "unquant", "fp8", "hqq4", "afq4"])
@pytest.mark.parametrize("dtype", LOAD_DTYPES)
@pytest.mark.parametrize(("value", "text"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf")])
def test_numbers_that_are_not_finite_are_refused_by_position(
    kind: str, dtype: torch.dtype, value: float, text: str
) -> None:
    """The first one in row-major order is named."""
    weight = weight_of(2, 3, 64, dtype=dtype)
    weight[1, 0, 17] = value
    weight[1, 2, 0] = float("nan")
    with pytest.raises(FormatError) as caught:
        uqff.quantize(weight, kind, module="model.head")
    assert str(caught.value) == (
        f"weight is not finite: expected finite numbers, got {text} at (1, 0, 17) (layer model.head, field weight)"
    )


def test_what_overflows_in_the_load_dtype_is_refused() -> None:
    """65519 is the largest that rounds to a finite float16."""
    weight = weight_of(2, 64)
    weight[1, 5] = 65519.0
    uqff.quantize(weight, "q8_0", dtype=torch.float16)
    weight[1, 5] = 65520.0
    with pytest.raises(FormatError, match=r"got inf at \(1, 5\)"):
        uqff.quantize(weight, "q8_0", dtype=torch.float16)


@pytest.mark.parametrize("loaded", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["q4k", "afq4", "fp8", "unquant"])
def test_weights_are_rounded_to_the_load_dtype_first(kind: str, loaded: torch.dtype) -> None:
    """The same bytes as of the weight that was rounded beforehand; scales and plain weights have the load dtype."""
    weight = weight_of(4, 256)
    assert uqff.quantize(weight, kind, dtype=loaded) == uqff.quantize(weight.to(loaded), kind)
    assert uqff.quantize(weight.to(loaded), "q4k") == uqff.quantize(weight.to(loaded).float(), "q4k")


def test_float16_as_bfloat16_is_rounded_once() -> None:
    weight = weight_of(4, 64, dtype=torch.float16)
    expected = uqff.quantize(weight.to(torch.bfloat16), "unquant")
    assert uqff.quantize(weight, "unquant", dtype=torch.bfloat16) == expected
    assert uqff.quantize(weight, "q8_0", dtype=torch.bfloat16) == uqff.quantize(weight.to(torch.bfloat16), "q8_0")


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    ("stored", "loaded"), [("bfloat16", "bfloat16"), ("float16", "bfloat16"), ("float32", "float16")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_do_not_show(
    kind: str, stored: str, loaded: str, reference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded, widened, checked and quantised in small pieces: the same bytes, the same position."""
    if reference:
        monkeypatch.setenv("UQFF_KERNELS", "reference")
        monkeypatch.setattr(uqff.families.gguf.tensor, "REFERENCE_BLOCKS", 3)
    dtype = getattr(torch, loaded)
    # F8Q8 runs across rows, and its last block may be short.
    for shape in [(7, 256), (6, 512) if kind == "mxfp4" else (2, 3, 512), *([(7, 131)] if kind == "f8q8" else [])]:
        weight = weight_of(*shape).to(getattr(torch, stored))
        with monkeypatch.context() as patch:
            whole = uqff.quantize(weight, kind, dtype=dtype)
            patch.setattr(uqff.families.loaded, "TILE", 768)
            assert uqff.quantize(weight, kind, dtype=dtype) == whole
            weight[..., -1, 100] = float("nan")
            first = (*(0,) * (len(shape) - 2), shape[-2] - 1, 100)
            with pytest.raises(FormatError, match=f"nan at {re.escape(str(first))}"):
                uqff.quantize(weight, kind, dtype=dtype)


@pytest.mark.parametrize("kind", ["q4_0", "q4k", "afq4", "f8q8", "mxfp4"])
def test_no_float32_copy_of_a_narrow_weight_is_made(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be 8 MiB; a tile of 64 Ki weights and its output are half a MiB."""
    weight = weight_of(1024, 2048, dtype=torch.bfloat16)
    uqff.quantize(weight[:256], kind)
    monkeypatch.setattr(uqff.families.loaded, "TILE", 1 << 16)
    tracemalloc.start()
    try:
        record = uqff.quantize(weight, kind)
        assert tracemalloc.get_traced_memory()[1] < record.nbytes + 2**20
    finally:
        tracemalloc.stop()
    assert widened(kind, weight.numel()) == 1 << 16


@pytest.mark.parametrize("kind", [*KINDS, *HQQ_ONLY_READ])
def test_kernel_and_reference_give_the_same_record(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(5, 256, dtype=torch.bfloat16)
    fast = uqff.quantize(weight, kind)
    monkeypatch.setenv("UQFF_KERNELS", "reference")
    assert uqff.quantize(weight, kind) == fast


@pytest.mark.parametrize("dtype", ["<f4", "<f2", ">f4", ">f2"])
@pytest.mark.parametrize("kind", ["q4k", "fp8", "unquant"])
def test_arrays_are_taken_like_tensors(kind: str, dtype: str) -> None:
    """Also those that cannot be written, that are strided, or have the other byte order; they are left alone."""
    weight = weight_of(8, 512).to(torch.float16 if dtype.endswith("2") else torch.float32)[:, ::2]
    array = np.asarray(weight.numpy(), dtype)
    array.flags.writeable = False
    before = array.tobytes()
    assert uqff.quantize(array, kind) == uqff.quantize(weight, kind)
    assert array.tobytes() == before


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (np.zeros((2, 32)), "an array of float64"),
        (np.zeros((2, 32), np.int32), "an array of int32"),
        ([[1.0] * 32], "list"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_weight_is_refused(given: Any, got: str) -> None:
    with pytest.raises(UnsupportedError, match=rf"expected a torch\.Tensor, or a numpy array .*, got {got}"):
        uqff.quantize(given, "q8_0")


def test_an_empty_array_has_a_wrong_shape() -> None:
    with pytest.raises(ShapeError, match=r"got \[0, 32\]"):
        uqff.quantize(np.zeros((0, 32), np.float32), "q8_0")


@pytest.mark.parametrize("kind", ["q4k", "hqq4", "fp8", "afq4", "unquant", "q8_0"])
def test_the_weight_is_left_alone(kind: str) -> None:
    weight = weight_of(4, 256)
    before = weight.clone()
    uqff.quantize(weight, kind)
    assert torch.equal(weight, before)


def test_strided_weights_and_parameters_are_taken() -> None:
    weight = weight_of(256, 8).T
    assert not weight.is_contiguous()
    expected = uqff.quantize(weight.contiguous(), "q4k")
    assert uqff.quantize(weight, "q4k") == expected
    assert uqff.quantize(torch.nn.Parameter(weight), "q4k") == expected


def test_fallbacks_are_reported() -> None:
    """To the callback if there is one, else as a warning; what fits says nothing."""
    heard: list[Fallback] = []
    record = uqff.quantize(weight_of(4, 96), 4, module="mlp.down", on_fallback=heard.append)
    assert record.kind == "q4_1"
    assert heard == [Fallback("mlp.down", "q4k", "q4_1", (4, 96), "the last dimension is not a multiple of 256")]
    assert str(heard[0]) == "mlp.down: q4k -> q4_1, shape [4, 96]: the last dimension is not a multiple of 256"
    with pytest.warns(uqff.FallbackWarning, match=r"^afq4 -> unquant, shape \[4, 96\]: .* not a multiple of 64$"):
        uqff.quantize(weight_of(4, 96), "afq4")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uqff.quantize(weight_of(4, 256), "q4k")


@pytest.mark.parametrize("dtype", LOAD_DTYPES)
def test_what_fallbacks_store(dtype: torch.dtype) -> None:
    """The F32 of ggml is float32 whatever was loaded; an unquantised weight stays in the load dtype."""
    weight = weight_of(4, 40, dtype=dtype)
    with pytest.warns(uqff.FallbackWarning):
        dense = uqff.quantize(weight, "q4_0")
    assert isinstance(dense, GGUF)
    assert dense.data.numpy().tobytes() == weight.float().numpy().tobytes()
    with pytest.warns(uqff.FallbackWarning):
        plain = uqff.quantize(weight, "afq4")
    assert isinstance(plain, Unquant)
    assert (plain.weight.dtype, torch.equal(plain.weight, weight)) == (dtype, True)


def test_weights_that_cannot_be_quantised() -> None:
    for weight, problem in [
        (torch.zeros(2, 32, dtype=torch.float64), r"expected float32, float16, bfloat16, got torch\.float64"),
        (torch.zeros(2, 32, dtype=torch.int8), r"got torch\.int8"),
        (torch.zeros(2, 32, device="meta"), "expected cpu, got meta"),
    ]:
        with pytest.raises(UnsupportedError, match=problem):
            uqff.quantize(weight, "q8_0")
    with pytest.raises(UnsupportedError, match=r"got torch\.float64"):
        uqff.quantize(torch.zeros(2, 32), "q8_0", dtype=torch.float64)


V1 = json.loads((GOLDEN / "v1" / "MANIFEST.json").read_text())["directories"]


@pytest.mark.parametrize("directory", V1)
def test_f8q8_and_mxfp4_are_the_clients(directory: str) -> None:
    """The types that no pre-1.0 client on PyPI writes, against the parts that the 0.9.5 client stores."""
    case = V1[directory]
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[case["dtype"]]
    tensors = {name: torch.from_numpy(value) for name, value in TinyModel(**case["model"]).tensors().items()}
    compared = 0
    for name in case["files"]:
        if not name.endswith(".uqff"):
            continue
        file = MappedFile(GOLDEN / "v1" / directory / name)
        stored = TensorMap([file])
        for key in (key.removesuffix(".weight.format") for key in stored if key.endswith(".weight.format")):
            record = uqff.quantize(tensors[f"{key}.weight"], name.removesuffix("-0.uqff"), dtype=dtype)
            parts = {f"{key}.weight": record.blocks.reshape(-1)} if isinstance(record, F8Q8) else {}
            if isinstance(record, MXFP4):
                parts = {f"{key}.weight": record.blocks, f"{key}.weight.scales": record.scales}
            assert parts
            for part, ours in parts.items():
                assert torch.equal(ours, stored[part]), part
            compared += 1
            bias = stored.get(f"{key}.bias")
            if bias is not None:
                ours_bias = cast_bias(tensors[f"{key}.bias"], record, dtype, version=(1, 2, 0), engine_biases=True)
                assert (ours_bias.dtype, torch.equal(ours_bias, bias)) == (bias.dtype, True)
    assert compared >= 8


def test_importing_quantize_imports_neither_torch_nor_numba() -> None:
    code = "import sys; from uqff.quantization.types import plan; plan(4, (2, 96)); "
    code += "print({'torch', 'numba'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_automatic_choices_are_types() -> None:
    assert set(automatic_kinds().values()) <= set(KINDS)
    assert isinstance(uqff.quantize(weight_of(2, 256), 8), GGUF)
    assert isinstance(uqff.quantize(weight_of(2, 256), "fp8"), FP8)


def test_promotion_table() -> None:
    """What stays is hqq, fp8, f8q8 and mxfp4; a promoted type is promoted no further, but for q6k and afq6."""
    promotions = {kind: better for record in families() for kind, better in record.PROMOTED.items()}
    assert set(KINDS) - promotions.keys() == {"hqq4", "hqq8", "fp8", "f8q8", "mxfp4"}
    assert {kind for kind in promotions.values() if promotions[kind] != kind} == {"q6k", "afq6"}
