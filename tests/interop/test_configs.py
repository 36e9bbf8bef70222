"""The comparison of configurations sees what it is there to see: no client is run here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from tools.interop import configs as interop_configs


def test_a_configuration_that_means_something_else_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another base and another scaling; not the other form of the same."""
    cases = {name: interop_configs.CASES[name] for name in ("Llama, llama3", "Qwen3Moe")}
    monkeypatch.setattr(interop_configs, "CASES", cases)
    for number, case in enumerate(cases):
        interop_configs.write(case, tmp_path / str(number))
        for form in ("older", "newer"):
            own = (tmp_path / str(number) / form / "config.json").read_text()
            (tmp_path / str(number) / f"{form}-made").mkdir()
            (tmp_path / str(number) / f"{form}-made" / "config.json").write_text(own)

    path = tmp_path / "0" / "older-made" / "config.json"
    older = json.loads(path.read_text())
    path.write_text(json.dumps({**older, "rope_theta": 5.0, "rope_scaling": {**older["rope_scaling"], "factor": 2.0}}))
    problems = [row.problem for row in interop_configs.check_reader("5", Path(sys.executable), tmp_path)]
    assert problems == ["rope.factor, rope.rope_theta differ", None]
