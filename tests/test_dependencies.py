"""Bounds of the dependencies: what `make test-oldest` installs, and what is pinned for development."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.oldest import oldest

ROOT = Path(__file__).resolve().parents[1]

PYPROJECT = (ROOT / "pyproject.toml").read_text()


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split(".post")[0]))


def test_every_dependency_has_a_lower_bound() -> None:
    """Of the package and all extras, markers kept; another version where one is asked for."""
    lines = oldest(PYPROJECT)
    assert {"numpy==1.26", "torch==2.4", "transformers==4.51", "huggingface_hub==0.30", "gguf==0.16"} <= set(lines)
    assert [line for line in lines if line.startswith("click")] == ["click==8.2"], "the highest of several"
    assert "mlx==0.29 ; sys_platform == 'darwin'" in lines
    assert "torch==2.13.0" in oldest(PYPROJECT, {"torch": "2.13.0"})
    with pytest.raises(ValueError, match=r'^"numpy" has no lower bound$'):
        oldest(PYPROJECT.replace('"numpy>=1.26"', '"numpy"'))


def test_pins_are_within_the_bounds() -> None:
    """What the project is developed with is what it asks for."""
    bounds = {line.split("==")[0]: line.split("==")[1].split(" ")[0] for line in oldest(PYPROJECT)}
    pins = re.findall(r"^([\w-]+)==([^ \n]+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert bounds.keys() <= {name for name, _ in pins}
    assert [name for name, pin in pins if name in bounds and version(pin) < version(bounds[name])] == []
