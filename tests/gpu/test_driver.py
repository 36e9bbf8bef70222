"""How kernels are loaded, by a driver that only remembers what it was asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from uqff.gpu import driver


class Asked:
    """A driver of which all calls succeed."""

    def __init__(self, context: int | None) -> None:
        self.context, self.calls = context, list[str]()

    def __getattr__(self, name: str) -> Any:
        def call(*given: Any) -> int:
            self.calls.append(name)
            if name == "cuCtxGetCurrent":
                given[0]._obj.value = self.context
            if name == "cuDevicePrimaryCtxRetain":
                given[0]._obj.value = 5
            if name == "cuCtxSetCurrent":
                self.context = given[0].value
            return 0

        return call


@pytest.mark.parametrize("context", [7, None])
def test_a_thread_that_has_not_used_the_device_takes_torchs_context(
    context: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that torch holds already is given to it without any: modules could not be loaded."""
    asked = Asked(context)
    monkeypatch.setattr(driver, "_driver", lambda: asked)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    driver.load(b"", torch.device("cuda", 0))
    assert asked.context == (context or 5)
    assert ("cuDevicePrimaryCtxRetain" in asked.calls) == (context is None)
    assert asked.calls.index("cuModuleLoadData") == (1 if context else 4)
