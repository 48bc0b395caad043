"""Charts as small inline SVG that is read on light and dark pages: losses of a run, fidelity against editability."""

import csv
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

METRICS_FILE = "metrics.csv"
SHOWN = "loss"
"""A column of a run's metrics whose name holds this is drawn."""
TICKS = 5
COLORS = ("#7b8494", "#2563a8", "#4d7c0f", "#7c3aed", "#0f766e", "#a16207")
ACCENT = "#c2410c"


@dataclass(frozen=True)
class Point:
    """A point of a chart with its intervals and its label."""

    x: tuple[float, float, float]
    """Value, low, high."""
    y: tuple[float, float, float]
    label: str = ""


def chart(
    lines: Mapping[str, Sequence[Point]],
    across: str,
    upward: str,
    accent: str = "",
    width: int = 560,
    height: int = 360,
) -> str:
    """Each line through its points, as an SVG document; of several lines, with a legend.

    Args:
        across, upward: what the axes are called.
        accent: the line that is drawn in the page's accent.
    """
    legend = 17 * len(lines) if len(lines) > 1 else 0
    left, right, top, bottom = 58, width - 18, 8 + legend, height + legend - 44
    points = [point for line in lines.values() for point in line]
    x, y = Axis([p.x for p in points], left, right), Axis([p.y for p in points], bottom, top)
    parts = []
    for tick in x.ticks():
        parts += [f'<path d="M{x(tick):.1f},{top} V{bottom}" class="grid"/>', text(x(tick), bottom + 16, short(tick))]
    for tick in y.ticks():
        parts.append(f'<path d="M{left},{y(tick):.1f} H{right}" class="grid"/>')
        parts.append(text(left - 6, y(tick) + 4, short(tick), anchor="end"))
    middle = (top + bottom) / 2
    parts.append(text((left + right) / 2, height + legend - 8, across))
    parts.append(text(14, middle, upward, turn=f"rotate(-90 14 {middle:.1f})"))
    for number, (name, line) in enumerate(lines.items()):
        color = ACCENT if name == accent else COLORS[number % len(COLORS)]
        path = " ".join(f"{x(p.x[0]):.1f},{y(p.y[0]):.1f}" for p in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        for p in line:
            if p.label:
                parts += cross(p, x, y, color)
        if legend:
            parts.append(f'<circle cx="{left + 6}" cy="{8 + 17 * number}" r="4" fill="{color}"/>')
            parts.append(text(left + 16, 12 + 17 * number, name, anchor="start"))
    label = html.escape(f"{upward} against {across}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height + legend}" role="img" '
        f'aria-label="{label}" font-family="system-ui, DejaVu Sans, sans-serif" font-size="11.5" '
        'fill="#69707c"><style>.grid{stroke:#8884;fill:none}</style>' + "".join(parts) + "</svg>"
    )


def cross(point: Point, x: "Axis", y: "Axis", color: str) -> list[str]:
    """The intervals of a point, and its label."""
    at = x(point.x[0]), y(point.y[0])
    path = (
        f"M{x(point.x[1]):.1f},{at[1]:.1f} H{x(point.x[2]):.1f} M{at[0]:.1f},{y(point.y[1]):.1f} V{y(point.y[2]):.1f}"
    )
    return [
        f'<path d="{path}" stroke="{color}" stroke-opacity=".35"/>',
        f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="4" fill="{color}"/>',
        text(at[0] + 7, at[1] - 6, point.label, anchor="start"),
    ]


class Axis:
    """Values between the ends of all intervals, on pixels from `start` to `end`."""

    def __init__(self, values: Sequence[tuple[float, float, float]], start: float, end: float):
        low, high = min(value[1] for value in values), max(value[2] for value in values)
        margin = (high - low) * 0.08 or 0.01
        self.low, self.high, self.start, self.end = low - margin, high + margin, start, end

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """About `TICKS` round values."""
        rough = (self.high - self.low) / TICKS
        unit = 10 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        return [step * number for number in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def short(value: float) -> str:
    """`0.25`, `−0.1`, `0`, `800`."""
    return f"{round(value, 3) + 0.0:.3f}".rstrip("0").rstrip(".").replace("-", "−")


def text(x: float, y: float, words: str, anchor: str = "middle", turn: str = "") -> str:
    turned = f' transform="{turn}"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}>{html.escape(words)}</text>'


def read_losses(run: Path) -> dict[str, list[tuple[float, float]]]:
    """(step, value) of every loss in the run's metrics.csv, in its order of columns; none where it has no such file."""
    file = run / METRICS_FILE
    if not file.is_file():
        return {}
    found: dict[str, list[tuple[float, float]]] = {}
    with file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            for name, value in row.items():
                if name and value and SHOWN in name and math.isfinite(float(value)):
                    found.setdefault(name, []).append((float(row["step"]), float(value)))
    return {name: points for name, points in found.items() if len(points) > 1}


def loss_charts(runs: Sequence[tuple[str, Path]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(title, [(name of the loss, SVG)]) for each run that has losses."""
    drawn = []
    for title, run in runs:
        losses = {
            name: [Point((step, step, step), (value, value, value)) for step, value in points]
            for name, points in read_losses(run).items()
        }
        if losses:
            charts = [(name, chart({name: line}, "step", "", name, 300, 170)) for name, line in losses.items()]
            drawn.append((title, charts))
    return drawn
