"""Importance matrices: three forms of file, by bytes and by llama.cpp's own package; names; what is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import uqff
from uqff.errors import FormatError, ShapeError, UnsupportedError, UqffError
from uqff.importance.matrix import Importance, InputSquares
from uqff.importance.names import entry_name, module_name

Q, EXPERTS = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.experts.down_proj"


def squares(rows: list[list[float]], counts: list[int]) -> InputSquares:
    return InputSquares(np.array(rows, np.float32), np.array(counts, np.int64))


@pytest.fixture
def importance() -> Importance:
    """A matrix, two experts of which one has no tokens, and a head."""
    entries = {
        Q: squares([[1024, 2048, 0]], [1024]),
        EXPERTS: squares([[256, 512], [0, 0]], [512, 0]),
        "lm_head": squares([[3, 6]], [3]),
    }
    return Importance(entries, chunk=512, datasets=["a text"])


def test_gguf(importance: Importance, tmp_path: Path) -> None:
    """The gguf package reads what llama.cpp's tool would write; and what it writes is read."""
    importance.save(tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    assert {name: each.tolist() for name, each in found.items()} == {
        "blk.0.attn_q.weight.in_sum2": [[1024, 2048, 0]],
        "blk.0.attn_q.weight.counts": [[1024]],
        "blk.1.ffn_down_exps.weight.in_sum2": [[256, 512], [0, 0]],
        "blk.1.ffn_down_exps.weight.counts": [[512], [0]],
        "output.weight.in_sum2": [[3, 6]],
        "output.weight.counts": [[3]],
    }
    fields = {name: reader.fields[name].contents() for name in reader.fields}
    assert (fields["general.type"], fields["imatrix.datasets"]) == ("imatrix", ["a text"])
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (2, 512)

    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", arch="", use_temp_file=False)
    writer.add_type("imatrix")
    writer.add_uint32("imatrix.chunk_size", 128)
    for name, data in found.items():
        writer.add_tensor(name, np.array(data))
    writer.add_tensor("odd.weight.in_sum2", np.ones((1, 2), np.float32))
    writer.add_tensor("odd.weight.counts", np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = Importance.open(tmp_path / "theirs.gguf")
    assert (theirs.chunk, set(theirs)) == (128, {*importance, "odd.weight"})
    for key, each in importance.items():
        assert (theirs[key].sums == each.sums).all()
        assert (theirs[key].counts == each.counts).all()


def entry(code: str, name: str, *numbers: int, values: list[float]) -> bytes:
    return (
        struct.pack(f"<{code}", len(name))
        + name.encode()
        + struct.pack(f"<{len(numbers)}{code}{code}{len(values)}f", *numbers, len(values), *values)
    )


def test_older_form_and_the_engines(importance: Importance, tmp_path: Path) -> None:
    """Byte for byte: means times chunks, 1 for experts without tokens; means by paths."""
    importance.save(tmp_path / "m.imatrix")
    older = struct.pack("<i", 3)
    older += entry("i", "blk.0.attn_q.weight", 2, values=[2, 4, 0])
    older += entry("i", "blk.1.ffn_down_exps.weight", 1, values=[0.5, 1, 1, 1])
    older += entry("i", "output.weight", 1, values=[1, 2])
    older += struct.pack("<ii6s", 2, 6, b"a text")
    assert (tmp_path / "m.imatrix").read_bytes() == older
    importance.save(tmp_path / "m.cimatrix")
    engines = struct.pack("<Q", 3)
    engines += entry("Q", Q, values=[1, 2, 0])
    engines += entry("Q", EXPERTS, values=[0.5, 1, 0, 0])
    engines += entry("Q", "lm_head", values=[1, 2])
    assert (tmp_path / "m.cimatrix").read_bytes() == engines
    for name in ("m.imatrix", "m.cimatrix"):
        back = Importance.open(tmp_path / name)
        assert set(back) == set(importance)
        assert back.datasets == (("a text",) if name == "m.imatrix" else ())
        for module, shape in ((Q, (5, 3)), ("lm_head", (7, 2))):
            assert np.array_equal(back.of(module, shape), importance.of(module, shape))  # type: ignore[arg-type]
        assert back.of(EXPERTS, (2, 3, 2)).shape == (2, 2)  # type: ignore[union-attr]


def test_a_layer_without_tokens_is_left_out(tmp_path: Path) -> None:
    """Of the older form, as llama.cpp does it, which would divide by no calls; GGUF has counts, of which 0 is one."""
    entries = {Q: InputSquares(np.ones((1, 3), np.float32), np.array([512]))}
    entries["lm_head"] = InputSquares(np.zeros((1, 2), np.float32), np.array([0]))
    for name, kept in (("m.imatrix", {Q}), ("m.gguf", {Q, "lm_head"})):
        Importance(entries).save(tmp_path / name)
        assert set(Importance.open(tmp_path / name)) == kept


def test_importance_of_a_module(importance: Importance) -> None:
    """By whatever name; experts without tokens count as the mean of the others; an expert by itself has its row."""
    assert importance.of(EXPERTS, (2, 3, 2)).tolist() == [[0.5, 1], [0.5, 1]]  # type: ignore[union-attr]
    assert importance.of("model.layers.1.block_sparse_moe.experts.0.w2", (3, 2)).tolist() == [0.5, 1]  # type: ignore[union-attr]
    assert importance.of("model.embed_tokens", (9, 2)) is None
    assert importance.of("model.embed_tokens", (9, 2), tied=True).tolist() == [1, 2]  # type: ignore[union-attr]
    assert importance.of("model.layers.7.mlp.up_proj", (9, 2)) is None
    with pytest.raises(ShapeError, match=r"importance does not fit the weight: expected \[4\], got \[1, 3\]"):
        importance.of(Q, (4, 4))


def test_names() -> None:
    """Both ways for what Llama and Qwen have; Mixtral's experts have their own words."""
    for entry_, module in (
        ("output.weight", "lm_head"),
        ("blk.3.attn_output.weight", "model.layers.3.self_attn.o_proj"),
        ("blk.3.ffn_gate.weight", "model.layers.3.mlp.gate_proj"),
        ("blk.3.ffn_gate_inp.weight", "model.layers.3.mlp.gate"),
        ("blk.3.ffn_up_exps.weight", "model.layers.3.mlp.experts.up_proj"),
    ):
        assert (entry_name(module), module_name(entry_)) == (entry_, module)
    assert entry_name("model.layers.3.block_sparse_moe.experts.5.w3") == "blk.3.ffn_up_exps.weight"
    assert entry_name("model.layers.3.mlp.switch_mlp.gate_proj") == "blk.3.ffn_gate_exps.weight"
    assert entry_name("model.norm") is module_name("output_norm.weight") is None


@pytest.mark.parametrize(
    ("architecture", "module"),
    [
        (gguf.MODEL_ARCH.PHI2, "self_attn.dense"),
        (gguf.MODEL_ARCH.PHI2, "mlp.fc1"),
        (gguf.MODEL_ARCH.PHI2, "mlp.fc2"),
        (gguf.MODEL_ARCH.PHI3, "mlp.gate_up_proj"),
        (gguf.MODEL_ARCH.STARCODER2, "mlp.c_fc"),
        (gguf.MODEL_ARCH.STARCODER2, "mlp.c_proj"),
        (gguf.MODEL_ARCH.DEEPSEEK2, "self_attn.q_a_proj"),
        (gguf.MODEL_ARCH.DEEPSEEK2, "self_attn.kv_a_proj_with_mqa"),
        (gguf.MODEL_ARCH.DEEPSEEK2, "self_attn.kv_b_proj"),
        (gguf.MODEL_ARCH.DEEPSEEK2, "mlp.shared_experts.up_proj"),
        (gguf.MODEL_ARCH.QWEN3NEXT, "mlp.shared_expert.gate_proj"),
        (gguf.MODEL_ARCH.QWEN35, "linear_attn.in_proj_qkv"),
        (gguf.MODEL_ARCH.QWEN35, "linear_attn.in_proj_z"),
        (gguf.MODEL_ARCH.QWEN35, "linear_attn.in_proj_a"),
        (gguf.MODEL_ARCH.QWEN35, "linear_attn.in_proj_b"),
        (gguf.MODEL_ARCH.QWEN35, "linear_attn.out_proj"),
        (gguf.MODEL_ARCH.LFM2, "conv.in_proj"),
        (gguf.MODEL_ARCH.LFM2, "conv.out_proj"),
        (gguf.MODEL_ARCH.LFM2, "feed_forward.w1"),
        (gguf.MODEL_ARCH.LFM2, "self_attn.out_proj"),
        (gguf.MODEL_ARCH.GRANITE_HYBRID, "mamba.in_proj"),
        (gguf.MODEL_ARCH.GRANITE_HYBRID, "shared_mlp.output_linear"),
        (gguf.MODEL_ARCH.HUNYUAN_MOE, "mlp.shared_mlp.down_proj"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_names_of_other_architectures(architecture: Any, module: str) -> None:
    """As llama.cpp's own converter maps them: their layers were left out of its two forms before."""
    path = f"model.layers.1.{module}"
    assert entry_name(path) == f"{gguf.get_tensor_name_map(architecture, 2).get_name(path)}.weight"


def test_no_layer_is_lost(tmp_path: Path) -> None:
    """What llama.cpp has no name for keeps its path in its forms; joined matrices stand under the name of each."""
    odd, joined = "model.layers.0.odd.mixer", "model.layers.0.shared_mlp.input_linear"
    importance = Importance(
        {
            odd: squares([[512, 1024]], [512]),
            joined: squares([[1536, 512]], [512]),
            "model.embed_tokens": squares([[512, 0]], [512]),
        }
    )
    for name in ("m.gguf", "m.imatrix", "m.cimatrix"):
        importance.save(tmp_path / name)
        back = Importance.open(tmp_path / name)
        assert back.of(odd, (3, 2)).tolist() == [1, 2]  # type: ignore[union-attr]
        assert back.of(joined, (3, 2)).tolist() == [3, 1]  # type: ignore[union-attr]
        assert back.of("lm_head", (3, 2), tied=True).tolist() == [1, 0]  # type: ignore[union-attr]
    assert {"blk.0.ffn_gate_shexp.weight", "blk.0.ffn_up.weight"} <= {
        entry_name(key) or key for key in Importance.open(tmp_path / "m.gguf")
    }


def test_experts_that_stand_singly(tmp_path: Path) -> None:
    """They are one entry of llama.cpp's, and rows of a stack; numbers far beyond those that are there are refused."""
    path = "model.layers.0.mlp.experts.{}.down_proj"
    importance = Importance({path.format(0): squares([[1, 2]], [1]), path.format(2): squares([[3, 8]], [1])})
    wanted = [[1, 2], [2, 5], [3, 8], [2, 5]]
    assert importance.of("model.layers.0.mlp.experts.down_proj", (4, 3, 2)).tolist() == wanted  # type: ignore[union-attr]
    importance.save(tmp_path / "m.gguf")
    back = Importance.open(tmp_path / "m.gguf")
    assert back["model.layers.0.mlp.experts.down_proj"].sums.tolist() == [[1, 2], [0, 0], [3, 8]]
    assert back["model.layers.0.mlp.experts.down_proj"].counts.tolist() == [1, 0, 1]
    assert importance.of(path.format(2), (3, 2)).tolist() == [3, 8]  # type: ignore[union-attr]
    assert importance.of("model.layers.0.block_sparse_moe.experts.2.w2", (3, 2)).tolist() == [3, 8]  # type: ignore[union-attr]
    far = Importance({path.format(0): squares([[1, 2]], [1]), path.format(10**8): squares([[3, 8]], [1])})
    with pytest.raises(ShapeError, match="most experts are missing: expected 100000001, got 2"):
        far.save(tmp_path / "far.gguf")


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.dat", struct.pack("<i", 0), "no entries"),
        ("a.dat", struct.pack("<i", -1), "number of entries out of range"),
        ("a.dat", struct.pack("<ii", 1, 70000), "length of a name out of range"),
        (
            "a.dat",
            struct.pack("<i", 1) + entry("i", "n", 1, values=[1.0])[:-1],
            "truncated: expected 4 bytes, got 3 left",
        ),
        ("a.dat", struct.pack("<i", 1) + entry("i", "n", 1, values=[-1.0]), "not sums of squares"),
        ("a.dat", struct.pack("<i", 1) + entry("i", "n", 1, values=[float("nan")]), "not sums of squares"),
        ("a.dat", struct.pack("<i", 2) + 2 * entry("i", "n", 1, values=[1.0]), "entry occurs twice"),
        ("a.cimatrix", struct.pack("<Q", 1) + entry("Q", "n", values=[1.0]) + b"x", "bytes behind the last entry"),
        ("a.cimatrix", struct.pack("<QQ", 1, 2**63), "length of a name out of range"),
        ("a.gguf", b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "GGUF file holds no importance matrix"),
    ],
)
def test_refused(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(FormatError, match=message) as caught:
        uqff.Importance.open(tmp_path / name)
    assert caught.value.file == str(tmp_path / name)


def test_any_truncation_is_refused(importance: Importance, tmp_path: Path) -> None:
    """None is read as something shorter, but where llama.cpp's older form ends early itself."""
    for name in ("m.imatrix", "m.cimatrix"):
        importance.save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        tail = (len(whole) - 14, len(whole) - 10) if name == "m.imatrix" else ()
        for length in range(len(whole)):
            if length not in tail:
                (tmp_path / name).write_bytes(whole[:length])
                with pytest.raises(UqffError):
                    Importance.open(tmp_path / name)
    with pytest.raises(UnsupportedError, match="unknown form"):
        importance.save(tmp_path / "m.txt")


def test_an_expert_by_itself_of_a_file_that_does_not_tell_how_many_there_are(tmp_path: Path) -> None:
    """The engine's form has the inputs of all experts in one row: each expert gets its own."""
    name = "model.layers.0.mlp.experts.down_proj"
    sums = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    Importance({name: InputSquares(sums, np.ones(3, np.int64))}).save(tmp_path / "m.cimatrix")
    found = Importance.open(tmp_path / "m.cimatrix")
    assert found[name].sums.shape == (1, 12)
    for expert in range(3):
        one = found.of(f"model.layers.0.mlp.experts.{expert}.down_proj", (8, 4))
        assert one is not None
        assert np.array_equal(one / one[0], sums[expert] / sums[expert, 0])
    with pytest.raises(ShapeError, match="importance does not fit"):
        found.of("model.layers.0.mlp.experts.0.down_proj", (8, 5))
