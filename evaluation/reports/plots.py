"""Charts as SVG that is read on light and dark pages: losses of a run, fidelity against editability."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from evaluation.benchmarks import metric
from evaluation.images.systems import AFTER_STAGE_3
from evaluation.reports.tables import EDITABILITY, FIDELITY, points_of
from evaluation.scores.results import Score

METRICS_FILE = "metrics.csv"
SHOWN = "loss"
"""A column of a run's metrics whose name holds this is drawn."""
COLORS = ("#7b8494", "#2563a8", "#4d7c0f", "#7c3aed", "#0f766e", "#a16207")
ACCENT, SOFT = "#c2410c", "#69707c"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # words stay words, in the page's fonts
    "svg.hashsalt": "kosmosg",  # the same chart is the same bytes
    "font.family": ["system-ui", "DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.edgecolor": "#88888844",
    "axes.grid": True,
    "grid.color": "#88888844",
    "grid.linewidth": 0.7,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
} | dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), SOFT)


def guidance_charts(scores: Sequence[Score]) -> dict[str, str]:
    """By fidelity metric, the SVG of DINO and CLIP-I against CLIP-T, each with its intervals; none without a curve."""
    points, charts = points_of(scores), {}
    for name in FIDELITY if points else ():
        with rc_context(STYLE):
            figure, axes = canvas(6.2, 4.0)
            for place, (system, line) in enumerate(points.items()):
                color = ACCENT if system == AFTER_STAGE_3 else COLORS[place % len(COLORS)]
                x, y = ([row[of] for _, row in line] for of in (EDITABILITY, name))
                across, up = [score.value for score in x], [score.value for score in y]
                spread = {"xerr": errors(x), "yerr": errors(y), "ecolor": f"{color}80", "elinewidth": 1}
                axes.errorbar(across, up, **spread, color=color, marker="o", markersize=5, linewidth=1.4, label=system)
                for (scale, _), *at in zip(line, across, up, strict=True):
                    axes.annotate(f"{scale:g}", at, xytext=(5, 4), textcoords="offset points")  # type: ignore[arg-type]
            axes.set_xlabel(f"{metric(EDITABILITY).title} →")
            axes.set_ylabel(f"{metric(name).title} →")
            if len(points) > 1:
                figure.legend(loc="outside upper left", frameon=False)
            charts[name] = svg(figure)
    return charts


def loss_charts(runs: Mapping[str, Path]) -> dict[str, dict[str, str]]:
    """By title and name, the SVG of each loss in a run's metrics.csv; runs without losses are left out."""
    drawn: dict[str, dict[str, str]] = {}
    for title, run in runs.items():
        for name, line in read_losses(run).items():
            with rc_context(STYLE):
                figure, axes = canvas(3.4, 1.9)
                axes.plot(line.index, line, color=ACCENT, linewidth=1.3)
                axes.set_xlabel("step")
                drawn.setdefault(title, {})[name] = svg(figure)
    return drawn


def read_losses(run: Path) -> dict[str, Any]:
    """Every loss in the run's metrics.csv, a series by step, as its columns are ordered; none without such a file."""
    file = run / METRICS_FILE
    if not file.is_file():
        return {}
    table = pd.read_csv(file, index_col="step").replace([np.inf, -np.inf], np.nan)
    losses = {name: table[name].dropna() for name in table if SHOWN in str(name)}
    return {str(name): line for name, line in losses.items() if len(line) > 1}


def canvas(width: float, height: float):
    """An empty figure and its axes, in inches, on no background."""
    figure = Figure((width, height), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def errors(scores: Sequence[Score]) -> list[list[float]]:
    """How far the intervals reach down and up."""
    return [[max(0.0, s.value - s.low) for s in scores], [max(0.0, s.high - s.value) for s in scores]]


def svg(figure: Figure) -> str:
    """The figure as an element of a page."""
    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
