"""From the images of an evaluation to its report and its PNG sheets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.images.external import External
from evaluation.images.manifest import Manifest
from evaluation.images.systems import AFTER_STAGE_3, BEFORE_STAGE_3
from evaluation.plan import Evaluation, Table
from evaluation.protocols.requests import Request, spread
from evaluation.reports import guidance
from evaluation.reports.breakdown import Part
from evaluation.reports.gallery import common_requests, shown_requests, shown_subjects, swaps_and_pairs
from evaluation.reports.plots import loss_charts
from evaluation.reports.report import Examples, Grid, Input, Report, SubjectBlock, write_report
from evaluation.reports.sheets import contact_sheet, sheet
from evaluation.scores.results import Score
from kosmosg.files import replaced, write_text

SHOWN_EXAMPLES, SHOWN_PROMPTS = 8, 3
Manifests = dict[tuple[str, str], Manifest | External]
"""By table and model."""


def draw_pages(
    evaluation: Evaluation,
    manifests: Manifests,
    grids: tuple[Grid | None, Grid | None],
    scores: list[Score],
    parts: list[Part],
    notes: list[str],
    provenance: dict[str, str],
) -> None:
    """Write report.html and sheets/."""
    config, folder = evaluation.config, evaluation.output / "sheets"
    folder.mkdir(exist_ok=True)
    manifests = {**manifests, **evaluation.external}
    with_subjects = [table for table in evaluation.tables if table.benchmark.subjects]
    others = [table for table in evaluation.tables if not table.benchmark.subjects]
    inputs = [image for table in with_subjects for image in input_images(table)]
    stages = next((stage_grid(evaluation, table, manifests) for table in with_subjects), None)
    for table in with_subjects:
        write_sheets(evaluation, table, manifests, *grids)
    if inputs:
        save(contact_sheet([i.file for i in inputs], [i.class_noun for i in inputs]), folder / "inputs.png")
    if stages is not None:
        rows = [["input", *stages.top]]
        rows += [[label, *row] for label, row in zip(stages.labels, stages.rows, strict=True)]
        save(sheet([""] * (1 + len(stages.top)), rows), folder / "stages.png")
    for table in others:
        write_example_sheet(evaluation, table, manifests)
    for metric, svg in guidance.charts(scores):
        write_text(folder / f"guidance_{metric}.svg", svg)
    runs = [
        ("Stage 2, alignment", config.models.before_stage_3),
        ("Stage 3, instruction tuning", config.models.after_stage_3),
    ]
    report = Report(
        scores=scores,
        parts=parts,
        inputs=inputs,
        subjects=[block for table in with_subjects for block in subject_blocks(evaluation, table, manifests)],
        stages=stages,
        swap=grids[0],
        pair=grids[1],
        pair_prompt=config.gallery.pair_prompt or "",
        examples=[examples(evaluation, table, manifests) for table in others],
        curves=loss_charts([(title, Path(run)) for title, run in runs if run is not None]),
        notes=notes,
        provenance=provenance,
    )
    write_report(report, evaluation.output / "report.html")


def input_images(table: Table) -> list[Input]:
    """Every subject with the one image that is given of it, as in the paper's Fig. 8."""
    dataset = table.benchmark
    return [
        Input(name, subject.class_noun, dataset.kept_image(name), subject.kind)
        for name, subject in dataset.subjects.items()
    ]


def stage_grid(evaluation: Evaluation, table: Table, manifests: Manifests) -> Grid | None:
    """The same prompts and noise before and after instruction tuning, as in the paper's Fig. 6; None without both."""
    stages = {BEFORE_STAGE_3: "before", AFTER_STAGE_3: "after"}
    if not all((table.name, name) in manifests for name in stages):
        return None
    subjects = shown_subjects(table.benchmark, evaluation.config.gallery.subjects)
    prompts, requests = common_requests(table.benchmark, table.requests, subjects, SHOWN_PROMPTS)
    if not prompts:
        return None
    rows, labels = [], []
    for place, prompt in enumerate(prompts):
        for name, stage in stages.items():
            manifest = manifests[table.name, name]
            rows.append([manifest.image_file(requests[subject][place].index) for subject in subjects])
            labels.append(f"{prompt}: {stage}")
    return Grid(top=[table.benchmark.kept_image(name) for name in subjects], rows=rows, labels=labels)


def subject_blocks(evaluation: Evaluation, table: Table, manifests: Manifests) -> list[SubjectBlock]:
    """The shown subjects with the images of every system."""
    dataset, gallery = table.benchmark, evaluation.config.gallery
    blocks = []
    for name in shown_subjects(dataset, gallery.subjects):
        requests = shown_requests(dataset, table.requests, name, gallery.templates)
        systems = [
            (system, [manifests[table.name, system].image_file(request.index) for request in requests])
            for system in evaluation.rows(table)
        ]
        prompts = [request.prompt for request in requests]
        blocks.append(SubjectBlock(name, dataset.subjects[name].class_noun, dataset.kept_image(name), prompts, systems))
    return blocks


