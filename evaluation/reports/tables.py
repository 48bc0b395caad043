"""Write results.md, and the paper's Tables 1 and 2 as Markdown, LaTeX and HTML: `evaluate.py tables A B …`.

Printed numbers and ours are in separate groups because their protocols differ. Runs of an experiment with several seeds
are averaged in one row, under the paper's name if it has one. Only the paper's rows say "fails"; ours have numbers.
"""

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import pandas as pd

from evaluation.benchmarks import GUIDANCE, METRICS, metric, titles
from evaluation.images.systems import BEFORE_STAGE_3, REAL_IMAGES, TEXT_SYSTEMS
from evaluation.protocols.benchmark import EvaluationError
from evaluation.reports import paper
from evaluation.reports.breakdown import SORTED_BY, sections, shown_system
from evaluation.reports.compare import Evaluated, markdown_table, obstacles, read_evaluations
from evaluation.scores.metric import Metric
from evaluation.scores.results import Row, Score, columns, protocol_of, row_position, table_rows, tables_in, texts
from kosmosg.files import write_text

FIDELITY, EDITABILITY = ("dino", "clip_i"), "clip_t"
LATEX = {"↑": r"$\uparrow$", "↓": r"$\downarrow$", "–": "--", "−": "$-$", "…": r"\dots{}"}
LATEX |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\n": " "}
LATEX |= {letter: f"\\{letter}" for letter in "#_%&${}"}


def results_markdown(scores: Sequence[Score], notes: Sequence[str], parts: pd.DataFrame) -> str:
    """Return results.md: our tables, breakdowns, the curve, and the paper's numbers."""
    lines = ["# Results", "", intervals(scores), ""]
    for table in tables_in(scores):
        metrics = columns(scores, table)
        rows = [{"System": system, **texts(row, metrics)} for system, row in table_rows(scores, table).items()]
        lines += [f"## {titles()[table]}", "", f"Protocol `{protocol_of(scores, table)}`.", ""]
        lines += markdown_table(pd.DataFrame(rows))
    lines += [*(f"- {note}" for note in notes), "", *breakdown_markdown(parts), *guidance_markdown(scores)]
    if printed := [table for table in paper.PRINTED if table in tables_in(scores)]:
        lines += ["# The paper's numbers", "", paper.CAUTION, ""]
    for table in printed:
        title, _, _ = paper.PRINTED[table]
        lines += markdown_table(printed_rows(table).rename(columns={"System": f"{title}, as printed"}))
    return "\n".join(lines)


def printed_rows(table: str) -> pd.DataFrame:
    """Return the paper's rows for one of our tables."""
    _, names, rows = paper.PRINTED[table]
    kinds = [metric(name) for name in names]
    shown = [[row.system, *row.cells([kind.decimals for kind in kinds])] for row in rows]
    return pd.DataFrame(shown, columns=["System", *(kind.title for kind in kinds)])


def intervals(scores: Sequence[Score]) -> str:
    """Return the caption of the tables, which names columns without a 95 % interval."""
    kinds = {score.metric: metric(score.metric) for score in scores}.values()
    others = [f"of {kind.title}, {kind.interval}" for kind in kinds if kind.interval != Metric.interval]
    return f"Value ({'; '.join([Metric.interval, *others])}) over n pairs; n images for FID and KID."


def breakdown_markdown(parts: pd.DataFrame) -> list[str]:
    """Return the breakdown by kind of all systems, and the other breakdowns of one system."""
    every, lines = sections(parts), []
    shown = shown_system([section.system for section in every])
    for table in dict.fromkeys(section.table for section in every):
        own = [section for section in every if section.table == table]
        if kinds := [section for section in own if section.by == "kind"]:
            rows = pd.concat({section.system: section.rows for section in kinds}, names=["System"]).reset_index(0)
            lines += [f"## {kinds[0].title}", "", *markdown_table(rows, words=2)]
        for section in own:
            if section.by == "kind" or section.system != shown:
                continue
            over = "its templates" if section.by == "subject" else "subjects"
            first = f", lowest {metric(SORTED_BY[section.by]).title} first" if section.by in SORTED_BY else ""
            lines += [f"## {section.title}", ""]
            lines += [f"{shown}{first}; intervals over {over}. All systems: breakdown.csv.", ""]
            lines += markdown_table(section.rows)
    return lines


