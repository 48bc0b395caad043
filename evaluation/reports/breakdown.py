"""Where a mean comes from: by kind of subject, by subject, by template, by what the words ask for; whatever parts the
benchmark tells.

Means are of the pairs in samples.csv, as in the table, but not clamped at 0: one subject's may well lie below.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from evaluation.benchmarks import benchmark_of, metric
from evaluation.images.systems import AFTER_STAGE_3
from evaluation.scores.bootstrap import Bootstrap, mean_interval
from evaluation.scores.results import Sample, shown_columns
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
KEYS = ["table", "system", "by", "part", "metric"]


def breakdown(samples: Sequence[Sample], bootstrap: Bootstrap) -> pd.DataFrame:
    """Every part of every system that answers prompts: `KEYS`, then the mean with its interval (over subjects; within
    one subject, over its templates), `n` pairs that were averaged and `units` that were drawn."""
    rows = [
        (sample.table, sample.system, by, part, sample.metric, unit, sample.score)
        for sample in samples
        for by, (part, unit) in sample.item.parts.items()
    ]
    found = []
    for key, group in pd.DataFrame(rows, columns=[*KEYS, "unit", "score"]).groupby(KEYS, sort=False):
        scores, units = torch.tensor(group["score"].to_numpy(), dtype=torch.float64), group["unit"].to_list()
        low, high = mean_interval(scores, units, bootstrap.replicates, bootstrap.seed)
        found.append((*key, float(scores.mean()), low, high, len(units), len(set(units))))  # type: ignore[misc]
    return pd.DataFrame(found, columns=[*KEYS, "value", "low", "high", "n", "units"])


def write_breakdown(parts: pd.DataFrame, file: Path) -> None:
    """CSV, a line for each part and metric."""
    write_text(file, parts.to_csv(index=False, float_format="%.6f"))


@dataclass(frozen=True)
class Section:
    """One breakdown of one system in a benchmark's own table, as texts: parts in the first column, n in the last."""

    table: str
    system: str
    by: str
    title: str
    rows: pd.DataFrame


def sections(parts: pd.DataFrame) -> list[Section]:
    """All that a page shows, table by table, system by system; in each the worst part first."""
    found = []
    own = parts[parts["table"] == parts["table"].map(benchmark_of)]
    for (table, system, by), group in own.groupby(["table", "system", "by"], sort=False):  # type: ignore[misc]
        columns = shown_columns(table, set(own[own["table"] == table]["metric"]))
        rows: dict[str, dict[str, dict]] = {}
        for row in group.to_dict(orient="records"):  # type: ignore[call-overload]
            rows.setdefault(row["part"], {})[row["metric"]] = row
        first = SORTED_BY.get(by)
        texts = []
        for name in sorted(rows, key=lambda name: rows[name][first]["value"] if first in rows[name] else 0.0):
            row = rows[name]
            cells = {kind.heading(): part_text(row[kind.name]) if kind.name in row else "–" for kind in columns}
            sizes = " / ".join(map(str, dict.fromkeys(part["n"] for part in row.values())))
            texts.append({by.capitalize(): name, **cells, "n": sizes})
        found.append(Section(table, system, by, TITLES.get(by, f"By {by}"), pd.DataFrame(texts)))
    return found


def part_text(part: dict) -> str:
    """`0.694 (0.671–0.716)`; of a single unit there is no interval."""
    kind, values = metric(part["metric"]), (part["value"], part["low"], part["high"])
    return kind.number(part["value"]) if part["units"] == 1 else kind.text(*values)


def shown_system(systems: Sequence[str]) -> str | None:
    """The one that pages show first: KOSMOS-G after stage 3, or the last there is."""
    return AFTER_STAGE_3 if AFTER_STAGE_3 in systems else next(reversed(systems), None)
