"""Break means down by kind of subject, subject, template and other parts that a benchmark defines (`Item.parts`).

Means are over the pairs in samples.csv, as in the tables, but not clamped at 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from evaluation.benchmarks import benchmark_of, metric
from evaluation.images.systems import AFTER_STAGE_3
from evaluation.scores.bootstrap import Bootstrap, mean_interval
from evaluation.scores.results import Sample, shown_columns

TITLES = {
    "kind": "By kind of subject",
    "subject": "By subject",
    "template": "By template",
    "words": "By what the words ask for",
}
"""Titles of the sections; other kinds of parts are titled by their name."""
SORTED_BY = {"subject": "dino", "template": "clip_t", "words": "words"}
"""Metric by which the parts of a section are sorted, lowest first."""
KEYS = ["table", "system", "by", "part", "metric"]


def breakdown(samples: Sequence[Sample], bootstrap: Bootstrap) -> pd.DataFrame:
    """Return a row for each part of each system: `KEYS`, the mean `value`, its interval `low` to `high` (over subjects;
    for a subject, over its templates), the number `n` of pairs, and the number of `units` that were resampled."""
    rows = [
        (sample.table, sample.system, by, part, sample.metric, unit, sample.score)
        for sample in samples
        for by, (part, unit) in sample.item.parts.items()
    ]
    means = []
    for key, group in pd.DataFrame(rows, columns=[*KEYS, "unit", "score"]).groupby(KEYS, sort=False):
        scores, units = torch.tensor(group["score"].to_numpy(), dtype=torch.float64), group["unit"].to_list()
        low, high = mean_interval(scores, units, bootstrap.replicates, bootstrap.seed)
        means.append((*key, float(scores.mean()), low, high, len(units), len(set(units))))  # type: ignore[misc]
    return pd.DataFrame(means, columns=[*KEYS, "value", "low", "high", "n", "units"])


@dataclass(frozen=True)
class Section:
    """A breakdown of a system in its benchmark's own table, as texts: first column the part, last column n."""

    table: str
    system: str
    by: str
    title: str
    rows: pd.DataFrame


def sections(parts: pd.DataFrame) -> list[Section]:
    """Return the sections of the report by table and system, each with the lowest part first."""
    result = []
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
        result.append(Section(table, system, by, TITLES.get(by, f"By {by}"), pd.DataFrame(texts)))
    return result


def part_text(part: dict) -> str:
    """Format a mean as `0.694 (0.671–0.716)`, without an interval if there is a single unit."""
    kind, values = metric(part["metric"]), (part["value"], part["low"], part["high"])
    return kind.number(part["value"]) if part["units"] == 1 else kind.text(*values)


def shown_system(systems: Sequence[str]) -> str | None:
    """Return the system that the report shows: KOSMOS-G after stage 3, or else the last one."""
    return AFTER_STAGE_3 if AFTER_STAGE_3 in systems else next(reversed(systems), None)
