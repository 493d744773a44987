"""A line chart in a file: SVG by the few lines below, PNG through matplotlib where that is installed.

Owns how a chart is drawn; must not know what its lines mean. `check_file` says before a long run what would go wrong
after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..protocol.errors import InvalidRequest

WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 80, 170, 44, 56  # margins; the legend is in the right one
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")  # told apart by most
TICKS = 6


@dataclass(frozen=True, slots=True)
class Line:
    """One line: a name for the legend and its points (x, y), in the order of x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What is to be drawn. A logarithmic axis leaves out points that are not above 0."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False
    markers: bool = False


def check_file(path: Path) -> None:
    """Raise `InvalidRequest` unless a chart can be written to `path`."""
    if path.suffix not in (".svg", ".png"):
        raise InvalidRequest(f"plot must end in .svg or .png, got {str(path)!r}", param="plot")
    if not path.absolute().parent.is_dir():
        raise InvalidRequest(f"plot must be in a folder that exists, got {str(path)!r}", param="plot")
    if path.suffix == ".png" and find_spec("matplotlib") is None:
        raise InvalidRequest(
            f"plot can be PNG only with matplotlib (pip install matplotlib), or take .svg; got {str(path)!r}",
            param="plot",
        )


def write(chart: Chart, path: Path) -> None:
    """Draw `chart` into `path`, which `check_file` has found good."""
    if path.suffix == ".png":
        _write_png(chart, path)
    else:
        path.write_text(svg(chart))


def svg(chart: Chart) -> str:
    """The chart as the text of an SVG file."""
    drawn = [Line(line.name, [p for p in line.points if _fits(chart, p)]) for line in chart.lines]
    points = [point for line in drawn for point in line.points] or [(1.0, 1.0)]
    across = _Axis([x for x, _ in points], chart.log_x, LEFT, WIDTH - RIGHT)
    up = _Axis([y for _, y in points], chart.log_y, HEIGHT - BOTTOM, TOP)
    middle = ((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15">{escape(chart.title)}</text>',
        *_grid(across, up),
        f'<text x="{middle[0]:.0f}" y="{HEIGHT - 14}" text-anchor="middle">{escape(chart.x_label)}</text>',
        f'<text x="18" y="{middle[1]:.0f}" text-anchor="middle" transform="rotate(-90 18 {middle[1]:.0f})">'
        f"{escape(chart.y_label)}</text>",
    ]
    for number, line in enumerate(drawn):
        parts += _line(line, number, across, up, chart.markers)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _fits(chart: Chart, point: tuple[float, float]) -> bool:
    return all(math.isfinite(value) for value in point) and not (
        (chart.log_x and point[0] <= 0) or (chart.log_y and point[1] <= 0)
    )


class _Axis:
    """Values to places between `start` and `stop`, and the values worth a tick."""

    def __init__(self, values: list[float], log: bool, start: float, stop: float) -> None:
        self.log, self.start, self.stop = log, start, stop
        low, high = min(values), max(values)
        if log:
            self.low, self.high = math.log10(low), math.log10(high)
        else:
            self.low, self.high = min(low, 0.0), high
        if self.high - self.low < 1e-9:
            self.high = self.low + 1.0

    def place(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            whole = [10.0**power for power in range(math.floor(self.low), math.ceil(self.high) + 1)]
            steps = (1, 2, 5) if len(whole) < 4 else (1,)
            every = [power * step for power in whole for step in steps]
            return [v for v in every if self.low - 1e-9 <= math.log10(v) <= self.high + 1e-9]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / TICKS))
        step *= next(factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= TICKS)
        first = math.ceil(self.low / step)
        return [step * k for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _grid(across: _Axis, up: _Axis) -> list[str]:
    parts = []
    for value in across.ticks():
        x = across.place(value)
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    for value in up.ticks():
        y = up.place(value)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    return parts


def _line(line: Line, number: int, across: _Axis, up: _Axis, markers: bool) -> list[str]:
    colour = COLOURS[number % len(COLOURS)]
    places = [(across.place(x), up.place(y)) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    x, y = WIDTH - RIGHT + 14, TOP + 14 + 20 * number  # of its entry in the legend
    parts = [
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
        f'<line x1="{x}" y1="{y}" x2="{x + 24}" y2="{y}" stroke="{colour}" stroke-width="2"/>',
        f'<text x="{x + 30}" y="{y + 4}">{escape(line.name)}</text>',
    ]
    if markers:
        parts += [f'<circle cx="{at:.1f}" cy="{up_at:.1f}" r="3" fill="{colour}"/>' for at, up_at in places]
    return parts


def _write_png(chart: Chart, path: Path) -> None:
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(WIDTH / 100, HEIGHT / 100), layout="constrained")
    axes = figure.subplots()
    for number, line in enumerate(chart.lines):
        x, y = zip(*[point for point in line.points if _fits(chart, point)], strict=True)
        axes.plot(x, y, label=line.name, color=COLOURS[number % len(COLOURS)], marker="o" if chart.markers else None)
    axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    if chart.log_x:
        axes.set_xscale("log")
    if chart.log_y:
        axes.set_yscale("log")
    axes.grid(True, color="#ddd")
    axes.legend()
    figure.savefig(path, dpi=150)
