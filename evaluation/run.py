"""Run one evaluation, from configuration to report. Every step can be interrupted and resumed.

<output>/<table>/<system>-<hash>/   images and manifest
<output>/samples.csv                score of every image pair
<output>/breakdown.csv              means by kind of subject, subject and template
<output>/references/                cached features of FID's real images
<output>/results.json  results.md  report.html  sheets/*.png
<output>/provenance.json            written last; marks the evaluation as finished
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
from evaluation.processes import Batching, Processes
from evaluation.protocols.benchmark import EvaluationError, Item
from evaluation.reports.breakdown import breakdown
from evaluation.reports.galleries import generate_galleries
from evaluation.reports.report import write_report
from evaluation.reports.tables import results_markdown
from evaluation.scores.distribution import cached_features
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
    """Run an evaluation and print its tables, on one or several ranks.

    Returns:
        The scores on rank 0, an empty list on the other ranks.

    Raises:
        ProcessError: another rank failed or died.
        EvaluationError, FileNotFoundError: see `Evaluation` and `generate`.
    """
    with Processes.from_environment() as processes:
        console = (console or Console()) if processes.first else Console(quiet=True)
        evaluation = resolve(config, console, processes)
        if processes.broadcast(lambda: is_finished(evaluation)):
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


def resolve(config: EvaluationConfig, console: Console, processes: Processes) -> Evaluation:
    """Resolve the configuration on rank 0 first, so that errors are reported and weights are downloaded once."""
    first = Evaluation(config, console, processes) if processes.first else None
    data = processes.broadcast(lambda: first.data if first else {})
    return first or Evaluation(config, console, processes, data)


def generate_and_score(evaluation: Evaluation) -> list[Score]:
    """Generate and score on all ranks; rank 0 writes tables and report."""
    config, output, started = evaluation.config, evaluation.output, time.monotonic()
    # Load the networks first: wrong weights should fail before hours of generation.
    batching = Batching(evaluation.processes, config.encoder_batch_size, evaluation.console)
    networks = {}
    for table in evaluation.tables:
        options = (config.encoder_path, evaluation.device, batching, evaluation.answers_folder(table.key))
        try:
            networks[table.key] = load_networks(table.key, table.benchmark.protocol, *options)
        except ValueError as error:  # for example, weights of another architecture
            raise EvaluationError(str(error)) from error
        table.benchmark.check_networks(networks[table.key])
    output.mkdir(parents=True, exist_ok=True)
    images = evaluation.generate_all()
    galleries = generate_galleries(evaluation)
    scores, samples = score_all(evaluation, networks, images)
    if not evaluation.processes.first:
        return []
    parts = breakdown(samples, config.bootstrap)
    write_samples(samples, output / "samples.csv")
    write_text(output / "breakdown.csv", parts.to_csv(index=False, float_format="%.6f"))
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
    """Return the scores of all tables and of the curve, and the samples of the tables."""
    tables = (*evaluation.tables, *evaluation.points)
    scored = [score_table(evaluation, table, networks[table.key], images) for table in tables]
    return [score for scores, _ in scored for score in scores], [sample for _, samples in scored for sample in samples]


def score_table(
    evaluation: Evaluation, table: Table, networks: dict[str, Any], images: Images
) -> tuple[list[Score], list[Sample]]:
    """Score all rows of a benchmark: baselines, systems, external models. Points of the curve have no samples."""

    def items(files: Mapping[int, Path]) -> list[Item]:
        return [table.benchmark.item(request, files[request.index]) for request in table.requests]

    real = cache(lambda: real_features(evaluation, table, networks))
    baselines = table.benchmark.baselines() if table.scale is None else {}
    rows = [(name, baseline, table.task, {}) for name, baseline in baselines.items()]
    for system in table.systems:
        run = {"experiment": system.experiment, "stage": system.stage, "seed": system.seed}
        rows.append((system.name, items(images[table.name, system.name]), table.protocol, run))
    external = [model for (name, _), model in evaluation.external.items() if name == table.name]
    rows += [(model.name, items(model.files), table.task, {}) for model in external]
    if table.benchmark.references():
        real()  # here, because all ranks take part
    context = Context(networks, evaluation.config.bootstrap, table.benchmark.protocol, real)
    scores: list[Score] = []
    samples: list[Sample] = []
    with evaluation.console.status(f"Scoring {table.name}"):
        for name, row_items, protocol, run in rows:
            if row_items:
                own = score_images(table.key, protocol, context, name, row_items, evaluation.processes.first)
                scores += [replace(score, **run) for score in own[0]]
                samples += own[1]
    if table.scale is None:
        return scores, samples
    # The curve covers the benchmark's own table only.
    return [replace(s, table=GUIDANCE, guidance_scale=table.scale) for s in scores if s.table == table.key], []


def real_features(evaluation: Evaluation, table: Table, networks: Mapping[str, Any]) -> Tensor | None:
    """Return the features of FID's real images, N×F, from the cache or computed; see `cached_features`."""
    folder = evaluation.config.reference_features
    key = {"protocol": table.protocol, "data": table.data, "weights": evaluation.encoders[f"{table.name}.fid"]}
    return cached_features(
        evaluation.output / "references" if folder is None else Path(folder),
        key,
        lambda: networks["fid_real"](table.benchmark.references()),
        evaluation.processes,
    )


def is_finished(evaluation: Evaluation) -> bool:
    """Whether the output holds the results of this configuration, code, models and data."""
    files = [evaluation.output / name for name in (PROVENANCE, "results.json", "report.html")]
    return all(file.is_file() for file in files) and json.loads(files[0].read_text())["key"] == evaluation.key()


def provenance_of(evaluation: Evaluation, seconds: float) -> dict[str, str]:
    """Return what the results were made from, for provenance.json and the report."""
    tables = evaluation.tables
    return {
        **environment(evaluation.device),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": str(evaluation.processes.count),
        "time": f"{seconds:.0f} s (cached images and features excluded)",
        **{f"{table.name} protocol": table.protocol for table in tables},
        **{f"{table.name} seed": str(table.benchmark.protocol.sampling.seed) for table in tables},
        **{f"{table.name} data": table.data for table in tables},
        **{f"{point.name} protocol": point.protocol for point in evaluation.points},
        **{system.name: system.model for system in evaluation.systems},
        **{f"{model.name}, {table}": model.model for (table, _), model in evaluation.external.items()},
        **evaluation.encoders,
    }
