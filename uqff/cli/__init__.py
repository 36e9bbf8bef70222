"""The command line: ``uqff COMMAND``. Commands parse arguments and show results; all logic is elsewhere.

A command's module is imported when the command is run; ``uqff --help`` and the completion of a command's name read the
table below and import none.  Exit codes: 0 fine, 1 the file is not right, 2 the call is not right (usage, a file that
cannot be read), 130 interrupted, 141 the reader of a pipe went away.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from importlib import import_module
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from uqff._version import __version__
from uqff.errors import HubError, UqffError, printable
from uqff.interrupts import INTERRUPTED, Raised

__all__ = ["COMMANDS", "TASKS", "LazyGroup", "console", "main"]

COMMANDS: dict[str, tuple[str, str]] = {
    "inspect": ("uqff.cli.inspect:inspect", "Show what is in a file, or one layer in full."),
    "verify": ("uqff.cli.verify:verify", "Check a file against every rule of the format."),
    "diff": ("uqff.cli.diff:diff", "Compare two models, layer by layer."),
    "checksum": ("uqff.cli.checksum:checksum", "Digests of files and of layers, and the check of both."),
    "report": ("uqff.cli.report:report", "Show, check or write uqff_report.json."),
    "quantize": ("uqff.cli.quantize:quantize", "Quantise a checkpoint."),
    "migrate": ("uqff.cli.migrate:migrate", "Turn a model of one generation into the other, without a loss."),
    "convert": ("uqff.cli.convert:convert", "GGUF to UQFF and back, block by block."),
    "dequantize": ("uqff.cli.dequantize:dequantize", "Write a model as a plain checkpoint."),
    "push": ("uqff.cli.push:push", "Upload a model directory to the Hugging Face hub."),
    "run": ("uqff.cli.run:run", "Let a model answer a prompt."),
    "plan": ("uqff.cli.plan:plan", "Choose types: the best mix for a size, or what each type takes."),
    "calibrate": ("uqff.cli.calibrate:calibrate", "Find out how much each input of each layer matters."),
    "completion": ("uqff.cli.completion:completion", "Print what makes a shell complete commands and options."),
    "eval": ("uqff.cli.eval:eval_", "Measure a model: perplexity, and how far it is from a reference."),
}
"""Name of a command to ``module:attribute`` and its one line of help."""

TASKS: dict[str, tuple[str, ...]] = {
    "Look into a model": ("inspect", "verify", "diff", "checksum", "report"),
    "Make a model": ("plan", "quantize", "migrate", "convert", "dequantize"),
    "Run and measure": ("run", "calibrate", "eval"),
    "Publish, and the rest": ("push", "completion"),
}
"""The commands by what one wants to do, in the order of ``--help``."""

PIPE_CLOSED = 128 + 13
"""What a shell reports for a process that ended by SIGPIPE."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are run, and whose errors become messages and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the table, by tasks."""
        return [name for names in TASKS.values() for name in names]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        from uqff.cli.examples import epilog

        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        command.epilog = epilog(cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is meant; of an unknown one, say which may be."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            near = get_close_matches(args[0][:20], COMMANDS, 1)
            if not near or args[0].startswith("-"):
                raise
            raise click.UsageError(f"{error.message.rstrip('.')}. Did you mean {near[0]!r}?", ctx) from None

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The commands that begin so, from the table; then the options, as of any command."""
        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        found = [CompletionItem(name, help=COMMANDS[name][1]) for name in names]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        width = max(map(len, COMMANDS))
        for task, names in TASKS.items():
            with formatter.section(task):
                formatter.write_dl([(f"{name:<{width}}", COMMANDS[name][1]) for name in names])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read what stands before the command; ``--help`` and ``--version`` print and end here."""
        try:
            return super().parse_args(ctx, args)
        except BrokenPipeError:
            _drop_output()
            ctx.exit(PIPE_CLOSED)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            with Raised():
                return self._invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)

    def _invoke(self, ctx: click.Context) -> Any:
        _open_streams()
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            _check_environment(ctx)
            result = super().invoke(ctx)
            sys.stdout.flush()
        except UqffError as error:
            _fail(ctx, str(error), 2 if isinstance(error, HubError) else 1)
        except BrokenPipeError:
            _drop_output()
            ctx.exit(PIPE_CLOSED)
        except OSError as error:
            # What the system says of memory whose file has been cut, when it is to write that.
            reason = "a file has become shorter while it was read" if error.errno == errno.EFAULT else error.strerror
            _fail(ctx, f"{reason or error}{f': {error.filename}' if error.filename else ''}", 2)
        except MemoryError:
            _fail(ctx, "out of memory", 2)
        return result


def _drop_output() -> None:
    """Let what is left in the buffer not complain when the interpreter exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_streams() -> None:
    """Let what the caller has closed, who wants the exit code alone, lead nowhere.

    In their order, so that each gets its own number and no file of a model does, into which C code would then write.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (to the end of the process)


def _check_environment(ctx: click.Context) -> None:
    """Variables that say nonsense are a wrong call, whether the command looks at them or not."""
    if any(os.environ.get(f"UQFF_{name}") for name in ("NUM_THREADS", "KERNELS", "MMAP")):
        from uqff import simd
        from uqff.container.mapping import is_read
        from uqff.simd.threads import num_threads

        try:
            num_threads()
            simd.choice()
            is_read()
        except ValueError as error:
            _fail(ctx, str(error), 2)


def _fail(ctx: click.Context, message: str, code: int) -> None:
    click.echo(f"uqff: {printable(message)}", err=True)
    ctx.exit(code)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="uqff", message="%(prog)s %(version)s")
def main() -> None:
    """Read, check and write UQFF, the quantised file format of mistral.rs."""


def console() -> NoReturn:
    """The command line as a whole process, which ends when all is written.

    An interpreter that leaves in good order takes down torch and numba piece by piece: a tenth of a second, for nothing
    that outlives the process.
    """
    code: object = None
    try:
        main(prog_name="uqff")
    except SystemExit as end:
        code = end.code
    except OSError as error:  # of --help and --version, which click prints by itself
        code = 2
        with contextlib.suppress(OSError, ValueError):
            print(f"uqff: {error.strerror or error}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):  # what reads it has gone, or it was closed
                stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
