"""Write report.html, a single file with all images and charts embedded, and the figures in sheets/."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from PIL import Image

from evaluation.benchmarks import metric, titles
from evaluation.images.systems import AFTER_STAGE_3, BEFORE_STAGE_3
from evaluation.plan import Evaluation, Images
from evaluation.protocols.benchmark import read_image
from evaluation.reports import paper
from evaluation.reports.breakdown import Section, sections, shown_system
from evaluation.reports.galleries import Grid, example_grid, shown_subjects, stage_grid, subject_grid, write_sheets
from evaluation.reports.tables import EDITABILITY, FIDELITY, points_of, printed_rows
from evaluation.scores.results import Score, columns, protocol_of, table_rows, tables_in
from kosmosg.files import write_text
from kosmosg.image_processing import FORMATS

TEMPLATES = Path(__file__).parent / "templates"
EMBEDDED_SIDE = 256
"""Larger images are embedded at this size to keep the report small."""
METRICS_FILE = "metrics.csv"
COLORS = ("#7b8494", "#2563a8", "#4d7c0f", "#7c3aed", "#0f766e", "#a16207")
ACCENT, SOFT = "#c2410c", "#69707c"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text in the fonts of the page
    "svg.hashsalt": "kosmosg",  # reproducible bytes
    "font.family": ["system-ui", "DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "axes.edgecolor": "#88888844",
    "axes.grid": True,
    "grid.color": "#88888844",
    "grid.linewidth": 0.7,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
} | dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), SOFT)


def write_report(
    evaluation: Evaluation,
    images: Images,
    galleries: tuple[Grid | None, Grid | None],
    scores: Sequence[Score],
    parts: pd.DataFrame,
    notes: Sequence[str],
    provenance: Mapping[str, str],
) -> None:
    """Write report.html and sheets/, each file atomically.

    Args:
        galleries: see `generate_galleries`.
    """
    models = evaluation.config.models
    images = {**images, **{key: model.files for key, model in evaluation.external.items()}}
    with_subjects = [table for table in evaluation.tables if table.benchmark.subjects]
    stages = next((stage_grid(evaluation, table, images) for table in with_subjects), None)
    write_sheets(evaluation, images, *galleries, stages)
    curve = guidance_charts(scores)
    for name, svg in curve.items():
        write_text(evaluation.output / "sheets" / f"guidance_{name}.svg", svg)
    runs = {"Stage 2, alignment": models.before_stage_3, "Stage 3, instruction tuning": models.after_stage_3}
    breakdowns: dict[str, list[Section]] = {}
    for section in sections(parts):
        breakdowns.setdefault(section.system, []).append(section)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["embed"] = embed
    page = environment.get_template("report.html").render(
        tables=[chart_rows(scores, table) for table in tables_in(scores)],
        findings=findings(scores),
        notes=notes,
        inputs={  # name: class noun, input image
            name: (subject.class_noun, table.benchmark.kept_image(name))
            for table in with_subjects
            for name, subject in table.benchmark.subjects.items()
        },
        stages=stages,
        subjects={
            name: subject_grid(evaluation, table, images, name)
            for table in with_subjects
            for name in shown_subjects(table, evaluation.config.gallery.subjects)
        },
        swap=galleries[0],
        pair=galleries[1],
        pair_prompt=evaluation.config.gallery.pair_prompt,
        examples={
            next(iter(table.benchmark.tables.values())): example_grid(evaluation, table, images)
            for table in evaluation.tables
            if not table.benchmark.subjects
        },
        guidance={metric(name).heading(): svg for name, svg in curve.items()},
        breakdowns=breakdowns,
        shown_system=shown_system(list(breakdowns)),
        curves=loss_charts({title: Path(run) for title, run in runs.items() if run is not None}),
        printed={paper.PRINTED[t][0]: printed_rows(t) for t in tables_in(scores) if t in paper.PRINTED},
        caution=paper.CAUTION,
        provenance=provenance,
        after=AFTER_STAGE_3,
    )
    write_text(evaluation.output / "report.html", page)


def embed(file: Path) -> str:
    """Return an image as a data URI; small PNGs keep their bytes."""
    with Image.open(file, formats=FORMATS) as image:
        kind, small = image.format, max(image.size) <= EMBEDDED_SIDE
    if kind == "PNG" and small:
        return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    shrunk = read_image(file)
    shrunk.thumbnail((EMBEDDED_SIDE, EMBEDDED_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shrunk.save(buffer, format="JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def chart_rows(scores: Sequence[Score], table: str) -> dict:
    """Return a table whose cells have value and interval as positions on the column's scale, in percent."""
    rows, metrics = table_rows(scores, table), columns(scores, table)
    drawn: dict[str, list] = {system: [] for system in rows}
    for kind in metrics:
        every = [row[kind.name] for row in rows.values() if kind.name in row]
        low, high = min((score.low for score in every), default=0), max((score.high for score in every), default=0)
        padding = (high - low) * 0.04 or 0.01
        start, width = low - padding, high - low + 2 * padding
        for system, row in rows.items():
            if (score := row.get(kind.name)) is None:
                drawn[system].append(None)
                continue
            low, at, high = (100 * (value - start) / width for value in (score.low, score.value, score.high))
            value, _, interval = score.text().partition(" (")
            ends = {"low": low, "at": at, "width": high - low}
            drawn[system].append({"text": value, "range": interval[:-1], "n": score.n, **ends})
    headings = [kind.heading() for kind in metrics]
    return {"title": titles()[table], "protocol": protocol_of(scores, table), "columns": headings, "rows": drawn}


def findings(scores: Sequence[Score]) -> list[dict]:
    """Return the effect of stage 3 on each metric, and whether the intervals before and after it are disjoint."""
    lines = []
    for table in tables_in(scores):
        rows = table_rows(scores, table)
        for kind in (kind for kind in columns(scores, table) if kind.headline):
            before, after = (rows.get(name, {}).get(kind.name) for name in (BEFORE_STAGE_3, AFTER_STAGE_3))
            if before is not None and after is not None:
                apart = before.high < after.low or after.high < before.low
                values = {"before": before.text(), "after": after.text(), "apart": apart}
                lines.append({"table": titles()[table], "metric": kind.heading(), **values})
    return lines


def guidance_charts(scores: Sequence[Score]) -> dict[str, str]:
    """Return SVG charts of DINO and CLIP-I against CLIP-T, with intervals, by metric; empty without a curve."""
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
    """Return SVG charts of the losses in each run's metrics.csv, by title of the run and name of the loss."""
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
    """Return the columns of a run's metrics.csv with `loss` in their name, as series by step; empty without a file."""
    file = run / METRICS_FILE
    if not file.is_file():
        return {}
    table = pd.read_csv(file, index_col="step").replace([np.inf, -np.inf], np.nan)
    losses = {str(name): table[name].dropna() for name in table if "loss" in str(name)}
    return {name: line for name, line in losses.items() if len(line) > 1}


def canvas(width: float, height: float):
    """Return an empty figure of this size in inches, and its axes, on a transparent background."""
    figure = Figure((width, height), layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def errors(scores: Sequence[Score]) -> list[list[float]]:
    """Return the distances from each value down and up to the ends of its interval."""
    return [[max(0.0, s.value - s.low) for s in scores], [max(0.0, s.high - s.value) for s in scores]]


def svg(figure: Figure) -> str:
    """Return the figure as an <svg> element."""
    text = io.StringIO()
    FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
