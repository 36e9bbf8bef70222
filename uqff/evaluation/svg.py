"""Small plots as SVG: points and lines over two axes, each linear or logarithmic; text only, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from uqff.container.atomic import atomic_file

__all__ = ["Axis", "Plot", "Series"]

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 76, 150, 40, 54
COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d5a97", "#b5651d", "#555555")


@dataclass(frozen=True)
class Series:
    """Points ``(x, y)``, with a name for each or for all.

    Attributes:
        name: in the legend.
        points: of which those that an axis cannot show are left out.
        labels: beside each point; none if empty.
        line: whether the points are joined.
    """

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()
    line: bool = True


@dataclass(frozen=True)
class Axis:
    """What an axis says, and whether it is logarithmic."""

    title: str
    log: bool = False

    def scale(self, value: float) -> float:
        """The place of a value, in units of the axis."""
        return math.log10(value) if self.log else value

    def shows(self, value: float) -> bool:
        """Whether it has a place."""
        return math.isfinite(value) and (value > 0 or not self.log)

    def ticks(self, low: float, high: float) -> list[float]:
        """Values between two places that get a line."""
        if self.log:
            decades = range(math.floor(low), math.ceil(high) + 1)
            factors = (1, 2, 5) if high - low < 3 else (1,)
            made = [factor * 10.0**decade for decade in decades for factor in factors]
            return [each for each in made if low - 1e-9 <= math.log10(each) <= high + 1e-9]
        step = 10.0 ** math.floor(math.log10((high - low) or 1))
        step = next(each for each in (step / 5, step / 2, step) if (high - low) / each <= 8)
        return [at * step for at in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


@dataclass
class Plot:
    """A picture with a title, axes and series."""

    title: str
    x: Axis
    y: Axis
    series: list[Series] = field(default_factory=list)

    def svg(self) -> str:
        """The document."""
        shown = [
            [(at, *point) for at, point in enumerate(each.points) if self.x.shows(point[0]) and self.y.shows(point[1])]
            for each in self.series
        ]
        xs = [self.x.scale(x) for points in shown for _, x, _ in points] or [0.0]
        ys = [self.y.scale(y) for points in shown for _, _, y in points] or [0.0]
        (x_low, x_high), (y_low, y_high) = _padded(xs), _padded(ys)

        def place(x: float, y: float) -> tuple[float, float]:
            across = (self.x.scale(x) - x_low) / (x_high - x_low)
            up = (self.y.scale(y) - y_low) / (y_high - y_low)
            return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
            'font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
            _text(LEFT, 22, self.title, size=14),
            _text((LEFT + right) / 2, HEIGHT - 14, self.x.title, anchor="middle"),
            f'<g transform="translate(18 {(TOP + bottom) / 2}) rotate(-90)">{_text(0, 0, self.y.title, "middle")}</g>',
        ]
        for tick in self.x.ticks(x_low, x_high):
            at = LEFT + (self.x.scale(tick) - x_low) / (x_high - x_low) * (right - LEFT)
            parts += [_line(at, TOP, at, bottom), _text(at, bottom + 16, f"{tick:g}", anchor="middle")]
        for tick in self.y.ticks(y_low, y_high):
            at = bottom - (self.y.scale(tick) - y_low) / (y_high - y_low) * (bottom - TOP)
            parts += [_line(LEFT, at, right, at), _text(LEFT - 6, at + 4, f"{tick:g}", anchor="end")]
        for at, (each, points) in enumerate(zip(self.series, shown, strict=True)):
            colour = COLOURS[at % len(COLOURS)]
            placed = [place(x, y) for _, x, y in points]
            if each.line and len(placed) > 1:
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
                parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
            for (index, _, _), (x, y) in zip(points, placed, strict=True):
                if not each.line or each.labels or len(placed) < 30:
                    parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
                if each.labels:
                    parts.append(_text(x + 5, y - 4, each.labels[index], size=10))
            parts.append(f'<rect x="{right + 12}" y="{TOP + 20 * at}" width="10" height="10" fill="{colour}"/>')
            parts.append(_text(right + 27, TOP + 20 * at + 9, each.name))
        return "\n".join([*parts, "</svg>", ""])

    def write(self, path: Path) -> None:
        """Write the document to a file, which is replaced if it is there."""
        with atomic_file(path) as file:
            file.write(self.svg().encode("utf-8"))


def _padded(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.04 * (high - low) or 0.5
    return low - room, high + room


def _text(x: float, y: float, text: str, anchor: str = "start", *, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'
