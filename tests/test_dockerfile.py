"""The Dockerfile, as far as it can be checked without building it: what it copies is there, what it installs exists."""

from __future__ import annotations

import importlib
import re
import sys

import pytest

from tests.support.tiny_files import ROOT


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_what_it_names_is_there() -> None:
    """Files, extras, the entry point, a Python that is supported; what it copies is let through to the build."""
    tomllib = importlib.import_module("tomllib")

    text = (ROOT / "Dockerfile").read_text("utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    copied = [name for line in re.findall(r"^COPY (.*)$", text, re.M) for name in line.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {f"!{name}" for name in copied} <= set((ROOT / ".dockerignore").read_text("utf-8").split())
    (extras,) = re.findall(r'"/src\[([\w,]+)\]"', text)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    (entry,) = re.findall(r'^ENTRYPOINT \["(\w+)"\]$', text, re.M)
    assert entry in project["scripts"]
    (version,) = re.findall(r"^FROM python:([\d.]+)-slim$", text, re.M)
    assert any(version in each for each in project["classifiers"])
