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
from pathlib import Path

from rich.console import Console
from torch import Tensor

from evaluation.config import EvaluationConfig
from evaluation.images.provenance import environment
from evaluation.images.references import reference_features
from evaluation.images.systems import COPY_OF_INPUT, REAL_IMAGES
from evaluation.parallel.processes import Processes
from evaluation.parallel.sharing import Sharing
from evaluation.plan import Evaluation, Table
from evaluation.protocols.coco import Coco
from evaluation.protocols.dreambench import DreamBench
from evaluation.reports.breakdown import breakdown, write_breakdown
from evaluation.reports.breakdown import markdown as breakdown_markdown
from evaluation.reports.guidance import markdown as guidance_markdown
from evaluation.reports.pages import Manifests, draw_pages, swap_grids
from evaluation.scores.results import Score, markdown, print_results, read_results, write_results
from evaluation.scores.scoring import Encoders, Sample, Scorer, load_encoders, shared_encoders, write_samples
from evaluation.tracking import track
from kosmosg.files import write_text

PROVENANCE = "provenance.json"


def evaluate(config: EvaluationConfig, console: Console | None = None) -> list[Score]:
    """Run an evaluation and print its tables, alone or as one of several processes, of which the first has the scores.

    Raises:
        ProcessError: another process failed.
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
            print_results(scores, console)
            console.print(f"The report is in '{evaluation.output / 'report.html'}'.")
    return scores


def plan(config: EvaluationConfig, console: Console, processes: Processes) -> Evaluation:
    """The first process looks before the others: what is wrong is told once, what is downloaded is downloaded once."""
    if processes.first:
        evaluation = Evaluation(config, console, processes)
        processes.share(lambda: {table.name: table.data for table in evaluation.tables})
        return evaluation
    return Evaluation(config, console, processes, processes.share(dict))


def generate_and_score(evaluation: Evaluation) -> list[Score]:
    """Generate together; the first process scores, while the others lend it a hand, and writes tables and pages."""
    config, output, processes = evaluation.config, evaluation.output, evaluation.processes
    started = time.monotonic()
    # Encoders first: weights that are not theirs must not come to light after hours of generation.
    sharing = Sharing(processes, output / ".features", config.encoder_batch_size, evaluation.console)
    encoders = {table.name: load_encoders(table.name, config, sharing) for table in evaluation.tables}
    for table in evaluation.tables:
        if (judge := encoders[table.name].judge) is not None and isinstance(table.dataset, DreamBench):
            judge.require(table.dataset)
    output.mkdir(parents=True, exist_ok=True)
    manifests = generate_all(evaluation)
    grids = swap_grids(evaluation)
    if not processes.first:
        sharing.serve(shared_encoders(encoders))
        return []
    scores, samples = score_all(evaluation, encoders, manifests)
    sharing.dismiss()
    parts = breakdown(samples, evaluation.kinds(), config.bootstrap, evaluation.sorts())
    write_samples(samples, output / "samples.csv", output)
    write_breakdown(parts, output / "breakdown.csv")
    write_results(scores, output / "results.json")
    sections = [*breakdown_markdown(parts), *guidance_markdown(scores)]
    write_text(output / "results.md", markdown(scores, evaluation.notes(scores), sections))
    provenance = provenance_of(evaluation, time.monotonic() - started)
    draw_pages(evaluation, manifests, grids, scores, parts, provenance)
    content = {"key": evaluation.key(), "written": provenance, "config": asdict(config)}
    write_text(output / PROVENANCE, json.dumps(content, indent=1, ensure_ascii=False))
    track(config.wandb, output, scores, content)
    return scores


def generate_all(evaluation: Evaluation) -> Manifests:
    """The images of every table, and of the points of the curve."""
    manifests = {
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
    evaluation: Evaluation, encoders: Mapping[str, Encoders], manifests: Manifests
) -> tuple[list[Score], list[Sample]]:
    """Scores of the tables and of the curve; samples of the tables alone."""
    scores: list[Score] = []
    samples: list[Sample] = []
    for table in evaluation.tables:
        with evaluation.console.status(f"Scoring {table.name}"):
            found = score_table(evaluation, table, encoders[table.name], manifests)
        scores += found[0]
        samples += found[1]
    for point in evaluation.points:
        table = point.table
        scorer = Scorer(table.name, table.protocol, encoders["dreambench"], evaluation.config.bootstrap)
        for system in point.systems:
            manifest = manifests[point.name, system.name]
            manifest.verify()
            images = [table.dataset.scored(r, manifest.image_file(r.index)) for r in table.requests]
            found = [score for score in scorer(system.name, images)[0] if score.table == table.name]
            scores += [replace(score, guidance_scale=point.scale) for score in found]
    return scores, samples


def score_table(
    evaluation: Evaluation, table: Table, encoders: Encoders, manifests: Manifests
) -> tuple[list[Score], list[Sample]]:
    """The scores of every row of one table, the rows that need no generation first."""
    dataset = table.dataset
    if isinstance(dataset, DreamBench):
        rows = [(REAL_IMAGES, dataset.other_real_images()), (COPY_OF_INPUT, dataset.copies_of_input())]
        real = kid = None
    else:
        rows, kid = [(REAL_IMAGES, dataset.held_out_images())], dataset.protocol.kid
        real = real_side(evaluation, table, dataset, encoders)
    for system in evaluation.systems:
        manifest = manifests[table.name, system.name]
        manifest.verify()
        rows.append((system.name, [dataset.scored(r, manifest.image_file(r.index)) for r in table.requests]))
    for (name, _), rival in evaluation.external.items():
        if name == table.name:
            rows.append((rival.name, [dataset.scored(r, rival.files[r.index]) for r in table.requests]))
    scorer = Scorer(table.name, table.protocol, encoders, evaluation.config.bootstrap, real, kid)
    scores: list[Score] = []
    samples: list[Sample] = []
    drawn = {system.name for system in evaluation.systems}
    for name, images in rows:
        if images:
            found = scorer(name, images)
            scores += found[0] if name in drawn else [replace(score, protocol=table.task) for score in found[0]]
            samples += found[1]
    variants = {system.name: asdict(system.variant) for system in evaluation.systems if system.variant is not None}
    return [replace(score, **variants.get(score.system, {})) for score in scores], samples


def real_side(evaluation: Evaluation, table: Table, dataset: Coco, encoders: Encoders) -> Tensor:
    """The features of FID's real side, N×F, from an earlier evaluation where there was one."""
    references, encode = dataset.references(), encoders.fid_real
    assert encode is not None
    key = {
        "protocol": table.protocol,
        "data": table.data,
        "weights": evaluation.encoders[f"{table.name}.fid"],
        "n": str(len(references)),
    }
    kept = evaluation.config.reference_features
    folder = evaluation.output / "references" if kept is None else Path(kept)
    return reference_features(folder, key, lambda: encode(references), evaluation.console)


def is_finished(evaluation: Evaluation) -> bool:
    """Whether the output holds the results of this very configuration, models and data."""
    files = [evaluation.output / name for name in (PROVENANCE, "results.json", "report.html")]
    return all(file.is_file() for file in files) and json.loads(files[0].read_text())["key"] == evaluation.key()


def provenance_of(evaluation: Evaluation, seconds: float) -> dict[str, str]:
    """Everything that the numbers came from, for the report's last section."""
    return {
        **environment(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "processes": str(evaluation.processes.count),
        "time": f"{seconds:.0f} s for what was not there already",
        **{f"{table.name} protocol": table.protocol for table in evaluation.tables},
        **{f"{table.name} seed": str(table.dataset.protocol.sampling.seed) for table in evaluation.tables},
        **{f"{table.name} data": table.data for table in evaluation.tables},
        **{f"{point.name} protocol": point.table.protocol for point in evaluation.points},
        **{system.name: system.model for system in evaluation.systems},
        **{f"{rival.name}, {table}": rival.model for (table, _), rival in evaluation.external.items()},
        **evaluation.encoders,
    }
