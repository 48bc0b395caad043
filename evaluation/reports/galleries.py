"""Image grids for the report, also written as PNG sheets: systems, stages, and swapped input images.

Images that are compared in a grid are sampled from the same noise.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from evaluation.config import Gallery
from evaluation.images.systems import AFTER_STAGE_3, BEFORE_STAGE_3
from evaluation.plan import Evaluation, Images, Table
from evaluation.protocols.benchmark import Benchmark, Request, image_seed, read_image, spread
from kosmosg.files import replaced

SHOWN_EXAMPLES, SHOWN_PROMPTS, INPUTS_ACROSS = 8, 3, 10
GALLERY_SEED_OFFSET = 1_000_000_000  # beyond the prompts of any data set, for separate noise
CELL, GAP, MARGIN, DIVIDER = 128, 6, 14, 14  # pixels
FONT_SIZE, LINE, LETTER = 13, 17, 7
INK, FAINT, PAPER, RULE = (28, 32, 38), (112, 118, 128), (255, 255, 255), (212, 215, 220)
Cell = Path | str | Sequence[Path]
"""An image, a text, or the input images of a prompt."""


@dataclass(frozen=True)
class Grid:
    """Rows of cells of equal length. The first row and the first `left` cells of each row are headers."""

    rows: Sequence[Sequence[Cell]]
    left: int = 1


def shown_subjects(table: Table, count: int) -> list[str]:
    """Return subjects evenly spaced in the data set."""
    return spread(list(table.benchmark.subjects), count)


def shown_requests(table: Table, subject: str, templates: int | None = None) -> list[Request]:
    """Return the first request of each of a subject's prompts, or of `templates` evenly spaced ones."""
    own = [request for request in table.requests if request.unit == subject]
    return spread(own[:: table.benchmark.repeats], templates)


def common_requests(table: Table, subjects: Sequence[str], templates: int) -> dict[str, list[Request]]:
    """Return evenly spaced prompts that all `subjects` share, with the request of each subject."""
    first = []
    for subject in subjects:
        by_prompt = {request.prompt: request for request in shown_requests(table, subject)}
        if getattr(table.benchmark.protocol, "fed", "image") == "class_and_image":
            # Replace the class word, which differs between subjects.
            word = table.benchmark.subjects[subject].class_noun
            by_prompt = {prompt.replace(word, "…", 1): request for prompt, request in by_prompt.items()}
        first.append(by_prompt)
    shared = [prompt for prompt in first[0] if all(prompt in by_prompt for by_prompt in first)]
    return {prompt: [by_prompt[prompt] for by_prompt in first] for prompt in spread(shared, templates)}


def stage_grid(evaluation: Evaluation, table: Table, images: Images) -> Grid | None:
    """Return the same prompts before and after instruction tuning, as in the paper's Fig. 6; None without both."""
    if not all((table.name, name) in images for name in (BEFORE_STAGE_3, AFTER_STAGE_3)):
        return None
    subjects = shown_subjects(table, evaluation.config.gallery.subjects)
    rows: list[list[Cell]] = [
        [f"{prompt}: {stage} stage 3", *(images[table.name, name][request.index] for request in requests)]
        for prompt, requests in common_requests(table, subjects, SHOWN_PROMPTS).items()
        for stage, name in (("before", BEFORE_STAGE_3), ("after", AFTER_STAGE_3))
    ]
    return Grid([["input", *map(table.benchmark.kept_image, subjects)], *rows]) if rows else None


def subject_grid(evaluation: Evaluation, table: Table, images: Images, subject: str) -> Grid:
    """Return the images of all systems for a subject's prompts."""
    requests = shown_requests(table, subject, evaluation.config.gallery.templates)
    files = {name: images[table.name, name] for name in evaluation.row_names(table)}
    rows = [[name, *(own[request.index] for request in requests)] for name, own in files.items()]
    return Grid([["", *(request.prompt for request in requests)], *rows])


def example_grid(evaluation: Evaluation, table: Table, images: Images) -> Grid:
    """Return some prompts with their input images and the images of all systems."""
    requests = spread(table.requests, SHOWN_EXAMPLES)
    rows: list[list[Cell]] = [["", *(request.text for request in requests)]]
    if requests[0].inputs:
        rows.append(["input", *([table.benchmark.folder / name for name in r.inputs] for r in requests)])
    files = {name: images[table.name, name] for name in evaluation.row_names(table)}
    return Grid(rows + [[name, *(own[request.index] for request in requests)] for name, own in files.items()])


