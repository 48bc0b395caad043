"""One evaluation from its configuration to its report; every step goes on where an interrupted one was.

<output>/<table>/<system>-<hash>/   images and manifest
<output>/samples.csv                the score of every pair
<output>/breakdown.csv              means by kind of subject, subject and template
<output>/references/                features of FID's real side, for the next evaluation under the same protocol
<output>/results.json  results.md  report.html  sheets/*.png
<output>/provenance.json            written last: the evaluation is finished
"""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from evaluation.benchmarks import GUIDANCE
from evaluation.config import EvaluationConfig
from evaluation.images.provenance import environment
from evaluation.plan import Evaluation, Images, Table
from evaluation.processes import Processes, Sharing
from evaluation.protocols.benchmark import EvaluationError, Item
from evaluation.reports.breakdown import breakdown, write_breakdown
from evaluation.reports.galleries import draw_galleries
from evaluation.reports.report import write_report
from evaluation.reports.tables import results_markdown
from evaluation.scores.distribution import kept_features
from evaluation.scores.encoders import load_networks
from evaluation.scores.metric import Context
from evaluation.scores.results import (
    Sample,
    Score,
    print_results,
    read_results,
    score_images,
    write_results,
    write_samples,
)
from evaluation.tracking import track
from kosmosg.files import write_text

PROVENANCE = "provenance.json"


def evaluate(config: EvaluationConfig, console: Console | None = None) -> list[Score]:
    """Run an evaluation and print its tables, alone or as one of several processes, of which the first has the scores.

    Raises:
        ProcessError: another process failed or died.
        Others: what `Evaluation` and the generation do.
    """
    with Processes.of_environment() as processes:
        console = (console or Console()) if processes.first else Console(quiet=True)
        evaluation = plan(config, console, processes)
        if processes.share(lambda: is_finished(evaluation)):
            console.print(f"'{evaluation.output}' is finished: the same protocols, models and data. Nothing to do.")
            scores = read_results(evaluation.output / "results.json") if processes.first else []
        else:
            scores = generate_and_score(evaluation)
        if processes.first:
            content = json.loads((evaluation.output / PROVENANCE).read_text(encoding="utf-8"))
            track(config.wandb, evaluation.output, scores, content)
            print_results(scores, console)
            console.print(f"The report is in '{evaluation.output / 'report.html'}'.")
    return scores


def plan(config: EvaluationConfig, console: Console, processes: Processes) -> Evaluation:
    """The first process looks before the others: what is wrong is told once, what is downloaded is downloaded once."""
    first = Evaluation(config, console, processes) if processes.first else None
    data = processes.share(lambda: first.data if first else {})
    return first or Evaluation(config, console, processes, data)


def generate_and_score(evaluation: Evaluation) -> list[Score]:
    """Generate and score together; the first process writes tables and pages."""
    config, output, started = evaluation.config, evaluation.output, time.monotonic()
    # Networks first: weights that are not theirs must not come to light after hours of generation.
    sharing = Sharing(evaluation.processes, config.encoder_batch_size, evaluation.console)
    networks = {}
    for table in evaluation.tables:
        options = (config.encoder_path, evaluation.device, sharing, evaluation.answers(table.key))
        try:
            networks[table.key] = load_networks(table.key, table.benchmark.protocol, *options)
        except ValueError as error:  # as of weights of another network
            raise EvaluationError(str(error)) from error
        table.benchmark.check_networks(networks[table.key])
    output.mkdir(parents=True, exist_ok=True)
    images = evaluation.generate_all()
    galleries = draw_galleries(evaluation)
    scores, samples = score_all(evaluation, networks, images)
    if not evaluation.processes.first:
        return []
    parts = breakdown(samples, config.bootstrap)
    write_samples(samples, output / "samples.csv")
    write_breakdown(parts, output / "breakdown.csv")
    write_results(scores, output / "results.json")
    notes = [
        note
        for table in evaluation.tables
        for note in table.benchmark.notes(config.bootstrap, [s for s in scores if s.table in table.benchmark.tables])
    ]
    write_text(output / "results.md", results_markdown(scores, notes, parts))
    provenance = provenance_of(evaluation, time.monotonic() - started)
    write_report(evaluation, images, galleries, scores, parts, notes, provenance)
    content = {"key": evaluation.key(), "written": provenance, "config": asdict(config)}
    write_text(output / PROVENANCE, json.dumps(content, indent=1, ensure_ascii=False))
    return scores


