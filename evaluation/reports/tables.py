"""The paper's Tables 1 and 2 from finished evaluations, as Markdown, LaTeX and HTML: `evaluate.py tables A B …`.

Printed numbers and ours stand in groups of their own, each under its protocol: they were made under different ones.
Runs of one experiment with several seeds are gathered in a row, under the paper's name for it where there is one.
"fails" is quoted from the paper alone; ours give the number.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.benchmarks import METRICS, metric
from evaluation.images.systems import BEFORE_STAGE_3, REAL_IMAGES, TEXT_SYSTEMS
from evaluation.protocols.requests import EvaluationError
from evaluation.reports.compare import Evaluated, read_evaluations
from evaluation.reports.paper import ALIGNMENT, CITATION, COCO, DREAMBENCH, Printed
from evaluation.reports.seeds import seed_groups
from evaluation.scores.metric import Metric
from evaluation.scores.results import Score, cells, headings, markdown_table, sizes, table_rows
from kosmosg.files import write_text

PRINTED = f"As printed in {CITATION}"
LATEX = {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "–": "--", "−": "$-$", "…": r"\dots{}"}
LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\n": " "}
LATEX |= {letter: f"\\{letter}" for letter in "#_%&${}"}


@dataclass(frozen=True)
class Group:
    """Rows under one protocol: cells as text, the system first, n last."""

    title: str
    rows: list[list[str]]


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper with our rows.

    Args:
        name: of its files.
    """

    name: str
    title: str
    header: list[str]
    groups: list[Group]


def paper_tables(evaluations: Sequence[Evaluated]) -> list[PaperTable]:
    """Table 1, left and right, and Table 2, as far as the evaluations have numbers for them."""
    plan = (
        ("table-1-dreambench", "Table 1, left: subjects (DreamBench)", "dreambench",
         [kind.name for kind in METRICS["dreambench"]], DREAMBENCH, None, "instruction_tuning"),
        ("table-1-coco", "Table 1, right: captions (MS-COCO), zero-shot", "coco", ("fid",), COCO, None,
         "instruction_tuning"),
        ("table-2", "Table 2: alignment of the image decoder, after stage 2", "coco", ("fid", "clip_t"), ALIGNMENT,
         (REAL_IMAGES, *TEXT_SYSTEMS.values(), BEFORE_STAGE_3), "alignment"),
    )  # fmt: skip
    tables = []
    measured = {score.metric for evaluation in evaluations for score in evaluation.scores}
    for file, title, table, wanted, printed, systems, stage in plan:
        metrics = [kind for name in wanted if not (kind := metric(name)).optional or name in measured]
        ours = [group for e in evaluations if (group := our_group(e, table, metrics, systems)) is not None]
        names = {row.experiment: row.system for row in printed if row.experiment}
        for heading, rows in seed_groups(evaluations, table, metrics, stage, names):
            ours.append(Group(heading, rows))
        if ours:
            header = ["System", *headings(metrics), "n"]
            tables.append(PaperTable(file, title, header, [printed_group(printed, metrics), *ours]))
    return tables


def printed_group(printed: Sequence[Printed], metrics: Sequence[type[Metric]]) -> Group:
    decimals = [kind.decimals for kind in metrics]
    return Group(PRINTED, [[row.system, *row.cells(decimals), "–"] for row in printed])


def our_group(
    evaluation: Evaluated, table: str, metrics: Sequence[type[Metric]], systems: Sequence[str] | None
) -> Group | None:
    """An evaluation's rows, all or those of `systems`, but for runs among several; None where it has no such table."""
    rows = []
    for system, found in table_rows([score for score in evaluation.scores if score.seed is None], table):
        shown: dict[str, Score] = {kind.name: found[kind.name] for kind in metrics if kind.name in found}
        if shown and (systems is None or system in systems):
            rows.append([system, *cells(shown, metrics), sizes(shown)])
    return Group(f"{evaluation.name}: {evaluation.protocol(table)}", rows) if rows else None


def write_tables(paths: Sequence[str | Path], output: Path) -> list[Path]:
    """Write each table as .md, .tex and .html into `output`; the files.

    Raises:
        EvaluationError: a folder without a finished evaluation, or without any of the paper's tables.
    """
    tables = paper_tables(read_evaluations(paths, least=1))
    if not tables:
        raise EvaluationError("the evaluations have no scores for any of the paper's tables.")
    files = []
    for table in tables:
        for suffix, render in ((".md", as_markdown), (".tex", as_latex), (".html", as_html)):
            files.append(output / f"{table.name}{suffix}")
            output.mkdir(parents=True, exist_ok=True)
            write_text(files[-1], render(table))
    return files


def as_markdown(table: PaperTable) -> str:
    """One Markdown table for each group: Markdown knows no row that spans columns."""
    lines = [f"## {table.title}", ""]
    for group in table.groups:
        lines += [f"{group.title}:", "", *markdown_table(table.header, group.rows)]
    return "\n".join(lines)


def as_latex(table: PaperTable) -> str:
    """A booktabs tabular in a table environment."""
    columns = len(table.header)
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{l{'r' * (columns - 1)}}}",
        r"\toprule",
        " & ".join(map(latex, table.header)) + r" \\",
    ]
    for group in table.groups:
        lines += [r"\midrule", rf"\multicolumn{{{columns}}}{{l}}{{\emph{{{latex(group.title)}}}}} \\"]
        lines += [" & ".join(map(latex, row)) + r" \\" for row in group.rows]
    return "\n".join(
        [*lines, r"\bottomrule", r"\end{tabular}", rf"\caption{{{latex(table.title)}}}", r"\end{table}", ""]
    )


def latex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)


STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;color:#1b1b1b}"
    "table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}"
    "caption{font-weight:600;text-align:left;padding:.5rem 0}"
    "th,td{padding:.25rem .75rem;text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left}"
    "thead tr{border-top:2px solid;border-bottom:1px solid}tbody{border-bottom:1px solid #999}"
    "th.group{font-weight:400;font-style:italic;text-align:left;padding-top:.6rem}"
)


def as_html(table: PaperTable) -> str:
    """A page of its own."""
    columns = len(table.header)
    head = "".join(f"<th scope='col'>{html.escape(cell)}</th>" for cell in table.header)
    bodies = []
    for group in table.groups:
        title = f"<tr><th class='group' colspan='{columns}'>{html.escape(group.title)}</th></tr>"
        rows = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in group.rows]
        bodies.append("<tbody>" + "\n".join([title, *rows]) + "</tbody>")
    title = html.escape(table.title)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title><style>{STYLE}</style>\n"
        f"<table><caption>{title}</caption><thead><tr>{head}</tr></thead>\n" + "\n".join(bodies) + "</table></html>\n"
    )
