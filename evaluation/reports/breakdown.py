"""Where a mean comes from: by kind of subject, by subject, by template, by what the words ask for; whatever parts the
benchmark tells.

Means are of the pairs in samples.csv, as in the table, but not clamped at 0: one subject's may well lie below.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from evaluation.benchmarks import benchmark_of, metric
from evaluation.images.systems import AFTER_STAGE_3
from evaluation.protocols.benchmark import Benchmark
from evaluation.scores.bootstrap import Bootstrap, mean_interval
from evaluation.scores.metric import Metric
from evaluation.scores.results import headings, markdown_table, shown_columns
from evaluation.scores.scoring import Sample
from kosmosg.files import write_text

TITLES = {
    "kind": "By kind of subject",
    "subject": "By subject",
    "template": "By template",
    "words": "By what the words ask for",
}
"""Parts by which a page shows means; others are in breakdown.csv, or shown under their own name."""
SORTED_BY = {"subject": "dino", "template": "clip_t", "words": "words"}
"""Subjects are what fidelity fails on, templates what the text fails on: the worst stand first."""


@dataclass(frozen=True)
class Part:
    """The mean over a part of a system's images, with its 95 % interval.

    Args:
        by: kind, subject, template or words; see `Benchmark.parts`.
        part: its name.
        low, high: over subjects; within one subject, over its templates.
        n: pairs that were averaged.
        units: subjects, or templates, that were drawn.
    """

    table: str
    system: str
    by: str
    part: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    units: int

    def text(self) -> str:
        """`0.694 (0.671–0.716)`; of a single unit there is no interval."""
        kind = metric(self.metric)
        return kind.number(self.value) if self.units == 1 else kind.text(self.value, self.low, self.high)


def breakdown(samples: Sequence[Sample], benchmarks: Mapping[str, Benchmark], bootstrap: Bootstrap) -> list[Part]:
    """Every part of every system that answers prompts."""
    groups: dict[tuple[str, str, str, str, str], tuple[list[float], list[str]]] = {}
    for sample in samples:
        parts = benchmarks[benchmark_of(sample.table)].parts(sample.unit, sample.template)
        for by, (part, unit) in parts.items():
            scores, units = groups.setdefault((sample.table, sample.system, by, part, sample.metric), ([], []))
            scores.append(sample.score)
            units.append(unit)
    parts = []
    for (table, system, by, part, name), (scores, units) in groups.items():
        found = torch.tensor(scores, dtype=torch.float64)
        low, high = mean_interval(found, units, bootstrap.replicates, bootstrap.seed)
        parts.append(Part(table, system, by, part, name, float(found.mean()), low, high, len(scores), len(set(units))))
    return parts


def write_breakdown(parts: Sequence[Part], file: Path) -> None:
    """CSV, a line for each part and metric."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Part)], lineterminator="\n")
    writer.writeheader()
    for part in parts:
        numbers = {name: f"{getattr(part, name):.6f}" for name in ("value", "low", "high")}
        writer.writerow({**asdict(part), **numbers})
    write_text(file, text.getvalue())


@dataclass(frozen=True)
class Section:
    """One breakdown of one system in a benchmark's own table: rows of (part, texts in the order of the columns, n)."""

    table: str
    system: str
    by: str
    title: str
    columns: list[type[Metric]]
    rows: list[tuple[str, list[str], str]]


def sections(parts: Sequence[Part]) -> list[Section]:
    """All that a page shows, table by table, system by system; in each the worst part first."""
    groups: dict[tuple[str, str, str], dict[str, dict[str, Part]]] = {}
    for part in parts:
        if part.table == benchmark_of(part.table):
            rows = groups.setdefault((part.table, part.system, part.by), {})
            rows.setdefault(part.part, {})[part.metric] = part
    found = []
    for (table, system, by), rows in groups.items():
        columns = shown_columns(table, {part.metric for part in parts if part.table == table})
        first = SORTED_BY.get(by)
        order = sorted(rows.items(), key=lambda row: row[1][first].value if first in row[1] else 0.0)
        shown = [
            (
                name,
                [row[kind.name].text() if kind.name in row else "–" for kind in columns],
                " / ".join(map(str, dict.fromkeys(part.n for part in row.values()))),
            )
            for name, row in order
        ]
        found.append(Section(table, system, by, TITLES.get(by, f"By {by}"), columns, shown))
    return found


def shown_system(systems: Sequence[str]) -> str | None:
    """The one that pages show first: KOSMOS-G after stage 3, or the last there is."""
    return AFTER_STAGE_3 if AFTER_STAGE_3 in systems else next(reversed(systems), None)


def markdown(parts: Sequence[Part]) -> list[str]:
    """Sections of results.md: kinds of every system; all else of the shown one."""
    found, lines = sections(parts), []
    shown = shown_system([section.system for section in found])
    for table in dict.fromkeys(section.table for section in found):
        own = [section for section in found if section.table == table]
        if kinds := [section for section in own if section.by == "kind"]:
            rows = [[s.system, name, *texts, n] for s in kinds for name, texts, n in s.rows]
            header = ["System", "Kind", *headings(kinds[0].columns), "n"]
            lines += [f"## {kinds[0].title}", "", *markdown_table(header, rows, texts=2)]
        for section in own:
            if section.by == "kind" or section.system != shown:
                continue
            over = "its templates" if section.by == "subject" else "subjects"
            first = f", lowest {metric(SORTED_BY[section.by]).title} first" if section.by in SORTED_BY else ""
            lines += [
                f"## {section.title}",
                "",
                f"{shown}{first}; intervals over {over}. All systems: breakdown.csv.",
                "",
                *markdown_table(
                    [section.by.capitalize(), *headings(section.columns), "n"],
                    [[name, *texts, n] for name, texts, n in section.rows],
                ),
            ]
    return lines
