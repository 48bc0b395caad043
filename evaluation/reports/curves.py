"""Training curves of a run folder as small inline SVG charts."""

import csv
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

METRICS_FILE = "metrics.csv"
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 300, 150, 44, 22, 8, 8  # pixels
SHOWN = "loss"
"""A column whose name holds this is a curve."""


@dataclass(frozen=True)
class Curve:
    """One logged value over the steps of a run."""

    name: str
    points: list[tuple[float, float]]


def read_curves(run: Path) -> list[Curve]:
    """The losses in the run's metrics.csv, in its order of columns; none where it has no such file."""
    file = run / METRICS_FILE
    if not file.is_file():
        return []
    found: dict[str, list[tuple[float, float]]] = {}
    with file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            for name, text in row.items():
                if name and text and SHOWN in name:
                    value = float(text)
                    if math.isfinite(value):
                        found.setdefault(name, []).append((float(row["step"]), value))
    return [Curve(name, points) for name, points in found.items() if len(points) > 1]


def chart(curve: Curve) -> str:
    """One curve as an SVG element with its lowest and highest value and last step on the axes."""
    steps, values = zip(*curve.points, strict=True)
    low, high, last = min(values), max(values), max(steps)
    span = (high - low) or 1.0

    def place(step: float, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / (last or 1)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / span)
        return f"{x:.1f},{y:.1f}"

    line = " ".join(place(step, value) for step, value in curve.points)
    floor = HEIGHT - BOTTOM
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(curve.name)}">'
        f'<path class="axis" d="M{LEFT},{TOP} V{floor} H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 5}" y="{TOP + 9}" text-anchor="end">{high:.3g}</text>'
        f'<text x="{LEFT - 5}" y="{floor}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 6}">0</text>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{last:g} steps</text>'
        f'<polyline points="{line}"/></svg>'
    )


def charts(runs: Sequence[tuple[str, Path]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(title, [(name of curve, SVG)]) for each run that has curves."""
    found = [(title, [(curve.name, chart(curve)) for curve in read_curves(run)]) for title, run in runs]
    return [(title, drawn) for title, drawn in found if drawn]
