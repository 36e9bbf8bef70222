"""Parallel layers: which slice of a weight a rank holds, how ranks add up, and the layers made of both.

Names are imported when they are first used: :class:`Shard` is arithmetic and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uqff.parallel.arithmetic import set_arithmetic
    from uqff.parallel.comm import Comm
    from uqff.parallel.experts import FusedExperts, PackedExperts
    from uqff.parallel.gather import ColumnParallelStack, ExpertList, ReplicatedStack, RowParallelStack
    from uqff.parallel.heads import compute_kv_shard, compute_n_kv_groups
    from uqff.parallel.immediate import ImmediateIsq, IsqPool, PendingLayer, QuantizeOntoGuard
    from uqff.parallel.linear import (
        ColumnParallelLayer,
        DistributedKind,
        DummyLayer,
        ReplicatedLayer,
        RowParallelLayer,
    )
    from uqff.parallel.lora import adapted, adapted_stack
    from uqff.parallel.model import load_model
    from uqff.parallel.shard import Shard

__all__ = [
    "ColumnParallelLayer",
    "ColumnParallelStack",
    "Comm",
    "DistributedKind",
    "DummyLayer",
    "ExpertList",
    "FusedExperts",
    "ImmediateIsq",
    "IsqPool",
    "PackedExperts",
    "PendingLayer",
    "QuantizeOntoGuard",
    "ReplicatedLayer",
    "ReplicatedStack",
    "RowParallelLayer",
    "RowParallelStack",
    "Shard",
    "adapted",
    "adapted_stack",
    "compute_kv_shard",
    "compute_n_kv_groups",
    "load_model",
    "set_arithmetic",
]

_ROOMS = {
    "ColumnParallelStack": "gather",
    "Comm": "comm",
    "ExpertList": "gather",
    "FusedExperts": "experts",
    "ImmediateIsq": "immediate",
    "IsqPool": "immediate",
    "PackedExperts": "experts",
    "PendingLayer": "immediate",
    "QuantizeOntoGuard": "immediate",
    "ReplicatedStack": "gather",
    "RowParallelStack": "gather",
    "Shard": "shard",
    "adapted": "lora",
    "adapted_stack": "lora",
    "compute_kv_shard": "heads",
    "compute_n_kv_groups": "heads",
    "load_model": "model",
    "set_arithmetic": "arithmetic",
}
"""Where names come from; the others from ``linear``."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOMS.get(name, 'linear')}"), name)
