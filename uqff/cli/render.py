"""Text for people: sizes, tables, bars. What comes from a file is escaped here and never read as markup."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from uqff.errors import printable

__all__ = ["bar", "echo_heading", "echo_pairs", "echo_table", "number", "size"]

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_WIDTH = 1 << 16
"""Columns: so many that nothing is ever cut or folded here; a terminal folds what is too long for it."""
_GAP = 2
"""Columns between two columns of a table."""


def size(nbytes: int) -> str:
    """A size, rounded and exact: ``1.5 KiB (1,536 bytes)``."""
    value, unit = float(nbytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value /= 1024
        unit += 1
    exact = f"{nbytes:,} bytes"
    return exact if unit == 0 else f"{value:.1f} {_UNITS[unit]} ({exact})"


def number(value: float | None) -> str:
    """A measured number with six significant digits; ``-`` for None."""
    return "-" if value is None else f"{value:.6g}"


def bar(count: int, most: int, width: int = 32) -> str:
    """A bar of block characters, ``width`` columns for ``most``; of ``#`` where the output cannot show blocks."""
    eighths = -(-8 * width * count // most) if most else 0
    if not _can_show(_EIGHTHS):
        return "#" * -(-eighths // 8)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def _can_show(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _console() -> Console:
    terminal = sys.stdout.isatty()
    return Console(
        file=sys.stdout,
        width=_WIDTH,
        force_terminal=terminal,
        no_color=not terminal,
        markup=False,
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )


def _echo(console: Console, *lines: Table | Text) -> None:
    """Lines end where their text ends: rich pads the last column."""
    with console.capture() as captured:
        for line in lines:
            console.print(line, soft_wrap=isinstance(line, Text))
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def echo_heading(text: str) -> None:
    """A line in bold, where there is bold."""
    _echo(_console(), Text(printable(text), style="bold"))


def echo_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Names and values, indented, one pair a line."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for name, value in pairs:
        table.add_row(Text(f"  {name}"), Text(printable(value)))
    _echo(_console(), table)


def echo_table(
    columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]], *, optional: Sequence[str] = ()
) -> None:
    """A table without lines.

    Args:
        columns: header and alignment, ``left`` or ``right``.
        rows: a text for each column.
        optional: headers of columns that are left out, one after another, until the table is no wider than the
            terminal. Where the output is no terminal, all are shown.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [max([cell_len(name), *(cell_len(row[at]) for row in cells)]) for at, (name, _) in enumerate(columns)]
    dropped = _too_wide(widths, [name for name, _ in columns], optional)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for header, justify in columns:
        if header not in dropped:
            table.add_column(header, justify="right" if justify == "right" else "left", no_wrap=True)
    kept = [at for at, (name, _) in enumerate(columns) if name not in dropped]
    for row in cells:
        table.add_row(*(Text(row[at]) for at in kept))
    _echo(_console(), table)
    if dropped:
        _echo(_console(), Text(f"(too narrow for: {', '.join(dropped)})", style="dim"))


def _too_wide(widths: Sequence[int], names: Sequence[str], optional: Sequence[str]) -> list[str]:
    """Columns that a terminal has no room for, in the order in which they go."""
    if not sys.stdout.isatty():
        return []
    room, dropped = shutil.get_terminal_size().columns, []
    width = sum(widths) + _GAP * (len(widths) - 1)
    for name in optional:
        if width > room and name in names:
            dropped.append(name)
            width -= widths[names.index(name)] + _GAP
    return dropped
