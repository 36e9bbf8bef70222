"""``uqff push``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from uqff.cli.options import show_bars
from uqff.cli.progress import shown_progress
from uqff.errors import printable

if TYPE_CHECKING:
    from uqff.publish.push import Pushed

__all__ = ["push"]


@click.command(short_help="Upload a model directory to the Hugging Face hub.")
@click.argument("directory", metavar="DIR", type=click.Path(exists=True, file_okay=False))
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--revision", metavar="BRANCH", help="The branch, which is made if there is none; else the main one.")
@click.option("--private/--public", default=None, help="What a repository that is made will be.")
@click.option("--create-pr", is_flag=True, help="Open a pull request in place of a commit.")
@click.option("--base-model", metavar="NAME", help="What was quantised, if not what the report says.")
@click.option(
    "--measured",
    type=click.Path(exists=True, dir_okay=False),
    help="What uqff quantize --json printed: its errors go into the card.",
)
@click.option("--message", help="Of the commit.")
@click.option("--dry-run", is_flag=True, help="Show the files, their digests and the card, and ask nobody.")
@click.option("--quiet", is_flag=True, help="Print nothing but warnings and errors.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def push(
    directory: str,
    repo: str,
    revision: str | None,
    private: bool | None,
    create_pr: bool,
    base_model: str | None,
    measured: str | None,
    message: str | None,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Upload the model directory DIR to the repository OWNER/NAME of the Hugging Face hub.

    The .uqff files and what stands beside them go there, with a list of checksums and a model card: which types there
    are, what was quantised, how to run it. A README.md in DIR, or one in the repository that was not made by this
    command, is taken in place of that card. Other files of DIR stay, and are named.

    Models whose structure is broken are refused. The files appear together, in one commit, when all have arrived; an
    upload that broke off is gone on with by giving the command again. Needs a token that may write: hf auth login, or
    the variable HF_TOKEN.
    """
    from uqff.publish.push import push as pushed

    show_bars()
    with shown_progress(shown=not quiet) as progress:
        made = pushed(
            directory,
            repo,
            revision=revision,
            private=private,
            create_pr=create_pr,
            base_model=base_model,
            measured=measured,
            message=message,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(_document(made), indent=2))
    elif not quiet:
        _show(made)
    for name in made.left:
        click.echo(f"uqff: not uploaded, as it is of no model: {printable(name)}", err=True)


def _document(made: Pushed) -> dict[str, object]:
    return {
        "schema": 1,
        "repo": made.repo,
        "revision": made.revision,
        "url": made.url,
        "files": [{"name": each.name, "bytes": each.nbytes, "sha256": each.sha256} for each in made.files],
        "left": list(made.left),
        "card": made.card,
    }


def _show(made: Pushed) -> None:
    from uqff.cli.render import echo_heading, echo_pairs, echo_table, size

    echo_heading(made.url or f"{made.repo}: nothing was uploaded")
    echo_pairs([("branch", made.revision or "main"), ("files", f"{len(made.files)}, {size(made.nbytes)}")])
    print()
    rows = [(each.name, f"{each.nbytes:,}", each.sha256) for each in made.files]
    echo_table([("file", "left"), ("bytes", "right"), ("SHA-256", "left")], rows)
    if made.url is None and made.card is not None:
        print(f"\nREADME.md:\n\n{made.card}", end="")
