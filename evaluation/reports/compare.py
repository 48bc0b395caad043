"""Finished evaluations side by side, refused where their numbers do not compare: `evaluate.py compare A B …`.

Two scores compare where task, data and encoders are the same, and the sampling where both were sampled by a protocol.
Otherwise every key that differs is named.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from evaluation.benchmarks import benchmark_of, titles
from evaluation.protocols.benchmark import EvaluationError
from evaluation.protocols.protocol import task_of
from evaluation.scores.bootstrap import paired_interval
from evaluation.scores.metric import Metric, floored
from evaluation.scores.results import Score, columns, protocol_of, read_results, table_rows, tables_in, texts

RESULTS, SAMPLES, PROVENANCE = "results.json", "samples.csv", "provenance.json"
TOLD = 6
MARK = " †"


@dataclass(frozen=True)
class Evaluated:
    """One finished evaluation.

    Args:
        name: what its rows are called, the shortest end of its path that tells it from the others.
    """

    name: str
    folder: Path
    scores: list[Score]
    provenance: dict[str, Any]

    def protocol(self, table: str) -> str | None:
        """See `protocol_of`."""
        return protocol_of(self.scores, table)

    def samples(self, table: str) -> dict[tuple[str, str], pd.DataFrame]:
        """The `score` and `unit` of every pair of a table, by system and metric."""
        found = pd.read_csv(self.folder / SAMPLES, dtype={"unit": str}, keep_default_na=False)
        return dict(iter(found[found["table"] == table].groupby(["system", "metric"])))  # type: ignore[arg-type]


def read_evaluations(paths: Sequence[str | Path], least: int = 2) -> list[Evaluated]:
    """Output folders of evaluations, in order.

    Raises:
        EvaluationError: fewer than `least`, one named twice, or a folder without a finished evaluation.
    """
    folders = [Path(path).parent if Path(path).name == RESULTS else Path(path) for path in paths]
    if len(folders) < least or len({folder.resolve() for folder in folders}) < len(folders):
        raise EvaluationError(f"{least} or more different evaluations are needed: give their output folders.")
    found = []
    for folder, name in zip(folders, short_names(folders), strict=True):
        if missing := [file for file in (RESULTS, SAMPLES, PROVENANCE) if not (folder / file).is_file()]:
            raise EvaluationError(f"'{folder}' holds no finished evaluation: {', '.join(missing)} is missing.")
        provenance = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        found.append(Evaluated(name, folder, read_results(folder / RESULTS), provenance))
    return found


def short_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell all apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def obstacles(first: Evaluated, other: Evaluated, table: str) -> list[str]:
    """Why the numbers of a table do not compare: keys of the protocol, data or encoders that differ. Empty: they do."""
    found, benchmark = [], benchmark_of(table)  # whose data, protocol and encoders they are
    both = [first.protocol(table) or "", other.protocol(table) or ""]
    if any(protocol == task_of(protocol) for protocol in both):
        both = [task_of(protocol) for protocol in both]
    if both[0] != both[1]:
        found.append(f"protocol {both[0]} and {both[1]}")
        configs = (dict(flat(e.provenance.get("config", {}).get(benchmark))) for e in (first, other))
        mine, theirs = configs
        keys = sorted(key for key in {*mine, *theirs} if mine.get(key) != theirs.get(key))
        found += [f"{key}: {mine.get(key)!r} and {theirs.get(key)!r}" for key in keys[:TOLD]]
        found += [f"and {len(keys) - TOLD} more keys"] if len(keys) > TOLD else []
    written = [e.provenance.get("written", {}) for e in (first, other)]
    for key in sorted({key for values in written for key in values}):
        same_kind = key == f"{benchmark} data" or key.startswith(f"{benchmark}.")
        if same_kind and written[0].get(key) != written[1].get(key):
            found.append(f"{key}: other files")
    return found


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"a": {"b": 1}}` → ("a.b", 1)."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def compare(paths: Sequence[str | Path], force: bool = False) -> str:
    """Markdown: each table with the rows of all evaluations, and what differs, pair by pair.

    Raises:
        EvaluationError: numbers that do not compare, and `force` is not given; says why.
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
        told = "\n".join(f"  {pair}:\n    " + "\n    ".join(reasons) for pair, reasons in refused.items())
        raise EvaluationError(
            f"these numbers do not compare:\n{told}\nforce=true shows them nevertheless, and marks them{MARK}."
        )
    lines = ["# Comparison", ""]
    for table, rows in having.items():
        marked = set(against[table])
        lines += comparison_table(rows, table, marked) + difference_table(rows, table, marked)
    lines += [f"{MARK.strip()} Not comparable with '{first.name}':"] if refused else []
    lines += [f"- {pair}: {'; '.join(reasons)}" for pair, reasons in refused.items()]
    return "\n".join(lines).rstrip() + "\n"


