"""Text for people: sizes, tables, bars. What comes from a file is escaped here and never read as markup."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from uqff.errors import printable

__all__ = ["bar", "echo_heading", "echo_pairs", "echo_table", "number", "size"]

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_WIDTH = 1 << 16
"""Columns: so many that nothing is ever cut or folded here; a terminal folds what is too long for it."""
_GAP = 2
"""Columns between two columns of a table."""
_WIDEST = 400
"""Columns that a cell may take up in every row."""


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
    return Console(
        file=sys.stdout,
        width=_WIDTH,
        force_terminal=True,
        markup=False,
        highlight=False,
        emoji=False,
        legacy_windows=False,
    )


def _echo(lines: Iterable[Text]) -> None:
    """Lines end where their text ends: nothing is cut, folded or padded."""
    if not sys.stdout.isatty():
        print("\n".join(line.plain.rstrip() for line in lines))
        return
    console = _console()
    with console.capture() as captured:
        for line in lines:
            console.print(line, soft_wrap=True)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def echo_heading(text: str) -> None:
    """A line in bold, where there is bold."""
    _echo([Text(printable(text), style="bold")])


def echo_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Names and values, indented, one pair a line."""
    rows = [(f"  {name}", printable(value)) for name, value in pairs]
    width = _width([name for name, _ in rows])
    _echo(Text.assemble((_padded(name, width, "left"), "cyan"), f"  {value}") for name, value in rows)


def echo_table(
    columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[str]], *, optional: Sequence[str] = ()
) -> None:
    """A table without lines. Rich lays out some hundred rows a second; a model of experts may have 20,000 layers.

    Args:
        columns: header and alignment, ``left`` or ``right``.
        rows: a text for each column.
        optional: headers of columns that are left out, one after another, until the table is no wider than the
            terminal. Where the output is no terminal, all are shown.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [_width([name, *(row[at] for row in cells)]) for at, (name, _) in enumerate(columns)]
    dropped = _too_wide(widths, [name for name, _ in columns], optional)
    kept = [at for at, (name, _) in enumerate(columns) if name not in dropped]

    def line(row: Sequence[str]) -> str:
        return (" " * _GAP).join(_padded(row[at], widths[at], columns[at][1]) for at in kept).rstrip()

    _echo([Text(line([name for name, _ in columns]), style="bold")])
    if cells:
        print("\n".join(map(line, cells)))
    if dropped:
        _echo([Text(f"(too narrow for: {', '.join(dropped)})", style="dim")])


def _width(cells: Iterable[str]) -> int:
    """Of a column. Cells that are longer than any sound one stand out: one must not widen thousands of rows."""
    return max((min(cell_len(cell), _WIDEST) for cell in cells), default=0)


def _padded(text: str, width: int, justify: str) -> str:
    space = " " * (width - cell_len(text))
    return space + text if justify == "right" else text + space


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