def points_of(scores: Sequence[Score]) -> dict[str, list[tuple[float, dict[str, Score]]]]:
    """Return the curve of each system, in the table's order: (guidance scale, scores by metric), sorted by scale."""
    points: dict[str, dict[float, dict[str, Score]]] = {}
    for score in scores:
        if score.table == GUIDANCE and score.guidance_scale is not None:
            points.setdefault(score.system, {}).setdefault(score.guidance_scale, {})[score.metric] = score
    return {name: sorted(points[name].items()) for name in sorted(points, key=row_position)}


def guidance_markdown(scores: Sequence[Score]) -> list[str]:
    """Return the table over guidance scales; empty without a curve."""
    points = [(system, *point) for system, line in points_of(scores).items() for point in line]
    if not points:
        return []
    metrics = [metric(name) for name in (*FIDELITY, EDITABILITY, "near_copies")]
    rows = [{"System": system, "Guidance": f"{scale:g}", **texts(row, metrics)} for system, scale, row in points]
    protocols = dict.fromkeys(f"`{score.protocol}`" for _, _, row in points for score in row.values())
    heading = ["## Over guidance scales", "", f"Protocols {', '.join(protocols)}.", ""]
    return [*heading, *markdown_table(pd.DataFrame(rows))]


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper with our rows.

    Args:
        name: name of its files.
        groups: groups of rows under one protocol, by title; first column the system, last column n.
    """

    name: str
    title: str
    groups: dict[str, pd.DataFrame]


def paper_tables(evaluations: Sequence[Evaluated]) -> list[PaperTable]:
    """Return Table 1, left and right, and Table 2, if the evaluations have scores for them."""
    fixed = (REAL_IMAGES, *TEXT_SYSTEMS.values(), BEFORE_STAGE_3)
    plan = (
        ("table-1-dreambench", "Table 1, left: subjects (DreamBench)", "dreambench",
         [kind.name for kind in METRICS["dreambench"]], paper.DREAMBENCH, None, "instruction_tuning"),
        ("table-1-coco", "Table 1, right: captions (MS-COCO), zero-shot", "coco", ["fid"], paper.COCO, None,
         "instruction_tuning"),
        ("table-2", "Table 2: alignment of the image decoder, after stage 2", "coco", ["fid", "clip_t"],
         paper.ALIGNMENT, fixed, "alignment"),
    )  # fmt: skip
    tables = []
    measured = {score.metric for evaluation in evaluations for score in evaluation.scores}
    for file, title, table, wanted, printed, systems, stage in plan:
        metrics = [kind for name in wanted if not (kind := metric(name)).optional or name in measured]
        ours = {}
        for evaluation in evaluations:
            scores = [score for score in evaluation.scores if score.seed is None]
            rows = [
                {"System": system, **texts(row, metrics)}
                for system, row in table_rows(scores, table).items()
                if (systems is None or system in systems) and any(kind.name in row for kind in metrics)
            ]
            if rows:
                ours[f"{evaluation.name}: {evaluation.protocol(table)}"] = pd.DataFrame(rows)
        names = {row.experiment: row.system for row in printed if row.experiment}
        ours |= dict(seed_groups(evaluations, table, metrics, stage, names))
        if ours:
            cells = [[row.system, *row.cells([kind.decimals for kind in metrics]), "–"] for row in printed]
            header = ["System", *(kind.heading() for kind in metrics), "n"]
            groups = {f"As printed in {paper.CITATION}": pd.DataFrame(cells, columns=header), **ours}
            tables.append(PaperTable(file, title, groups))
    return tables


def seed_groups(
    evaluations: Sequence[Evaluated], table: str, metrics: Sequence[type[Metric]], stage: str, names: Mapping[str, str]
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield titles and rows: for comparable evaluations, the mean over seeds of each experiment, then every seed.

    Args:
        names: row names of experiments, in order; other experiments follow under their own names.

    Raises:
        EvaluationError: two evaluations have the same seed of an experiment.
    """

    def runs_in(evaluation: Evaluated) -> list[Score]:
        return [s for s in evaluation.scores if s.table == table and s.stage == stage and s.seed is not None]

    comparable: list[list[Evaluated]] = []
    for evaluation in filter(runs_in, evaluations):
        groups = (group for group in comparable if not obstacles(group[0], evaluation, table))
        if (group := next(groups, None)) is None:
            comparable.append([evaluation])
        else:
            group.append(evaluation)
    for group in comparable:
        runs: dict[str, dict[int, dict[str, Score]]] = {}
        origin: dict[tuple[str, int], str] = {}
        for evaluation, score in ((member, score) for member in group for score in runs_in(member)):
            experiment, seed = str(score.experiment), int(score.seed or 0)
            if (first := origin.setdefault((experiment, seed), evaluation.name)) != evaluation.name:
                raise EvaluationError(
                    f"seed {seed} of '{experiment}' is in both '{first}' and '{evaluation.name}'; leave one of them "
                    "out."
                )
            runs.setdefault(experiment, {}).setdefault(seed, {})[score.metric] = score
        order = sorted(runs, key=lambda name: ([*names, name].index(name), name))
        title = f"{', '.join(evaluation.name for evaluation in group)}: {group[0].protocol(table)}"
        rows = [{"System": names.get(name, name), **mean_texts(list(runs[name].values()), metrics)} for name in order]
        yield f"{title}; mean over seeds (lowest–highest of a seed)", pd.DataFrame(rows)
        rows = [
            {"System": f"{names.get(name, name)}, seed {seed}", **texts(row, metrics)}
            for name in order
            for seed, row in sorted(runs[name].items())
        ]
        yield f"{title}; every seed (95 % interval over its images)", pd.DataFrame(rows)