def generate_galleries(evaluation: Evaluation) -> tuple[Grid | None, Grid | None]:
    """Generate two grids with KOSMOS-G after stage 3: swapped input images, and pairs of input images.

    Returns:
        None for both without that system, and for a grid that is configured to be empty.
    """
    table = next((table for table in evaluation.tables if table.benchmark.subjects), None)
    system = next((system for system in evaluation.systems if system.name == AFTER_STAGE_3), None)
    if table is None or system is None:
        return None, None
    dataset, gallery = table.benchmark, evaluation.config.gallery
    swaps, pairs = swaps_and_pairs(dataset, gallery)
    requests = [request for row in (*swaps, *pairs) for request in row]
    files = evaluation.generate(table, system, requests, "gallery", "gallery") if requests else {}

    def grid(corner: str, rows: list[list[Request]], left: list[Cell]) -> Grid | None:
        if not rows:
            return None
        lines = [[header, *(files[request.index] for request in row)] for header, row in zip(left, rows, strict=True)]
        return Grid([[corner, *(dataset.folder / request.inputs[-1] for request in rows[0])], *lines])

    inputs: list[Cell] = [dataset.folder / row[0].inputs[0] for row in pairs]
    return grid("input", swaps, [*gallery.swap_prompts]), grid("first input: at the left; second: above", pairs, inputs)


def swaps_and_pairs(dataset: Benchmark, gallery: Gallery) -> tuple[list[list[Request]], list[list[Request]]]:
    """Return the requests of the two grids, row by row.

    The first has a row for each of `swap_prompts`, with its own noise, and a column for each subject. The second has
    `pair_prompt` for each ordered pair of subjects (row, column), all from the same noise.
    """
    subjects, sides = (spread(list(dataset.subjects), side) for side in (gallery.subjects, gallery.pair_subjects))
    rows = [(prompt, [(name,) for name in subjects], noise) for noise, prompt in enumerate(gallery.swap_prompts)]
    swaps, numbers = len(rows), count()
    if (prompt := gallery.pair_prompt) is not None:
        rows += [(prompt, [(first, second) for second in sides], swaps) for first in sides]

    def request(prompt: str, subjects: Sequence[str], noise: int) -> Request:
        text = prompt
        for subject in subjects:
            text = text.replace("<i>", f"a {dataset.subjects[subject].class_noun}", 1)
        inputs = tuple(str(dataset.kept_image(subject).relative_to(dataset.folder)) for subject in subjects)
        seed = image_seed(dataset.protocol.sampling.seed, GALLERY_SEED_OFFSET + noise)
        return Request(next(numbers), prompt, text, inputs, seed, subjects[0])

    requests = [[request(prompt, names, noise) for names in row] for prompt, row, noise in rows]
    return requests[:swaps], requests[swaps:]


def write_sheets(
    evaluation: Evaluation, images: Images, swap: Grid | None, pair: Grid | None, stages: Grid | None
) -> None:
    """Write sheets/: the given grids; subjects.png, systems.png and inputs.png of a benchmark with subjects; a sheet
    named after each other benchmark (captions.png for COCO)."""
    grids = {"swap": swap, "pairs": pair, "stages": stages}
    for table in evaluation.tables:
        if table.benchmark.subjects:
            grids |= subject_sheets(evaluation, table, images)
        else:
            grids["captions" if table.name == "coco" else table.name] = system_sheet(evaluation, table, images)
    for name, grid in grids.items():
        if grid is not None:
            with replaced(evaluation.output / "sheets" / f"{name}.png") as temporary:
                sheet(grid).save(temporary, format="PNG", optimize=True)