def score_all(
    evaluation: Evaluation, networks: Mapping[str, dict[str, Any]], images: Images
) -> tuple[list[Score], list[Sample]]:
    """Scores of the tables and of the curve, the rows that need no generation first; samples of the tables alone."""
    scores: list[Score] = []
    samples: list[Sample] = []
    for table in (*evaluation.tables, *evaluation.points):
        point = table.scale is not None
        found, drawn = score_table(evaluation, table, networks[table.key], images)
        if point:  # the other tables of the benchmark have no curve
            found = [replace(s, table=GUIDANCE, guidance_scale=table.scale) for s in found if s.table == table.key]
        scores += found
        samples += [] if point else drawn
    return scores, samples


def score_table(
    evaluation: Evaluation, table: Table, networks: dict[str, Any], images: Images
) -> tuple[list[Score], list[Sample]]:
    """The scores of every row of one benchmark."""

    def items(files: Mapping[int, Path]) -> list[Item]:
        return [table.benchmark.item(request, files[request.index]) for request in table.requests]

    @cache
    def real() -> Tensor | None:
        return real_side(evaluation, table, networks)

    baselines = table.benchmark.baselines() if table.scale is None else {}
    rows = [(name, found, table.task, {}) for name, found in baselines.items()]
    for system in table.systems:
        run = {"experiment": system.experiment, "stage": system.stage, "seed": system.seed}
        rows.append((system.name, items(images[table.name, system.name]), table.protocol, run))
    rows += [(r.name, items(r.files), table.task, {}) for (of, _), r in evaluation.external.items() if of == table.name]
    if table.benchmark.references():
        real()  # all processes look at it together
    context = Context(networks, evaluation.config.bootstrap, table.benchmark, real)
    scores: list[Score] = []
    samples: list[Sample] = []
    with evaluation.console.status(f"Scoring {table.name}"):
        for name, found, protocol, run in rows:
            if found:
                own = score_images(table.key, protocol, context, name, found, evaluation.processes.first)
                scores += [replace(score, **run) for score in own[0]]
                samples += own[1]
    return scores, samples


def real_side(evaluation: Evaluation, table: Table, networks: Mapping[str, Any]) -> Tensor | None:
    """The features of FID's real side, N×F, from an earlier evaluation where there was one; in the first process."""
    kept = evaluation.config.reference_features
    key = {"protocol": table.protocol, "data": table.data, "weights": evaluation.encoders[f"{table.name}.fid"]}
    return kept_features(
        evaluation.output / "references" if kept is None else Path(kept),
        key,
        lambda: networks["fid_real"](table.benchmark.references()),
        evaluation.processes,
    )


def is_finished(evaluation: Evaluation) -> bool:
    """Whether the output holds the results of this very configuration, code, models and data."""
    files = [evaluation.output / name for name in (PROVENANCE, "results.json", "report.html")]
    return all(file.is_file() for file in files) and json.loads(files[0].read_text())["key"] == evaluation.key()


def provenance_of(evaluation: Evaluation, seconds: float) -> dict[str, str]:
    """Everything that the numbers came from, for the report's last section."""
    tables = evaluation.tables
    return {
        **environment(evaluation.device),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": str(evaluation.processes.count),
        "time": f"{seconds:.0f} s for what was not there already",
        **{f"{table.name} protocol": table.protocol for table in tables},
        **{f"{table.name} seed": str(table.benchmark.protocol.sampling.seed) for table in tables},
        **{f"{table.name} data": table.data for table in tables},
        **{f"{point.name} protocol": point.protocol for point in evaluation.points},
        **{system.name: system.model for system in evaluation.systems},
        **{f"{rival.name}, {table}": rival.model for (table, _), rival in evaluation.external.items()},
        **evaluation.encoders,
    }
