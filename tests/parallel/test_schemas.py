"""The schemas of our operators, which torch 2.4 cannot read off their annotations."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from uqff.parallel import collectives, product, weight

infer_schema = getattr(torch.library, "infer_schema", None)
OPERATORS = (
    *(collectives.sum_ranks, collectives.copy_ranks, collectives.gather_ranks),
    *(weight.dequantize, product.linear, product.gather_linear),
)


@pytest.mark.skipif(infer_schema is None, reason="torch before 2.5 has no public infer_schema")
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda each: each._name)
def test_a_given_schema_is_that_of_the_annotations(operator: Any) -> None:
    """Written by hand, it cannot drift from the function."""
    assert infer_schema is not None
    inferred = infer_schema(operator._init_fn, mutates_args=())
    assert str(operator._opoverload._schema) == f"{operator._qualname}{inferred}"


def test_nothing_is_read_off_annotations() -> None:
    """Importing the package works where torch cannot do that: with 2.4 it failed."""
    code = (
        "import torch\n"
        "def fail(*_, **__): raise ValueError('unsupported type')\n"
        "torch.library.infer_schema = fail\n"
        "import uqff.parallel.linear\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