def subject_sheets(evaluation: Evaluation, table: Table, images: Images) -> dict[str, Grid]:
    """Return the sheets `inputs` (the input image of each subject, as in the paper's Fig. 8), `subjects` (subjects by
    prompts) and `systems` (all systems, with another prompt for each subject)."""
    dataset, gallery, names = table.benchmark, evaluation.config.gallery, evaluation.row_names(table)
    subjects = shown_subjects(table, gallery.subjects)
    rows: list[list[Cell]] = []
    for start in range(0, len(dataset.subjects), INPUTS_ACROSS):
        some = list(dataset.subjects)[start : start + INPUTS_ACROSS]
        blank = [""] * (min(INPUTS_ACROSS, len(dataset.subjects)) - len(some))
        rows.append([*map(dataset.kept_image, some), *blank])
        rows.append([*(dataset.subjects[name].class_noun for name in some), *blank])
    sheets = {"inputs": Grid(rows, left=0)}
    if requests := common_requests(table, subjects, gallery.templates):
        prompts, inputs = list(requests), [dataset.kept_image(name) for name in subjects]
        if AFTER_STAGE_3 in names:
            files = images[table.name, AFTER_STAGE_3]
            rows = [[inputs[i], *(files[requests[p][i].index] for p in prompts)] for i in range(len(subjects))]
            sheets["subjects"] = Grid([["input", *prompts], *rows])
        rows = [["prompt", "input", *names]]
        for number, image in enumerate(inputs):
            request = requests[prompts[number % len(prompts)]][number]
            rows.append([request.prompt, image, *(images[table.name, name][request.index] for name in names)])
        sheets["systems"] = Grid(rows, left=2)
    return sheets


def system_sheet(evaluation: Evaluation, table: Table, images: Images) -> Grid:
    """Return prompts by systems, with only the first run of each experiment."""
    shown: dict[str, str] = {}
    experiments = {system.name: system.experiment for system in table.systems}
    for name in evaluation.row_names(table):
        shown.setdefault((experiments.get(name) or name).replace("_", " "), name)
    rows: list[list[Cell]] = [
        [request.text, *(images[table.name, name][request.index] for name in shown.values())]
        for request in spread(table.requests, SHOWN_EXAMPLES)
    ]
    return Grid([["caption", *shown], *rows])


def sheet(grid: Grid) -> Image.Image:
    """Render a grid. Rows of text only are as high as their text; a line separates the left headers."""
    wrapped = [[textwrap.wrap(c, CELL // LETTER) if isinstance(c, str) else c for c in row] for row in grid.rows]
    heights = [
        CELL if any(isinstance(cell, Path) for cell in row) else LINE * max(len(lines) for lines in row)  # type: ignore[arg-type]
        for row in wrapped
    ]
    lefts = [MARGIN + i * (CELL + GAP) + (DIVIDER if 0 < grid.left <= i else 0) for i in range(len(wrapped[0]))]
    size = (lefts[-1] + CELL + MARGIN, 2 * MARGIN + sum(heights) + GAP * (len(heights) - 1))
    page = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(size=FONT_SIZE)
    if 0 < grid.left < len(lefts):
        x = lefts[grid.left] - (DIVIDER + GAP) // 2
        draw.line([(x, MARGIN), (x, page.height - MARGIN)], fill=RULE)
    top = MARGIN
    for row, height in zip(wrapped, heights, strict=True):
        for place, (left, cell) in enumerate(zip(lefts, row, strict=True)):
            if isinstance(cell, Path):
                page.paste(fit(cell), (left, top))
            elif height == CELL:
                draw.multiline_text((left, top + CELL / 2), "\n".join(cell), fill=INK, font=font, anchor="lm")  # type: ignore[arg-type]
            else:  # centred, aligned to the bottom
                ink, start = FAINT if place < grid.left or not grid.left else INK, top + height - len(cell) * LINE
                for number, line in enumerate(cell):
                    draw.text((left + CELL / 2, start + number * LINE), line, fill=ink, font=font, anchor="ma")  # type: ignore[arg-type]
        top += height + GAP
    return page


def fit(file: Path, side: int = CELL) -> Image.Image:
    """Resize an image to a cell, cropping it to a square; small images are enlarged by whole factors, without blur."""
    image = read_image(file)
    sharp = side % image.width == 0 and image.width == image.height
    if not sharp:
        shorter = min(image.size)
        left, top = (image.width - shorter) // 2, (image.height - shorter) // 2
        image = image.crop((left, top, left + shorter, top + shorter))
    return image.resize((side, side), Image.Resampling.NEAREST if sharp else Image.Resampling.LANCZOS)
