"""An eighth family, made up and living in this file alone: int8 codes with one float32 scale a row.

Nothing else knows of it, and everything works with it: both generations, every command, slices, stacks, layers on two
ranks, the tables of the specification.  So a new family is one folder and one line in ``uqff/families/__init__.py``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import uqff
from uqff import DType, Family, FormatError, Layer, UnsupportedError, Version
from uqff.checkpoints.safetensors import open_tensors
from uqff.cli import main
from uqff.families import QuantizedTensor, families, registered, stack
from uqff.families.biases import BiasRule
from uqff.families.encoding import AS_ENGINE, GROUP, Effort, Engine
from uqff.families.loaded import Loaded
from uqff.families.part import Part
from uqff.families.payload import PayloadProblem, not_finite
from uqff.families.slicing import join_parts, narrow_parts
from uqff.families.stacking import stack_parts, unstack_parts
from uqff.quantization.types import kind_name, kinds
from uqff.schema.bricks import Scope, Violation
from uqff.schema.entries import Entries, Entry
from uqff.schema.header import BIAS_FLAG, blob_layout
from uqff.schema.layout import Layout
from uqff.schema.tensor import TENSOR

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "parallel"), str(ROOT / "tools")]

from tests.parallel.ranks import run_ranks  # noqa: E402
from tools.tiny.models import TinyModel  # noqa: E402

if TYPE_CHECKING:
    from typing_extensions import Self

    from uqff.parallel.comm import Comm


@dataclass(frozen=True, eq=False, repr=False)
class Toy8(QuantizedTensor):
    """Rows of int8 codes.

    Attributes:
        codes: uint8 ``[..., out, in]``, the bytes of int8.
        scales: float32 ``[..., out, 1]``.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    family: ClassVar[Family] = Family(7, "Toy8", Version(0, 2, 0))
    LAYOUT: ClassVar[Layout] = blob_layout(
        family,
        "bias_flag" / BIAS_FLAG * "1 if a bias follows at the end, else 0",
        "codes" / TENSOR * "the codes, U8 `[..., out, in]`, int8 each",
        "scales" / TENSOR * "scale of each row, F32 `[..., out, 1]`",
    )
    ENTRIES: ClassVar[Entries] = Entries(
        LAYOUT,
        Entry("weight", "codes", (DType.U8,), ("...", "in")),
        Entry("weight.row_scales", "scales", (DType.F32,), ("...", "1")),
    )
    BIAS: ClassVar[BiasRule] = BiasRule()
    KINDS: ClassVar[tuple[str, ...]] = ("toy8",)
    BY_EXPERT: ClassVar[bool] = True

    @classmethod
    def planned(cls, kind: str, shape: Sequence[int], dtype: DType, group_size: int = GROUP) -> Self:
        """See :meth:`Encoding.planned`."""
        return cls.made_of(codes=Part.planned(shape, DType.U8), scales=Part.planned((*shape[:-1], 1), DType.F32))

    @classmethod
    def encode(
        cls, loaded: Loaded, kind: str, *, engine: Engine, group_size: int = GROUP, effort: Effort = AS_ENGINE
    ) -> Self:
        """See :meth:`Encoding.encode`."""
        w = loaded.values
        scales = (np.abs(w).max(-1, keepdims=True) / np.float32(127)).astype(np.float32)
        codes = np.rint(w / np.where(scales == 0, np.float32(1), scales)).astype(np.int8)
        return cls.made_of(codes=Part.of_array(codes, DType.U8), scales=Part.of_array(scales, DType.F32))

    @classmethod
    def widened(cls, weights: int) -> int:
        """All."""
        return weights

    @property
    def kind(self) -> str:
        """Always ``toy8``."""
        return "toy8"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the codes."""
        return self.parts["codes"].shape

    @classmethod
    def parse(cls, blob: Scope) -> Self:
        """See :meth:`QuantizedTensor.parse`."""
        return cls.made_of(codes=Part.of_fields(blob["codes"]), scales=Part.of_fields(blob["scales"]))

    def build(self) -> dict[str, Any]:
        """See :meth:`QuantizedTensor.build`."""
        return {name: part.fields() for name, part in self.parts.items()}

    @staticmethod
    def validate(blob: Scope) -> None:
        """One scale a row."""
        codes, scales = blob["codes"], blob["scales"]
        if scales["shape"] != (*codes["shape"][:-1], 1):
            raise Violation("one scale a row", field="scales.shape", expected=codes["shape"], got=scales["shape"])

    @staticmethod
    def check_payload(blob: Scope) -> Iterator[PayloadProblem]:
        """Scales are finite."""
        yield from not_finite(blob["scales"], "scales.data")

    def _dequantize(self) -> torch.Tensor:
        return self.codes.view(torch.int8).to(torch.float32) * self.scales

    def alignment(self, dim: int) -> int:
        """1."""
        self._dim(dim)
        return 1

    def _narrow(self, dim: int, start: int, length: int) -> Self:
        scales = {} if dim == len(self.shape) - 1 else {"scales": 1}
        return narrow_parts(self, dim, start, length, 1, codes=1, **scales)

    def _join(self, slices: list[tuple[int, Self]], dim: int) -> Self:
        return join_parts(slices, dim, *(["codes"] if dim == len(self.shape) - 1 else ["codes", "scales"]))

    @classmethod
    def _stack(cls, records: list[Self]) -> Self:
        return stack_parts(records, "codes", "scales")

    def _unstack(self) -> Self:
        return unstack_parts(self, "codes", "scales")

    LAYER_NAME: ClassVar[str] = "toy8-layer"

    @property
    def nominal_dtype(self) -> DType:
        """F32."""
        return DType.F32

    def resized(self, outputs: int) -> Self:
        """See :meth:`LayerRules.resized`."""
        return self.planned(self.kind, (outputs, *self.shape[1:]), DType.F32)


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    with registered(Toy8):
        yield


def weight_of(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_it_is_known_as_long_as_it_is_registered() -> None:
    """By number, by name, by the names of its types; twice it is refused, and so is a byte that is taken."""
    assert Family.of_code(7) is Family["TOY8"] is Family.TOY8 is Toy8.family
    assert families()[-1] is Toy8
    assert kinds()[-1] == kind_name("TOY8") == "toy8"
    with pytest.raises(ValueError, match="there is a family with types of that name: toy8"), registered(Toy8):
        pass


def test_it_is_forgotten() -> None:
    """A blob of it is then of an unknown type."""
    blob = uqff.serialize(uqff.quantize(weight_of(2, 32), "toy8"))
    uqff.families._EXTRA.remove(Toy8)
    uqff.codes.remove_family(Toy8.family)
    try:
        assert [family.name for family in Family][-1] == "MXFP4"
        with pytest.raises(UnsupportedError, match=r"unknown type.*6 MXFP4, got 7"):
            uqff.deserialize(blob)
        with pytest.raises(UnsupportedError, match="unknown type"):
            uqff.quantize(weight_of(2, 32), "toy8")
    finally:
        uqff.families._EXTRA.append(Toy8)
        uqff.codes.add_family(Toy8.family)


def test_blobs() -> None:
    """By hand: header, flag, two tensor records; and back."""
    weight = Toy8(torch.tensor([[1, 254], [127, 0]], dtype=torch.uint8), torch.tensor([[0.5], [2.0]]))
    blob = uqff.serialize(weight)
    expected = bytes([0, 2, 0, 0, 7, 0])
    expected += b"".join(n.to_bytes(4, "little") for n in (4, 0, 2, 2, 2)) + bytes([1, 254, 127, 0])
    expected += b"".join(n.to_bytes(4, "little") for n in (8, 6, 2, 2, 1)) + np.array([0.5, 2], "<f4").tobytes()
    assert blob == expected
    back = uqff.deserialize(blob).weight
    assert back == weight
    assert back.dequantize().tolist() == [[0.5, -1.0], [254.0, 0.0]]
    assert (back.kind, back.shape, back.nbytes) == ("toy8", (2, 2), 12)
    with pytest.raises(UnsupportedError, match="Toy8 blobs did not exist yet"):
        uqff.serialize(weight, version=Version(0, 1, 3))
    with pytest.raises(FormatError, match="one scale a row"):
        uqff.serialize(Toy8(weight.codes, torch.ones(3, 1)))


@pytest.mark.parametrize("version", [(0, 2, 0), (1, 0, 0), (1, 2, 0)])
def test_files(version: tuple[int, int, int], tmp_path: Path) -> None:
    """Saved and opened in both generations, biases and stacks too."""
    layers = {
        "a.b": Layer(uqff.quantize(weight_of(4, 32), "toy8"), torch.ones(4)),
        "a.c": Layer(uqff.quantize(weight_of(3, 4, 32), "toy8")),
    }
    keyed = layers if version >= (1, 0, 0) else dict(enumerate(layers.values()))
    uqff.save(keyed, tmp_path / "m.uqff", version=version)
    with uqff.open(tmp_path / "m.uqff") as file:
        assert list(file.values()) == list(layers.values())


def test_slices_and_stacks() -> None:
    """Cut and joined along every dimension, stacked and taken apart."""
    record = uqff.quantize(weight_of(3, 6, 32), "toy8")
    whole = record.dequantize()
    for dim, size in enumerate(record.shape):
        parts = [(start, record.narrow(dim, start, 1)) for start in range(size)]
        assert all(torch.equal(part.dequantize(), whole.narrow(dim, start, 1)) for start, part in parts)
        assert record.join(parts, dim) == record
    assert stack(record.unstack()) == record
    assert torch.equal(record.dequantize_expert(1), whole[1])


def test_every_command(tmp_path: Path) -> None:
    """Quantised by a recipe beside another type, looked at, verified, compared, hashed, migrated there and back."""
    TinyModel(hidden_size=64, heads=2, intermediate_size=128).write(tmp_path / "source")
    (tmp_path / "recipe.yaml").write_text("'/o_proj/':\n  isq: q8_0\n")
    new, old, back = (tmp_path / name for name in ("new", "old", "back"))
    run("quantize", tmp_path / "source", new, "--isq", "toy8", "--recipe", tmp_path / "recipe.yaml", "--format", "1.1")
    with uqff.open(new) as file:
        stored = {key: layer.weight.kind for key, layer in file.items()}
        for key, layer in file.items():
            with open_tensors(tmp_path / "source") as checkpoint:
                assert layer.weight == uqff.quantize(checkpoint[f"{key}.weight"], layer.weight.kind)
    assert set(stored.values()) == {"toy8", "q8_0"}
    (key, *_) = (key for key, kind in stored.items() if kind == "toy8")
    document = json.loads(run("inspect", new, key, "--hex", "--json"))
    assert json.dumps(document).count("weight.row_scales") >= 1
    run("verify", new, "--deep")
    assert "toy8" in run("report", new)
    compared = json.loads(run("diff", tmp_path / "source", new, "--json"))
    assert {layer["b"]["type"] for layer in compared["layers"]} == {"toy8", "q8_0"}
    assert all(0 < layer["relative_rms"] < 0.02 for layer in compared["layers"])
    run("migrate", new, old, "--to", "0.2")
    run("verify", old, "--deep")
    hexed = json.loads(run("inspect", old, "0", "--hex", "--json"))
    assert json.dumps(hexed).count("Toy8") >= 1
    run("migrate", old, back, "--to", "1.1")
    digests = [json.loads(run("checksum", each, "--layers", "--json"))["model"] for each in (new, old, back)]
    assert digests[0] == digests[1] == digests[2] is not None
    identical = json.loads(run("diff", new, back, "--json"))
    assert identical["identical"] is True


def on_ranks(comm: Comm, matrix: bytes, experts: list[bytes]) -> bool:
    """Row, column, replicated layers and experts; a rank is a process of its own and has to know the family."""
    from uqff.parallel.experts import FusedExperts
    from uqff.parallel.linear import ColumnParallelLayer, ReplicatedLayer, RowParallelLayer

    with registered(Toy8):
        whole = ReplicatedLayer.deserialize(matrix)
        x, weight = weight_of(5, 32, seed=1), whole.dequantize_w()
        half = slice(16 * comm.rank, 16 * comm.rank + 16)
        row, column = RowParallelLayer.deserialize(matrix, comm), ColumnParallelLayer.deserialize(matrix, comm)
        assert (row.name, row.weight.kind) == ("toy8-layer", "toy8")
        assert row.gather_serialize() == column.gather_serialize() == matrix
        assert torch.allclose(row(x[:, half]), whole(x), atol=1e-4)
        outputs = weight[4 * comm.rank : 4 * comm.rank + 4]
        assert torch.equal(column.dequantize_w(), outputs)
        gate, up, down = experts
        alone, split = FusedExperts.deserialize(gate, up, down), FusedExperts.deserialize(gate, up, down, comm)
        indices, weights = torch.tensor([[0, 1]] * 5), torch.full((5, 2), 0.5)
        assert split.gate_proj.gather_serialize() == experts[0]
        assert torch.allclose(split(x, indices, weights), alone(x, indices, weights), atol=1e-3)
        assert whole.add_delta_w(torch.zeros(8, 32)).weight.kind == "toy8"
        with pytest.raises(UnsupportedError, match="toy8 weights are not requantised to q8_0"):
            whole.apply_isq("q8_0")
    return True


def test_layers_and_experts_on_two_ranks() -> None:
    matrix = uqff.serialize(uqff.quantize(weight_of(8, 32), "toy8"))
    shapes = ((2, 8, 32), (2, 8, 32), (2, 32, 8))
    experts = [uqff.serialize(uqff.quantize(weight_of(*shape), "toy8")) for shape in shapes]
    assert run_ranks(2, on_ranks, matrix, experts) == [True, True]


def test_tables_of_the_specification() -> None:
    """Its layout, its entries, its type byte."""
    from tools.vectors import tables as spec_tables

    tables = spec_tables._layout_tables()
    assert "scale of each row" in tables["TOY8.LAYOUT"]()
    assert "`weight.row_scales`" in tables["TOY8.ENTRIES"]()
    assert "7 Toy8" in tables["HEADER"]()
    assert "| 7 | [Toy8](families/toy8.md) | 0.2.0 |" in spec_tables.family_table()
