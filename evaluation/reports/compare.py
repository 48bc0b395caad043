"""Compare finished evaluations: `evaluate.py compare A B …`.

Scores are comparable if task, data and encoders are equal, and sampling too if both were sampled by a protocol.
Otherwise the comparison is refused with a list of the keys that differ.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation.benchmarks import benchmark_of, titles
from evaluation.protocols.benchmark import EvaluationError
from evaluation.protocols.protocol import task_of
from evaluation.scores.bootstrap import paired_interval
from evaluation.scores.metric import Metric, clamp
from evaluation.scores.results import Score, columns, protocol_of, read_results, table_rows, tables_in, texts

RESULTS, SAMPLES, PROVENANCE = "results.json", "samples.csv", "provenance.json"
MAX_KEYS = 6
MARK = " †"


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation.

    Args:
        name: shortest end of its path that distinguishes it from the others.
    """

    name: str
    folder: Path
    scores: list[Score]
    provenance: dict[str, Any]

    def protocol(self, table: str) -> str | None:
        """See `protocol_of`."""
        return protocol_of(self.scores, table)

    def samples(self, table: str) -> dict[tuple[str, str], pd.DataFrame]:
        """Return the `score` and `unit` of each pair of a table, by system and metric."""
        samples = pd.read_csv(self.folder / SAMPLES, dtype={"unit": str}, keep_default_na=False)
        return dict(iter(samples[samples["table"] == table].groupby(["system", "metric"])))  # type: ignore[arg-type]


def read_evaluations(paths: Sequence[str | Path], least: int = 2) -> list[Evaluated]:
    """Read evaluations from their output folders, in order.

    Raises:
        EvaluationError: there are fewer than `least`, duplicates, or a folder without a finished evaluation.
    """
    folders = [Path(path).parent if Path(path).name == RESULTS else Path(path) for path in paths]
    if len(folders) < least or len({folder.resolve() for folder in folders}) < len(folders):
        raise EvaluationError(f"at least {least} different evaluations are needed: give their output folders.")
    evaluations = []
    for folder, name in zip(folders, short_names(folders), strict=True):
        if missing := [file for file in (RESULTS, SAMPLES, PROVENANCE) if not (folder / file).is_file()]:
            raise EvaluationError(f"'{folder}' is not a finished evaluation: {', '.join(missing)} is missing.")
        provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        evaluations.append(Evaluated(name, folder, read_results(folder / RESULTS), provenance))
    return evaluations


