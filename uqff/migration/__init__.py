"""A model of one generation as one of the other: every code, scale and bias as it is, under other names.

::

    SRC/<stem>-N.uqff --> mapped layers --> stacked or taken apart where experts are --> OUT/<stem>-N.uqff
    SRC/residual.safetensors ------------------------------------------------------> OUT/residual.safetensors
    SRC/config.json, tokenizer.json, ... ------------------------------------------> OUT/...

Rooms: :mod:`~uqff.migrate.names` which weight an index is, and :mod:`~uqff.migrate.shapes` what shape it must have;
:mod:`~uqff.migrate.moves` what becomes of each layer; :mod:`~uqff.migrate.origin` what a model was before, noted and
read again; :mod:`~uqff.migrate.embedding` the one layer that 0.x has no place for; :mod:`~uqff.migrate.plan` all of it
before a byte moves; :mod:`~uqff.migrate.write` the new directory.
"""

from uqff.migrate.names import parse_names, read_names
from uqff.migrate.plan import Plan, Planned, plan_migration
from uqff.migrate.write import Migrated, migrate_model, write_migration

__all__ = [
    "Migrated",
    "Plan",
    "Planned",
    "migrate_model",
    "parse_names",
    "plan_migration",
    "read_names",
    "write_migration",
]
