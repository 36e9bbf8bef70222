"""UQFF, the Universal Quantized File Format of mistral.rs.

What each command does is a function here; names are imported when they are first used.  ``import uqff`` imports neither
torch nor numba; not even ``typing``: this is the first that a command imports, and Ctrl-C finds it unprepared.
"""

from uqff._version import __version__ as __version__

TYPE_CHECKING = False
if TYPE_CHECKING:
    from uqff import families, lora, parallel
    from uqff.calibration.calibrate import calibrate
    from uqff.checkpoints.checkpoint import Checkpoint, open_checkpoint
    from uqff.codec.blob import deserialize, serialize
    from uqff.codec.layer import Layer
    from uqff.codes import DType, Version
    from uqff.container.file import UqffFile
    from uqff.container.file import open_uqff as open
    from uqff.container.save import save
    from uqff.conversion.direction import convert
    from uqff.errors import (
        CommError,
        FormatError,
        HubError,
        MissingError,
        ShapeError,
        ShardError,
        UnsupportedError,
        UqffError,
    )
    from uqff.evaluation.evaluate import evaluate
    from uqff.export.dequantize import dequantize_model
    from uqff.families import Family
    from uqff.families.base import QuantizedTensor
    from uqff.importance.matrix import Importance
    from uqff.inspection.checksum import checksum
    from uqff.inspection.compare import diff
    from uqff.inspection.inspect import inspect
    from uqff.inspection.report import report
    from uqff.inspection.verify import verify
    from uqff.migration.write import migrate
    from uqff.parallel.model import load_model
    from uqff.parallel.shard import Shard
    from uqff.planning.plan import plan_types
    from uqff.progress import Step
    from uqff.publish.push import push
    from uqff.quantization.recipe import Recipe
    from uqff.quantization.run import quantize_model
    from uqff.quantization.types import Fallback, FallbackWarning, quantize

del TYPE_CHECKING

_MODULES = {
    "calibration.calibrate": ("calibrate",),
    "checkpoints.checkpoint": ("Checkpoint", "open_checkpoint"),
    "codec.blob": ("deserialize", "serialize"),
    "codec.layer": ("Layer",),
    "codes": ("DType", "Version"),
    "container.file": ("UqffFile", "open"),
    "container.save": ("save",),
    "conversion.direction": ("convert",),
    "errors": (
        "CommError",
        "FormatError",
        "HubError",
        "MissingError",
        "ShapeError",
        "ShardError",
        "UnsupportedError",
        "UqffError",
    ),
    "evaluation.evaluate": ("evaluate",),
    "export.dequantize": ("dequantize_model",),
    "families": ("Family", "families"),
    "families.base": ("QuantizedTensor",),
    "importance.matrix": ("Importance",),
    "inspection.checksum": ("checksum",),
    "inspection.compare": ("diff",),
    "inspection.inspect": ("inspect",),
    "inspection.report": ("report",),
    "inspection.verify": ("verify",),
    "lora": ("lora",),
    "migration.write": ("migrate",),
    "parallel": ("parallel",),
    "parallel.model": ("load_model",),
    "parallel.shard": ("Shard",),
    "planning.plan": ("plan_types",),
    "progress": ("Step",),
    "publish.push": ("push",),
    "quantization.recipe": ("Recipe",),
    "quantization.run": ("quantize_model",),
    "quantization.types": ("Fallback", "FallbackWarning", "quantize"),
}
"""Where each name comes from: what type checkers read above, for those who run it."""

_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Checkpoint",
    "CommError",
    "DType",
    "Fallback",
    "FallbackWarning",
    "Family",
    "FormatError",
    "HubError",
    "Importance",
    "Layer",
    "MissingError",
    "QuantizedTensor",
    "Recipe",
    "ShapeError",
    "Shard",
    "ShardError",
    "Step",
    "UnsupportedError",
    "UqffError",
    "UqffFile",
    "Version",
    "calibrate",
    "checksum",
    "convert",
    "dequantize_model",
    "deserialize",
    "diff",
    "evaluate",
    "families",
    "inspect",
    "load_model",
    "lora",
    "migrate",
    "open",
    "open_checkpoint",
    "parallel",
    "plan_types",
    "push",
    "quantize",
    "quantize_model",
    "report",
    "save",
    "serialize",
    "verify",
]


def __getattr__(name: str) -> object:
    """Import what a name stands for."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(f"uqff.{_MODULE_OF[name]}")
    thing = module if name == _MODULE_OF[name] else getattr(module, {"open": "open_uqff"}.get(name, name))
    globals()[name] = thing
    return thing


def __dir__() -> list[str]:
    """What the library does, imported or not."""
    return sorted([*__all__, "__version__", "__doc__"])
