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
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from evaluation.benchmarks import GUIDANCE
from evaluation.config import EvaluationConfig
from evaluation.images.generation import System, row_of
from evaluation.images.manifest import Manifest
from evaluation.images.provenance import environment
from evaluation.images.references import reference_features
from evaluation.parallel.processes import Processes
from evaluation.parallel.sharing import Sharing
from evaluation.plan import Evaluation, Table
from evaluation.reports.breakdown import breakdown, write_breakdown
from evaluation.reports.breakdown import markdown as breakdown_markdown
from evaluation.reports.guidance import markdown as guidance_markdown
from evaluation.reports.pages import Manifests, draw_pages, swap_grids
from evaluation.scores.encoders import load_networks
from evaluation.scores.metric import Context
from evaluation.scores.results import Score, markdown, print_results, read_results, write_results
from evaluation.scores.scoring import Sample, Scorer, write_samples
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
    data = processes.share(lambda: {table.name: table.data for table in first.tables} if first else {})
    return first or Evaluation(config, console, processes, data)


def generate_and_score(evaluation: Evaluation) -> list[Score]:
    """Generate and score together; the first process writes tables and pages."""
    config, output, processes = evaluation.config, evaluation.output, evaluation.processes
    started = time.monotonic()
    # Networks first: weights that are not theirs must not come to light after hours of generation.
    sharing = Sharing(processes, config.encoder_batch_size, evaluation.console)
    networks = {
        table.key: load_networks(
            table.key,
            table.benchmark.protocol,
            config.encoder_path,
            evaluation.device,
            sharing,
            evaluation.answers(table.key),
        )
        for table in evaluation.tables
    }
    for table in evaluation.tables:
        table.benchmark.check_networks(networks[table.key])
    output.mkdir(parents=True, exist_ok=True)
    manifests = generate_all(evaluation)
    grids = swap_grids(evaluation)
    scores, samples = score_all(evaluation, networks, manifests)
    if not processes.first:
        return []
    parts = breakdown(samples, {table.key: table.benchmark for table in evaluation.tables}, config.bootstrap)
    write_samples(samples, output / "samples.csv", output)
    write_breakdown(parts, output / "breakdown.csv")
    write_results(scores, output / "results.json")
    notes = [
        note
        for table in evaluation.tables
        for note in table.benchmark.notes(
            config.bootstrap, [score for score in scores if score.table in table.benchmark.tables]
        )
    ]
    sections = [*breakdown_markdown(parts), *guidance_markdown(scores)]
    write_text(output / "results.md", markdown(scores, notes, sections))
    provenance = provenance_of(evaluation, time.monotonic() - started)
    draw_pages(evaluation, manifests, grids, scores, parts, notes, provenance)
    content = {"key": evaluation.key(), "written": provenance, "config": asdict(config)}
    write_text(output / PROVENANCE, json.dumps(content, indent=1, ensure_ascii=False))
    return scores


def generate_all(evaluation: Evaluation) -> Manifests:
    """The images of every table, and of the points of the curve."""
    manifests: Manifests = {
        (table.name, system.name): evaluation.generate_into(table.name, table, system, table.requests)
        for table in evaluation.tables
        for system in evaluation.systems
    }
    for point in evaluation.points:
        for system in point.systems:
            manifests[point.name, system.name] = evaluation.generate_into(
                point.folder(evaluation.tables),
                point.table,
                system,
                point.table.requests,
                f"{point.name}: {system.name}",
            )
    return manifests


def score_all(
    evaluation: Evaluation, networks: Mapping[str, dict[str, Any]], manifests: Manifests
) -> tuple[list[Score], list[Sample]]:
    """Scores of the tables and of the curve; samples of the tables alone."""
    scores: list[Score] = []
    samples: list[Sample] = []
    for table in evaluation.tables:
        with evaluation.console.status(f"Scoring {table.name}"):
            found = score_table(evaluation, table, networks[table.key], manifests)
        scores += found[0]
        samples += found[1]
    for point in evaluation.points:
        table = point.table
        context = Context(networks[table.key], evaluation.config.bootstrap, table.benchmark)
        scorer = Scorer(table.key, table.protocol, context, evaluation.processes.first)
        for system in point.systems:
            verify(evaluation, table, system, manifests[point.name, system.name])
            items = items_of(table, manifests[point.name, system.name])
            found = [score for score in scorer(system.name, items)[0] if score.table == table.key]
            scores += [replace(score, table=GUIDANCE, guidance_scale=point.scale) for score in found]
    return scores, samples