def short_names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that are unique."""
    parts = [folder.resolve().parts for folder in folders]
    length = next(length for length in count(1) if len({path[-length:] for path in parts}) == len(parts))
    return ["/".join(path[-length:]) for path in parts]


def obstacles(first: Evaluated, other: Evaluated, table: str) -> list[str]:
    """Return why a table is not comparable: keys of protocol, data or encoders that differ; empty if it is."""
    reasons, benchmark = [], benchmark_of(table)
    both = [first.protocol(table) or "", other.protocol(table) or ""]
    if any(protocol == task_of(protocol) for protocol in both):
        both = [task_of(protocol) for protocol in both]
    if both[0] != both[1]:
        reasons.append(f"protocol {both[0]} and {both[1]}")
        mine, theirs = (flatten(e.provenance.get("config", {}).get(benchmark)) for e in (first, other))
        keys = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
        reasons += [f"{key}: {mine.get(key)!r} and {theirs.get(key)!r}" for key in keys[:MAX_KEYS]]
        reasons += [f"and {len(keys) - MAX_KEYS} more keys"] if len(keys) > MAX_KEYS else []
    written = [e.provenance.get("written", {}) for e in (first, other)]
    for key in sorted({key for values in written for key in values}):
        own = key == f"{benchmark} data" or key.startswith(f"{benchmark}.")
        if own and written[0].get(key) != written[1].get(key):
            reasons.append(f"{key}: other files")
    return reasons


def flatten(config: dict[str, Any] | None) -> dict[str, Any]:
    """Convert `{"a": {"b": 1}}` to `{"a.b": 1}`."""
    return next(iter(pd.json_normalize(config or {}).to_dict(orient="records")), {})  # type: ignore[return-value]


def compare(paths: Sequence[str | Path], force: bool = False) -> str:
    """Return Markdown with each table of all evaluations, and the differences to the first one.

    Raises:
        EvaluationError: scores are not comparable and `force` is false; lists the reasons.
    """
    evaluations = read_evaluations(paths)
    first = evaluations[0]
    tables = tables_in([score for evaluation in evaluations for score in evaluation.scores])
    having = {table: [e for e in evaluations if e.protocol(table) is not None] for table in tables}
    against = {
        table: {e.name: reasons for e in rows[1:] if (reasons := obstacles(rows[0], e, table))}
        for table, rows in having.items()
    }
    refused = {
        f"{titles()[table]}: '{having[table][0].name}' and '{name}'": reasons
        for table, others in against.items()
        for name, reasons in others.items()
    }
    if refused and not force:
        details = "\n".join(f"  {pair}:\n    " + "\n    ".join(reasons) for pair, reasons in refused.items())
        raise EvaluationError(
            f"these scores are not comparable:\n{details}\nforce=true shows them anyway, marked with{MARK}."
        )
    lines = ["# Comparison", ""]
    for table, rows in having.items():
        marked = set(against[table])
        lines += comparison_table(rows, table, marked) + difference_table(rows, table, marked)
    lines += [f"{MARK.strip()} Not comparable with '{first.name}':"] if refused else []
    lines += [f"- {pair}: {'; '.join(reasons)}" for pair, reasons in refused.items()]
    return "\n".join(lines).rstrip() + "\n"


def comparison_table(evaluations: Sequence[Evaluated], table: str, marked: set[str]) -> list[str]:
    """Return the rows of all evaluations; equal rows of comparable ones, such as real images, are shown once."""
    lines = [f"## {titles()[table]}", ""]
    lines += [f"- '{e.name}'{MARK if e.name in marked else ''}: protocol `{e.protocol(table)}`" for e in evaluations]
    metrics, rows, seen = shared_columns(evaluations, table), [], []
    for evaluation in evaluations:
        mark = MARK if evaluation.name in marked else ""
        for system, scores in table_rows(evaluation.scores, table).items():
            row = {"System": system, **texts(scores, metrics)}
            if mark or row not in seen:
                rows.append({"Evaluation": evaluation.name + mark, **row})
                seen.append(row)
    return [*lines, "", *markdown_table(pd.DataFrame(rows), words=2)]


def shared_columns(evaluations: Sequence[Evaluated], table: str) -> list[type[Metric]]:
    """Return the columns of a table with the rows of all evaluations."""
    return columns([score for evaluation in evaluations for score in evaluation.scores], table)


def difference_table(evaluations: Sequence[Evaluated], table: str, marked: set[str]) -> list[str]:
    """Return the difference of each system to the first evaluation, with a paired interval over common units.

    There is no interval without pairs: for FID, and if the subjects differ.
    """
    first, rows, metrics = evaluations[0], [], shared_columns(evaluations, table)
    mine, base = first.samples(table), table_rows(first.scores, table)
    for other in evaluations[1:]:
        theirs = other.samples(table)
        bootstrap = other.provenance.get("config", {}).get("bootstrap", {})
        for system, scores in table_rows(other.scores, table).items():
            if system not in base or texts(scores, metrics) == texts(base[system], metrics):
                continue
            row = {"Difference": f"{other.name}{MARK if other.name in marked else ''} − {first.name}", "System": system}
            for metric in metrics:
                ours, their, key = base[system].get(metric.name), scores.get(metric.name), (system, metric.name)
                if ours is None or their is None:
                    text = "–"
                elif key in mine and key in theirs and set(mine[key]["unit"]) == set(theirs[key]["unit"]):
                    text = paired_text(mine[key], theirs[key], metric, bootstrap)
                else:
                    text = signed(their.value - ours.value, metric)
                row[metric.heading()] = text
            rows.append(row)
    return markdown_table(pd.DataFrame(rows), words=2) if rows else []


def paired_text(base: pd.DataFrame, other: pd.DataFrame, metric: type[Metric], bootstrap: dict[str, Any]) -> str:
    """Format the difference of the means, each clamped as in the tables, with its interval."""
    mine, theirs = base["score"].to_list(), other["score"].to_list()
    replicates, seed = bootstrap.get("replicates", 2000), bootstrap.get("seed", 0)
    units = base["unit"].to_list(), other["unit"].to_list()
    low, high = paired_interval(mine, units[0], theirs, units[1], replicates, seed, metric.floor)
    value = clamp(float(np.mean(theirs)), metric.floor) - clamp(float(np.mean(mine)), metric.floor)
    return f"{signed(value, metric)} ({signed(low, metric)} … {signed(high, metric)})"


def signed(value: float, metric: type[Metric]) -> str:
    return f"{value:+.{metric.decimals}f}".replace("-", "−")


def markdown_table(rows: pd.DataFrame, words: int = 1) -> list[str]:
    """Return the lines of a Markdown table; columns after the first `words` are aligned right."""
    rule = [*["---"] * words, *["---:"] * (len(rows.columns) - words)]
    escaped = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in (rows.columns, *rows.values)]
    return [*("| " + " | ".join(row) + " |" for row in (escaped[0], rule, *escaped[1:])), ""]
