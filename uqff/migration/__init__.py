"""A model of one generation as one of the other: every code, scale and bias as it is, under other names.

::

    SRC/<stem>-N.uqff --> mapped layers --> stacked or taken apart where experts are --> OUT/<stem>-N.uqff
    SRC/residual.safetensors ------------------------------------------------------> OUT/residual.safetensors
    SRC/config.json, tokenizer.json, ... ------------------------------------------> OUT/...

Modules: ``names``, which weight an index is; ``shapes``, what shape it must have; ``mapping``, what becomes of each
layer; ``origin``, what a model was before, noted and read again; ``embedding``, the layer that 0.x has no place for;
``plan``, all of it before a byte moves; ``write``, the new directory.
"""

from uqff.migration.plan import Plan, PlannedModel, plan_migration
from uqff.migration.write import Migrated, MigrateJob, migrate
from uqff.models.names import parse_names, read_names

__all__ = [
    "MigrateJob",
    "Migrated",
    "Plan",
    "PlannedModel",
    "migrate",
    "parse_names",
    "plan_migration",
    "read_names",
]
