"""Scores of a system's images, and their tables: as results.json, as text, on a terminal."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table

from evaluation.benchmarks import columns_of, metric, tables_of, titles
from evaluation.images.systems import TABLE_ORDER
from evaluation.protocols.benchmark import Item
from evaluation.scores.metric import Context, Metric
from kosmosg.files import write_text

WIDE = 5
"""Columns of one printed table: value and interval on two lines, these fit 80 characters."""
Row = Mapping[str, "Score"]
"""The scores of one system by metric."""


@dataclass(frozen=True)
class Score:
    """One number of a table with its 95 % interval.

    Args:
        table: of a benchmark (`Benchmark.tables`), or guidance: a point of the curve over guidance scales.
        metric: by its name.
        n: pairs that were averaged; generated images, for FID and KID.
        protocol: `evaluation.protocols.protocol.identity`; `task_of` it where the images were not sampled by it.
        experiment, stage, seed: of a system that is one of several runs, see `evaluation.images.generation.System`.
        guidance_scale: of a point of the curve; elsewhere the protocol says it.
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
        """`0.694 (0.671–0.716)`"""
        return metric(self.metric).text(self.value, self.low, self.high)


@dataclass(frozen=True)
class Sample:
    """The score of one pair: an image against a reference image, its input image, a text or labels."""

    table: str
    system: str
    metric: str
    item: Item
    against: str
    score: float


def score_images(
    benchmark: str, protocol: str, context: Context, system: str, items: Sequence[Item], first: bool = True
) -> tuple[list[Score], list[Sample]]:
    """Every metric of a benchmark that its protocol and the images allow; samples of those that are means over images.

    Args:
        protocol: the identity that scores carry.
        first: whether this process aggregates; the others only help to look at the images.
    """
    scores: list[Score] = []
    samples: list[Sample] = []
    for table, metrics in tables_of(benchmark):
        for kind in metrics:
            if any(name not in context.networks for name in kind.needs):
                continue
            measured = kind(context)
            rows = measured.score(items)
            if not rows or not first:
                continue
            found = measured.aggregate(rows)
            scores.append(Score(table, system, kind.name, found.value, found.low, found.high, found.n, protocol))
            if kind.samples:
                samples += [Sample(table, system, kind.name, r.item, r.against, float(r.value)) for r in rows]
    return scores, samples


def write_samples(samples: Sequence[Sample], file: Path) -> None:
    """CSV of every pair's score; paths under the file's folder are written relative to it."""

    def relative(path: str) -> str:
        return str(Path(path).relative_to(file.parent)) if Path(path).is_relative_to(file.parent) else path

    columns = ["table", "system", "metric", "unit", "template", "file", "against", "score"]
    rows = [
        (
            s.table,
            s.system,
            s.metric,
            s.item.unit,
            s.item.group,
            relative(str(s.item.file)),
            relative(s.against),
            s.score,
        )
        for s in samples
    ]
    write_text(file, pd.DataFrame(rows, columns=columns).to_csv(index=False, float_format="%.6f"))


def write_results(scores: Sequence[Score], file: Path) -> None:
    """results.json: a list of the fields of `Score`, those without a value left out."""
    rows = [{name: value for name, value in asdict(score).items() if value is not None} for score in scores]
    write_text(file, json.dumps(rows, indent=1, ensure_ascii=False))


def read_results(file: Path) -> list[Score]:
    """What `write_results` wrote.

    Raises:
        ValueError: another structure.
    """
    try:
        return [Score(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
    except (TypeError, ValueError) as error:
        raise ValueError(f"'{file}' is no results.json of this project ({error}).") from error


def table_rows(scores: Sequence[Score], table: str) -> dict[str, Row]:
    """The scores of each system of a table by metric, in the table's order; systems without scores are left out."""
    found: dict[str, dict[str, Score]] = {}
    for score in scores:
        if score.table == table:
            found.setdefault(score.system, {})[score.metric] = score
    return {system: found[system] for system in sorted(found, key=place)}


def place(system: str) -> int:
    """Of a system among the rows: ours first."""
    return TABLE_ORDER.index(system) if system in TABLE_ORDER else len(TABLE_ORDER)


def tables_in(scores: Sequence[Score]) -> list[str]:
    """The tables that have scores, in their order."""
    return [table for table in titles() if any(score.table == table for score in scores)]


def protocol_of(scores: Sequence[Score], table: str) -> str | None:
    """Of a table: its task, and the sampling where a row was sampled by it; None without such a table."""
    return max((score.protocol for score in scores if score.table == table), key=len, default=None)


def columns(scores: Sequence[Score], table: str) -> list[type[Metric]]:
    """The metrics of a table, optional ones where there are scores of them."""
    return shown_columns(table, {score.metric for score in scores if score.table == table})


def shown_columns(table: str, found: Collection[str]) -> list[type[Metric]]:
    """The metrics of a table, optional ones where they are `found`."""
    return [kind for kind in columns_of(table) if not kind.optional or kind.name in found]


def texts(found: Row, metrics: Sequence[type[Metric]]) -> dict[str, str]:
    """The text of each column of a row, a dash where the system has no such score; last n, once where all of these
    metrics share it."""
    cells = {kind.heading(): found[kind.name].text() if kind.name in found else "–" for kind in metrics}
    sizes = dict.fromkeys(found[kind.name].n for kind in metrics if kind.name in found)
    return {**cells, "n": " / ".join(map(str, sizes))}


def print_results(scores: Sequence[Score], console: Console) -> None:
    """The tables on a terminal."""
    for table in tables_in(scores):
        metrics = columns(scores, table)
        for start in range(0, len(metrics), WIDE):
            rows = {
                name: texts(found, metrics[start : start + WIDE]) for name, found in table_rows(scores, table).items()
            }
            caption = f"{protocol_of(scores, table)}; value (95 % interval)"
            printed = Table("System", title=titles()[table], caption=caption, show_lines=True)
            for heading in next(iter(rows.values())):
                printed.add_column(heading, justify="right", no_wrap=True)
            for system, cells in rows.items():
                printed.add_row(system, *(cell.replace(" (", "\n").rstrip(")") for cell in cells.values()))
            console.print(printed)
