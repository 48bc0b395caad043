"""Where a mean comes from: by kind of subject, by subject, by template, by what the words ask for.

Means are of the pairs in samples.csv, as in the table, but not clamped at 0: one subject's may well lie below.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from evaluation.config import Bootstrap
from evaluation.images.systems import AFTER_STAGE_3
from evaluation.scores.bootstrap import mean_interval
from evaluation.scores.results import DECIMALS, METRICS, markdown_table, shown_columns
from evaluation.scores.scoring import Sample
from kosmosg.files import write_text

TABLE = "dreambench"
KIND, SUBJECT, TEMPLATE, SORT = "kind", "subject", "template", "words"
TITLES = {KIND: "Kinds of subject", SUBJECT: "Subjects", TEMPLATE: "Templates", SORT: "Words"}
SORTED_BY = {KIND: None, SUBJECT: "dino", TEMPLATE: "clip_t", SORT: "words"}
"""Subjects are what fidelity fails on, templates what the text fails on: the worst stand first."""


@dataclass(frozen=True)
class Part:
    """The mean over a part of a system's images, with its 95 % interval.

    Args:
        by: kind, subject, template or words.
        part: its name.
        low, high: over subjects; within one subject, over its templates.
        n: pairs that were averaged.
        units: subjects, or templates, that were drawn.
    """

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
        numbers = (self.value, self.low, self.high)
        value, low, high = (f"{number:.{DECIMALS[self.metric]}f}".replace("-", "−") for number in numbers)
        if self.units == 1:
            return value
        return f"{value} ({low}–{high})" if self.low >= 0 else f"{value} ({low} … {high})"


def breakdown(
    samples: Sequence[Sample], kinds: Mapping[str, str], bootstrap: Bootstrap, sorts: Mapping[str, str] | None = None
) -> list[Part]:
    """Every part of every system that answers prompts.

    Args:
        kinds: of each subject: object or live.
        sorts: of templates: what their words ask for.
    """
    groups: dict[tuple[str, str, str, str], tuple[list[float], list[str]]] = {}
    for sample in samples:
        if sample.table != TABLE or not sample.template:
            continue
        subject, sort = sample.unit, (sorts or {}).get(sample.template)
        for by, part, unit in (
            (KIND, kinds[subject], subject),
            (SUBJECT, subject, sample.template),
            (TEMPLATE, sample.template, subject),
            (SORT, sort, subject),
        ):
            if part is None:
                continue
            scores, units = groups.setdefault((sample.system, by, part, sample.metric), ([], []))
            scores.append(sample.score)
            units.append(unit)
    parts = []
    for (system, by, part, metric), (scores, units) in groups.items():
        found = torch.tensor(scores, dtype=torch.float64)
        low, high = mean_interval(found, units, bootstrap.replicates, bootstrap.seed)
        parts.append(Part(system, by, part, metric, float(found.mean()), low, high, len(scores), len(set(units))))
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


def part_columns(parts: Sequence[Part]) -> list[str]:
    """The metrics that parts are shown with."""
    return shown_columns(TABLE, {part.metric for part in parts})


def systems_of(parts: Sequence[Part]) -> list[str]:
    """Systems that have parts, in their order."""
    return list(dict.fromkeys(part.system for part in parts))


def shown_system(parts: Sequence[Part]) -> str | None:
    """The one that results.md shows: KOSMOS-G after stage 3, or the last there is."""
    systems = systems_of(parts)
    return AFTER_STAGE_3 if AFTER_STAGE_3 in systems else next(reversed(systems), None)


def part_rows(parts: Sequence[Part], system: str, by: str) -> list[tuple[str, dict[str, Part]]]:
    """(part, its means by metric), the worst first."""
    rows: dict[str, dict[str, Part]] = {}
    for part in parts:
        if (part.system, part.by) == (system, by):
            rows.setdefault(part.part, {})[part.metric] = part
    metric = SORTED_BY[by]
    if metric is None:
        return list(rows.items())
    return sorted(rows.items(), key=lambda row: row[1][metric].value if metric in row[1] else 0.0)


def markdown(parts: Sequence[Part]) -> list[str]:
    """Sections of results.md: kinds of every system; subjects and templates of the shown one."""
    shown = shown_system(parts)
    if shown is None:
        return []
    metrics = part_columns(parts)
    rows = [
        [system, name, *(found[metric].text() if metric in found else "–" for metric in metrics), count(found)]
        for system in systems_of(parts)
        for name, found in part_rows(parts, system, KIND)
    ]
    header = [METRICS[metric] for metric in metrics]
    lines = ["## By kind of subject", "", *markdown_table(["System", "Kind", *header, "n"], rows, texts=2)]
    for by, title, order in (
        (SUBJECT, "By subject", "lowest DINO"),
        (TEMPLATE, "By template", "lowest CLIP-T"),
        (SORT, "By what the words ask for", "lowest Words"),
    ):
        rows = [
            [name, *(found[metric].text() if metric in found else "–" for metric in metrics), count(found)]
            for name, found in part_rows(parts, shown, by)
        ]
        if not rows:
            continue
        over = "its templates" if by == SUBJECT else "subjects"
        lines += [
            f"## {title}",
            "",
            f"{shown}, {order} first; intervals over {over}. All systems: breakdown.csv.",
            "",
            *markdown_table([by.capitalize(), *header, "n"], rows),
        ]
    return lines


def count(found: Mapping[str, Part]) -> str:
    """The n of a row, once where all its metrics share it."""
    return " / ".join(map(str, dict.fromkeys(part.n for part in found.values())))
