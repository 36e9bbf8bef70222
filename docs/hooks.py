"""What the site takes from elsewhere in the repository: the specification, guides at the top, the commands' help."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click
from mkdocs.structure.files import File, Files

from uqff.cli import main

ROOT: Final = Path(__file__).resolve().parent.parent

GUIDES: Final = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages that stand at the top of the repository, and what the site calls them."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and vectors of the specification, the guides, and a page of the command line."""
    for path in sorted((ROOT / "spec").rglob("*")):
        if path.is_file():
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for name, page in GUIDES.items():
        text = (ROOT / name).read_text("utf-8").replace("](docs/pages/", "](")
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "cli.md", content=command_line()))
    return files


def command_line() -> str:
    """The help of every command, as it is printed."""
    context = click.Context(main, info_name="uqff", terminal_width=100)
    pages = ["# Command line", "What `uqff COMMAND --help` prints."]
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        assert command is not None
        text = command.get_help(click.Context(command, parent=context, info_name=name, terminal_width=100))
        pages += [f"## uqff {name}", f"```text\n{text}\n```"]
    return "\n\n".join(pages) + "\n"