def score_table(
    evaluation: Evaluation, table: Table, networks: dict[str, Any], manifests: Manifests
) -> tuple[list[Score], list[Sample]]:
    """The scores of every row of one benchmark, the rows that need no generation first."""
    rows = [(name, items, table.task) for name, items in table.benchmark.baselines().items()]
    for system in evaluation.systems:
        verify(evaluation, table, system, manifests[table.name, system.name])
        rows.append((system.name, items_of(table, manifests[table.name, system.name]), table.protocol))
    for (name, _), rival in evaluation.external.items():
        if name == table.name:
            rows.append((rival.name, items_of(table, rival), table.task))
    real = cache(partial(real_side, evaluation, table, networks))
    if table.benchmark.references():
        real()  # all processes look at it together
    context = Context(networks, evaluation.config.bootstrap, table.benchmark, real)
    scores: list[Score] = []
    samples: list[Sample] = []
    variants = {system.name: asdict(system.variant) for system in evaluation.systems if system.variant is not None}
    for name, items, protocol in rows:
        if items:
            found = Scorer(table.key, protocol, context, evaluation.processes.first)(name, items)
            scores += [replace(score, **variants.get(name, {})) for score in found[0]]
            samples += found[1]
    return scores, samples


def items_of(table: Table, images: Any) -> list:
    """A system's images as the benchmark compares them."""
    return [table.benchmark.item(request, images.image_file(request.index)) for request in table.requests]


def verify(evaluation: Evaluation, table: Table, system: System, manifest: Any) -> None:
    """The images are those that were asked for. Raises ManifestError."""
    if evaluation.processes.first:
        assert isinstance(manifest, Manifest)
        sampling = table.benchmark.protocol.sampling
        manifest.verify([row_of(system, request, sampling) for request in table.requests])


def real_side(evaluation: Evaluation, table: Table, networks: Mapping[str, Any]) -> Tensor | None:
    """The features of FID's real side, N×F, from an earlier evaluation where there was one; in the first process."""
    references, encode = table.benchmark.references(), networks["fid_real"]
    key = {
        "protocol": table.protocol,
        "data": table.data,
        "weights": evaluation.encoders[f"{table.name}.fid"],
        "n": str(len(references)),
    }
    kept = evaluation.config.reference_features
    folder = evaluation.output / "references" if kept is None else Path(kept)
    return reference_features(folder, key, lambda: encode(references), evaluation.console, evaluation.processes)


def is_finished(evaluation: Evaluation) -> bool:
    """Whether the output holds the results of this very configuration, code, models and data."""
    files = [evaluation.output / name for name in (PROVENANCE, "results.json", "report.html")]
    return all(file.is_file() for file in files) and json.loads(files[0].read_text())["key"] == evaluation.key()


def provenance_of(evaluation: Evaluation, seconds: float) -> dict[str, str]:
    """Everything that the numbers came from, for the report's last section."""
    return {
        **environment(evaluation.device),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": str(evaluation.processes.count),
        "time": f"{seconds:.0f} s for what was not there already",
        **{f"{table.name} protocol": table.protocol for table in evaluation.tables},
        **{f"{table.name} seed": str(table.benchmark.protocol.sampling.seed) for table in evaluation.tables},
        **{f"{table.name} data": table.data for table in evaluation.tables},
        **{f"{point.name} protocol": point.table.protocol for point in evaluation.points},
        **{system.name: system.model for system in evaluation.systems},
        **{f"{rival.name}, {table}": rival.model for (table, _), rival in evaluation.external.items()},
        **evaluation.encoders,
    }
