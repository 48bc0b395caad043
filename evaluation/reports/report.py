"""report.html: one file with every picture inside, that shows whether a model keeps *this* subject."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from PIL import Image

from evaluation.benchmarks import metric, titles
from evaluation.images.systems import AFTER_STAGE_3, BEFORE_STAGE_3
from evaluation.protocols.requests import read_image
from evaluation.reports import breakdown, guidance, paper
from evaluation.reports.breakdown import Part
from evaluation.scores.results import Score, columns, headings, protocol_of, table_rows, tables_of
from kosmosg.files import write_text
from kosmosg.image_processing import FORMATS

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
class Examples:
    """Some prompts of a benchmark, with their input images, and each system's image of each."""

    title: str
    prompts: list[str]
    inputs: list[list[Path]]
    systems: list[tuple[str, list[Path]]]


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
    examples: list[Examples]
    curves: list[tuple[str, list[tuple[str, str]]]]
    notes: list[str]
    provenance: dict[str, str]


def write_report(report: Report, file: Path) -> None:
    """Render and write, atomically."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["embed"] = embed
    sections = breakdown.sections(report.parts)
    systems = list(dict.fromkeys(section.system for section in sections))
    page = environment.get_template("report.html").render(
        report=report,
        tables=[chart_rows(report.scores, table) for table in tables_of(report.scores)],
        findings=findings(report.scores),
        guidance=[(metric(name).heading(), svg) for name, svg in guidance.charts(report.scores)],
        breakdowns=[(system, [section for section in sections if section.system == system]) for system in systems],
        shown_system=breakdown.shown_system(systems),
        input_of={image.name: image for image in report.inputs},
        printed=printed(report.scores),
        caution=paper.CAUTION,
        after=AFTER_STAGE_3,
    )
    write_text(file, page)


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


def printed(scores: Sequence[Score]) -> list[dict]:
    """The paper's numbers for the tables that there are."""
    tables = []
    for table in tables_of(scores):
        if table in paper.PRINTED:
            title, names, rows = paper.PRINTED[table]
            kinds = [metric(name) for name in names]
            cells = [(row.system, row.cells([kind.decimals for kind in kinds])) for row in rows]
            tables.append({"title": title, "columns": [kind.title for kind in kinds], "rows": cells})
    return tables


def chart_rows(scores: Sequence[Score], table: str) -> dict:
    """A table with, for each cell, where its value and interval lie on the column's scale, in percent."""
    rows, metrics = table_rows(scores, table), columns(scores, table)
    scales = {}
    for kind in metrics:
        found = [row[kind.name] for _, row in rows if kind.name in row]
        if found:
            low, high = min(score.low for score in found), max(score.high for score in found)
            padding = (high - low) * 0.04 or 0.01
            scales[kind.name] = (low - padding, high - low + 2 * padding)
    drawn = []
    for system, row in rows:
        cells = []
        for kind in metrics:
            score = row.get(kind.name)
            if score is None:
                cells.append(None)
                continue
            start, width = scales[kind.name]
            low, at, high = (100 * (value - start) / width for value in (score.low, score.value, score.high))
            value, _, interval = score.text().partition(" (")
            cells.append(
                {"text": value, "range": interval[:-1], "n": score.n, "low": low, "at": at, "width": high - low}
            )
        drawn.append((system, cells))
    return {
        "title": titles()[table],
        "protocol": protocol_of(scores, table),
        "columns": headings(metrics),
        "rows": drawn,
    }


def findings(scores: Sequence[Score]) -> list[Finding]:
    """What stage 3 did to each metric."""
    lines = []
    for table in tables_of(scores):
        rows = dict(table_rows(scores, table))
        for kind in (kind for kind in columns(scores, table) if kind.headline):
            before, after = (rows.get(name, {}).get(kind.name) for name in (BEFORE_STAGE_3, AFTER_STAGE_3))
            if before is not None and after is not None:
                apart = before.high < after.low or after.high < before.low
                lines.append(Finding(titles()[table], kind.heading(), before.text(), after.text(), apart))
    return lines
