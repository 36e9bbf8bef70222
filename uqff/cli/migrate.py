"""``uqff migrate``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from uqff.cli.options import DtypeChoice, isq_option, selected
from uqff.cli.progress import shown_progress, terminable
from uqff.codes import FORMATS
from uqff.errors import printable

if TYPE_CHECKING:
    from uqff.migration import Migrated, Plan

__all__ = ["migrate"]


@click.command(short_help="Turn a model of one generation into the other, without a loss.")
@click.argument("source", metavar="SRC", type=click.Path())
@click.argument("out", metavar="[OUT]", type=click.Path(), required=False)
@click.option(
    "--uqff-version",
    "--to",
    "version",
    type=click.Choice(list(FORMATS)),
    default="1.2",
    show_default=True,
    help="UQFF version to write.",
)
@click.option(
    "--names",
    type=click.Path(exists=True, dir_okay=False),
    help="Names of the layers of 0.x, where the architecture is not known: lines INDEX PATH, or JSON.",
)
@click.option("--dry-run", is_flag=True, help="Print the mapping and write nothing.")
@click.option(
    "--fix-biases",
    is_flag=False,
    flag_value="load",
    type=DtypeChoice("load"),
    help="Change biases that the engine cannot add to activations of this dtype; if none is given, of the load dtype.",
)
@click.option(
    "--plain-experts", is_flag=True, help="Store experts that the version cannot hold dequantised, in the load dtype."
)
@click.option("--untie", is_flag=True, help="Of a tied model, keep the dense embedding beside the quantised head.")
@click.option("--strict", is_flag=True, help="Refuse what the engine could not load or run however it is started.")
@click.option("--force", is_flag=True, help="Replace the model that is in OUT.")
@click.option("--quiet", is_flag=True, help="Print nothing but warnings and errors.")
@isq_option
@click.option("--json", "as_json", is_flag=True, help="Print the mapping and the summary as JSON.")
@click.pass_context
def migrate(
    context: click.Context,
    source: str,
    out: str | None,
    version: str,
    names: str | None,
    dry_run: bool,
    fix_biases: str | None,
    plain_experts: bool,
    untie: bool,
    strict: bool,
    force: bool,
    quiet: bool,
    isq: str | None,
    as_json: bool,
) -> None:
    """Turn the model SRC into a model of another UQFF version in the new directory OUT.

    SRC is a model directory, or one of the .uqff files in it; of a directory with several models, all are turned, and
    SRC:TYPE is one of them. Every code, scale and bias stays as it is; names and
    framing change. Files before 1.0 know their layers by number: config.json says which weights these are. OUT appears
    when all of it is written; it must not exist, or be empty.
    """
    from uqff.checkpoints.model import ModelDirectory
    from uqff.migration import MigrateJob, plan_migration, read_names

    if out is None and not dry_run:
        raise click.UsageError("Missing argument 'OUT'.", context)
    source = selected(source, isq, "SRC", several=True)
    chosen = read_names(names) if names is not None else None
    with ModelDirectory(source) as directory:
        plan = plan_migration(
            directory, version, names=chosen, fix_biases=fix_biases, plain_experts=plain_experts, untie=untie
        )
        for warning in plan.warnings:
            click.echo(f"uqff: {printable(warning)}", err=True)
        for problem in plan.problems if dry_run or len(plan.problems) > 1 else ():
            click.echo(f"uqff: {printable(f'{problem.layer}: {problem.reason}')}", err=True)
        if strict:
            plan.check_limits()
        made = None
        if not dry_run:
            assert out is not None
            with terminable(), shown_progress(shown=not quiet) as progress:
                made = MigrateJob(plan).run(out, force=force, progress=progress)
        if as_json:
            click.echo(json.dumps(_document(plan, made), indent=2))
        elif not quiet:
            _show(plan, made)
        if dry_run and plan.problems:
            context.exit(1)


def _show(plan: Plan, made: Migrated | None) -> None:
    from uqff.cli.render import echo_heading, echo_pairs, echo_table, size

    if made is not None:
        echo_heading(str(made.path))
        pairs = [("version", str(plan.version))]
        pairs += [(stem, f"{len(names)} shard{'' if len(names) == 1 else 's'}") for stem, names in made.shards.items()]
        pairs += [("layers", size(made.nbytes)), ("copied", ", ".join(made.copied) or "nothing")]
        echo_pairs(pairs + ([("not copied", ", ".join(made.left))] if made.left else []))
        return
    columns = [("index", "right"), ("key", "left"), ("type", "left"), ("shape", "left"), ("bytes", "right")]
    for planned in plan.models:
        echo_heading(planned.stem)
        rows = []
        for row in planned.rows:
            index = "-" if row.index is None else str(row.index)
            rows.append((index, row.path, row.kind, str(list(row.shape)), f"{row.nbytes:,}"))
        echo_table(columns, rows)


def _document(plan: Plan, made: Migrated | None) -> dict[str, Any]:
    from uqff.models.engine import limits_document

    models = [
        {
            "stem": planned.stem,
            "from": str(planned.file.version),
            "shards": made.shards[planned.stem] if made is not None else None,
            "kept": sorted(planned.kept),
            "limits": limits_document(planned.limits),
            "layers": [
                {
                    "index": row.index,
                    "key": row.key,
                    "expert": row.expert,
                    "stored": row.kind,
                    "shape": list(row.shape),
                    "bytes": row.nbytes,
                }
                for row in planned.rows
            ],
        }
        for planned in plan.models
    ]
    return {
        "path": str(made.path) if made is not None else None,
        "uqff_version": str(plan.version),
        "bytes": made.nbytes if made is not None else None,
        "copied": made.copied if made is not None else None,
        "not_copied": made.left if made is not None else None,
        "warnings": plan.warnings,
        "problems": [{"layer": problem.layer, "reason": problem.reason} for problem in plan.problems],
        "models": models,
    }
