"""Run the tests of kernels and products as on other CPUs: with features of this one hidden. Exit 1 if any fails.

    python -m tools.cpus                       # make cpus
    python -m tools.cpus --only x86-64-v2      # one of them
    python -m tools.cpus -- -x tests/simd   # with other arguments for pytest

numba compiles for what `NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES` say, and the package looks at the same list to choose
between a CPU's instruction and what does without; torch and MKL choose by `ATEN_CPU_CAPABILITY` and
`MKL_ENABLE_INSTRUCTIONS`. Features can be hidden, not added: AVX-512 is tested on a machine that has it only.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import click
from llvmlite import binding
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
KERNELS = (
    *("tests/simd", "tests/families", "tests/codec/test_blob.py", "tests/container/test_golden_v0.py"),
    "tests/parallel/test_product_cpu.py",
)
PRODUCTS = ("tests/parallel/test_linear.py", "tests/parallel/test_experts.py", "tests/parallel/test_model.py")


def host_without(*prefixes: str) -> dict[str, str]:
    """What this CPU has, but for the features whose names begin so."""
    features = binding.get_host_cpu_features()
    kept = {name: has and not name.startswith(prefixes) for name, has in features.items()}
    listed = ",".join(f"{'+' if has else '-'}{name}" for name, has in sorted(kept.items()))
    return {"NUMBA_CPU_NAME": binding.get_host_cpu_name(), "NUMBA_CPU_FEATURES": listed}


def settings() -> dict[str, tuple[dict[str, str], tuple[str, ...]]]:
    """Environment and tests by name; those of x86-64 there only."""
    found: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
        "generic": ({"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}, KERNELS)
    }
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return found
    third = "+sse4.2,+avx,+avx2,+bmi,+bmi2,+f16c,+fma,+lzcnt,+movbe,+popcnt"
    return found | {
        "x86-64-v2": ({"NUMBA_CPU_NAME": "x86-64-v2", "NUMBA_CPU_FEATURES": ""}, KERNELS),
        "x86-64-v3": ({"NUMBA_CPU_NAME": "x86-64-v3", "NUMBA_CPU_FEATURES": third}, KERNELS),
        "without AVX-512": (host_without("avx512", "evex512", "prefer-256-bit"), KERNELS),
        "without BF16": (host_without("avx512bf16"), KERNELS),
        "without F16C": (host_without("f16c", "avx512"), KERNELS),
        "without FMA": (host_without("fma", "avx512"), KERNELS),
        "torch default": ({"ATEN_CPU_CAPABILITY": "default"}, KERNELS + PRODUCTS),
        "torch avx2": ({"ATEN_CPU_CAPABILITY": "avx2"}, KERNELS + PRODUCTS),
        "MKL SSE4.2": ({"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, PRODUCTS),
        "MKL AVX2": ({"MKL_ENABLE_INSTRUCTIONS": "AVX2"}, PRODUCTS),
        "oneDNN SSE4.1": ({"ONEDNN_MAX_CPU_ISA": "SSE41"}, PRODUCTS),
    }


@click.command()
@click.option("--only", multiple=True, type=click.Choice([*settings()]), help="Only these.")
@click.argument("arguments", nargs=-1)
def main(only: tuple[str, ...], arguments: tuple[str, ...]) -> None:
    """Run the tests with features of this CPU hidden; ARGUMENTS go to pytest in place of the tests."""
    console = Console()
    table = Table("this CPU as", "tests", "seconds", "result", title=binding.get_host_cpu_name())
    failed = False
    for name, (environment, tests) in settings().items():
        if only and name not in only:
            continue
        start = time.monotonic()
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", *(arguments or tests)]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False, capture_output=True)
        output = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
        last = (output.splitlines() or [""])[-1].strip("= ")
        told = last if done.returncode in (0, 1) else f"ended with {done.returncode}: {last}"  # 1: tests failed
        if done.returncode:
            failed = True
            shown = " ".join(f"{key}={value!r}" for key, value in environment.items())
            console.print(f"{name} ({shown}):", output, markup=False)
        colour = "red" if done.returncode else "green"
        seconds = f"{time.monotonic() - start:.0f}"
        table.add_row(name, " ".join(arguments or tests), seconds, f"[{colour}]{told}[/{colour}]")
    console.print(table)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
