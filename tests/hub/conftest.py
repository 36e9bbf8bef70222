"""A hub on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub_server import TOKEN, Hub, serving


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """It, with nothing in it; ``huggingface_hub`` has a token for it."""
    with serving(monkeypatch, tmp_path / "cache", TOKEN) as made:
        yield made
