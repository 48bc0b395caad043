"""Scores as results.json, results.md and a printed table; the paper's own numbers stand apart from ours."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from evaluation.benchmarks import columns_of, metric, titles
from evaluation.images.systems import TABLE_ORDER
from evaluation.reports import paper
from evaluation.scores.metric import Metric
from kosmosg.files import write_text

WIDE = 5
"""Columns of one printed table: value and interval on two lines, these fit 80 characters."""


@dataclass(frozen=True)
class Score:
    """One number of a table with its 95 % interval.

    Args:
        table: of a benchmark (`Benchmark.tables`), or guidance: a point of the curve over guidance scales.
        metric: by its name.
        n: pairs that were averaged; generated images, for FID and KID.
        protocol: `evaluation.protocols.protocol.identity`; `task_of` it where the images were not sampled by it.
        experiment, stage, seed: of a system that is one of several runs, see `evaluation.images.generation.Variant`.
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


Row = Mapping[str, Score]
"""The scores of one system by metric."""


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


def table_rows(scores: Sequence[Score], table: str) -> list[tuple[str, Row]]:
    """(system, its scores by metric) in the order of the table; systems without scores are left out."""
    found: dict[str, dict[str, Score]] = {}
    for score in scores:
        if score.table == table:
            found.setdefault(score.system, {})[score.metric] = score
    return sorted(found.items(), key=lambda item: place(item[0]))


def place(system: str) -> int:
    """Of a system among the rows: ours first."""
    return TABLE_ORDER.index(system) if system in TABLE_ORDER else len(TABLE_ORDER)


def tables_of(scores: Sequence[Score]) -> list[str]:
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


def cells(found: Row, metrics: Sequence[type[Metric]]) -> list[str]:
    """The texts of a row, a dash where the system has no such score."""
    return [found[kind.name].text() if kind.name in found else "–" for kind in metrics]


def sizes(found: Row) -> str:
    """The n of a row, once where all its metrics share it."""
    return " / ".join(map(str, dict.fromkeys(score.n for score in found.values())))


def headings(metrics: Sequence[type[Metric]]) -> list[str]:
    return [kind.heading() for kind in metrics]


def markdown(scores: Sequence[Score], notes: Sequence[str], sections: Sequence[str] = ()) -> str:
    """results.md; the lines of further `sections` stand between our tables and the paper's."""
    lines = ["# Results", "", intervals(scores), ""]
    for table in tables_of(scores):
        rows, metrics = table_rows(scores, table), columns(scores, table)
        lines += [f"## {titles()[table]}", "", f"Protocol `{protocol_of(scores, table)}`.", ""]
        header = ["System", *headings(metrics), "n"]
        lines += markdown_table(header, [[system, *cells(found, metrics), sizes(found)] for system, found in rows])
    lines += [f"- {note}" for note in notes]
    lines += ["", *sections]
    if printed := [table for table in paper.PRINTED if table in tables_of(scores)]:
        lines += ["# The paper's numbers", "", paper.CAUTION, ""]
    for table in printed:
        title, metrics, rows = paper.PRINTED[table]
        kinds = [metric(name) for name in metrics]
        shown = [[row.system, *row.cells([kind.decimals for kind in kinds])] for row in rows]
        lines += markdown_table([f"{title}, as printed", *(kind.title for kind in kinds)], shown)
    return "\n".join(lines)


def intervals(scores: Sequence[Score]) -> str:
    """`Value (95 % interval) over n …`, and which columns have something else in its place."""
    kinds = {score.metric: metric(score.metric) for score in scores}.values()
    others = [f"of {kind.title}, {kind.interval}" for kind in kinds if kind.interval != Metric.interval]
    return f"Value ({'; '.join([Metric.interval, *others])}) over n pairs; n images for FID and KID."


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> list[str]:
    """Lines of a table whose first `texts` columns are words, the others numbers."""
    rule = [*["---"] * texts, *["---:"] * (len(header) - texts)]
    escaped = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    return [*("| " + " | ".join(row) + " |" for row in (escaped[0], rule, *escaped[1:])), ""]


def print_results(scores: Sequence[Score], console: Console) -> None:
    """The tables on a terminal."""
    for table in tables_of(scores):
        rows, metrics = table_rows(scores, table), columns(scores, table)
        for start in range(0, len(metrics), WIDE):
            shown = metrics[start : start + WIDE]
            printed = Table(
                title=titles()[table], caption=f"{protocol_of(scores, table)}; value (95 % interval)", show_lines=True
            )
            printed.add_column("System")
            for kind in shown:
                printed.add_column(kind.heading(), justify="right", no_wrap=True)
            printed.add_column("n", justify="right", no_wrap=True)
            for system, found in rows:
                texts = [cell.replace(" (", "\n").rstrip(")") for cell in cells(found, shown)]
                printed.add_row(system, *texts, sizes({k.name: found[k.name] for k in shown if k.name in found}))
            console.print(printed)