def mean_texts(runs: Sequence[Row], metrics: Sequence[type[Metric]]) -> dict[str, str]:
    """Format the mean and range over seeds, `9.55 (9.41–9.72)`, and the number of runs, `3 seeds × 500`."""
    cells = {}
    for kind in metrics:
        values = [row[kind.name].value for row in runs if kind.name in row]
        low, value, high = (kind.number(f(values)) if values else "–" for f in (min, mean, max))
        cells[kind.heading()] = f"{value} ({low}–{high})" if len(values) > 1 else value
    images = " or ".join(dict.fromkeys(texts(row, metrics)["n"] for row in runs))
    return {**cells, "n": f"{len(runs)} seed{'s' * (len(runs) > 1)} × {images}"}


def write_tables(paths: Sequence[str | Path], output: Path) -> list[Path]:
    """Write each table as .md, .tex and .html into `output` and return the files.

    Raises:
        EvaluationError: a folder is not a finished evaluation, or there are no scores for any table.
    """
    tables = paper_tables(read_evaluations(paths, least=1))
    if not tables:
        raise EvaluationError("the evaluations have no scores for any of the paper's tables.")
    files = []
    for table in tables:
        for suffix, render in ((".md", as_markdown), (".tex", as_latex), (".html", as_html)):
            files.append(output / f"{table.name}{suffix}")
            write_text(files[-1], render(table))
    return files


def as_markdown(table: PaperTable) -> str:
    """Return a Markdown table for each group, since Markdown has no rows that span columns."""
    lines = [f"## {table.title}", ""]
    for title, rows in table.groups.items():
        lines += [f"{title}:", "", *markdown_table(rows)]
    return "\n".join(lines)


def as_latex(table: PaperTable) -> str:
    """Return a booktabs tabular in a table environment."""

    def row(cells: Sequence[str]) -> str:
        return " & ".join(map(latex, cells)) + r" \\"

    header = list(next(iter(table.groups.values())))
    lines = ["% needs \\usepackage{booktabs}", r"\begin{table}", r"\centering"]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule", row(header)]
    for title, rows in table.groups.items():
        lines += [r"\midrule", rf"\multicolumn{{{len(header)}}}{{l}}{{\emph{{{latex(title)}}}}} \\"]
        lines += [row(cells) for cells in rows.values]
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
    """Return an HTML page with the table."""
    header = list(next(iter(table.groups.values())))
    head = "".join(f"<th scope='col'>{html.escape(cell)}</th>" for cell in header)
    bodies = []
    for title, rows in table.groups.items():
        lines = [f"<tr><th class='group' colspan='{len(header)}'>{html.escape(title)}</th></tr>"]
        lines += [
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>" for cells in rows.values
        ]
        bodies.append("<tbody>" + "\n".join(lines) + "</tbody>")
    title = html.escape(table.title)
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title><style>{STYLE}</style>\n"
        f"<table><caption>{title}</caption><thead><tr>{head}</tr></thead>\n" + "\n".join(bodies) + "</table></html>\n"
    )
