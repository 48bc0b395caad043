"""Compute the scores of a system, store them, and arrange them in tables."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from evaluation.benchmarks import BENCHMARKS, METRICS, columns_of, metric, titles
from evaluation.images.systems import TABLE_ORDER
from evaluation.protocols.benchmark import Item
from evaluation.scores.metric import Context, Metric
from kosmosg.files import write_text

MAX_COLUMNS = 5
"""Columns of a printed table that fit 80 characters, with value and interval on two lines."""
Row = Mapping[str, "Score"]
"""The scores of one system by metric."""


@dataclass(frozen=True)
class Score:
    """One number of a table with its 95 % interval.

    Args:
        table: table of a benchmark (`Benchmark.tables`), or `guidance` for a point of the curve.
        metric: name of the metric.
        n: number of pairs; of generated images for FID and KID.
        protocol: `identity` of the protocol, or `task_of` it if the images were not sampled by it.
        experiment, stage, seed: of one of several training runs, see evaluation.images.generation.System.
        guidance_scale: of a point of the curve; otherwise the protocol has it.
    """

    table: str
    system: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    protocol: str
    experiment: str | None = None
    stage: str | None = None
    seed: int | None = None
    guidance_scale: float | None = None

    def text(self) -> str:
        """Format the score as `0.694 (0.671–0.716)`."""
        return metric(self.metric).text(self.value, self.low, self.high)


@dataclass(frozen=True)
class Sample:
    """Score of one image against a reference image, its input image, a text or labels."""

    table: str
    system: str
    metric: str
    item: Item
    against: str
    score: float


def score_images(
    benchmark: str, protocol: str, context: Context, system: str, items: Sequence[Item], first: bool = True
) -> tuple[list[Score], list[Sample]]:
    """Compute all metrics of a benchmark that its protocol and the images allow.

    Args:
        protocol: identity stored in the scores.
        first: whether this is rank 0, which aggregates; other ranks only help to encode the images.

    Returns:
        The scores, and the samples of metrics that are means over images.
    """
    scores: list[Score] = []
    samples: list[Sample] = []
    for table in BENCHMARKS[benchmark].tables:
        for kind in METRICS[table]:
            if any(name not in context.networks for name in kind.needs):
                continue
            computed = kind(context)
            rows = computed.score(items)
            if not rows or not first:
                continue
            estimate = computed.aggregate(rows)
            interval = (estimate.value, estimate.low, estimate.high, estimate.n)
            scores.append(Score(table, system, kind.name, *interval, protocol))
            if kind.samples:
                samples += [Sample(table, system, kind.name, r.item, r.against, float(r.value)) for r in rows]
    return scores, samples


def write_samples(samples: Sequence[Sample], file: Path) -> None:
    """Write the score of every pair as CSV; paths under the file's folder are relative to it."""

    def relative(path: str) -> str:
        return str(Path(path).relative_to(file.parent)) if Path(path).is_relative_to(file.parent) else path

    columns = ["table", "system", "metric", "unit", "template", "file", "against", "score"]
    rows = []
    for s in samples:
        files = relative(str(s.item.file)), relative(s.against)
        rows.append((s.table, s.system, s.metric, s.item.unit, s.item.group, *files, s.score))
    write_text(file, pd.DataFrame(rows, columns=columns).to_csv(index=False, float_format="%.6f"))


def write_results(scores: Sequence[Score], file: Path) -> None:
    """Write results.json: a list of the fields of `Score` that have a value."""
    rows = [{name: value for name, value in asdict(score).items() if value is not None} for score in scores]
    write_text(file, json.dumps(rows, indent=1, ensure_ascii=False))


def read_results(file: Path) -> list[Score]:
    """Read the output of `write_results`.

    Raises:
        ValueError: the file has another structure.
    """
    try:
        return [Score(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
    except (TypeError, ValueError) as error:
        raise ValueError(f"'{file}' is not a results.json of this project ({error}).") from error


def table_rows(scores: Sequence[Score], table: str) -> dict[str, Row]:
    """Return the scores of a table by system and metric, in the table's order of systems."""
    rows: dict[str, dict[str, Score]] = {}
    for score in scores:
        if score.table == table:
            rows.setdefault(score.system, {})[score.metric] = score
    return {system: rows[system] for system in sorted(rows, key=row_position)}


def row_position(system: str) -> int:
    """Return the position of a system among the rows; other models are last."""
    return TABLE_ORDER.index(system) if system in TABLE_ORDER else len(TABLE_ORDER)


def tables_in(scores: Sequence[Score]) -> list[str]:
    """Return the tables that have scores, in the order of the report."""
    return [table for table in titles() if any(score.table == table for score in scores)]


def protocol_of(scores: Sequence[Score], table: str) -> str | None:
    """Return the identity of a table, with its sampling if any row was sampled by it; None without such a table."""
    return max((score.protocol for score in scores if score.table == table), key=len, default=None)


def columns(scores: Sequence[Score], table: str) -> list[type[Metric]]:
    """Return the metrics of a table; optional ones only if they have scores."""
    return shown_columns(table, {score.metric for score in scores if score.table == table})


def shown_columns(table: str, measured: Collection[str]) -> list[type[Metric]]:
    """Return the metrics of a table; optional ones only if they were measured."""
    return [kind for kind in columns_of(table) if not kind.optional or kind.name in measured]


def texts(row: Row, metrics: Sequence[type[Metric]]) -> dict[str, str]:
    """Format a row by column heading, with a dash for missing scores. Last is n, once if the metrics share it."""
    cells = {kind.heading(): row[kind.name].text() if kind.name in row else "–" for kind in metrics}
    sizes = dict.fromkeys(row[kind.name].n for kind in metrics if kind.name in row)
    return {**cells, "n": " / ".join(map(str, sizes))}


def print_results(scores: Sequence[Score], console: Console) -> None:
    """Print the tables on a terminal."""
    for table in tables_in(scores):
        metrics = columns(scores, table)
        for start in range(0, len(metrics), MAX_COLUMNS):
            shown = metrics[start : start + MAX_COLUMNS]
            rows = {name: texts(row, shown) for name, row in table_rows(scores, table).items()}
            caption = f"{protocol_of(scores, table)}; value (95 % interval)"
            printed = Table("System", title=titles()[table], caption=caption, show_lines=True)
            for heading in next(iter(rows.values())):
                printed.add_column(heading, justify="right", no_wrap=True)
            for system, cells in rows.items():
                printed.add_row(system, *(cell.replace(" (", "\n").rstrip(")") for cell in cells.values()))
            console.print(printed)
