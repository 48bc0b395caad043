"""report.html: one file with every picture inside, that shows whether a model keeps *this* subject."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2
import pandas as pd
from PIL import Image

from evaluation.benchmarks import metric, titles
from evaluation.images.systems import AFTER_STAGE_3, BEFORE_STAGE_3
from evaluation.plan import Evaluation, Images
from evaluation.protocols.benchmark import read_image
from evaluation.reports import paper
from evaluation.reports.breakdown import Section, sections, shown_system
from evaluation.reports.galleries import Grid, example_grid, shown_subjects, stage_grid, subject_grid, write_sheets
from evaluation.reports.plots import guidance_charts, loss_charts
from evaluation.reports.tables import printed_rows
from evaluation.scores.results import Score, columns, protocol_of, table_rows, tables_in
from kosmosg.files import write_text
from kosmosg.image_processing import FORMATS

TEMPLATES = Path(__file__).parent / "templates"
EMBEDDED_SIDE = 256
"""Larger pictures are embedded at this size, so that a report of full-size images can still be opened."""


def write_report(
    evaluation: Evaluation,
    images: Images,
    galleries: tuple[Grid | None, Grid | None],
    scores: Sequence[Score],
    parts: pd.DataFrame,
    notes: Sequence[str],
    provenance: Mapping[str, str],
) -> None:
    """report.html and sheets/, each atomically.

    Args:
        galleries: of another input image, and of two.
    """
    models = evaluation.config.models
    images = {**images, **{key: rival.files for key, rival in evaluation.external.items()}}
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
        inputs={  # name: class noun, the one image that is given
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
    """A picture as a data URI; small ones byte for byte as they were scored."""
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
    """A table with, for each cell, where its value and interval lie on the column's scale, in percent."""
    rows, metrics = table_rows(scores, table), columns(scores, table)
    drawn: dict[str, list] = {system: [] for system in rows}
    for kind in metrics:
        found = [row[kind.name] for row in rows.values() if kind.name in row]
        low, high = min((score.low for score in found), default=0), max((score.high for score in found), default=0)
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
    """What stage 3 did to each metric, and whether the intervals before and after it are apart."""
    lines = []
    for table in tables_in(scores):
        rows = table_rows(scores, table)
        for kind in (kind for kind in columns(scores, table) if kind.headline):
            before, after = (rows.get(name, {}).get(kind.name) for name in (BEFORE_STAGE_3, AFTER_STAGE_3))
            if before is not None and after is not None:
                apart = before.high < after.low or after.high < before.low
                told = {"before": before.text(), "after": after.text(), "apart": apart}
                lines.append({"table": titles()[table], "metric": kind.heading(), **told})
    return lines
