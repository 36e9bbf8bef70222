"""``uqff completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

__all__ = ["completion"]


@click.command(short_help="Print what makes a shell complete commands and options.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what makes SHELL complete commands, options, their values and paths.

    \b
    bash   eval "$(uqff completion bash)"        in ~/.bashrc
    zsh    eval "$(uqff completion zsh)"         in ~/.zshrc, after compinit
    fish   uqff completion fish | source         in ~/.config/fish/config.fish
    """  # noqa: D301  (what click keeps its hands off is marked by a backspace)
    made = get_completion_class(shell)
    assert made is not None
    click.echo(made(context.find_root().command, {}, "uqff", "_UQFF_COMPLETE").source())
