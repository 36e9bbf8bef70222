"""``uqff checksum``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from uqff.cli.options import fetched, isq_option, named
from uqff.errors import printable
from uqff.hub.names import is_hub_name

if TYPE_CHECKING:
    from uqff.inspection.remote import Looked

__all__ = ["checksum"]


@click.command(short_help="Digests of files and of layers, and the check of both.")
@click.argument("path", type=click.Path())
@click.option("--layers", is_flag=True, help="Digests of layers in place of files.")
@click.option("--write", is_flag=True, help="Write the list beside the files: SHA256SUMS, or SHA256SUMS.layers.")
@click.option("--check", "checking", is_flag=True, help="Compare with the list that is there.")
@click.option("--sums", type=click.Path(dir_okay=False), help="The list to write or to compare with, if another.")
@click.option(
    "--names",
    type=click.Path(exists=True, dir_okay=False),
    help="With --layers: index to path of 0.x layers, as for migrate.",
)
@isq_option
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def checksum(
    ctx: click.Context,
    path: str,
    layers: bool,
    write: bool,
    checking: bool,
    sums: str | None,
    names: str | None,
    isq: str | None,
    as_json: bool,
) -> None:
    """Print a SHA-256 for each file, in the form of sha256sum, which can check it too.

    PATH is a model directory, or a .uqff file: then the list is about its shards only; so it is for one model of
    several, PATH:TYPE.

    With --layers, the list is about the layers of the model: digests of what a layer is, the same in 0.x and 1.x, in
    one shard or in many, experts stacked or apart. So the lists of a model and of its migrated copy are the same, and
    so is the digest of the list, which stands below it. (A 0.x file needs its config.json for that, or --names.)

    PATH may name a repository of the Hugging Face hub, which has the digests of its large files: nothing is fetched
    then but small files, and for --layers the model.

    Exits with 1 if --check finds a difference, or something that is not there.
    """
    path = named(path, isq, "PATH")
    if write and checking:
        raise click.UsageError("--write and --check exclude each other")
    if sums is not None and not (write or checking):
        raise click.UsageError("--sums needs --write or --check")
    if write and sums is None and is_hub_name(path):
        raise click.UsageError("--write needs --sums for a repository of the hub")
    if not layers and write and sums is None and not Path(path).is_dir():
        raise click.UsageError("SHA256SUMS lists a whole directory: name that, or another list with --sums")
    if names is not None and not layers:
        raise click.UsageError("--names goes with --layers")
    if layers:
        _layers(ctx, path, write, checking, sums, names, as_json)
    else:
        _files(ctx, path, write, checking, sums, as_json)


def _files(ctx: click.Context, path: str, write: bool, checking: bool, sums: str | None, as_json: bool) -> None:
    from uqff.inspection.remote import looked_into

    with looked_into(path, structure=False) as looked:
        _files_of(ctx, looked, write, checking, sums, as_json)


def _files_of(ctx: click.Context, looked: Looked, write: bool, checking: bool, sums: str | None, as_json: bool) -> None:
    from uqff.cli.progress import shown_progress
    from uqff.container.beside import SUMS_NAME
    from uqff.container.document import check_regular
    from uqff.inspection.checksum import checksum_document, checksum_of, files_of, read_sums, write_sums

    path = looked.path
    directory, everything = files_of(path)
    listed = Path(sums) if sums is not None else directory / SUMS_NAME
    own = sums is not None and listed.parent.resolve() == directory.resolve()
    names = [name for name in everything if not (own and name == listed.name)]
    stated = read_sums(listed if sums is not None else check_regular(listed)) if checking else None
    if stated is not None and not Path(path).is_dir():
        stated = {name: digest for name, digest in stated.items() if name in names}
        if not stated:
            raise click.UsageError(f"{printable(looked.shown(str(listed)))} names none of the files")
    wanted = set(names) if stated is None else set(names) & set(stated)
    with shown_progress() as progress:
        made = checksum_of(looked, exclude=set(everything) - wanted, progress=progress)
    if stated is not None:
        _report(ctx, stated, made.digests, set(names) - set(stated), as_json)
    elif write:
        write_sums(listed, made.text)
    if as_json and not checking:
        click.echo(json.dumps(checksum_document(made.files, None), indent=2))
    elif not write and not checking:
        _echo(made.text)


def _echo(text: str) -> None:
    """Names go out as they are: what a terminal would act on is for ``ls`` to hide, and a check needs the true name."""
    click.echo(printable_lines(text) if sys.stdout.isatty() else text.encode("utf-8", "surrogateescape"), nl=False)


def printable_lines(text: str) -> str:
    """A text of several lines with all else escaped that a terminal would act on."""
    return "".join(f"{printable(line)}\n" for line in text.split("\n")[:-1])


def _layers(
    ctx: click.Context,
    path: str,
    write: bool,
    checking: bool,
    sums: str | None,
    names: str | None,
    as_json: bool,
) -> None:
    from uqff.cli.progress import shown_progress
    from uqff.container.beside import LAYER_SUMS_NAME
    from uqff.container.document import check_regular
    from uqff.inspection.checksum import checksum as summed
    from uqff.inspection.checksum import checksum_document, files_of, read_sums, write_sums

    path = fetched(path)
    listed = Path(sums) if sums is not None else files_of(path)[0] / LAYER_SUMS_NAME
    stated = read_sums(listed if sums is not None else check_regular(listed)) if checking else None
    with shown_progress() as progress:
        made = summed(path, layers=True, names=names, progress=progress)
    assert made.model is not None
    if made.model.unnamed is not None:
        click.echo(f"uqff: layers have numbers, not paths: {printable(made.model.unnamed)}", err=True)
    if stated is not None:
        _report(ctx, stated, made.digests, set(made.digests) - set(stated), as_json, fail_on_more=True)
    elif write:
        write_sums(listed, made.text)
    if as_json and not checking:
        click.echo(json.dumps(checksum_document(None, made.model), indent=2))
    elif not write and not checking:
        _echo(made.text)


def _report(
    ctx: click.Context,
    stated: dict[str, str],
    found: dict[str, str],
    more: Iterable[str],
    as_json: bool,
    *,
    fail_on_more: bool = False,
) -> None:
    from uqff.inspection.checksum import check

    checks, more = check(stated, found), sorted(more)
    wrong = sum(not each.matches for each in checks) + (len(more) if fail_on_more else 0)
    if as_json:
        rows = [
            {"name": each.name, "expected": each.expected, "got": each.got, "matches": each.matches} for each in checks
        ]
        click.echo(json.dumps({"schema": 1, "matches": not wrong, "checks": rows, "unlisted": more}, indent=2))
    else:
        for each in checks:
            verdict = "OK" if each.matches else "missing" if each.got is None else f"differs: {each.got}"
            print(f"{printable(each.name)}: {verdict}")
        for name in more:
            print(f"{printable(name)}: not in the list")
        print(f"{len(checks) - sum(not each.matches for each in checks)} of {len(checks)} are as listed")
    if wrong:
        ctx.exit(1)