def comparison_table(evaluations: Sequence[Evaluated], table: str, marked: set[str]) -> list[str]:
    """The rows of all evaluations. A row that is the same in comparable ones, as real images, is shown once."""
    lines = [f"## {titles()[table]}", ""]
    lines += [f"- '{e.name}'{MARK if e.name in marked else ''}: protocol `{e.protocol(table)}`" for e in evaluations]
    metrics, rows, seen = shared_columns(evaluations, table), [], []
    for evaluation in evaluations:
        mark = MARK if evaluation.name in marked else ""
        for system, found in table_rows(evaluation.scores, table).items():
            row = {"System": system, **texts(found, metrics)}
            if mark or row not in seen:
                rows.append({"Evaluation": evaluation.name + mark, **row})
                seen.append(row)
    return [*lines, "", *markdown_table(pd.DataFrame(rows), words=2)]


def shared_columns(evaluations: Sequence[Evaluated], table: str) -> list[type[Metric]]:
    """The columns of a table that holds the rows of all."""
    return columns([score for evaluation in evaluations for score in evaluation.scores], table)


def difference_table(evaluations: Sequence[Evaluated], table: str, marked: set[str]) -> list[str]:
    """Each system against itself in the first evaluation; cosines paired by subject, so that their spread cancels.

    Without an interval where there is nothing to pair: FID, and subjects that only one of them has.
    """
    first, rows, metrics = evaluations[0], [], shared_columns(evaluations, table)
    mine, base = first.samples(table), table_rows(first.scores, table)
    for other in evaluations[1:]:
        theirs = other.samples(table)
        bootstrap = other.provenance.get("config", {}).get("bootstrap", {})
        for system, found in table_rows(other.scores, table).items():
            if system not in base or texts(found, metrics) == texts(base[system], metrics):
                continue
            row = {"Difference": f"{other.name}{MARK if other.name in marked else ''} − {first.name}", "System": system}
            for metric in metrics:
                ours, their, key = base[system].get(metric.name), found.get(metric.name), (system, metric.name)
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
    """`+0.107 (0.017–0.202)`: the difference of the means, each clamped as in the tables, and its interval."""
    mine, theirs = base["score"].to_list(), other["score"].to_list()
    replicates, seed = bootstrap.get("replicates", 2000), bootstrap.get("seed", 0)
    units = base["unit"].to_list(), other["unit"].to_list()
    low, high = paired_interval(mine, units[0], theirs, units[1], replicates, seed, metric.floor)
    value = floored(float(np.mean(theirs)), metric.floor) - floored(float(np.mean(mine)), metric.floor)
    return f"{signed(value, metric)} ({signed(low, metric)} … {signed(high, metric)})"


def signed(value: float, metric: type[Metric]) -> str:
    return f"{value:+.{metric.decimals}f}".replace("-", "−")


def markdown_table(rows: pd.DataFrame, words: int = 1) -> list[str]:
    """Lines of a table whose first `words` columns are words, the others numbers."""
    rule = [*["---"] * words, *["---:"] * (len(rows.columns) - words)]
    escaped = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in (rows.columns, *rows.values)]
    return [*("| " + " | ".join(row) + " |" for row in (escaped[0], rule, *escaped[1:])), ""]
