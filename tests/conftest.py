"""Settings of the whole suite: how hypothesis searches, how threads wait, what comes first, and what needs a GPU."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# Torch's threads spin while they wait for each other. Where several processes share few cores, this takes most of what
# there is: of tests of models, three quarters of the processor time and more. OpenMP asks once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Those of numpy's BLAS cannot be told, and have little to share in matrices of tests. It asks when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("deep", deadline=None, max_examples=3000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with the mark ``cuda`` need such a device. Files with the mark ``long`` come first.

    A file has one process (the Makefile tells xdist so): begun last, a long one would run when all others are done.
    """
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    marked = [item for item in items if item.get_closest_marker("cuda")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
