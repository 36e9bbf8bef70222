"""Products of small integers: which instruction makes them on which CPU."""

from __future__ import annotations

import platform
from typing import Any

import pytest
from llvmlite import binding, ir
from numba.core.registry import cpu_target

from uqff.simd import dots


def code(cpu: str, features: str) -> str:
    """What LLVM makes of ``quads`` for a CPU."""
    module = ir.Module()
    bytes_ = ir.VectorType(ir.IntType(8), 32)
    function = ir.Function(module, ir.FunctionType(ir.VectorType(ir.IntType(32), 8), [bytes_] * 2), "quads")
    builder = ir.IRBuilder(function.append_basic_block())
    builder.ret(dots._quads(builder, *function.args))
    target = binding.Target.from_triple("x86_64-unknown-linux-gnu")
    machine = target.create_target_machine(cpu=cpu, features=features)
    return str(machine.emit_assembly(binding.parse_assembly(str(module))))


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="LLVM may know this CPU's code only")
@pytest.mark.parametrize(
    ("cpu", "features", "has"),
    [
        ("haswell", "+avx2", (True, False)),
        ("skylake-avx512", "+avx2,+avx512f,+avx512bw,+avx512vl", (True, False)),
        ("icelake-server", "+avx2,+avx512f,+avx512bw,+avx512vl,+avx512vnni", (True, True)),
        ("znver4", "+avx2,+avx512f,+avx512bw,+avx512vl,+avx512vnni", (True, True)),
        ("alderlake", "+avx2,+avxvnni", (True, True)),
        ("x86-64-v2", "", (False, False)),
    ],
)
def test_one_instruction_where_there_is_one(
    cpu: str, features: str, has: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read off the features; LLVM finds the instruction, whatever its version calls the types."""

    class Codegen:
        def magic_tuple(self) -> tuple[str, str, str]:
            return "x86_64-unknown-linux-gnu", cpu, features

    monkeypatch.setattr(cpu_target.target_context, "codegen", Codegen)
    assert dots._abilities() == has
    for name, value in zip(("HAS_AVX2", "HAS_VNNI"), has, strict=True):
        monkeypatch.setattr(dots, name, value)
    made: Any = code(cpu, features)
    assert ("vpdpbusd" in made, "vpmaddubsw" in made) == (has[1], has[0] and not has[1])
