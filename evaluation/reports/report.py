"""report.html: one file with every picture inside, that shows whether a model keeps *this* subject."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from PIL import Image

from evaluation.images.systems import AFTER_STAGE_3, BEFORE_STAGE_3
from evaluation.reports import breakdown, guidance, paper
from evaluation.reports.breakdown import Part
from evaluation.scores.results import METRICS, TITLES, Score, columns, protocol_of, table_rows, tables_of
from kosmosg.files import write_text

TEMPLATES = Path(__file__).parent / "templates"
EMBEDDED_SIDE = 256
"""Larger pictures are embedded at this size, so that a report of full-size images can still be opened."""


@dataclass(frozen=True)
class SubjectBlock:
    """One subject: its input image and, for each system, the image of each prompt."""

    name: str
    class_noun: str
    input: Path
    prompts: list[str]
    systems: list[tuple[str, list[Path]]]


@dataclass(frozen=True)
class Grid:
    """Outputs between headers of input images: `top` over the columns, `left` or `labels` before the rows."""

    top: list[Path]
    rows: list[list[Path]]
    left: list[Path] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Input:
    """A subject and the one image that is given of it; `kind` is object or live."""

    name: str
    class_noun: str
    file: Path
    kind: str


@dataclass(frozen=True)
class CaptionBlock:
    """One caption and the image of each system."""

    caption: str
    images: list[Path]


@dataclass(frozen=True)
class Finding:
    """A metric before and after stage 3, and whether its intervals are apart."""

    table: str
    metric: str
    before: str
    after: str
    apart: bool


@dataclass(frozen=True)
class Report:
    """All that the page shows; an empty part leaves its section out."""

    scores: Sequence[Score]
    parts: Sequence[Part]
    inputs: list[Input]
    subjects: list[SubjectBlock]
    stages: Grid | None
    swap: Grid | None
    pair: Grid | None
    pair_prompt: str
    caption_systems: list[str]
    captions: list[CaptionBlock]
    curves: list[tuple[str, list[tuple[str, str]]]]
    notes: list[str]
    provenance: dict[str, str]


def write_report(report: Report, file: Path) -> None:
    """Render and write, atomically."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["embed"] = embed
    environment.filters["number"] = lambda value, digits: "–" if value is None else f"{value:.{digits}f}"
    page = environment.get_template("report.html").render(
        report=report,
        tables=[chart_rows(report.scores, table) for table in tables_of(report.scores)],
        findings=findings(report.scores),
        guidance=[(METRICS[metric], svg) for metric, svg in guidance.charts(report.scores)],
        breakdowns=[(system, part_tables(report.parts, system)) for system in breakdown.systems_of(report.parts)],
        shown_system=breakdown.shown_system(report.parts),
        part_columns=[METRICS[metric] for metric in breakdown.part_columns(report.parts)],
        input_of={image.name: image for image in report.inputs},
        paper_dreambench=[(row.system, *row.values) for row in paper.DREAMBENCH],
        paper_coco=[(row.system, *row.values) for row in paper.COCO],
        after=AFTER_STAGE_3,
    )
    write_text(file, page)


def embed(file: Path) -> str:
    """A picture as a data URI; small ones byte for byte as they were scored."""
    with Image.open(file) as image:
        if image.format == "PNG" and max(image.size) <= EMBEDDED_SIDE:
            return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
        shrunk = image.convert("RGB")
    shrunk.thumbnail((EMBEDDED_SIDE, EMBEDDED_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shrunk.save(buffer, format="JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def chart_rows(scores: Sequence[Score], table: str) -> dict:
    """A table with, for each cell, where its value and interval lie on the column's scale, in percent."""
    rows, metrics = table_rows(scores, table), columns(scores, table)
    scales = {}
    for metric in metrics:
        found = [row[metric] for _, row in rows if metric in row]
        if found:
            low, high = min(score.low for score in found), max(score.high for score in found)
            padding = (high - low) * 0.04 or 0.01
            scales[metric] = (low - padding, high - low + 2 * padding)
    drawn = []
    for system, row in rows:
        cells = []
        for metric in metrics:
            score = row.get(metric)
            if score is None:
                cells.append(None)
                continue
            start, width = scales[metric]
            low, at, high = (100 * (value - start) / width for value in (score.low, score.value, score.high))
            cells.append(
                {"text": score.text().split(" ")[0], "score": score, "low": low, "at": at, "width": high - low}
            )
        drawn.append((system, cells))
    return {
        "title": TITLES[table],
        "protocol": protocol_of(scores, table),
        "columns": [METRICS[metric] for metric in metrics],
        "rows": drawn,
    }


def part_tables(parts: Sequence[Part], system: str) -> list[dict]:
    """Kinds, subjects, templates and words of a system: title, rows of (name, texts in the order of the columns, n)."""
    tables, metrics = [], breakdown.part_columns(parts)
    for by, title in breakdown.TITLES.items():
        rows = [
            (name, [found[m].text() if m in found else "–" for m in metrics], breakdown.count(found))
            for name, found in breakdown.part_rows(parts, system, by)
        ]
        if rows:
            tables.append({"by": by, "title": title, "rows": rows})
    return tables


def findings(scores: Sequence[Score]) -> list[Finding]:
    """What stage 3 did to each metric."""
    lines = []
    for table in tables_of(scores):
        rows = dict(table_rows(scores, table))
        for metric in columns(scores, table):
            before, after = (rows.get(name, {}).get(metric) for name in (BEFORE_STAGE_3, AFTER_STAGE_3))
            if before is not None and after is not None:
                apart = before.high < after.low or after.high < before.low
                lines.append(Finding(TITLES[table], METRICS[metric], before.text(), after.text(), apart))
    return lines
