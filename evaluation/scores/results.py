"""Scores as results.json, results.md and a printed table; the paper's own numbers stand apart from ours."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from evaluation.images.systems import TABLE_ORDER
from evaluation.reports import paper
from kosmosg.files import write_text

METRICS = {
    "dino": "DINO ↑",
    "clip_i": "CLIP-I ↑",
    "clip_t": "CLIP-T ↑",
    "near_copies": "Near copies",
    "kind": "Kind ↑",
    "colour": "Colour ↑",
    "pattern": "Pattern ↑",
    "identity": "Identity ↑",
    "words": "Words ↑",
    "pair_kind": "Kind ↑",
    "pair_identity": "Identity ↑",
    "swapped": "Swapped ↓",
    "missing": "Missing ↓",
    "fid": "FID ↓",
    "kid": "KID ↓",
}
PAIRS = "pairs"
JUDGED = ("kind", "colour", "pattern", "identity", "words")
TITLES = {"dreambench": "Subjects (DreamBench)", PAIRS: "Two subjects", "coco": "Captions (MS-COCO)"}
COLUMNS = {
    "dreambench": ("dino", "clip_i", "clip_t", "near_copies", *JUDGED),
    PAIRS: ("pair_kind", "pair_identity", "swapped", "missing"),
    "coco": ("fid", "kid", "clip_t"),
}
DECIMALS = {"dino": 3, "clip_i": 3, "clip_t": 3, "near_copies": 3, "fid": 2, "kid": 5}
DECIMALS |= dict.fromkeys((*JUDGED, *COLUMNS[PAIRS]), 2)
OPTIONAL = ("kid", "near_copies", *JUDGED)
"""Columns that stand only where there are such scores."""


@dataclass(frozen=True)
class Score:
    """One number of a table with its 95 % interval.

    Args:
        table: dreambench, pairs, coco, or guidance: a point of the curve over guidance scales.
        metric: of METRICS.
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
        value, low, high = (f"{number:.{DECIMALS[self.metric]}f}" for number in (self.value, self.low, self.high))
        return f"{value} ({low}–{high})"


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


def table_rows(scores: Sequence[Score], table: str) -> list[tuple[str, dict[str, Score]]]:
    """(system, its scores by metric) in the order of the table; systems without scores are left out."""
    found: dict[str, dict[str, Score]] = {}
    for score in scores:
        if score.table == table:
            found.setdefault(score.system, {})[score.metric] = score
    order = {name: place for place, name in enumerate(TABLE_ORDER)}
    return sorted(found.items(), key=lambda item: order.get(item[0], len(order)))


def tables_of(scores: Sequence[Score]) -> list[str]:
    """The tables that have scores, in the order of the paper."""
    return [table for table in TITLES if any(score.table == table for score in scores)]


def protocol_of(scores: Sequence[Score], table: str) -> str | None:
    """Of a table: its task, and the sampling where a row was sampled by it; None without such a table."""
    return max((score.protocol for score in scores if score.table == table), key=len, default=None)


def markdown(scores: Sequence[Score], notes: Sequence[str], sections: Sequence[str] = ()) -> str:
    """results.md; the lines of further `sections` stand between our tables and the paper's."""
    lines = ["# Results", "", "Value (95 % interval) over n pairs; n images for FID and KID.", ""]
    for table in tables_of(scores):
        rows, metrics = table_rows(scores, table), columns(scores, table)
        lines += [f"## {TITLES[table]}", "", f"Protocol `{protocol_of(scores, table)}`.", ""]
        header = ["System", *(METRICS[metric] for metric in metrics), "n"]
        lines += markdown_table(header, [[system, *cells(found, metrics), sizes(found)] for system, found in rows])
    lines += [f"- {note}" for note in notes]
    lines += [
        "",
        *sections,
        "# The paper's numbers",
        "",
        "Printed in Table 1 of arXiv 2310.02992: other data, other encoders, full-size models. They are here to be "
        "looked up, not to be compared with the numbers above.",
        "",
    ]
    shown = [
        [row.system, *("–" if value is None else f"{value:.3f}" for value in row.values)] for row in paper.DREAMBENCH
    ]
    lines += markdown_table(["DreamBench, as printed", "DINO", "CLIP-I", "CLIP-T"], shown)
    lines += markdown_table(
        ["MS-COCO, as printed", "FID"], [[row.system, f"{row.values[0]:.2f}"] for row in paper.COCO]
    )
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> list[str]:
    """Lines of a table whose first `texts` columns are words, the others numbers."""
    rule = [*["---"] * texts, *["---:"] * (len(header) - texts)]
    return [*("| " + " | ".join(row) + " |" for row in (header, rule, *rows)), ""]


def columns(scores: Sequence[Score], table: str) -> list[str]:
    """The metrics of a table, optional ones where there are scores of them."""
    return shown_columns(table, {score.metric for score in scores if score.table == table})


def shown_columns(table: str, found: Collection[str]) -> list[str]:
    """The metrics of a table, optional ones where they are `found`."""
    return [metric for metric in COLUMNS[table] if metric not in OPTIONAL or metric in found]


def cells(found: dict[str, Score], metrics: Sequence[str]) -> list[str]:
    """The texts of a row, a dash where the system has no such score."""
    return [found[metric].text() if metric in found else "–" for metric in metrics]


def sizes(found: dict[str, Score]) -> str:
    """The n of a row, once where all its metrics share it."""
    return " / ".join(map(str, dict.fromkeys(score.n for score in found.values())))


def print_results(scores: Sequence[Score], console: Console) -> None:
    """The tables on a terminal."""
    for table in tables_of(scores):
        rows, metrics = table_rows(scores, table), columns(scores, table)
        judged = [metric for metric in metrics if metric in JUDGED]
        # Value and interval on two lines, the judge's columns in a table of their own: each fits 80 columns.
        for shown in filter(None, ([metric for metric in metrics if metric not in JUDGED], judged)):
            printed = Table(
                title=TITLES[table], caption=f"{protocol_of(scores, table)}; value (95 % interval)", show_lines=True
            )
            printed.add_column("System")
            for metric in shown:
                printed.add_column(METRICS[metric], justify="right", no_wrap=True)
            printed.add_column("n", justify="right", no_wrap=True)
            for system, found in rows:
                texts = [cell.replace(" (", "\n").rstrip(")") for cell in cells(found, shown)]
                printed.add_row(system, *texts, sizes({m: found[m] for m in shown if m in found}))
            console.print(printed)