def swap_grids(evaluation: Evaluation) -> tuple[Grid | None, Grid | None]:
    """Draw the two galleries with KOSMOS-G after stage 3; none without it."""
    table = next((table for table in evaluation.tables if table.benchmark.subjects), None)
    system = next((system for system in evaluation.systems if system.name == AFTER_STAGE_3), None)
    if table is None or system is None:
        return None, None
    dataset, gallery = table.benchmark, evaluation.config.gallery
    swaps, pairs = swaps_and_pairs(dataset, gallery)
    requests = [request for row in (*swaps, *pairs) for request in row]
    if not requests:
        return None, None
    manifest = evaluation.generate_into("gallery", table, system, requests)

    def grid(rows: list[list[Request]], **headers: Any) -> Grid | None:
        if not rows:
            return None
        drawn = [[manifest.image_file(request.index) for request in row] for row in rows]
        return Grid([dataset.folder / request.inputs[-1] for request in rows[0]], drawn, **headers)

    left = [dataset.folder / row[0].inputs[0] for row in pairs]
    return grid(swaps, labels=gallery.swap_prompts), grid(pairs, left=left)


def examples(evaluation: Evaluation, table: Table, manifests: Manifests) -> Examples:
    """Some prompts with the image of every system."""
    requests = spread(table.requests, SHOWN_EXAMPLES)
    return Examples(
        title=next(iter(table.benchmark.tables.values())),
        prompts=[request.text for request in requests],
        inputs=[[table.benchmark.folder / name for name in request.inputs] for request in requests],
        systems=[
            (name, [manifests[table.name, name].image_file(request.index) for request in requests])
            for name in evaluation.rows(table)
        ],
    )


def write_sheets(
    evaluation: Evaluation, table: Table, manifests: Manifests, swap: Grid | None, pair: Grid | None
) -> None:
    """sheets/subjects.png, systems.png, swap.png and pairs.png, for a README."""
    dataset, gallery, folder = table.benchmark, evaluation.config.gallery, evaluation.output / "sheets"
    subjects = shown_subjects(dataset, gallery.subjects)
    prompts, requests = common_requests(dataset, table.requests, subjects, gallery.templates)
    names = evaluation.rows(table)
    if prompts and AFTER_STAGE_3 in names:
        manifest = manifests[table.name, AFTER_STAGE_3]
        rows = [
            [dataset.kept_image(name), *(manifest.image_file(request.index) for request in requests[name])]
            for name in subjects
        ]
        save(sheet(["input", *prompts], rows), folder / "subjects.png")
    if prompts:
        of_systems = [manifests[table.name, name] for name in names]
        # Another prompt for each subject, so that a small sheet shows many.
        rows = []
        for place, name in enumerate(subjects):
            request = requests[name][place % len(prompts)]
            outputs = (manifest.image_file(request.index) for manifest in of_systems)
            rows.append([request.prompt, dataset.kept_image(name), *outputs])
        save(sheet(["prompt", "input", *names], rows, inputs=2), folder / "systems.png")
    if swap is not None:
        rows = [[*column] for column in zip(swap.top, *swap.rows, strict=True)]
        save(sheet(["input", *swap.labels], rows), folder / "swap.png")
    if pair is not None:
        corner = "first input: at the left; second: above"
        rows = [[corner, *pair.top], *([left, *row] for left, row in zip(pair.left, pair.rows, strict=True))]
        save(sheet([""] * (1 + len(pair.top)), rows), folder / "pairs.png")


def write_example_sheet(evaluation: Evaluation, table: Table, manifests: Manifests) -> None:
    """A prompt a row, a system a column; of the runs of one experiment, the first. COCO's is sheets/captions.png."""
    shown: dict[str, str] = {}
    variants = {system.name: system.variant for system in evaluation.systems if system.variant is not None}
    for name in evaluation.rows(table):
        shown.setdefault(variants[name].experiment if name in variants else name, name)
    columns: Mapping[str, Manifest | External] = {
        label.replace("_", " "): manifests[table.name, name] for label, name in shown.items()
    }
    rows: Sequence[list] = [
        [request.text, *(manifest.image_file(request.index) for manifest in columns.values())]
        for request in spread(table.requests, SHOWN_EXAMPLES)
    ]
    name = "captions" if table.name == "coco" else table.name
    save(sheet(["caption", *columns], rows), evaluation.output / "sheets" / f"{name}.png")


def save(picture, file: Path) -> None:
    with replaced(file) as temporary:
        picture.save(temporary, format="PNG", optimize=True)
